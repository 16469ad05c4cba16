"""SOGD, and other methods that move both levels, in the online loop."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbo
from tests.online.drifting import inner_loss, outer_loss, p2

pytestmark = pytest.mark.slow

KEY = jax.random.key(0)


def in_numpy(problem, num_rounds, rates, correction, radius):
  """The equations of 2511.01126 with their signs: H v + grad_y f = 0 and grad_x f + J v."""
  z, last, d, path = [np.zeros(2)] * 3, None, None, []
  for t in range(num_rounds):

    def directions(z, t=t):
      x, y, v = z
      J = -problem.B.T
      return [
        problem.rho * (x - problem.e[t]) + J @ v,
        problem.A @ y - problem.B @ x - problem.b[t],
        y - problem.c[t] + problem.A @ v,
      ]

    now = directions(z)
    if d is None:
      d = now
    else:
      then = directions(last)
      d = [n + (1 - correction(t)) * (old - p) for n, old, p in zip(now, d, then, strict=True)]
    last, z = z, [u - rate * step for u, rate, step in zip(z, rates, d, strict=True)]
    length = np.linalg.norm(z[2])
    z[2] = z[2] * min(1, radius / length) if length else z[2]
    path.append(np.concatenate(z))
  return np.array(path)


@pytest.mark.parametrize("radius", [0.35, None])
def test_the_trace_is_that_of_the_published_equations(radius, x64):
  """Their v is ours with the other sign; the correction falls with time, the ball is reached."""
  problem = p2(10)
  correction = lambda t: 0.9 / (1 + t) ** 0.5
  outer = jaxbo.sogd(
    0.1,
    0.2,
    inner_loss,
    outer_loss,
    linear_learning_rate=0.15,
    correction=correction,
    radius=radius,
  )
  metrics = {
    "z": lambda round: jnp.concatenate(
      [
        round.after.x,
        round.after.solution.params,
        -optax.tree.get(round.after.outer_state, "linear_iterate"),
      ]
    )
  }
  loop = jaxbo.online_loop(outer_loss, None, outer, metrics=metrics)
  stream = problem.stream()
  state = loop.init(jnp.zeros(2), jnp.zeros(2), stream)
  state, info = jax.jit(loop.run, static_argnums=2)(state, stream, 10)
  expected = in_numpy(problem, 10, (0.1, 0.2, 0.15), correction, radius or np.inf)
  np.testing.assert_allclose(info.metrics["z"], expected, rtol=0, atol=1e-12)
  lengths = np.linalg.norm(expected[:, 4:], axis=1)
  assert np.any(np.isclose(lengths, 0.35)) == (radius is not None)


def test_a_round_that_is_not_finite_does_not_count():
  loss = lambda x, y, batch: 0.5 * jnp.sum((y - batch) ** 2)
  follow = lambda x, y, batch: 0.5 * jnp.sum(batch * (y - x) ** 2)
  outer = jaxbo.sogd(0.1, 0.5, follow, loss, linear_learning_rate=0.5, correction=0.5)
  loop = jaxbo.online_loop(loss, None, outer, metrics={"x": lambda round: round.after.x})
  ones, zero = jnp.ones(2), jnp.zeros(2)
  step = jax.jit(loop.step)
  state = loop.init(zero, zero, lambda key, t: (ones, ones))
  for _ in range(3):
    state, _ = step(state, (ones, ones))
  for bad in ((jnp.nan * ones, ones), (ones, jnp.inf * ones)):
    after, _ = step(state, bad)
    assert not optax.tree.get(after, "CorrectedResponseInfo").finite
    as_it_was = lambda tree: optax.tree.set(tree._replace(round_count=0), finite=True)
    chex.assert_trees_all_equal(as_it_was(after), as_it_was(state))
  state, _ = step(after, (ones, ones))
  assert optax.tree.get(state, "CorrectedResponseInfo").finite
  assert np.all(state.x != after.x)


def test_a_value_function_method_runs_online():
  """F2SA: first order only."""
  follow = lambda x, y, batch: 0.5 * (y - x) ** 2
  loss = lambda x, y, batch: 0.5 * (y - batch) ** 2
  outer = jaxbo.f2sa(0.05, 0.01, follow, multiplier=50.0, inner_optimizer=optax.sgd(0.5))
  loop = jaxbo.online_loop(loss, None, outer)
  stream = lambda key, t: (None, jnp.float32(2.0))
  state = loop.init(jnp.float32(0.0), jnp.float32(0.0), stream)
  state, info = jax.jit(lambda state: loop.run(state, stream, 2000))(state)
  np.testing.assert_allclose([state.x, state.y], 2.0, atol=0.05)
  assert info.loop.outer_loss.shape == (2000,)
  assert np.isnan(info.loop.linear_residual[-1])


def test_the_first_round_has_nothing_to_correct_where_the_losses_are_infinite_at_zero():
  follow = lambda x, y, batch: 0.5 * jnp.sum((y - jnp.log(x)) ** 2)
  loss = lambda x, y, batch: jnp.sum(jnp.log(x) + y)
  tx = jaxbo.add_corrected_response(follow, loss, linear_learning_rate=0.5, correction=0.5)
  params = jaxbo.Bilevel(jnp.full(2, 2.0), jnp.zeros(2))
  grads = jaxbo.Bilevel(jnp.full(2, 0.5), jnp.ones(2))
  update = jax.jit(lambda state: tx.update(grads, state, params, batch=None, outer_batch=None))
  direction, state = update(tx.init(params))
  assert state.info.finite
  np.testing.assert_allclose(direction.inner, -np.log(2), rtol=1e-6)
  np.testing.assert_allclose(direction.outer, 0.5)


def test_auxiliary_outputs_are_in_the_info():
  loss = lambda x, y, batch: (jnp.sum(y**2), {"x": x})
  follow = lambda x, y, batch: 0.5 * jnp.sum((y - x) ** 2)
  plain = lambda x, y, batch: loss(x, y, batch)[0]
  outer = jaxbo.sogd(0.1, 0.5, follow, plain, linear_learning_rate=0.5, correction=0.5)
  loop = jaxbo.online_loop(loss, None, outer, has_aux=True)
  start = loop.init(jnp.zeros(3), jnp.zeros(3), lambda key, t: (None, None))
  _, info = jax.eval_shape(loop.step, start, (None, None))
  assert info.loop.aux["x"].shape == (3,)


def test_bad_arguments():
  make = lambda **options: jaxbo.add_corrected_response(
    inner_loss, outer_loss, **{"linear_learning_rate": 0.1, "correction": 0.5, **options}
  )
  with pytest.raises(ValueError, match="linear_learning_rate must be positive and finite, got 0"):
    make(linear_learning_rate=0.0)
  for bad in (-0.1, 1.5):
    with pytest.raises(ValueError, match="correction must be"):
      make(correction=bad)
  with pytest.raises(ValueError, match="radius must be positive and finite, got 0"):
    make(radius=0.0)
  params = jaxbo.Bilevel(jnp.zeros(2), jnp.zeros(2))
  tx = make()
  with pytest.raises(TypeError, match="update must be given outer_batch="):
    tx.update(params, tx.init(params), params, batch=None)
  with pytest.raises(ValueError, match="inner must be an inner solver with replay=True"):
    jaxbo.online_loop(outer_loss, None, tx, window=2, replay=True)
  with pytest.raises(ValueError, match="inner must be an inner solver with replay=True"):
    jaxbo.online_loop(outer_loss, None, tx, hyper_at="before")
