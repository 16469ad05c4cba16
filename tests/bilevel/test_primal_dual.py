"""PDBO on problems whose optimum, multiplier and value are known."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbo
from tests.bilevel import value_problems as vp

pytestmark = pytest.mark.slow  # All together, not each.

EXACT = {"num_steps": 1, "inner_optimizer": optax.sgd(1.0)}  # Solves T1 and T2 in y1.


def info_of(state):
  return optax.tree.get(state, "PrimalDualInfo")


# T1.


@pytest.mark.parametrize("slack", [0.5, 0.1, 0.01, 1e-3])
@pytest.mark.parametrize(("x", "y"), [(3.0, (0.0, 0.0)), (-2.0, (1.0, -3.0)), (0.0, (0.0, 0.0))])
def test_flat_inner_direction_ends_at_the_optimum_within_the_slack(slack, x, y, x64):
  """T1, where every response ends elsewhere: see tests/bilevel/test_responses.py."""
  box = vp.box(-10.0, 10.0)
  tx = jaxbo.pdbo(
    0.1,
    vp.flat_inner,
    slack=slack,
    dual_learning_rate=0.1,
    project_outer=box,
    project_inner=box,
    gap_steps=1,
    **EXACT,
  )
  num_updates = 25000 if slack == 1e-3 else 4000  # The multiplier falls by 0.1 * slack in each.
  (params, state), (_, duals) = vp.descend(tx, vp.flat_outer, vp.start(x, y), num_updates)
  assert vp.flat_outer(params) < 1e-15
  assert abs(params.outer - 1) <= np.sqrt(2 * slack) + 1e-9
  info = info_of(state)
  # The unconstrained minimum is feasible: the multiplier goes back to zero.
  assert info.dual == 0
  np.testing.assert_allclose(info.dual * info.constraint, 0, atol=1e-12)
  np.testing.assert_allclose(info.gap, vp.flat_gap(params), atol=1e-12)
  assert info.gap <= slack * (1 + 1e-6)
  assert jnp.all((duals >= 0) & (duals <= 100.0))


def test_trajectory_of_the_toy(x64):
  """The numbers of the specification, from another implementation with N = 20."""
  tx = jaxbo.pdbo(
    0.1,
    vp.flat_inner,
    slack=1e-3,
    dual_learning_rate=0.1,
    num_steps=20,
    inner_optimizer=optax.sgd(1.0),
  )
  _, (params, _) = vp.descend(tx, vp.flat_outer, vp.start(3.0, (0.0, 0.0)), 501)
  distance = abs(params.outer[np.array([10, 50, 100, 200, 500])] - 1)
  np.testing.assert_allclose(distance, [0.139, 0.040, 0.015, 2e-3, 5e-6], rtol=0.15)


@pytest.mark.parametrize(("regularizer", "x"), [(0.01, 1.012), (0.1, 1.157)])
def test_the_regularizer_widens_the_feasible_set_and_excludes_nothing(regularizer, x, x64):
  """In g(x, y) too it would make y2 = 1 infeasible: f would not vanish."""
  tx = jaxbo.pdbo(
    0.1,
    vp.flat_inner,
    slack=1e-3,
    dual_learning_rate=0.1,
    value_regularizer=regularizer,
    num_steps=20,
    inner_optimizer=optax.sgd(1 / (1 + regularizer)),
  )
  (params, _), _ = vp.descend(tx, vp.flat_outer, vp.start(3.0, (0.0, 0.0)), 4000)
  assert vp.flat_outer(params) < 1e-12
  wider = 1e-3 + 0.5 * regularizer * params.outer**2 / (1 + regularizer)
  assert abs(params.outer - 1) <= np.sqrt(2 * wider) + 1e-9
  np.testing.assert_allclose(params.outer, x, atol=2e-3)


# T2, which pins the multiplier.


def active(slack):
  """What T2 has for a slack, and a dual step of a tenth of the primal rate."""
  e = np.sqrt(2 * slack)
  dual = 1 / e - 0.5
  return e, dual, 0.02 * (2 * dual + 1) / (2 * e * e)


def at_the_optimum(params, state, slack):
  e, dual, _ = active(slack)
  np.testing.assert_allclose(params.outer, 2 + e / 2, atol=1e-8)
  np.testing.assert_allclose(params.inner, [2 - e / 2, 2 + e / 2], atol=1e-8)
  np.testing.assert_allclose(vp.active_outer(params), (1 - e / 2) ** 2, atol=1e-8)
  info = info_of(state)
  np.testing.assert_allclose(info.dual, dual, atol=1e-8)
  np.testing.assert_allclose(info.constraint, 0, atol=1e-8)
  np.testing.assert_allclose(info.kkt_residual, 0, atol=1e-8)
  assert not info.dual_at_bound
  assert info.finite
  assert vp.flat_gap(params) <= slack * (1 + 1e-6)


@pytest.mark.parametrize("extrapolation", [0.0, 1.0])
@pytest.mark.parametrize("slack", [0.32, 0.08, 0.02, 0.005])
def test_active_constraint_has_the_multiplier_of_the_closed_form(slack, extrapolation, x64):
  tx = jaxbo.pdbo(
    0.03,
    vp.flat_inner,
    slack=slack,
    dual_learning_rate=active(slack)[2],
    dual_bound=20.0,
    extrapolation=extrapolation,
    **EXACT,
  )
  (params, state), (_, duals) = vp.descend(tx, vp.active_outer, vp.start(0.0, (0.0, 0.0)), 8000)
  at_the_optimum(params, state, slack)
  assert jnp.all((duals >= 0) & (duals <= 20.0))


def test_a_multiplier_at_its_bound_is_reported(x64):
  """T2 wants 4.5; held at 3 the constraint stays violated, as with a fixed penalty of 3."""
  tx = jaxbo.pdbo(0.03, vp.flat_inner, slack=0.02, dual_learning_rate=2.0, dual_bound=3.0, **EXACT)
  (params, state), _ = vp.descend(tx, vp.active_outer, vp.start(0.0, (0.0, 0.0)), 4000)
  info = info_of(state)
  assert info.dual_at_bound
  assert info.dual == 3
  np.testing.assert_allclose(params.outer, (3 + 4 * 3) / (1 + 2 * 3), atol=1e-8)
  e = 2 / (1 + 2 * 3)
  np.testing.assert_allclose(info.constraint, e * e / 2 - 0.02, atol=1e-8)
  np.testing.assert_allclose(info.kkt_residual, 4 * info.constraint, atol=1e-8)


def test_an_unconverged_lower_value_hides_the_violation_and_the_gap_shows_it(x64):
  """Item 22: the lower value at any y-hat is too large, so h is too small."""
  tx = jaxbo.add_primal_dual_penalty(
    vp.flat_inner,
    slack=0.1,
    dual_learning_rate=0.1,
    num_steps=1,
    inner_optimizer=optax.sgd(0.01),
    value_regularizer=0.3,  # Not in the gap.
    gap_steps=5000,
  )
  params = vp.start(1.0, (0.0, 0.0))
  _, state = tx.update(params, tx.init(params), params, batch=None)
  assert state.info.constraint < -0.08
  np.testing.assert_allclose(state.info.gap, 0.5, atol=1e-8)


def test_the_gap_goes_on_from_the_lower_value_iterate(x64):
  """So a few steps are enough once that has converged, however far y is."""
  tx = jaxbo.add_primal_dual_penalty(
    vp.flat_inner,
    slack=0.1,
    dual_learning_rate=0.1,
    num_steps=1,
    inner_optimizer=optax.sgd(0.1),
    gap_steps=1,
  )
  params = vp.start(1.0, (0.0, 0.0))
  step = lambda state, _: (tx.update(params, state, params, batch=None)[1], None)
  state, _ = jax.lax.scan(step, tx.init(params), length=200)
  np.testing.assert_allclose(state.info.gap, 0.5, atol=1e-8)


# Problems with several minima, saddles and boxes.


@pytest.mark.parametrize(("start", "minimum", "value"), vp.PBGD_MINIMA)
def test_every_minimum_is_found_from_its_basin(start, minimum, value, x64):
  """T3; with a multiplier that goes like 1 / sqrt(slack), f is 2 slack dual below the minimum."""
  slack, box = 1e-4, vp.box(0.0, 3.0)
  head = jaxbo.add_primal_dual_penalty(
    vp.pbgd_inner,
    slack=slack,
    dual_learning_rate=630.0,
    extrapolation=1.0,
    num_steps=2,
    inner_optimizer=optax.sgd(0.1),
  )
  head = jaxbo.scale_by_lagrangian_smoothness(
    head, outer_smoothness=20.0, constraint_smoothness=20.0
  )
  tx = optax.chain(head, optax.sgd(1.0), jaxbo.project(outer=box))
  (params, state), _ = vp.descend(tx, vp.pbgd_outer, vp.start(start, -start), 6000)
  info = info_of(state)
  assert info.kkt_residual < 1e-9
  np.testing.assert_allclose(params.outer, minimum, atol=np.sqrt(slack))
  np.testing.assert_allclose(vp.pbgd_inner(*params, None), slack, rtol=1e-9)
  np.testing.assert_allclose(vp.pbgd_outer(params) + 2 * slack * info.dual, value, atol=3e-4)


@pytest.mark.parametrize("proximal", [False, True])
@pytest.mark.parametrize("slack", [1e-2, 1e-3])
@pytest.mark.parametrize("n", [1, 2])
def test_sine_problem_relaxed_by_the_slack(n, slack, proximal, x64):
  """T4: with n (1 - cos v) = slack the valley at theta is left by v towards the outer minimum."""
  options = {
    "slack": slack,
    "dual_learning_rate": 20.0,
    "dual_bound": 40.0,
    "num_steps": 2,
    "inner_optimizer": optax.sgd(0.5),
  }
  if proximal:
    options |= {"outer_weight": 0.5, "constraint_weight": 0.5, "period": 20}
  tx = (jaxbo.proximal_pdbo if proximal else jaxbo.pdbo)(0.01, vp.sine_inner, **options)
  (params, state), _ = vp.descend(tx, vp.sine_outer, vp.start(2.0, [4.0] * n), 12000)
  theta = 1.5 * np.pi - np.arccos(1 - slack / n)
  x = (2 * (1 - n) + n * theta) / (1 + n)
  np.testing.assert_allclose(params.outer, x, atol=1e-8)
  np.testing.assert_allclose(params.inner, 2 - x + theta, atol=1e-8)
  assert info_of(state).kkt_residual < 1e-7


def test_min_max_problem(x64):
  """T9: f = x y, g = -x y, so x = 0 and f = 0."""
  box = vp.box(-10.0, 10.0)
  tx = jaxbo.pdbo(
    0.05,
    lambda x, y, batch: -x * y,
    slack=1e-3,
    dual_learning_rate=0.1,
    num_steps=10,
    inner_optimizer=optax.sgd(0.5),
    project_outer=box,
    project_inner=box,
  )
  outer_loss = lambda p: p.outer * p.inner
  (params, _), _ = vp.descend(tx, outer_loss, vp.start(4.0, 4.0), 4000)
  np.testing.assert_allclose(params.outer, 0, atol=1e-4)
  np.testing.assert_allclose(outer_loss(params), 0, atol=1e-3)


def test_ill_scaled_problem_b_1998_04(x64):
  """T7: y - 50 x + 500 = sqrt(2 slack) = r, and f's gradient is lambda r (50, -1)."""
  slack = 0.5
  r = np.sqrt(2 * slack)
  dual = (451 / r - 1) / 1250.5
  bound = 1.5 * dual
  tx = jaxbo.pdbo(
    1 / (2 + 2501 * bound),
    lambda x, y, batch: 0.5 * y**2 + 500 * y - 50 * x * y,
    slack=slack,
    dual_learning_rate=0.004 * dual / r**2,
    dual_bound=bound,
    extrapolation=1.0,
    **EXACT,
  )
  outer_loss = lambda p: (p.outer - 1) ** 2 + (p.inner - 1) ** 2
  (params, state), _ = vp.descend(tx, outer_loss, vp.start(10.0, 0.0), 30000)
  np.testing.assert_allclose(params.outer, 1 + 25 * dual * r, atol=1e-8)
  np.testing.assert_allclose(params.inner, 1 - dual * r / 2, atol=1e-6)
  np.testing.assert_allclose(info_of(state).dual, dual, atol=1e-8)
  np.testing.assert_allclose(params.outer, 25051 / 2501, atol=2.1 * r / 100)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_problem_with_two_optima_mb_2007_17(sign, x64):
  """T7: the gap is (x + y^2)^2 / 4, so y^2 = 1/4 - 2 sqrt(slack) and lambda = 1 / 2 sqrt(slack)."""
  slack, box = 1e-3, vp.box(-1.0, 1.0)
  tx = jaxbo.pdbo(
    0.02,
    lambda x, y, batch: 0.5 * x * y**2 + y**4 / 4,
    slack=slack,
    dual_learning_rate=20.0,
    dual_bound=40.0,
    num_steps=3,
    inner_optimizer=optax.sgd(0.5),
    project_outer=box,
    project_inner=box,
  )
  outer_loss = lambda p: (p.outer + 0.5) ** 2 + 0.5 * p.inner**2
  (params, state), _ = vp.descend(tx, outer_loss, vp.start(-0.5, sign), 10000)
  np.testing.assert_allclose(params.outer, -0.25, atol=1e-6)
  np.testing.assert_allclose(params.inner, sign * np.sqrt(0.25 - 2 * slack**0.5), atol=1e-6)
  np.testing.assert_allclose(info_of(state).dual, 0.5 / slack**0.5, atol=1e-4)


