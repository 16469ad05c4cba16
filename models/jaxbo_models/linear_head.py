"""A linear head: what a few-shot task learns on top of given features.

A head is ``{"w": [features, classes], "b": [classes]}``; the functions here are pure.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxbo_models.cross_entropy import cross_entropies


def zero_head(num_features: int, num_classes: int) -> dict[str, jax.Array]:
  """Returns the head of zeros, which gives all classes equal probability, in JAX's default dtype.

  >>> z = logits(zero_head(84, 5), features=jnp.ones((3, 84)))
  >>> print(cross_entropy(z, labels=jnp.array([4, 0, 2])), jnp.log(5))
  1.609438 1.609438
  """
  return {"w": jnp.zeros((num_features, num_classes)), "b": jnp.zeros(num_classes)}


def logits(head: Any, features: jax.Array) -> jax.Array:
  """Returns the logits ``[n, classes]`` of ``features`` ``[n, features]``."""
  return features @ head["w"] + head["b"][None]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Returns the mean cross-entropy of logits ``[n, classes]``, given integer labels ``[n]``."""
  return jnp.mean(cross_entropies(logits, labels))
