"""Random crops and mirror images, on the device, under jit."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxbo import _check, _random


def random_crop(key: Any, images: jax.Array, padding: int = 4) -> jax.Array:
  """Moves each image by a random number of pixels, zeros coming in at the border.

  The same as padding on all sides by zeros and cutting out the old size at a random place: shifts
  of rows and of columns are uniform in ``-padding .. padding``, independent of each other and of
  other images.

  Args:
    key: an int, a raw key array or a typed key.
    images: ``[n, height, width, channels]`` of any dtype.
    padding: at least 0; 4 is usual for images of 32 by 32.

  Returns:
    Images of the same shape and dtype.

  Raises:
    TypeError: if ``key`` is no key, or ``padding`` no int.
    ValueError: if ``padding`` is negative, or ``images`` have another rank.
  """
  key = _check_arguments(key, images)
  padding = _check.non_negative_int("padding", padding)
  wide = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
  corners = jax.random.randint(key, (len(images), 2), 0, 2 * padding + 1)

  def cut(image, corner):
    return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), images.shape[1:])

  return jax.vmap(cut)(wide, corners)


def random_flip(key: Any, images: jax.Array) -> jax.Array:
  """Mirrors each image left to right with probability 1/2.

  Args:
    key: an int, a raw key array or a typed key.
    images: ``[n, height, width, channels]`` of any dtype.

  Returns:
    Images of the same shape and dtype.

  Raises:
    TypeError: if ``key`` is no key.
    ValueError: if ``images`` have another rank.
  """
  key = _check_arguments(key, images)
  flips = jax.random.bernoulli(key, 0.5, (len(images), 1, 1, 1))
  return jnp.where(flips, images[:, :, ::-1], images)


def _check_arguments(key: Any, images: jax.Array) -> Any:
  if images.ndim != 4:
    raise ValueError(f"images must have the shape [n, height, width, channels], got {images.shape}")
  if _random.key_impl("key", key) is None and jnp.ndim(key) == 0:
    key = jax.random.key(key)
  return key
