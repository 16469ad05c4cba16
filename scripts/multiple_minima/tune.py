"""Chooses the settings of ``scripts.multiple_minima`` for hyper-cleaning.

  python -m scripts.multiple_minima.tune                        15 minutes on 2 CPU cores

Every method has a grid of 16 points (``scripts/multiple_minima/methods.py``) and runs each on
seeds 100 and 101, which no report uses, for the same budget of gradients as the script. The points
of the best mean test accuracy at the end of the budget are written into ``chosen.json`` of the
run's folder: what belongs into ``METHODS``.
"""

import functools
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pandas as pd

from scripts.common import cleaning, study
from scripts.common.config import FREE, Among, Count, Index, StudyConfig
from scripts.common.files import write
from scripts.common.study import Results, Run, Study
from scripts.common.table import Column, Table
from scripts.common.task import Cell, Row, Spent
from scripts.multiple_minima.methods import COMPARED, DATASETS, LABELS, METHODS
from scripts.multiple_minima.training import BUDGETS, Parts, Training, make_problem


class Config(StudyConfig):
  """Chooses the settings of scripts.multiple_minima on seeds that it does not report."""

  smallest: ClassVar = {"methods": ("pdbo",), "seeds": 1, "budget": 30}

  dataset: Annotated[str, Among(DATASETS)] = "digits"
  """The data set."""
  methods: Annotated[tuple[str, ...], Among(COMPARED), FREE] = COMPARED
  """Which methods to tune."""
  budget: Count | None = None
  """Gradient evaluations, instead of the data set's default."""
  seeds: Count = 2
  """How many seeds."""
  first_seed: Index = 100
  """The first of them."""
  output_dir: Annotated[Path, FREE] = Path("runs/tune_multiple_minima")
  """Where a row for each point and seed goes, and what was chosen."""


class Point(Training):
  """A method with settings of its grid on one seed; one step spends the budget."""

  def result(self, state: Any, spent: Spent) -> Row:
    """The test accuracy at the end of the budget."""
    return {"accuracy": self.values(state)["accuracy"]}


def grid_of(method: str) -> list[dict[str, Any]]:
  """The settings of the points of a grid."""
  grid = METHODS[method].grid
  return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def best(rows: pd.DataFrame) -> dict[str, tuple[dict[str, Any], pd.Series]]:
  """For each method the settings of the best mean accuracy, the first of equals, and accuracies."""
  chosen = {}
  for method, mine in rows.groupby("method", sort=False):
    of_point = mine.groupby("point")["accuracy"]
    point: Any = of_point.mean().idxmax()
    chosen[str(method)] = grid_of(str(method))[point], of_point.get_group(point)
  return chosen


class Tune(Study[Config]):
  """The choice."""

  config = Config
  program = "scripts.multiple_minima.tune"

  def prepare(self, config: Config) -> cleaning.Read:
    """The examples."""
    return cleaning.read(config.dataset, config.data_dir)

  def cells(self, run: Run[Config]) -> Iterable[Cell]:
    """All points of all grids on all seeds."""
    config, settings = run.config, DATASETS[run.config.dataset]
    budget = config.budget or BUDGETS[config.dataset]

    def problem(method, seed):
      split = lambda: cleaning.split(run.data, settings, 0.5, seed)
      return make_problem(method, run.shared(seed, split), settings, seed)

    @functools.lru_cache(1)  # Programs of earlier points are not needed again.
    def parts(method, point):
      of_first = problem(method, config.first_seed)
      return Parts(method, grid_of(method)[point], settings, budget, of_first)

    def make(method, point, seed):
      return Point(parts(method, point), problem(method, seed), seed)

    for method in config.methods:
      for point, seed in itertools.product(range(len(grid_of(method))), config.all_seeds()):
        key = {"method": method, "point": point, "seed": seed}
        yield Cell(key, functools.partial(make, **key), 1, f"{LABELS[method]}, {point}")

  def tables(self, results: Results[Config]) -> Iterable[Table]:
    """The best of each method."""
    body = [
      [LABELS[method], Column("").cell(accuracies), json.dumps(settings)]
      for method, (settings, accuracies) in best(results.rows).items()
    ]
    yield Table("Best mean test accuracy", ["method", "accuracy", "settings"], body)

  def draw(self, run: Run[Config]) -> None:
    """Writes what was chosen."""
    chosen = {method: settings for method, (settings, _) in best(run.results().rows).items()}
    write(run.path / "chosen.json", json.dumps(chosen, indent=1) + "\n")


if __name__ == "__main__":
  study.main(Config, functools.partial(study.run, Tune()), __doc__)
