"""BLEU of a corpus."""

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

from jaxbo_models.caption_metrics.ngrams import References, Tokens, check, ngrams

# The COCO server adds these to the counts of matches and of n-grams, to avoid division by 0.
_TINY, _SMALL = 1e-15, 1e-9


def bleu(candidates: Sequence[Tokens], references: References, *, max_order: int = 4) -> np.ndarray:
  r"""Computes BLEU-1 to BLEU-``max_order`` of a corpus, as the COCO server does.

  .. math::
    p_k = \frac{\sum_c \sum_g \min(c_g, \max_r r_g)}{\sum_c \sum_g c_g}, \qquad
    \text{BLEU-}n = \min(1, e^{1 - r / c}) \Big(\prod_{k=1}^n p_k\Big)^{1/n}

  :math:`c_g` and :math:`r_g` count the k-gram :math:`g` in a candidate and in a reference. The sums
  are over all captions, so BLEU of a corpus is not a mean over captions. :math:`c` is the total
  length of the candidates. :math:`r` is the total length of the references, taking for each
  candidate the reference closest in length, or the shorter of two that are equally close.

  Args:
    candidates: the tokens of one caption for each image.
    references: the tokens of one or more correct captions for each image.
    max_order: length of the longest n-grams, at least 1.

  Returns:
    The scores, ``[max_order]``, in [0, 1].

  Raises:
    TypeError: a caption is a string.
    ValueError: there are no images, ``candidates`` and ``references`` differ in length, an image
      has no reference, or ``max_order`` is less than 1.

  Example:
    >>> candidate = "a red square left of a blue cross".split()
    >>> references = ["a red circle left of a blue cross".split()]
    >>> print(bleu([candidate], [references]).round(4))     # 7/8, then 5/7, 3/6 and 2/5 with it
    [0.875  0.7906 0.6786 0.5946]

  References:
    Papineni et al., `BLEU: a Method for Automatic Evaluation of Machine Translation
    <https://aclanthology.org/P02-1040>`_; the sums and their constants 1e-15 and 1e-9 follow
    https://github.com/salaniz/pycocoevalcap
  """
  check(candidates, references)
  if max_order < 1:
    raise ValueError(f"max_order must be at least 1, got {max_order}")
  matches, totals = np.zeros(max_order), np.zeros(max_order)
  length = reference_length = 0
  for candidate, of_image in zip(candidates, references, strict=True):
    length += len(candidate)
    reference_length += min((abs(len(r) - len(candidate)), len(r)) for r in of_image)[1]
    for k in range(max_order):
      found = ngrams(candidate, k + 1)
      most: Counter[tuple[Hashable, ...]] = Counter()
      for reference in of_image:
        most |= ngrams(reference, k + 1)
      matches[k] += (found & most).total()
      totals[k] += found.total()
  precisions = (matches + _TINY) / (totals + _SMALL)
  means = np.cumprod(precisions) ** (1 / np.arange(1, max_order + 1))
  ratio = (length + _TINY) / (reference_length + _SMALL)
  return means * np.exp(min(0.0, 1 - 1 / ratio))
