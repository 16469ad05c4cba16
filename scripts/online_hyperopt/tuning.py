"""Learning rates of online methods: chosen on seeds that are not reported, by cumulative loss."""

import functools
import itertools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from scripts.common import tuning
from scripts.common.study import Results, Run
from scripts.common.table import Table
from scripts.common.task import Cell, Row, Spent, Task
from scripts.common.tuning import Choice
from scripts.online_hyperopt import runs
from scripts.online_hyperopt.config import Config, Data, read
from scripts.online_hyperopt.methods import METHODS, Rates, Variant

SEEDS = range(100, 103)
GRIDS = {  # of rates, by problem and data set; coarse where a run takes long
  "loss_tuning/digits": Rates((1.0, 3.0, 10.0), (0.3, 1.0, 3.0, 10.0, 30.0), (0.0, 0.1)),
  "loss_tuning/mnist": Rates((0.03, 0.1, 0.3, 1.0), (0.3, 3.0, 30.0), (0.1, 1.0)),
  "ridge/digits": Rates((1.0, 3.0, 10.0), (1.0, 10.0, 100.0, 1000.0), (0.0,)),
  "ridge/newsgroups": Rates((1.0, 3.0, 10.0), (1.0, 10.0, 100.0, 1000.0), (0.0,)),
  "representation/digits": Rates((0.1, 0.3, 1.0), (0.1, 0.3, 1.0, 3.0), (0.0, 0.1)),
  "representation/mnist": Rates((0.03, 0.1, 0.3), (0.01, 0.03, 0.1), (0.1,)),
}


def candidates(grid: Rates, *, moves_x: bool, damped: bool) -> Rates:
  """The points of a grid, as arrays ``[candidates]``; only what matters to a method is varied."""
  outer, damping = grid.outer if moves_x else (0.0,), grid.damping if damped else (0.0,)
  values = itertools.product(grid.inner, outer, damping)
  return Rates(*np.asarray(list(values), np.float32).T)


class Trial(Task):
  """All candidates of a method, side by side; a step is a stream with all seeds."""

  def __init__(self, run: Run[Config], variant: Variant):
    config, method = run.config, METHODS[variant.method]
    moves_x = config.problem == "representation" or method.responds
    grid = GRIDS[f"{config.problem}/{config.dataset}"]
    self.rates = candidates(grid, moves_x=moves_x, damped=method.damped)
    self.losses = runs.player_of(run, variant).losses
    names = config.stream_names()
    draw = lambda name: runs.draw(config, run.data, name, SEEDS)
    self.stream = lambda t: run.shared(names[t], lambda: draw(names[t]))
    self.state = jnp.zeros((len(names), len(self.rates.inner)))

  def step(self, state: jax.Array, t: int) -> tuple[jax.Array, None]:
    """Plays stream ``t``."""
    return state.at[t].set(self.losses(self.rates, self.stream(t))), None

  def result(self, state: jax.Array, spent: Spent) -> list[Row]:
    """A row for each candidate, with the mean over streams."""
    del spent
    mean: Any = np.sum(np.asarray(state) / len(state), axis=0, dtype=np.float64)
    rounded = [[float(f"{value:.6g}") for value in of] for of in np.array(self.rates).T]
    return [
      Rates(*rates)._asdict() | {"cumulative_loss": loss}
      for rates, loss in zip(rounded, mean.tolist(), strict=True)
    ]


class Tuning(tuning.Tuning[Config]):
  """The choice of rates."""

  config = Config

  def prepare(self, config: Config) -> Data:
    """The examples and the problem."""
    name = f"{config.problem}/{config.dataset}"
    if name not in GRIDS:
      raise ValueError(f"tune must be of one of {', '.join(GRIDS)}; got {name}")
    return read(config)

  def cells(self, run: Run[Config]) -> Iterable[Cell]:
    """Every method that has rates of its own."""
    for variant in run.config.variants():
      if not METHODS[variant.method].published:
        make = functools.partial(Trial, run, variant)
        yield Cell(variant._asdict(), make, len(run.config.stream_names()), variant.label)

  def choices(self, rows: pd.DataFrame) -> Iterable[Choice]:
    """For each method the candidate of the least finite loss."""
    rows = rows.fillna({"cumulative_loss": math.inf})
    best = rows.groupby(["method", "window"], sort=False)["cumulative_loss"].idxmin()
    for row in rows.loc[best].to_dict("records"):
      variant, loss = Variant(row["method"], row["window"]), row["cumulative_loss"]
      rates = [row[name] for name in Rates._fields]
      yield Choice(variant.label, (variant.method, str(variant.window)), rates, loss)

  def tables(self, results: Results[Config]) -> Iterable[Table]:
    """What was chosen."""
    columns = ("method", *Rates._fields, "cum. loss")
    rows = [
      [choice.label, *(f"{rate:g}" for rate in choice.rates), f"{choice.score:.2f}"]
      for choice in self.choices(results.rows)
      if math.isfinite(choice.score)
    ]
    yield Table(f"Rates for {results.config.name()}", columns, rows)
