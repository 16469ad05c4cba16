"""What happened in a run of an online meta-learner, and the numbers of it that a table shows."""

import math
from typing import Any, NamedTuple, Self

import numpy as np

import jaxbo
from scripts.common.folder import Row
from scripts.online_meta.methods import METHODS

QUALITY = {
  "precision": "precision",
  "recall": "recall",
  "delay": "mean_delay",
  "false_alarms": "num_false_alarms",
}


class Trace(NamedTuple):
  """What happened in every round, leaves ``[seeds, rounds]``, or ``[rounds]`` of one seed.

  Attributes:
    before: accuracy of the last task's model on the new images, before their labels are used.
    after: that of the adapted model.
    loss: the loss that belongs to ``before``.
    switch: whether a task switch was detected.
    shift: whether a distribution shift was.
    switch_score: the score behind the first.
    shift_score: the score behind the second.
    meta_updated: whether the meta-model was updated.
    domain: the true domain.
    task_switch: the true switches.
  """

  before: Any
  after: Any
  loss: Any
  switch: Any
  shift: Any
  switch_score: Any
  shift_score: Any
  meta_updated: Any
  domain: Any
  task_switch: Any

  def of(self, i: int) -> Self:
    """The trace of the ``i``-th seed."""
    return type(self)(*(leaf[i] for leaf in self))


def qualities(trace: Trace) -> dict[str, jaxbo.DetectionQuality]:
  """How well both detectors did, on the trace of one seed."""
  out = trace.task_switch & (trace.domain != 0)
  return {
    "switch": jaxbo.detection_quality(trace.switch, trace.task_switch),
    "shift": jaxbo.detection_quality(trace.shift, out, boundaries=trace.task_switch),
  }


def mean_where(values: np.ndarray, mask: np.ndarray) -> float:
  """The mean of the rounds in ``mask``; NaN if there is none."""
  return float(np.mean(values[mask])) if mask.any() else math.nan


def numbers(method: str, trace: Trace, best: np.ndarray) -> Row:
  """Columns of ``results.csv`` for one seed; NaN where there is nothing to say.

  Args:
    method: its name.
    trace: of the seed.
    best: the losses of the best fixed model of each task, ``[rounds]``.
  """
  found, of_domain = qualities(trace), [trace.domain == number for number in range(3)]
  told = {"switch": METHODS[method].detects, "shift": method.startswith("leeds")}
  of = lambda values: {
    f"_domain_{number}": mean_where(values, mask) for number, mask in enumerate(of_domain)
  }
  row: Row = {"accuracy": float(np.mean(trace.before))}
  row |= {f"accuracy{domain}": value for domain, value in of(trace.before).items()}
  row["accuracy_out"] = mean_where(trace.before, ~of_domain[0])
  row["accuracy_after"] = float(np.mean(trace.after))
  row |= {f"accuracy_after{domain}": value for domain, value in of(trace.after).items()}
  row["regret"] = float(jaxbo.task_averaged_regret(trace.loss, best, trace.task_switch))
  for kind, plural in (("switch", "switches"), ("shift", "shifts")):
    row[f"num_{plural}"] = int(found[kind].num_changes)
    for name, field in QUALITY.items():
      row[f"{kind}_{name}"] = float(getattr(found[kind], field)) if told[kind] else math.nan
  return row | {"meta_updates": int(np.sum(trace.meta_updated))}
