"""Random crops and mirror images, on the device, under jit."""

import jax
import jax.numpy as jnp


def random_crop(key: jax.Array, images: jax.Array, padding: int = 4) -> jax.Array:
  """Moves each image by a random number of pixels, zeros coming in at the border.

  The same as padding on all sides by zeros and cutting out the old size at a random place: shifts
  of rows and of columns are uniform in ``-padding .. padding``, independent of each other and of
  other images. 4 is usual for images of 32 by 32.

  ``images`` are ``[n, height, width, channels]`` of any dtype, and so is what comes back.
  """
  wide = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
  corners = jax.random.randint(key, (len(images), 2), 0, 2 * padding + 1)

  def cut(image, corner):
    return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), images.shape[1:])

  return jax.vmap(cut)(wide, corners)


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
  """Mirrors each image, ``[n, height, width, channels]``, left to right with probability 1/2."""
  flips = jax.random.bernoulli(key, 0.5, (len(images), 1, 1, 1))
  return jnp.where(flips, images[:, :, ::-1], images)
