"""Pictures of online runs: metrics over rounds with the phases marked, and against the window."""

from collections.abc import Mapping
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
CELL = ["stream", "method", "window"]


def draw_runs(
  lines: pd.DataFrame, rows: pd.DataFrame, kinds: Mapping[str, StreamKind], path: Path
) -> None:
  """A column for each stream: balanced accuracy, and cumulative loss less that of the first method.

  Lines are means over seeds in a band from least to greatest; the largest window is solid. Of runs
  that are in ``rows``, the others did not end.
  """
  lines = lines.merge(rows[[*CELL, "seed"]])
  names = [name for name in kinds if (lines["stream"] == name).any()]
  rounds = lines["round"].max()
  fig, grid = plt.subplots(
    2, len(names), figsize=(4.6 * len(names) + 1, 7.5), sharex=True, squeeze=False,
    layout="constrained",
  )  # fmt: skip
  for (above, below), name in zip(grid.T, names, strict=True):
    mine = lines[lines["stream"] == name]
    largest = mine.groupby("method")["window"].max()
    gains, baseline = list[pd.DataFrame](), None
    for (method, window), run in mine.groupby(["method", "window"], sort=False):
      variant = Variant(str(method), int(str(window)))
      style = {
        "color": COLORS[variant.method],
        "label": variant.label,
        "linestyle": "-" if variant.window == largest[variant.method] else ":",
      }
      band(above, run.pivot(index="round", columns="seed", values="balanced_accuracy"), **style)
      loss = run.pivot(index="round", columns="seed", values="cumulative_loss").astype(float)
      if baseline is None:
        baseline = loss
        grid[1, 0].set_ylabel(f"cumulative loss, less that of {variant.label}")
      gains.append(loss - baseline)
      band(below, gains[-1], **style)
    leave_out_diverged(below, gains)
    above.set_title(name)
    # The first evaluation is of what knows nothing.
    above.set_ylim(bottom=mine["balanced_accuracy"][mine["round"] > 0].min() - 0.02)
    for axes in (above, below):
      mark_phases(axes, kinds[name].phases(rounds))
    below.set_xlabel("round")
  grid[0, 0].set_ylabel("balanced accuracy on fresh data")
  fig.legend(
    *grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize="small"
  )
  plots.save(fig, path)


def band(axes: Axes, values: pd.DataFrame, **style: Any) -> None:
  """The mean over columns, which are seeds, in a band from least to greatest."""
  x, array = values.index.to_numpy(), values.to_numpy()
  axes.plot(x, array.mean(axis=1), **style)
  low, high = array.min(axis=1), array.max(axis=1)
  axes.fill_between(x, low, high, color=style["color"], alpha=0.08, lw=0)


def leave_out_diverged(axes: Axes, curves: list[pd.DataFrame]) -> None:
  """Limits ``y`` to curves no more than ten times as large as the median one, if one is larger."""
  arrays = [curve.to_numpy() for curve in curves]
  sizes = np.array([np.abs(array).max() for array in arrays])
  sizes[np.isnan(sizes)] = np.inf  # Lines have no infinite numbers.
  shown = [a for a, small in zip(arrays, sizes <= 10 * np.median(sizes), strict=True) if small]
  if 0 < len(shown) < len(arrays):
    low, high = min(array.min() for array in shown), max(array.max() for array in shown)
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
  for (name, of_method), mine in rows.groupby(["stream", "method"], sort=False):
    axes, method = panels[0, names.index(str(name))], str(of_method)
    style = {"color": COLORS[method], "label": METHODS[method].label}
    if not METHODS[method].windowed:
      axes.axhline(mine["cumulative_loss"].mean(), linestyle="--", **style)
    elif mine["window"].nunique() > 1:
      band(
        axes,
        mine.pivot(index="window", columns="seed", values="cumulative_loss"),
        marker="o",
        **style,
      )
      if name == names[0]:
        kept = mine.groupby("window")["state_bytes"].first() / 2**10
        panels[0, -1].plot(kept.index, kept, color=COLORS[method], marker="o")
  for axes, name in zip(panels[0], names, strict=False):
    axes.set(title=name, ylabel="cumulative loss")
  panels[0, -1].set(title="memory", yscale="log", ylabel="kept beside both levels, KiB a seed")
  for axes in panels[0]:
    windows = sorted(rows["window"].unique())
    axes.set(xscale="log", xlabel="window K")
    axes.set_xticks(windows, map(str, windows))
    axes.minorticks_off()
  handles, labels = panels[0, 0].get_legend_handles_labels()
  fig.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize="small")
  plots.save(fig, path)
