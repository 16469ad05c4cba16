"""ROUGE-L."""

from collections.abc import Sequence

import numpy as np

from jaxbo_models.caption_metrics.ngrams import References, Tokens, check

_BETA = 1.2


def rouge_l(candidates: Sequence[Tokens], references: References) -> np.ndarray:
  r"""Computes ROUGE-L of each caption, as the COCO server does; the score of a corpus is the mean.

  .. math::
    P = \max_r \frac{\mathrm{LCS}(c, r)}{|c|}, \qquad
    R = \max_r \frac{\mathrm{LCS}(c, r)}{|r|}, \qquad
    F = \frac{(1 + \beta^2) P R}{R + \beta^2 P}, \qquad \beta = 1.2

  where :math:`\mathrm{LCS}(c, r)` is the length of the longest common subsequence of the candidate
  :math:`c` and a reference :math:`r`. Different references may give the two maxima. (Google's
  package rouge-score has :math:`\beta = 1` and takes both from one reference, so its numbers
  differ.)

  Args:
    candidates: the tokens of one caption for each image.
    references: the tokens of one or more correct captions for each image.

  Returns:
    The scores, ``[n]``, in [0, 1]. As in the COCO server's program, an empty caption counts as one
    empty word: it scores 1 if a reference is empty too, and 0 otherwise.

  Raises:
    TypeError: a caption is a string.
    ValueError: there are no images, ``candidates`` and ``references`` differ in length, or an image
      has no reference.

  Example:
    >>> print(rouge_l(["a red cross".split()], [["a big red cross".split()]]).round(4))
    [0.8356]

  References:
    Lin, `ROUGE: A Package for Automatic Evaluation of Summaries
    <https://aclanthology.org/W04-1013>`_
  """
  check(candidates, references)
  return np.array([_score(*pair) for pair in zip(candidates, references, strict=True)])


def _score(candidate: Tokens, references: Sequence[Tokens]) -> float:
  candidate, references = candidate or [""], [reference or [""] for reference in references]
  lengths = [(_common(candidate, reference), len(reference)) for reference in references]
  if not any(common for common, _ in lengths):
    return 0.0
  precision = max(common for common, _ in lengths) / len(candidate)
  recall = max(common / length for common, length in lengths)
  return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _common(first: Tokens, second: Tokens) -> int:
  """Returns the length of the longest common subsequence."""
  row = [0] * (len(second) + 1)
  for token in first:
    diagonal = 0
    for j, other in enumerate(second):
      above = row[j + 1]
      row[j + 1] = diagonal + 1 if token == other else max(above, row[j])
      diagonal = above
  return row[-1]
