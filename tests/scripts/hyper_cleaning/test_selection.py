"""Which examples are kept without a bilevel problem, and the training that follows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from scripts.common import cleaning
from scripts.common.data import Examples
from scripts.hyper_cleaning import selection
from scripts.hyper_cleaning.selection import SELECTIONS, Problem

SMALL = dataclasses.replace(
  cleaning.DATASETS["digits"], num_train=300, num_val=60, retrain_steps=60
)
pytestmark = pytest.mark.slow  # All together, not each.


@pytest.fixture(scope="module")
def data():
  found = cleaning.split(cleaning.read("digits"), SMALL, 0.4, 0, "systematic")
  labels = np.where(np.arange(60) < 50, found.val.labels, -1)
  return found._replace(val=Examples(found.val.images, labels))


def retrained(data, kept, settings=SMALL):
  pool = Examples(*map(jnp.asarray, selection.pooled(data)))
  weights = jnp.asarray(np.concatenate([kept, pool.labels[len(kept) :] >= 0]), jnp.float32)
  y = cleaning.init_params(settings, pool.images.shape[1], jax.random.key(0))
  run = jax.jit(lambda y: selection.retrain(settings, y, pool, weights, jax.random.key(1)))
  return run(y)


def test_the_model_is_that_of_the_kept_examples_and_the_clean_ones(data):
  kept = ~data.corrupted
  images = np.concatenate([data.train.images[kept], data.val.images[:50]])
  labels = np.concatenate([data.train.labels[kept], data.val.labels[:50]])

  def loss(y):
    logits = images @ y["w"].T + y["b"][None]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses) + SMALL.ridge * jnp.sum(y["w"] ** 2)

  sgd = optax.sgd(SMALL.inner_learning_rate, SMALL.momentum)

  def step(carry, _):
    updates, state = sgd.update(jax.grad(loss)(carry[0]), carry[1])
    return (optax.apply_updates(carry[0], updates), state), None

  y = {"w": jnp.zeros((10, 64)), "b": jnp.zeros(10)}
  (expected, _), _ = jax.lax.scan(step, (y, sgd.init(y)), length=60)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), retrained(data, kept), expected
  )


def test_in_batches_only_kept_examples_are_drawn():
  """A feature of each example shows which ones the weights have seen."""
  images, labels = np.eye(12, dtype=np.float32), np.arange(12) % 10
  train, val = Examples(images[:8], labels[:8]), Examples(images[8:], np.array([8, 9, -1, -1]))
  few = cleaning.CleaningData(train, val, val, np.zeros(8, bool))
  settings = dataclasses.replace(SMALL, batch_size=4, retrain_steps=40)
  kept = np.arange(8) % 2 == 0
  seen = np.abs(retrained(few, kept, settings)["w"]).max(axis=0) > 0
  np.testing.assert_array_equal(seen, [*kept, True, True, False, False])


def test_each_choice_keeps_what_it_says(data):
  problem = Problem(data, SMALL, 0.4, 0, lambda kept: retrained(data, kept))
  weights = {name: choose(problem) for name, (_, choose) in SELECTIONS.items()}
  assert not weights["clean_only"].any()
  assert (weights["everything"] == 1).all()
  np.testing.assert_array_equal(weights["oracle"], ~data.corrupted)
  losses = cleaning.example_losses(SMALL, retrained(data, np.ones(300)), data.train)
  order = np.argsort(np.argsort(losses))
  np.testing.assert_array_equal(weights["small_loss"] >= 0.5, order <= 0.6 * 299)
  assert set(weights["confident"]) == {0.0, 1.0}
  found = {n: cleaning.detection_scores(w, data.corrupted)[0] for n, w in weights.items()}
  assert found["small_loss_clean"] > 0.85
  assert found["confident"] > 0.6  # It finds more than chance would.
