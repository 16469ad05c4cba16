"""The implicit term of gradients through an attack, built into the losses to differentiate."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxbo import _check
from jaxbo._types import PyTree

PerturbedLoss = Callable[[PyTree, jax.Array, jax.Array], jax.Array]


class DoneInfo(NamedTuple):
  """What :func:`done_grad` and :func:`fast_bat_grad` report as ``aux``.

  Attributes:
    perturbed: the perturbed images, shaped like the images: strictly inside their boxes with
      :func:`done_grad`, possibly on the walls with :func:`fast_bat_grad`.
    last_step: the largest change of a pixel in the last step, ``[batch]``, in units of the images;
      zero once the lower level is solved.
    residual: the relative residual of the linear system, ``[batch]``; 0 if solved in closed form.
    not_finite: whether a gradient with respect to the image was not finite, ``[batch]``. The
      perturbation then stays where it was. If the gradient of ``loss_fn`` was not finite, the
      example has no implicit term. If the gradient of ``attack_loss`` was not finite, the implicit
      term does not exist: the loss is NaN, and :func:`~jaxbo.reweight` excludes the example.
    clipped: whether the clean image was outside the range ``[low, high]``, ``[batch]``, so that the
      attack started at the clipped image instead. If any image was clipped, ``low`` and ``high`` do
      not fit these images.
    aux: the auxiliary output of ``loss_fn``, with ``has_aux``.
  """

  perturbed: jax.Array
  last_step: jax.Array
  residual: jax.Array
  not_finite: jax.Array
  clipped: jax.Array
  aux: PyTree = None

  @property
  def num_not_finite(self) -> jax.Array:
    """The number of examples with a gradient that was not finite, int32."""
    return jnp.sum(self.not_finite, dtype=jnp.int32)

  @property
  def num_clipped(self) -> jax.Array:
    """The number of clean images that were outside the range of pixels, int32."""
    return jnp.sum(self.clipped, dtype=jnp.int32)


def corrected_losses(loss_fn, attack_loss, params, perturbed, attacked, labels, q) -> jax.Array:
  """Returns losses whose gradient includes the implicit term, or not if ``q`` is ``None``.

  Forward mode gives the slope of the attack loss along ``q``, so one backward pass does both terms.
  """
  losses = checked("loss_fn", loss_fn(params, perturbed, labels), labels)
  if q is None:
    return losses
  at = lambda images: attack_loss(params, images, labels)
  _, slope = jax.jvp(at, (attacked,), (q,))
  return losses - (slope - jax.lax.stop_gradient(slope)).astype(losses.dtype)


def checked(name: str, losses: jax.Array, labels: jax.Array) -> jax.Array:
  """Returns ``losses``, the result of ``name``; raises unless they are one float for each image."""
  shape = getattr(losses, "shape", type(losses).__name__)
  if shape != labels.shape:
    raise ValueError(f"{name} must return {labels.shape}, one loss for each image, got {shape}")
  _check.floating(name, losses)
  return losses


def image_gradient(name, loss, params, images, labels) -> tuple[jax.Array, jax.Array]:
  """Returns each loss's gradient by its image, or zero if not finite, and whether it is not."""
  of_images = lambda images: checked(name, loss(params, images, labels), labels)
  losses, pullback = jax.vjp(of_images, images)
  (slope,) = pullback(jnp.ones_like(losses))
  axes = tuple(range(1, slope.ndim))
  bad = ~jnp.isfinite(losses) | ~jnp.all(jnp.isfinite(slope), axis=axes)
  return jnp.where(jnp.expand_dims(bad, axes), 0, slope), bad
