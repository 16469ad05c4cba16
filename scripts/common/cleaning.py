r"""Data hyper-cleaning: one weight per training example, learned from a small clean set.

Some training labels are wrong. The model is trained on weighted examples, the weights so that it
does well on a clean validation set:

.. math::
  \min_x \frac{1}{|V|} \sum_{j \in V} \ell_j(y^*(x)), \qquad
  y^*(x) = \arg\min_y \frac{1}{n} \sum_{i=1}^n \sigma(x_i)\, \ell_i(y) + \rho\, \|W_y\|^2

with cross-entropies :math:`\ell` and weight matrices :math:`W_y`. It needs jax, optax and NumPy;
scikit-learn for the digits and for scores, and flax for the multilayer perceptron.

Reference: Franceschi et al., `Forward and Reverse Gradient-Based Hyperparameter Optimization
<https://arxiv.org/abs/1703.01785>`_, 2017, section 5.1.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbo
from scripts.common import data
from scripts.common.data import Examples

NUM_CLASSES = 10


class CleaningData(NamedTuple):
  """The data of one seed: examples with some wrong labels, clean ones to judge by, and others."""

  train: Examples
  val: Examples  # Clean, of the outer loss.
  test: Examples  # Clean, for reports only.
  corrupted: np.ndarray  # [num_train] bool: which training labels are wrong. For the oracle alone.


@dataclasses.dataclass(frozen=True)
class Settings:
  """Sizes and rates of a hyper-cleaning problem."""

  num_train: int = 1000
  num_val: int = 300
  hidden: tuple[int, ...] = ()  # Widths of hidden layers; softmax regression if empty.
  batch_size: int | None = None  # Of an inner step; None for all examples.
  ridge: float = 1e-3  # The factor of the squared weight matrices.
  inner_steps: int = 20  # For one outer step.
  inner_learning_rate: float = 1.0  # Of SGD.
  momentum: float = 0.9  # Of SGD.
  outer_steps: int = 200
  outer_learning_rate: float = 0.1  # Of Adam, on the logits of the weights.
  linear_steps: int = 10  # Hessian-vector products of conjugate gradient and of the Neumann series.
  damping: float = 0.0  # Of conjugate gradient.
  neumann_learning_rate: float = 1.0  # The step of the Neumann series.
  num_samples: int = 64  # Directions of ESJ.
  smoothing: float = 1e-2  # The radius of ESJ.
  retrain_steps: int = 1000  # Inner steps from scratch, on the examples that were kept.


_MNIST = Settings(
  num_train=20_000,
  num_val=5_000,
  hidden=(100,),
  batch_size=256,
  ridge=1e-4,
  inner_learning_rate=0.5,
  momentum=0.0,
  outer_steps=300,
  retrain_steps=4000,
  damping=0.1,
  neumann_learning_rate=0.1,
)
_DIGITS = Settings(num_train=800, num_val=500, outer_steps=50, outer_learning_rate=0.3)
DATASETS = {"digits": _DIGITS, "mnist": _MNIST, "fashion_mnist": _MNIST}


NOISES = {"systematic": "the next class", "uniform": "any other class"}


def corrupt(
  labels: np.ndarray, rate: float, rng: np.random.Generator, noise: str = "uniform"
) -> tuple[np.ndarray, np.ndarray]:
  """Replaces ``round(rate * n)`` of ``n`` labels, drawn at random, by another class each.

  ``"uniform"`` draws that class, ``"systematic"`` takes the next one, as an annotator does who
  confuses two. Returns the new labels, and which of them are wrong, bool.
  """
  corrupted = np.zeros(len(labels), bool)
  corrupted[rng.permutation(len(labels))[: round(rate * len(labels))]] = True
  if noise == "systematic":
    shift = np.ones_like(labels)
  else:
    shift = rng.integers(1, NUM_CLASSES, len(labels), dtype=labels.dtype)  # Never the true class.
  return np.where(corrupted, (labels + shift) % NUM_CLASSES, labels), corrupted


Read = tuple[Examples, Examples | None]  # All examples, and the official test set if there is one.


def read(dataset: str, data_dir: str | os.PathLike[str] | None = None) -> Read:
  """Reads a data set."""
  if dataset == "digits":
    return data.digits(), None
  return data.tfds_images(dataset, "train", data_dir), data.tfds_images(dataset, "test", data_dir)


def split(
  read: Read, settings: Settings, corruption: float, seed: int, noise: str = "uniform"
) -> CleaningData:
  """Splits at random, and corrupts the training labels; what is left over is the test set."""
  examples, test = read
  rng = np.random.default_rng(seed)
  order = rng.permutation(len(examples.labels))
  train, val, rest = np.split(order, np.cumsum([settings.num_train, settings.num_val]))
  labels, corrupted = corrupt(examples.labels[train], corruption, rng, noise)
  return CleaningData(
    train=Examples(examples.images[train], labels),
    val=examples.take(val),
    test=examples.take(rest) if test is None else test,
    corrupted=corrupted,
  )


# -- The model. Logits have the class axis first: a third of the time of the usual layout on CPU.


def init_params(settings: Settings, num_features: int, key: jax.Array) -> Any:
  """The inner parameters: of softmax regression, or of a perceptron drawn from ``key``."""
  if not settings.hidden:
    return {"w": jnp.zeros((NUM_CLASSES, num_features)), "b": jnp.zeros(NUM_CLASSES)}
  return _perceptron(settings).init(key, jnp.zeros((1, num_features)))["params"]


def logits(settings: Settings, y: Any, images: jax.Array) -> jax.Array:
  """The logits ``[classes, n]`` of ``images`` ``[n, features]``."""
  if not settings.hidden:
    return y["w"] @ images.T + y["b"][:, None]
  return _perceptron(settings).apply({"params": y}, images).T


def _perceptron(settings: Settings) -> Any:
  from jaxbo_models import MLP

  return MLP((*settings.hidden, NUM_CLASSES))


def cross_entropies(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """The cross-entropies ``[n]`` of ``logits`` ``[classes, n]``."""
  one_hot = jax.nn.one_hot(labels, len(logits), axis=0)
  return jax.nn.logsumexp(logits, axis=0) - jnp.sum(logits * one_hot, axis=0)


class Batch(NamedTuple):
  """What an inner step sees; ``indices`` of the examples in ``x``, ``None`` for all in order."""

  examples: Examples
  indices: jax.Array | None


def example_losses(settings: Settings, y: Any, examples: Examples) -> jax.Array:
  """The loss of each example, ``[n]``."""
  return cross_entropies(logits(settings, y, examples.images), examples.labels)


def penalty(settings: Settings, y: Any) -> jax.Array:
  """The ridge."""
  matrices = [leaf for leaf in jax.tree.leaves(y) if leaf.ndim == 2]
  return settings.ridge * jnp.sum(jnp.stack([jnp.sum(matrix**2) for matrix in matrices]))


def make_losses(settings: Settings) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
  """The pair ``(inner_loss, outer_loss)``; the latter leaves out examples with the label -1."""

  def inner_loss(x, y, batch):
    weights = jax.nn.sigmoid(x if batch.indices is None else x[batch.indices])
    losses = example_losses(settings, y, batch.examples)
    return jnp.mean(weights * losses) + penalty(settings, y)

  def outer_loss(x, y, batch):
    del x  # The weights matter through y alone.
    is_one = batch.labels >= 0
    return jnp.sum(is_one * example_losses(settings, y, batch)) / jnp.sum(is_one)

  return inner_loss, outer_loss


# -- The methods.


class Method(NamedTuple):
  """A row of the table; ``head(inner, settings, key, inner_params)`` is its response."""

  label: str
  head: Callable[..., optax.GradientTransformationExtraArgs]
  single_loop: bool = False  # One inner step for one outer step, and so as many more of these.


METHODS = {
  "first_order": Method("first order", lambda inner, s, key, y: jaxbo.drop_response()),
  "itd": Method("ITD", lambda inner, s, key, y: jaxbo.add_unrolled_response(inner)),
  "aid": Method(
    "AID-CG",
    lambda inner, s, key, y: jaxbo.add_implicit_response(
      inner, jaxbo.conjugate_gradient(s.linear_steps, damping=s.damping)
    ),
  ),
  "stocbio": Method(
    "stocBiO (Neumann)",
    lambda inner, s, key, y: jaxbo.add_implicit_response(
      inner, jaxbo.neumann(s.linear_steps, s.neumann_learning_rate)
    ),
  ),
  "darts": Method(
    "finite difference (DARTS)",
    lambda inner, s, key, y: jaxbo.add_finite_difference_response(inner),
  ),
  "soba": Method(
    "SOBA",
    lambda inner, s, key, y: jaxbo.add_implicit_response(
      inner, jaxbo.fixed_point(1, s.neumann_learning_rate, warm_start=True), inner_params=y
    ),
    single_loop=True,
  ),
  "esj": Method(
    "ESJ",
    lambda inner, s, key, y: jaxbo.add_es_response(inner, s.num_samples, s.smoothing, key=key),
  ),
}


def make_program(
  method: str, cleaning: CleaningData, settings: Settings, seed: int, steps_per_run: int
) -> tuple[jaxbo.bilevel.BilevelState, Callable[..., tuple[jaxbo.bilevel.BilevelState, jax.Array]]]:
  """Builds a method: where it starts, and ``run``.

  ``run(state, key, train, val) -> (state, outer_losses)`` does some outer steps; it is the same
  function, up to the data, for every seed. A single loop has as many inner steps as the others, an
  outer step after each, and a rate outside that moves weights as far.
  """
  head, label_shape, repeats = METHODS[method].head, cleaning.train.labels.shape, 1
  if METHODS[method].single_loop:
    repeats = settings.inner_steps
    rate = settings.outer_learning_rate / repeats
    settings = dataclasses.replace(settings, inner_steps=1, outer_learning_rate=rate)
  inner_loss, outer_loss = make_losses(settings)
  inner = jaxbo.inner_solver(
    inner_loss,
    optax.sgd(settings.inner_learning_rate, settings.momentum or None),
    settings.inner_steps,
    per_step_batches=settings.batch_size is not None,
    warm_start="all",  # The momentum goes on.
  )
  y0 = init_params(settings, cleaning.train.images.shape[1], jax.random.key(seed))
  response = head(inner, settings, seed, y0)
  outer = optax.chain(response, optax.adam(settings.outer_learning_rate))
  init, step = jaxbo.bilevel_loop(outer_loss, inner, outer)

  def one_step(state, key, train, val):
    if settings.batch_size is None:
      state, info = step(state, Batch(train, None), val)
    else:
      shape = (settings.inner_steps, settings.batch_size)
      indices = jax.random.randint(key, shape, 0, len(train.labels))
      batch = Batch(train.take(indices), indices)
      # The linear system sees all examples of the inner run at once.
      union = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), batch)
      state, info = step(state, batch, val, linear_batch=union)
    return state, info.outer_loss

  def run(state, key, train, val):
    keys = jax.random.split(key, repeats * steps_per_run)
    return jax.lax.scan(lambda state, key: one_step(state, key, train, val), state, keys)

  return init(jnp.zeros(label_shape), y0), run


def accuracy(settings: Settings, y: Any, examples: Examples) -> jax.Array:
  """The share of ``examples`` that ``y`` classifies correctly; NaN if a logit is not finite."""
  found = logits(settings, y, examples.images)
  correct = jnp.argmax(found, axis=0) == examples.labels
  return jnp.where(jnp.all(jnp.isfinite(found)), jnp.mean(correct), jnp.nan)


def detection_scores(weights: np.ndarray, corrupted: np.ndarray) -> tuple[float, float]:
  """``(AUC, F1)`` of "this label is wrong": low weights, and weights below one half.

  NaN if no label is wrong, or if a weight is not finite.
  """
  from sklearn.metrics import f1_score, roc_auc_score

  if not corrupted.any() or not np.isfinite(weights).all():
    return float("nan"), float("nan")
  return float(roc_auc_score(corrupted, -weights)), float(f1_score(corrupted, weights < 0.5))
