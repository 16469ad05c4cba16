"""Pictures of online meta-learning: accuracy over rounds, and what thresholds do to it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from scripts.common import plots, table
from scripts.common.plots import plt
from scripts.online_meta.methods import METHODS
from scripts.online_meta.report import Trace

COLORS = {
  "online_sgd": "0.6", "fine_tuning": "C5", "bgd": "C8", "scratch": "0.3", "maml": "C2",
  "anil": "C6", "meta_ogd": "C1", "c_maml": "C4", "c_maml_um": "C9", "c_maml_pap": "C3",
  "restart": "C7", "restart_told": "0.45", "leeds": "C0", "leeds_told": "k",
}  # fmt: skip
DOMAIN_COLORS = ("#ffffff", "#fdebd0", "#d6eaf8")


def draw_rounds(
  traces: Mapping[tuple[float, str], Trace], names: Sequence[str], path: Path, window: int = 30
) -> None:
  """Accuracy before adaptation over rounds, a row for each stream; the traces are of one seed.

  Above, the true switches (lines) and those that LEEDS detected (triangles; hollow: false alarms).
  """
  streams = list(dict.fromkeys(probability for probability, _ in traces))
  fig, grid = plt.subplots(
    len(streams), 1, figsize=(13, 3.9 * len(streams)), squeeze=False, layout="constrained"
  )
  for axes, stream in zip(grid[:, 0], streams, strict=True):
    mine = {method: trace for (p, method), trace in traces.items() if p == stream}
    first = next(iter(mine.values()))
    shade_domains(axes, first.domain)
    for method, trace in mine.items():
      style = {"color": COLORS[method], "lw": 2.2 if method == "leeds" else 1.0}
      style |= {"label": METHODS[method].label, "ls": ":" if method == "leeds_told" else "-"}
      axes.plot(pd.Series(trace.before).rolling(window, min_periods=1).mean(), **style)
    axes.set(
      ylim=(0, 1.12), xlim=(0, len(first.before) - 1), ylabel="accuracy before adaptation",
      title=f"a task stays with probability {stream:g}; mean of {window} rounds, one seed",
    )  # fmt: skip
    switches = np.flatnonzero(first.task_switch)
    axes.vlines(switches, 1.06, 1.11, color="k", lw=1, label="true switch")
    if "leeds" in mine:
      mark_detections(axes, mine["leeds"])
  grid[-1, 0].set_xlabel("round")
  handles, labels = grid[0, 0].get_legend_handles_labels()
  patches = [Patch(facecolor=color, edgecolor="0.7") for color in DOMAIN_COLORS]
  fig.legend(
    [*handles, *patches], [*labels, *names], loc="outside lower center", ncols=6, fontsize="small"
  )
  plots.save(fig, path)


def draw_pairs(rows: pd.DataFrame, path: Path) -> None:
  """What each method has less or more than LEEDS, in pairs of runs of one seed; a panel a stream.

  Points are means in percentage points, lines 95 % intervals by Student's t.
  """
  streams = rows["stay_probability"].unique().tolist()
  names = [name for name in METHODS if name in set(rows["method"]) - {"leeds"}]
  size = (1.5 + 4 * len(streams), 1.6 + 0.32 * len(names))
  fig, panels = plt.subplots(
    1, len(streams), figsize=size, squeeze=False, sharey=True, layout="constrained"
  )
  for axes, stream in zip(panels[0], streams, strict=True):
    gains = table.differences(rows[rows["stay_probability"] == stream], "method", "leeds")
    for column, label, color, marker, shift in (
      ("accuracy", "all rounds", "#0072B2", "o", -0.15),
      ("accuracy_out", "out of distribution", "#D55E00", "s", 0.15),
    ):
      values = [100 * gains.loc[gains["method"] == name, column].dropna() for name in names]
      means = [mine.mean() for mine in values]
      widths = [table.half_width(mine.tolist()) if len(mine) > 1 else 0 for mine in values]
      style = {"fmt": marker, "color": color, "label": label, "capsize": 2, "ms": 5}
      axes.errorbar(means, np.arange(len(names)) + shift, xerr=widths, **style)
    axes.axvline(0, color="0.4", lw=1, zorder=0)
    axes.set_title(f"a task stays with probability {stream:g}", fontsize="medium")
    axes.set(xlabel="points more accurate than LEEDS")
    axes.set_yticks(range(len(names)), [METHODS[name].label for name in names])
    axes.grid(axis="x", alpha=0.3)
  panels[0, 0].invert_yaxis()
  plots.save(fig, path, legend_of=panels[0, 0])


def shade_domains(axes: Axes, domains: np.ndarray) -> None:
  """The background says which domain a round is from."""
  begins = np.flatnonzero(np.diff(domains, prepend=-1))
  for begin, end in zip(begins, [*begins[1:], len(domains)], strict=True):
    axes.axvspan(begin - 0.5, end - 0.5, color=DOMAIN_COLORS[domains[begin]], lw=0, zorder=0)


def mark_detections(axes: Axes, trace: Trace) -> None:
  """Triangles under the true switches: what was detected; red where it is a shift."""
  flags = np.flatnonzero(trace.switch)
  for shift, color in ((False, "C0"), (True, "C3")):
    truth = trace.task_switch & (trace.domain != 0) if shift else trace.task_switch
    for true, face in ((True, color), (False, "none")):
      chosen = flags[(trace.shift[flags] == shift) & (truth[flags] == true)]
      axes.scatter(
        chosen, np.full(len(chosen), 1.03), marker="^", s=22, color=color, facecolors=face,
        zorder=3, label=f"detected {'shift' if shift else 'switch'}{'' if true else ', false'}",
      )  # fmt: skip


def draw_sweep(
  rows: pd.DataFrame, chosen: Mapping[str, float], told: float | None, path: Path
) -> None:
  """A column for each detector: accuracy above, precision and recall below.

  Args:
    rows: those of :func:`scripts.online_meta.sweep.measure`.
    chosen: the thresholds that were calibrated on validation streams.
    told: the accuracy of LEEDS that is told the switches.
    path: of the picture.
  """
  fig, grid = plt.subplots(
    2, len(chosen), figsize=(5.2 * len(chosen), 7), sharex="col", sharey="row", squeeze=False,
    layout="constrained",
  )  # fmt: skip
  titles = {"switch": "task switch", "shift": "distribution shift"}
  for (kind, threshold), (above, below) in zip(chosen.items(), grid.T, strict=True):
    mine = rows[rows["kind"] == kind].set_index("threshold")
    above.plot(mine["accuracy"], "o-", color="C0", label="LEEDS, all rounds")
    above.plot(mine["out"], "o--", color="C1", label="out of distribution")
    if told is not None:
      above.axhline(told, color="k", lw=1, ls=":", label="LEEDS, told; all rounds")
    for name, color in (("precision", "C2"), ("recall", "C3")):
      below.plot(mine[name], "o-", color=color, label=name)
      below.plot(mine[f"logged_{name}"], ":", color=color, label=f"{name}, logged scores")
    for axes in (above, below):
      axes.axvline(threshold, color="0.6", lw=1, zorder=0)
    above.set_title(f"threshold of the {titles[kind]} score")
    below.set(xlabel="threshold (grey: calibrated)", ylim=(-0.03, 1.03))
  grid[0, 0].set_ylabel("accuracy before adaptation")
  grid[1, 0].set_ylabel("of the detector")
  for row in grid:
    row[0].legend(fontsize="small")
  plots.save(fig, path)
