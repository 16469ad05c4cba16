"""Pictures of few-shot learning: curves of all methods, and an episode with its predictions."""

from pathlib import Path

import numpy as np
import pandas as pd

from jaxbo.tasks import Episode
from scripts.common import plots
from scripts.common.plots import plt
from scripts.few_shot.problem import LABELS
from scripts.few_shot.setting import Settings


def draw_curves(lines: pd.DataFrame, path: Path) -> None:
  """Validation accuracy, the mean over seeds, against meta-steps and against seconds."""
  fig, (left, right) = plt.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
  for i, (method, label) in enumerate(LABELS.items()):
    mine = lines[lines["method"] == method]
    if len(mine):
      means = mine.groupby("step")[["validation_accuracy", "seconds"]].mean()
      for axes, x in ((left, means.index), (right, means["seconds"])):
        axes.plot(x, means["validation_accuracy"], color=f"C{i}", label=label)
  left.set(xlabel="meta-steps", ylabel="validation accuracy")
  right.set(xlabel="training seconds (no compilation)", xscale="log")
  plots.save(fig, path, legend_of=left, ncols=len(LABELS))


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
