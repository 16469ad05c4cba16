"""The stream of the fixed batches of a finite sum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbo


def test_every_batch_comes_once_an_epoch_in_a_new_order():
  train = {"a": np.arange(12.0), "b": np.arange(24.0).reshape(12, 2)}
  stream = jaxbo.tasks.finite_sum_stream(train, np.arange(6.0), 3, val_batch_size=1)
  run = jax.jit(
    lambda stream, key: jax.lax.scan(lambda s, _: stream.step(s), stream.init(key), length=24)
  )
  state, rounds = jax.device_get(run(stream, 0))
  index, outer = rounds.extra.index, rounds.extra.outer_index
  assert (rounds.extra.num_batches, rounds.extra.num_outer_batches) == (4, 6)
  np.testing.assert_array_equal(rounds.train["a"], 3.0 * index[:, None] + np.arange(3))
  np.testing.assert_array_equal(rounds.train["b"][..., 1], 2 * rounds.train["a"] + 1)
  np.testing.assert_array_equal(rounds.val[:, 0], outer)
  for indices, size in ((index, 4), (outer, 6)):
    epochs = np.asarray(indices).reshape(-1, size)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(size), (len(epochs), 1)))
    assert len({tuple(epoch) for epoch in epochs}) > 1
  assert state.num_rounds == 24
  other = run(stream, 1)[1].extra
  assert np.any(np.asarray(other.index) != index)


def test_batches_are_equally_likely_everywhere():
  """Over 500 keys, each of 3 batches is at each place about 167 times, within four errors."""
  stream = jaxbo.tasks.finite_sum_stream(jnp.arange(3), jnp.arange(1), 1)
  draw = lambda key: jax.lax.scan(lambda s, _: stream.step(s), stream.init(key), length=6)[1]
  index = jax.jit(jax.vmap(draw))(jnp.arange(500)).extra.index
  counts = np.array([np.sum(np.asarray(index) == k, axis=0) for k in range(3)])
  assert np.abs(counts - 500 / 3).max() < 4 * np.sqrt(500 * 2 / 9)


def test_bad_arguments():
  make = jaxbo.tasks.finite_sum_stream
  with pytest.raises(ValueError, match="batch_size must divide the 10 rows of train, got 4: leave"):
    make(jnp.arange(10), jnp.arange(4), 4)
  with pytest.raises(ValueError, match="val_batch_size must divide the 5 rows of val, got 2"):
    make(jnp.arange(10), jnp.arange(5), 2)
  with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
    make(jnp.arange(10), jnp.arange(5), 0)
  with pytest.raises(ValueError, match="val must have leaves with one axis"):
    make(jnp.arange(10), jnp.float32(1.0), 2)
