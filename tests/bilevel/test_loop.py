"""Whole methods: the loop and the aliases on problems whose optimum is known."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbo
from tests import problems
from tests.cases import cases
from tests.problems import Quadratic, flat, tree_of


def heads(solver, learning_rate):
  """Every response that is exact, up to what an inner run of ``solver`` leaves."""
  return {
    "unrolled": jaxbo.add_unrolled_response(solver),
    "cg": jaxbo.add_implicit_response(solver, jaxbo.conjugate_gradient(10)),
    "fixed_point": jaxbo.add_implicit_response(solver, jaxbo.fixed_point(200, learning_rate)),
    "neumann": jaxbo.add_implicit_response(solver, jaxbo.neumann(200, learning_rate)),
  }


EXACT = pytest.mark.parametrize("name", ["unrolled", "cg", "fixed_point", "neumann"])


def descend(outer_loss, solver, outer, x, y0, num_steps):
  """The outer parameters and the solution after ``num_steps`` steps, in one scan."""
  init, step = jaxbo.bilevel_loop(outer_loss, solver, outer)

  @jax.jit
  def run(state):
    return jax.lax.scan(lambda state, _: step(state, None, None), state, length=num_steps)

  state, info = run(init(x, y0))
  return state, info


@EXACT
def test_quadratic_problem_ends_at_its_optimum(name, x64):
  """T0 on nested parameters, against one linear solve."""
  problem = Quadratic.make(problems.count(problems.OUTER_SHAPES), 8, condition=2)
  solver = jaxbo.inner_solver(problem.inner_loss, optax.sgd(1.0), 30)
  x, _ = tree_of(problems.OUTER_SHAPES, jnp.float64, seed=1)
  y0, _ = tree_of(problems.INNER_SHAPES, jnp.float64, seed=2)
  jacobian = problem.jacobian()
  smoothness = problem.r + np.linalg.norm(jacobian, 2) ** 2
  outer = optax.chain(heads(solver, 1.0)[name], optax.sgd(1.9 / (smoothness + problem.r)))
  state, info = descend(problem.outer_loss, solver, outer, x, y0, 300)
  np.testing.assert_allclose(flat(state.x), problem.optimum(), atol=1e-6)
  np.testing.assert_allclose(
    flat(state.solution.params), problem.solution(problem.optimum()), atol=1e-6
  )
  assert info.hypergradient_norm[-1] < 1e-6 < info.hypergradient_norm[0]


def toy(scale=1.0):
  """T5, which sees a response that is missing or shrunken by ``scale``: it ends at 2 / (1 + s)."""
  solver = jaxbo.inner_solver(lambda x, y, batch: (y - x) ** 2, optax.sgd(0.25), 20)
  shrink = lambda grads: (grads.x, scale * grads.y)
  return lambda x, y, batch: x * y - 2 * x + 1, solver, shrink


@EXACT
def test_no_response_is_shrunken(name, x64):
  outer_loss, solver, _ = toy()
  outer = optax.chain(heads(solver, 0.25)[name], optax.sgd(0.1))
  state, _ = descend(outer_loss, solver, outer, jnp.zeros(()), jnp.zeros(()), 100)
  np.testing.assert_allclose(state.x, 1, atol=1e-6)


def test_es_response_is_not_shrunken(x64):
  """Noise of variance 2 / Q at a learning rate of .05 leaves sqrt(.05 / 4 * 2 / Q) around 1."""
  outer_loss, solver, _ = toy()
  outer = optax.chain(jaxbo.add_es_response(solver, 64, 1e-2, key=3), optax.sgd(0.05))
  state, _ = descend(outer_loss, solver, outer, jnp.zeros(()), jnp.zeros(()), 200)
  np.testing.assert_allclose(state.x, 1, atol=4 * (0.05 / 4 * 2 / 64) ** 0.5)


@pytest.mark.parametrize("scale", [0.5, 0.1, 0.01])
def test_the_toy_sees_a_shrunken_response(scale, x64):
  outer_loss, solver, shrink = toy(scale)
  response = jaxbo.add_unrolled_response(solver)
  shrunken = lambda grads, *args, **extra: response.update(shrink(grads), *args, **extra)
  head = optax.GradientTransformationExtraArgs(response.init, shrunken)
  outer = optax.chain(head, optax.sgd(0.1))
  state, _ = descend(outer_loss, solver, outer, jnp.zeros(()), jnp.zeros(()), 300)
  np.testing.assert_allclose(state.x, 2 / (1 + scale), atol=1e-6)


def test_dropped_response_ends_where_the_direct_gradient_vanishes(x64):
  outer_loss, solver, _ = toy()
  outer = optax.chain(jaxbo.drop_response(), optax.sgd(0.1))
  state, _ = descend(outer_loss, solver, outer, jnp.zeros(()), jnp.zeros(()), 300)
  np.testing.assert_allclose(state.x, 2, atol=1e-6)


@EXACT
def test_ill_scaled_problem_b_1998_04(name, x64):
  """T7: the response Jacobian is 50, so dropping it would end at x = 1."""
  solver = jaxbo.inner_solver(
    lambda x, y, batch: 0.5 * y**2 + 500 * y - 50 * x * y, optax.sgd(0.5), 60
  )
  outer_loss = lambda x, y, batch: (x - 1) ** 2 + (y - 1) ** 2
  outer = optax.chain(heads(solver, 0.5)[name], optax.sgd(0.1 / 5002))
  state, info = descend(outer_loss, solver, outer, jnp.zeros(()), jnp.zeros(()), 300)
  np.testing.assert_allclose(state.x, 25051 / 2501, rtol=1e-7)
  np.testing.assert_allclose(state.solution.params, 0.819672, atol=1e-5)
  np.testing.assert_allclose(info.outer_loss[-1], 81.327869, rtol=1e-7)


@EXACT
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_problem_with_two_optima_mb_2007_17(name, sign, x64):
  """T7: the start of the inner run selects one of two optima, y = -.5 or .5."""
  solver = jaxbo.inner_solver(
    lambda x, y, batch: 0.5 * x * y**2 + y**4 / 4, optax.sgd(0.5), 60, warm_start=False
  )
  outer_loss = lambda x, y, batch: (x + 0.5) ** 2 + 0.5 * y**2
  outer = optax.chain(heads(solver, 0.5)[name], optax.sgd(0.2))
  state, info = descend(outer_loss, solver, outer, jnp.array(-0.5), jnp.array(sign), 100)
  np.testing.assert_allclose(state.x, -0.25, atol=1e-6)
  np.testing.assert_allclose(state.solution.params, sign * 0.5, atol=1e-6)
  np.testing.assert_allclose(info.outer_loss[-1], 0.1875, atol=1e-9)


def small(**kwargs):
  solver = jaxbo.inner_solver(lambda x, y, batch: (y - batch * x) ** 2, optax.sgd(0.25), 4)
  outer_loss = lambda x, y, batch: (y - batch) ** 2 + 0.1 * x**2
  return solver, outer_loss


def test_step_is_the_loop_of_the_contract():
  """And ``info`` says what a user would have logged."""
  solver, outer_loss = small()
  head = jaxbo.add_implicit_response(
    solver, jaxbo.conjugate_gradient(1, damping=0.1, warm_start=True), inner_params=jnp.zeros(())
  )
  outer = optax.chain(head, optax.adam(0.1))
  train, val = jnp.array(1.5), jnp.array(2.0)

  @jax.jit
  def by_hand(x, y, state):
    y = solver.solve(x, y, train)
    grads = jaxbo.outer_grad(outer_loss)(x, y.params, val)
    updates, state = outer.update(grads, state, x, solution=y, batch=train)
    return optax.apply_updates(x, updates), y, state, grads.loss

  init, step = jaxbo.bilevel_loop(outer_loss, solver, outer)
  x = jnp.ones(())
  state, y, outer_state = init(x, jnp.zeros(())), solver.init(jnp.zeros(())), outer.init(x)
  for _ in range(2):
    state, info = jax.jit(step)(state, train, val)
    x, y, outer_state, loss = by_hand(x, y, outer_state)
    chex.assert_trees_all_close(tuple(state), (x, y, outer_state), rtol=1e-5)
    np.testing.assert_allclose(info.outer_loss, loss, rtol=1e-6)
    chex.assert_trees_all_close(info.inner_losses, y.info.losses, rtol=1e-6)
    implicit = optax.tree.get(outer_state, "ImplicitInfo")
    np.testing.assert_allclose(info.hypergradient_norm, implicit.hypergradient_norm, rtol=1e-6)
    np.testing.assert_allclose(info.linear_residual, implicit.linear_residual, atol=1e-6)
  assert info.hypergradient_norm > 0
  assert info.aux is None


def test_the_report_tells_of_a_response_that_was_left_out():
  """Weights of zero: the gradient of Adam's square root is infinite at the inner gradient 0."""
  a = np.random.default_rng(0).normal(size=(10, 3))
  inner_loss = lambda x, y, batch: jnp.sum(x * (a @ y - batch) ** 2)
  outer_loss = lambda x, y, batch: jnp.mean((a @ y - batch) ** 2)
  for optimizer, finite in ((optax.adam(0.1), False), (optax.sgd(0.1), True)):
    for head, expected in (
      (jaxbo.add_unrolled_response, finite),
      (jaxbo.add_es_response, True),
      (lambda _: jaxbo.drop_response(), True),
    ):
      inner = jaxbo.inner_solver(inner_loss, optimizer, 1)
      init, step = jaxbo.bilevel_loop(outer_loss, inner, optax.chain(head(inner), optax.sgd(0.1)))
      step = jax.jit(step)
      _, info = step(init(jnp.zeros(10), jnp.zeros(3)), jnp.ones(10), jnp.ones(10))
      assert info.response_finite == expected
      assert info.inner_finite
      _, info = step(init(jnp.ones(10), jnp.zeros(3)), jnp.full(10, jnp.nan), jnp.ones(10))
      assert not info.inner_finite


