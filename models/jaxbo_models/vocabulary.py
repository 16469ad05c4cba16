"""Vocabularies: from words to ids and back."""

import json
import pathlib
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np


class Vocabulary:
  """Maps the words of captions to ids; special ids mark padding, beginning, end and unknown words.

  >>> captions = [["a", "red", "cross"], ["a", "red", "dog"], ["a", "red", "cross"]]
  >>> vocabulary = Vocabulary.build(captions, min_count=2)
  >>> vocabulary.words
  ('<pad>', '<bos>', '<eos>', '<unk>', 'a', 'red', 'cross')
  >>> print(vocabulary.encode(captions[1], length=7))               # "dog" is unknown
  [1 4 5 3 2 0 0]
  >>> vocabulary.decode([1, 4, 5, 3, 2, 0, 0])
  ['a', 'red', '<unk>']

  Padding, beginning and end have the ids 0, 1 and 2, so ``tokens != 0`` is the mask of real tokens.

  Args:
    words: all words, in the order of their ids. ``"<pad>"``, ``"<bos>"`` and ``"<eos>"`` come
      first, then ``"<unk>"`` if the vocabulary has an id for unknown words.

  Attributes:
    words: all words, in the order of their ids.
    pad: the id of padding after the end of a caption, 0.
    bos: the id of the beginning of a caption, 1.
    eos: the id of the end of a caption, 2.
    unk: the id of words outside the vocabulary, 3; None if the vocabulary lacks ``"<unk>"``.

  Raises:
    ValueError: the first three words are not the special ones, ``"<unk>"`` is not the fourth, or a
      word occurs twice.
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
    if self.unk not in (None, 3):
      raise ValueError(f"words must have '<unk>' at position 3 or not at all, got it at {self.unk}")

  @classmethod
  def build(cls, captions: Iterable[Sequence[str]], *, min_count: int = 1) -> "Vocabulary":
    """Builds the vocabulary of words that occur often enough, the most frequent first.

    Args:
      captions: the words of each caption; use training captions only.
      min_count: how often a word must occur to get an id, at least 1; 6 in most work on COCO.

    Raises:
      TypeError: a caption is a string.
      ValueError: ``min_count`` is less than 1.
    """
    if min_count < 1:
      raise ValueError(f"min_count must be at least 1, got {min_count}")
    counts = Counter(word for caption in captions for word in _words(caption))
    frequent = [word for word, count in counts.items() if count >= min_count]
    frequent.sort(key=lambda word: (-counts[word], word))
    return cls([*cls.SPECIAL, *(word for word in frequent if word not in cls.SPECIAL)])

  @classmethod
  def load(cls, path: str | pathlib.Path) -> "Vocabulary":
    """Reads a vocabulary that :meth:`save` wrote."""
    return cls(json.loads(pathlib.Path(path).read_text()))

  def save(self, path: str | pathlib.Path) -> None:
    """Writes the words as a JSON list."""
    pathlib.Path(path).write_text(json.dumps(self.words, ensure_ascii=False, indent=0) + "\n")

  def __len__(self) -> int:
    return len(self.words)

  def encode(self, words: Sequence[str], *, length: int | None = None) -> np.ndarray:
    """Returns the ids of a caption between its beginning and end, ``[length]`` int32.

    Args:
      words: the words of the caption, at least one. Padding, beginning and end are not words, so
        ``"<eos>"`` in a caption counts as an unknown word.
      length: length of the result, at least 3; None for the length of the caption plus 2. Shorter
        captions are padded. Longer captions lose their last words but keep the end token.

    Raises:
      TypeError: the caption is a string.
      ValueError: the caption is empty, ``length`` is less than 3, or a word is unknown and the
        vocabulary lacks ``"<unk>"``.
    """
    if not len(_words(words)):
      raise ValueError("caption must have at least one word, got none")
    length = len(words) + 2 if length is None else length
    if length < 3:
      raise ValueError(f"length must be at least 3: a word between two ends, got {length}")
    row = np.full(length, self.pad, np.int32)
    ids = [self.bos, *map(self._id, words[: length - 2]), self.eos]
    row[: len(ids)] = ids
    return row

  def decode(self, ids: Sequence[int] | np.ndarray) -> list[str]:
    """Returns the words of a caption up to its end; of the special words only ``<unk>`` stays.

    Raises:
      ValueError: an id is not in the vocabulary.
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
    i = self.unk if word in self.SPECIAL else self._ids.get(word, self.unk)
    if i is None:
      raise ValueError(f"caption must consist of known words, got {word!r}")
    return i


def _words(caption: Sequence[str]) -> Sequence[str]:
  """A caption that is a sequence of words."""
  if isinstance(caption, str):
    raise TypeError(f"caption must be a sequence of words, got the string {caption!r}")
  return caption
