"""Vocabularies of words: tokens to ids and back."""

import json
import pathlib
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np


class Vocabulary:
  """The words of captions, with ids for padding, the beginning, the end and unknown words.

  >>> captions = [["a", "red", "cross"], ["a", "red", "dog"], ["a", "red", "cross"]]
  >>> vocabulary = Vocabulary.build(captions, min_count=2)
  >>> vocabulary.words
  ('<pad>', '<bos>', '<eos>', '<unk>', 'a', 'red', 'cross')
  >>> print(vocabulary.encode(captions[1], length=7))               # "dog" is unknown
  [1 4 5 3 2 0 0]
  >>> vocabulary.decode([1, 4, 5, 3, 2, 0, 0])
  ['a', 'red', '<unk>']

  Padding, beginning and end are three different ids, 0 to 2, so that a mask is ``tokens != 0``.

  Args:
    words: all words by their ids; the first three or four are the special ones.

  Attributes:
    words: the same.
    pad: 0, what fills up a row behind its end.
    bos: 1, the beginning of a caption.
    eos: 2, its end.
    unk: 3, a word that is not here; ``None`` for a vocabulary of all words there are.

  Raises:
    ValueError: if the special words are not where they belong, or a word occurs twice.
  """

  SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
  pad: int = 0
  bos: int = 1
  eos: int = 2
  unk: int | None

  def __init__(self, words: Sequence[str]):
    self.words = tuple(words)
    if self.words[:3] != self.SPECIAL[:3]:
      raise ValueError(f"words must begin with {self.SPECIAL[:3]}, got {self.words[:3]}")
    self._ids = {word: i for i, word in enumerate(self.words)}
    if len(self._ids) != len(self.words):
      twice = next(word for word, count in Counter(self.words).items() if count > 1)
      raise ValueError(f"words must be different, got {twice!r} twice")
    self.unk = self._ids.get(self.SPECIAL[3])

  @classmethod
  def build(cls, captions: Iterable[Sequence[str]], *, min_count: int = 1) -> "Vocabulary":
    """The words of captions that occur often enough, the most frequent first.

    Args:
      captions: words of captions, those for training alone.
      min_count: how often a word must occur to get an id; 6 in most work on COCO.

    Raises:
      ValueError: if ``min_count`` is below 1.
    """
    if min_count < 1:
      raise ValueError(f"min_count must be at least 1, got {min_count}")
    counts = Counter(word for caption in captions for word in caption)
    frequent = [word for word, count in counts.items() if count >= min_count]
    frequent.sort(key=lambda word: (-counts[word], word))
    return cls([*cls.SPECIAL, *(word for word in frequent if word not in cls.SPECIAL)])

  @classmethod
  def load(cls, path: str | pathlib.Path) -> "Vocabulary":
    """Reads what :meth:`save` wrote."""
    return cls(json.loads(pathlib.Path(path).read_text()))

  def save(self, path: str | pathlib.Path) -> None:
    """Writes the words as a JSON list."""
    pathlib.Path(path).write_text(json.dumps(self.words, ensure_ascii=False, indent=0) + "\n")

  def __len__(self) -> int:
    return len(self.words)

  def encode(self, words: Sequence[str], *, length: int | None = None) -> np.ndarray:
    """The ids of a caption with its beginning and end, ``[length]`` int32.

    Args:
      words: of the caption, at least one.
      length: fills the row up with padding; a longer caption loses its last words, not its end.
        By default as long as the caption.

    Raises:
      ValueError: for an empty caption, a length below 3, or an unknown word where there is no id
        for such.
    """
    if not len(words):
      raise ValueError("caption must have a word at least, got none")
    length = len(words) + 2 if length is None else length
    if length < 3:
      raise ValueError(f"length must be at least 3: a word between two ends, got {length}")
    row = np.full(length, self.pad, np.int32)
    ids = [self.bos, *map(self._id, words[: length - 2]), self.eos]
    row[: len(ids)] = ids
    return row

  def decode(self, ids: Sequence[int] | np.ndarray) -> list[str]:
    """The words of a caption up to its end, without the special ones but ``<unk>``.

    Raises:
      ValueError: for an id that is not here.
    """
    words = []
    for i in map(int, ids):
      if i == self.eos:
        break
      if not 0 <= i < len(self.words):
        raise ValueError(f"ids must be in [0, {len(self.words) - 1}], got {i}")
      if i not in (self.pad, self.bos):
        words.append(self.words[i])
    return words

  def _id(self, word: str) -> int:
    i = self._ids.get(word, self.unk)
    if i is None:
      raise ValueError(f"caption must consist of known words, got {word!r}")
    return i
