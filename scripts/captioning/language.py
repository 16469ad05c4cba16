"""The language of captions of shapes: scenes by number, and exact entropies."""

import itertools
from typing import NamedTuple

import numpy as np

COLORS = ("red", "green", "blue", "yellow", "magenta", "cyan")
SHAPES = ("square", "circle", "triangle", "cross")
VOCABULARY = (
  *("<pad>", "<bos>", "<eos>", "a", "of", "left", "right", "above", "below"),
  *COLORS,
  *SHAPES,
)
PAD, BOS, EOS, A, OF, LEFT, RIGHT, ABOVE, BELOW, FIRST_COLOR = range(10)
FIRST_SHAPE = FIRST_COLOR + len(COLORS)
NUM_OBJECTS = len(COLORS) * len(SHAPES)  # Kinds of them: colour * len(SHAPES) + shape.


class Compositions(NamedTuple):
  """All scenes up to places and pixels.

  Attributes:
    kinds: the kind of each object in reading order, ``[m, num_objects]``; all are different.
    vertical: whether they stand in a column and not in a row, ``[m]`` bool.
    group: scenes of the same objects and direction have one number, in whatever order, ``[m]``.
  """

  kinds: np.ndarray
  vertical: np.ndarray
  group: np.ndarray


def compositions(num_objects: int) -> Compositions:
  """All scenes of so many objects; a single object has no direction."""
  kinds = np.array(list(itertools.permutations(range(NUM_OBJECTS), num_objects)), np.int32)
  _, group = np.unique(np.sort(kinds, axis=1), axis=0, return_inverse=True)
  if num_objects == 1:
    return Compositions(kinds, np.zeros(len(kinds), bool), group)
  return Compositions(
    np.concatenate([kinds, kinds]),
    np.repeat([False, True], len(kinds)),
    np.concatenate([group, group + group.max() + 1]),
  )


def parts(scenes: Compositions, split: str) -> dict[str, np.ndarray]:
  """Which scenes belong to the parts train, validation and test, ``[m]`` bool each.

  ``iid`` has all scenes in all parts; ``triple`` holds out 20 % of the groups for the test and
  10 % for validation, drawn once for all; ``pair`` tests on scenes with a colour and a shape whose
  numbers add up to a multiple of 4, and validates on those that it trains on.
  """
  everything = np.ones(len(scenes.kinds), bool)
  if split == "iid":
    return {"train": everything, "validation": everything, "test": everything}
  if split == "pair":
    color, shape = np.divmod(scenes.kinds, len(SHAPES))
    held_out = ((color + shape) % 4 == 0).any(axis=1)
    return {"train": ~held_out, "validation": ~held_out, "test": held_out}
  num_groups = scenes.group.max() + 1
  order = np.random.default_rng(0).permutation(num_groups)
  share = np.empty(num_groups)
  share[order] = (np.arange(num_groups) + 0.5) / num_groups
  share = share[scenes.group]
  return {
    "train": share >= 0.3,
    "validation": (share >= 0.2) & (share < 0.3),
    "test": share < 0.2,
  }


def captions(scenes: Compositions) -> np.ndarray:
  """The tokens of all scenes' captions, ``[2, m, length]``: in reading order, and turned round."""
  num_objects = scenes.kinds.shape[1]
  color, shape = np.divmod(scenes.kinds, len(SHAPES))
  color, shape = color + FIRST_COLOR, shape + FIRST_SHAPE
  table = np.full((2, len(scenes.kinds), 5 * num_objects), PAD, np.int32)
  horizontal = ([LEFT, OF], [RIGHT, OF])
  vertical = ([ABOVE], [BELOW])
  for rows, relations in ((~scenes.vertical, horizontal), (scenes.vertical, vertical)):
    for order, step in enumerate((1, -1)):
      columns = [np.full(rows.sum(), BOS)]
      for i in range(num_objects)[::step]:
        between = relations[order] if len(columns) > 1 else []
        columns += [np.full(rows.sum(), word) for word in (*between, A)]
        columns += [color[rows, i], shape[rows, i]]
      columns.append(np.full(rows.sum(), EOS))
      table[order, rows, : len(columns)] = np.stack(columns, axis=1)
  return table


