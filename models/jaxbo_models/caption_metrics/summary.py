"""Exact match, and all scores of a corpus at once."""

from collections.abc import Sequence

import numpy as np

from jaxbo_models.caption_metrics.bleu import bleu
from jaxbo_models.caption_metrics.cider import cider_d
from jaxbo_models.caption_metrics.ngrams import References, Tokens, check
from jaxbo_models.caption_metrics.rouge import rouge_l


def exact_match(candidates: Sequence[Tokens], references: References) -> np.ndarray:
  """Returns whether each caption equals one of its references, token for token.

  Args:
    candidates: the tokens of one caption for each image.
    references: the tokens of one or more correct captions for each image.

  Returns:
    ``[n]``, bool.

  Raises:
    TypeError: a caption is a string.
    ValueError: there are no images, ``candidates`` and ``references`` differ in length, or an image
      has no reference.

  Example:
    >>> print(exact_match([["a", "cross"], ["a"]], [[["the", "cross"], ["a", "cross"]], [["the"]]]))
    [ True False]
  """
  check(candidates, references)
  pairs = zip(candidates, references, strict=True)
  return np.array([list(candidate) in [list(r) for r in of_image] for candidate, of_image in pairs])


def summary(candidates: Sequence[Tokens], references: References) -> dict[str, float]:
  """Computes all NumPy scores of a corpus.

  Args:
    candidates: the tokens of one caption for each image.
    references: the tokens of one or more correct captions for each image.

  Returns:
    The scores by name: ``bleu_1``, ``bleu_2``, ``bleu_3`` and ``bleu_4`` of the corpus, and the
    means over captions of ``rouge_l``, ``cider_d`` and ``exact_match``.

  Raises:
    TypeError: a caption is a string.
    ValueError: there are no images, ``candidates`` and ``references`` differ in length, or an image
      has no reference.
  """
  scores = {f"bleu_{n + 1}": float(x) for n, x in enumerate(bleu(candidates, references))}
  for score in (rouge_l, cider_d, exact_match):
    scores[score.__name__] = float(np.mean(score(candidates, references)))
  return scores
