"""The value-function heads against NumPy and finite differences; their cost and precision."""

import functools

import chex
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbo
from jaxbo.bilevel import value_function
from tests import problems
from tests.bilevel.value_problems import HEADS, heads
from tests.problems import Quadratic, flat, tree_of

P, Q = (problems.count(s) for s in (problems.OUTER_SHAPES, problems.INNER_SHAPES))
PROBLEM = Quadratic.make(P, Q)
LEARNING_RATE, MOMENTUM, NUM_STEPS = 0.3, 0.8, 3
OPTIONS = {
  "num_steps": NUM_STEPS,
  "inner_optimizer": optax.sgd(LEARNING_RATE, momentum=MOMENTUM),
}
BATCHES = [1.0, -0.5, 0.7, 1.3, 0.2]
CLIP = 0.8


def clip(tree):
  return jax.tree.map(lambda leaf: jnp.clip(leaf, -CLIP, CLIP), tree)


def inner_value(x, y, batch):
  return 0.5 * y @ PROBLEM.A @ y - batch * y @ (PROBLEM.B @ x + PROBLEM.c)


def inner_grad(x, y, batch):
  """``(dg/dx, dg/dy)``."""
  return -batch * PROBLEM.B.T @ y, PROBLEM.A @ y - batch * (PROBLEM.B @ x + PROBLEM.c)


def numpy_run(x, y, trace, batch, regularizer=0.0, project=False):
  """Steps of gradient descent with momentum on the lower value."""
  for _ in range(NUM_STEPS):
    trace = inner_grad(x, y, batch)[1] + regularizer * y + MOMENTUM * trace
    y = y - LEARNING_RATE * trace
    y = np.clip(y, -CLIP, CLIP) if project else y
  return y, trace


def numpy_excess(x, y, y_hat, batch, regularizer=0.0):
  lower = inner_value(x, y_hat, batch) + 0.5 * regularizer * y_hat @ y_hat
  grads = inner_grad(x, y, batch)
  return (
    inner_value(x, y, batch) - lower,
    grads[0] - inner_grad(x, y_hat, batch)[0],
    grads[1],
  )


def decaying(t):
  return 0.2 / (1 + t)


def numpy_primal_dual(
  points, *, rate=decaying, regularizer=0.0, extrapolation=lambda t: 0.0, project=False
):
  slack, bound = 0.3, 0.9
  y_hat, dual, previous = points[0][1], 0.0, None
  for t, ((x, y), batch) in enumerate(zip(points, BATCHES, strict=True)):
    y_hat, _ = numpy_run(x, y_hat, np.zeros(Q), batch, regularizer, project)
    value, slope_x, slope_y = numpy_excess(x, y, y_hat, batch, regularizer)
    constraint = value - slack
    previous = constraint if previous is None else previous
    theta = extrapolation(t)
    dual += rate(t) * ((1 + theta) * constraint - theta * previous)
    dual = min(max(dual, 0.0), bound)
    previous = constraint
    df_dx, df_dy = PROBLEM.outer_grads(x, y)
    grad_x, grad_y = df_dx + dual * slope_x, df_dy + dual * slope_y
    moved = x - grad_x, y - grad_y
    if project:
      moved = tuple(np.clip(vector, -CLIP, CLIP) for vector in moved)
    residual = np.linalg.norm(np.concatenate([x - moved[0], y - moved[1]]))
    residual += max(constraint, 0) + abs(dual * constraint)
    yield (
      (grad_x, grad_y),
      {"constraint": constraint, "dual": dual, "kkt_residual": residual},
      y_hat,
    )


def numpy_dynamic_barrier(points, *, phi, eps):
  for (x, y), batch in zip(points, BATCHES, strict=True):
    y_hat, _ = numpy_run(x, y, np.zeros(Q), batch)
    value, slope_x, slope_y = numpy_excess(x, y, y_hat, batch)
    df_dx, df_dy = PROBLEM.outer_grads(x, y)
    norm_sq = slope_x @ slope_x + slope_y @ slope_y
    barrier = 0.4 * (norm_sq if phi == "gradient" else value)
    dual = max(0.0, (barrier - df_dx @ slope_x - df_dy @ slope_y) / (norm_sq + eps))
    info = {"excess": value, "excess_gradient_norm": np.sqrt(norm_sq), "dual": dual}
    yield (df_dx + dual * slope_x, df_dy + dual * slope_y), info, None


def numpy_penalty(points, *, normalize):
  y_hat = points[0][1]
  for t, ((x, y), batch) in enumerate(zip(points, BATCHES, strict=True)):
    y_hat, _ = numpy_run(x, y_hat, np.zeros(Q), batch)
    value, slope_x, slope_y = numpy_excess(x, y, y_hat, batch)
    df_dx, df_dy = PROBLEM.outer_grads(x, y)
    gamma = 0.5 + t
    scale = min(1 / gamma, 1) if normalize else 1
    info = {"excess": value, "dual": gamma}
    yield (scale * (df_dx + gamma * slope_x), scale * (df_dy + gamma * slope_y)), info, y_hat


