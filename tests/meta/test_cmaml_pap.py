"""C-MAML with its prolonged adaptation phase against the published loop, written out in NumPy.

The losses are those of P11: ``k`` steps of rate ``a`` end at ``m + (1 - a)^k (theta - m)``.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbo

pytestmark = pytest.mark.slow

RATE, STEPS = 0.3, 2
LEFT = (1 - RATE) ** STEPS
GAMMA, LAMBDA, BETA = 0.4, 2.0, 0.5


def loss(x, y, samples):
  miss = x + y - jnp.mean(samples, axis=0)
  return 0.5 * jnp.sum(miss**2), miss


INNER = jaxbo.inner_solver(lambda *args: loss(*args)[0], optax.sgd(RATE), STEPS)
STREAM = jaxbo.tasks.moving_gaussian_stream(2, 5, stay_probability=0.7, domain_step=0.0)
half = lambda v: 0.5 * float(v @ v)


@functools.cache
def learner(buffer_size=4, drop_threshold=GAMMA):
  return jaxbo.meta.c_maml_pap(
    loss,
    INNER,
    optax.sgd(BETA),
    drop_threshold=drop_threshold,
    buffer_size=buffer_size,
    modulation=LAMBDA,
    shift_score=jnp.square,
  )


@functools.partial(jax.jit, static_argnums=(0, 2))
def play(learner, state, num_rounds=60):
  """The state, and of every round the batch, the models after it and the info."""

  def body(state, _):
    stream_state, batch = STREAM.step(state.stream_state)
    state, info = learner.step(state._replace(stream_state=stream_state), batch)
    return state, (batch.train, state.meta_params, state.task.x + state.task.y, info)

  return jax.lax.scan(body, state, length=num_rounds)


def by_hand(means, buffer_size, gamma):
  """``observe_accumulate`` of the published code: a list for a buffer, and two flags."""
  theta, phi, buffer, last_tbd, rows = np.zeros(2), np.zeros(2), [], False, []
  for t, mean in enumerate(means):
    before = half(phi - mean)
    phi = mean + LEFT * ((theta if last_tbd or t == 0 else phi) - mean)
    drop, value, updated = before - half(phi - mean), np.nan, False
    tbd = t > 0 and drop > gamma
    if (tbd and buffer) or len(buffer) > buffer_size - 1:
      updated = True
      buffer = buffer * 2 if len(buffer) == 1 else buffer
      cut = -(-len(buffer) // 2)
      pairs = list(zip(buffer[:cut], buffer[cut:], strict=False))
      misses = [s + LEFT * (theta - s) - q for s, q in pairs]
      value = np.mean([half(miss) for miss in misses])
      theta = theta - BETA * LEFT * np.mean(misses, axis=0) * -np.expm1(-LAMBDA * value)
      buffer = []
    else:
      buffer = [*buffer, mean]
    last_tbd = tbd
    rows.append((theta, phi, before, drop, tbd or t == 0, updated, value, len(buffer)))
  return [np.array(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("buffer_size, gamma", [(4, GAMMA), (3, np.inf), (50, -np.inf)])
def test_it_equals_the_published_loop(buffer_size, gamma, x64):
  """By boundaries and a full buffer; by the buffer alone; with a boundary in every round."""
  method = learner(buffer_size, gamma)
  end, (batches, *found, info) = play(method, method.init(jnp.zeros(2), stream=STREAM, key=1))
  means = np.mean(np.asarray(batches), axis=1)
  thetas, phis, before, drop, switch, updated, value, kept = by_hand(means, buffer_size, gamma)
  close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6)  # the loss is float32
  close(found[0], thetas)
  close(found[1], phis)
  close(info.before.loss, before)
  close(info.detection.scores.switch, drop)
  np.testing.assert_array_equal(info.detection.switch, switch)
  np.testing.assert_array_equal(info.meta_updated, updated)
  close(info.outer_loss, value)
  assert end.last_support.num_supports == kept[-1]
  assert not np.any(info.detection.shift)
  if np.isfinite(gamma):
    at_boundaries = updated & switch
    assert np.sum(at_boundaries) > 3
    assert np.sum(updated & ~switch) > 1  # because the buffer was full


def test_two_runs_are_one_and_types_stay():
  method = learner()
  run = jax.jit(method.run, static_argnums=2)
  begin = method.init(jnp.zeros(2), stream=STREAM, key=3)
  half_way, _ = run(begin, STREAM, 20)
  twice, _ = run(half_way, STREAM, 20)
  once, _ = play(method, begin, 40)
  for a, b in zip(jax.tree.leaves(twice), jax.tree.leaves(once), strict=True):
    np.testing.assert_array_equal(a, b)
  same = lambda a, b: (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type)
  types = (jax.tree.map(jax.typeof, state) for state in (begin, twice))
  assert jax.tree.all(jax.tree.map(same, *types))
  shapes = [leaf.shape for leaf in jax.tree.leaves(begin.last_support.supports)]
  assert shapes == [(4, 5, 2)]


def test_a_round_that_is_not_finite_moves_nothing():
  method = learner()
  begin, _ = play(method, method.init(jnp.ones(2), stream=STREAM, key=1), 3)
  bad = begin._replace(
    last_support=begin.last_support._replace(
      supports=jnp.full((4, 5, 2), jnp.nan), num_supports=jnp.int32(4)
    )
  )
  end, (*_, info) = play(method, bad, 1)
  np.testing.assert_array_equal(end.meta_params, begin.meta_params)
  jax.tree.map(np.testing.assert_array_equal, end.meta_state, begin.meta_state)
  assert info.meta_updated[0]
  assert not info.finite[0]
  assert end.last_support.num_supports == 0


def test_a_task_model_that_overflows_is_left_at_a_boundary():
  """The loss is infinite before and after the inner run, and infinity minus infinity is no drop."""
  method = learner(drop_threshold=1e9)
  begin, _ = play(method, method.init(jnp.ones(2), stream=STREAM, key=1), 2)
  broken = begin._replace(task=begin.task._replace(y=jnp.full(2, 1e30)))
  end, (*_, info) = play(method, broken, 3)
  np.testing.assert_array_equal(info.detection.switch, [True, True, False])  # It goes on for one.
  np.testing.assert_array_equal(np.isfinite(info.before.loss), [False, False, True])
  assert np.all(np.isfinite(end.task.x + end.task.y))


@pytest.mark.parametrize("warm_start", ["all", "params", False])
def test_the_momentum_of_inner_steps_goes_on_until_the_round_after_a_boundary(warm_start, x64):
  optimizer = optax.sgd(RATE, momentum=0.9)
  inner = jaxbo.inner_solver(lambda *args: loss(*args)[0], optimizer, STEPS, warm_start=warm_start)
  method = jaxbo.meta.c_maml_pap(
    loss, inner, optax.sgd(0.0), drop_threshold=GAMMA, buffer_size=4, shift_score=jnp.square
  )
  _, (batches, _, phis, info) = play(method, method.init(jnp.ones(2), stream=STREAM, key=1))
  boundary = np.asarray(info.detection.switch)[1:]
  assert 3 < np.sum(boundary) < 50
  restarts, phi, momentum = {0, *(2 + np.flatnonzero(boundary))}, np.zeros(2), np.zeros(2)
  for t, mean in enumerate(np.mean(np.asarray(batches), axis=1)):
    if t in restarts:
      phi, momentum = np.ones(2), np.zeros(2)
    for _ in range(STEPS):
      momentum = 0.9 * momentum + phi - mean
      phi = phi - RATE * momentum
    np.testing.assert_allclose(phis[t], phi, rtol=0, atol=1e-10)


def test_bad_arguments():
  make = functools.partial(jaxbo.meta.c_maml_pap, loss, INNER, optax.sgd(1.0))
  with pytest.raises(ValueError, match="buffer_size must be at least 1, got 0"):
    make(drop_threshold=1.0, buffer_size=0)
  for method in (jaxbo.meta.c_maml, jaxbo.meta.c_maml_pap):
    other = functools.partial(method, loss, INNER, optax.sgd(1.0))
    with pytest.raises(ValueError, match="drop_threshold must be a number or an infinity, got nan"):
      other(drop_threshold=float("nan"))
    with pytest.raises(ValueError, match="modulation must be positive and finite, got 0"):
      other(drop_threshold=1.0, modulation=0.0)
  with pytest.raises(ValueError, match="init must be given either a stream or a batch"):
    make(drop_threshold=1.0).init(jnp.zeros(2))
  method = learner()
  state = method.init(jnp.zeros(2), stream=STREAM)
  with pytest.raises(ValueError, match="num_rounds must be at least 1, got 0"):
    method.run(state, STREAM, 0)


def test_the_response_must_be_a_transformation(as_users_run):
  for method in (jaxbo.meta.c_maml, jaxbo.meta.c_maml_pap):
    with pytest.raises(TypeError, match="response must be an optax transformation"):
      method(loss, INNER, optax.sgd(1.0), drop_threshold=1.0, response=0.1)  # pyright: ignore
  with pytest.raises(TypeError, match="response must be an optax transformation"):
    jaxbo.leeds(1.0, INNER, response=0.1)  # pyright: ignore
  with pytest.raises(TypeError, match="inner must be an InnerSolver"):
    jaxbo.leeds(1.0, 0.1, response=jaxbo.drop_response())  # pyright: ignore
