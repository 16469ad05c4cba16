"""Pictures of adversarial training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scripts.adversarial_training.report import Row, runs_of
from scripts.common import plots
from scripts.common.plots import plt


class Attacked(NamedTuple):
  """A model on images that were made for it.

  Attributes:
    label: of its method.
    images: ``[n, height, width, channels]`` in [0, 1].
    predicted: the class of each, ``[n]``.
  """

  label: str
  images: np.ndarray
  predicted: np.ndarray


def draw_per_class(
  rows: Sequence[Row],
  methods: Mapping[str, str],
  sets: Mapping[str, str],
  counts: Mapping[str, np.ndarray],
  names: Sequence[str],
  path: Path,
) -> None:
  """Robust accuracy of each class, mean and standard deviation over seeds, for each training set.

  Args:
    rows: of all runs.
    methods: which to compare, with their labels.
    sets: the training sets, with their titles.
    counts: how many images of each class each of them has.
    names: of the classes.
    path: of the picture.
  """
  kinds = [kind for kind in sets if set(methods) & set(runs_of(rows, kind))]
  if not kinds:
    return
  fig, panels = plt.subplots(
    len(kinds), 1, figsize=(10, 3.6 * len(kinds)), layout="constrained", squeeze=False, sharey=True
  )
  width = 0.8 / len(methods)
  for kind, axes in zip(kinds, panels[:, 0], strict=True):
    runs = runs_of(rows, kind)
    for i, (method, label) in enumerate(methods.items()):
      if method not in runs:
        continue
      values = np.array([[row[f"robust/{name}"] for name in names] for row in runs[method]])
      spread = values.std(axis=0, ddof=1) if len(values) > 1 else None
      place = np.arange(len(names)) + (i - (len(methods) - 1) / 2) * width
      axes.bar(place, values.mean(axis=0), width, yerr=spread, label=label, color=f"C{i}",
               error_kw={"lw": 1})  # fmt: skip
    ticks = [f"{name}\n{count}" for name, count in zip(names, counts[kind], strict=True)]
    axes.set_xticks(range(len(names)), ticks, fontsize="small")
    axes.set_ylabel("robust accuracy, %")
    axes.set_title(f"{sets[kind]} (with the training images of each class)", loc="left")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
  panels[0, 0].legend(fontsize="small", ncols=len(methods))
  plots.save(fig, path)


def draw_weights(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], path: Path) -> None:
  """The relative weight of each training example against its margin, one panel a method.

  Args:
    curves: margins and weights by the label of the method.
    path: of the picture.
  """
  if not curves:
    return
  columns = min(len(curves), 3)
  lines = -(-len(curves) // columns)
  fig, grid = plt.subplots(
    lines,
    columns,
    figsize=(4 * columns, 3.2 * lines),
    layout="constrained",
    squeeze=False,
    sharex=True,
    sharey=True,
  )
  for axes in grid.ravel()[len(curves) :]:
    axes.set_visible(False)
  largest = max(float(weights.max()) for _, weights in curves.values())
  smallest = 1e-3  # Weights below are drawn there.
  for i, (axes, (label, (margins, weights))) in enumerate(
    zip(grid.ravel(), curves.items(), strict=False)
  ):
    axes.axhline(1, color="0.6", lw=1, ls="--")
    axes.axvline(0, color="0.6", lw=1, ls="--")
    shown = np.maximum(weights, smallest)
    axes.scatter(margins, shown, s=6, alpha=0.5, color=f"C{i}", linewidths=0)
    axes.set_title(label, loc="left", fontsize="medium")
    axes.set(xlim=(-1.05, 1.05), yscale="log", ylim=(0.7 * smallest, 1.5 * largest))
  for axes in grid[:, 0]:
    axes.set_ylabel("weight (uniform: 1)")
  for axes in grid[-1]:
    axes.set_xlabel("margin of the adversarial example")
  plots.save(fig, path)


def draw_examples(
  images: np.ndarray,
  labels: np.ndarray,
  attacked: Sequence[Attacked],
  names: Sequence[str],
  path: Path,
) -> None:
  """Images as they are, and as each model is attacked, under what the model calls them.

  Args:
    images: ``[n, height, width, channels]`` in [0, 1].
    labels: the class of each.
    attacked: the models.
    names: of the classes.
    path: of the picture.
  """
  number = len(images)
  rows = 1 + 2 * len(attacked)
  fig, grid = plt.subplots(
    rows, number, figsize=(1.35 * number + 0.8, 1.55 * rows), layout="constrained", squeeze=False
  )
  show = lambda axes, image: axes.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=1)
  for j in range(number):
    show(grid[0, j], images[j])
    grid[0, j].set_title(names[labels[j]], fontsize="small")
    for i, model in enumerate(attacked):
      right = model.predicted[j] == labels[j]
      above, below = grid[1 + 2 * i, j], grid[2 + 2 * i, j]
      show(above, model.images[j])
      above.set_title(
        names[model.predicted[j]], fontsize="small", color="tab:green" if right else "tab:red"
      )
      change = model.images[j] - images[j]
      show(below, 0.5 + 0.5 * change / max(float(np.abs(change).max()), 1e-12))
  for axes in grid.ravel():
    axes.set(xticks=[], yticks=[])
  grid[0, 0].set_ylabel("as it is", fontsize="small")
  for i, model in enumerate(attacked):
    grid[1 + 2 * i, 0].set_ylabel(f"{model.label}:\nattacked", fontsize="small")
    grid[2 + 2 * i, 0].set_ylabel("the change,\nmagnified", fontsize="small")
  plots.save(fig, path)
