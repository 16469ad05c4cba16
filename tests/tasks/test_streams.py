"""Streams: pure functions of a key and of the round."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbo

KEY = jax.random.key(0)


def test_minibatches_are_uniform_with_replacement_and_independent():
  train, val = {"row": jnp.arange(50), "square": jnp.arange(50) ** 2}, jnp.arange(10)
  stream = jaxbo.tasks.minibatch_stream(train, val, 20)
  draw = jax.jit(lambda stream: jax.vmap(lambda t: stream(KEY, t))(jnp.arange(1000)))
  batch, val_batch = draw(stream)  # The stream is an argument: its data are no constants.
  assert batch["row"].shape == val_batch.shape == (1000, 20)
  np.testing.assert_array_equal(batch["row"] ** 2, batch["square"])
  for rows, size in ((batch["row"], 50), (val_batch, 10)):
    counts = np.bincount(np.ravel(rows), minlength=size)
    assert len(counts) == size
    deviation = np.sqrt(20_000 / size * (1 - 1 / size))
    assert np.max(np.abs(counts - 20_000 / size)) < 4 * deviation
  assert any(len(set(rows)) < 20 for rows in np.asarray(batch["row"]))
  correlation = np.corrcoef(np.mean(batch["row"], axis=1), np.mean(val_batch, axis=1))[0, 1]
  assert abs(correlation) < 4 / np.sqrt(1000)


def test_any_round_can_be_made_again():
  stream = jaxbo.tasks.minibatch_stream(jnp.arange(50), jnp.arange(50), 5)
  first, again, other = stream(KEY, 7), stream(KEY, 7), stream(KEY, 8)
  np.testing.assert_array_equal(first, again)
  assert np.any(first[0] != other[0])
  assert np.any(stream(jax.random.key(1), 7)[0] != first[0])


def test_data_may_be_numpy_arrays():
  stream = jaxbo.tasks.minibatch_stream(np.arange(50), {"a": np.arange(50)}, 5)
  batch = jax.jit(lambda t: stream(KEY, t))(7)  # As a constant, not as an argument.
  np.testing.assert_array_equal(batch[0], stream(KEY, 7)[0])


@pytest.mark.parametrize(
  ("repeat", "expected"), [(False, [0, 0, 1, 2, 2, 2, 2, 2]), (True, [0, 0, 1, 2, 2, 2, 0, 0])]
)
def test_phases_have_their_lengths(repeat, expected):
  data = [jnp.full(4, i) for i in range(3)]
  phases = [jaxbo.tasks.minibatch_stream(d, d, 2) for d in data]
  stream = jaxbo.tasks.phase_stream(phases, [2, 1, 3], repeat=repeat)
  run = jax.jit(lambda stream: jax.lax.map(lambda t: stream(KEY, t)[0][0], jnp.arange(8)))
  np.testing.assert_array_equal(run(stream), expected)
  assert len(jax.tree.leaves(stream)) == 6


def test_phases_see_the_round_since_the_beginning():
  stream = jaxbo.tasks.phase_stream([lambda key, t: (t, 0)] * 2, [2, 2])
  assert [int(stream(KEY, t)[0]) for t in range(5)] == [0, 1, 2, 3, 4]


def test_bad_arguments():
  with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
    jaxbo.tasks.minibatch_stream(jnp.ones(3), jnp.ones(3), 0)
  for bad in ({"a": jnp.ones(3), "b": jnp.ones(4)}, jnp.float32(1.0), jnp.ones((0, 2)), {}):
    with pytest.raises(ValueError, match="val must have leaves with one axis"):
      jaxbo.tasks.minibatch_stream(jnp.ones(3), bad, 2)
  phase = lambda key, t: (t, t)
  with pytest.raises(ValueError, match="lengths must have one number for each of the streams"):
    jaxbo.tasks.phase_stream([phase], [1, 2])
  with pytest.raises(ValueError, match="lengths must have one number for each of the streams"):
    jaxbo.tasks.phase_stream([], [])
  with pytest.raises(ValueError, match="lengths must be at least 1, got 0"):
    jaxbo.tasks.phase_stream([phase, phase], [1, 0])