def test_what_does_not_apply_is_reported_as_nan():
  solver, outer_loss = small()
  init, step = jaxbo.bilevel_loop(outer_loss, solver, jaxbo.itd(0.1, solver))
  _, info = step(init(jnp.ones(()), jnp.zeros(())), jnp.array(1.5), jnp.array(2.0))
  assert jnp.isnan(info.linear_residual)
  assert jnp.isfinite(info.hypergradient_norm)


def test_aux_of_both_losses_comes_out():
  solver = jaxbo.inner_solver(
    lambda x, y, batch: ((y - batch * x) ** 2, {"y": y}), optax.sgd(0.25), 4, has_aux=True
  )
  init, step = jaxbo.bilevel_loop(
    lambda x, y, batch: ((y - batch) ** 2, y), solver, jaxbo.itd(0.1, solver), has_aux=True
  )
  train, val = jnp.array(1.5), jnp.array(2.0)
  state, info = jax.jit(step)(init(jnp.ones(()), jnp.zeros(()), train), train, val)
  assert info.aux == state.solution.params
  assert state.solution.info.aux["y"].shape == (4,)
  assert state.solution.info.aux["y"][0] == 0


def test_state_is_strongly_typed_and_shares_no_buffer_with_what_was_given():
  """So that the whole state can be donated, and the first step is the only trace."""
  solver, outer_loss = small()
  x, y0 = jnp.asarray(1.0), jnp.asarray(0.0)
  assert x.weak_type
  outer = optax.chain(jaxbo.esj(0.1, solver, 2), optax.ema(0.9))
  init, step = jaxbo.bilevel_loop(outer_loss, solver, outer)
  state = init(x, y0)
  assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))
  expected, _ = jax.jit(step)(state, jnp.array(1.5), jnp.array(2.0))
  donating = jax.jit(step, donate_argnums=0, keep_unused=True)
  after, _ = donating(state, jnp.array(1.5), jnp.array(2.0))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
  chex.assert_trees_all_close(after, expected, rtol=1e-6)
  assert (x, y0) == (1.0, 0.0)


