"""Streams of a function, of minibatches and of phases."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxbo


@functools.partial(jax.jit, static_argnums=1)  # The stream is an argument, its data not constants.
def play(stream, num_rounds, key=0):
  return jax.lax.scan(lambda s, _: stream.step(s), stream.init(key), length=num_rounds)[1]


def test_a_function_sees_its_key_and_the_number_of_the_round():
  stream = jaxbo.tasks.function_stream(lambda key, t: (jax.random.key_data(key), t))
  keys, rounds = play(stream, 5, 3)
  np.testing.assert_array_equal(rounds, np.arange(5))
  np.testing.assert_array_equal(keys, [jax.random.key_data(jax.random.key(3))] * 5)


def test_minibatches_are_uniform_with_replacement_and_independent():
  train, val = {"row": jnp.arange(50), "square": jnp.arange(50) ** 2}, jnp.arange(10)
  stream = jaxbo.tasks.minibatch_stream(train, val, 20)
  batch, val_batch = play(stream, 1000)
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
  state = stream.init(0)._replace(num_rounds=jnp.int32(7))
  state, first = stream.step(state)
  np.testing.assert_array_equal(first, jax.tree.map(lambda leaf: leaf[7], play(stream, 9)))
  assert np.any(first[0] != stream.step(state)[1][0])
  assert np.any(play(stream, 9, 1)[0][7] != first[0])


@pytest.mark.parametrize("inside", [True, False], ids=["set_mesh", "no_set_mesh"])
def test_data_may_be_divided_on_an_explicit_mesh(inside):
  """A minibatch is divided as they are; the classes of an episode meet on all devices."""
  mesh = jax.make_mesh((8,), ("d",))
  data = np.arange(64.0, dtype=np.float32).reshape(16, 4)

  def draw(data):
    stream = jaxbo.tasks.minibatch_stream(data, data, 8)
    sample = functools.partial(jaxbo.tasks.sample_episode, num_ways=3, num_shots=1, num_queries=2)
    return stream.step(stream.init(0))[1][0], sample(jax.random.key(0), data)

  with jax.set_mesh(mesh) if inside else contextlib.nullcontext():
    ours = jax.jit(draw)(jax.device_put(data, NamedSharding(mesh, PartitionSpec("d"))))
  assert ours[0].sharding.spec[0] == "d"
  jax.tree.map(np.testing.assert_array_equal, ours, jax.jit(draw)(data))


def test_data_may_be_numpy_arrays():
  stream = jaxbo.tasks.minibatch_stream(np.arange(50), {"a": np.arange(50)}, 5)
  batch = jax.jit(lambda: stream.step(stream.init(7))[1])()  # As a constant, not as an argument.
  np.testing.assert_array_equal(batch[0], stream.step(stream.init(7))[1][0])


@pytest.mark.parametrize(
  ("repeat", "expected"), [(False, [0, 0, 1, 2, 2, 2, 2, 2]), (True, [0, 0, 1, 2, 2, 2, 0, 0])]
)
def test_phases_have_their_lengths(repeat, expected):
  data = [jnp.full(4, i) for i in range(3)]
  phases = [jaxbo.tasks.minibatch_stream(d, d, 2) for d in data]
  stream = jaxbo.tasks.phase_stream(phases, [2, 1, 3], repeat=repeat)
  np.testing.assert_array_equal(play(stream, 8)[0][:, 0], expected)
  assert len(jax.tree.leaves(stream.step)) == 6


def test_a_phase_goes_on_where_it_stood_and_has_a_key_of_its_own():
  mark = lambda key, t: (t, jax.random.key_data(key))
  remember = jaxbo.tasks.Stream(  # A stream with memory: the sum of its rounds.
    jax.tree_util.Partial(lambda key=0: (jnp.int32(0), jax.random.key_data(key))),
    jax.tree_util.Partial(lambda state: ((state[0] + 1, state[1]), state)),
  )
  stream = jaxbo.tasks.phase_stream([mark, remember], [2, 1], repeat=True)
  rounds, keys = play(stream, 7, 3)
  np.testing.assert_array_equal(rounds, [0, 1, 0, 2, 3, 1, 4])
  expected = [jax.random.key_data(jax.random.fold_in(jax.random.key(3), i)) for i in range(2)]
  np.testing.assert_array_equal(keys, np.array(expected)[[0, 0, 1, 0, 0, 1, 0]])


def test_bad_arguments(as_users_run):
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
  with pytest.raises(TypeError, match=r"stream must be a jaxbo\.tasks\.Stream or a function"):
    jaxbo.tasks.phase_stream([phase, 3], [1, 1])
  with pytest.raises(TypeError, match=re.escape("stream must be a function stream(key, t), got")):
    jaxbo.tasks.function_stream(lambda t: t)


DATA = jnp.arange(8)
MAKERS = {
  "minibatch": lambda n: jaxbo.tasks.minibatch_stream(DATA + n, DATA, 2),
  "finite sum": lambda n: jaxbo.tasks.finite_sum_stream(DATA + n, DATA, 2),
  "phases": lambda n: jaxbo.tasks.phase_stream([MAKERS["minibatch"](n)] * 2, [2, 1], repeat=True),
  "images of osaka": lambda n: osaka(n, 0.5),
  "stay of osaka": lambda n: osaka(0, n / 3),
  "stay of moving": lambda n: jaxbo.tasks.moving_gaussian_stream(2, 3, stay_probability=n / 3),
  "variance of moving": lambda n: jaxbo.tasks.moving_gaussian_stream(
    2, 3, stay_probability=0.5, data_variance=n
  ),
  "distance of jumping": lambda n: jaxbo.tasks.jumping_gaussian_stream(
    2, 3, stay_probability=0.5, distance=n
  ),
}


def osaka(pixel, stay_probability):
  return jaxbo.tasks.osaka_stream(
    [jnp.arange(40.0).reshape(5, 4, 2) + pixel],
    num_ways=2,
    num_shots=1,
    stay_probability=stay_probability,
    domain_probabilities=[1.0],
  )


@pytest.mark.parametrize("kind", MAKERS)
def test_streams_of_other_data_and_numbers_share_one_program(kind):
  traces = []

  @jax.jit
  def rounds(stream):
    traces.append(kind)
    return jax.lax.scan(lambda s, _: stream.step(s), stream.init(0), length=20)[1]

  first, second = (rounds(MAKERS[kind](n)) for n in (1, 2))
  assert len(traces) == 1
  assert not jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), first, second))
