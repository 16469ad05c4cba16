"""LEEDS with other thresholds, on the first stream and the first seed."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from scripts.common.study import Run
from scripts.common.task import Row
from scripts.online_meta.config import Config
from scripts.online_meta.methods import Rates
from scripts.online_meta.report import Trace, mean_where, qualities

SWITCH_FACTORS = (0.0, 0.4, 0.7, 1.0, 1.5, 2.0, 4.0)
SHIFT_LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)


def measure(
  run: Run[Config], rates: Rates, base: Trace, play: Callable[[Rates], Trace]
) -> list[Row]:
  """A row for each threshold that is tried; each is a note of the run, so that it is played once.

  ``base`` is the trace of one seed with the chosen rates, ``play`` gives that of others.
  """
  at_switches = base.shift_score[base.switch]
  tried = {
    "switch": np.unique([factor * rates.switch for factor in SWITCH_FACTORS]),
    "shift": np.unique([rates.shift, *np.quantile(at_switches, SHIFT_LEVELS)]),
  }

  def judge(kind: str, threshold: float) -> Row:
    trace = play(rates._replace(**{kind: threshold}))
    quality = qualities(trace)[kind]
    return {
      "accuracy": float(trace.before.mean()),
      "out": mean_where(trace.before, trace.domain != 0),
      "precision": float(quality.precision),
      "recall": float(quality.recall),
    }

  # A run that goes on may have another stream, or another first seed.
  where = f"p={run.config.stay_probabilities[0]:g}, seed {run.config.first_seed}"
  rows = list[Row]()
  for kind, values in tried.items():
    logged = logged_quality(base, kind, values).tolist()
    for i, (value, of_log) in enumerate(zip(values.tolist(), logged, strict=True)):
      row = run.note(f"sweep of {where}, {kind} {i}", functools.partial(judge, kind, value))
      known = dict(zip(("logged_precision", "logged_recall"), of_log, strict=True))
      rows.append({"kind": kind, "threshold": value, **row, **known})
  return rows


def logged_quality(trace: Trace, kind: str, values: np.ndarray) -> np.ndarray:
  """Precision and recall of thresholds on the scores that were logged, ``[thresholds, 2]``."""

  def judge(value):
    flags = trace.switch_score > value
    if kind == "shift":
      flags = trace.switch & (trace.shift_score > value)
    return qualities(trace._replace(**{kind: flags}))[kind]

  quality = jax.jit(jax.vmap(judge))(jnp.asarray(values, jnp.float32))
  return np.stack([quality.precision, quality.recall], axis=1)
