"""Imbalanced subsets: closed forms of the counts, which examples are chosen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbo import tasks
from tests.cases import cases

pytestmark = pytest.mark.slow  # All together, not each.


@pytest.mark.parametrize(
  "num_classes, largest, ratio, counts",
  [
    # CIFAR-10-LT and CIFAR-100-LT of the literature: 12,406 and 10,847 examples.
    (10, 5000, 100, [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]),
    (5, 10_000, 10_000, [10_000, 1000, 100, 10, 1]),
    (4, 7, 1, [7, 7, 7, 7]),
    (3, 1000, 50, [1000, 141, 20]),
    (1, 5, 3.0, [5]),
  ],
)
def test_long_tailed_counts_fall_exponentially(num_classes, largest, ratio, counts):
  assert tasks.long_tailed_counts(num_classes, largest, ratio).tolist() == counts


def test_the_long_tailed_cifar_sets_have_the_sizes_of_the_literature():
  assert tasks.long_tailed_counts(10, 5000, 100).sum() == 12_406
  assert tasks.long_tailed_counts(100, 500, 100).sum() == 10_847


def test_the_last_count_of_a_whole_quotient_is_exact():
  for largest in range(3, 300, 7):
    for divisor in (d for d in range(1, largest + 1) if largest % d == 0):
      assert tasks.long_tailed_counts(10, largest, divisor)[-1] == largest // divisor


@pytest.mark.parametrize(
  "rare, counts",
  [
    (0.5, [60, 60, 3, 3]),
    (0.25, [60, 60, 60, 3]),
    (0.7, [60, 60, 3, 3]),
    (0.0, [60, 60, 60, 60]),
    (1, [3, 3, 3, 3]),
  ],
)
def test_step_imbalanced_counts_have_two_values(rare, counts):
  assert tasks.step_imbalanced_counts(4, 60, 20, rare).tolist() == counts


def test_a_step_that_is_no_whole_quotient_is_rounded_down():
  assert tasks.step_imbalanced_counts(2, 79, 20).tolist() == [79, 3]


LABELS = np.random.default_rng(0).integers(0, 4, 200)
subset = jax.jit(tasks.imbalanced_subset, static_argnums=2)


def test_a_subset_has_so_many_of_each_class_and_none_twice():
  counts = (30, 7, 0, 1)
  chosen = np.asarray(subset(0, LABELS, counts))
  assert np.bincount(LABELS[chosen], minlength=4).tolist() == list(counts)
  assert len(set(chosen)) == len(chosen)
  np.testing.assert_array_equal(LABELS[chosen], np.repeat(np.arange(4), counts))
  np.testing.assert_array_equal(chosen, tasks.imbalanced_subset(0, LABELS, np.array(counts)))
  np.testing.assert_array_equal(chosen, subset(jax.random.key(0), LABELS, counts))


def test_subsets_of_one_key_are_nested_and_those_of_others_are_not():
  small, large = (set(np.asarray(subset(1, LABELS, n)).tolist()) for n in ((5,) * 4, (9,) * 4))
  assert small < large
  assert not small <= set(np.asarray(subset(2, LABELS, (9,) * 4)).tolist())


def test_every_example_of_a_class_is_equally_likely():
  """Four standard errors of a binomial share, for each of 50 examples."""
  labels, num_keys = np.arange(100) % 2, 800
  keys = jax.random.split(jax.random.key(3), num_keys)
  chosen = jax.vmap(lambda key: tasks.imbalanced_subset(key, jnp.asarray(labels), (10, 0)))(keys)
  shares = np.bincount(np.asarray(chosen).ravel(), minlength=100) / num_keys
  np.testing.assert_array_equal(shares[labels == 1], 0)
  assert np.abs(shares[labels == 0] - 0.2).max() < 4 * np.sqrt(0.2 * 0.8 / num_keys)


@cases(
  "call, error, message",
  [
    (lambda: tasks.long_tailed_counts(0, 5, 2), ValueError, "num_classes must be at least 1"),
    (lambda: tasks.long_tailed_counts(3, 5.0, 2), TypeError, "largest must be a positive Python"),
    (lambda: tasks.long_tailed_counts(3, 5, 6), ValueError, r"ratio must be in \[1, 5\], got 6"),
    (lambda: tasks.long_tailed_counts(3, 5, 0.5), ValueError, r"ratio must be in \[1, 5\]"),
    (lambda: tasks.step_imbalanced_counts(3, 5, 2, 1.5), ValueError, r"rare must be in \[0, 1\]"),
    (
      lambda: tasks.imbalanced_subset(0, LABELS, [500]),
      ValueError,
      r"counts\[0\] must be at most \d+, what labels have, got 500",
    ),
    (lambda: tasks.imbalanced_subset(0, LABELS, [-1]), ValueError, "counts must be at least 0"),
    (lambda: tasks.imbalanced_subset(0, LABELS, [1.5]), TypeError, "counts must be integers"),
    (lambda: tasks.imbalanced_subset(0, LABELS[None], [1]), ValueError, "labels must be one-dim"),
    (lambda: tasks.imbalanced_subset("a", LABELS, [1]), TypeError, "key must be an int"),
  ],
)
def test_what_cannot_be_is_refused(call, error, message, as_users_run):
  with pytest.raises(error, match=message):
    call()
