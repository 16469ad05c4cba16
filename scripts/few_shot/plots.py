"""Pictures of few-shot learning: curves of all methods, and an episode with its predictions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from scripts.common import plots
from scripts.common.plots import plt
from scripts.few_shot.problem import LABELS
from scripts.few_shot.setting import Draw, Settings
from scripts.few_shot.trainer import Trainer


def draw_curves(metrics: Sequence[dict[str, Any]], path: Path) -> None:
  """Validation accuracy against meta-steps and against seconds."""
  fig, (left, right) = plt.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
  for i, name in enumerate(LABELS):
    lines = [line for line in metrics if line["method"] == name]
    if lines:
      accuracy = [line["validation_accuracy"] for line in lines]
      for axes, of in ((left, "step"), (right, "seconds")):
        axes.plot([line[of] for line in lines], accuracy, color=f"C{i}", label=LABELS[name])
  left.set(xlabel="meta-steps", ylabel="validation accuracy")
  right.set(xlabel="training seconds (no compilation)", xscale="log")
  handles, labels = left.get_legend_handles_labels()
  fig.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize="small")
  plots.save(fig, path)


def draw_episode(
  label: str, trainer: Trainer, settings: Settings, classes: Any, path: Path
) -> None:
  """The first test episode: support images left, query images right, wrong ones framed in red."""
  episode = trainer.first_episode(classes, Draw.TEST)
  predicted = np.argmax(jax.jit(trainer.method.predict)(trainer.state, episode), axis=-1)
  ways, shots, queries = settings.num_ways, settings.num_shots, settings.num_queries
  fig, grid = plt.subplots(
    ways, shots + queries, figsize=(0.8 * (shots + queries), 0.9 * ways + 0.6), squeeze=False
  )
  for way in range(ways):
    for column in range(shots + queries):
      support = column < shots
      index = way * shots + column if support else way * queries + column - shots
      image = np.asarray((episode.support_images if support else episode.query_images)[index])
      axes = grid[way, column]
      axes.imshow(image.squeeze(), cmap="gray")
      axes.set(xticks=[], yticks=[])
      if support:
        color = "0.6"
      else:
        color = "tab:green" if predicted[index] == way else "tab:red"
        axes.set_xlabel(f"{predicted[index]}", color=color, fontsize="small", labelpad=1)
      for spine in axes.spines.values():
        spine.set(color=color, linewidth=2)
    grid[way, 0].set_ylabel(f"{way}", rotation=0, labelpad=8)
  right = int(np.sum(predicted == np.asarray(episode.query_labels)))
  fig.suptitle(
    f"{label}: {shots} support images a class, then {queries} queries with the "
    f"predicted class; {right} of {len(predicted)} right",
    fontsize="small",
  )
  plots.save(fig, path)
