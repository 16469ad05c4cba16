"""Learning rates of online methods: chosen on seeds that are not reported, kept in a file."""

import itertools
import json
from pathlib import Path

import numpy as np

from scripts.common.online_methods import Rates

FIRST_SEED, NUM_SEEDS = 100, 3
INNER = (0.1, 0.3, 1.0, 3.0)
OUTER = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
DAMPING = (0.0, 0.1)

Table = dict[str, dict[str, list[float]]]  # by method and window


def grid(*, moves_x: bool, has_system: bool) -> Rates:
  """What is tried, as arrays ``[candidates]``; only what matters to a method is varied."""
  values = itertools.product(INNER, OUTER if moves_x else (0.0,), DAMPING if has_system else (0.0,))
  return Rates(*np.asarray(list(values), np.float32).T)


def choose(candidates: Rates, losses: np.ndarray) -> Rates:
  """The candidate of the least loss; what is not finite is never chosen.

  Raises:
    ValueError: if nothing is finite.
  """
  if not np.isfinite(losses).any():
    raise ValueError("every learning rate of the grid diverged")
  best = np.argmin(np.where(np.isfinite(losses), losses, np.inf))
  return Rates(*(float(f"{values[best]:.6g}") for values in candidates))


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
