"""Learning rates of online methods: chosen on seeds that are not reported, kept in a file."""

import itertools
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scripts.online_hyperopt.methods import Rates

FIRST_SEED, NUM_SEEDS = 100, 3


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
Table = dict[str, dict[str, list[float]]]  # by method and window


def candidates(grid: Grid, *, moves_x: bool, damped: bool) -> Rates:
  """The points of a grid, as arrays ``[candidates]``; only what matters to a method is varied."""
  outer, damping = grid.outer if moves_x else (0.0,), grid.damping if damped else (0.0,)
  values = itertools.product(grid.inner, outer, damping)
  return Rates(*np.asarray(list(values), np.float32).T)


def choose(rates: Rates, losses: np.ndarray) -> Rates:
  """The candidate of the least loss; what is not finite is never chosen.

  Raises:
    ValueError: if nothing is finite.
  """
  if not np.isfinite(losses).any():
    raise ValueError("every learning rate of the grid diverged")
  best = np.argmin(np.where(np.isfinite(losses), losses, np.inf))
  return Rates(*(float(f"{values[best]:.6g}") for values in rates))


def read(path: Path) -> dict[str, Table]:
  """The tables in a file, by problem, data set and model; empty if there is no file."""
  return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, name: str, table: Table) -> None:
  """Replaces the entries of ``table`` in the table ``name`` of a file."""
  tables = read(path)
  old = tables.setdefault(name, {})
  for method, windows in table.items():
    old[method] = old.get(method, {}) | windows
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(tables, indent=1, sort_keys=True) + "\n")


def look_up(tables: dict[str, Table], name: str, method: str, window: int) -> Rates:
  """The rates chosen for a window; else for the largest smaller one, or the smallest there is.

  Raises:
    ValueError: if none were chosen.
  """
  windows = tables.get(name, {}).get(method)
  if not windows:
    raise ValueError(
      f"no learning rates were chosen for {method} on {name}: choose them with --tune, or give "
      "inner_learning_rate and outer_learning_rate"
    )
  sizes = sorted(map(int, windows))
  size = max((size for size in sizes if size <= window), default=sizes[0])
  return Rates(*windows[str(size)])
