"""Rates that were chosen before a report, on seeds or streams that no report uses.

The ``rates.json`` of a room has a table for each setting, with an entry for each method. ``--tune``
writes such a file, ``--rates-file`` reads it.
"""

import inspect
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import pandas as pd

from scripts.common.config import FREE, StudyConfig
from scripts.common.files import read_json, write, writing
from scripts.common.study import Results, Run, Study


class TunedConfig(StudyConfig):
  """The fields of an experiment whose rates were chosen before."""

  tune: bool = False
  """Chooses rates on seeds or streams that are not reported and writes them to rates.json in
  output_dir, or to rates_file if one is given; no report."""
  rates_file: Annotated[Path | None, FREE] = None
  """The file of chosen rates, instead of the one in the sources."""

  def name(self) -> str:
    """The name of the setting, and so of the table of its rates."""
    raise NotImplementedError

  def rates_in_sources(self) -> Path:
    """The file of rates beside the module of the class."""
    return Path(inspect.getfile(type(self))).with_name("rates.json")

  def rates_to_write(self) -> Path:
    """Where chosen rates are written: never into the sources."""
    given = self.rates_file
    if given is None or given.resolve() == self.rates_in_sources().resolve():
      return self.output_dir / "rates.json"
    return given

  def rates_tables(self) -> dict[str, Any]:
    """The tables of the chosen rates, by setting."""
    return _read(self.rates_file or self.rates_in_sources())


Config = TypeVar("Config", bound=TunedConfig)


class Choice(NamedTuple):
  """What was chosen for a method."""

  label: str  # of the method
  entry: tuple[str, ...]  # the keys of its entry in the table of a setting
  rates: Any  # as JSON has them
  score: float  # what they were chosen by; not finite if all rates diverged


class Tuning(Study[Config]):
  """The choice of rates; a room gives cells, the table, and what was chosen by their rows."""

  def choices(self, rows: pd.DataFrame) -> Iterable[Choice]:
    """What was chosen for each method that was tried."""
    raise NotImplementedError

  def remarks(self, results: Results[Config]) -> Iterable[str]:
    """What has no rates, and where the others are."""
    for choice in self.choices(results.rows):
      if not math.isfinite(choice.score):
        yield f"{choice.label}: every rate of the grid diverged"
    yield f"The rates are in {results.config.rates_to_write()}, for --rates-file"

  def draw(self, run: Run[Config]) -> None:
    """Writes the rates beside those that the file has already."""
    path = run.config.rates_to_write()
    tables = _read(path)
    for choice in self.choices(run.results().rows):
      if math.isfinite(choice.score):
        *groups, last = run.config.name(), *choice.entry
        table = tables
        for group in groups:
          table = table.setdefault(group, {})
        table[last] = choice.rates
    with writing(path):
      path.parent.mkdir(parents=True, exist_ok=True)
    write(path, json.dumps(tables, indent=1, sort_keys=True) + "\n")


def _read(path: Path) -> dict[str, Any]:
  return read_json(path, "restore it, or write it anew with --tune") if path.exists() else {}
