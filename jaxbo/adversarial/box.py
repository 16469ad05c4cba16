"""The sets of allowed perturbations: boxes for pixels, balls for images, and projections."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxbo import _check


class Box(NamedTuple):
  """Bounds of a perturbation, pixel by pixel.

  Attributes:
    low: the lower bounds, at most 0, shaped like the images.
    high: the upper bounds, at least 0.
  """

  low: jax.Array
  high: jax.Array

  @property
  def center(self) -> jax.Array:
    """The middle of the box, where the two barriers of a pixel balance."""
    return self.low + 0.5 * (self.high - self.low)

  def project(self, delta: jax.Array) -> jax.Array:
    """The nearest point of the box."""
    return jnp.clip(delta, self.low, self.high)

  def shrink(self, margin: float) -> "Box":
    """The strict interior: cuts ``margin`` times the width off both ends of each pixel's range."""
    inset = margin * (self.high - self.low)
    return Box(self.low + inset, self.high - inset)

  def room(self, delta: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The distances of ``delta`` to the lower and to the upper wall."""
    return delta - self.low, self.high - delta


class Ball(NamedTuple):
  """A norm ball around each image, cut to the range of pixel values.

  Attributes:
    project: ``project(delta, images)`` returns a feasible perturbation near ``delta``. For ``l2``
      it shortens ``delta`` to the ball, then clips it, which keeps it in the ball. If clipping
      changes a pixel, the result is feasible but not the nearest point.
    random: ``random(key, images)`` draws a perturbation uniformly: for ``linf``, from the part of
      the ball within the range; for ``l2``, from the ball, then clipped to the range.
    steepest: ``steepest(gradient)`` returns the direction of steepest ascent with norm 1: the sign
      of the gradient, or the gradient divided by its norm. A zero gradient gives zero.
  """

  project: Callable[[jax.Array, jax.Array], jax.Array]
  random: Callable[[jax.Array, jax.Array], jax.Array]
  steepest: Callable[[jax.Array], jax.Array]


def pixel_box(images: jax.Array, epsilon: float | jax.Array, low: float, high: float) -> Box:
  r"""The box :math:`[\max(-\epsilon, low - x), \min(\epsilon, high - x)]` of perturbations."""
  return Box(jnp.maximum(low - images, -epsilon), jnp.minimum(high - images, epsilon))


def make_ball(norm: str, epsilon: float | jax.Array, low: float, high: float) -> Ball:
  """The ball of radius ``epsilon`` in ``norm``, ``"linf"`` or ``"l2"``."""
  _check.one_of("norm", norm, ("linf", "l2"))
  check_range(low, high)
  _check.non_negative("epsilon", epsilon)

  def in_box(delta, images):
    return pixel_box(images, epsilon, low, high).project(delta)

  def shortened(delta, images):
    size = norms(delta)
    delta = delta * along(jnp.minimum(1, epsilon / jnp.where(size > 0, size, 1)), delta)
    return jnp.clip(delta, low - images, high - images)

  def from_box(key, images):
    box = pixel_box(images, epsilon, low, high)
    return box.low + jax.random.uniform(key, images.shape, images.dtype) * (box.high - box.low)

  def from_ball(key, images):
    direction, radius = jax.random.split(key)
    delta = unit(jax.random.normal(direction, images.shape, images.dtype))
    power = 1 / (images.size // images.shape[0])
    size = epsilon * jax.random.uniform(radius, images.shape[:1], images.dtype) ** power
    return shortened(delta * along(size, delta), images)

  return Ball(in_box, from_box, jnp.sign) if norm == "linf" else Ball(shortened, from_ball, unit)


def check_range(low: float, high: float) -> None:
  """Raises ``ValueError`` unless ``low < high``, both finite."""
  _check.finite("low", low)
  _check.finite("high", high)
  if _check.is_known(low) and _check.is_known(high) and not low < high:
    raise ValueError(f"low must be below high, got low={low} and high={high}")


def along(values: jax.Array, images: jax.Array) -> jax.Array:
  """Adds axes to ``values``, one for each example, so that they broadcast over ``images``."""
  return jnp.expand_dims(values, tuple(range(1, images.ndim)))


def norms(delta: jax.Array) -> jax.Array:
  """The Euclidean norm of each example, ``[batch]``, without overflow of the squares."""
  axes = tuple(range(1, delta.ndim))
  largest = jnp.max(jnp.abs(delta), axis=axes)
  scaled = delta / along(jnp.where(largest > 0, largest, 1), delta)
  return largest * jnp.sqrt(jnp.sum(scaled**2, axis=axes))


def unit(delta: jax.Array) -> jax.Array:
  """Divides each example by its Euclidean norm; an example of norm zero stays zero."""
  size = norms(delta)
  # Divide by the largest entry first: the reciprocal of a tiny norm would overflow.
  largest = jnp.max(jnp.abs(delta), axis=tuple(range(1, delta.ndim)))
  scaled = delta / along(jnp.where(size > 0, largest, 1), delta)
  return scaled * along(jnp.where(size > 0, largest / jnp.where(size > 0, size, 1), 0), delta)
