"""Accuracy by class, and over the classes with the lowest accuracy."""

import math

import numpy as np
from numpy.typing import ArrayLike

from jaxbo import _check


def class_accuracy(correct: ArrayLike, labels: ArrayLike, num_classes: int) -> np.ndarray:
  """Accuracy of each class.

  Args:
    correct: ``[num_images]`` booleans.
    labels: ``[num_images]`` integers from 0 to ``num_classes - 1``.
    num_classes: the number of classes.

  Returns:
    ``[num_classes]`` float64; NaN for a class without images.

  Raises:
    ValueError: if shapes differ, or a label is not a class.
    TypeError: if labels are not integers.

  Example:
    >>> import jaxbo
    >>> print(jaxbo.adversarial.class_accuracy([True, False, True], [0, 0, 2], 3))
    [0.5 nan 1. ]
  """
  num_classes = _check.positive_int("num_classes", num_classes)
  correct, labels = np.asarray(correct), np.asarray(labels)
  labels = labels if labels.size else labels.astype(int)
  if correct.shape != labels.shape or correct.ndim != 1:
    raise ValueError(
      f"correct must be [num_images] like labels, {labels.shape}, got {correct.shape}"
    )
  if not np.issubdtype(labels.dtype, np.integer):
    raise TypeError(f"labels must be integers, got dtype {labels.dtype}")
  if labels.size and not 0 <= labels.min() <= labels.max() < num_classes:
    raise ValueError(
      f"labels must be from 0 to {num_classes - 1}, got {labels.min()} to {labels.max()}"
    )
  total = np.bincount(labels, minlength=num_classes)
  right = np.bincount(labels, weights=correct.astype(np.float64), minlength=num_classes)
  return np.where(total > 0, right / np.maximum(total, 1), np.nan)


def tail_accuracy(
  correct: ArrayLike, labels: ArrayLike, num_classes: int, fraction: float = 0.3
) -> float:
  r"""RA-Tail: the mean accuracy of the classes with the lowest accuracy.

  The mean is over the :math:`\lceil k C \rceil` classes, of :math:`C`, with the lowest accuracy on
  these images; classes without images do not count. RA-Tail-30 is ``fraction=0.3``: 3 classes of
  10. A small fraction gives the accuracy of the worst class.

  Args:
    correct: ``[num_images]`` booleans, such as :attr:`RobustnessReport.worst_case`.
    labels: ``[num_images]`` integers from 0 to ``num_classes - 1``.
    num_classes: the number of classes.
    fraction: :math:`k` in (0, 1].

  Returns:
    A float; NaN without images.

  Raises:
    ValueError: if ``fraction`` is outside its range.

  Example:
    >>> import jaxbo
    >>> correct, labels = [True, False, True, True, False, True], [0, 0, 1, 1, 2, 2]
    >>> jaxbo.adversarial.tail_accuracy(correct, labels, num_classes=3, fraction=0.5)  # two of them
    0.5
  """
  _check.within("fraction", fraction, 0, 1, ends="(]")
  accuracies = class_accuracy(correct, labels, num_classes)
  accuracies = np.sort(accuracies[~np.isnan(accuracies)])
  # 0.3 * 10 is above 3 in floating point.
  count = math.ceil(fraction * accuracies.size - 1e-9)
  return float(np.mean(accuracies[:count])) if count else math.nan
