"""Imbalanced versions of labelled data: how many examples each class keeps, and which."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbo import _check, _random

# Quotients that are whole numbers must not be rounded down to the one below.
_ROUNDING = 1 + 1e-12


def long_tailed_counts(num_classes: int, largest: int, ratio: float | int) -> np.ndarray:
  r"""How many examples each class of a long-tailed data set has, falling exponentially.

  .. math:: n_c = \lfloor n_0 \, \rho^{-c / (C - 1)} \rfloor, \qquad c = 0, \dots, C - 1

  Args:
    num_classes: :math:`C`.
    largest: :math:`n_0`, the examples of class 0.
    ratio: :math:`\rho` in [1, largest], the examples of the first class for one of the last. 1 is
      balanced.

  Returns:
    ``[num_classes]``, int64, falling; give ``counts[permutation]`` to
    :func:`imbalanced_subset` for another order of the classes.

  Raises:
    ValueError: if a number is below 1, or ``ratio`` is above ``largest``: a class would be empty.
    TypeError: if ``num_classes`` or ``largest`` is no integer.

  References:
    Cui et al., `Class-Balanced Loss Based on Effective Number of Samples
    <https://arxiv.org/abs/1901.05555>`_, 2019.
  """
  num_classes, largest = _check_counts(num_classes, largest, ratio)
  exponents = np.arange(num_classes) / max(num_classes - 1, 1)
  return _floor(largest / float(ratio) ** exponents)


def step_imbalanced_counts(
  num_classes: int, largest: int, ratio: float | int, rare: float | int = 0.5
) -> np.ndarray:
  r"""How many examples each class has if some are rare, all of them equally.

  .. math::
    n_c = n_0 \text{ for } c < C - \lfloor \mu C \rfloor, \qquad
    n_c = \lfloor n_0 / \rho \rfloor \text{ for the others}

  Args:
    num_classes: :math:`C`.
    largest: :math:`n_0`, the examples of a class that is not rare.
    ratio: :math:`\rho` in [1, largest].
    rare: :math:`\mu` in [0, 1], the share of the classes that are rare, the last ones.

  Returns:
    ``[num_classes]``, int64.

  Raises:
    ValueError: if a number is out of range.
    TypeError: if ``num_classes`` or ``largest`` is no integer.

  References:
    Buda et al., `A systematic study of the class imbalance problem in convolutional neural networks
    <https://arxiv.org/abs/1710.05381>`_, 2018.
  """
  num_classes, largest = _check_counts(num_classes, largest, ratio)
  _check.within("rare", rare, 0, 1)
  num_rare = math.floor(rare * num_classes * _ROUNDING)
  is_rare = np.arange(num_classes) >= num_classes - num_rare
  return _floor(np.where(is_rare, largest / ratio, largest))


def imbalanced_subset(key: Any, labels: Any, counts: Sequence[int] | np.ndarray) -> jax.Array:
  """Chooses ``counts[c]`` examples of each class ``c`` at random, without replacement.

  It is deterministic in the key, and subsets by one key are nested: if a class keeps more, it keeps
  the same ones and others. Compiles; ``counts`` are static.

  Args:
    key: an int, a raw key array or a typed key.
    labels: ``[n]``, integers.
    counts: how many examples of class 0, 1, ... to take, each at least 0. Labels beyond the last
      class are left out.

  Returns:
    ``[sum(counts)]``, int32: which examples, class by class.

  Raises:
    TypeError: if ``labels`` or ``counts`` are no integers, or ``key`` is no key.
    ValueError: if ``labels`` or ``counts`` are not one-dimensional, a count is negative, or a class
      has fewer examples than its count. Where ``labels`` are traced their values are not known, and
      the subset is then filled up with examples of other classes: a first call outside of
      ``jax.jit`` makes sure.
  """
  counts = np.asarray(counts)
  for name, values in (("labels", labels), ("counts", counts)):
    if not jnp.issubdtype(jnp.result_type(values), jnp.integer):
      raise TypeError(f"{name} must be integers, got dtype {jnp.result_type(values)}")
    if jnp.ndim(values) != 1:
      raise ValueError(f"{name} must be one-dimensional, got the shape {jnp.shape(values)}")
  if counts.size and counts.min() < 0:
    raise ValueError(f"counts must be at least 0, got {counts.min()}")
  if _check.is_known(labels):
    given = np.asarray(labels)
    for label, count in enumerate(counts):
      if count > (has := int((given == label).sum())):
        raise ValueError(f"counts[{label}] must be at most {has}, what labels have, got {count}")
  if _random.key_impl("key", key) is None and jnp.ndim(key) == 0:
    key = jax.random.key(key)
  labels = jnp.asarray(labels)
  shuffled = jax.random.permutation(key, labels.size)
  by_class = shuffled[jnp.argsort(labels[shuffled], stable=True)]
  before = jnp.sum(labels[None, :] < jnp.arange(len(counts))[:, None], axis=1)
  each = [before[label] + jnp.arange(count) for label, count in enumerate(counts)]
  chosen = jnp.concatenate(each) if each else jnp.zeros(0, jnp.int32)
  return by_class[jnp.minimum(chosen, labels.size - 1)].astype(jnp.int32)


def _check_counts(num_classes: int, largest: int, ratio: float | int) -> tuple[int, int]:
  num_classes = _check.positive_int("num_classes", num_classes)
  largest = _check.positive_int("largest", largest)
  _check.within("ratio", ratio, 1, largest)
  return num_classes, largest


def _floor(values: np.ndarray) -> np.ndarray:
  return np.floor(values * _ROUNDING).astype(np.int64)
