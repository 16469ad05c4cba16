"""Rates of online meta-learners: chosen on validation streams, kept in a file."""

import functools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

import jaxbo
from scripts.common.folder import Row
from scripts.common.study import Results, Run, Study
from scripts.common.table import Table
from scripts.common.task import Cell, Spent, Task
from scripts.online_meta import pretraining, runs
from scripts.online_meta.config import RATES_FILE, SMOKE, Config, read
from scripts.online_meta.data import Domains
from scripts.online_meta.methods import INFINITY, METHODS, Rates
from scripts.online_meta.report import Trace

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
  seeds, streams = np.arange(run.config.seeds_at_once) + FIRST_SEED, run.config.stay_probabilities
  play = functools.partial(runs.play, run, seeds=seeds, reported=False)
  return lambda name, rates: [play(name, rates, p) for p in streams]


def grid_of(name: str, field: str) -> tuple[float, ...]:
  """What is tried for a rate of a method."""
  return DEVIATIONS if (name, field) == ("bgd", "inner") else GRIDS[field]


def score(traces: Sequence[Trace]) -> float:
  """Accuracy before adaptation, the mean over streams; minus infinity for what diverged."""
  finite = all(np.isfinite(trace.loss).all() for trace in traces)
  return float(np.mean([np.mean(trace.before) for trace in traces])) if finite else -INFINITY


def search(name: str, play: Player) -> tuple[Rates, float]:
  """One rate after the other, from the middle of the grids; thresholds at the end.

  The thresholds of LEEDS are those that its version that is told the switches would like: the same
  rates, so that what separates the two is the detectors. The accuracy is minus infinity if every
  rate diverged.
  """
  method = METHODS[name]
  fields = ("inner", *method.moves)
  rates = Rates(**{field: grid_of(name, field)[1] for field in fields})
  if method.thresholds:
    rates = rates._replace(switch=INFINITY)
  tried: dict[Rates, tuple[float, Sequence[Trace]]] = {}

  def try_out(rates: Rates) -> float:
    key = Rates(*(round(value, 9) if math.isfinite(value) else str(value) for value in rates))
    if key not in tried:
      traces = play("leeds_told" if name == "leeds" else name, rates)
      tried[key] = (score(traces), traces)
    return tried[key][0]

  for field in fields:
    options = [rates._replace(**{field: value}) for value in grid_of(name, field)]
    rates = max(options, key=try_out)
  best = try_out(rates)
  if not method.thresholds or not math.isfinite(best):
    return rates, best
  found = thresholds(next(traces for value, traces in tried.values() if value == best))
  calibrated = rates._replace(switch=found.switch)
  if "shift" in method.thresholds:
    return calibrated._replace(shift=found.shift), best
  better = try_out(calibrated) > best  # C-MAML: no meta-updates where the task seems to change.
  return (calibrated, try_out(calibrated)) if better else (rates, best)


def thresholds(traces: Sequence[Trace]) -> jaxbo.Thresholds:
  """Calibrated on the scores of all validation streams, without their first rounds."""

  def joined(pick: Callable[[Trace], Any]) -> np.ndarray:
    rows = [pick(trace)[:, 1:].ravel() for trace in traces]
    first = pick(traces[0])[:1, 0]  # What calibrate leaves out.
    return np.concatenate([first, *rows])

  scores = jaxbo.Scores(
    jnp.asarray(joined(lambda trace: trace.switch_score)),
    jnp.asarray(joined(lambda trace: trace.shift_score)),
  )
  truth = joined(lambda trace: trace.task_switch), joined(lambda trace: trace.domain != 0)
  return jaxbo.calibrate(scores, *truth, rule="roc")


def calibrated(run: Run[Config]) -> Rates:
  """The rates of LEEDS, with thresholds of the pre-trained model of this run if none are given.

  Another machine rounds otherwise, and pre-training then ends at another model, with other scores.
  """
  rates = run.config.rates_of("leeds")
  own = [name for name in METHODS["leeds"].thresholds if math.isnan(getattr(rates, name))]
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


class Tuning(Study[Config]):
  """The choice of rates."""

  config = Config
  smoke: ClassVar = SMOKE

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

  def tables(self, results: Results[Config]) -> Iterable[Table]:
    """What was chosen."""
    text = lambda value: "-" if math.isnan(value) else f"{value:.4g}"
    rows = [
      [METHODS[name].label, *map(text, numbers)]
      for name, *numbers in results.rows.itertuples(index=False)
    ]
    title = f"Rates for {results.config.name()}"
    yield Table(title, list(results.rows.columns), rows).without_dashes()

  def remarks(self, results: Results[Config]) -> Iterable[str]:
    """Where the rates are."""
    for row in results.rows.to_dict("records"):
      if not math.isfinite(row["accuracy"]):
        yield f"{METHODS[row['method']].label}: every rate of the grid diverged"
    yield f"The rates are in {file_of(results.config)}, for --rates-file"

  def draw(self, run: Run[Config]) -> None:
    """Writes the rates beside those that the file has already."""
    path = file_of(run.config)
    tables: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for row in run.results().rows.to_dict("records"):
      if math.isfinite(row["accuracy"]):
        known = {name: row[name] for name in Rates._fields if not math.isnan(row[name])}
        kept = {name: "inf" if math.isinf(value) else value for name, value in known.items()}
        tables.setdefault(run.config.name(), {})[row["method"]] = kept
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tables, indent=1, sort_keys=True) + "\n")


def file_of(config: Config) -> Path:
  """Where rates are written: never into the sources."""
  given = config.rates_file
  if given is None or given.resolve() == RATES_FILE.resolve():
    return config.output_dir / "rates.json"
  return given
