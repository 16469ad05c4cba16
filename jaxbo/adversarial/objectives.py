"""What attacks maximize, and the classes that they aim at."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxbo import _check
from jaxbo.adversarial.losses import (
  cross_entropy_loss,
  kl_divergence,
  label_logits,
  margin_loss,
  other_logits,
)

Objective = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def find_objective(objective: str | Objective) -> tuple[Objective, int]:
  """Returns the function of an objective, and the smallest number of classes that it takes."""
  if callable(objective):
    _check.takes_arguments("objective", objective, "logits", "labels", "clean_logits")
    return objective, 2
  _check.one_of("objective", objective, _OBJECTIVES)
  return _OBJECTIVES[objective], 3 if objective == "dlr" else 2


def difference_of_logits_ratio(logits: jax.Array, labels: jax.Array) -> jax.Array:
  r"""DLR: the margin over the spread of the three largest logits, ``[batch]``.

  .. math:: -\frac{z_y - \max_{j \ne y} z_j}{z_{\pi_1} - z_{\pi_3}}
  """
  top = jax.lax.top_k(logits, 3)[0]
  return margin_loss(logits, labels) / (top[:, 0] - top[:, 2] + 1e-12)


def targeted_dlr(logits: jax.Array, labels: jax.Array, target: jax.Array) -> jax.Array:
  r"""The targeted DLR, toward the classes ``target``, ``[batch]``.

  .. math:: -\frac{z_y - z_t}{z_{\pi_1} - (z_{\pi_3} + z_{\pi_4}) / 2}
  """
  top = jax.lax.top_k(logits, 4)[0]
  margin = label_logits(logits, target) - label_logits(logits, labels)
  return margin / (top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + 1e-12)


def likeliest_others(clean: jax.Array, labels: jax.Array, count: int) -> jax.Array:
  """Returns the classes other than the label with the largest clean logits, ``[targets, batch]``.

  There are ``count`` of them, or all others if there are fewer.
  """
  ranked = jax.lax.top_k(other_logits(clean, labels), clean.shape[1])[1]  # The label comes last.
  return jnp.swapaxes(ranked[:, : min(count, clean.shape[1] - 1)], 0, 1)


def values_of(
  objective: Objective, logits: jax.Array, labels: jax.Array, clean_logits: jax.Array
) -> jax.Array:
  """Returns the objective, ``[batch]``, NaN if a label is not a class; raises on other shapes."""
  values = objective(logits, labels, clean_logits)
  shape = getattr(values, "shape", type(values).__name__)
  if shape != labels.shape:
    raise ValueError(f"objective must return {labels.shape}, one for each image, got {shape}")
  _check.floating("objective", values)
  return jnp.where((labels >= 0) & (labels < logits.shape[1]), values, jnp.nan)


_OBJECTIVES: dict[str, Objective] = {
  "cross_entropy": lambda logits, labels, clean: cross_entropy_loss(logits, labels),
  "margin": lambda logits, labels, clean: margin_loss(logits, labels),
  "kl": lambda logits, labels, clean: kl_divergence(clean, logits),
  "dlr": lambda logits, labels, clean: difference_of_logits_ratio(logits, labels),
}
