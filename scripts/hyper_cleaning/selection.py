"""Which training examples are kept without a bilevel problem, and the training that follows."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from scripts.common import cleaning
from scripts.common.cleaning import CleaningData, Settings
from scripts.common.data import Examples


class Problem(NamedTuple):
  """What a selection is made from."""

  data: CleaningData
  settings: Settings
  corruption: float
  seed: int
  retrain: Callable[[np.ndarray], Any]  # The model of the kept examples, and of all clean ones.


def pooled(data: CleaningData) -> Examples:
  """The training examples, then the clean ones."""
  return jax.tree.map(lambda *parts: np.concatenate(parts), data.train, data.val)


def retrain(settings: Settings, y: Any, examples: Examples, weights: jax.Array, key: jax.Array):
  """Trains on from ``y``, on the mean loss of the ``examples`` whose weight is 1 and not 0."""
  tx = optax.sgd(settings.inner_learning_rate, settings.momentum or None)
  chances, rows = weights / jnp.sum(weights), None
  if settings.batch_size is not None:
    shape = (settings.retrain_steps, settings.batch_size)
    rows = jax.random.choice(key, len(weights), shape, p=chances)

  def loss(y, rows):
    if rows is None:
      mean = jnp.sum(chances * cleaning.example_losses(settings, y, examples))
    else:
      mean = jnp.mean(cleaning.example_losses(settings, y, examples.take(rows)))
    return mean + cleaning.penalty(settings, y)

  def step(carry, rows):
    updates, state = tx.update(jax.grad(loss)(carry[0], rows), carry[1])
    return (optax.apply_updates(carry[0], updates), state), None

  (y, _), _ = jax.lax.scan(step, (y, tx.init(y)), rows, settings.retrain_steps)
  return y


def small_loss(problem: Problem, trained_on: np.ndarray) -> np.ndarray:
  """Weights that fall with the loss of a model, and are one half at the known share of noise."""
  model = problem.retrain(trained_on)
  train = problem.data.train
  losses = np.asarray(cleaning.example_losses(problem.settings, model, train), np.float64)
  return 1 / (1 + np.exp(losses - np.quantile(losses, 1 - problem.corruption)))


def confident_learning(problem: Problem) -> np.ndarray:
  """Weights 0 and 1 by cleanlab, from out-of-sample predictions of logistic regression."""
  from cleanlab.filter import find_label_issues
  from sklearn.linear_model import LogisticRegression
  from sklearn.model_selection import StratifiedKFold, cross_val_predict

  examples = pooled(problem.data)
  there = examples.labels >= 0
  images, labels = examples.images[there], examples.labels[there]
  folds = StratifiedKFold(5, shuffle=True, random_state=problem.seed)
  model = LogisticRegression(max_iter=1000)
  predicted: Any = cross_val_predict(model, images, labels, cv=folds, method="predict_proba")
  issues = find_label_issues(labels, predicted, n_jobs=1)
  return 1.0 - issues[: len(problem.data.train.labels)]


def _all(problem: Problem) -> np.ndarray:
  return np.ones(len(problem.data.train.labels))


SELECTIONS: dict[str, tuple[str, Callable[[Problem], np.ndarray]]] = {
  "clean_only": ("clean examples only", lambda p: 0 * _all(p)),
  "everything": ("everything", _all),
  "small_loss": ("small loss, of a model of everything", lambda p: small_loss(p, _all(p))),
  "small_loss_clean": (
    "small loss, of a model of the clean",
    lambda p: small_loss(p, 0 * _all(p)),
  ),
  "confident": ("confident learning (cleanlab)", confident_learning),
  "oracle": ("oracle", lambda p: 1.0 - p.data.corrupted),
}
