"""Rates of online meta-learners: chosen on validation streams, kept in a file."""

import functools
import itertools
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

FIRST_SEED = 1000  # A model, and streams, that no report has.
GRIDS: dict[str, tuple[float, ...]] = {  # The second number is where a search begins.
  "inner": (0.1, 0.2, 0.4, 0.8),
  "outer": (3e-4, 1e-3, 3e-3, 1e-2),
  "in_scale": (0.1, 0.3, 1.0),
  "modulation": (0.5, 2.0, 5.0),
}
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # of C-MAML's thresholds
DEVIATIONS = (0.003, 0.01, 0.03)  # of BGD, instead of inner rates
GRID = np.linspace(0, 1, 101)
Player = Callable[[str, Rates], Sequence[Trace]]


def player(run: Run[Config]) -> Player:
  """What plays a method on the validation streams."""
  seeds = np.arange(run.config.seeds_at_once) + FIRST_SEED
  streams = [Streams(p, seeds, reported=False) for p in run.config.stay_probabilities]

  def play(name: str, rates: Rates) -> list[Trace]:
    if not math.isnan(rates.level):
      rates = with_thresholds(rates, found(run, name, rates, seeds))
    return [runs.play(run, name, rates, of) for of in streams]

  return play


def grid_of(name: str, field: str) -> tuple[float, ...]:
  """What is tried for a rate of a method."""
  return DEVIATIONS if (name, field) == ("bgd", "inner") else GRIDS[field]


def score(traces: Sequence[Trace]) -> float:
  """Accuracy before adaptation, the mean over streams; minus infinity for what diverged."""
  finite = all(np.isfinite(trace.loss).all() for trace in traces)
  return float(np.mean([np.mean(trace.before) for trace in traces])) if finite else -math.inf


def told(name: str) -> str:
  """The version of a method that is told the switches, if each run calibrates its thresholds."""
  return f"{name}_told" if METHODS[name].calibrates else name


def search(name: str, play: Player) -> tuple[Rates, float]:
  """One rate after the other, from the middle of the grids; C-MAML's threshold at the end.

  LEEDS and the restart are played as their versions that are told the switches: the same rates, so
  that what separates the two is the detectors. C-MAML has its detector off until the end. The
  accuracy is minus infinity if every rate diverged.
  """
  method = METHODS[name]
  grids = {field: grid_of(name, field) for field in ("inner", *method.moves)}
  rates = Rates(**{field: grid[1] for field, grid in grids.items()})
  if method.thresholds and not method.calibrates:
    rates = rates._replace(switch=math.inf)
  tried: dict[str, Sequence[Trace]] = {}

  def traces_of(rates: Rates) -> Sequence[Trace]:
    key = repr(rates)  # NaN does not equal itself.
    if key not in tried:
      tried[key] = play(told(name), rates)
    return tried[key]

  def try_out(rates: Rates) -> float:
    return score(traces_of(rates))

  for field, grid in grids.items():
    rates = max((rates._replace(**{field: value}) for value in grid), key=try_out)
  best = try_out(rates)
  if not method.thresholds or method.calibrates or not math.isfinite(best):
    return rates, best
  rates = max((rates._replace(switch=math.nan, level=level) for level in LEVELS), key=try_out)
  return rates, try_out(rates)


def thresholds(traces: Sequence[Trace]) -> jaxbo.meta.Thresholds:
  """Calibrated on the scores of all validation streams, without their first rounds."""

  def joined(pick: Callable[[Trace], Any]) -> np.ndarray:
    rows = [pick(trace)[:, 1:].ravel() for trace in traces]
    first = pick(traces[0])[:1, 0]  # What calibrate leaves out.
    return np.concatenate([first, *rows])

  scores = joined(lambda trace: trace.switch_score), joined(lambda trace: trace.shift_score)
  truth = joined(lambda trace: trace.task_switch), joined(lambda trace: trace.domain != 0)
  return jaxbo.meta.calibrate(jaxbo.meta.Scores(*map(jnp.asarray, scores)), *truth, rule="roc")


def at_level(traces: Sequence[Trace], level: float) -> float:
  """A quantile of the switch scores, in which those with and without a switch have equal weight.

  One half is between the two kinds, if they can be told apart.
  """
  scores, truth = (
    np.concatenate([getattr(trace, name)[:, 1:].ravel() for trace in traces])
    for name in ("switch_score", "task_switch")
  )
  kinds = [np.quantile(scores[mask & np.isfinite(scores)], GRID) for mask in (truth, ~truth)]
  return float(np.quantile(np.concatenate(kinds), level))


def found(run: Run[Config], method: str, rates: Rates, seeds: np.ndarray) -> list[dict[str, float]]:
  """The thresholds of each model, from streams of characters alone."""
  streams = [Streams(p, seeds, False, True) for p in run.config.stay_probabilities]
  played = [runs.play(run, told(method), rates._replace(switch=math.inf), of) for of in streams]

  def of_model(i: int) -> dict[str, float]:
    mine = [jax.tree.map(lambda leaf: leaf[i : i + 1], one) for one in played]
    if not math.isnan(rates.level):
      return {"switch": at_level(mine, rates.level)}
    both = thresholds(mine)._asdict()
    return {name: float(both[name]) for name in METHODS[method].thresholds}

  return [of_model(i) for i in range(len(seeds))]


def with_thresholds(rates: Rates, each: Sequence[dict[str, float]]) -> Rates:
  """The rates with the thresholds of each model, ``[seeds]``, where they have none."""
  own = [name for name in each[0] if math.isnan(getattr(rates, name))]
  return rates._replace(**{name: np.array([one[name] for one in each]) for name in own})


def rates_of(run: Run[Config], method: str, seeds: np.ndarray) -> Rates:
  """The rates of a method; thresholds that it has none of are ``[seeds]``, one for each model.

  They come from streams of characters alone, since the domains that a detector should notice are
  not known before. Neither pre-training nor a report has seen these characters. The threshold of
  switches separates scores with a switch from those without, or is the chosen quantile of both; the
  threshold of shifts is the 95 % quantile of the scores at switches.
  """
  rates, wanted = run.config.rates_of(method), METHODS[method].thresholds
  if not any(math.isnan(getattr(rates, name)) for name in wanted):
    return rates
  each = functools.cache(lambda: found(run, method, rates, seeds))
  noted = [
    run.note(note_of(method, seed), lambda i=i: each()[i]) for i, seed in enumerate(seeds.tolist())
  ]
  return with_thresholds(rates, noted)


def note_of(method: str, seed: int) -> str:
  """The name of the note that has the thresholds of a model."""
  return f"thresholds of {method}, seed {seed}"


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
    """The rates."""
    del spent
    *numbers, accuracy = np.asarray(state).tolist()
    row = Rates(*(float(f"{value:.4g}") for value in numbers))._asdict() | {"accuracy": accuracy}
    return row


class Tuning(tuning.Tuning[Config]):
  """The choice of rates."""

  config = Config

  def prepare(self, config: Config) -> Domains:
    """The images."""
    return read(config)

  def cells(self, run: Run[Config]) -> Iterable[Cell]:
    """Every method; one that is told has the rates of the one that is not."""
    names = [name for name in run.config.methods if not name.endswith("_told")]
    seeds = range(FIRST_SEED, FIRST_SEED + run.config.seeds_at_once)
    for begins, seed in itertools.product({METHODS[n].begins: None for n in names}, seeds):
      if begins != "random":
        yield pretraining.cell(run, begins, seed)
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
