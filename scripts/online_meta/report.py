"""What happened in a run of an online meta-learner, and the numbers of it that a table shows."""

import math
from typing import Any, NamedTuple, Self

import jax
import numpy as np

import jaxbo
from scripts.common.task import Row
from scripts.online_meta.methods import METHODS

QUALITY = {
  "precision": "precision",
  "recall": "recall",
  "delay": "mean_delay",
  "false_alarms": "num_false_alarms",
}


class Trace(NamedTuple):
  """What happened in every round, leaves ``[seeds, rounds]``, or ``[rounds]`` of one seed."""

  before: Any  # accuracy of the last task's model on the new images, before their labels are used
  after: Any  # that of the adapted model
  loss: Any  # the loss that belongs to ``before``
  switch: Any  # whether a task switch was detected
  shift: Any  # whether a distribution shift was
  switch_score: Any  # the score behind the first
  shift_score: Any  # the score behind the second
  meta_updated: Any  # whether the meta-model was updated
  domain: Any  # the true domain
  task_switch: Any  # the true switches

  def of(self, i: int) -> Self:
    """The trace of the ``i``-th seed."""
    return type(self)(*(leaf[i] for leaf in self))


@jax.jit
def qualities(trace: Trace) -> dict[str, jaxbo.meta.DetectionQuality]:
  """How well both detectors did, on the trace of one seed."""
  out = trace.task_switch & (trace.domain != 0)
  return {
    "switch": jaxbo.meta.detection_quality(trace.switch, trace.task_switch),
    "shift": jaxbo.meta.detection_quality(trace.shift, out, boundaries=trace.task_switch),
  }


def mean_where(values: np.ndarray, mask: np.ndarray) -> float:
  """The mean of the rounds in ``mask``; NaN if there is none."""
  return float(np.mean(values[mask])) if mask.any() else math.nan


def numbers(method: str, trace: Trace, best: np.ndarray) -> Row:
  """Columns of ``results.csv`` for the trace of one seed; NaN where there is nothing to say.

  ``best`` are the losses of the best fixed model of each task, ``[rounds]``.
  """
  found = qualities(trace)
  told = {"switch": METHODS[method].detects, "shift": method.startswith("leeds")}
  row: Row = {}
  for name, values in (("accuracy", trace.before), ("accuracy_after", trace.after)):
    row[name] = float(np.mean(values))
    for domain in range(3):
      row[f"{name}_domain_{domain}"] = mean_where(values, trace.domain == domain)
    if name == "accuracy":
      row["accuracy_out"] = mean_where(values, trace.domain != 0)
  row["regret"] = float(jaxbo.meta.task_averaged_regret(trace.loss, best, trace.task_switch))
  for kind, plural in (("switch", "switches"), ("shift", "shifts")):
    row[f"num_{plural}"] = int(found[kind].num_changes)
    for name, field in QUALITY.items():
      row[f"{kind}_{name}"] = float(getattr(found[kind], field)) if told[kind] else math.nan
  return row | {"meta_updates": int(np.sum(trace.meta_updated))}
