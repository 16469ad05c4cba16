"""When an ES response pays: few outer variables, and runs that are long or have no derivative.

Labels of digits come from 4, 16 or 64 sources, half of which confuse each class with the next one.
A weight for each source is learnt, so that a model of the weighted examples does well on clean
ones. The model is trained by 1,000 smooth steps, by 1,000 quantised ones, whose derivative is zero,
or by scikit-learn. ESJ, full ES (of the outer loss) and ESJ with the published scaling stand beside
ITD, ITD with remat, AID-CG (of runs that do not converge), random search and TPE.

Each method may spend the time of 160 inner runs. Each has a rate (Adam's, or the width of the box
that is searched), chosen among three for each kind of run by the outer loss with 16 sources, on one
seed that is not reported. The report is of the test accuracy of the best x so far, by the outer
loss.

Docs: docs/experiments/es_scaling.md has the tables and says where ES stops paying.

TPE needs Optuna, which is in the group bench:

  uv run --group bench python -m scripts.es_regime                        15 minutes on one core
  uv run python -m scripts.es_regime --smoke                              without TPE
  uv run --group bench python -m scripts.es_regime --tune --sources 16    chooses rates, 4 minutes
"""

import functools
import math
from collections.abc import Iterable
from typing import Any

import pandas as pd

from scripts.common import data, study, table, tuning
from scripts.common.data import Examples
from scripts.common.study import Results, Run, Study
from scripts.common.table import Column, Table
from scripts.common.task import Cell, Row
from scripts.common.tuning import Choice
from scripts.es_regime import methods, plots
from scripts.es_regime.config import Cellmate, Config
from scripts.es_regime.methods import METHODS, REFERENCES, RUNS, SEARCHES
from scripts.es_regime.tasks import Descent, Reference, Search

LABELS = {name: method.label for name, method in METHODS.items()}
LINES = 8  # Of a cell.
TUNING_SEEDS = range(100, 101)


def cell_of(run: Run[Config], cell: Cellmate, rate: float | None, **more: Any) -> Cell:
  """The task of a cell, with its rate, and ``more`` columns in its name."""
  task = Search if cell.method in SEARCHES else Descent
  make = functools.partial(task, run, cell, rate)
  if cell.method in REFERENCES:
    make = functools.partial(Reference, run, cell)
  steps = cell.steps(run.config.budget)
  label = f"seed {cell.seed}, {cell.run}, {cell.sources} sources, {LABELS[cell.method]}"
  return Cell(cell._asdict() | more, make, steps, label, max(1, steps // LINES))


def read(config: Config) -> Examples:
  """The digits; refuses what lacks Optuna."""
  if "tpe" in config.methods:
    methods.optuna()
  return data.digits()


class EsRegime(Study[Config]):
  """The experiment."""

  config = Config

  def depends_on(self, config: Config) -> Row:
    """The rates."""
    return {"rates": config.rates_tables().get(config.name(), {})}

  def prepare(self, config: Config) -> Examples:
    """The digits; refuses what has no rates."""
    for cell in config.cells(config.all_seeds()):
      if cell.method not in REFERENCES:
        config.rate_of(cell)
    return read(config)

  def cells(self, run: Run[Config]) -> Iterable[Cell]:
    """Every method on every seed, for each run and number of sources."""
    for cell in run.config.cells(run.config.all_seeds()):
      rate = None if cell.method in REFERENCES else run.config.rate_of(cell)
      yield cell_of(run, cell, rate)

  def tables(self, results: Results[Config]) -> Iterable[Table]:
    """For each run the accuracy by the number of sources, and what it cost with the most."""
    for run, rows in results.rows.groupby("run", sort=False):
      sizes = {str(p): Column(f"{p}") for p in rows["sources"].unique()}
      wide = by_sources(rows, "test_accuracy")
      title = f"{RUNS[str(run)]}; test accuracy by the number of sources"
      yield table.spread(title, wide, "method", LABELS, sizes)
      if "esj" in set(rows["method"]):
        minus = f"{RUNS[str(run)]}; test accuracy by sources, in pairs"
        yield table.paired(minus, wide, "method", "esj", LABELS, sizes)
      costs = f"{RUNS[str(run)]}; CPU seconds by the number of sources"
      seconds = {str(p): Column(f"{p}", 1) for p in rows["sources"].unique()}
      wide = by_sources(rows[rows["steps"] > 0], "cpu_seconds")
      most = rows["sources"].max()
      memory = rows[rows["sources"] == most].groupby("method")["temporary_bytes"].first()
      wide["bytes"] = [value if (value := memory[m]) >= 0 else math.nan for m in wide["method"]]
      seconds["bytes"] = Column(f"temp. MiB, {most}", 2, 2**-20, mean_only=True)
      yield table.spread(costs, wide, "method", LABELS, seconds).without_dashes()

  def draw(self, run: Run[Config]) -> None:
    """Accuracy against seconds and against bytes."""
    results = run.results()
    plots.draw(results.lines, results.rows, LABELS, run.path / "es_regime.png")


class Tuning(tuning.Tuning[Config]):
  """The choice of rates."""

  config = Config

  def prepare(self, config: Config) -> Examples:
    """The digits."""
    return read(config)

  def cells(self, run: Run[Config]) -> Iterable[Cell]:
    """Every rate of every method that has rates of its own."""
    for cell in run.config.cells(TUNING_SEEDS):
      method = METHODS[cell.method]
      for rate in () if method.rate_of else method.grid:
        yield cell_of(run, cell, rate, tried=rate)

  def choices(self, rows: pd.DataFrame) -> Iterable[Choice]:
    """The rate of the least outer loss."""
    rows = rows.fillna({"outer_loss": math.inf})
    best = rows.loc[rows.groupby(["run", "method"], sort=False)["outer_loss"].idxmin()]
    for row in best.to_dict("records"):
      label = f"{LABELS[row['method']]} on {row['run']}"
      yield Choice(label, (row["run"], row["method"]), row["tried"], row["outer_loss"])

  def tables(self, results: Results[Config]) -> Iterable[Table]:
    """What was chosen."""
    body = [[c.label, f"{c.rates:g}", f"{c.score:.3f}"] for c in self.choices(results.rows)]
    yield Table("Rates", ["method", "rate", "outer loss"], body)


def by_sources(rows: pd.DataFrame, values: str) -> pd.DataFrame:
  """A row for each method and seed, with a value for each number of sources."""
  wide = rows.pivot(index=["method", "seed"], columns="sources", values=values)
  return wide.loc[rows["method"].unique()].rename(columns=str).reset_index()


def run(config: Config) -> int:
  """Reports, or chooses rates."""
  return study.run(Tuning() if config.tune else EsRegime(), config)


if __name__ == "__main__":
  study.main(Config, run, __doc__)
