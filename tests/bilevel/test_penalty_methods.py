"""BOME, V-PBGD and F2SA on problems whose optimum is known, and the aliases of all methods."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbo
from tests.bilevel import value_problems as vp

pytestmark = pytest.mark.slow  # All together, not each.

EXACT = {"num_steps": 1, "inner_optimizer": optax.sgd(1.0)}


def penalized(gamma):
  """T2 with a fixed multiplier: x, y1, y2, f."""
  x = (3 + 4 * gamma) / (1 + 2 * gamma)
  return x, [x - 2 / (1 + 2 * gamma), x], (2 * gamma / (1 + 2 * gamma)) ** 2


def extrapolated(run, gamma):
  """What ``run(gamma)`` tends to: its error falls like 1 / gamma, up to 1 / gamma^2."""
  return jax.tree.map(lambda a, b: (10 * b - a) / 9, run(gamma), run(10 * gamma))


# T2.


@pytest.mark.parametrize("gamma", [1.0, 10.0])
def test_fixed_penalty_ends_where_the_closed_form_says(gamma, x64):
  tx = jaxbo.v_pbgd(0.3, vp.flat_inner, multiplier=gamma, **EXACT)
  (params, state), _ = vp.descend(tx, vp.active_outer, vp.start(0.0, (0.0, 0.0)), 4000)
  x, y, f = penalized(gamma)
  np.testing.assert_allclose(params.outer, x, atol=1e-10)
  np.testing.assert_allclose(params.inner, y, atol=1e-10)
  np.testing.assert_allclose(vp.active_outer(params), f, atol=1e-10)
  np.testing.assert_allclose(optax.tree.get(state, "excess"), vp.flat_gap(params), atol=1e-10)
  if gamma == 10:
    np.testing.assert_allclose([x, y[0], f], [2.047619, 1.952381, 0.907029], atol=1e-6)


@pytest.mark.parametrize("alternate", [None, 1, 4])
def test_f2sa_ends_at_the_penalty_that_its_schedule_ends_at(alternate, x64):
  tx = jaxbo.f2sa(
    0.03,
    0.05,
    vp.flat_inner,
    multiplier=optax.linear_schedule(1.0, 10.0, 500),
    alternate=alternate,
    **EXACT,
  )
  (params, state), _ = vp.descend(tx, vp.active_outer, vp.start(0.0, (0.0, 0.0)), 12000)
  np.testing.assert_allclose(params.outer, penalized(10.0)[0], atol=1e-8)
  np.testing.assert_allclose(params.inner, penalized(10.0)[1], atol=1e-8)
  assert optax.tree.get(state, "dual") == 10


def test_f2sa_moves_the_inner_sequence_and_then_the_outer_parameters(x64):
  """Against the double loop, written out: T = 2 steps of y on f + gamma g, then one of x."""
  gamma, rate_x, rate_y = 2.0, 0.1, 0.05
  tx = jaxbo.f2sa(rate_x, rate_y, vp.flat_inner, multiplier=gamma, alternate=2, **EXACT)
  params = vp.start(0.5, (1.0, -1.0))
  _, (seen, _) = vp.descend(tx, vp.active_outer, params, 7)
  x, (y1, y2) = 0.5, (1.0, -1.0)
  for t in range(7):
    np.testing.assert_allclose([seen.outer[t], *seen.inner[t]], [x, y1, y2], rtol=1e-12)
    if t % 3 < 2:
      step1, step2 = y1 - 1 + gamma * (y1 - x), y2 - x
      y1, y2 = y1 - rate_y * step1, y2 - rate_y * step2
    else:
      x -= rate_x * (x - y2 + x - 3 + gamma * (-y1 + x))


@pytest.mark.parametrize(("phi", "dual", "x"), [("gradient", 464, 2.0016), ("value", 292, 2.0022)])
def test_dynamic_barrier_has_the_multiplier_of_the_published_code(phi, dual, x, x64):
  """T2 with the settings of the specification, 10 inner steps; it ends beside the optimum 2."""
  tx = jaxbo.bome(0.01, vp.flat_inner, phi=phi, num_steps=10, inner_optimizer=optax.sgd(0.5))
  (params, state), _ = vp.descend(tx, vp.active_outer, vp.start(0.0, (0.0, 0.0)), 5000)
  np.testing.assert_allclose(params.outer, x, atol=1e-4)
  np.testing.assert_allclose(params.inner[1], x, atol=1e-4)
  np.testing.assert_allclose(optax.tree.get(state, "dual"), dual, rtol=2e-3)


def test_dynamic_barrier_guarantees_the_fall_of_the_excess(x64):
  """<grad q, d> >= phi, with equality where the multiplier is positive."""
  tx = jaxbo.add_dynamic_barrier(vp.flat_inner, barrier_rate=0.5, epsilon=1e-12, **EXACT)
  params = vp.start(2.0, (0.5, 0.0))
  slope = jax.grad(vp.flat_gap)(params)
  norm_sq = float(slope.outer**2 + jnp.sum(slope.inner**2))
  for sign in (-1.0, 1.0):
    grads = jax.tree.map(lambda leaf, sign=sign: sign * leaf, slope)
    result, state = tx.update(grads, tx.init(params), params, batch=None)
    fall = float(result.outer * slope.outer + jnp.sum(result.inner * slope.inner))
    np.testing.assert_allclose(fall, 0.5 * norm_sq if sign < 0 else norm_sq, rtol=1e-9)
    assert (state.info.dual > 0) == (sign < 0)
    np.testing.assert_allclose(state.info.excess, vp.flat_gap(params), rtol=1e-12)


def test_dynamic_barrier_restarts_at_the_inner_parameters(x64):
  """It has no memory: the state of the first update changes nothing in the second."""
  tx = jaxbo.add_dynamic_barrier(
    vp.flat_inner, barrier_rate=0.5, num_steps=2, inner_optimizer=optax.sgd(0.1, momentum=0.9)
  )
  first, second = vp.start(3.0, (0.5, 0.0)), vp.start(-1.0, (2.0, 1.0))
  grads = jax.tree.map(lambda leaf: -leaf, jax.grad(vp.flat_gap)(second))
  _, used = tx.update(grads, tx.init(first), first, batch=None)
  from_used, _ = tx.update(grads, used, second, batch=None)
  from_new, _ = tx.update(grads, tx.init(second), second, batch=None)
  chex.assert_trees_all_equal(from_used, from_new)


# T3: three minima, each from a start in its basin.

MINIMA = vp.PBGD_MINIMA


def pbgd(gamma, x, num_updates=None):
  tx = jaxbo.v_pbgd(
    0.1,
    vp.pbgd_inner,
    multiplier=gamma,
    num_steps=5,
    inner_optimizer=optax.sgd(0.1),
    project_outer=vp.box(0.0, 3.0),
  )
  num_updates = num_updates or int(40 * gamma)
  return vp.descend(tx, vp.pbgd_outer, vp.start(x, -x), num_updates)[0][0]


@pytest.mark.parametrize(("start", "minimum", "value"), MINIMA)
def test_v_pbgd_finds_the_minimum_of_its_basin(start, minimum, value, x64):
  limit = extrapolated(lambda gamma: pbgd(gamma, start), 100.0)
  np.testing.assert_allclose(limit.outer, minimum, atol=2e-5)
  np.testing.assert_allclose(limit.inner, -minimum, atol=2e-5)
  np.testing.assert_allclose(vp.pbgd_outer(limit), value, atol=2e-5)


@pytest.mark.parametrize(
  ("gamma", "limits"), [(10.0, [0.367, 1.188, 2.824]), (100.0, [0.381, 1.213, 2.829])]
)
def test_v_pbgd_has_the_limit_points_of_the_specification(gamma, limits, x64):
  found = [pbgd(gamma, start, 6000).outer for start, *_ in MINIMA]
  np.testing.assert_allclose(found, limits, atol=6e-4)


def test_the_box_is_kept(x64):
  tx = jaxbo.v_pbgd(
    0.1,
    lambda x, y, batch: (y - x) ** 2,
    multiplier=10.0,
    inner_optimizer=optax.sgd(0.5),
    project_outer=vp.box(0.0, 3.0),
    project_inner=vp.box(-1.0, 1.0),
  )
  outer_loss = lambda p: -p.outer - p.inner
  (params, _), (seen, _) = vp.descend(tx, outer_loss, vp.start(2.0, 0.0), 400)
  assert jnp.all((seen.outer >= 0) & (seen.outer <= 3))
  assert jnp.all((seen.inner >= -1) & (seen.inner <= 1))
  assert params.inner == 1
  # With Y = [-1, 1] the lower value is (1 - x)^2, so the penalty pushes x no further.
  assert params.outer == 3


# T4, T4b.


@pytest.mark.parametrize(("n", "x", "y"), [(1, 2.356194, 4.356194), (2, 2.474926, 4.237463)])
def test_sine_problem(n, x, y, x64):
  def run(gamma):
    tx = jaxbo.v_pbgd(
      0.1, vp.sine_inner, multiplier=gamma, num_steps=2, inner_optimizer=optax.sgd(0.5)
    )
    start = vp.start(2.0, [4.0] * n)
    return vp.descend(tx, vp.sine_outer, start, int(60 * gamma))[0][0]

  limit = extrapolated(run, 100.0)
  np.testing.assert_allclose(limit.outer, x, atol=1e-5)
  np.testing.assert_allclose(limit.inner, y, atol=1e-5)
  f = n * (1.5 * np.pi - 4) ** 2 / (1 + n)
  np.testing.assert_allclose(vp.sine_outer(limit), f, atol=1e-5)


def sine_box(name):
  options = {
    "num_steps": 5,
    "inner_optimizer": optax.sgd(0.01),
    "project_outer": vp.box(1.0, 10.0),
    "project_inner": vp.box(-2.0, 2.0),
  }
  loss = lambda x, y, batch: -jnp.sin(x * y)
  if name == "pdbo":
    return jaxbo.pdbo(5e-4, loss, slack=1e-4, dual_learning_rate=20.0, dual_bound=40.0, **options)
  return jaxbo.v_pbgd(0.01, loss, multiplier=float(name), **options)


def test_sine_problem_on_a_box(x64):
  """T4b: x = 11 pi / 4, y = -2, on the edge of the box."""
  outer_loss = lambda p: p.outer + p.outer * p.inner
  ends = {
    name: vp.descend(sine_box(name), outer_loss, vp.start(8.0, -1.8), 10000)[0][0]
    for name in ("10", "100", "pdbo")
  }
  x = (10 * ends["100"].outer - ends["10"].outer) / 9
  np.testing.assert_allclose(x, 11 * np.pi / 4, atol=1e-5)
  # 1 - cos(2 (x - x*)) = slack.
  np.testing.assert_allclose(
    ends["pdbo"].outer, 11 * np.pi / 4 + np.arccos(1 - 1e-4) / 2, atol=2e-4
  )
  for params in ends.values():
    assert params.inner == -2


# T7 with a penalty.


@pytest.mark.parametrize("gamma", [0.1, 1.0])
def test_ill_scaled_problem_b_1998_04(gamma, x64):
  """r = y - 50 x + 500 solves a linear equation; the optimum is at r = 0."""
  head = jaxbo.add_value_function_penalty(
    lambda x, y, batch: 0.5 * y**2 + 500 * y - 50 * x * y, multiplier=gamma, **EXACT
  )
  tx = optax.chain(
    jaxbo.scale_by_lagrangian_smoothness(head, outer_smoothness=2.0, constraint_smoothness=2501.0),
    optax.sgd(1.0),
  )
  outer_loss = lambda p: (p.outer - 1) ** 2 + (p.inner - 1) ** 2
  (params, _), _ = vp.descend(tx, outer_loss, vp.start(0.0, 0.0), 30000)
  r = 451 / (1 + 1250.5 * gamma)
  np.testing.assert_allclose(params.outer, 1 + 25 * gamma * r, atol=1e-8)
  np.testing.assert_allclose(params.inner, 1 - gamma * r / 2, atol=1e-8)
  np.testing.assert_allclose(params.outer, 25051 / 2501, atol=8e-3 / gamma)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_problem_with_two_optima_mb_2007_17(sign, x64):
  """y^2 = 1/4 - 1/gamma; the start selects the sign."""
  box = vp.box(-1.0, 1.0)
  tx = jaxbo.v_pbgd(
    0.2,
    lambda x, y, batch: 0.5 * x * y**2 + y**4 / 4,
    multiplier=100.0,
    num_steps=3,
    inner_optimizer=optax.sgd(0.5),
    project_outer=box,
    project_inner=box,
  )
  outer_loss = lambda p: (p.outer + 0.5) ** 2 + 0.5 * p.inner**2
  (params, _), _ = vp.descend(tx, outer_loss, vp.start(-0.5, sign), 10000)
  np.testing.assert_allclose(params.outer, -0.25, atol=2e-5)
  np.testing.assert_allclose(params.inner, sign * np.sqrt(0.24), atol=1e-5)


# T8, T9.


@pytest.mark.parametrize("y", [(0.0, 3.0), (-3.0, 1.0), (3.5, -1.0)])
def test_coreset_is_the_projection_on_the_hull(y, x64):
  """T8 with the settings of the published code: y = (1.8, .4) and f = .72; x has no limit."""
  tx = jaxbo.bome(0.05, vp.coreset_inner, inner_optimizer=optax.sgd(0.05), epsilon=1e-4)
  (params, _), _ = vp.descend(tx, vp.coreset_outer, vp.start([0.0] * 4, y), 5000)
  np.testing.assert_allclose(params.inner, [1.8, 0.4], atol=0.03)
  np.testing.assert_allclose(vp.coreset_outer(params), 0.72, atol=0.02)
  np.testing.assert_allclose(jax.nn.softmax(params.outer), [0, 0.8, 0, 0.2], atol=0.02)


def test_min_max_problem(x64):
  """T9: f = x y, g = -x y, from (4, 4)."""
  box = vp.box(-10.0, 10.0)
  tx = jaxbo.bome(
    0.05,
    lambda x, y, batch: -x * y,
    inner_optimizer=optax.sgd(0.05),
    project_outer=box,
    project_inner=box,
  )
  outer_loss = lambda p: p.outer * p.inner
  (params, _), _ = vp.descend(tx, outer_loss, vp.start(4.0, 4.0), 4000)
  np.testing.assert_allclose(params.outer, 0, atol=1e-3)
  np.testing.assert_allclose(outer_loss(params), 0, atol=1e-6)
