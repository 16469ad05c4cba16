"""SABA: equal to the paper in NumPy, unbiased, exact at the end."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbo
from tests.bilevel.finite_sums import (
  D,
  M,
  N,
  P,
  inner_loss,
  outer_loss,
  saba_in_numpy,
  sums,
)

pytestmark = pytest.mark.slow

RATES = 0.05, 0.2, 0.15
HEAD = {"linear_learning_rate": RATES[2], "num_batches": N, "num_outer_batches": M}


def saba(num_batches=N, num_outer_batches=M):
  return jaxbo.saba(
    *RATES[:2],
    inner_loss,
    linear_learning_rate=RATES[2],
    num_batches=num_batches,
    num_outer_batches=num_outer_batches,
  )


def soba():
  """The paper's SOBA, with all directions at the last iterates: no correction."""
  return jaxbo.sogd(
    *RATES[:2], inner_loss, outer_loss, linear_learning_rate=RATES[2], correction=1.0
  )


def start():
  return jaxbo.Bilevel(jnp.linspace(-1.0, 1.0, P), jnp.linspace(0.5, 1.0, D))


def one(batches, k):
  return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, k, 1), batches)


def update(tx, problem, carry, indices):
  params, state = carry
  i, j = indices
  train, val = one(problem.inner, i), one(problem.outer, j)
  grads = jax.grad(lambda p: outer_loss(p.outer, p.inner, val))(params)
  given = {"batch": train, "outer_batch": val, "index": i, "outer_index": j}
  updates, state = tx.update(grads, state, params, **given)
  return updates, state


def play(tx, problem, carry, order):
  """The carry after each of the updates."""

  def body(carry, indices):
    updates, state = update(tx, problem, carry, indices)
    carry = optax.apply_updates(carry[0], updates), state
    return carry, carry

  return jax.lax.scan(body, carry, order)


run = jax.jit(play, static_argnums=0)


def random_order(num_updates, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, N, num_updates), rng.integers(0, M, num_updates)


@pytest.mark.parametrize("filled", [False, True])
def test_the_trace_is_that_of_the_published_equations(filled, x64):
  """Their v is ours with the other sign. The means are those of the rows at all times."""
  problem, order, tx = sums(), random_order(40), saba()
  params, state = start(), None
  state = tx.init(params)
  rng = np.random.default_rng(1)
  draw = lambda *shape: rng.normal(size=shape) if filled else np.zeros(shape)
  rows = [[draw(N, D), draw(N, D), draw(N, P)], [draw(M, D), draw(M, P)]]
  means = [[leaf.mean(0) for leaf in side] for side in rows]
  ours = lambda side: jaxbo.bilevel.InnerTerms(side[0], -side[1], -side[2])
  both = lambda side: jaxbo.Bilevel(side[1], side[0])
  table = jaxbo.bilevel.AverageTable
  head = state[0]._replace(
    inner_table=jax.tree.map(jnp.array, table(ours(rows[0]), ours(means[0]))),
    outer_table=jax.tree.map(jnp.array, table(both(rows[1]), both(means[1]))),
  )
  (_, last), (params, state) = run(tx, problem, (params, (head, *state[1:])), order)
  z0 = [np.linspace(-1.0, 1.0, P), np.linspace(0.5, 1.0, D), np.zeros(D)]
  path, tables = saba_in_numpy(problem, zip(*order, strict=True), RATES, rows, z0)
  got = np.concatenate([*params, -state[0].averaged_linear], axis=1)
  np.testing.assert_allclose(got, path, rtol=0, atol=1e-12)
  for side, wanted in (
    (last[0].inner_table, ours(tables[0])),
    (last[0].outer_table, both(tables[1])),
  ):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), side.rows, wanted)
  for side in (state[0].inner_table, state[0].outer_table):
    of_rows = jax.tree.map(lambda leaf: leaf.mean(1), side.rows)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), side.means, of_rows)
  assert state[0].averaged_count[-1] == 40
  assert np.all(state[0].info.finite)


def test_directions_are_unbiased_over_the_indices(x64):
  """At any table and any iterates, by all pairs of batches; for v too."""
  problem, tx = sums(), saba()
  _, (params, state) = run(tx, problem, (start(), tx.init(start())), random_order(40))
  at = jax.tree.map(lambda leaf: leaf[17], (params, state))
  pairs = [index.ravel() for index in np.meshgrid(range(N), range(M))]
  each = jax.jit(jax.vmap(functools.partial(update, tx, problem, at)))
  updates, after = each(pairs)
  mean = lambda leaf: np.mean(leaf, axis=0)
  full = soba()
  of_all = full.init(at[0])
  of_all = (of_all[0]._replace(linear_iterate=at[1][0].averaged_linear), *of_all[1:])
  grads = jax.grad(lambda p: outer_loss(p.outer, p.inner, problem.outer))(at[0])
  wanted, of_all = full.update(grads, of_all, at[0], batch=problem.inner, outer_batch=problem.outer)
  for got, exact in zip(updates, wanted, strict=True):
    assert np.std(got, axis=0).min() > 1e-3
    np.testing.assert_allclose(mean(got), exact, atol=1e-13)
  np.testing.assert_allclose(mean(after[0].averaged_linear), of_all[0].linear_iterate, atol=1e-13)


