"""Imbalanced versions of labelled data: how many examples each class keeps, and which."""

from collections.abc import Sequence

import jax
import numpy as np

# Quotients that are whole numbers must not be rounded down to the one below.
_ROUNDING = 1 + 1e-12


def long_tailed_counts(num_classes: int, largest: int, ratio: float) -> np.ndarray:
  r"""How many examples each class of a long-tailed set has: :math:`n_0 \, \rho^{-c / (C - 1)}`.

  :math:`C` is ``num_classes``, :math:`n_0` ``largest``, and :math:`\rho` in [1, largest] the
  ``ratio``: the examples of the first class for one of the last. Rounded down: ``[C]``, int64.

  Reference: Cui et al., `Class-Balanced Loss Based on Effective Number of Samples
  <https://arxiv.org/abs/1901.05555>`_, 2019.
  """
  exponents = np.arange(num_classes) / max(num_classes - 1, 1)
  return _floor(largest / float(ratio) ** exponents)


def step_imbalanced_counts(num_classes: int, largest: int, ratio: float) -> np.ndarray:
  r"""How many examples each class has if the last :math:`\lfloor C / 2 \rfloor` are rare.

  They have ``largest / ratio``, rounded down, and the others ``largest``: ``[C]``, int64.

  Reference: Buda et al., `A systematic study of the class imbalance problem in convolutional neural
  networks <https://arxiv.org/abs/1710.05381>`_, 2018.
  """
  is_rare = np.arange(num_classes) >= num_classes - num_classes // 2
  return _floor(np.where(is_rare, largest / ratio, largest))


def imbalanced_subset(
  seed: int, labels: np.ndarray, counts: Sequence[int], argument: str
) -> np.ndarray:
  """Chooses ``counts[c]`` examples of each class ``c`` at random, without replacement.

  Subsets by one seed are nested: if a class keeps more, it keeps the same ones and others.

  Returns:
    ``[sum(counts)]``, int32: which examples, class by class.

  Raises:
    ValueError: if a class has fewer examples than its count; it names the ``argument``.
  """
  shuffled = np.asarray(jax.random.permutation(jax.random.key(seed), labels.size))
  chosen = []
  for label, count in enumerate(counts):
    rows = shuffled[labels[shuffled] == label]
    if count > len(rows):
      raise ValueError(
        f"{argument} must leave enough images of every class: counts[{label}] must be at most "
        f"{len(rows)}, what labels have, got {count}"
      )
    chosen.append(rows[:count])
  return np.concatenate(chosen)


def _floor(values: np.ndarray) -> np.ndarray:
  return np.floor(values * _ROUNDING).astype(np.int64)
