"""Fields of a config: ranges, names, help, and the flags that repeat a run."""

import sys
from pathlib import Path
from typing import Annotated

import jax
import pytest
import tyro

from scripts.common import study
from scripts.common.config import (
  FREE,
  Among,
  Checked,
  Count,
  Index,
  NonNegative,
  Positive,
  Share,
  StudyConfig,
)
from tests.scripts.common import toy_study


class Rates(Checked):
  """Rates."""

  temperature: Positive = 3.0
  """Of the weights."""


class Config(StudyConfig):
  """All kinds of fields."""

  methods: Annotated[tuple[str, ...], Among(("itd", "aid", "esj")), FREE] = ("itd", "aid")
  """Which methods."""
  dataset: Annotated[str, Among({"digits": 0, "mnist": 1})] = "digits"
  """Which data."""
  none_of: Annotated[tuple[str, ...], Among(("x",), least=0)] = ()
  """May be empty."""
  count: Count = 1
  index: Index = 0
  positive: Positive | None = None
  non_negative: NonNegative = 0.0
  share: Share = 0.0
  sweep: bool = True
  sizes: tuple[Count, ...] = (1, 2)
  note: str = ""
  rates: Rates = Rates()


@pytest.mark.parametrize(
  "wrong, message",
  [
    ({"count": 0}, "count should be greater than or equal to 1, got 0"),
    ({"count": 1.5}, "count should be a valid integer"),
    ({"index": -1}, "index should be greater than or equal to 0, got -1"),
    ({"positive": 0.0}, "positive should be greater than 0, got 0.0"),
    ({"positive": float("nan")}, "positive should be a finite number, got nan"),
    ({"non_negative": -0.1}, "non_negative should be greater than or equal to 0, got -0.1"),
    ({"non_negative": float("inf")}, "non_negative should be a finite number, got inf"),
    ({"share": 1.0}, "share should be less than 1, got 1.0"),
    ({"sizes": (1, 0)}, "sizes should be greater than or equal to 1, got 0"),
    ({"rates": {"temperature": 0}}, "rates.temperature should be greater than 0, got 0"),
    ({"methods": ("itd", "magic")}, "methods should be among itd, aid, esj; got magic"),
    ({"methods": ("itd", "itd")}, "methods should name each one once, got itd itd"),
    ({"methods": ()}, "methods should name at least 1 of itd, aid, esj; got none"),
    ({"dataset": "cifar"}, "dataset should be among digits, mnist; got cifar"),
    ({"seeds": 0}, "seeds should be greater than or equal to 1, got 0"),
    ({"resume": True, "overwrite": True}, "resume and overwrite should not be given together"),
    ({"first_seed": -1}, "first_seed should be greater than or equal to 0, got -1"),
    ({"colour": 1}, "colour"),
    ({"count": 0, "index": -1}, "count should be greater than or equal to 1, got 0; index should"),
  ],
)
def test_what_is_out_of_range_is_said_in_one_sentence(wrong, message):
  with pytest.raises(ValueError) as caught:
    Config(**wrong)
  assert message in str(caught.value)
  assert "\n" not in str(caught.value)


def test_values_are_checked_again_where_they_change():
  config = Config(count=3)
  assert config.but(index=2) == Config(count=3, index=2)
  with pytest.raises(ValueError, match="index should be"):
    config.but(index=-1)


def test_the_identity_is_what_is_not_free():
  config = Config(output_dir=Path("x"), methods=("esj",), seeds=9, positive=0.5, resume=True)
  names = {
    "dataset", "none_of", "count", "index", "positive", "non_negative", "share", "sweep", "sizes",
    "note", "rates",
  }  # fmt: skip
  assert config.identity().keys() == names
  assert config.identity()["sizes"] == [1, 2]
  assert config.identity() == config.but(output_dir=Path("y"), seeds=1).identity()
  assert config.identity() != config.but(rates=Rates(temperature=1.0)).identity()


def test_the_flags_repeat_the_run():
  config = Config(
    methods=("esj",),
    sizes=(4, 5),
    sweep=False,
    smoke=True,
    rates=Rates(temperature=0.5),
    data_dir=Path("/data"),
    output_dir=Path("/tmp/x"),
    resume=True,
    save_results="digits",
  )
  flags = "--smoke --methods esj --no-sweep --sizes 4 5 --rates.temperature 0.5"
  assert config.flags() == flags
  again = tyro.cli(Config, args=flags.split())
  assert again.identity() == config.identity()
  assert Config().flags() == ""
  assert Config(note="it's two words").flags() == "--note 'it'\"'\"'s two words'"


def test_help_lists_the_names_of_methods_and_bad_values_end_with_2(monkeypatch, capsys):
  for arguments, status, said in (
    (["--help"], 0, "Among: plain, double."),
    (["--methods", "magic"], 2, "methods should be among plain, double; got magic"),
  ):
    monkeypatch.setattr(sys, "argv", ["toy", *arguments])
    with pytest.raises(SystemExit) as ended:
      study.main(toy_study.Config, lambda config: 0, None)
    assert ended.value.code == status
    assert said in " ".join("".join(capsys.readouterr()).split())


def test_settings_are_overridden_by_what_is_given():
  import dataclasses

  @dataclasses.dataclass(frozen=True)
  class Settings:
    positive: float = 7.0
    other: int = 3

  assert Config().override(Settings()) == Settings()
  assert Config(positive=0.5).override(Settings()) == Settings(positive=0.5)


def test_smoke_cuts_what_was_not_given(monkeypatch):
  monkeypatch.setattr(Config, "smallest", {"count": 9, "sweep": False, "rates": {"temperature": 1}})
  small = Config(smoke=True, count=1)
  assert (small.count, small.sweep, small.rates) == (1, False, Rates(temperature=1.0))
  assert Config().count == 1
  told = []
  monkeypatch.setattr(jax.config, "update", lambda *option: None)  # It would outlive the test.
  monkeypatch.setattr(sys, "argv", ["x", "--smoke", "--count", "1", "--sizes", "1", "2"])
  with pytest.raises(SystemExit):
    study.main(Config, lambda config: told.append(config) or 0, None)
  assert told == [small]
  assert tyro.cli(Config, args=["--smoke"], default=Config(smoke=True)).count == 9
  assert small.flags() == "--smoke --count 1"
