"""The implicit term of gradients through an attack, in the losses that are differentiated."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PerturbedLoss = Callable[[Any, jax.Array, jax.Array], jax.Array]


class DoneInfo(NamedTuple):
  """What :func:`done_grad` found on its way: ``aux`` of its result; ``[batch]`` but for images.

  Attributes:
    perturbed: the perturbed images, strictly in their boxes.
    last_step: the largest change of a pixel in the last step, in units of the images: zero once
      the lower level is solved.
    residual: the relative residual of the linear system; 0 where it was solved exactly.
    not_finite: whether a gradient by the image was not finite. The example was then left at its
      last finite perturbation, and has no implicit term if that of the outer loss was not.
  """

  perturbed: jax.Array
  last_step: jax.Array
  residual: jax.Array
  not_finite: jax.Array

  @property
  def num_not_finite(self) -> jax.Array:
    """How many examples met a gradient that is not finite, int32."""
    return jnp.sum(self.not_finite, dtype=jnp.int32)


def corrected_losses(loss, attack_loss, params, perturbed, attacked, labels, q) -> jax.Array:
  """Losses whose gradient by the parameters has the implicit term too; ``q=None`` for none.

  The slope of the attack loss along ``q`` is taken forwards: one backward pass for both terms.
  """
  losses = loss(params, perturbed, labels)
  if q is None:
    return losses
  at = lambda images: attack_loss(params, images, labels)
  _, slope = jax.jvp(at, (attacked,), (q,))
  return losses - (slope - jax.lax.stop_gradient(slope)).astype(losses.dtype)


def image_gradient(loss, params, images, labels) -> tuple[jax.Array, jax.Array]:
  """The gradient of each loss by its image, zero where it is not finite, and where that is."""
  losses, pullback = jax.vjp(lambda images: loss(params, images, labels), images)
  if losses.shape != labels.shape:
    raise ValueError(f"losses must be {labels.shape}, one for each image, got {losses.shape}")
  (slope,) = pullback(jnp.ones_like(losses))
  axes = tuple(range(1, slope.ndim))
  bad = ~jnp.isfinite(losses) | ~jnp.all(jnp.isfinite(slope), axis=axes)
  return jnp.where(jnp.expand_dims(bad, axes), 0, slope), bad