class CaptionEntropies(NamedTuple):
  """What a captioner can reach at best, in nats a caption.

  Attributes:
    given_image: of the caption when the image is known, the least loss that there can be.
    caption: of the caption alone, the least loss of a captioner that does not see the image.
  """

  given_image: float
  caption: float

  @property
  def information(self) -> float:
    """What the image says of the caption."""
    return self.caption - self.given_image


def entropies(
  scenes: Compositions,
  frequencies: np.ndarray,
  *,
  either_order: bool,
  color_flips: float,
  swaps: float,
) -> CaptionEntropies:
  """The entropies of captions, by enumeration of all of them.

  Scenes come with ``frequencies``, ``[m]`` with a sum of 1. In either order a fair coin says where
  a caption begins; each colour word is replaced by another with the probability ``color_flips``,
  and the whole caption by that of another scene with the probability ``swaps``.
  """
  num_objects = scenes.kinds.shape[1]
  two_orders = either_order and num_objects > 1
  of_caption = _caption_distribution(scenes, frequencies, two_orders, color_flips)
  given_image = np.log(2) if two_orders else 0.0
  given_image += num_objects * _flip_entropy(color_flips)
  if swaps:
    given_image = _swapped_entropy(scenes, frequencies, of_caption, two_orders, color_flips, swaps)
    # The caption of another scene: P(j) (1 - s) + s sum_{i != j} P(i) P(j) / (1 - P(i)).
    ratio = frequencies / (1 - frequencies)
    of_scene = (1 - swaps) * frequencies + swaps * frequencies * (ratio.sum() - ratio)
    of_caption = _caption_distribution(scenes, of_scene, two_orders, color_flips)
  return CaptionEntropies(float(given_image), float(_entropy(of_caption)))


def _entropy(probabilities: np.ndarray) -> float:
  positive = probabilities[probabilities > 0]
  return float(-np.sum(positive * np.log(positive)))


def _flip_entropy(rate: float) -> float:
  """Of a colour word that is replaced at this rate, uniformly by one of the others."""
  others = len(COLORS) - 1
  return _entropy(np.array([1 - rate])) + _entropy(np.full(others, rate / others))


def _caption_distribution(
  scenes: Compositions, frequencies: np.ndarray, two_orders: bool, color_flips: float
) -> np.ndarray:
  """Probabilities ``[direction, order, color, shape, color, shape, ...]`` of all captions."""
  num_objects = scenes.kinds.shape[1]
  table = np.zeros((2, 2, *[NUM_OBJECTS] * num_objects))
  vertical = scenes.vertical.astype(int)
  share = 0.5 if two_orders else 1.0
  table[(vertical, 0, *scenes.kinds.T)] = share * frequencies
  if two_orders:
    table[(vertical, 1, *scenes.kinds.T[::-1])] = share * frequencies
  table = table.reshape(2, 2, *[len(COLORS), len(SHAPES)] * num_objects)
  flip = _flip_matrix(color_flips)
  for i in range(num_objects):
    table = np.moveaxis(np.tensordot(table, flip, (2 + 2 * i, 0)), -1, 2 + 2 * i)
  return table


def _flip_matrix(rate: float) -> np.ndarray:
  """From the true colour word to the written one."""
  n = len(COLORS)
  return np.where(np.eye(n, dtype=bool), 1 - rate, rate / (n - 1))


def _swapped_entropy(
  scenes: Compositions,
  frequencies: np.ndarray,
  of_caption: np.ndarray,
  two_orders: bool,
  color_flips: float,
  swaps: float,
) -> float:
  """The mean entropy of a caption given its image, where some are of other scenes."""
  total = 0.0
  for i in np.flatnonzero(frequencies):
    one = np.zeros(len(frequencies))
    one[i] = 1.0
    own = _caption_distribution(scenes, one, two_orders, color_flips)
    others = (of_caption - frequencies[i] * own) / (1 - frequencies[i])
    total += frequencies[i] * _entropy((1 - swaps) * own + swaps * np.maximum(others, 0))
  return total
