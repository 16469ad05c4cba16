"""Learning rates of all methods alike, and the temperature of IR-DRO, chosen on validation."""

import functools
import itertools
import math
from collections.abc import Iterable

import pandas as pd

from scripts.common import tuning
from scripts.common.study import Results, Run
from scripts.common.table import Table
from scripts.common.task import Cell, Row, Spent
from scripts.common.tuning import Choice
from scripts.continual_lm import runs
from scripts.continual_lm.config import Config
from scripts.continual_lm.methods import HAVE_TEMPERATURE, LABELS, START, Chosen
from scripts.continual_lm.runs import Given, Training
from scripts.continual_lm.train import State

SEEDS = (100,)  # No report has them.
FACTORS = (0.1, 0.3, 1.0, 3.0)  # Of the learning rate that is not chosen.
TEMPERATURES = (1.0, 3.0, 10.0)  # In nats per token.


class Trial(Training):
  """A candidate; nothing is seen of the test part."""

  def result(self, state: State, spent: Spent) -> Row:
    """What it is chosen by."""
    if self.method == START:
      self.keep(state.params)
    return {"validation_loss": spent.lines[-1]["validation_loss"] if spent.lines else math.nan}


def candidates(config: Config, method: str) -> list[Chosen]:
  """What is tried of a method."""
  rates = [float(f"{factor * config.continual_learning_rate():.3g}") for factor in FACTORS]
  temperatures = TEMPERATURES if method in HAVE_TEMPERATURE else (None,)
  return [Chosen(*values, True) for values in itertools.product(rates, temperatures)]


class Tuning(tuning.Tuning[Config]):
  """The choice of rates."""

  config = Config

  def prepare(self, config: Config) -> Given:
    """What the report is on, too."""
    return runs.prepare(config)

  def cells(self, run: Run[Config]) -> Iterable[Cell]:
    """The checkpoint, and all candidates from there at every share of noise."""
    config = run.config
    every = list(itertools.product(config.corruptions, runs.methods_of(run)))
    start = runs.start(run, Trial)
    yield start
    for seed in SEEDS:
      for corruption, method in every:
        for one in candidates(config, method):
          key = {"corruption": corruption, "method": method, "seed": seed}
          make = functools.partial(Trial, run, **key, chosen=one)
          label = f"{LABELS[method]}, learning rate {one.learning_rate:g}"
          # With a column for every rate; 0 where a method has no temperature.
          key |= {"learning_rate": one.learning_rate, "temperature": one.temperature or 0.0}
          yield Cell(key, make, config.steps_of(method), label, needs=(start,))

  def choices(self, rows: pd.DataFrame) -> Iterable[Choice]:
    """For each method at each share of noise the candidate of the least finite loss."""
    tried = rows[rows["method"] != START].fillna({"validation_loss": math.inf})
    rates = ["corruption", "method", "learning_rate", "temperature"]
    means = tried.groupby(rates, sort=False)["validation_loss"].mean().reset_index()
    best = means.groupby(rates[:2], sort=False)["validation_loss"].idxmin()
    for row in means.loc[best].to_dict("records"):
      temperature = row["temperature"] or None
      label = f"{LABELS[row['method']]}, {row['corruption']:.0%} noise"
      found = {"learning_rate": row["learning_rate"], "temperature": temperature}
      yield Choice(label, (row["method"], f"{row['corruption']:g}"), found, row["validation_loss"])

  def tables(self, results: Results[Config]) -> Iterable[Table]:
    """What was chosen."""
    columns = ("method", "learning rate", "temperature", "validation loss")
    rows = [
      [one.label, f"{one.rates['learning_rate']:g}", _text(one.rates["temperature"]),
       f"{one.score:.4f}"]
      for one in self.choices(results.rows)
    ]  # fmt: skip
    yield Table(f"Rates for {results.config.name()}", columns, rows)

  def remarks(self, results: Results[Config]) -> Iterable[str]:
    """Whether a better rate may lie beyond the grid."""
    yield from super().remarks(results)
    for one in self.choices(results.rows):
      method, _ = one.entry
      ends = sorted(candidate.learning_rate for candidate in candidates(results.config, method))
      if one.rates["learning_rate"] in (ends[0], ends[-1]):
        rate = one.rates["learning_rate"]
        yield f"{one.label}: the learning rate {rate:g} is an end of the grid"


def _text(temperature: float | None) -> str:
  return "-" if temperature is None else f"{temperature:g}"