def test_a_state_that_is_the_parameters_is_copied():
  """A transformation may keep the parameters themselves; both are donated."""
  solver, outer_loss = small()
  keeper = optax.GradientTransformation(lambda params: params, lambda g, state, params: (g, state))
  init, _ = jaxbo.bilevel_loop(outer_loss, solver, optax.chain(jaxbo.itd(0.1, solver), keeper))
  state = init(jnp.ones(()), jnp.zeros(()))
  pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
  assert len(set(pointers)) == len(pointers)


@cases(
  ("outer_loss", "error", "message"),
  [
    (lambda x, y: y, TypeError, r"outer_loss must be a function outer_loss\(x, y, batch\), got"),
    (lambda x, y, batch: (y, y), TypeError, "outer_loss must return a scalar, got a tuple"),
    (
      lambda x, y, batch: jnp.stack([y, y]),
      ValueError,
      r"outer_loss must return a scalar, got shape \(2,\)",
    ),
    (lambda x, y, batch: jnp.int32(1), TypeError, "outer_loss must return a real float"),
  ],
)
def test_bad_outer_losses_are_refused(outer_loss, error, message):
  solver, _ = small()

  def trace():
    init, step = jaxbo.bilevel_loop(outer_loss, solver, jaxbo.itd(0.1, solver))
    step(init(jnp.ones(()), jnp.zeros(())), jnp.array(1.5), jnp.array(2.0))

  with pytest.raises(error, match=message):
    trace()