def primal_dual(**options):
  options = {"slack": 0.3, "dual_learning_rate": 0.5, "dual_bound": 0.9, **OPTIONS, **options}
  return jaxbo.add_primal_dual_penalty(PROBLEM.inner_loss, **options)


ORACLES = {
  "pdbo": (primal_dual(dual_learning_rate=decaying), numpy_primal_dual),
  "pdbo_extrapolated": (
    primal_dual(dual_learning_rate=0.01, extrapolation=1.0),  # Inside the bounds all the time.
    functools.partial(numpy_primal_dual, rate=lambda t: 0.01, extrapolation=lambda t: 1.0),
  ),
  "pdbo_full": (
    primal_dual(
      dual_learning_rate=decaying,
      extrapolation=lambda t: 0.5 + 0.1 * t,
      value_regularizer=0.7,
      project_inner=clip,
      project_outer=clip,
    ),
    functools.partial(
      numpy_primal_dual, regularizer=0.7, extrapolation=lambda t: 0.5 + 0.1 * t, project=True
    ),
  ),
  "bome": (
    jaxbo.add_dynamic_barrier(PROBLEM.inner_loss, barrier_rate=0.4, epsilon=0.1, **OPTIONS),
    functools.partial(numpy_dynamic_barrier, phi="gradient", eps=0.1),
  ),
  "bome_value": (
    jaxbo.add_dynamic_barrier(PROBLEM.inner_loss, barrier_rate=0.4, phi="value", **OPTIONS),
    functools.partial(numpy_dynamic_barrier, phi="value", eps=1e-8),
  ),
  "penalty": (
    jaxbo.add_value_function_penalty(PROBLEM.inner_loss, multiplier=lambda t: 0.5 + t, **OPTIONS),
    functools.partial(numpy_penalty, normalize=False),
  ),
  "penalty_normalized": (
    jaxbo.add_value_function_penalty(
      PROBLEM.inner_loss, multiplier=lambda t: 0.5 + t, normalize=True, **OPTIONS
    ),
    functools.partial(numpy_penalty, normalize=True),
  ),
}


def trees(t, dtype=jnp.float64):
  """Parameters with leaves (), (3, 4), (2, 3, 5) outside, and as float64 vectors."""
  x, x_flat = tree_of(problems.OUTER_SHAPES, dtype, seed=2 * t)
  y, y_flat = tree_of(problems.INNER_SHAPES, dtype, seed=2 * t + 1)
  return jaxbo.Bilevel(x, y), (x_flat, y_flat)


@jax.jit
def outer_grads(params):
  return jax.grad(lambda p: PROBLEM.outer_loss(p.outer, p.inner, None))(params)