# Around the head.


def test_the_primal_step_shrinks_with_the_multiplier(x64):
  """T2 from an infeasible start: the multiplier jumps to 90, where a step of .05 is unstable."""
  slack = 0.005
  head = jaxbo.add_primal_dual_penalty(
    vp.flat_inner, slack=slack, dual_learning_rate=20.0, dual_bound=1e4, extrapolation=1.0, **EXACT
  )
  params = vp.start(3.0, (0.0, 0.0))
  plain = optax.chain(head, optax.sgd(0.05))
  (end, _), _ = vp.descend(plain, vp.active_outer, params, 100)
  assert not abs(end.outer) < 1e3
  scaled = jaxbo.scale_by_lagrangian_smoothness(
    head, outer_smoothness=3.0, constraint_smoothness=2.0
  )
  (end, state), (_, duals) = vp.descend(
    optax.chain(scaled, optax.sgd(1.0)), vp.active_outer, params, 20000
  )
  at_the_optimum(end, state, slack)
  assert jnp.max(duals) > 80


def test_the_scale_is_that_of_this_update(x64):
  """Not of the last one: the multiplier jumps in the first update already."""
  head = jaxbo.add_primal_dual_penalty(vp.flat_inner, slack=0.5, dual_learning_rate=2.0, **EXACT)
  tx = jaxbo.scale_by_lagrangian_smoothness(head, outer_smoothness=3.0, constraint_smoothness=0.5)
  params = vp.start(3.0, (0.0, 0.0))
  grads = jax.grad(vp.active_outer)(params)
  direction, state = head.update(grads, head.init(params), params, batch=None)
  result, scaled_state = tx.update(grads, tx.init(params), params, batch=None)
  assert state.info.dual == 2 * (0.5 * 9 - 0.5)
  chex.assert_trees_all_close(
    result, jax.tree.map(lambda d: d / (3 + 8 * 0.5), direction), rtol=1e-12
  )
  chex.assert_trees_all_equal(scaled_state, state)


