"""The language of captions of shapes: all scenes of two objects by number, and their captions."""

import itertools

import numpy as np
from jaxbo_models.vocabulary import Vocabulary

COLORS = ("red", "green", "blue", "yellow", "magenta", "cyan")
SHAPES = ("square", "circle", "triangle", "cross")
VOCABULARY = Vocabulary(
  [*Vocabulary.SPECIAL[:3], "a", "of", "left", "right", "above", "below", *COLORS, *SHAPES]
)
PAD, EOS, FIRST_COLOR = VOCABULARY.pad, VOCABULARY.eos, VOCABULARY.words.index(COLORS[0])
NAMES = [f"{color} {shape}" for color in COLORS for shape in SHAPES]  # Of kinds of objects.

# Scenes up to places and pixels: ``KINDS [scenes, 2]``, two different objects in reading order
# (color * len(SHAPES) + shape), and whether they stand in a column and not in a row.
KINDS = np.array(2 * list(itertools.permutations(range(len(NAMES)), 2)), np.int32)
VERTICAL = np.arange(len(KINDS)) >= len(KINDS) // 2


def _parts() -> dict[str, np.ndarray]:
  """Which scenes belong to a part, ``[scenes]`` bool.

  A fifth of the triples of two objects and a direction are held out for the test, a tenth for
  validation, each with both orders of its objects.
  """
  triples = np.column_stack([VERTICAL, np.sort(KINDS, axis=1)])
  each, triple = np.unique(triples, axis=0, return_inverse=True)
  order = np.random.default_rng(0).permutation(len(each))
  numbers = dict(zip(("test", "validation", "train"), np.split(order, [110, 166]), strict=True))
  return {part: np.isin(triple, mine) for part, mine in numbers.items()}


def _captions() -> np.ndarray:
  """The tokens of both captions of all scenes, ``[2, scenes, 10]``; first in reading order."""
  texts = []
  for (first, second), vertical in zip(KINDS, VERTICAL, strict=True):
    forth, back = ("above", "below") if vertical else ("left of", "right of")
    texts.append(f"a {NAMES[first]} {forth} a {NAMES[second]}")
    texts.append(f"a {NAMES[second]} {back} a {NAMES[first]}")
  rows = [VOCABULARY.encode(text.split(), length=10) for text in texts]
  return np.stack([rows[::2], rows[1::2]])


PARTS, CAPTIONS = _parts(), _captions()