def test_with_one_batch_it_is_soba(x64):
  problem = jax.tree.map(lambda leaf: leaf.mean(0, keepdims=True), sums())
  order, params = (np.zeros(30, int), np.zeros(30, int)), start()
  ends = [run(tx, problem, (params, tx.init(params)), order)[1][0] for tx in (saba(1, 1), soba())]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-13), *ends)


def test_constant_rates_reach_the_solution_where_soba_stalls(x64):
  """At the floor of float64, linearly: the first and the second 300 updates gain equally."""
  problem = sums()
  order = random_order(3000)
  x = problem.solution()[0]
  errors = {}
  for name, tx in (("saba", saba()), ("soba", soba())):
    _, (params, _) = run(tx, problem, (start(), tx.init(start())), order)
    errors[name] = np.linalg.norm(np.asarray(params.outer) - x, axis=1)
  assert errors["saba"][-1] < 1e-14
  assert errors["soba"][-1000:].min() > 1e-3
  early, late = errors["saba"][300], errors["saba"][600]
  assert 0.3 < np.log(errors["saba"][0] / early) / np.log(early / late) < 3


@pytest.mark.parametrize("bad", ["index", "outer_index", "negative", "batch", "grads"])
def test_what_is_bad_does_not_count(bad):
  """An index that only the data know, and numbers that are not finite, never touch the table."""
  problem, tx = jax.tree.map(jnp.float32, sums()), saba()
  step = jax.jit(lambda problem, carry, indices: update(tx, problem, carry, indices))
  carry = start(), tx.init(start())
  for t in range(4):
    updates, state = step(problem, carry, (jnp.int32(t), jnp.int32(t % M)))
    carry = optax.apply_updates(carry[0], updates), state
  nan = lambda side: tuple(leaf * jnp.nan for leaf in side)
  indices = jnp.int32(1), jnp.int32(1)
  if bad == "batch":
    problem = problem._replace(inner=nan(problem.inner))
  elif bad == "grads":
    problem = problem._replace(outer=nan(problem.outer))
  else:
    wrong = {"index": (N, 0), "outer_index": (0, M), "negative": (-1, 0)}[bad]
    indices = tuple(jnp.int32(index) for index in wrong)
  updates, state = step(problem, carry, indices)
  assert not state[0].info.finite
  assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(updates))
  as_it_was = lambda state: state[0]._replace(info=None)
  jax.tree.map(np.testing.assert_array_equal, as_it_was(state), as_it_was(carry[1]))


def test_bad_arguments():
  make = lambda **options: jaxbo.add_averaged_response(inner_loss, **{**HEAD, **options})
  with pytest.raises(ValueError, match="linear_learning_rate must be positive and finite, got 0"):
    make(linear_learning_rate=0.0)
  for name in ("num_batches", "num_outer_batches"):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
      make(**{name: 0})
  tx, params = make(), start()
  state = tx.init(params)
  call = functools.partial(tx.update, params, state, params, batch=one(sums().inner, 0))
  with pytest.raises(TypeError, match="update must be given index=, the number of the batch"):
    call(outer_index=0)
  with pytest.raises(TypeError, match="update must be given outer_index="):
    call(index=0)
  with pytest.raises(ValueError, match="outer_index must be from 0 to num_outer_batches - 1 = 3"):
    call(index=0, outer_index=M)
  for wrong in (1.0, jnp.arange(2)):
    with pytest.raises(TypeError, match="index must be one integer"):
      call(index=wrong, outer_index=0)
  with pytest.raises(ValueError, match="num_batches must be 7, as the stream has it, got 6"):
    call(index=0, outer_index=0, num_batches=7)


def test_directions_are_in_the_dtype_of_the_parameters_and_the_table_is_wider():
  tx = jaxbo.add_averaged_response(
    lambda x, y, batch: 0.5 * (y - batch * x) ** 2,
    linear_learning_rate=0.5,
    num_batches=2,
    num_outer_batches=1,
  )
  params = jaxbo.Bilevel(jnp.bfloat16(1.0), jnp.bfloat16(0.0))
  grads = jaxbo.Bilevel(jnp.bfloat16(0.0), jnp.bfloat16(-3.0))
  given = {"batch": jnp.bfloat16(2.0), "index": 0, "outer_index": 0}
  direction, state = tx.update(grads, tx.init(params), params, **given)
  assert {leaf.dtype for leaf in direction} == {jnp.dtype(jnp.bfloat16)}
  assert state.inner_table.rows.gradient.dtype == jnp.float32
