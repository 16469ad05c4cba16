"""Images of coloured shapes with captions whose entropy is known exactly."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scripts.captioning import drawing, language
from scripts.captioning.language import CaptionEntropies


class CaptionedShapes(NamedTuple):
  """Images of shapes and their captions; ``k`` objects and ``v`` right captions each.

  Attributes:
    images: ``[n, 32, 32, 3]`` float32 in [0, 1].
    tokens: the captions, with their noise, ``[n, length]`` int32: the beginning, words, the end,
      padding.
    valid: all right captions of each image, ``[n, v, length]`` int32; the first is the one that
      ``tokens`` would be without noise.
    kinds: what the objects are, in the order of ``valid[:, 0]``: ``4 * colour + shape``,
      ``[n, k]`` int32.
    cells: where they stand, ``[n, k]`` int32 in [0, 16), row by row.
    boxes: their pixels, ``[n, k, 4]`` int32: top, left, bottom and right, the last two behind them.
    scene: the number of the scene in :meth:`ShapesCaptions.frequencies`, ``[n]`` int32.
    flipped: which colour words are wrong, ``[n, k]`` bool; none where the caption is swapped.
    swapped: which captions are another scene's, ``[n]`` bool, with flips of their own.
    source: the row that an example repeats, ``[n]`` int32; its own if it is none.
  """

  images: jax.Array
  tokens: jax.Array
  valid: jax.Array
  kinds: jax.Array
  cells: jax.Array
  boxes: jax.Array
  scene: jax.Array
  flipped: jax.Array
  swapped: jax.Array
  source: jax.Array

  @property
  def mask(self) -> Any:
    """Which tokens are no padding, ``[n, length]`` bool."""
    return self.tokens != language.PAD


@dataclasses.dataclass(frozen=True)
class ShapesCaptions:
  r"""Coloured shapes on a grid, with captions such as "a red square left of a blue cross".

  An image has 4 x 4 cells of 8 pixels. Its objects stand in a row or in a column, in different
  cells, and no two have the same colour and shape, so that each relation is unambiguous. A shape
  fills 6 x 6 pixels, shifted by up to two; its colour, one of six, has a brightness in [0.7, 1];
  Gaussian noise of 0.05 is added, and pixels are clipped.

  With ``order="canonical"`` the caption names the objects in reading order, so that the image
  determines it. With ``order="either"`` a fair coin may turn it round ("a blue cross right of a red
  square"), which is :math:`\ln 2` nats, all in the first word in which both captions differ.
  :meth:`entropies` has the least loss that a captioner can reach, and that of one that does not
  see: for two objects, all scenes and no noise :math:`\ln(24 \cdot 23 \cdot 2) = 7.0067` nats more.

  Scenes are drawn on the device, one from each key: with a coin frozen in each of 20,000 fixed
  scenes captioners learn its flips by heart.

  Attributes:
    num_objects: 1 to 4; a single object has the caption "a red square".
    order: ``"canonical"`` or ``"either"``.
    split: ``"triple"`` holds out 20 % of the triples of two objects and a direction for the test
      and 10 % for validation, each with both orders of its objects: a captioner has to put together
      what it has learnt of objects and relations. ``"pair"`` tests on scenes with one of six pairs
      of colour and shape that are never trained on; the loss in training tells nothing of it.
      ``"iid"`` has all scenes in all parts.
    color_flips: probability in [0, 1] that a colour word is replaced by one of the others.
    swaps: probability in [0, 1] that the caption is that of another scene.
    duplicates: share in [0, 1) of examples that repeat another one of the same call.
    tail: scenes are drawn in proportion to ``rank ** -tail``, in a fixed random order of ranks; 0
      for equal frequencies.
    pixel_noise: standard deviation of the noise.

  References:
    After ShapeWorld (https://arxiv.org/abs/1704.04517) and CLEVR
    (https://arxiv.org/abs/1612.06890), whose held-out pairs ``split="pair"`` has.
  """

  num_objects: int = 2
  order: str = "canonical"
  split: str = "triple"
  color_flips: float = 0.0
  swaps: float = 0.0
  duplicates: float = 0.0
  tail: float = 0.0
  pixel_noise: float = 0.05

  @property
  def length(self) -> int:
    """Tokens of the longest caption, with its beginning and end: 10 for two objects."""
    return 5 * self.num_objects

  def decode(self, tokens: Any) -> str:
    """The words of a caption up to its end, as a text."""
    ids = [int(i) for i in np.asarray(tokens)]
    end = ids.index(language.EOS) if language.EOS in ids else len(ids)
    return " ".join(language.VOCABULARY[i] for i in ids[:end] if i > language.BOS)

  def frequencies(self, part: str) -> np.ndarray:
    """How often each scene is drawn, ``[scenes]`` with a sum of 1; 0 for those of other parts.

    Parts are ``"train"``, ``"validation"`` and ``"test"``, here and below.
    """
    return _frequencies(self.num_objects, self.split, self.tail, part)

  def entropies(self, part: str) -> CaptionEntropies:
    """The entropy of a caption given its image, and without it, in nats, with all noise.

    All captions are enumerated: with swaps there are too many for more than two objects.
    """
    return language.entropies(
      _scenes(self.num_objects),
      self.frequencies(part),
      either_order=self.order == "either",
      color_flips=self.color_flips,
      swaps=self.swaps,
    )

  def sample(self, key: jax.Array, num: int, part: str = "train") -> CaptionedShapes:
    """Draws ``num`` examples; works under ``jit`` with ``num`` and ``part`` static.

    Example ``i`` depends on the key and ``i`` alone, but for those that repeat others: these are
    the last ones.
    """
    cumulative = jnp.asarray(np.cumsum(self.frequencies(part)), jnp.float32)
    example_key, source_key = jax.random.split(key)
    one = functools.partial(self._example, cumulative)
    keys = jax.vmap(functools.partial(jax.random.fold_in, example_key))(jnp.arange(num))
    examples = jax.vmap(one)(keys)
    copies = min(round(self.duplicates * num), num - 1)
    repeated = jax.random.randint(source_key, (copies,), 0, num - copies)
    source = jnp.concatenate([jnp.arange(num - copies), repeated]).astype(jnp.int32)
    if copies:
      examples = jax.tree.map(lambda leaf: leaf[source], examples)
    return CaptionedShapes(*examples, source=source)

  def _example(self, cumulative: jax.Array, key: jax.Array):
    """Everything of an example but its source."""
    scene_key, coin_key, pixel_key, noise_key = jax.random.split(key, 4)
    place = jax.random.uniform(scene_key) * cumulative[-1]
    last = jnp.searchsorted(cumulative, cumulative[-1])  # Rounding may reach the line's end.
    scene = jnp.searchsorted(cumulative, place, side="right")
    scene = jnp.minimum(scene, last).astype(jnp.int32)

    own_key, other_key, swap_key = jax.random.split(noise_key, 3)
    valid, turned = self._valid(scene, coin_key)
    tokens, flipped = self._flip(valid[0], own_key)
    swapped = jnp.asarray(False)
    if self.swaps:
      swapped = jax.random.bernoulli(swap_key, self.swaps)
      keys = jax.random.split(other_key, 3)
      pieces = jnp.diff(cumulative, prepend=0).at[scene].set(0)
      other = jax.random.categorical(keys[0], jnp.log(pieces))
      theirs, _ = self._flip(self._valid(other, keys[1])[0][0], keys[2])
      tokens, flipped = jnp.where(swapped, theirs, tokens), flipped & ~swapped

    kinds, vertical = (jnp.asarray(field)[scene] for field in _scenes(self.num_objects)[:2])
    image, cells, boxes = drawing.draw(kinds, vertical, self.pixel_noise, pixel_key)
    objects = (jnp.where(turned, field[::-1], field) for field in (kinds, cells, boxes))
    return image, tokens, valid, *objects, scene, flipped, swapped

  def _valid(self, scene: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """All right captions ``[v, length]`` of a scene, and whether the first one is turned round."""
    captions = jnp.asarray(language.captions(_scenes(self.num_objects)))[:, scene]
    if self.order == "canonical" or self.num_objects == 1:
      return captions[:1], jnp.asarray(False)
    turned = jax.random.bernoulli(key)
    return jnp.where(turned, captions[::-1], captions), turned

  def _flip(self, tokens: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Replaces some colour words by others; says which, in the order of the caption."""
    num_colors = len(language.COLORS)
    flip_key, color_key = jax.random.split(key)
    flipped = jax.random.bernoulli(flip_key, self.color_flips, (self.num_objects,))
    shift = jax.random.randint(color_key, (self.num_objects,), 1, num_colors) * flipped
    color = tokens - language.FIRST_COLOR
    is_color = (color >= 0) & (color < num_colors)
    which = jnp.clip(jnp.cumsum(is_color) - 1, 0, self.num_objects - 1)
    written = language.FIRST_COLOR + (color + shift[which]) % num_colors
    return jnp.where(is_color, written, tokens).astype(jnp.int32), flipped


@functools.cache
def _scenes(num_objects: int) -> language.Compositions:
  return language.compositions(num_objects)


@functools.cache
def _frequencies(num_objects: int, split: str, tail: float, part: str) -> np.ndarray:
  among = language.parts(_scenes(num_objects), split)[part]
  rank = np.random.default_rng(1).permutation(len(among)) + 1.0
  weights = np.where(among, rank**-tail, 0.0)
  frequencies = weights / weights.sum()
  frequencies.flags.writeable = False  # All who ask get the same array.
  return frequencies
