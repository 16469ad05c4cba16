"""Rates of online meta-learners: chosen on validation streams, kept in a file."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

import jaxbo
from scripts.common import tuning
from scripts.common.study import Results, Run
from scripts.common.table import Table
from scripts.common.task import Cell, Row, Spent, Task
from scripts.common.tuning import Choice
from scripts.online_meta import pretraining, runs
from scripts.online_meta.config import Config, read
from scripts.online_meta.data import Domains
from scripts.online_meta.methods import METHODS, Rates
from scripts.online_meta.report import Trace
from scripts.online_meta.runs import Streams

FIRST_SEED = 1000
GRIDS: dict[str, tuple[float, ...]] = {  # The second number is where a search begins.
  "inner": (0.1, 0.2, 0.4, 0.8),
  "outer": (3e-4, 1e-3, 3e-3, 1e-2),
  "in_scale": (0.1, 0.3, 1.0),
  "modulation": (0.5, 2.0, 5.0),
}
DEVIATIONS = (0.003, 0.01, 0.03)  # of BGD, instead of inner rates
Player = Callable[[str, Rates], Sequence[Trace]]


def player(run: Run[Config]) -> Player:
  """What plays a method on the validation streams."""
  seeds = np.arange(run.config.seeds_at_once) + FIRST_SEED
  streams = [Streams(p, seeds, reported=False) for p in run.config.stay_probabilities]
  return lambda name, rates: [runs.play(run, name, rates, of) for of in streams]


def grid_of(name: str, field: str) -> tuple[float, ...]:
  """What is tried for a rate of a method."""
  return DEVIATIONS if (name, field) == ("bgd", "inner") else GRIDS[field]


def score(traces: Sequence[Trace]) -> float:
  """Accuracy before adaptation, the mean over streams; minus infinity for what diverged."""
  finite = all(np.isfinite(trace.loss).all() for trace in traces)
  return float(np.mean([np.mean(trace.before) for trace in traces])) if finite else -math.inf


def search(name: str, play: Player) -> tuple[Rates, float]:
  """One rate after the other, from the middle of the grids; thresholds at the end.

  The thresholds of LEEDS are those that its version that is told the switches would like: the same
  rates, so that what separates the two is the detectors. The accuracy is minus infinity if every
  rate diverged.
  """
  method = METHODS[name]
  grids = {field: grid_of(name, field) for field in ("inner", *method.moves)}
  rates = Rates(**{field: grid[1] for field, grid in grids.items()})
  if method.thresholds:
    rates = rates._replace(switch=math.inf)
  tried: dict[str, Sequence[Trace]] = {}

  def traces_of(rates: Rates) -> Sequence[Trace]:
    key = repr(rates)  # NaN does not equal itself.
    if key not in tried:
      tried[key] = play("leeds_told" if name == "leeds" else name, rates)
    return tried[key]

  def try_out(rates: Rates) -> float:
    return score(traces_of(rates))

  for field, grid in grids.items():
    rates = max((rates._replace(**{field: value}) for value in grid), key=try_out)
  best = try_out(rates)
  if not method.thresholds or not math.isfinite(best):
    return rates, best
  found = thresholds(traces_of(rates))
  calibrated = rates._replace(switch=found.switch)
  if "shift" in method.thresholds:
    return calibrated._replace(shift=found.shift), best
  better = try_out(calibrated) > best  # C-MAML: no meta-updates where the task seems to change.
  return (calibrated, try_out(calibrated)) if better else (rates, best)


def thresholds(traces: Sequence[Trace]) -> jaxbo.meta.Thresholds:
  """Calibrated on the scores of all validation streams, without their first rounds."""

  def joined(pick: Callable[[Trace], Any]) -> np.ndarray:
    rows = [pick(trace)[:, 1:].ravel() for trace in traces]
    first = pick(traces[0])[:1, 0]  # What calibrate leaves out.
    return np.concatenate([first, *rows])

  scores = joined(lambda trace: trace.switch_score), joined(lambda trace: trace.shift_score)
  truth = joined(lambda trace: trace.task_switch), joined(lambda trace: trace.domain != 0)
  return jaxbo.meta.calibrate(jaxbo.meta.Scores(*map(jnp.asarray, scores)), *truth, rule="roc")


def rates_of(run: Run[Config], method: str) -> Rates:
  """The rates of a method; where LEEDS has no thresholds, those of the model of this run.

  Another machine rounds otherwise, and pre-training then ends at another model, with other scores.
  """
  rates, wanted = run.config.rates_of(method), METHODS[method].thresholds
  own = [name for name in wanted if math.isnan(getattr(rates, name))]
  if not own:
    return rates

  def find() -> dict[str, float]:
    found = thresholds(player(run)("leeds_told", rates))
    return {name: float(getattr(found, name)) for name in own}

  return rates._replace(**run.note("thresholds", find))


class Search(Task):
  """The search of a method, in one step; the state are its rates and their accuracy."""

  def __init__(self, run: Run[Config], name: str):
    self.name, self.play = name, player(run)
    self.state = jnp.zeros(len(Rates._fields) + 1)

  def step(self, state: jax.Array, t: int) -> tuple[jax.Array, None]:
    """Searches."""
    del state, t
    rates, accuracy = search(self.name, self.play)
    return jnp.array([*rates, accuracy]), None

  def result(self, state: jax.Array, spent: Spent) -> Row:
    """The rates; thresholds of LEEDS are of one pre-trained model, so no other run gets them."""
    del spent
    *numbers, accuracy = np.asarray(state).tolist()
    row = Rates(*(float(f"{value:.4g}") for value in numbers))._asdict() | {"accuracy": accuracy}
    if self.name == "leeds":
      row |= {"accuracy_with_detectors": score(self.play("leeds", Rates(*numbers)))}
      row |= dict.fromkeys(METHODS["leeds"].thresholds, math.nan)
    return row


class Tuning(tuning.Tuning[Config]):
  """The choice of rates."""

  config = Config

  def prepare(self, config: Config) -> Domains:
    """The images."""
    return read(config)

  def cells(self, run: Run[Config]) -> Iterable[Cell]:
    """Every method; LEEDS that is told has the rates of LEEDS."""
    names = [name for name in run.config.methods if name != "leeds_told"]
    for begins in dict.fromkeys(METHODS[name].begins for name in names):
      if begins != "random":
        yield pretraining.cell(run, begins)
    for name in names:
      yield Cell({"method": name}, functools.partial(Search, run, name), 1, METHODS[name].label)

  def choices(self, rows: pd.DataFrame) -> Iterable[Choice]:
    """The rates that each search has found."""
    for row in rows.to_dict("records"):
      known = {name: row[name] for name in Rates._fields if not math.isnan(row[name])}
      kept = {name: "inf" if math.isinf(value) else value for name, value in known.items()}
      yield Choice(METHODS[row["method"]].label, (row["method"],), kept, row["accuracy"])

  def tables(self, results: Results[Config]) -> Iterable[Table]:
    """What was chosen."""
    text = lambda value: "-" if math.isnan(value) else f"{value:.4g}"
    rows = [
      [METHODS[name].label, *map(text, numbers)]
      for name, *numbers in results.rows.itertuples(index=False)
    ]
    title = f"Rates for {results.config.name()}"
    yield Table(title, list(results.rows.columns), rows).without_dashes()
