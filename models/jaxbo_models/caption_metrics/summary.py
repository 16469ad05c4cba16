"""All scores at once."""

from collections.abc import Sequence

import numpy as np

from jaxbo_models.caption_metrics.bleu import bleu
from jaxbo_models.caption_metrics.cider import cider_d
from jaxbo_models.caption_metrics.ngrams import References, Tokens, check
from jaxbo_models.caption_metrics.rouge import rouge_l


def exact_match(candidates: Sequence[Tokens], references: References) -> np.ndarray:
  """Whether each caption is one of its references, token by token.

  Args:
    candidates: the tokens of a caption for each image.
    references: the tokens of one or more right captions for each image.

  Returns:
    ``[n]`` bool.

  Raises:
    TypeError: if a caption is a string.
    ValueError: if there are no images, a different number of them, or one without reference.

  Example:
    >>> print(exact_match([["a", "cross"], ["a"]], [[["the", "cross"], ["a", "cross"]], [["the"]]]))
    [ True False]
  """
  check(candidates, references)
  pairs = zip(candidates, references, strict=True)
  return np.array([list(candidate) in [list(r) for r in of_image] for candidate, of_image in pairs])


def summary(candidates: Sequence[Tokens], references: References) -> dict[str, float]:
  """The scores of a corpus by name: ``bleu_1`` to ``bleu_4``, and the means of the others.

  Args:
    candidates: the tokens of a caption for each image.
    references: the tokens of one or more right captions for each image.

  Returns:
    ``bleu_1``, ``bleu_2``, ``bleu_3``, ``bleu_4``, ``rouge_l``, ``cider_d`` and ``exact_match``.

  Raises:
    TypeError: if a caption is a string.
    ValueError: if there are no images, a different number of them, or one without reference.
  """
  scores = {f"bleu_{n + 1}": float(x) for n, x in enumerate(bleu(candidates, references))}
  for score in (rouge_l, cider_d, exact_match):
    scores[score.__name__] = float(np.mean(score(candidates, references)))
  return scores
