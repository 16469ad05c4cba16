"""Streams of the online experiments: what each round sees, by counting."""

import jax
import numpy as np
import pytest

from scripts.common.data import Examples
from scripts.online_hyperopt import streams

pytestmark = pytest.mark.slow  # All together, not each.

ROUNDS, BATCH, CLASSES = 80, 16, 4
EXAMPLES = Examples(
  np.arange(4000.0, dtype=np.float32)[:, None], (np.arange(4000) % CLASSES).astype(np.int32)
)
POOLS = streams.split_by_class(EXAMPLES, train_size=320, val_size=100, seed=0)


def drawn(kind, seed=0, rounds=ROUNDS, pools=POOLS):
  return kind.draw(np.random.default_rng([seed, 1]), pools, EXAMPLES.labels, rounds, BATCH)


def counts_of(labels):
  return np.bincount(np.ravel(labels), minlength=CLASSES)


def test_the_published_phases_have_more_batches_than_rounds():
  """On MNIST, 100 rounds of 64 are less than a pass. (0.4 ** 2 * 4000 is above 640 in floats.)"""
  counts = [streams.class_counts(4000, ratio, 10) for ratio in streams.GRADUAL_RATIOS]
  assert counts[0] == [4000, 1600, 641, 257, 103, 41, 17, 7, 3, 2]
  assert counts[3] == [4000] * 10
  assert [-(-sum(phase) // 64) for phase in counts] == [105, 156, 280, 625]


def test_the_split_is_disjoint_and_keeps_the_order_without_a_seed():
  for seed in (None, 3):
    train, val, test = streams.split_by_class(EXAMPLES, 320, 100, seed)
    rows = np.concatenate([*train, *val, test])
    assert len(set(rows.tolist())) == len(rows) == 4000
    for label in range(CLASSES):
      assert (EXAMPLES.labels[train[label]] == label).all()
      assert (EXAMPLES.labels[val[label]] == label).all()
      assert (len(train[label]), len(val[label])) == (320, 100)
  first = streams.split_by_class(EXAMPLES, 320, 100)
  assert first.train[1].tolist() == list(range(1, 1280, 4))
  assert first.val[1].tolist() == list(range(3601, 4000, 4))
  fresh = np.arange(3000, 4000)
  with_test = streams.split_by_class(EXAMPLES, 320, 100, test=fresh)
  assert max(map(np.max, with_test.train + with_test.val)) < 3000
  assert with_test.test is fresh


@pytest.mark.parametrize("test, sizes", [(None, (900, 100)), (np.arange(1000), (700, 51))])
def test_a_class_that_is_too_small_is_named(test, sizes):
  with pytest.raises(ValueError, match="train_size and val_size must leave the smallest class"):
    streams.split_by_class(EXAMPLES, *sizes, test=test)


def test_passes_use_each_row_once_before_any_comes_again():
  rows = np.arange(100, 130)
  table = streams.passes(np.random.default_rng(0), rows, rounds=9, batch_size=10)
  for begin in (0, 3, 6):
    assert sorted(table[begin : begin + 3].ravel().tolist()) == rows.tolist()
  assert table[:3].tolist() != table[3:6].tolist() != sorted(table[3:6].tolist())


def test_gradual_phases_draw_from_exactly_their_class_counts():
  train, val = drawn(streams.IMBALANCED["gradual"])
  assert train.rows.shape == val.rows.shape == (ROUNDS, BATCH)
  for phase, ratio in enumerate(streams.GRADUAL_RATIOS):
    rows = train.rows[20 * phase : 20 * (phase + 1)].ravel()
    allowed = streams.class_counts(320, ratio, CLASSES)
    one_pass = rows[: sum(allowed)]
    assert len(set(one_pass.tolist())) == len(one_pass)
    pool = {row for part, count in zip(POOLS.train, allowed, strict=True) for row in part[:count]}
    assert set(rows.tolist()) <= pool
    if ratio < 0.5:  # The other phases are less than a pass.
      continue
    shares = np.asarray(allowed) / sum(allowed)
    error = np.sqrt(shares * (1 - shares) / len(rows))
    assert (abs(counts_of(EXAMPLES.labels[rows]) / len(rows) - shares) < 4 * error).all()
  assert set(val.rows.ravel().tolist()) == set(np.concatenate(POOLS.val).tolist())
  assert (train.weights == 1).all()
  assert (val.weights == 1).all()


def test_zigzag_alternates_balanced_and_imbalanced_batches():
  train, _ = drawn(streams.IMBALANCED["zigzag"])
  even, odd = (counts_of(train.labels[begin::2]) for begin in (0, 1))
  assert abs(even - 160).max() < 4 * np.sqrt(640 * 3 / 16)
  shares = np.asarray(streams.class_counts(320, 0.01 ** (1 / 3), CLASSES))
  shares = shares / shares.sum()
  assert shares[-1] < 0.02 * shares[0]
  assert (abs(odd / 640 - shares) < 4 * np.sqrt(shares * (1 - shares) / 640) + 0.01).all()


def test_the_weights_of_an_imbalanced_validation_set_make_its_classes_equal():
  _, val = drawn(streams.IMBALANCED["static"], rounds=400)
  counts = streams.class_counts(100, 0.01 ** (1 / 3), CLASSES)
  whole = sum(counts) * (400 * BATCH // sum(counts))  # whole passes
  labels, weights = val.labels.ravel()[:whole], val.weights.ravel()[:whole]
  mass = [weights[labels == label].sum() for label in range(CLASSES)]
  np.testing.assert_allclose(mass, mass[0], rtol=1e-5)
  assert np.linalg.norm(streams.class_weights(counts)) == pytest.approx(1)


def test_noise_has_its_share_and_a_row_has_one_wrong_label():
  for name, rates in (("static", (0.3,) * 4), ("staged", streams.STAGED_NOISE)):
    train, val = drawn(streams.NOISY[name], rounds=320)
    wrong = train.labels != EXAMPLES.labels[train.rows]
    for phase, rate in enumerate(rates):
      one_pass = wrong[80 * phase : 80 * (phase + 1)]  # 80 rounds of 16 are a pass.
      assert one_pass.sum() == round(rate * 1280)
    assert (val.labels == EXAMPLES.labels[val.rows]).all()
    seen = {}
    for row, label in zip(train.rows[wrong], train.labels[wrong], strict=True):
      assert seen.setdefault(row, label) == label
  dynamic = drawn(streams.NOISY["dynamic"], rounds=320).train
  wrong = (dynamic.labels != EXAMPLES.labels[dynamic.rows]).mean(axis=1)
  assert wrong[60:100].mean() > 0.5
  assert wrong[220:260].mean() < 0.1


def test_priors_turn_once_through_the_classes():
  prior = streams.shifted_prior(1, CLASSES)
  assert prior.sum() == pytest.approx(1)
  assert prior[1] / prior[3] == pytest.approx(streams.PRIOR_RATIO)
  assert prior[0] == pytest.approx(prior[2])
  assert streams.shifted_prior(0.01, 10) == pytest.approx(streams.shifted_prior(0, 10), rel=0.02)
  for name in ("staged", "dynamic"):
    schedule = drawn(streams.SHIFTING[name], rounds=200)
    for level, pool in ((schedule.train, POOLS.train), (schedule.val, POOLS.val)):
      assert set(level.rows.ravel().tolist()) <= set(np.concatenate(pool).tolist())
      largest = [
        counts_of(level.labels[50 * phase : 50 * phase + 20]).argmax() for phase in range(4)
      ]
      assert largest == [0, 1, 2, 3]
  static = drawn(streams.SHIFTING["static"], rounds=200).train.labels
  error = np.sqrt(0.25 / static.size)
  shares = streams.shifted_prior(0, CLASSES)
  assert (abs(counts_of(static) / static.size - shares) < 4 * error).all()


@pytest.mark.parametrize(
  "kind",
  [kind for kinds in (streams.IMBALANCED, streams.NOISY, streams.SHIFTING)
   for kind in kinds.values()],
)  # fmt: skip
def test_a_seed_is_a_stream_and_another_seed_is_another(kind):
  first, again, other = (drawn(kind, seed) for seed in (0, 0, 1))
  for a, b, c in zip(*map(jax.tree.leaves, (first, again, other)), strict=True):
    np.testing.assert_array_equal(a, b)
    assert a.shape == c.shape
  assert (first.train.rows != other.train.rows).mean() > 0.5
  assert (first.val.rows != other.val.rows).mean() > 0.5
  assert len(kind.names) in (1, streams.NUM_PHASES)


def test_the_stream_reads_the_schedule_under_jit():
  schedule = drawn(streams.NOISY["static"])
  stream = streams.stream_of(EXAMPLES.images, schedule)
  batch = jax.jit(lambda stream, t: stream(jax.random.key(0), t))(stream, 7)
  for level, of in ((batch.train, schedule.train), (batch.val, schedule.val)):
    np.testing.assert_array_equal(level.images[:, 0], of.rows[7])
    np.testing.assert_array_equal(level.labels, of.labels[7])
    np.testing.assert_array_equal(level.weights, of.weights[7])
