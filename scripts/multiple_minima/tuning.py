"""The settings of hyper-cleaning's methods: 16 points of a grid for each, alike.

Every point runs on the part of the data that no report uses. A method learns from training examples
with wrong labels and from the clean ones of its outer loss; the point is judged by others, since
the outer loss itself would favour what overfits it. What is judged is a model that is trained anew
with the learnt weights alone (``TARGET``): that was declared before anything was run.
"""

import functools
import itertools
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from scripts.common import cleaning, tuning
from scripts.common.study import Results, Run
from scripts.common.table import Column, Table
from scripts.common.task import Cell
from scripts.common.tuning import Choice
from scripts.multiple_minima.config import Config, read
from scripts.multiple_minima.methods import LABELS, METHODS
from scripts.multiple_minima.training import Training

TARGET = "retrained"  # Not "accuracy", of the model that a method itself ends with.
FIRST_SEED = 100


def grid_of(method: str) -> list[dict[str, Any]]:
  """The settings of the points of a grid."""
  grid = METHODS[method].grid
  return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def means(rows: pd.DataFrame, column: str) -> dict[str, pd.Series]:
  """For each method the mean over seeds at each point; minus infinity where a seed diverged."""
  rows = rows.fillna({column: -np.inf})
  groups = rows.groupby("method", sort=False)
  return {str(method): mine.groupby("point")[column].mean() for method, mine in groups}


class Tuning(tuning.Tuning[Config]):
  """The choice."""

  config = Config

  def prepare(self, config: Config) -> cleaning.Read | None:
    """The examples that are tuned on."""
    return read(config)

  def cells(self, run: Run[Config]) -> Iterable[Cell]:
    """All points of all grids on all seeds."""
    seeds = range(FIRST_SEED, FIRST_SEED + run.config.seeds)
    for method in run.config.methods:
      for (point, settings), seed in itertools.product(enumerate(grid_of(method)), seeds):
        make = functools.partial(Training, run, method, settings, seed)
        label = f"{LABELS[method]}, point {point}, seed {seed}"
        yield Cell({"method": method, "point": point, "seed": seed}, make, 1, label)

  def choices(self, rows: pd.DataFrame) -> Iterable[Choice]:
    """For each method the point of the best mean, the first of equals."""
    for method, of_point in means(rows, TARGET).items():
      best: Any = of_point.idxmax()
      yield Choice(LABELS[method], (method,), grid_of(method)[best], float(of_point[best]))

  def tables(self, results: Results[Config]) -> Iterable[Table]:
    """What was chosen, and how far the other target could have been had instead."""
    other, cell = means(results.rows, "accuracy"), lambda value: Column("").cell([value])
    body = []
    for method, of_point in means(results.rows, TARGET).items():
      best: Any = of_point.idxmax()
      numbers = (of_point[best], other[method][best], other[method].max())
      settings = json.dumps(grid_of(method)[best])[1:-1].replace('"', "")
      body.append([LABELS[method], *map(cell, numbers), settings])
    title = f"{results.config.dataset}: settings chosen by the first column; validation accuracies"
    columns = ["method", TARGET, "by gradients", "best by gradients", "settings"]
    yield Table(title, columns, body)
