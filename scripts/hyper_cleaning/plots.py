"""The picture of hyper-cleaning: accuracy against seconds, and histograms of the learnt weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

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
  fig, left, panels = plots.one_wide_and_a_grid(len(moved))
  last = lines["evaluation"].max()
  for i, (method, mine) in enumerate(lines.groupby("method", sort=False)):
    label, color = labels[str(method)], f"C{i}"
    runs = [run for _, run in mine.groupby("seed")]
    for run in runs:
      if len(run) < last:
        unfinished = f"{label}, unfinished"
        plots.broken_off(left, run["seconds"], run["accuracy"], color=color, label=unfinished)
    ended = [run for run in runs if len(run) == last]
    if ended:
      seconds = np.mean([run["seconds"] for run in ended], axis=0)
      accuracy = [run["accuracy"] for run in ended]
      plots.mean_and_range(left, seconds, accuracy, color=color, label=label, band=method in moved)
  for method, panel in zip(moved, panels, strict=True):
    values, wrong = map(np.concatenate, zip(*weights[method], strict=True))
    groups = {"clean": values[~wrong], "wrong label": values[wrong]}
    plots.histograms(panel, groups, np.linspace(0, 1, 41))
    panel.set_title(labels[method], fontsize="medium")
    panel.set(xlabel="weight", ylabel="examples")
  left.set(xscale="log", xlabel="training seconds (no compilation)", ylabel="test accuracy")
  fig.legend(
    *left.get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize="small"
  )
  plots.save(fig, path)
