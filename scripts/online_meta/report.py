"""What a table of online meta-learning shows."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

import jaxbo
from scripts.common import report
from scripts.online_meta.methods import METHODS
from scripts.online_meta.runs import Run, Trace

Runs = dict[tuple[float, str], Run]


class Result(NamedTuple):
  """A method on a stream, one seed; a row of ``results.csv``. NaN where there is nothing to say."""

  stay_probability: float
  method: str
  seed: int
  accuracy: float
  accuracy_domain_0: float
  accuracy_domain_1: float
  accuracy_domain_2: float
  accuracy_out: float
  accuracy_after: float
  accuracy_after_domain_0: float
  accuracy_after_domain_1: float
  accuracy_after_domain_2: float
  regret: float
  num_switches: int
  switch_precision: float
  switch_recall: float
  switch_delay: float
  switch_false_alarms: float
  num_shifts: int
  shift_precision: float
  shift_recall: float
  shift_delay: float
  shift_false_alarms: float
  meta_updates: int
  seconds_per_round: float
  state_bytes: int


def result_of(
  stay_probability: float, method: str, seed: int, run: Run, i: int, best: np.ndarray
) -> Result:
  """The row of the ``i``-th seed of a run."""
  trace = Trace(*(leaf[i] for leaf in run.trace))
  nan = float("nan")
  of_domain = lambda values, mask: float(np.mean(values[mask])) if mask.any() else nan
  domains = [trace.domain == number for number in range(3)]
  quality, shifts = qualities(trace)
  judged = lambda value: float(value) if METHODS[method].detects else nan
  tells_shifts = method.startswith("leeds")
  of_shift = lambda value: float(value) if tells_shifts else nan
  accuracies = {"accuracy": trace.before, "accuracy_after": trace.after}
  names = ("precision", "recall", "mean_delay", "num_false_alarms")
  fields = ("precision", "recall", "delay", "false_alarms")
  kinds = {"switch": (quality, judged), "shift": (shifts, of_shift)}
  return Result(
    stay_probability=stay_probability,
    method=method,
    seed=seed,
    **{name: float(np.mean(values)) for name, values in accuracies.items()},
    **{
      f"{name}_domain_{number}": of_domain(values, mask)
      for name, values in accuracies.items()
      for number, mask in enumerate(domains)
    },
    accuracy_out=of_domain(trace.before, ~domains[0]),
    regret=float(jaxbo.task_averaged_regret(trace.loss, best, trace.task_switch)),
    num_switches=int(quality.num_changes),
    num_shifts=int(shifts.num_changes),
    **{
      f"{kind}_{field}": known(getattr(found, name))
      for kind, (found, known) in kinds.items()
      for field, name in zip(fields, names, strict=True)
    },
    meta_updates=int(np.sum(trace.meta_updated)),
    seconds_per_round=run.seconds / run.trace.before.size,
    state_bytes=run.state_bytes,
  )


def qualities(trace: Trace) -> tuple[jaxbo.DetectionQuality, jaxbo.DetectionQuality]:
  """How well both detectors did, on the trace of one seed."""
  out = trace.task_switch & (trace.domain != 0)
  switch = jaxbo.detection_quality(trace.switch, trace.task_switch)
  return switch, jaxbo.detection_quality(trace.shift, out, boundaries=trace.task_switch)


def summarize(runs: Runs, seeds: Sequence[int], best: Mapping[float, np.ndarray]) -> list[Result]:
  """The rows of all runs; ``best`` are the losses of the best fixed models, by stream."""
  return [
    result_of(probability, method, seed, run, i, best[probability][i])
    for (probability, method), run in runs.items()
    for i, seed in enumerate(seeds)
  ]


DETECTION_COLUMNS = ("method", "of", "precision", "recall", "delay", "false alarms")


def accuracy_columns(names: Sequence[str]) -> tuple[str, ...]:
  """The columns of the first table."""
  return (
    "method", "acc. before", *names, "all OOD", "after", "regret", "meta-upd.", "ms/round", "KiB",
  )  # fmt: skip


def accuracy_rows(results: Sequence[Result]) -> list[list[str]]:
  """Accuracies in percent and what they cost, for one stream; means over seeds ± their spread."""
  rows = []
  for method in dict.fromkeys(result.method for result in results):
    mine = [result for result in results if result.method == method]
    percent = lambda name, mine=mine: report.mean_and_spread(
      (100 * getattr(row, name) for row in mine), 1
    )
    mean = lambda name, mine=mine: float(np.mean([getattr(row, name) for row in mine]))
    fields = [f"accuracy_domain_{number}" for number in range(3)]
    rows.append(
      [
        METHODS[method].label,
        *map(percent, ("accuracy", *fields, "accuracy_out", "accuracy_after")),
        report.mean_and_spread((row.regret for row in mine), 1),
        f"{mean('meta_updates'):.0f}",
        f"{1e3 * mean('seconds_per_round'):.1f}",
        f"{mine[0].state_bytes / 2**10:.0f}",
      ]
    )
  return rows


def detection_rows(results: Sequence[Result]) -> list[list[str]]:
  """How well switches and shifts were detected, for the methods that detect."""
  rows: list[list[str]] = []
  for method in dict.fromkeys(result.method for result in results):
    mine = [result for result in results if result.method == method]
    for kind in ("switch", "shift"):
      values: list[Any] = [
        [getattr(row, f"{kind}_{name}") for row in mine]
        for name in ("precision", "recall", "delay", "false_alarms")
      ]
      if np.isnan(values[3]).all():
        continue
      changes = np.mean(
        [getattr(row, f"num_{kind}{'es' if kind == 'switch' else 's'}") for row in mine]
      )
      of = f"{changes:.0f} {'switches' if kind == 'switch' else 'shifts'}"
      digits = (2, 2, 2, 1)
      cells = [report.mean_and_spread(v, d) for v, d in zip(values, digits, strict=True)]
      rows.append([METHODS[method].label, of, *cells])
  return rows
