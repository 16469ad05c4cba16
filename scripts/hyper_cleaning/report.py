"""What hyper-cleaning runs show: the rows of the table, and the picture."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks import measure
from scripts.common import cleaning, plots, report
from scripts.common.cleaning import METHODS
from scripts.hyper_cleaning.run import Run

Runs = dict[tuple[str, int], Run]  # by method and seed


class Result(NamedTuple):
  """A method on one seed; a row of ``results.csv``. NaN where a number means nothing.

  ``outer_steps`` were done, fewer than asked for if the run was interrupted; ``test_accuracy`` is
  after the last. ``auc`` and ``f1`` are of "this label is wrong". ``temporary_bytes`` is XLA's
  temporary memory of the compiled loop of outer steps, -1 if unknown.
  """

  method: str
  seed: int
  outer_steps: int
  test_accuracy: float
  auc: float
  f1: float
  seconds_per_step: float
  temporary_bytes: int
  compile_seconds: float


def summarize(method: str, seed: int, run: Run) -> Result:
  """The row of a run."""
  auc, f1 = math.nan, math.nan
  if METHODS[method].head is not None:
    auc, f1 = cleaning.detection_scores(run.weights, run.corrupted)
  return Result(
    method,
    seed,
    run.outer_steps,
    run.accuracy[-1],
    auc,
    f1,
    seconds_per_step=run.seconds[-1] / run.outer_steps,
    temporary_bytes=measure.temporary_bytes(run.executable.run),
    compile_seconds=run.executable.compile_seconds,
  )


def gain_share(result: Result, finished: Sequence[Result]) -> float:
  """The share of the oracle's gain over training on everything, on the same seed."""
  accuracies = {row.method: row.test_accuracy for row in finished if row.seed == result.seed}
  worst, best = (accuracies.get(name, math.nan) for name in ("everything", "oracle"))
  return (result.test_accuracy - worst) / (best - worst) if best > worst else math.nan


def table_rows(results: Sequence[Result], outer_steps: int) -> list[list[str]]:
  """The rows of the table, formatted: means over the runs that did all ``outer_steps``.

  A method that has only an unfinished run is shown with it, says so, and has 0 seeds.
  """
  rows = []
  finished = [result for result in results if result.outer_steps == outer_steps]
  for method in dict.fromkeys(result.method for result in results):
    label = METHODS[method].label
    mine = [result for result in finished if result.method == method]
    num_seeds = len(mine)
    if not mine:
      mine = [result for result in results if result.method == method]
      label += f", unfinished ({mine[0].outer_steps} of {outer_steps} steps)"
    rows.append(
      [
        label,
        str(num_seeds),
        report.mean_and_spread(result.test_accuracy for result in mine),
        report.mean_and_spread((gain_share(result, finished) for result in mine), digits=2),
        report.mean_and_spread(result.auc for result in mine),
        report.mean_and_spread(result.f1 for result in mine),
        report.mean_and_spread((1e3 * result.seconds_per_step for result in mine), digits=1),
        f"{mine[0].temporary_bytes / 2**20:.1f}" if mine[0].temporary_bytes >= 0 else "-",
      ]
    )
  return rows


COLUMNS = ["method", "seeds", "accuracy", "gain share", "AUC", "F1", "ms/step", "temp. MiB"]


def draw(runs: Runs, outer_steps: int, path: Path) -> None:
  """Draws accuracy against seconds, and the histograms of the learnt weights.

  Means and histograms are over finished runs; an unfinished one has a curve of its own that ends
  in a cross, and a histogram if its method has no other run.
  """
  by_method: dict[str, list[Run]] = {}
  for (method, _), run in runs.items():
    by_method.setdefault(method, []).append(run)
  moved = [
    method
    for method, mine in by_method.items()
    if METHODS[method].head is not None and np.ptp(mine[0].weights) > 0
  ]
  fig, left, panels = plots.one_wide_and_a_grid(len(moved))
  panel_of = dict(zip(moved, panels, strict=True))
  for i, (method, mine) in enumerate(by_method.items()):
    label, color = METHODS[method].label, f"C{i}"
    finished = [run for run in mine if run.outer_steps == outer_steps]
    for run in mine:
      if run.outer_steps < outer_steps:
        plots.broken_off(left, run.seconds, run.accuracy, color=color, label=f"{label}, unfinished")
    if finished:
      seconds = np.mean([run.seconds for run in finished], axis=0)
      accuracy = [run.accuracy for run in finished]
      plots.mean_and_range(left, seconds, accuracy, color=color, label=label, band=method in moved)
    if method in moved:
      shown = finished or mine
      weights = np.concatenate([run.weights for run in shown])
      corrupted = np.concatenate([run.corrupted for run in shown])
      groups = {"clean": weights[~corrupted], "wrong label": weights[corrupted]}
      plots.histograms(panel_of[method], groups, np.linspace(0, 1, 41))
      panel_of[method].set_title(label if finished else f"{label}, unfinished", fontsize="medium")
      panel_of[method].set(xlabel="weight", ylabel="examples")
  left.set(xscale="log", xlabel="training seconds (no compilation)", ylabel="test accuracy")
  fig.legend(
    *left.get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize="small"
  )
  plots.save(fig, path)
