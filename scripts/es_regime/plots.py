"""The picture: accuracy against seconds for each run and number of sources, and against bytes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from scripts.common import plots
from scripts.common.plots import plt

# Colours that all eyes tell apart, and a marker each; what only frames the picture is grey.
STYLES = {
  "itd_remat": ("#0072B2", "o", "-"),
  "itd_through": ("#0072B2", "o", "-"),
  "esj": ("#D55E00", "D", "-"),
  "official": ("#CC79A7", "v", "-."),
  "tpe": ("#E69F00", "s", "--"),
  "random": ("#009E73", "^", ":"),
  "aid": ("0.55", "x", "-"),
}


def draw(lines: pd.DataFrame, rows: pd.DataFrame, labels: Mapping[str, str], path: Path) -> None:
  """Means over seeds with their standard errors; the last column has the most sources."""
  runs, sizes = rows["run"].unique().tolist(), sorted(rows["sources"].unique())
  size = (1 + 2.9 * (len(sizes) + 1), 1 + 2.6 * len(runs))
  fig, grid = plt.subplots(
    len(runs), len(sizes) + 1, figsize=size, sharey=True, squeeze=False, layout="constrained"
  )
  for run, panels in zip(runs, grid, strict=True):
    of_run = lambda of, run=run: of[of["run"] == run]
    for number, axes in zip(sizes, panels, strict=False):
      here = lambda of, number=number, of_run=of_run: of_run(of)[of_run(of)["sources"] == number]
      _against_seconds(axes, here(lines), here(rows), labels)
      axes.set_title(f"{run}, {number} sources", loc="left", fontsize="medium")
    most = of_run(rows)[of_run(rows)["sources"] == sizes[-1]]
    _against_bytes(panels[-1], most[most["temporary_bytes"] > 0], labels)
  plt.setp(np.ravel(grid[:, 0]), ylabel="test accuracy")
  handles: dict[str, Any] = {}
  for axes in np.ravel(grid):
    handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
  fig.legend(handles.values(), handles, loc="outside lower center", ncols=3, fontsize="small")
  plots.save(fig, path)


def _against_seconds(
  axes: Axes, lines: pd.DataFrame, rows: pd.DataFrame, labels: Mapping[str, str]
) -> None:
  for method, line in (("oracle", "--"), ("alike", ":")):
    values = rows[rows["method"] == method]["test_accuracy"]
    if len(values):
      axes.axhline(values.mean(), color="0.4", linestyle=line, label=labels[method], lw=1)
  for method, (color, marker, line) in STYLES.items():
    mine = lines[lines["method"] == method]
    if len(mine):
      of = mine.groupby("step")[["cpu_seconds", "test_accuracy"]]
      mean, error = of.mean(), of.sem().fillna(0)["test_accuracy"]
      style = {"color": color, "marker": marker, "linestyle": line, "ms": 4, "capsize": 1.5}
      x, y = mean["cpu_seconds"], mean["test_accuracy"]
      axes.errorbar(x, y, yerr=error, label=labels[method], lw=1.3, **style)
  axes.set(xlim=(0, None), xlabel="CPU seconds")
  axes.grid(alpha=0.3)


def _against_bytes(axes: Axes, rows: pd.DataFrame, labels: Mapping[str, str]) -> None:
  if not len(rows):
    axes.set_axis_off()
    return
  for method, (color, marker, _) in ({"itd": ("0.2", "o", "")} | STYLES).items():
    mine = rows[rows["method"] == method]
    if len(mine):
      of = mine["test_accuracy"]
      x, error = (
        mine["temporary_bytes"].mean() / 2**20,
        np.asarray(of.sem() if len(of) > 1 else 0.0),
      )
      style = {"color": color, "marker": marker, "ms": 6, "capsize": 1.5, "linestyle": ""}
      axes.errorbar(x, of.mean(), yerr=error, label=labels[method], **style)
  axes.set(xscale="log", xlabel="MiB")
  axes.set_title(f"{rows['sources'].max()} sources, bytes", loc="left", fontsize="medium")
  axes.grid(alpha=0.3)
