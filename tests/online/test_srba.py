"""SRBA: equal to the paper in NumPy, exact at the end; restarts of SOGD."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbo
from tests.bilevel.finite_sums import D, M, N, P, inner_loss, outer_loss, srba_in_numpy, sums

pytestmark = pytest.mark.slow

RATES = 0.05, 0.2, 0.15
STARTS = np.linspace(-1.0, 1.0, P), np.linspace(0.5, 1.0, D)


def make(problem, **options):
  """A loop, its state, a stream, and an epoch: a restart and five minibatches."""
  outer = jaxbo.srba(*RATES[:2], inner_loss, outer_loss, linear_learning_rate=RATES[2], **options)
  keep = lambda round: (
    jnp.concatenate(
      [*round.after[:1], round.after.solution.params, -round.after.outer_state[0].linear_iterate]
    ),
    round.batch.extra,
  )
  loop = jaxbo.online_loop(outer_loss, None, outer, metrics={"z": keep})
  stream = jaxbo.tasks.finite_sum_stream(*problem, 1)

  def epoch(state, restart):
    whole = jaxbo.online.OnlineBatch(*problem, BatchIndex(jnp.int32(-1), jnp.int32(-1), N, M))
    state, first = loop.step(state, whole, restart=restart)
    state, others = loop.run(state, stream, 5)
    join = lambda a, b: jnp.concatenate([a[None], b])
    return state, jax.tree.map(join, first.metrics["z"], others.metrics["z"])

  return epoch, loop.init(*map(jnp.array, STARTS), stream)


BatchIndex = jaxbo.tasks.BatchIndex


@pytest.mark.parametrize("radius", [0.6, None])
def test_the_trace_is_that_of_the_published_algorithm(radius, x64):
  """A restart that is known when the program is traced gives what another one gives."""
  problem = jax.tree.map(jnp.array, sums())
  epoch, start = make(problem, radius=radius)
  static = jax.jit(lambda state, _: jax.lax.scan(lambda s, _: epoch(s, True), state, length=4))
  traced = jax.jit(
    lambda state, restart: jax.lax.scan(lambda s, _: epoch(s, restart), state, length=4)
  )
  flat = lambda leaf: leaf.reshape(24, *leaf.shape[2:])
  got, which = jax.tree.map(flat, static(start, True)[1])
  order = zip(np.asarray(which.index), np.asarray(which.outer_index), strict=True)
  z0 = [*STARTS, np.zeros(D)]
  path = srba_in_numpy(sums(), list(order), RATES, 6, radius or np.inf, z0)
  np.testing.assert_allclose(got, path, rtol=0, atol=1e-12)
  lengths = np.linalg.norm(path[:, -D:], axis=1)
  assert np.any(np.isclose(lengths, 0.6)) == (radius is not None)
  np.testing.assert_allclose(flat(traced(start, True)[1][0]), path, rtol=0, atol=1e-12)
  drifting = flat(traced(start, False)[1][0])
  np.testing.assert_allclose(drifting[:6], path[:6], rtol=0, atol=1e-12)
  assert np.abs(drifting[6] - path[6]).max() > 1e-3


def test_constant_rates_reach_the_solution(x64):
  epoch, start = make(jax.tree.map(jnp.array, sums()))
  run = jax.jit(lambda state: jax.lax.scan(lambda s, _: epoch(s, True), state, length=1000)[1][0])
  solution = np.concatenate(sums().solution())
  np.testing.assert_allclose(run(start)[-1, -1], solution, rtol=0, atol=1e-13)


def test_a_restart_that_is_known_saves_the_gradients_at_the_last_iterates():
  """Half of the gradients of both losses."""
  counts = {}
  for restart in (True, False):
    seen = []

    def outer(x, y, batch, seen=seen):
      seen.append(batch)
      return jnp.sum(y**2)

    tx = jaxbo.srba(
      0.1, 0.1, lambda x, y, b: jnp.sum((x - y) ** 2), outer, linear_learning_rate=0.1
    )
    params = jaxbo.Bilevel(jnp.ones(2), jnp.ones(2))
    state = tx.init(params)
    given = {"batch": None, "outer_batch": None, "restart": restart}
    jaxpr = jax.make_jaxpr(lambda p, s, tx=tx, given=given: tx.update(p, s, p, **given))
    jaxpr(params, state)
    counts[restart] = len(seen)
  assert counts == {True: 0, False: 1}
  assert optax.tree.get(state, "correction_count") == 0