def test_proximal_terms_do_not_move_the_solution(x64):
  """T2: at a fixed point of the centre both terms vanish."""
  tx = jaxbo.proximal_pdbo(
    0.02,
    vp.flat_inner,
    slack=0.02,
    dual_learning_rate=2.5,
    dual_bound=20.0,
    outer_weight=0.5,
    constraint_weight=0.1,
    period=50,
    **EXACT,
  )
  (params, state), _ = vp.descend(tx, vp.active_outer, vp.start(0.0, (0.0, 0.0)), 20000)
  at_the_optimum(params, state, 0.02)
  np.testing.assert_allclose(optax.tree.get(state, "centre_distance"), 0, atol=1e-8)


def test_proximal_terms_and_the_centre_that_moves(x64):
  """Against the formula, over two periods of two updates."""
  tx = jaxbo.add_proximal_terms(
    jaxbo.add_primal_dual_penalty(vp.flat_inner, slack=0.1, dual_learning_rate=1.0, **EXACT),
    outer_weight=0.5,
    constraint_weight=0.25,
    period=2,
  )
  points = [vp.start(*p) for p in [(3.0, (0.0, 0.0)), (2.0, (1.0, 4.0)), (1.0, (2.0, 1.0))]]
  points.append(vp.start(5.0, (1.0, 1.0)))
  state, dual = tx.init(points[0]), 0.0
  for t, params in enumerate(points):
    centre = points[t - t % 2]
    grads = jax.grad(vp.active_outer)(params)
    result, state = tx.update(grads, state, params, batch=None)
    offset = optax.tree.sub(params, centre)
    distance_sq = float(offset.outer**2 + jnp.sum(offset.inner**2))
    constraint = float(vp.flat_gap(params)) + 0.25 * distance_sq - 0.1
    dual = min(max(dual + constraint, 0), 100)
    slope = jax.grad(vp.flat_gap)(params)
    # Danskin: the gradient of the gap is that of g(x, y) - g*(x).
    expected = jax.tree.map(
      lambda f, h, o, dual=dual: f + 2 * 0.5 * o + dual * (h + 2 * 0.25 * o), grads, slope, offset
    )
    chex.assert_trees_all_close(result, expected, rtol=1e-12, atol=1e-12)
    info = info_of(state)
    np.testing.assert_allclose(info.constraint, constraint, rtol=1e-12)
    np.testing.assert_allclose(info.dual, dual, rtol=1e-12)
    np.testing.assert_allclose(state.info.centre_distance, np.sqrt(distance_sq), rtol=1e-12)


