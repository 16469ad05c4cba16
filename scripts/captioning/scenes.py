"""Images of colored shapes with captions whose entropy is known exactly."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scripts.captioning import drawing, language


class CaptionedShapes(NamedTuple):
  """Images of two shapes and their captions; ``v`` right captions each.

  Attributes:
    images: ``[n, 32, 32, 3]`` float32 in [0, 1].
    tokens: the captions, with their noise, ``[n, 10]`` int32: the beginning, words, the end,
      padding.
    valid: all right captions of each image, ``[n, v, 10]`` int32; the first is the one that
      ``tokens`` would be without noise.
    cells: where the objects stand, in the order of ``valid[:, 0]``, ``[n, 2]`` int32 in [0, 16),
      row by row.
    flipped: which color words are wrong, in the order of the caption, ``[n, 2]`` bool.
    swapped: which captions are another scene's, ``[n]`` bool.
  """

  images: jax.Array
  tokens: jax.Array
  valid: jax.Array
  cells: jax.Array
  flipped: jax.Array
  swapped: jax.Array


@dataclasses.dataclass(frozen=True)
class ShapesCaptions:
  r"""Two colored shapes on a grid, with captions such as "a red square left of a blue cross".

  An image has 4 x 4 cells of 8 pixels. Its objects stand in a row or in a column, in different
  cells, and no two have the same color and shape, so that each relation is unambiguous. A shape
  fills 6 x 6 pixels, shifted by up to two; its color, one of six, has a brightness in [0.7, 1];
  Gaussian noise of 0.05 is added, and pixels are clipped.

  With ``order="canonical"`` the caption names the objects in reading order, so that the image
  determines it. With ``order="either"`` a fair coin may turn it round ("a blue cross right of a red
  square"), which is :math:`\ln 2` nats, all in the first word in which both captions differ.

  Scenes are drawn on the device, one from each key: with a coin frozen in each of 20,000 fixed
  scenes captioners learn its flips by heart. Parts of scenes are ``"train"``, ``"validation"`` and
  ``"test"``: a captioner has to put together what it has learned of objects and relations.

  Attributes:
    order: ``"canonical"`` or ``"either"``.
    color_flips: probability in [0, 1] that a color word is replaced by one of the others.
    swaps: probability in [0, 1] that the caption is that of another scene.

  References:
    After ShapeWorld (https://arxiv.org/abs/1704.04517) and CLEVR
    (https://arxiv.org/abs/1612.06890).
  """

  order: str = "canonical"
  color_flips: float = 0.0
  swaps: float = 0.0

  def entropies(self, part: str) -> tuple[float, float]:
    """The entropy of a caption without noise, given its image and without it, in nats.

    They are the least loss that there can be, and that of a captioner that does not see the image.
    """
    orders = 2 if self.order == "either" else 1
    num = orders * np.count_nonzero(language.PARTS[part])  # All captions are as frequent.
    frequencies = np.full(num, 1 / num)
    return float(np.log(orders)), float(-np.sum(frequencies * np.log(frequencies)))

  def sample(self, key: jax.Array, num: int, part: str = "train") -> CaptionedShapes:
    """Draws ``num`` examples; works under ``jit`` with ``num`` and ``part`` static.

    Example ``i`` depends on the key and ``i`` alone.
    """
    among = language.PARTS[part]
    cumulative = jnp.asarray(np.cumsum(among / among.sum()), jnp.float32)
    example_key, _ = jax.random.split(key)
    keys = jax.vmap(functools.partial(jax.random.fold_in, example_key))(jnp.arange(num))
    return jax.vmap(functools.partial(self._example, cumulative))(keys)

  def _example(self, cumulative: jax.Array, key: jax.Array) -> CaptionedShapes:
    """The example of a key."""
    scene_key, coin_key, pixel_key, noise_key = jax.random.split(key, 4)
    place = jax.random.uniform(scene_key) * cumulative[-1]
    last = jnp.searchsorted(cumulative, cumulative[-1])  # Rounding may reach the line's end.
    scene = jnp.searchsorted(cumulative, place, side="right")
    scene = jnp.minimum(scene, last).astype(jnp.int32)

    flip_key, other_key, swap_key = jax.random.split(noise_key, 3)
    valid, turned = self._valid(scene, coin_key)
    tokens, swapped = valid[0], jnp.asarray(False)
    if self.swaps:
      swapped = jax.random.bernoulli(swap_key, self.swaps)
      other_key, other_coin_key = jax.random.split(other_key)
      pieces = jnp.diff(cumulative, prepend=0).at[scene].set(0)
      other = jax.random.categorical(other_key, jnp.log(pieces))
      tokens = jnp.where(swapped, self._valid(other, other_coin_key)[0][0], tokens)
    tokens, flipped = self._flip(tokens, flip_key)

    kinds, vertical = jnp.asarray(language.KINDS)[scene], jnp.asarray(language.VERTICAL)[scene]
    image, cells = drawing.draw(kinds, vertical, pixel_key)
    cells = jnp.where(turned, cells[::-1], cells)
    return CaptionedShapes(image, tokens, valid, cells, flipped, swapped)

  def _valid(self, scene: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """All right captions ``[v, 10]`` of a scene, and whether the first one is turned round."""
    captions = jnp.asarray(language.CAPTIONS)[:, scene]
    if self.order == "canonical":
      return captions[:1], jnp.asarray(False)
    turned = jax.random.bernoulli(key)
    return jnp.where(turned, captions[::-1], captions), turned

  def _flip(self, tokens: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Replaces some color words by others; says which, in the order of the caption."""
    flip_key, color_key = jax.random.split(key)
    flipped = jax.random.bernoulli(flip_key, self.color_flips, (2,))
    shift = jax.random.randint(color_key, (2,), 1, len(language.COLORS)) * flipped
    color = tokens - language.FIRST_COLOR
    is_color = (color >= 0) & (color < len(language.COLORS))
    which = jnp.clip(jnp.cumsum(is_color) - 1, 0, 1)
    written = language.FIRST_COLOR + (color + shift[which]) % len(language.COLORS)
    return jnp.where(is_color, written, tokens).astype(jnp.int32), flipped
