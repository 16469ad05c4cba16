"""What is measured of predictions, against plain NumPy and scikit-learn."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from scripts.online_hyperopt import measures
from scripts.online_hyperopt.streams import Level

RNG = np.random.default_rng(0)


def test_balanced_accuracy_is_that_of_scikit_learn():
  labels, predicted = RNG.integers(0, 3, 50), RNG.integers(0, 4, 50)
  got = measures.balanced_accuracy(jnp.asarray(predicted), jnp.asarray(labels), 4)
  recalls = [np.mean(predicted[labels == label] == label) for label in range(3)]
  assert got == pytest.approx(np.mean(recalls))
  labels[:4], predicted[:4] = np.arange(4), 0
  got = measures.balanced_accuracy(jnp.asarray(predicted), jnp.asarray(labels), 4)
  assert got == pytest.approx(balanced_accuracy_score(labels, predicted))


def played(scale):
  """Logits of two seeds in 40 rounds of 8, whose labels were drawn from ``scale`` times them."""
  logits = RNG.normal(size=(2, 40, 8, 3))
  noise = RNG.gumbel(size=logits.shape)
  labels = np.argmax(scale * logits + noise, axis=-1).astype(np.int32)
  weights = RNG.uniform(0.5, 1.5, labels.shape)
  arrays = (jnp.asarray(a, jnp.float32) for a in (logits, weights))
  logits, weights = arrays
  return logits, Level(None, jnp.asarray(labels), weights)


def losses(logits, level, seed, temperature):
  """The losses of all rounds in float64."""
  z = np.asarray(logits[seed], np.float64) / temperature
  z = z - z.max(axis=-1, keepdims=True)
  picked = np.take_along_axis(z, np.asarray(level.labels[seed])[..., None], -1)[..., 0]
  weights = np.asarray(level.weights[seed], np.float64)
  return (weights * (np.log(np.exp(z).sum(-1)) - picked)).sum(-1) / weights.sum(-1)


def test_no_round_chooses_its_own_temperature():
  logits, level = played(scale=2.0)
  loss, temperature = measures.held_out(logits, level)
  for seed in range(2):
    of = [losses(logits, level, seed, t) for t in measures.TEMPERATURES]
    even = int(np.argmin([rounds[1::2].sum() for rounds in of]))  # chosen on the others
    odd = int(np.argmin([rounds[::2].sum() for rounds in of]))
    expected = of[even][::2].sum() + of[odd][1::2].sum()
    assert loss[seed] == pytest.approx(expected, rel=1e-5)
    both = measures.TEMPERATURES[[even, odd]]
    assert temperature[seed] == pytest.approx(np.sqrt(both.prod()))
    assert 0.3 < temperature[seed] < 0.8  # Logits of half the size want a temperature of 1/2.
    assert loss[seed] < losses(logits, level, seed, 1.0).sum() - 1


def test_rounds_that_diverged_choose_a_temperature_all_the_same():
  logits, level = played(scale=1.0)
  loss, _ = measures.held_out(logits.at[0, 3].set(jnp.nan), level)
  assert np.isnan(loss[0])
  assert np.isfinite(loss[1])


def test_the_accuracy_of_what_was_played_counts_weights_as_the_loss_does():
  logits, level = played(scale=1.0)
  correct = np.argmax(np.asarray(logits), axis=-1) == np.asarray(level.labels)
  weights = np.asarray(level.weights)
  expected = ((weights * correct).sum(-1) / weights.sum(-1)).mean(-1)
  np.testing.assert_allclose(measures.played_accuracy(logits, level), expected, rtol=1e-5)
