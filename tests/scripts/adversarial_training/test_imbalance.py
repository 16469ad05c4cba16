"""Imbalanced subsets: closed forms of the counts, which examples are chosen."""

import numpy as np
import pytest

from scripts.adversarial_training.imbalance import (
  imbalanced_subset,
  long_tailed_counts,
  step_imbalanced_counts,
)

pytestmark = pytest.mark.slow  # All together, not each.


def test_long_tailed_counts_fall_exponentially():
  counts = lambda *arguments: long_tailed_counts(*arguments).tolist()
  # CIFAR-10-LT and CIFAR-100-LT have the sizes of the literature.
  assert counts(10, 5000, 100) == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
  assert [sum(counts(10, 5000, 100)), sum(counts(100, 500, 100))] == [12_406, 10_847]
  assert counts(5, 10_000, 10_000) == [10_000, 1000, 100, 10, 1]
  assert counts(4, 7, 1) == [7, 7, 7, 7]
  assert counts(3, 1000, 50) == [1000, 141, 20]
  assert counts(1, 5, 3.0) == [5]


def test_the_last_count_of_a_whole_quotient_is_exact():
  for largest in range(3, 300, 7):
    for divisor in (d for d in range(1, largest + 1) if largest % d == 0):
      assert long_tailed_counts(10, largest, divisor)[-1] == largest // divisor


def test_step_imbalanced_counts_have_two_values_rounded_down():
  assert step_imbalanced_counts(4, 60, 20).tolist() == [60, 60, 3, 3]
  assert step_imbalanced_counts(3, 79, 20).tolist() == [79, 79, 3]


LABELS = np.random.default_rng(0).integers(0, 4, 200)


def subset(seed, labels, counts):
  return imbalanced_subset(seed, labels, counts, "largest")


def test_a_subset_has_so_many_of_each_class_and_none_twice():
  counts = [30, 7, 0, 1]
  chosen = subset(0, LABELS, counts)
  np.testing.assert_array_equal(LABELS[chosen], np.repeat(np.arange(4), counts))
  assert len(set(chosen)) == len(chosen)
  np.testing.assert_array_equal(chosen, subset(0, LABELS, counts))
  with pytest.raises(
    ValueError, match=r"largest must leave .*: counts\[0\] must be at most .* got 500"
  ):
    subset(0, LABELS, [500])


def test_subsets_of_one_key_are_nested_and_those_of_others_are_not():
  small, large = (set(subset(1, LABELS, [n] * 4).tolist()) for n in (5, 9))
  assert small < large
  assert not small <= set(subset(2, LABELS, [9] * 4).tolist())


def test_every_example_of_a_class_is_equally_likely():
  """Four standard errors of a binomial share, for each of 50 examples."""
  labels, num_seeds = np.arange(100) % 2, 800
  chosen = [subset(seed, labels, [10, 0]) for seed in range(num_seeds)]
  shares = np.bincount(np.concatenate(chosen), minlength=100) / num_seeds
  np.testing.assert_array_equal(shares[labels == 1], 0)
  assert np.abs(shares[labels == 0] - 0.2).max() < 4 * np.sqrt(0.2 * 0.8 / num_seeds)
