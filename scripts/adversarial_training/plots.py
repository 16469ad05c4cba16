"""Pictures of adversarial training: accuracy of each class, weights, and attacked images."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

import jaxbo
from scripts.adversarial_training.data import SETS, as_floats
from scripts.adversarial_training.methods import BASELINE, DONE, LABELS, METHODS, sign_attack
from scripts.adversarial_training.train import Workplace
from scripts.common import plots
from scripts.common.plots import plt

PER_CLASS, WEIGHTS, EXAMPLES = "per_class.png", "weights.png", "examples.png"
NUM_WEIGHTS, NUM_EXAMPLES = 512, 8
REWEIGHTED = (BASELINE, "gairat", "mail", "at_kl", DONE, "done_adam")


class Attacked(NamedTuple):
  """A model, and what it calls images that were made for it, ``[n]``."""

  label: str
  images: np.ndarray
  predicted: np.ndarray


def weights_and_margins(place: Workplace, params: Any) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """How methods weigh the same training images at the same parameters, by their labels.

  Margins are those of probabilities under PGD: positive if the image is still named correctly.
  """
  config, setting = place.config, place.setting(place.config.rates)
  rows = place.rows(config.sets[-1], config.first_seed)
  images, labels = place.images.pool.take(np.random.default_rng(0).permutation(rows)[:NUM_WEIGHTS])
  batch = as_floats(jnp.asarray(images)), jnp.asarray(labels)
  make_key = lambda: jax.random.key(config.first_seed)

  @jax.jit
  def margins_of(params, batch):
    attacked = sign_attack(setting)(params, batch, make_key())
    return -jaxbo.probabilistic_margin(place.model(params, attacked), batch[1])

  weights = {}
  for name in REWEIGHTED:
    if name not in config.methods:
      continue
    parts = METHODS[name].make(setting)

    @jax.jit
    def weights_of(params, batch, parts=parts):
      grads, extra = parts.gradients(params, batch, make_key(), jnp.float32(1.0))
      scores = extra.get("scores", grads.losses)
      return len(scores) * parts.weighting.weigh(scores, parts.weighting.init())[0]

    weights[LABELS[name]] = np.asarray(weights_of(params, batch))
  return weights, np.asarray(margins_of(params, batch))


def examples(
  place: Workplace, params: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray, list[Attacked]]:
  """One test image of each class that all models name correctly, and their attacks on it."""
  test, model = place.images.test, place.model
  images, labels = as_floats(jnp.asarray(test.images)), jnp.asarray(test.labels)
  attack = sign_attack(place.setting(place.config.rates))
  predict = jax.jit(lambda p, x: model(p, x).argmax(-1))
  right = np.all([np.asarray(predict(p, images) == labels) for p in params.values()], axis=0)
  of_class = [np.flatnonzero(right & (test.labels == c)) for c in range(len(place.images.names))]
  chosen = [rows[0] for rows in of_class if len(rows)][:NUM_EXAMPLES]
  batch = images[jnp.asarray(chosen, jnp.int32)], labels[jnp.asarray(chosen, jnp.int32)]
  attacked = []
  for name, of_method in params.items():
    changed = attack(of_method, batch, jax.random.key(0))
    predicted = np.asarray(predict(of_method, changed))
    attacked.append(Attacked(LABELS[name], np.asarray(changed), predicted))
  return np.asarray(batch[0]), np.asarray(batch[1]), attacked


def draw_per_class(
  rows: pd.DataFrame,
  methods: Sequence[str],
  counts: Mapping[str, np.ndarray],
  names: Sequence[str],
  path: Path,
) -> None:
  """Robust accuracy of each class, mean and standard deviation over seeds, for each training set.

  ``counts`` has the training images of each class by training set.
  """
  runs = dict(list(rows[rows["method"].isin(methods)].groupby(["set", "method"])))
  kinds = [kind for kind in counts if any((kind, method) in runs for method in methods)]
  if not kinds:
    return
  fig, panels = plt.subplots(
    len(kinds), 1, figsize=(10, 3.6 * len(kinds)), layout="constrained", squeeze=False, sharey=True
  )
  width = 0.8 / len(methods)
  for kind, axes in zip(kinds, panels[:, 0], strict=True):
    for i, method in enumerate(methods):
      if (kind, method) not in runs:
        continue
      values = runs[kind, method][[f"robust/{name}" for name in names]].to_numpy()
      spread = values.std(axis=0, ddof=1) if len(values) > 1 else None
      place = np.arange(len(names)) + (i - (len(methods) - 1) / 2) * width
      axes.bar(place, values.mean(axis=0), width, yerr=spread, label=LABELS[method], color=f"C{i}",
               error_kw={"lw": 1})  # fmt: skip
    ticks = [f"{name}\n{count}" for name, count in zip(names, counts[kind], strict=True)]
    axes.set_xticks(range(len(names)), ticks, fontsize="small")
    axes.set_ylabel("robust accuracy, %")
    axes.set_title(f"{SETS[kind]} (with the training images of each class)", loc="left")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
  panels[0, 0].legend(fontsize="small", ncols=len(methods))
  plots.save(fig, path)


def draw_weights(weights: Mapping[str, np.ndarray], margins: np.ndarray, path: Path) -> None:
  """The relative weight of each training example against its margin, one panel a method."""
  columns = min(len(weights), 3)
  lines = -(-len(weights) // columns)
  size = 4 * columns, 3.2 * lines
  fig, grid = plt.subplots(
    lines, columns, figsize=size, layout="constrained", squeeze=False, sharex=True, sharey=True
  )
  for axes in grid.ravel()[len(weights) :]:
    axes.set_visible(False)
  largest = max(float(of_method.max()) for of_method in weights.values())
  smallest = 1e-3  # Weights below are drawn there.
  for i, (label, of_method) in enumerate(weights.items()):
    axes = grid.flat[i]
    axes.axhline(1, color="0.6", lw=1, ls="--")
    axes.axvline(0, color="0.6", lw=1, ls="--")
    shown = np.maximum(of_method, smallest)
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

  ``images`` are ``[n, height, width, channels]`` in [0, 1], ``labels`` and ``names`` their classes.
  """
  number = len(images)
  if not number:
    return
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
