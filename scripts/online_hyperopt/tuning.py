"""Learning rates of online methods: chosen on seeds that are not reported, by cumulative loss."""

import functools
import itertools
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from scripts.common.folder import Row
from scripts.common.study import Results, Run, Study
from scripts.common.table import Table
from scripts.common.task import Cell, Spent, Task
from scripts.online_hyperopt import runs
from scripts.online_hyperopt.config import RATES_FILE, Config, Data, read
from scripts.online_hyperopt.methods import METHODS, Rates, Variant

SEEDS = range(100, 103)
SMOKE = {
  "streams": ("static",), "methods": ("ogd", "sobow", "oagd"), "windows": (5,), "rounds": 20,
  "batch_size": 16, "seeds": 2,
}  # fmt: skip


class Grid(NamedTuple):
  """What is tried: learning rates of both levels, and dampings of conjugate gradient."""

  inner: tuple[float, ...]
  outer: tuple[float, ...]
  damping: tuple[float, ...]


GRIDS = {  # by problem and data set; coarse where a run takes long
  "loss_tuning/digits": Grid((1.0, 3.0, 10.0), (0.3, 1.0, 3.0, 10.0, 30.0), (0.0, 0.1)),
  "loss_tuning/mnist": Grid((0.03, 0.1, 0.3, 1.0), (0.3, 3.0, 30.0), (0.1, 1.0)),
  "ridge/digits": Grid((1.0, 3.0, 10.0), (1.0, 10.0, 100.0, 1000.0), (0.0,)),
  "ridge/newsgroups": Grid((1.0, 3.0, 10.0), (1.0, 10.0, 100.0, 1000.0), (0.0,)),
  "representation/digits": Grid((0.1, 0.3, 1.0), (0.1, 0.3, 1.0, 3.0), (0.0, 0.1)),
  "representation/mnist": Grid((0.03, 0.1, 0.3), (0.01, 0.03, 0.1), (0.1,)),
}


def grid_of(config: Config) -> Grid:
  """The grid of a problem and a data set."""
  name = f"{config.problem}/{config.dataset}"
  if name not in GRIDS:
    raise ValueError(f"tune must be of one of {', '.join(GRIDS)}; got {name}")
  return GRIDS[name]


def candidates(grid: Grid, *, moves_x: bool, damped: bool) -> Rates:
  """The points of a grid, as arrays ``[candidates]``; only what matters to a method is varied."""
  outer, damping = grid.outer if moves_x else (0.0,), grid.damping if damped else (0.0,)
  values = itertools.product(grid.inner, outer, damping)
  return Rates(*np.asarray(list(values), np.float32).T)


class Trial(Task):
  """All candidates of a method, side by side; a step is a stream with all seeds."""

  def __init__(self, run: Run[Config], variant: Variant):
    config, method = run.config, METHODS[variant.method]
    moves_x = config.problem == "representation" or method.responds
    self.rates = candidates(grid_of(config), moves_x=moves_x, damped=method.damped)
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
    mean = np.asarray(np.sum(np.asarray(state) / len(state), axis=0, dtype=np.float64))
    rounded = [[float(f"{value:.6g}") for value in of] for of in np.array(self.rates).T]
    return [
      dict(zip((*Rates._fields, "cumulative_loss"), (*rates, loss), strict=True))
      for rates, loss in zip(rounded, mean.tolist(), strict=True)
    ]


def chosen(rows: pd.DataFrame) -> dict[Variant, tuple[Rates, float]]:
  """For each method the candidate of the least finite loss, and that loss."""
  found = dict[Variant, tuple[Rates, float]]()
  for row in rows.to_dict("records"):
    variant, loss = Variant(row["method"], row["window"]), row["cumulative_loss"]
    if loss < (found[variant][1] if variant in found else math.inf):  # Never what is not finite.
      found[variant] = (Rates(*(row[name] for name in Rates._fields)), loss)
  return found


class Tuning(Study[Config]):
  """The choice of rates."""

  config = Config
  smoke: ClassVar = SMOKE

  def prepare(self, config: Config) -> Data:
    """The examples and the problem."""
    grid_of(config)
    return read(config)

  def cells(self, run: Run[Config]) -> Iterable[Cell]:
    """Every method that has rates of its own."""
    for variant in run.config.variants():
      if not METHODS[variant.method].published:
        make = functools.partial(Trial, run, variant)
        yield Cell(variant._asdict(), make, len(run.config.stream_names()), variant.label)

  def tables(self, results: Results[Config]) -> Iterable[Table]:
    """What was chosen."""
    columns = ("method", "inner", "outer", "damping", "cum. loss")
    rows = [
      [variant.label, *(f"{rate:g}" for rate in rates), f"{loss:.2f}"]
      for variant, (rates, loss) in chosen(results.rows).items()
    ]
    yield Table(f"Rates for {results.config.name()}", columns, rows)

  def remarks(self, results: Results[Config]) -> Iterable[str]:
    """What has no rates, and where the others are."""
    tried = dict.fromkeys(zip(results.rows["method"], results.rows["window"], strict=True))
    for variant in (Variant(*of) for of in tried):
      if variant not in chosen(results.rows):
        yield f"{variant.label}: every learning rate of the grid diverged"
    yield f"The rates are in {file_of(results.config)}, for --rates-file"

  def draw(self, run: Run[Config]) -> None:
    """Writes the rates beside those that the file has already."""
    path = file_of(run.config)
    tables: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    table = tables.setdefault(run.config.name(), {})
    for variant, (rates, _) in chosen(run.results().rows).items():
      table.setdefault(variant.method, {})[str(variant.window)] = list(rates)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tables, indent=1, sort_keys=True) + "\n")


def file_of(config: Config) -> Path:
  """Where rates are written: never into the sources."""
  given = config.rates_file
  if given is None or given.resolve() == RATES_FILE.resolve():
    return config.output_dir / "rates.json"
  return given
