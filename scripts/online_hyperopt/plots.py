"""Pictures of online runs: metrics over rounds with the phases marked, and against the window."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from scripts.common import plots
from scripts.common.plots import plt
from scripts.online_hyperopt.methods import METHODS, Variant
from scripts.online_hyperopt.streams import StreamKind

COLORS = {
  "ogd": "0.45", "ogd_replay": "0.7", "sobow": "C0", "sobow_steps": "C9", "sogd": "C2",
  "oagd": "C1", "ogd_published": "C5", "ogd_replay_published": "C4", "oagd_published": "C3",
}  # fmt: skip


def draw_runs(
  lines: pd.DataFrame, rows: pd.DataFrame, kinds: Mapping[str, StreamKind], path: Path
) -> None:
  """A column for each stream: balanced accuracy, and cumulative loss less that of the first method.

  Lines are means over seeds; the largest window is in a band from least to greatest, the others are
  dashed. Of runs that are in ``rows``, the others did not end.
  """
  lines = lines.merge(rows[["stream", "method", "window", "seed"]])
  names = [name for name in kinds if (lines["stream"] == name).any()]
  fig, grid = plt.subplots(
    2, len(names), figsize=(4.6 * len(names) + 1, 7.5), sharex=True, squeeze=False,
    layout="constrained",
  )  # fmt: skip
  for (above, below), name in zip(grid.T, names, strict=True):
    mine = lines[lines["stream"] == name]
    largest = mine.groupby("method")["window"].max()
    gains, baseline = list[np.ndarray](), None
    for (method, window), run in mine.groupby(["method", "window"], sort=False):
      variant = Variant(str(method), int(str(window)))
      style: Any = {"label": variant.label, "color": COLORS[variant.method]}
      style["band"] = variant.window == largest[variant.method]
      x, accuracy = by_seed(run, "round", "balanced_accuracy")
      plots.mean_and_range(above, x, accuracy, **style)
      _, loss = by_seed(run, "round", "cumulative_loss")
      if baseline is None:
        baseline = loss
        grid[1, 0].set_ylabel(f"cumulative loss, less that of {variant.label}")
      gains.append(loss - baseline)
      plots.mean_and_range(below, x, gains[-1], **style)
    leave_out_diverged(below, gains)
    above.set_title(name)
    # The first evaluation is of what knows nothing.
    above.set_ylim(bottom=mine["balanced_accuracy"][mine["round"] > 0].min() - 0.02)
    for axes in (above, below):
      mark_phases(axes, kinds[name].phases(lines["round"].max()))
    below.set_xlabel("round")
  grid[0, 0].set_ylabel("balanced accuracy on fresh data")
  plots.save(fig, path, legend_of=grid[0, 0], ncols=5)


def by_seed(rows: pd.DataFrame, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
  """The values of ``x``, and those of ``y``, a row for each seed."""
  table = rows.pivot(index="seed", columns=x, values=y).astype(float)
  return table.columns.to_numpy(), table.to_numpy()


def leave_out_diverged(axes: Axes, curves: Sequence[np.ndarray]) -> None:
  """Limits ``y`` to curves no more than ten times as large as the median one, if one is larger."""
  sizes = np.array([np.abs(curve).max() for curve in curves])
  sizes[np.isnan(sizes)] = np.inf  # Lines have no infinite numbers.
  shown = [c for c, small in zip(curves, sizes <= 10 * np.median(sizes), strict=True) if small]
  if 0 < len(shown) < len(curves):
    low, high = min(curve.min() for curve in shown), max(curve.max() for curve in shown)
    axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))


def mark_phases(axes: Axes, phases: list[tuple[int, str]]) -> None:
  """A vertical line where a phase begins, with its name at the top."""
  for begin, name in phases:
    if begin:
      axes.axvline(begin, color="0.8", lw=0.8, zorder=0)
    axes.annotate(
      name, (begin, 1), xycoords=("data", "axes fraction"), xytext=(3, -3),
      textcoords="offset points", va="top", fontsize="x-small", color="0.4",
    )  # fmt: skip


def draw_sweep(rows: pd.DataFrame, path: Path) -> None:
  """Cumulative loss against the window for each stream, and what a method keeps.

  A method without a window is a dashed line.
  """
  names = list(dict.fromkeys(rows["stream"]))
  fig, panels = plt.subplots(
    1, len(names) + 1, figsize=(4 * (len(names) + 1), 4.4), squeeze=False, layout="constrained"
  )
  *of_streams, memory = panels[0]
  for (name, of_method), mine in rows.groupby(["stream", "method"], sort=False):
    axes, method = of_streams[names.index(str(name))], METHODS[str(of_method)]
    style: Any = {"color": COLORS[str(of_method)], "label": method.label}
    if method.window == 1:
      axes.axhline(mine["cumulative_loss"].mean(), linestyle="--", **style)
    elif mine["window"].nunique() > 1:
      plots.mean_and_range(axes, *by_seed(mine, "window", "cumulative_loss"), **style)
      if name == names[0]:
        kept = mine.groupby("window")["state_bytes"].first() / 2**10
        memory.plot(kept.index, kept, color=style["color"], marker="o")
  for axes, name in zip(of_streams, names, strict=True):
    axes.set(title=name, ylabel="cumulative loss")
  memory.set(title="memory", yscale="log", ylabel="kept beside both levels, KiB a seed")
  windows = sorted(rows["window"].unique())
  for axes in panels[0]:
    axes.set(xscale="log", xlabel="window K")
    axes.set_xticks(windows, map(str, windows))
    axes.minorticks_off()
  plots.save(fig, path, legend_of=of_streams[0])
