"""Streams of what a Python iterator yields."""

import concurrent.futures
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbo


def load(num_batches=50):
  rng = np.random.default_rng(0)
  for i in range(num_batches):
    yield rng.normal(size=3), {"round": i, "rows": rng.integers(0, 9, (2, 2))}


class Loads:
  """An iterable that begins anew and counts what is read."""

  def __init__(self):
    self.num_read = 0

  def __iter__(self):
    for batch in load():
      self.num_read += 1
      yield batch


@functools.partial(jax.jit, static_argnums=(0, 2))
def play(stream, state, num_rounds):
  return jax.lax.scan(lambda s, _: stream.step(s), state, length=num_rounds)


def test_a_scan_reads_each_batch_once_and_in_order():
  loads = Loads()
  stream = jaxbo.tasks.iterator_stream(loads)
  state, (train, val) = play(stream, stream.init(), 20)
  expected = list(itertools.islice(load(), 20))
  np.testing.assert_array_equal(train, np.float32([batch[0] for batch in expected]))
  np.testing.assert_array_equal(val["rows"], [batch[1]["rows"] for batch in expected])
  assert train.dtype == jnp.float32
  assert val["rows"].dtype == val["round"].dtype == jnp.int32
  np.testing.assert_array_equal(play(stream, state, 20)[1][1]["round"], np.arange(20, 40))
  assert loads.num_read == 40


def test_a_new_process_goes_on_from_the_state_alone():
  state, _ = play(stream := jaxbo.tasks.iterator_stream(load), stream.init(), 20)
  saved = jax.device_get(state)
  anew = jaxbo.tasks.iterator_stream(load)
  np.testing.assert_array_equal(play(anew, saved, 20)[1][1]["round"], np.arange(20, 40))
  np.testing.assert_array_equal(play(anew, anew.init(), 20)[1][1]["round"], np.arange(20))


def test_seeds_side_by_side_read_the_same_rounds():
  stream = jaxbo.tasks.iterator_stream(load)
  run = jax.jit(jax.vmap(lambda key: play(stream, stream.init(key), 5)[1][1]["round"]))
  np.testing.assert_array_equal(run(jnp.arange(3)), [np.arange(5)] * 3)


def test_a_generator_goes_forward_only(capfd):
  stream = jaxbo.tasks.iterator_stream(load())
  state, (_, val) = play(stream, stream.init(), 5)
  np.testing.assert_array_equal(val["round"], np.arange(5))
  np.testing.assert_array_equal(play(stream, state, 5)[1][1]["round"], np.arange(5, 10))
  with pytest.raises(Exception, match="batches must be a function or restart to give round 0"):
    jax.block_until_ready(play(stream, stream.init(), 5))
  capfd.readouterr()  # JAX prints the traceback of a callback.


@pytest.mark.parametrize(
  ("batches", "message"),
  [
    (lambda: load(3), "batches must not end before round 3, got 3 batches"),
    ([np.ones(2), np.ones(2), np.ones(3)], "batches must all be like the first"),
    ([np.ones(2), np.ones(2), np.ones(2, int)], "batches must all be like the first"),
    ([(1, 2), (1, 2), (1, 2, 3)], "batches must all be like the first"),
  ],
)
def test_what_goes_wrong_in_a_round(batches, message, capfd):
  stream = jaxbo.tasks.iterator_stream(batches)
  with pytest.raises(Exception, match=message):
    jax.block_until_ready(play(stream, stream.init(), 4))
  capfd.readouterr()


@pytest.mark.parametrize(
  ("batches", "error", "message"),
  [
    (3, TypeError, "batches must be an iterable or a function that returns an iterator, got int"),
    ([], ValueError, "batches must not end before round 0, got 0 batches"),
    ([("a", 1)], TypeError, "batches must have numeric leaves, got 'a'"),
  ],
)
def test_bad_arguments(batches, error, message, as_users_run):
  with pytest.raises(error, match=message):
    jaxbo.tasks.iterator_stream(batches)


def test_an_online_loop_follows_an_iterator():
  """OGD on the targets of a loader, against the same steps in NumPy."""
  targets = np.random.default_rng(1).normal(size=(30, 2)).astype(np.float32)
  stream = jaxbo.tasks.iterator_stream(zip(targets, targets, strict=True))
  inner = jaxbo.inner_solver(lambda x, y, batch: jnp.sum((y - x) ** 2) / 2, optax.sgd(0.5), 1)
  loop = jaxbo.online_loop(
    lambda x, y, target: jnp.sum((x - target) ** 2) / 2, inner, jaxbo.ogd(0.1)
  )
  state = loop.init(jnp.zeros(2), jnp.zeros(2), stream)
  state, _ = jax.jit(lambda state: loop.run(state, stream, 30))(state)
  x = np.zeros(2)
  for target in targets:
    x -= 0.1 * (x - target)
  np.testing.assert_allclose(state.x, x, rtol=1e-5)


def test_threads_read_their_own_rounds():
  loads = Loads()
  stream = jaxbo.tasks.iterator_stream(loads)
  run = lambda _: play(stream, stream.init(), 20)[1][1]["round"]
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    for rounds in pool.map(run, range(8)):
      np.testing.assert_array_equal(rounds, np.arange(20))
