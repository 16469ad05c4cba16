"""The picture of hyper-cleaning: accuracy by the number of clean examples, and learned weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from scripts.common import plots
from scripts.common.plots import plt

WITH_WEIGHTS = ("itd", "esj")
# Colours that all eyes tell apart, and a marker each; what only frames the picture is grey.
STYLES = {
  "oracle": ("0.45", "", ":"),
  "clean_only": ("0.45", "", "--"),
  "everything": ("0.7", "", "-."),
  "small_loss": ("#CC79A7", "v", "-"),
  "small_loss_clean": ("#E69F00", "s", "-"),
  "itd": ("#0072B2", "o", "-"),
  "aid": ("#009E73", "^", "-"),
  "esj": ("#D55E00", "D", "-"),
}


def draw(
  rows: pd.DataFrame,
  weights: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]],
  labels: Mapping[str, str],
  clean: int,
  path: Path,
) -> None:
  """Means over seeds with their standard errors, a panel for each noise; and histograms.

  ``weights`` has for each run of a method, on ``clean`` clean examples, the weights of the training
  examples, and which of them have a wrong label.
  """
  noises = rows["noise"].unique().tolist()
  height = 4.2 + 2.8 * bool(weights)
  fig = plt.figure(figsize=(1 + 5 * max(len(noises), len(weights)), height), layout="constrained")
  ratios = [3, 2] if weights else [1]
  parts = fig.subfigures(len(ratios), 1, height_ratios=ratios, squeeze=False)[:, 0]
  above = parts[0].subplots(1, len(noises), squeeze=False)[0]
  for noise, panel in zip(noises, above, strict=True):
    _accuracies(panel, rows[rows["noise"] == noise], labels)
    panel.set_title(f"{noise} noise", loc="left", fontsize="medium")
  below = parts[1].subplots(1, len(weights), squeeze=False)[0] if weights else ()
  for (method, runs), panel in zip(weights.items(), below, strict=True):
    values, wrong = map(np.concatenate, zip(*runs, strict=True))
    for group, mine, color in (("clean", ~wrong, "#56B4E9"), ("wrong label", wrong, "#D55E00")):
      panel.hist(values[mine], list(np.linspace(0, 1, 41)), alpha=0.6, label=group, color=color)
    panel.legend(fontsize="small")
    title = f"{labels[method]}: weights, {noises[0]} noise, {clean} clean examples"
    panel.set_title(title, loc="left", fontsize="medium")
    panel.set(xlabel="weight", ylabel="examples")
  plots.save(fig, path, legend_of=above[0], ncols=4)


def _accuracies(axes: Axes, rows: pd.DataFrame, labels: Mapping[str, str]) -> None:
  for method, (color, marker, line) in STYLES.items():
    accuracies = rows[rows["method"] == method].groupby("clean")["test_accuracy"]
    if not len(accuracies):
      continue
    mean, error = accuracies.mean(), accuracies.sem().fillna(0)
    style = {"color": color, "marker": marker, "linestyle": line, "capsize": 2, "ms": 5}
    axes.errorbar(mean.index, mean, yerr=error, label=labels[method], **style)
  sizes = sorted(rows["clean"].unique())
  axes.set_xscale("log")
  axes.set_xticks(sizes, [str(size) for size in sizes])
  axes.minorticks_off()
  axes.set(xlabel="clean examples", ylabel="test accuracy")
  axes.grid(alpha=0.3)
