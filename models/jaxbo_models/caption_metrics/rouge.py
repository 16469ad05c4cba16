"""ROUGE-L."""

from collections.abc import Sequence

import numpy as np

from jaxbo_models.caption_metrics.ngrams import References, Tokens, check

_BETA = 1.2


def rouge_l(candidates: Sequence[Tokens], references: References) -> np.ndarray:
  r"""ROUGE-L of each caption, as the COCO server has it; that of a corpus is the mean.

  .. math::
    P = \max_r \frac{\mathrm{LCS}(c, r)}{|c|}, \qquad
    R = \max_r \frac{\mathrm{LCS}(c, r)}{|r|}, \qquad
    F = \frac{(1 + \beta^2) P R}{R + \beta^2 P}, \qquad \beta = 1.2

  with the longest common subsequence of the candidate :math:`c` and a reference :math:`r`. The two
  maxima may be of different references. (Google's package rouge-score has :math:`\beta = 1` and one
  reference for both, and gives other numbers.)

  Args:
    candidates: the tokens of a caption for each image.
    references: the tokens of one or more right captions for each image.

  Returns:
    ``[n]``, in [0, 1]; 0 for an empty caption.

  Raises:
    TypeError: if a caption is a string.
    ValueError: if there are no images, a different number of them, or one without reference.

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
  lengths = [(_common(candidate, reference), len(reference)) for reference in references]
  if not any(common for common, _ in lengths):
    return 0.0
  precision = max(common for common, _ in lengths) / len(candidate)
  recall = max(common / length for common, length in lengths if length)
  return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _common(first: Tokens, second: Tokens) -> int:
  """The length of the longest common subsequence."""
  row = [0] * (len(second) + 1)
  for token in first:
    diagonal = 0
    for j, other in enumerate(second):
      above = row[j + 1]
      row[j + 1] = diagonal + 1 if token == other else max(above, row[j])
      diagonal = above
  return row[-1]
