"""Pictures of online runs: metrics over rounds with the phases marked, and against the window."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from scripts.common import plots
from scripts.common.plots import plt
from scripts.online_hyperopt.methods import METHODS
from scripts.online_hyperopt.runs import Run
from scripts.online_hyperopt.streams import StreamKind

COLORS = {
  "ogd": "0.45",
  "ogd_replay": "0.7",
  "sobow": "C0",
  "sobow_steps": "C9",
  "sogd": "C2",
  "oagd": "C1",
  "ogd_published": "C5",
  "ogd_replay_published": "C4",
  "oagd_published": "C3",
}


def draw_runs(
  runs: Mapping[tuple[str, Any], Run], kinds: Mapping[str, StreamKind], rounds: int, path: Path
) -> None:
  """A column for each stream: balanced accuracy, and cumulative loss less that of the first method.

  Lines are means over seeds in a band from least to greatest; the largest window is solid.
  """
  names = [name for name in kinds if any(stream == name for stream, _ in runs)]
  fig, grid = plt.subplots(
    2, len(names), figsize=(4.6 * len(names) + 1, 7.5), sharex=True, squeeze=False,
    layout="constrained",
  )  # fmt: skip
  for column, name in enumerate(names):
    mine = {variant: run for (stream, variant), run in runs.items() if stream == name}
    first, baseline = next(iter(mine.items()))
    gains = []
    for variant, run in mine.items():
      largest = max(other.window for other in mine if other.method == variant.method)
      style = {
        "color": COLORS[variant.method],
        "label": variant.label,
        "linestyle": "-" if variant.window == largest else ":",
      }
      band(grid[0, column], np.asarray(run.rounds), run.accuracy, **style)
      gain = np.cumsum(run.loss - baseline.loss, axis=0)
      band(grid[1, column], np.arange(len(gain)) + 1, gain, **style)
      gains.append(gain)
    leave_out_diverged(grid[1, column], gains)
    grid[0, column].set_title(name)
    # The first evaluation is of what knows nothing.
    worst = min(run.accuracy[1:].min() for run in mine.values())
    grid[0, column].set_ylim(bottom=worst - 0.02)
    for axes in grid[:, column]:
      mark_phases(axes, kinds[name].phases(rounds))
    grid[1, column].set_xlabel("round")
    grid[0, 0].set_ylabel("balanced accuracy on fresh data")
    grid[1, 0].set_ylabel(f"cumulative loss, less that of {first.label}")
  fig.legend(
    *grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize="small"
  )
  plots.save(fig, path)


def band(axes: Axes, x: np.ndarray, values: np.ndarray, **style: Any) -> None:
  """The mean of ``values`` ``[len(x), seeds]`` in a band from least to greatest."""
  axes.plot(x, values.mean(axis=1), **style)
  low, high = values.min(axis=1), values.max(axis=1)
  axes.fill_between(x, low, high, color=style["color"], alpha=0.08, lw=0)


def leave_out_diverged(axes: Axes, curves: list[np.ndarray]) -> None:
  """Limits ``y`` to curves no more than ten times as large as the median one, if one is larger."""
  sizes = np.array([np.abs(curve).max() for curve in curves])
  shown = [
    curve for curve, small in zip(curves, sizes <= 10 * np.median(sizes), strict=True) if small
  ]
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


def draw_sweep(runs: Mapping[tuple[str, Any], Run], names: list[str], path: Path) -> None:
  """Cumulative loss against the window for each stream, and what a method keeps.

  A method without a window is a dashed line.
  """
  names = [name for name in names if any(stream == name for stream, _ in runs)]
  fig, panels = plt.subplots(
    1, len(names) + 1, figsize=(4 * (len(names) + 1), 4.4), squeeze=False, layout="constrained"
  )
  for axes, name in zip(panels[0], names, strict=False):
    for (stream, variant), run in runs.items():
      if stream == name and not METHODS[variant.method].windowed:
        mean = run.loss.sum(axis=0).mean()
        label = METHODS[variant.method].label
        axes.axhline(mean, color=COLORS[variant.method], label=label, linestyle="--")
    for method, mine in by_method(runs, name).items():
      losses = np.stack([run.loss.sum(axis=0) for run in mine.values()])
      style = {"color": COLORS[method], "label": METHODS[method].label, "marker": "o"}
      band(axes, np.asarray(list(mine)), losses, **style)
    axes.set(title=name, ylabel="cumulative loss")
  for method, mine in by_method(runs, names[0]).items():
    kept = [run.state_bytes / 2**10 for run in mine.values()]
    panels[0, -1].plot(list(mine), kept, color=COLORS[method], marker="o")
  panels[0, -1].set(title="memory", yscale="log", ylabel="kept beside both levels, KiB a seed")
  for axes in panels[0]:
    windows = sorted({variant.window for _, variant in runs})
    axes.set(xscale="log", xlabel="window K")
    axes.set_xticks(windows, map(str, windows))
    axes.minorticks_off()
  handles, labels = panels[0, 0].get_legend_handles_labels()
  fig.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize="small")
  plots.save(fig, path)


def by_method(runs: Mapping[tuple[str, Any], Run], name: str) -> dict[str, dict[int, Run]]:
  """The runs of a stream whose method has more than one window, by method and window."""
  methods: dict[str, dict[int, Run]] = {}
  for (stream, variant), run in runs.items():
    if stream == name:
      methods.setdefault(variant.method, {})[variant.window] = run
  return {method: dict(sorted(mine.items())) for method, mine in methods.items() if len(mine) > 1}