@pytest.mark.parametrize("name", ORACLES)
def test_updates_equal_those_of_numpy(name, x64):
  """Five updates at unrelated points, with momentum, schedules and a batch for each."""
  tx, oracle = ORACLES[name]
  points = [trees(t) for t in range(len(BATCHES))]
  update = jax.jit(lambda g, s, p, b: tx.update(g, s, p, batch=b))
  state = tx.init(points[0][0])
  multipliers = []
  for (params, _), batch, (grads, info, y_hat) in zip(
    points, BATCHES, oracle([vectors for _, vectors in points]), strict=True
  ):
    result, state = update(outer_grads(params), state, params, jnp.float64(batch))
    np.testing.assert_allclose(flat(result.outer), grads[0], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(flat(result.inner), grads[1], rtol=1e-12, atol=1e-12)
    for field, value in info.items():
      np.testing.assert_allclose(getattr(state.info, field), value, rtol=1e-12, atol=1e-12)
    if y_hat is not None:
      np.testing.assert_allclose(flat(state[0]), y_hat, rtol=1e-12, atol=1e-12)
    multipliers.append(info["dual"])
    assert state.info.finite
  assert len(set(multipliers)) > 1
  chex.assert_trees_all_equal_shapes_and_dtypes(result, points[0][0])


@pytest.mark.parametrize("name", ["pdbo", "penalty"])
def test_the_lower_value_iterate_is_not_differentiated_through(name, x64):
  """The result is the gradient of f + dual (g(x, y) - g(x, y_hat)) with y_hat held."""
  tx, _ = ORACLES[name]
  params, (x, y) = trees(0)
  update = jax.jit(lambda p: tx.update(outer_grads(p), tx.init(p), p, batch=jnp.float64(1)))
  result, state = update(params)
  y_hat, dual = state[0], state.info.dual
  assert dual > 0

  def lagrangian(p):
    excess = PROBLEM.inner_loss(p.outer, p.inner, None) - PROBLEM.inner_loss(p.outer, y_hat, None)
    return PROBLEM.outer_loss(p.outer, p.inner, None) + dual * excess

  expected = jax.jit(jax.grad(lagrangian))(params)
  chex.assert_trees_all_close(result, expected, rtol=1e-11, atol=1e-11)

  def value(x, y):
    miss, distance = y - PROBLEM.t, x - PROBLEM.s
    f = 0.5 * miss @ miss + 0.5 * PROBLEM.r * distance @ distance
    return f + float(dual) * (inner_value(x, y, 1.0) - inner_value(x, flat(y_hat), 1.0))

  step = 1e-5
  difference = [(value(x + step * e, y) - value(x - step * e, y)) / (2 * step) for e in np.eye(P)]
  np.testing.assert_allclose(flat(result.outer), difference, atol=1e-8)
  difference = [(value(x, y + step * e) - value(x, y - step * e)) / (2 * step) for e in np.eye(Q)]
  np.testing.assert_allclose(flat(result.inner), difference, atol=1e-8)


@pytest.mark.parametrize("regularizer", [0.0, 0.3])
def test_danskin(regularizer, x64):
  """T10: the gradient of the solved lower value, by finite differences and by the closed form."""
  loss = lambda x, y, batch: 0.5 * y[0] ** 2 - x * y[0]
  lower = value_function.lower_value(loss, optax.sgd(0.5), 200, regularizer=regularizer)
  x, y, step = 1.3, jnp.array([0.4, -2.0]), 1e-5

  def excess(x):
    (y_hat, _), finite = lower.solve(x, lower.init(y), None)
    assert finite
    return lower.excess(jaxbo.Bilevel(x, y), y_hat, None, None)

  at = excess(x)
  value = 0.5 * y[0] ** 2 - x * y[0] + x**2 / (2 * (1 + regularizer))
  np.testing.assert_allclose(at.value, value, atol=1e-10)
  np.testing.assert_allclose(at.gradient.outer, -y[0] + x / (1 + regularizer), atol=1e-10)
  difference = (excess(x + step).value - excess(x - step).value) / (2 * step)
  np.testing.assert_allclose(at.gradient.outer, difference, atol=1e-9)


# Cost.


def count(jaxpr, name):
  """How often a primitive runs: loops count with their lengths."""
  total = 0
  for eqn in jaxpr.eqns:
    times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
    assert eqn.primitive.name != "while"
    total += eqn.primitive.name == name
    for sub in jax.extend.core.jaxprs_in_params(eqn.params):
      total += times * count(sub, name)
  return total


@pytest.mark.parametrize("num_steps", [1, 7])
@pytest.mark.parametrize("name", HEADS)
def test_an_update_costs_num_steps_plus_3_gradients(name, num_steps):
  """A loss with one tanh: its gradient has one too, and so has its value with its gradient."""
  loss = lambda x, y, batch: jnp.sum(jnp.tanh(y - x))
  outer_loss = lambda p: jnp.sum(jnp.tanh(p.outer * p.inner))
  tx = heads(loss, num_steps)[name]
  params = jaxbo.Bilevel(jnp.ones(3), jnp.ones(3))

  def step(params, state):
    return tx.update(jax.grad(outer_loss)(params), state, params, batch=None)

  jaxpr = jax.make_jaxpr(step)(params, tx.init(params)).jaxpr
  assert count(jaxpr, "tanh") == num_steps + 3


def test_the_gap_costs_its_steps_and_one_value():
  loss = lambda x, y, batch: jnp.sum(jnp.tanh(y - x))
  tx = jaxbo.add_primal_dual_penalty(
    loss,
    slack=0.1,
    dual_learning_rate=0.5,
    num_steps=2,
    inner_optimizer=optax.sgd(0.1),
    gap_steps=5,
  )
  params = jaxbo.Bilevel(jnp.ones(3), jnp.ones(3))
  update = lambda p, s: tx.update(p, s, p, batch=None)
  assert count(jax.make_jaxpr(update)(params, tx.init(params)).jaxpr, "tanh") == 2 + 2 + 5 + 1


@pytest.mark.parametrize("name", HEADS)
def test_nothing_is_differentiated_twice(name):
  """The gradient of this loss cannot be differentiated."""

  @jax.custom_jvp
  def only_once(v):
    return v

  @only_once.defjvp
  def _(primals, tangents):
    raise AssertionError("a second derivative")

  @jax.custom_vjp
  def square(v):
    return v**2

  square.defvjp(lambda v: (v**2, v), lambda v, ct: (2 * only_once(v) * ct,))
  loss = lambda x, y, batch: square(y - x)
  with pytest.raises(AssertionError, match="a second derivative"):
    jax.grad(jax.grad(square))(1.0)
  tx = heads(loss, 2)[name]
  params = jaxbo.Bilevel(jnp.float32(1.0), jnp.float32(3.0))
  result, _ = jax.jit(lambda p: tx.update(p, tx.init(p), p, batch=None))(params)
  chex.assert_tree_all_finite(result)


# Batches.


@pytest.mark.parametrize("name", HEADS)
def test_the_steps_of_the_lower_value_may_have_a_batch_of_their_own(name):
  loss = lambda x, y, batch: jnp.sum((y - batch * x) ** 2)
  tx = heads(loss, 3)[name]
  params = jaxbo.Bilevel(jnp.float32(1.0), jnp.ones(2))
  update = jax.jit(functools.partial(tx.update, params, tx.init(params), params))
  shared, _ = update(batch=3.0)
  same, _ = update(batch=3.0, value_batch=3.0)
  other, state = update(batch=3.0, value_batch=-1.0)
  chex.assert_trees_all_equal(shared, same)
  assert shared.outer != other.outer
  if name in ("pdbo", "penalty"):
    y_hat = -1 + 2 * 0.8**3  # From 1 towards -1.
    np.testing.assert_allclose(state[0], y_hat, rtol=1e-5)
    # Both evaluations of the inner loss see batch=.
    excess = 2 * (1 - 3) ** 2 - 2 * (y_hat - 3) ** 2
    seen = state.info.constraint + 0.1 if name == "pdbo" else state.info.excess
    np.testing.assert_allclose(seen, excess, rtol=1e-5)


def test_the_gap_is_that_of_the_batch_of_the_constraint():
  """Not of the batch that the steps of the lower value may have of their own."""
  tx = jaxbo.add_primal_dual_penalty(
    lambda x, y, batch: jnp.sum((y - batch * x) ** 2),
    slack=0.1,
    dual_learning_rate=0.5,
    num_steps=1,
    inner_optimizer=optax.sgd(0.5),  # One step is exact.
    gap_steps=1,
  )
  params = jaxbo.Bilevel(jnp.float32(1.0), jnp.ones(2))
  _, state = tx.update(params, tx.init(params), params, batch=3.0, value_batch=-1.0)
  np.testing.assert_allclose(state.info.gap, 2 * (1 - 3) ** 2, rtol=1e-6)


def test_the_penalty_is_unbiased_given_the_lower_value_iterate(x64):
  """Linear in g: the mean over batches is the update on the mean loss, if y_hat is the same."""
  loss = lambda x, y, batch: jnp.sum((y - jnp.mean(batch * x)) ** 2) + jnp.sum(batch * y)
  tx = heads(loss, 3)["penalty"]
  params = jaxbo.Bilevel(jnp.float64(1.5), jnp.array([1.0, -2.0]))
  grads = optax.tree.ones_like(params)
  one = lambda b: tx.update(grads, tx.init(params), params, batch=b, value_batch=0.3)[0]
  batches = jnp.array([-1.0, 0.5, 2.0, 4.0])

  def mean_loss(x, y, batch):
    return loss(x, y, 0.3) if batch is None else jnp.mean(jax.vmap(lambda b: loss(x, y, b))(batch))

  tx_mean = heads(mean_loss, 3)["penalty"]

  @jax.jit
  def both():
    state = tx_mean.init(params)
    expected, _ = tx_mean.update(grads, state, params, batch=batches, value_batch=None)
    return expected, jax.tree.map(lambda leaf: jnp.mean(leaf, 0), jax.vmap(one)(batches))

  expected, mean = both()
  chex.assert_trees_all_close(mean, expected, rtol=1e-12)


# Precision.


@pytest.mark.parametrize("name", HEADS)
def test_bfloat16_parameters_are_run_in_float32(name):
  """Near the lower value the constraint is a difference of losses of 1e4, 8 bits wide."""
  loss = lambda x, y, batch: jnp.sum((y - x) ** 2) + 1e4
  outer_loss = lambda p: jnp.sum(p.inner) * p.outer
  tx = heads(loss, 4)[name]
  wide = jaxbo.Bilevel(jnp.float32(1.0), jnp.array([1.5, 0.25]))
  narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), wide)
  results = []
  for params in (wide, narrow):
    update = lambda p: tx.update(jax.grad(outer_loss)(p), tx.init(p), p, batch=None)
    result, state = jax.jit(update)(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(result, params)
    results.append((result, state))
  chex.assert_trees_all_close(results[1][1], results[0][1], rtol=1e-2)
  constraint = [optax.tree.get(s, "constraint", optax.tree.get(s, "excess")) for _, s in results]
  np.testing.assert_allclose(constraint[1], constraint[0], rtol=1e-6)
  chex.assert_trees_all_close(
    jax.tree.map(lambda leaf: leaf.astype(jnp.float32), results[1][0]), results[0][0], rtol=2e-2
  )
