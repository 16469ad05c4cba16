"""The sets of allowed perturbations: boxes for pixels, balls for images, and projections."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxbo import _check


class Box(NamedTuple):
  r"""The range of pixels, and how far an attack may move an image within it.

  .. math:: \{x' : \|x' - x\| \le \epsilon,\; low \le x' \le high\}

  Every number may be an array that broadcasts over one image: ``[channels]`` for images ``[batch,
  height, width, channels]``. If images are normalized by the mean and standard deviation of each
  channel, attack them in ``Box(epsilon / std, (0 - mean) / std, (1 - mean) / std)``. Or move the
  normalization into the model with :func:`normalized`, and keep the images in [0, 1].

  Attributes:
    epsilon: the radius, at least 0, in units of the images; one number if ``norm`` is ``"l2"``.
    low: the smallest value of a pixel.
    high: the largest value of a pixel, above ``low``.
    norm: ``"linf"``: ``epsilon`` bounds the change of each pixel (an array bounds each pixel
      separately); ``"l2"``: it bounds the Euclidean norm of the change of an image.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> box = jaxbo.adversarial.Box(8 / 255)                         # pixels from 0 to 1
    >>> box.outside(jnp.array([[0.0, 1.0], [0.5, 255.0]])).tolist()
    [False, True]
  """

  epsilon: ArrayLike
  low: ArrayLike = 0.0
  high: ArrayLike = 1.0
  norm: str = "linf"

  def outside(self, images: jax.Array) -> jax.Array:
    """Whether an image has a pixel outside ``[low, high]`` by more than rounding, ``[batch]``.

    Rounding is that of the images' dtype. NaN does not count as outside.
    """
    low, high = (as_image(name, getattr(self, name), images) for name in ("low", "high"))
    largest = jnp.maximum(jnp.abs(low), jnp.abs(high))
    rounding = 2 * float(jnp.finfo(images.dtype).eps) * largest
    out = (images < low - rounding) | (images > high + rounding)
    return jnp.any(out, axis=tuple(range(1, images.ndim)))

  def clip(self, images: jax.Array) -> jax.Array:
    """The images with their pixels moved into ``[low, high]``."""
    low, high = (as_image(name, getattr(self, name), images) for name in ("low", "high"))
    return jnp.clip(images, low, high)

  def bounds(self, images: jax.Array) -> "Bounds":
    r"""The perturbations :math:`[\max(-\epsilon, low - x), \min(\epsilon, high - x)]`."""
    epsilon, low, high = (as_image(n, getattr(self, n), images) for n in ("epsilon", "low", "high"))
    return Bounds(jnp.maximum(low - images, -epsilon), jnp.minimum(high - images, epsilon))


def normalized(
  model: Callable[..., jax.Array], mean: ArrayLike, std: ArrayLike
) -> Callable[[Any, jax.Array], jax.Array]:
  r"""Moves the normalization into the model, so that attacks see the pixels themselves.

  .. math:: f'(\theta, x) = f\big(\theta, (x - mean) / std\big)

  Args:
    model: ``model(params, images)`` of normalized images.
    mean: the mean of the pixels: a number, or an array that broadcasts over one image.
    std: the standard deviation of the pixels, positive: a number, or such an array.

  Returns:
    ``model(params, images)`` of images that are not normalized, such as those in [0, 1] that
    ``mean`` and ``std`` describe.

  Raises:
    ValueError: if ``std`` is not positive, or an array does not broadcast over one image.
    TypeError: if images are not floats.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> def trained(params, images):                                  # on normalized images
    ...   return images @ params
    >>> model = jaxbo.adversarial.normalized(trained, mean=0.5, std=jnp.array([0.25, 0.5]))
    >>> print(model(jnp.eye(2), jnp.array([[1.0, 0.0]])))
    [[ 2. -1.]]

  References:
    As RobustBench and AutoAttack do: Croce et al., `RobustBench
    <https://arxiv.org/abs/2010.09670>`_, 2021.
  """
  _check.takes_arguments("model", model, "params", "images")
  check_each(_check.finite, "mean", mean)
  check_each(_check.positive, "std", std)

  def of_pixels(params, images):
    _check.floating("images", images)
    return model(params, (images - as_image("mean", mean, images)) / as_image("std", std, images))

  return of_pixels


class Bounds(NamedTuple):
  """Bounds of a perturbation, pixel by pixel.

  Attributes:
    low: the lower bounds, at most 0, shaped like the images.
    high: the upper bounds, at least 0.
  """

  low: jax.Array
  high: jax.Array

  @property
  def center(self) -> jax.Array:
    """The middle of the bounds, where the two barriers of a pixel balance."""
    return self.low + 0.5 * (self.high - self.low)

  def project(self, delta: jax.Array) -> jax.Array:
    """The nearest perturbation within the bounds."""
    return jnp.clip(delta, self.low, self.high)

  def shrink(self, margin: float) -> "Bounds":
    """The strict interior: cuts ``margin`` times the width off both ends of each pixel's range."""
    inset = margin * (self.high - self.low)
    return Bounds(self.low + inset, self.high - inset)

  def room(self, delta: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The distances of ``delta`` to the lower and to the upper wall."""
    return delta - self.low, self.high - delta

  def random(self, key: jax.Array) -> jax.Array:
    """A uniform draw."""
    draw = jax.random.uniform(key, self.low.shape, self.low.dtype)
    return self.low + draw * (self.high - self.low)


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


def make_ball(box: Box) -> Ball:
  """The ball of a checked box."""

  def in_box(delta, images):
    return box.bounds(images).project(delta)

  def shortened(delta, images):
    size = norms(delta)
    delta = delta * along(jnp.minimum(1, box.epsilon / jnp.where(size > 0, size, 1)), delta)
    low, high = as_image("low", box.low, images), as_image("high", box.high, images)
    return jnp.clip(delta, low - images, high - images)

  def from_box(key, images):
    return box.bounds(images).random(key)

  def from_ball(key, images):
    direction, radius = jax.random.split(key)
    delta = unit(jax.random.normal(direction, images.shape, images.dtype))
    power = 1 / (images.size // images.shape[0])
    size = box.epsilon * jax.random.uniform(radius, images.shape[:1], images.dtype) ** power
    return shortened(delta * along(size, delta), images)

  if box.norm == "linf":
    return Ball(in_box, from_box, jnp.sign)
  return Ball(shortened, from_ball, unit)


def check_box(box: Box, norms: tuple[str, ...] = ("linf", "l2")) -> Box:
  """Returns ``box``; raises unless it is a :class:`Box` within its ranges, in one of ``norms``."""
  if not isinstance(box, Box):
    raise TypeError(f"box must be a jaxbo.adversarial.Box, say Box(8 / 255), got {box!r}")
  _check.one_of("norm", box.norm, norms)
  check_each(_check.non_negative, "epsilon", box.epsilon)
  check_each(_check.finite, "low", box.low)
  check_each(_check.finite, "high", box.high)
  known = _check.is_known(box.low) and _check.is_known(box.high)
  if known and not np.all(np.asarray(box.low) < np.asarray(box.high)):
    raise ValueError(f"low must be below high, got low={box.low} and high={box.high}")
  if box.norm == "l2" and jnp.ndim(box.epsilon):
    shape = jnp.shape(box.epsilon)
    raise ValueError(f"epsilon must be one number with norm='l2', got shape {shape}")
  return box


def check_each(check: Callable[[str, Any], Any], name: str, value: ArrayLike) -> None:
  """Raises what ``check`` raises for the smallest or the largest number of ``value``."""
  if _check.is_known(value) and np.size(value) and not isinstance(value, str):
    # NumPy's own functions: methods of a jax.Array would be traced under jit.
    numbers = np.asarray(value)
    check(name, np.min(numbers))
    check(name, np.max(numbers))
  else:
    check(name, value)


def as_image(name: str, value: ArrayLike, images: jax.Array) -> Any:
  """Returns ``value`` such that it broadcasts over ``images``; raises unless it does over one."""
  if not jnp.ndim(value):
    return value
  try:
    one = jnp.broadcast_to(jnp.asarray(value, images.dtype), images.shape[1:])
  except ValueError:
    raise ValueError(
      f"{name} must broadcast over one image, {images.shape[1:]}, got shape {jnp.shape(value)}"
    ) from None
  return jnp.expand_dims(one, 0)


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
