"""Captions as rows of ids, in batches of about the same length."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxbo_models.vocabulary import Vocabulary


class CaptionRows(NamedTuple):
  """One caption a row: its image ``[m]``, tokens ``[m, length]``, and how many are not padding."""

  image: np.ndarray
  tokens: np.ndarray
  num_tokens: np.ndarray


def encode(
  captions: Sequence[Sequence[Sequence[str]]], vocabulary: Vocabulary, max_words: int
) -> CaptionRows:
  """All captions of all images as ids; longer ones than ``max_words`` are cut."""
  rows = [(i, words) for i, of_image in enumerate(captions) for words in of_image]
  tokens = np.stack([vocabulary.encode(words, length=max_words + 2) for _, words in rows])
  image = np.array([i for i, _ in rows], np.int32)
  return CaptionRows(image, tokens, (tokens != vocabulary.pad).sum(axis=1))


class LengthBatches:
  """Which rows each step sees: all once in an epoch, those of about the same length together.

  Rows, of the lengths ``num_tokens``, are sorted into ``num_lengths`` groups of about the same
  number of rows, so that a step computes little for padding and is compiled for few shapes. An
  epoch shuffles within groups and then the batches. The last batch of a group is filled up with
  rows from its beginning. The batch of a step depends on the seed and the step alone.

  Attributes:
    per_epoch: batches of an epoch.
    lengths: the greatest of each group.

  Raises:
    ValueError: if there are fewer rows than a batch needs.
  """

  def __init__(self, num_tokens: np.ndarray, batch_size: int, num_lengths: int, seed: int):
    if not 1 <= batch_size <= len(num_tokens):
      raise ValueError(
        f"batch_size must be in [1, {len(num_tokens)}], the captions to train on; got {batch_size}"
      )
    order = np.argsort(num_tokens, kind="stable")
    num_lengths = min(num_lengths, len(order) // batch_size)
    self._groups = np.array_split(order, num_lengths)
    self.lengths = [int(num_tokens[group].max()) for group in self._groups]
    self._batch_size, self._seed = batch_size, seed
    self._shuffled = functools.lru_cache(maxsize=1)(self._shuffle)
    self.per_epoch = sum(-(-len(group) // batch_size) for group in self._groups)

  def __call__(self, step: int) -> tuple[np.ndarray, int]:
    """The rows of a step, ``[batch_size]``, and what their tokens are cut to."""
    epoch, i = divmod(step, self.per_epoch)
    return self._shuffled(epoch)[i]

  def _shuffle(self, epoch: int) -> list[tuple[np.ndarray, int]]:
    rng, batches = np.random.default_rng([self._seed, epoch]), []
    for group, length in zip(self._groups, self.lengths, strict=True):
      num = -(-len(group) // self._batch_size)
      rows = np.resize(rng.permutation(group), (num, self._batch_size))
      batches += [(of_batch, length) for of_batch in rows]
    return [batches[i] for i in rng.permutation(len(batches))]
