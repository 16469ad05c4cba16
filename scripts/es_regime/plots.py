"""The picture: accuracy against seconds for each run and number of sources."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from scripts.common import plots
from scripts.common.plots import plt

# Colours that all eyes tell apart, and a marker each; what only frames the picture is grey.
STYLES = {
  "itd_remat": ("#0072B2", "o", "-"),
  "itd_through": ("#56B4E9", "P", "--"),
  "aid": ("#009E73", "^", "-"),
  "esj": ("#D55E00", "D", "-"),
  "full_es": ("#CC79A7", "v", "-."),
  "tpe": ("#E69F00", "s", "-"),
  "random": ("0.55", "", "--"),
}


def draw(lines: pd.DataFrame, rows: pd.DataFrame, labels: Mapping[str, str], path: Path) -> None:
  """Means over seeds, with the oracle above and all sources alike below."""
  runs, sizes = lines["run"].unique().tolist(), sorted(lines["sources"].unique())
  size = (1 + 3.2 * len(sizes), 1 + 2.7 * len(runs))
  fig, grid = plt.subplots(
    len(runs), len(sizes), figsize=size, sharey=True, squeeze=False, layout="constrained"
  )
  for run, panels in zip(runs, grid, strict=True):
    for number, axes in zip(sizes, panels, strict=True):
      here = lambda of, run=run, number=number: of[(of["run"] == run) & (of["sources"] == number)]
      for method, line in (("oracle", ":"), ("alike", "-.")):
        values = here(rows)[here(rows)["method"] == method]["test_accuracy"]
        if len(values):
          axes.axhline(values.mean(), color="0.3", linestyle=line, label=labels[method], lw=1)
      for method, (color, marker, line) in STYLES.items():
        mine = here(lines)[here(lines)["method"] == method]
        if len(mine):
          of = mine.groupby("step")[["cpu_seconds", "test_accuracy"]]
          mean, error = of.mean(), of.sem().fillna(0)["test_accuracy"]
          style = {
            "color": color,
            "marker": marker,
            "linestyle": line,
            "ms": 4,
            "lw": 1.3,
            "capsize": 1.5,
          }
          axes.errorbar(
            mean["cpu_seconds"],
            mean["test_accuracy"],
            yerr=error,
            label=labels[method],
            **style,
          )
      axes.set_title(f"{run}, {number} sources", loc="left", fontsize="medium")
      axes.set_xscale("log")
      axes.grid(alpha=0.3)
  plt.setp(grid[-1], xlabel="CPU seconds")
  plt.setp(np.ravel(grid[:, 0]), ylabel="test accuracy")
  fullest = max(np.ravel(grid), key=lambda axes: len(axes.get_legend_handles_labels()[0]))
  plots.save(fig, path, legend_of=fullest, ncols=3)
