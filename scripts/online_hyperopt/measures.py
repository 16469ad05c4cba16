"""What is measured of predictions: accuracy, and the loss at a temperature fitted to the run."""

import jax
import jax.numpy as jnp
import numpy as np

from scripts.online_hyperopt.problems import weighted_cross_entropy
from scripts.online_hyperopt.streams import Batch, Level

TEMPERATURES = 2.0 ** np.arange(-10, 4.01, 0.125)


def balanced_accuracy(predicted: jax.Array, labels: jax.Array, num_classes: int) -> jax.Array:
  """The mean over classes of the share of their examples that are classified correctly."""
  members = jax.nn.one_hot(labels, num_classes, axis=0)
  counts = members.sum(axis=1)
  correct = members @ (predicted == labels)
  # A class without examples does not count.
  return jnp.sum(correct / jnp.maximum(counts, 1)) / jnp.sum(counts > 0)


@jax.jit
def played_accuracy(logits: jax.Array, played: Level) -> jax.Array:
  """The mean over rounds of the share that is correct, weighted like the loss, ``[seeds]``.

  ``logits`` are ``[seeds, rounds, batch, classes]``, the leaves of ``played`` without classes.
  """
  correct = jnp.argmax(logits, axis=-1) == played.labels
  shares = jnp.sum(played.weights * correct, axis=-1) / jnp.sum(played.weights, axis=-1)
  return jnp.mean(shares, axis=1)


@jax.jit
def losses_by_temperature(logits: jax.Array, played: Level) -> jax.Array:
  """The outer loss of each round at each of the temperatures, ``[temperatures, seeds, rounds]``."""
  batch = Batch(None, played.labels, played.weights)
  loss = jax.vmap(jax.vmap(weighted_cross_entropy))
  return jax.lax.map(lambda t: loss(logits / t, batch), jnp.asarray(TEMPERATURES, logits.dtype))


def held_out(logits: jax.Array, played: Level) -> tuple[np.ndarray, np.ndarray]:
  """The cumulative loss at one temperature of the logits, and that temperature, ``[seeds]`` each.

  The temperature of even rounds is the best one of the odd rounds, and the other way round, so no
  round chooses its own; the one that is returned is their geometric mean.
  """
  losses = np.asarray(losses_by_temperature(logits, played), np.float64)
  even, odd = losses[..., ::2].sum(axis=-1), losses[..., 1::2].sum(axis=-1)
  of_even, of_odd = (np.nan_to_num(sums, nan=np.inf).argmin(axis=0) for sums in (odd, even))
  seeds = np.arange(losses.shape[1])
  temperature = np.sqrt(TEMPERATURES[of_even] * TEMPERATURES[of_odd])
  return even[of_even, seeds] + odd[of_odd, seeds], temperature
