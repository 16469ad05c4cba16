"""How :class:`~scripts.captioning.scenes.ShapesCaptions` draws its scenes."""

import jax
import jax.numpy as jnp
import numpy as np

from scripts.captioning.language import SHAPES

CELL, GRID, SHAPE = 8, 4, 6  # Pixels of a cell, cells in a row, pixels of a shape.
# Red, green, blue, yellow, magenta, cyan.
_RGB = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]], np.float32)
_MASKS = np.array(  # Square, circle, triangle, cross.
  [
    [[c != "." for c in row] for row in rows.split()]
    for rows in (
      "###### ###### ###### ###### ###### ######",
      ".####. ###### ###### ###### ###### .####.",
      "..##.. ..##.. .####. .####. ###### ######",
      "..##.. ..##.. ###### ###### ..##.. ..##..",
    )
  ]
)


def draw(kinds: jax.Array, vertical: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Draws two objects, ``kinds [2]`` in reading order, in a row or in a column, at random places.

  Returns:
    The image ``[32, 32, 3]`` and the cells ``[2]``.
  """
  keys = jax.random.split(key, 5)
  across = jnp.full(2, jax.random.randint(keys[0], (), 0, GRID))
  along = jnp.sort(jax.random.permutation(keys[1], GRID)[:2])
  row, column = jnp.where(vertical, along, across), jnp.where(vertical, across, along)
  jitter = jax.random.randint(keys[2], (2, 2), 0, CELL - SHAPE + 1)
  top, left = CELL * row + jitter[0], CELL * column + jitter[1]
  brightness = jax.random.uniform(keys[3], (2, 1), minval=0.7, maxval=1.0)
  color = jnp.asarray(_RGB)[kinds // len(SHAPES)] * brightness
  pixels = jnp.arange(CELL * GRID)[:, None]
  y, x = pixels - top[None], pixels - left[None]  # [size, 2], inside the object if in [0, 6).
  inside = ((y >= 0) & (y < SHAPE))[:, None] & ((x >= 0) & (x < SHAPE))[None]
  y, x = (jnp.clip(offset, 0, SHAPE - 1) for offset in (y, x))
  mask = inside & jnp.asarray(_MASKS)[kinds % len(SHAPES), y[:, None], x[None]]
  noise = 0.05 * jax.random.normal(keys[4], (CELL * GRID, CELL * GRID, 3))
  image = jnp.clip(mask.astype(jnp.float32) @ color + noise, 0, 1)
  return image, (GRID * row + column).astype(jnp.int32)
