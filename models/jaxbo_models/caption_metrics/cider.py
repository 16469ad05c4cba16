"""CIDEr-D."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from jaxbo_models.caption_metrics.ngrams import References, Tokens, check, check_references, ngrams

_MAX_ORDER, _SIGMA = 4, 6.0


class DocumentFrequencies(NamedTuple):
  """The number of images in which each n-gram occurs.

  Attributes:
    counts: for each n-gram, the number of images that have the n-gram in any reference.
    num_images: the total number of images.
  """

  counts: Counter[tuple[Hashable, ...]]
  num_images: int

  @classmethod
  def of(cls, references: References) -> "DocumentFrequencies":
    """Counts the n-grams up to four tokens long in the references of each image."""
    counts: Counter[tuple[Hashable, ...]] = Counter()
    for of_image in references:
      found = {g for r in of_image for n in range(_MAX_ORDER) for g in ngrams(r, n + 1)}
      counts.update(found)
    return cls(counts, len(references))


class _Vector(NamedTuple):
  """A caption for CIDEr-D: weights and norm for each order of n-grams, and length in tokens."""

  weights: list[dict[tuple[Hashable, ...], float]]
  norms: list[float]
  length: int


class CiderD:
  r"""A reward for captions: CIDEr-D against fixed references, whose n-grams are counted once.

  The reward is a pure function of captions and runs on the host. For self-critical training, pass
  the frequencies of the training set.

  >>> references = [[["a", "red", "cross"]], [["a", "blue", "square"], ["the", "square"]]]
  >>> reward = CiderD(references)
  >>> print(reward([["a", "red", "cross"], ["a", "red", "square"]], images=[0, 1]).round(3))
  [7.5   1.241]

  Args:
    references: the tokens of one or more correct captions for each image.
    frequencies: the number of images in which each n-gram occurs; None counts ``references``.

  Raises:
    TypeError: a reference is a string.
    ValueError: an image has no reference.
  """

  def __init__(self, references: References, frequencies: DocumentFrequencies | None = None):
    for i, of_image in enumerate(references):
      check_references(i, of_image)
    self.frequencies = frequencies or DocumentFrequencies.of(references)
    self._references = [[self._vector(r) for r in of_image] for of_image in references]

  def __call__(
    self, candidates: Sequence[Tokens], images: Sequence[int] | np.ndarray | None = None
  ) -> np.ndarray:
    """Returns the score of each caption.

    Args:
      candidates: the tokens of n captions.
      images: the index of each caption's image, ``[n]``; None for one caption of each image, in
        order.

    Returns:
      The scores, ``[n]``, in [0, 10].

    Raises:
      ValueError: ``images`` and ``candidates`` differ in length.
    """
    images = range(len(self._references)) if images is None else images
    if len(images) != len(candidates):
      raise ValueError(
        f"images must say of which image each of {len(candidates)} captions is, got {len(images)}"
      )
    pairs = zip(candidates, images, strict=True)
    return np.array([self._score(candidate, self._references[int(i)]) for candidate, i in pairs])

  def _vector(self, tokens: Tokens) -> _Vector:
    counts, num_images = self.frequencies
    weights = []
    for n in range(_MAX_ORDER):
      idf = lambda g: math.log(num_images) - math.log(max(1, counts[g]))
      weights.append({g: count * idf(g) for g, count in ngrams(tokens, n + 1).items()})
    norms = [math.sqrt(sum(w * w for w in of_order.values())) for of_order in weights]
    return _Vector(weights, norms, len(tokens))

  def _score(self, candidate: Tokens, references: Sequence[_Vector]) -> float:
    mine, total = self._vector(candidate), 0.0
    for theirs in references:
      # The published program uses the number of bigrams as the length.
      difference = max(0, mine.length - 1) - max(0, theirs.length - 1)
      penalty = math.exp(-(difference**2) / (2 * _SIGMA**2))
      for n in range(_MAX_ORDER):
        if mine.norms[n] and theirs.norms[n]:
          other = theirs.weights[n]
          common = ((min(w, other[g]), other[g]) for g, w in mine.weights[n].items() if g in other)
          product = sum(least * weight for least, weight in common)
          total += penalty * product / (mine.norms[n] * theirs.norms[n])
    return 10 * total / (_MAX_ORDER * len(references))


def cider_d(
  candidates: Sequence[Tokens],
  references: References,
  frequencies: DocumentFrequencies | None = None,
) -> np.ndarray:
  r"""Computes CIDEr-D of each caption; the score of a corpus is the mean.

  CIDEr-D is the score usually reported as CIDEr. The vector of a caption has an entry for each
  n-gram :math:`g`, :math:`w_g = \mathrm{count}(g) (\ln N - \ln \max(1, \mathrm{df}(g)))`, where
  :math:`\mathrm{df}(g)` of the :math:`N` images have :math:`g` in any reference. With the n-gram
  vectors :math:`c^n` of a candidate and :math:`r^n` of a reference,

  .. math::
    \text{CIDEr-D} = \frac{10}{4 |R|} \sum_{n=1}^4 \sum_{r \in R}
      \frac{\sum_g \min(c^n_g, r^n_g)\, r^n_g}{\|c^n\| \|r^n\|}\,
      e^{-(\mathrm{len}(c) - \mathrm{len}(r))^2 / (2 \cdot 6^2)}

  There is no stemming. N-grams that occur in every image have weight 0, so with a single image
  every score is 0. A copy of one of several references does not score 10, and neither does a
  caption of fewer than four tokens. By default, scores depend on all images in the call: do not
  average the scores of parts of a data set.

  Args:
    candidates: the tokens of one caption for each image.
    references: the tokens of one or more correct captions for each image.
    frequencies: the number of images in which each n-gram occurs; None counts ``references``.

  Returns:
    The scores, ``[n]``, in [0, 10].

  Raises:
    TypeError: a caption is a string.
    ValueError: there are no images, ``candidates`` and ``references`` differ in length, or an image
      has no reference.

  Example:
    >>> captions = ["a red cross left of a square".split(), "the circle is below a line".split()]
    >>> print(cider_d(captions, [[caption] for caption in captions]).round(6))
    [10. 10.]

  References:
    Vedantam, Zitnick, Parikh, `CIDEr: Consensus-based Image Description Evaluation
    <https://arxiv.org/abs/1411.5726>`_; the details follow
    https://github.com/salaniz/pycocoevalcap
  """
  check(candidates, references)
  return CiderD(references, frequencies)(candidates)
