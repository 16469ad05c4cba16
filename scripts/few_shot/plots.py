"""Pictures of few-shot learning: curves of all methods, and an episode with its predictions."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.ticker import LogLocator

from jaxbo.tasks import Episode
from scripts.common import plots
from scripts.common.plots import plt
from scripts.few_shot.problem import LABELS
from scripts.few_shot.setting import Settings

# Colours that all eyes tell apart, and a marker and a line each; references are grey.
STYLES = {
  "esj_through": ("#D55E00", "D", "-"),
  "esj_shrunk": ("#E69F00", "s", "-."),
  "esj": ("#CC79A7", "v", "--"),
  "official": ("#56B4E9", "P", ":"),
  "itd": ("#0072B2", "o", "-"),
  "first_order": ("#009E73", "^", "--"),
  "aid": ("0.55", "x", ""),
  "maml": ("0.55", "<", ""),
  "protonet": ("0.55", "*", ""),
}


def draw_curves(lines: pd.DataFrame, rows: pd.DataFrame, path: Path) -> None:
  """Validation errors against seconds, and test errors with intervals against the time of a step.

  Of several seeds the means, with the standard error over seeds for the interval. Methods without a
  line are on the right alone.
  """
  fig, (left, right) = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained")
  for method, (color, marker, line) in STYLES.items():
    mine, end = lines[lines["method"] == method], rows[rows["method"] == method]
    style = {"color": color, "marker": marker, "ms": 5}
    if len(mine) and line:
      means = mine.groupby("step")[["validation_accuracy", "seconds"]].mean()
      errors = _wrong(means["validation_accuracy"])
      left.plot(means["seconds"], errors, linestyle=line, label=LABELS[method], **style)
    if len(end):
      half = (
        1.96 * np.asarray(end["test_accuracy"].sem()) if len(end) > 1 else end["confidence"].item()
      )
      x, y = 1e3 * end["seconds_per_step"].mean(), _wrong(end["test_accuracy"].mean())
      label = LABELS[method]
      right.errorbar(x, y, yerr=100 * half, linestyle="", capsize=3, label=label, **style)
  for axes, title in ((left, "validation classes"), (right, "test classes, 95 % intervals")):
    axes.set_title(title, loc="left", fontsize="medium")
    axes.set(xscale="log", yscale="log", ylabel="wrong, %")
    for axis in (axes.xaxis, axes.yaxis):
      axis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
  right.xaxis.set_minor_locator(LogLocator(subs=(2, 4, 8)))  # More would overlap.
  right.xaxis.set_minor_formatter("{x:g}")
  left.set_xlabel("training seconds (no compilation)")
  right.set_xlabel("ms for a meta-step")
  plots.save(fig, path, legend_of=right, ncols=3)


def _wrong(accuracy: Any) -> Any:
  """In percent; none at all is drawn at 0.01, since the scale is logarithmic."""
  return np.maximum(100 - 100 * accuracy, 0.01)


def draw_episode(
  label: str, episode: Episode, predicted: np.ndarray, settings: Settings, path: Path
) -> None:
  """An episode: support images left, query images right, wrong ones framed in red."""
  ways, shots, queries = settings.num_ways, settings.num_shots, settings.num_queries
  size = 0.8 * (shots + queries), 0.9 * ways + 0.6
  fig, grid = plt.subplots(ways, shots + queries, figsize=size, squeeze=False)
  images = (episode.support_images, shots), (episode.query_images, queries)
  left, right = (np.reshape(of, (ways, n, *np.shape(of)[1:])) for of, n in images)
  names = np.full((ways, shots + queries), -1)  # No name is predicted of a support image.
  names[:, shots:] = predicted.reshape(ways, queries)
  for way in range(ways):
    row = zip(grid[way], [*left[way], *right[way]], names[way], strict=True)
    for axes, image, name in row:
      color = "0.6" if name < 0 else "tab:green" if name == way else "tab:red"
      axes.imshow(image.squeeze(), cmap="gray")
      axes.set(xticks=[], yticks=[])
      plt.setp(list(axes.spines.values()), color=color, linewidth=2)
      if name >= 0:
        axes.set_xlabel(f"{name}", color=color, fontsize="small", labelpad=1)
    grid[way, 0].set_ylabel(f"{way}", rotation=0, labelpad=8)
  num_right = int(np.sum(predicted == np.asarray(episode.query_labels)))
  fig.suptitle(
    f"{label}: {shots} support images a class, then {queries} queries with the "
    f"predicted class; {num_right} of {len(predicted)} right",
    fontsize="small",
  )
  plots.save(fig, path)
