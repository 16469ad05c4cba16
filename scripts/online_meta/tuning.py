"""Rates of online meta-learners: chosen on validation streams, kept in a file."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import jaxbo
from scripts.online_meta.methods import INFINITY, METHODS, Rates
from scripts.online_meta.runs import Run, Trace

FIRST_SEED = 1000
GRIDS: dict[str, tuple[float, ...]] = {  # The second number is where a search begins.
  "inner": (0.1, 0.2, 0.4, 0.8),
  "outer": (3e-4, 1e-3, 3e-3, 1e-2),
  "in_scale": (0.1, 0.3, 1.0),
  "modulation": (0.5, 2.0, 5.0),
}
DEVIATIONS = (0.003, 0.01, 0.03)  # of BGD, instead of inner rates
Play = Callable[[str, Rates], Sequence[Run]]


def grid_of(name: str, field: str) -> tuple[float, ...]:
  """What is tried for a rate of a method."""
  return DEVIATIONS if (name, field) == ("bgd", "inner") else GRIDS[field]


def score(runs: Sequence[Run]) -> float:
  """Accuracy before adaptation, the mean over streams; minus infinity for what diverged."""
  accuracies = [np.mean(run.trace.before) for run in runs]
  finite = all(np.isfinite(run.trace.loss).all() for run in runs)
  return float(np.mean(accuracies)) if finite else -INFINITY


def search(name: str, play: Play) -> tuple[Rates, float]:
  """One rate after the other, from the middle of the grids; thresholds at the end.

  The thresholds of LEEDS are those that its version that is told the switches would like: the same
  rates, so that what separates the two is the detectors.
  """
  method = METHODS[name]
  fields = ("inner", *method.moves)
  rates = Rates(**{field: grid_of(name, field)[1] for field in fields})
  if method.thresholds:
    rates = rates._replace(switch=INFINITY)
  tried: dict[Rates, tuple[float, Sequence[Run]]] = {}

  def try_out(rates: Rates) -> float:
    key = Rates(*(round(value, 9) if math.isfinite(value) else str(value) for value in rates))
    if key not in tried:
      runs = play("leeds_told" if name == "leeds" else name, rates)
      tried[key] = (score(runs), runs)
    return tried[key][0]

  for field in fields:
    options = [rates._replace(**{field: value}) for value in grid_of(name, field)]
    rates = max(options, key=try_out)
  best = try_out(rates)
  if not math.isfinite(best):
    raise ValueError(f"every rate of the grid diverged for {name}")
  runs = next(runs for value, runs in tried.values() if value == best)
  if method.thresholds:
    found = thresholds(runs)
    calibrated = rates._replace(switch=found.switch)
    if "shift" in method.thresholds:
      rates = calibrated._replace(shift=found.shift)
    elif try_out(calibrated) > best:  # C-MAML: no meta-updates where the task seems to change.
      rates, best = calibrated, try_out(calibrated)
  return rates, best


def thresholds(runs: Sequence[Run]) -> jaxbo.Thresholds:
  """Calibrated on the scores of all validation streams, without their first rounds."""

  def joined(pick: Callable[[Trace], Any]) -> np.ndarray:
    rows = [pick(run.trace)[:, 1:].ravel() for run in runs]
    first = pick(runs[0].trace)[:1, 0]  # What calibrate leaves out.
    return np.concatenate([first, *rows])

  scores = jaxbo.Scores(
    jnp.asarray(joined(lambda trace: trace.switch_score)),
    jnp.asarray(joined(lambda trace: trace.shift_score)),
  )
  truth = joined(lambda trace: trace.task_switch), joined(lambda trace: trace.domain != 0)
  return jaxbo.calibrate(scores, *truth, rule="roc")


def read(path: Path) -> dict[str, Any]:
  """The tables of a file, by setting and method; empty if there is no file."""
  return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, setting: str, name: str, rates: Rates) -> None:
  """Replaces the rates of a method; numbers that it does not have are left out."""
  tables = read(path)
  kept = {
    field: float(f"{value:.4g}") if math.isfinite(value) else "inf"
    for field, value in rates._asdict().items()
    if not math.isnan(value)
  }
  tables.setdefault(setting, {})[name] = kept
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(tables, indent=1, sort_keys=True) + "\n")


def look_up(tables: dict[str, Any], setting: str, name: str) -> Rates:
  """The rates of a method.

  Raises:
    ValueError: if none were chosen, or one is NaN.
  """
  try:
    found = {field: float(value) for field, value in tables[setting][name].items()}
  except KeyError:
    raise ValueError(
      f"no rates were chosen for {name} on {setting}: choose them with --tune"
    ) from None
  for field, value in found.items():
    if math.isnan(value):
      raise ValueError(f"{name}: {field} must be a number or an infinity, got nan")
  return Rates(**found)


def all_rates(path: Path, setting: str, names: Sequence[str]) -> Iterator[tuple[str, Rates]]:
  """The rates of methods; LEEDS that is told has those of LEEDS."""
  tables = read(path)
  for name in names:
    yield name, look_up(tables, setting, "leeds" if name == "leeds_told" else name)
