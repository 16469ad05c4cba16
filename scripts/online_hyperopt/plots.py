"""Pictures of online runs: loss against what it cost, and accuracy beside loss."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from scripts.common import plots
from scripts.common.plots import plt
from scripts.online_hyperopt.methods import Variant
from scripts.online_hyperopt.streams import StreamKind

# Colours that all eyes tell apart, with a marker and a line each; a method that is not here is in
# the tables alone.
STYLES = {
  "ogd": ("0.5", "X", ":"),
  "sobow": ("#0072B2", "o", "-"),
  "sobow_steps": ("#56B4E9", "s", "-"),
  "sogd": ("#CC79A7", "v", "-."),
  "oagd": ("#D55E00", "^", "--"),
}


def draw_costs(
  lines: pd.DataFrame, rows: pd.DataFrame, kinds: Mapping[str, StreamKind], path: Path
) -> None:
  """A column for each stream: the loss of a round over seconds, and over hypergradients.

  A point is the mean of the rounds since the point before, over seeds, of the largest window of a
  method. A method without hypergradients is a line at its mean.
  """
  lines = lines.merge(rows[["stream", "method", "window", "seed"]])  # The others did not end.
  names = [name for name in kinds if (lines["stream"] == name).any()]
  fig, grid = plt.subplots(
    2, len(names), figsize=(1 + 4 * len(names), 7), sharex="row", sharey="col", squeeze=False,
    layout="constrained",
  )  # fmt: skip
  for (above, below), name in zip(grid.T, names, strict=True):
    curves = list[np.ndarray]()
    for variant, run in of_variants(lines[lines["stream"] == name]):
      color, marker, line = STYLES[variant.method]
      style: Any = {"color": color, "linestyle": line, "marker": marker, "ms": 4}
      rounds, total = by_seed(run, "round", "cumulative_loss")
      _, seconds = by_seed(run[run["round"] > 0], "round", "seconds")
      curves.append((np.diff(total, axis=1) / np.diff(rounds)).mean(axis=0))
      above.plot(seconds.mean(axis=0) / len(total), curves[-1], label=variant.label, **style)
      evaluated = variant.hypergradients * rounds[1:]
      if evaluated.any():
        below.plot(evaluated, curves[-1], **style)
      else:
        below.axhline(curves[-1].mean(), color=color, linestyle=line)
    leave_out_diverged(above, curves)
    above.set_title(f"{name}: {', '.join(kinds[name].names)}", fontsize="medium")
    above.set(xscale="log", yscale="log", xlabel="seconds of one seed")
    below.set(xscale="log", xlabel="hypergradients evaluated")
    low, high = above.get_ylim()
    ticks = [tick for tick in (0.1, 0.2, 0.3, 0.5, 1, 2, 3, 5) if low < tick < high]
    above.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    above.yaxis.minorticks_off()
    for axes in (above, below):
      axes.grid(alpha=0.3)
  for axes in grid[:, 0]:
    axes.set_ylabel("loss of a round")
  plots.save(fig, path, legend_of=grid[0, 0], ncols=5)


def draw_calibration(rows: pd.DataFrame, kinds: Mapping[str, StreamKind], path: Path) -> None:
  """Accuracy beside loss, as played (filled) and at one temperature (open), for each stream."""
  names = [name for name in kinds if (rows["stream"] == name).any()]
  fig, panels = plt.subplots(
    1, len(names), figsize=(1 + 4 * len(names), 4.2), squeeze=False, layout="constrained"
  )
  for axes, name in zip(panels[0], names, strict=True):
    for variant, run in of_variants(rows[rows["stream"] == name]):
      color, marker, _ = STYLES[variant.method]
      mean = run[["cumulative_loss", "scaled_loss", "played_accuracy"]].mean()
      accuracy = [mean["played_accuracy"]] * 2
      axes.plot(mean.iloc[:2], accuracy, color=color, lw=1)
      axes.plot(mean.iloc[1:2], accuracy[:1], marker, color=color, mfc="white", ms=8)
      axes.plot(mean.iloc[:1], accuracy[:1], marker, color=color, ms=8, label=variant.label)
    axes.set(title=name, xlabel="cumulative loss; open: at one temperature")
    axes.grid(alpha=0.3)
  panels[0, 0].set_ylabel("accuracy of what was played")
  plots.save(fig, path, legend_of=panels[0, 0], ncols=5)


def of_variants(rows: pd.DataFrame) -> Iterator[tuple[Variant, pd.DataFrame]]:
  """The methods that have a style, each with its largest window, and their rows."""
  for method in STYLES:
    mine = rows[rows["method"] == method]
    if len(mine):
      window = int(mine["window"].max())
      yield Variant(method, window), mine[mine["window"] == window]


def by_seed(rows: pd.DataFrame, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
  """The values of ``x``, and those of ``y``, a row for each seed."""
  table = rows.pivot(index="seed", columns=x, values=y).astype(float)
  return table.columns.to_numpy(), table.to_numpy()


def leave_out_diverged(axes: Axes, curves: Sequence[np.ndarray]) -> None:
  """Ends ``y`` above curves no more than ten times as large as the median, if one is larger."""
  sizes = np.array([curve.max() for curve in curves])
  sizes[np.isnan(sizes)] = np.inf  # Lines have no infinite numbers.
  shown = sizes[sizes <= 10 * np.median(sizes)]
  if 0 < len(shown) < len(curves):
    axes.set_ylim(top=1.1 * shown.max())