def test_aux_that_is_promised_must_come():
  solver, outer_loss = small()
  init, step = jaxbo.bilevel_loop(outer_loss, solver, jaxbo.itd(0.1, solver), has_aux=True)
  with pytest.raises(TypeError, match=r"outer_loss must return \(scalar, aux\) with has_aux=True"):
    step(init(jnp.ones(()), jnp.zeros(())), jnp.array(1.5), jnp.array(2.0))


WRONG_ORDER = {
  "no response: sgd": lambda itd: optax.sgd(0.1),
  "no response: identity": lambda itd: optax.identity(),
  "clip before": lambda itd: optax.chain(optax.clip(1.0), itd),
  "decay before": lambda itd: optax.chain(optax.add_decayed_weights(0.1), itd),
  "clip before, by name": lambda itd: optax.named_chain(("clip", optax.clip(1.0)), ("head", itd)),
  "clip before, injected": lambda itd: optax.inject_hyperparams(
    lambda c: optax.chain(optax.clip(c), itd)
  )(1.0),
  "MultiSteps": lambda itd: optax.MultiSteps(itd, 2),
  "apply_if_finite": lambda itd: optax.apply_if_finite(itd, 2),
}


@pytest.mark.parametrize("name", WRONG_ORDER)
def test_an_outer_that_does_not_begin_with_a_response_is_refused(name, as_users_run):
  solver, outer_loss = small()
  outer = WRONG_ORDER[name](jaxbo.itd(0.1, solver))
  init, step = jaxbo.bilevel_loop(outer_loss, solver, outer)
  with pytest.raises(ValueError, match="outer must begin with a response: OuterGrads are not grad"):
    step(init(jnp.ones(()), jnp.zeros(())), jnp.array(1.5), jnp.array(2.0))


@pytest.mark.parametrize("name", [name for name in WRONG_ORDER if not name.startswith("no ")])
def test_a_direct_update_does_not_act_on_the_pair_either(name, as_users_run):
  """Before, a clip clipped both gradients and said nothing."""
  solver, outer_loss = small()
  outer = optax.with_extra_args_support(WRONG_ORDER[name](jaxbo.itd(0.1, solver)))
  x, train = jnp.ones(()), jnp.array(1.5)
  solution = solver.solve(x, solver.init(jnp.zeros(())), train)
  grads = jaxbo.outer_grad(outer_loss)(x, solution.params, jnp.array(2.0))
  with pytest.raises(TypeError, match="put a response, such as"):
    outer.update(grads, outer.init(x), x, solution=solution, batch=train)


def test_outer_grads_are_those_of_jax_with_the_loss_and_aux():
  solver, outer_loss = small()
  x, y, val = jnp.float32(0.5), jnp.float32(1.5), jnp.float32(2.0)
  loss, pair = jax.value_and_grad(outer_loss, (0, 1))(x, y, val)
  with_aux = lambda x, y, val: (outer_loss(x, y, val), {"val": val})
  for function, aux in ((outer_loss, None), (with_aux, {"val": val})):
    grads = jaxbo.outer_grad(function, has_aux=aux is not None)(x, y, val)
    chex.assert_trees_all_equal((tuple(grads), grads.loss, grads.aux), (pair, loss, aux))
  head = jaxbo.add_unrolled_response(solver)
  solution = solver.solve(x, solver.init(y), val)
  given = {"solution": solution, "batch": val}
  ours = head.update(grads, head.init(x), x, **given)
  chex.assert_trees_all_equal(ours, head.update(pair, head.init(x), x, **given))
  with pytest.raises(TypeError, match=r"outer_loss must return \(scalar, aux\) with has_aux=True"):
    jaxbo.outer_grad(outer_loss, has_aux=True)(x, y, val)


