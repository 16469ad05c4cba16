"""Chosen rates: what a file keeps, what is said of it, and where it is."""

import json
import math
import types
from pathlib import Path

from scripts.common.tuning import Choice, TunedConfig, Tuning


class Config(TunedConfig):
  def name(self):
    return "toy"


class Toy(Tuning[Config]):
  def choices(self, rows):
    yield Choice("A", ("a",), {"inner": 0.1}, 0.5)
    yield Choice("B, K=2", ("b", "2"), [1.0, 2.0], 0.5)
    yield Choice("B, K=3", ("b", "3"), [1.0, 2.0], math.inf)


def test_rates_are_written_beside_others_and_what_diverged_is_left_out_and_said(tmp_path):
  mine = Config(output_dir=tmp_path / "out", rates_file=tmp_path / "new" / "rates.json")
  assert mine.rates_tables() == {}
  known = types.SimpleNamespace(config=mine, rows=None)
  run = types.SimpleNamespace(config=mine, results=lambda: known)
  mine.rates_file.parent.mkdir()
  others = {"other": {"a": 1}, "toy": {"a": {"outer": 3}, "b": {"1": [3.0]}}}
  mine.rates_file.write_text(json.dumps(others))
  Toy().draw(run)
  expected = {"a": {"inner": 0.1}, "b": {"1": [3.0], "2": [1.0, 2.0]}}
  assert mine.rates_tables() == {"other": {"a": 1}, "toy": expected}
  assert list(Toy().remarks(known)) == [
    "B, K=3: every rate of the grid diverged",
    f"The rates are in {mine.rates_file}, for --rates-file",
  ]


def test_rates_are_never_written_into_the_sources(tmp_path):
  sources = Path(__file__).with_name("rates.json")
  for given in (None, sources, sources.parent / ".." / "common" / "rates.json"):
    config = Config(output_dir=tmp_path, rates_file=given)
    assert config.rates_in_sources() == sources
    assert config.rates_to_write() == tmp_path / "rates.json"
