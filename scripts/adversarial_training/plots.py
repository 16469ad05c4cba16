"""Pictures of adversarial training: gains by class, weights, and attacked images."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

import jaxbo
from scripts.adversarial_training.data import SETS, as_floats
from scripts.adversarial_training.methods import BASELINE, DONE, LABELS, METHODS, sign_attack
from scripts.adversarial_training.train import Workplace
from scripts.common import plots, table
from scripts.common.plots import plt

GAINS, WEIGHTS, EXAMPLES = "gains.png", "weights.png", "examples.png"
NUM_WEIGHTS, NUM_EXAMPLES = 512, 8
REWEIGHTED = (BASELINE, "gairat", "mail", "at_kl", DONE, "done_adam")
LOSSES = {"tail_loss": "as trained", "tail_loss_calibrated": "at the best temperature"}
# Colours that all eyes tell apart, a marker and a line each.
STYLES = {
  "trades": ("#009E73", "^", "--"),
  "mart": ("#E69F00", "s", "-."),
  "mail": ("#D55E00", "D", (0, (5, 1, 1, 1, 1, 1))),
  "at_kl": ("#CC79A7", "v", ":"),
  DONE: ("#0072B2", "o", "-"),
}


class Attacked(NamedTuple):
  """A model, and what it calls images that were made for it, ``[n]``."""

  label: str
  images: np.ndarray
  predicted: np.ndarray


def weights_and_margins(place: Workplace, params: Any) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """How methods weigh the same training images at the same parameters, by their labels.

  Margins are those of probabilities under PGD: positive if the image is still named correctly.
  """
  config, kind = place.config, place.config.sets[-1]
  rows = place.rows(kind, config.first_seed)
  images, labels = place.images.pool.take(np.random.default_rng(0).permutation(rows)[:NUM_WEIGHTS])
  batch = as_floats(jnp.asarray(images)), jnp.asarray(labels)
  make_key = lambda: jax.random.key(config.first_seed)

  @jax.jit
  def margins(params, batch):
    attacked = sign_attack(place.setting(config.rates))(params, batch, make_key())
    return -jaxbo.adversarial.probabilistic_margin(place.model(params, attacked), batch[1])

  @functools.partial(jax.jit, static_argnums=0)
  def relative_weights(name, params, batch):
    gradients, weighting = METHODS[name].make(place.setting(config.chosen(kind, name)))
    grads, extra = gradients(params, batch, make_key(), jnp.float32(1.0))
    scores = extra.get("scores", grads.losses)
    return len(scores) * weighting.weigh(scores, weighting.init())[0]

  chosen = [name for name in REWEIGHTED if name in config.methods]
  weights = {LABELS[name]: np.asarray(relative_weights(name, params, batch)) for name in chosen}
  return weights, np.asarray(margins(params, batch))


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


def draw_gains(
  rows: pd.DataFrame, counts: Mapping[str, np.ndarray], names: Sequence[str], path: Path
) -> None:
  """What methods gain over the baseline in pairs of one seed: means with their standard errors.

  For each training set the worst-case accuracy of each class, and the loss of the worst tenth as
  trained and at the best temperature. ``counts`` has the training images of each class by set.
  """
  kinds = [kind for kind, mine in rows.groupby("set", sort=False) if {*STYLES} & {*mine["method"]}]
  if BASELINE not in set(rows["method"]) or not kinds:
    return
  fig, panels = plt.subplots(
    2, len(kinds), figsize=(7 * len(kinds), 6.4), layout="constrained", squeeze=False, sharey="row"
  )
  for kind, (above, below) in zip(kinds, panels.T, strict=True):
    gains = table.differences(rows[rows["set"] == kind], "method", BASELINE)
    _gains(above, gains, [f"robust/{name}" for name in names])
    ticks = [f"{name}\n{count}" for name, count in zip(names, counts[str(kind)], strict=True)]
    above.set_xticks(range(len(names)), ticks, fontsize="small")
    above.set_title(f"{SETS[str(kind)]}: class, and its training images", loc="left")
    _gains(below, gains, list(LOSSES))
    below.set_xticks(range(len(LOSSES)), list(LOSSES.values()))
  panels[0, 0].set_ylabel(f"worst-case accuracy\nminus {LABELS[BASELINE]}, points")
  panels[1, 0].set_ylabel(f"loss of the worst 10 %\nminus {LABELS[BASELINE]}, nats")
  plots.save(fig, path, legend_of=panels[0, 0], ncols=len(STYLES))


def _gains(axes: Axes, gains: pd.DataFrame, columns: list[str]) -> None:
  """A line for each method through its means of the columns."""
  axes.axhline(0, color="0.45", lw=1)
  for i, (method, (color, marker, line)) in enumerate(STYLES.items()):
    mine = gains.loc[gains["method"] == method, columns]
    if len(mine):
      where = np.arange(len(columns)) + 0.08 * (i - (len(STYLES) - 1) / 2)
      style = {"color": color, "marker": marker, "linestyle": line, "capsize": 2, "ms": 6}
      axes.errorbar(where, mine.mean(), yerr=mine.sem().fillna(0), label=LABELS[method], **style)
  axes.margins(x=0.08)
  axes.grid(alpha=0.3)


def draw_weights(weights: Mapping[str, np.ndarray], margins: np.ndarray, path: Path) -> None:
  """The relative weight of each training example against its margin, one panel a method."""
  columns = min(len(weights), 3)
  lines = -(-len(weights) // columns)
  shared: Any = {"layout": "constrained", "squeeze": False, "sharex": True, "sharey": True}
  fig, grid = plt.subplots(lines, columns, figsize=(4 * columns, 3.2 * lines), **shared)
  for i in range(len(weights), grid.size):
    grid.flat[i].set_visible(False)
    grid.flat[i - columns].tick_params(labelbottom=True)
  largest = max(float(of_method.max()) for of_method in weights.values())
  smallest = 1e-3  # Weights below are drawn there.
  for i, (axes, (label, of_method)) in enumerate(zip(grid.flat, weights.items(), strict=False)):
    axes.axhline(1, color="0.6", lw=1, ls="--")
    axes.axvline(0, color="0.6", lw=1, ls="--")
    shown = np.maximum(of_method, smallest)
    axes.scatter(margins, shown, s=6, alpha=0.5, color=f"C{i}", linewidths=0)
    axes.set_title(label, loc="left", fontsize="medium")
    axes.set(xlim=(-1.05, 1.05), yscale="log", ylim=(0.7 * smallest, 1.5 * largest))
  fig.supxlabel("margin of the adversarial example", fontsize="medium")
  fig.supylabel("weight (uniform: 1)", fontsize="medium")
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
  if not len(images):
    return
  columns, rows = len(images), 1 + 2 * len(attacked)
  fig, grid = plt.subplots(
    rows, columns, figsize=(1.35 * columns + 0.8, 1.55 * rows), layout="constrained", squeeze=False
  )

  def show(row, shown, label, predicted=None):
    grid[row, 0].set_ylabel(label, fontsize="small")
    for j, axes in enumerate(grid[row]):
      axes.imshow(shown[j].squeeze(), cmap="gray", vmin=0, vmax=1)
      axes.set(xticks=[], yticks=[])
      if predicted is not None:
        color = "k" if row == 0 else "tab:green" if predicted[j] == labels[j] else "tab:red"
        axes.set_title(names[predicted[j]], fontsize="small", color=color)

  show(0, images, "as it is", labels)
  for i, model in enumerate(attacked):
    change = model.images - images
    largest = np.abs(change).max(axis=(1, 2, 3), keepdims=True)
    show(1 + 2 * i, model.images, f"{model.label}:\nattacked", model.predicted)
    show(2 + 2 * i, 0.5 + 0.5 * change / np.maximum(largest, 1e-12), "the change,\nmagnified")
  plots.save(fig, path)
