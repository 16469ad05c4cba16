"""The picture of hyper-cleaning: accuracy against seconds, and histograms of the learnt weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.common import plots


def draw(
  lines: pd.DataFrame,
  weights: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]],
  labels: Mapping[str, str],
  path: Path,
) -> None:
  """Draws means over seeds in a band; a method whose weights stay has a dashed line, and no panel.

  ``weights`` has for each run of a method the weights of the training examples, and which of them
  have a wrong label. A run that did not end has a curve of its own that ends in a cross.
  """
  moved = [method for method, runs in weights.items() if np.ptp(runs[0][0]) > 0]
  fig, left, panels = _one_wide_and_a_grid(len(moved))
  last = lines["evaluation"].max()
  for i, (method, mine) in enumerate(lines.groupby("method", sort=False)):
    label, color = labels[str(method)], f"C{i}"
    runs = [run for _, run in mine.groupby("seed")]
    for run in runs:
      if len(run) < last:
        unfinished = f"{label}, unfinished"
        style: Any = {"linestyle": ":", "marker": "x", "markevery": [len(run) - 1]}
        left.plot(run["seconds"], run["accuracy"], color=color, label=unfinished, **style)
    ended = [run for run in runs if len(run) == last]
    if ended:
      seconds = np.mean([run["seconds"] for run in ended], axis=0)
      accuracy = [run["accuracy"] for run in ended]
      plots.mean_and_range(left, seconds, accuracy, color=color, label=label, band=method in moved)
  for method, panel in zip(moved, panels, strict=True):
    values, wrong = map(np.concatenate, zip(*weights[method], strict=True))
    for group, mine in (("clean", ~wrong), ("wrong label", wrong)):
      panel.hist(values[mine], list(np.linspace(0, 1, 41)), alpha=0.6, label=group)
    panel.legend(fontsize="small")
    panel.set_title(labels[method], fontsize="medium")
    panel.set(xlabel="weight", ylabel="examples")
  left.set(xscale="log", xlabel="training seconds (no compilation)", ylabel="test accuracy")
  plots.save(fig, path, legend_of=left, ncols=8)


def _one_wide_and_a_grid(num_panels: int) -> tuple[Figure, Axes, list[Axes]]:
  """A figure with one large plot on the left and ``num_panels`` small ones, two in a row."""
  fig = plt.figure(figsize=(13, 5.5), layout="constrained")
  if not num_panels:
    return fig, fig.subplots(), []
  left, right = fig.subfigures(1, 2, squeeze=False)[0]
  rows = -(-num_panels // 2)
  panels = right.subplots(rows, min(num_panels, 2), squeeze=False, sharex=True, sharey=True).ravel()
  for panel in panels[num_panels:]:
    panel.set_visible(False)
  return fig, left.subplots(), list(panels[:num_panels])