def test_wrappers_compose_whatever_the_inner_optimizer_keeps(x64):
  """The multiplier is found through the state of the proximal terms and beside Adam's."""
  head = jaxbo.add_primal_dual_penalty(
    vp.flat_inner,
    slack=0.5,
    dual_learning_rate=2.0,
    num_steps=3,
    inner_optimizer=optax.adam(0.1),
  )
  proximal = jaxbo.add_proximal_terms(head, outer_weight=1.0, constraint_weight=1.0, period=3)
  tx = jaxbo.scale_by_lagrangian_smoothness(
    proximal, outer_smoothness=3.0, constraint_smoothness=0.5
  )
  params = vp.start(3.0, (0.0, 0.0))
  direction, state = proximal.update(params, proximal.init(params), params, batch=None)
  result, _ = tx.update(params, tx.init(params), params, batch=None)
  dual = optax.tree.get(state, "dual")
  assert dual > 0
  expected = jax.tree.map(lambda leaf: leaf / (3 + 0.5 * dual), direction)
  chex.assert_trees_all_close(result, expected, rtol=1e-12)


def test_head_without_a_multiplier_is_refused():
  tx = jaxbo.scale_by_lagrangian_smoothness(
    optax.identity(), outer_smoothness=1.0, constraint_smoothness=1.0
  )
  params = vp.start(1.0, 1.0)
  with pytest.raises(ValueError, match="head must report its multiplier as dual"):
    tx.update(params, tx.init(params), params)