def test_wrappers_go_behind_a_response_and_hyperparameters_around_it():
  solver, outer_loss = small()
  response = jaxbo.add_unrolled_response(solver)

  def after_one_step(outer):
    init, step = jaxbo.bilevel_loop(outer_loss, solver, outer)
    return step(init(jnp.ones(()), jnp.zeros(())), jnp.array(1.5), jnp.array(2.0))[0].x

  plain = after_one_step(jaxbo.itd(0.1, solver))
  assert abs(plain - 1) > 0.01
  waits = after_one_step(optax.chain(response, optax.MultiSteps(optax.sgd(0.1), 2)))
  guarded = after_one_step(optax.chain(response, optax.apply_if_finite(optax.sgd(0.1), 2)))
  injected = after_one_step(optax.inject_hyperparams(jaxbo.itd, static_args="inner")(0.1, solver))
  np.testing.assert_allclose([waits, guarded, injected], [1, plain, plain], rtol=1e-6)


@pytest.mark.parametrize("which", ["x", "y0"])
@pytest.mark.parametrize("leaf", [jnp.tanh, "tanh"], ids=["function", "string"])
def test_a_module_that_was_not_split_is_refused(which, leaf):
  solver, outer_loss = small()
  init, _ = jaxbo.bilevel_loop(outer_loss, solver, jaxbo.itd(0.1, solver))
  values = {"x": jnp.ones(()), "y0": jnp.ones(())} | {which: {"act": leaf, "w": jnp.ones(2)}}
  with pytest.raises(TypeError, match=rf"{which} must be .* at {which}\['act'\]; split a module"):
    init(**values)


@cases("which", ["x", "y0"])
def test_integer_parameters_are_refused(which):
  solver, outer_loss = small()
  init, _ = jaxbo.bilevel_loop(outer_loss, solver, jaxbo.itd(0.1, solver))
  values = {"x": jnp.ones(()), "y0": jnp.ones(()), which: jnp.ones((), jnp.int32)}
  with pytest.raises(TypeError, match=f"{which} must be real floats, got dtype int32"):
    init(**values)


def test_the_outer_update_is_given_the_loss():
  """As optax's tails want it: reduce_on_plateau halves its scale in each step without progress."""
  inner = jaxbo.inner_solver(lambda x, y, batch: (y - x) ** 2, optax.sgd(0.5), 1)
  plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1)
  outer = optax.chain(jaxbo.drop_response(), plateau)
  init, step = jaxbo.bilevel_loop(lambda x, y, batch: 0.0 * (x + y) + 1.0, inner, outer)
  state = init(jnp.float32(0.0), jnp.float32(0.0))
  for _ in range(3):
    state, _ = step(state, None, None)
  assert optax.tree.get(state, "scale") == 0.25


TAILS = {
  "plateau": (optax.chain(optax.sgd(0.02), optax.contrib.reduce_on_plateau()), 60),
  "polyak": (optax.polyak_sgd(), 60),
  "lbfgs": (optax.lbfgs(), 6),
  "backtracking": (optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(20)), 20),
}


@pytest.mark.parametrize(("name", "head"), [*((name, "itd") for name in TAILS), ("lbfgs", "aid")])
def test_optimizers_that_need_the_loss_follow_a_response(name, head):
  """A line search evaluates the outer loss at the end of the inner run; y* = x ** 2 here."""
  tail, num_steps = TAILS[name]
  inner = jaxbo.inner_solver(lambda x, y, batch: jnp.sum((y - x**2) ** 2), optax.sgd(0.25), 40)
  outer_loss = lambda x, y, batch: jnp.sum((y - batch) ** 2)
  init, step = jaxbo.bilevel_loop(outer_loss, inner, getattr(jaxbo, head)(tail, inner))
  run = lambda state: jax.lax.scan(
    lambda s, _: (step(s, None, jnp.array([4.0, 1.0]))[0], None), state, length=num_steps
  )[0]
  state = jax.jit(run)(init(jnp.array([1.5, 0.8]), jnp.zeros(2)))
  np.testing.assert_allclose(state.x, [2.0, 1.0], rtol=1e-2)
