"""CIDEr-D."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from jaxbo_models.caption_metrics.ngrams import References, Tokens, check, check_references, ngrams

_MAX_ORDER, _SIGMA = 4, 6.0


class DocumentFrequencies(NamedTuple):
  """In how many images n-grams occur.

  Attributes:
    counts: for each n-gram, the number of images with it in any reference.
    num_images: the number of images.
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
  """A caption as CIDEr-D sees it: weights and norm of each order of n-grams, and its length."""

  weights: list[dict[tuple[Hashable, ...], float]]
  norms: list[float]
  length: int


class CiderD:
  r"""CIDEr-D against given references, which are counted once: a reward for captions.

  It is a pure function of captions on the host. In self-critical training the frequencies are those
  of the training set.

  >>> references = [[["a", "red", "cross"]], [["a", "blue", "square"], ["the", "square"]]]
  >>> reward = CiderD(references)
  >>> print(reward([["a", "red", "cross"], ["a", "red", "square"]], images=[0, 1]).round(3))
  [7.5   1.241]

  Args:
    references: the tokens of one or more right captions for each image.
    frequencies: in how many images n-grams occur; those of ``references`` by default.

  Raises:
    TypeError: if a caption is a string.
    ValueError: if an image has no reference.
  """

  def __init__(self, references: References, frequencies: DocumentFrequencies | None = None):
    for i, of_image in enumerate(references):
      check_references(i, of_image)
    self.frequencies = frequencies or DocumentFrequencies.of(references)
    self._references = [[self._vector(r) for r in of_image] for of_image in references]

  def __call__(
    self, candidates: Sequence[Tokens], images: Sequence[int] | np.ndarray | None = None
  ) -> np.ndarray:
    """The score of each caption.

    Args:
      candidates: the tokens of captions.
      images: of which image each is, ``[n]``; all in their order by default.

    Returns:
      ``[n]``, in [0, 10].

    Raises:
      ValueError: if there are not as many images as captions.
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
      # The published program takes the number of bigrams for the length.
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
  r"""CIDEr-D of each caption, which is what is called CIDEr; that of a corpus is the mean.

  The vector of a caption has an entry for each n-gram :math:`g`, :math:`w_g = \mathrm{count}(g)
  (\ln N - \ln \max(1, \mathrm{df}(g)))`, where :math:`\mathrm{df}` of the :math:`N` images have it
  in any reference. With the vectors :math:`c^n` and :math:`r^n` of n-grams of a candidate and a
  reference,

  .. math::
    \text{CIDEr-D} = \frac{10}{4 |R|} \sum_{n=1}^4 \sum_{r \in R}
      \frac{\sum_g \min(c^n_g, r^n_g)\, r^n_g}{\|c^n\| \|r^n\|}\,
      e^{-(\mathrm{len}(c) - \mathrm{len}(r))^2 / (2 \cdot 6^2)}

  Nothing is stemmed. What to know: n-grams of all images count nothing, and with a single image
  every score is 0. A copy of one of several references does not score 10, nor does a caption of
  less than four tokens. Scores depend on the images that they are computed with, and are not to be
  averaged over parts of a set.

  Args:
    candidates: the tokens of a caption for each image.
    references: the tokens of one or more right captions for each image.
    frequencies: in how many images n-grams occur; those of ``references`` by default.

  Returns:
    ``[n]``, in [0, 10].

  Raises:
    TypeError: if a caption is a string.
    ValueError: if there are no images, a different number of them, or one without reference.

  Example:
    >>> captions = ["a red cross left of a square".split(), "the circle is below a line".split()]
    >>> print(cider_d(captions, [[caption] for caption in captions]).round(6))
    [10. 10.]

  References:
    Vedantam, Zitnick, Parikh, `CIDEr: Consensus-based Image Description Evaluation
    <https://arxiv.org/abs/1411.5726>`_; the details are those of
    https://github.com/salaniz/pycocoevalcap
  """
  check(candidates, references)
  return CiderD(references, frequencies)(candidates)
