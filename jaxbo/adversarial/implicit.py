"""The implicit term of gradients through an attack, in the losses that are differentiated."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbo import _check

PerturbedLoss = Callable[[Any, jax.Array, jax.Array], jax.Array]


class DoneInfo(NamedTuple):
  """What :func:`done_grad` found on its way: ``aux`` of its result; ``[batch]`` but for images.

  Attributes:
    perturbed: the perturbed images, strictly in their boxes; by :func:`fast_bat_grad` in them.
    last_step: the largest change of a pixel in the last step, in units of the images: zero once
      the lower level is solved.
    residual: the relative residual of the linear system; 0 where it was solved exactly.
    not_finite: whether a gradient by the image was not finite. The example was then left at its
      last finite perturbation. If it is the gradient of the outer loss, the example has no implicit
      term. If it is that of the attack loss, there is none to be had: the loss is NaN, and
      :func:`~jaxbo.reweight` leaves the example out.
  """

  perturbed: jax.Array
  last_step: jax.Array
  residual: jax.Array
  not_finite: jax.Array

  @property
  def num_not_finite(self) -> jax.Array:
    """How many examples met a gradient that is not finite, int32."""
    return jnp.sum(self.not_finite, dtype=jnp.int32)


def corrected_losses(loss_fn, attack_loss, params, perturbed, attacked, labels, q) -> jax.Array:
  """Losses whose gradient by the parameters has the implicit term too; ``q=None`` for none.

  The slope of the attack loss along ``q`` is taken forwards: one backward pass for both terms.
  """
  losses = checked("loss_fn", loss_fn(params, perturbed, labels), labels)
  if q is None:
    return losses
  at = lambda images: attack_loss(params, images, labels)
  _, slope = jax.jvp(at, (attacked,), (q,))
  return losses - (slope - jax.lax.stop_gradient(slope)).astype(losses.dtype)


def checked(name: str, losses: Any, labels: jax.Array) -> jax.Array:
  """Returns what the loss ``name`` returned; raises unless that is one float for each image."""
  shape = getattr(losses, "shape", type(losses).__name__)
  if shape != labels.shape:
    raise ValueError(f"{name} must return {labels.shape}, one loss for each image, got {shape}")
  _check.floating(name, losses)
  return losses


def image_gradient(name, loss, params, images, labels) -> tuple[jax.Array, jax.Array]:
  """The gradient of each loss by its image, zero where it is not finite, and where that is."""
  of_images = lambda images: checked(name, loss(params, images, labels), labels)
  losses, pullback = jax.vjp(of_images, images)
  (slope,) = pullback(jnp.ones_like(losses))
  axes = tuple(range(1, slope.ndim))
  bad = ~jnp.isfinite(losses) | ~jnp.all(jnp.isfinite(slope), axis=axes)
  return jnp.where(jnp.expand_dims(bad, axes), 0, slope), bad
