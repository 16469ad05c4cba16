"""LEEDS with other thresholds, on the first stream and the first seed."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from scripts.common.folder import Row
from scripts.common.study import Run
from scripts.online_meta.config import Config
from scripts.online_meta.methods import Rates
from scripts.online_meta.report import Trace, mean_where, qualities

SWITCH_FACTORS = (0.0, 0.4, 0.7, 1.0, 1.5, 2.0, 4.0)
SHIFT_LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)


def measure(
  run: Run[Config], rates: Rates, base: Trace, play: Callable[[Rates], Trace]
) -> list[Row]:
  """A row for each threshold that is tried; each is a note of the run, so that it is played once.

  Args:
    run: of which it is a part.
    rates: the chosen ones.
    base: the trace of them, of one seed.
    play: what gives the trace of other ones.
  """
  at_switches = base.shift_score[base.switch]
  tried = {
    "switch": np.unique([factor * rates.switch for factor in SWITCH_FACTORS]),
    "shift": np.unique([rates.shift, *np.quantile(at_switches, SHIFT_LEVELS)]),
  }
  rows = list[Row]()
  for kind, values in tried.items():
    logged = logged_quality(base, kind, values)
    for i, value in enumerate(values.tolist()):

      def judge(kind: str = kind, value: float = value) -> Row:
        trace = play(rates._replace(**{kind: value}))
        quality = qualities(trace)[kind]
        return {
          "accuracy": float(trace.before.mean()),
          "out": mean_where(trace.before, trace.domain != 0),
          "precision": float(quality.precision),
          "recall": float(quality.recall),
        }

      config = run.config  # A run that goes on may have another stream, or another first seed.
      where = f"p={config.stay_probabilities[0]:g}, seed {config.first_seed}"
      name = f"sweep of {where}, {kind} {i}"
      known = {"logged_precision": logged[i, 0], "logged_recall": logged[i, 1]}
      rows.append({"kind": kind, "threshold": value, **run.note(name, judge), **known})
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
