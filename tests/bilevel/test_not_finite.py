"""Numbers that are not finite: state and parameters stay finite, and the next step works."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbo

HEADS = {
  "itd": jaxbo.add_unrolled_response,
  "aid": lambda s: jaxbo.add_implicit_response(s, jaxbo.conjugate_gradient(3)),
  "aid_warm": lambda s: jaxbo.add_implicit_response(
    s, jaxbo.conjugate_gradient(3, warm_start=True), inner_params=jnp.zeros(2)
  ),
  "aid_scipy": lambda s: jaxbo.add_implicit_response(s, jax.scipy.sparse.linalg.cg),
  "neumann": lambda s: jaxbo.add_implicit_response(s, jaxbo.neumann(3, 0.3)),
  "esj": lambda s: jaxbo.add_es_response(s, 4),
}


def loop(make_head):
  loss = lambda x, y, batch: jnp.sum(batch * (y - jnp.tanh(x)) ** 2)
  solver = jaxbo.inner_solver(loss, optax.sgd(0.2, momentum=0.5), 3, warm_start="all")
  outer = optax.chain(make_head(solver), optax.adam(0.1))
  init, step = jaxbo.bilevel_loop(
    lambda x, y, batch: jnp.sum((y - batch) ** 2) + 0.1 * x**2, solver, outer
  )
  return init(jnp.float32(0.5), jnp.zeros(2)), jax.jit(step)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("name", HEADS)
def test_a_bad_batch_leaves_everything_finite_and_is_reported(name, bad):
  state, step = loop(HEADS[name])
  for _ in range(2):
    state, _ = step(state, jnp.float32(1.0), jnp.float32(2.0))
  before = state
  state, info = step(state, jnp.float32(bad), jnp.float32(2.0))
  without_losses = state.solution.info._replace(losses=None)
  chex.assert_tree_all_finite(state._replace(solution=state.solution._replace(info=None)))
  assert not without_losses.finite
  chex.assert_trees_all_equal(state.solution.params, before.solution.params)
  chex.assert_trees_all_equal(state.solution.opt_state, before.solution.opt_state)
  assert np.isfinite(info.hypergradient_norm)
  # The response is left out: what remains is df/dx.
  np.testing.assert_allclose(info.hypergradient_norm, 0.2 * abs(before.x), rtol=1e-5)
  response_info = next(
    found
    for kind in ("UnrolledInfo", "ImplicitInfo", "EsInfo")
    if (found := optax.tree.get(state.outer_state, kind)) is not None
  )
  assert not getattr(response_info, "finite", False)
  assert getattr(response_info, "num_finite", 0) == 0
  if name.startswith(("aid", "neumann")):
    assert response_info.linear_breakdown
  after, info = step(state, jnp.float32(1.0), jnp.float32(2.0))
  assert after.solution.info.finite
  assert after.x != state.x
  chex.assert_tree_all_finite(after)


def test_only_the_task_whose_run_diverges_keeps_its_start():
  one = jaxbo.inner_solver(lambda x, y, batch: jnp.sum((y - batch * x) ** 2), optax.sgd(0.5), 1)
  solver = jaxbo.over_tasks(one, 3)
  solution = solver.solve(
    jnp.float32(1.0), solver.init(jnp.float32(7.0)), jnp.array([1, np.nan, 3])
  )
  np.testing.assert_allclose(solution.params, [1.0, 7.0, 3.0])
  np.testing.assert_array_equal(solution.info.finite, [True, False, True])


@pytest.mark.parametrize("redraw", [False, True])
@pytest.mark.parametrize("difference", ["forward", "central", "exact"])
@pytest.mark.parametrize("per_task", [False, True])
def test_a_task_whose_run_diverges_takes_its_own_samples_alone_with_it(
  per_task, difference, redraw
):
  """Of one outer parameter, a random sign gives the exact response."""
  one = jaxbo.inner_solver(lambda x, y, batch: jnp.sum((y - batch * x) ** 2), optax.sgd(0.5), 1)
  solver = jaxbo.over_tasks(one, 3)
  x, batch = jnp.float32(1.0), jnp.array([1, np.nan, 3])
  solution = solver.solve(x, solver.init(jnp.float32(7.0)), batch)
  head = jaxbo.add_es_response(
    solver,
    2,
    1.0,
    directions="rademacher",
    difference=difference,
    redraw=redraw,
    per_task=per_task,
  )
  result, state = head.update((x, jnp.ones(3)), head.init(x), x, solution=solution, batch=batch)
  np.testing.assert_allclose(result, 1 + (1 + 3), rtol=1e-6)
  assert state.info.num_finite == (2 * 2 if per_task else 2)


@pytest.mark.parametrize("difference", ["forward", "central", "exact"])
def test_without_a_finite_base_run_no_sample_counts(difference):
  """Some perturbed runs are finite, but there is nothing to take a difference to."""
  solver = jaxbo.inner_solver(
    lambda x, y, batch: 0.5 * jnp.sum((y - jnp.where(x < 0.5, x, jnp.nan)) ** 2), optax.sgd(1.0), 1
  )
  x = jnp.float32(0.5)
  solution = solver.solve(x, solver.init(jnp.full(2, 7.0)), None)
  head = jaxbo.add_es_response(solver, 16, 1e-3, difference=difference)
  result, state = head.update(
    (jnp.float32(3.0), jnp.ones(2)), head.init(x), x, solution=solution, batch=None
  )
  assert result == 3.0
  assert state.info.num_finite == 0


def test_a_hessian_that_is_not_finite_leaves_df_dx():
  """The second derivative of |y|^1.5 at 0 is infinite; the loss and its gradient are not."""
  solver = jaxbo.inner_solver(
    lambda x, y, batch: jnp.sum(jnp.abs(y) ** 1.5 + 0 * x * y), optax.sgd(0.1), 1
  )
  x = jnp.float32(1.0)
  solution = solver.solve(x, solver.init(jnp.zeros(2)), None)
  head = jaxbo.add_implicit_response(solver, jaxbo.conjugate_gradient(2))
  result, state = head.update(
    (jnp.float32(3.0), jnp.ones(2)), head.init(x), x, solution=solution, batch=None
  )
  assert result == 3.0
  chex.assert_tree_all_finite(state)
  assert state.info.linear_breakdown
