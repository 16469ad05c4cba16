"""Every response against the closed form of the quadratic problem, finite differences and T1."""

import functools

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

P = problems.count(problems.OUTER_SHAPES)
LEARNING_RATE = 0.9
SIZES = [
  ((2,), (3,)),
  ((30,), (8,)),
  (problems.OUTER_SHAPES, problems.INNER_SHAPES),
]


@functools.cache
def setting(sizes, double, num_steps):
  """A solved quadratic problem and what stands in ``update``, not at the minimum."""
  outer_shapes, inner_shapes = SIZES[sizes]
  dtype = jnp.float64 if double else jnp.float32
  problem = Quadratic.make(problems.count(outer_shapes), problems.count(inner_shapes))
  solver = jaxbo.inner_solver(problem.inner_loss, optax.sgd(LEARNING_RATE), num_steps)
  x, x_flat = tree_of(outer_shapes, dtype, seed=1)
  y0, y0_flat = tree_of(inner_shapes, dtype, seed=2)
  solution = jax.jit(solver.solve)(x, solver.init(y0), None)
  grads = jax.jit(jax.grad(problem.outer_loss, (0, 1)))(x, solution.params, None)
  return problem, solver, x, solution, grads, x_flat, y0_flat


def hypergradient(head, x, solution, grads, **extra):
  state = head.init(x)
  update = jax.jit(lambda g, s, x, y: head.update(g, s, x, solution=y, batch=None, **extra))
  return update(grads, state, x, solution)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("sizes", range(len(SIZES)))
def test_unrolled_is_the_gradient_of_the_truncated_run(sizes, double):
  with jax.enable_x64(double):
    problem, solver, x, solution, grads, x_flat, y0_flat = setting(sizes, double, 5)
    result, state = hypergradient(jaxbo.add_unrolled_response(solver), x, solution, grads)
    expected = problem.unrolled_hypergradient(x_flat, y0_flat, LEARNING_RATE, 5)
    np.testing.assert_allclose(
      flat(result), expected, rtol=1e-10 if double else 1e-4, atol=1e-12 if double else 1e-5
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(result, x)
    np.testing.assert_allclose(state.info.hypergradient_norm, np.linalg.norm(expected), rtol=1e-4)
    outer = problem.outer_grads(x_flat, flat(solution.params))[0]
    np.testing.assert_allclose(
      state.info.response_norm, np.linalg.norm(expected - outer), rtol=1e-4
    )


def test_truncated_unrolling_has_the_jacobian_of_the_last_steps(x64):
  problem, solver, x, solution, grads, x_flat, y0_flat = setting(2, True, 5)
  result, _ = hypergradient(jaxbo.add_unrolled_response(solver, 2), x, solution, grads)
  outer, inner = problem.outer_grads(x_flat, problem.run(x_flat, y0_flat, LEARNING_RATE, 5))
  expected = outer + problem.run_jacobian(LEARNING_RATE, 2).T @ inner
  np.testing.assert_allclose(flat(result), expected, rtol=1e-10)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("sizes", range(len(SIZES)))
@pytest.mark.parametrize(
  "linear_solver",
  [
    jaxbo.conjugate_gradient(30),
    jaxbo.fixed_point(300, 1.0),
    jaxbo.neumann(300, 1.0),
    jax.scipy.sparse.linalg.cg,
  ],
  ids=["cg", "fixed_point", "neumann", "jax.scipy"],
)
def test_implicit_is_the_gradient_at_the_minimum(sizes, double, linear_solver):
  """The implicit function theorem at (x, y^N), exact also where y^N is no minimum."""
  with jax.enable_x64(double):
    problem, solver, x, solution, grads, x_flat, _ = setting(sizes, double, 5)
    head = jaxbo.add_implicit_response(solver, linear_solver)
    result, state = hypergradient(head, x, solution, grads)
    expected = problem.implicit_hypergradient(x_flat, flat(solution.params))
    theirs = linear_solver is jax.scipy.sparse.linalg.cg
    tolerance = 1e-4 if theirs or not double else 1e-10
    scale = np.linalg.norm(expected)
    np.testing.assert_allclose(flat(result), expected, rtol=0, atol=tolerance * scale)
    chex.assert_trees_all_equal_shapes_and_dtypes(result, x)
    assert not state.info.linear_breakdown
    assert state.info.linear_residual < 1e-4
    assert (state.info.linear_steps == -1) == theirs


def test_unrolled_tends_to_implicit_at_the_known_rate(x64):
  """D5: the Jacobians differ by (I - lr A)^N J*."""
  problem, solver, x, solution, grads, x_flat, _ = setting(2, True, 5)
  unrolled, _ = hypergradient(jaxbo.add_unrolled_response(solver), x, solution, grads)
  head = jaxbo.add_implicit_response(solver, jaxbo.conjugate_gradient(30))
  implicit, _ = hypergradient(head, x, solution, grads)
  inner = problem.outer_grads(x_flat, flat(solution.params))[1]
  left = problem.contraction(LEARNING_RATE, 5) @ problem.jacobian()
  np.testing.assert_allclose(flat(implicit) - flat(unrolled), left.T @ inner, rtol=1e-8, atol=1e-12)


def test_drop_response_keeps_the_outer_gradient():
  _, _, x, solution, grads, *_ = setting(2, False, 5)
  result, state = hypergradient(jaxbo.drop_response(), x, solution, grads)
  chex.assert_trees_all_equal(result, grads[0])
  np.testing.assert_allclose(state.info.hypergradient_norm, np.linalg.norm(flat(grads[0])), 1e-6)


def nonlinear_inner_loss(x, y, batch):
  hidden = jnp.tanh(batch @ y["w"] + y["b"])
  fit = jnp.mean(jax.nn.sigmoid(x["weights"]) * (hidden - 0.3 * jnp.sum(batch, axis=1)) ** 2)
  return fit + jnp.exp(x["ridge"]) * (jnp.sum(y["w"] ** 2) + y["b"] ** 2)


def nonlinear_outer_loss(x, y, batch):
  return jnp.mean(jnp.sin(batch @ y["w"] + y["b"])) + 0.1 * x["ridge"] ** 2


def finite_differences(function, x, step=1e-5):
  vector, unravel = jax.flatten_util.ravel_pytree(x)
  of_vector = jax.jit(lambda v: function(unravel(v)))
  basis = np.eye(len(vector)) * step
  return np.array([(of_vector(vector + e) - of_vector(vector - e)) / (2 * step) for e in basis])


@pytest.mark.parametrize(
  ("method", "optimizer", "num_steps"),
  [
    ("unrolled", optax.sgd(0.3), 4),
    ("unrolled", optax.adam(0.1, eps_root=1e-8), 6),
    ("unrolled", optax.sgd(0.3, momentum=0.9), 3000),
    ("implicit", optax.sgd(0.3, momentum=0.9), 3000),
  ],
)
def test_hypergradient_of_a_nonlinear_problem_equals_finite_differences(
  method, optimizer, num_steps, x64
):
  rng = np.random.default_rng(0)
  train, val = jnp.asarray(rng.normal(size=(2, 7, 3)))
  x = {"weights": jnp.asarray(rng.normal(size=7)), "ridge": jnp.asarray(-2.0)}
  solver = jaxbo.inner_solver(nonlinear_inner_loss, optimizer, num_steps)
  start = solver.init({"w": jnp.asarray(rng.normal(size=3)), "b": jnp.asarray(0.1)})

  def composed(x):
    return nonlinear_outer_loss(x, solver.path(x, start.start, train), val)

  solution = jax.jit(solver.solve)(x, start, train)
  grads = jax.jit(jax.grad(nonlinear_outer_loss, (0, 1)))(x, solution.params, val)
  head = (
    jaxbo.add_unrolled_response(solver)
    if method == "unrolled"
    else jaxbo.add_implicit_response(solver, jaxbo.conjugate_gradient(20))
  )
  result, _ = jax.jit(lambda: head.update(grads, head.init(x), x, solution=solution, batch=train))()
  expected = finite_differences(composed, x)
  assert np.linalg.norm(expected - flat(grads[0])) > 0.01  # The response is no small part.
  np.testing.assert_allclose(flat(result), expected, rtol=2e-5, atol=1e-8)


def test_implicit_uses_the_last_of_per_step_batches_unless_told_otherwise(x64):
  problem, *_ = setting(2, True, 5)
  solver = jaxbo.inner_solver(
    problem.inner_loss, optax.sgd(LEARNING_RATE), 3, per_step_batches=True
  )
  x, x_flat = tree_of(problems.OUTER_SHAPES, jnp.float64, seed=1)
  y0, _ = tree_of(problems.INNER_SHAPES, jnp.float64, seed=2)
  batch = jnp.array([1.0, 2.0, -0.5])
  solution = jax.jit(solver.solve)(x, solver.init(y0), batch)
  grads = jax.jit(jax.grad(problem.outer_loss, (0, 1)))(x, solution.params, None)
  head = jaxbo.add_implicit_response(solver, jaxbo.conjugate_gradient(30))
  update = jax.jit(
    lambda state, **extra: head.update(grads, state, x, solution=solution, batch=batch, **extra)
  )
  outer, inner = problem.outer_grads(x_flat, flat(solution.params))
  for extra, scale in (({}, -0.5), ({"linear_batch": jnp.float64(3.0)}, 3.0)):
    result, _ = update(head.init(x), **extra)
    expected = outer + scale * problem.jacobian().T @ inner
    np.testing.assert_allclose(flat(result), expected, rtol=1e-8)


def test_warm_started_linear_solver_needs_fewer_steps_for_the_same_error(x64):
  problem, solver, x, solution, grads, x_flat, _ = setting(2, True, 5)
  linear_solver = jaxbo.conjugate_gradient(2, warm_start=True)
  head = jaxbo.add_implicit_response(solver, linear_solver, inner_params=solution.params)
  state = head.init(x)
  update = jax.jit(lambda s: head.update(grads, s, x, solution=solution, batch=None))
  residuals = []
  for _ in range(20):
    result, state = update(state)
    residuals.append(float(state.info.linear_residual))
  assert residuals[-1] < 1e-4 * residuals[0]
  inner = problem.outer_grads(x_flat, flat(solution.params))[1]
  np.testing.assert_allclose(
    flat(state.linear_solution), np.linalg.solve(problem.A, inner), rtol=1e-4
  )
  expected = problem.implicit_hypergradient(x_flat, flat(solution.params))
  np.testing.assert_allclose(flat(result), expected, rtol=1e-3)


def test_warm_start_accepts_shapes_and_starts_at_zero():
  _, solver, x, solution, *_ = setting(2, False, 5)
  shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16), solution.params)
  head = jaxbo.add_implicit_response(
    solver, jaxbo.fixed_point(2, 0.5, warm_start=True), inner_params=shapes
  )
  state = head.init(x)
  chex.assert_trees_all_equal(state.linear_solution, jax.tree.map(jnp.zeros_like, solution.params))


def test_a_foreign_solver_that_fails_keeps_the_state_finite():
  _, solver, x, solution, grads, *_ = setting(2, False, 5)
  broken = lambda matvec, b, x0: (jax.tree.map(lambda v: v * jnp.nan, b), None)
  head = jaxbo.add_implicit_response(solver, broken)
  result, state = hypergradient(head, x, solution, grads)
  chex.assert_tree_all_finite((result, state))
  assert state.info.linear_breakdown
  chex.assert_trees_all_equal(result, grads[0])


def test_a_foreign_solver_that_stops_half_way_has_its_residual_measured():
  """Half of the solution leaves half of the right-hand side."""
  problem, solver, x, solution, grads, *_ = setting(0, False, 5)
  half = lambda matvec, b, x0: (jnp.asarray(np.linalg.inv(problem.A) / 2, b.dtype) @ b, None)
  head = jaxbo.add_implicit_response(solver, half)
  _, state = hypergradient(head, x, solution, grads)
  np.testing.assert_allclose(state.info.linear_residual, 0.5, rtol=1e-5)
  assert not state.info.linear_breakdown


def test_all_iterations_share_one_linearisation():
  """The loop of the linear solver has products alone; the loss is not evaluated in it again."""
  loss = lambda x, y, batch: jnp.sum(jnp.tanh(y) ** 2 * x) + jnp.sum(y**2)
  solver = jaxbo.inner_solver(loss, optax.sgd(0.1), 1)
  head = jaxbo.add_implicit_response(solver, jaxbo.conjugate_gradient(5))
  x, y = jnp.ones(2), jnp.ones(2)
  solution = solver.init(y)
  update = lambda x: head.update((x, y), head.init(x), x, solution=solution, batch=None)
  jaxpr = jax.make_jaxpr(update)(x)
  (system,) = (eqn for eqn in jaxpr.eqns if eqn.primitive.name == "custom_linear_solve")
  solve = system.params["jaxprs"].solve.jaxpr
  (loop,) = (eqn for eqn in solve.eqns if eqn.primitive.name == "while")
  assert "tanh" in str(jaxpr)
  assert "tanh" not in str(loop.params["body_jaxpr"])


def test_lineax_plugs_in(x64):
  lineax = pytest.importorskip("lineax", reason="lineax is in the bench group")
  problem, solver, x, solution, grads, x_flat, _ = setting(2, True, 5)

  def solve(matvec, b, x0):
    del x0
    operator = lineax.FunctionLinearOperator(
      matvec, jax.eval_shape(lambda: b), lineax.positive_semidefinite_tag
    )
    return lineax.linear_solve(operator, b, lineax.CG(1e-12, 1e-12)).value, None

  result, state = hypergradient(jaxbo.add_implicit_response(solver, solve), x, solution, grads)
  expected = problem.implicit_hypergradient(x_flat, flat(solution.params))
  np.testing.assert_allclose(flat(result), expected, rtol=1e-8)
  assert state.info.linear_residual < 1e-8


# T1: f = (x - y2)^2 / 2 + (y1 - 1)^2 / 2 and g = y1^2 / 2 - x y1, flat along y2.


def flat_inner_loss(x, y, batch):
  return 0.5 * y[0] ** 2 - x * y[0]


def flat_outer_loss(x, y, batch):
  return 0.5 * (x - y[1]) ** 2 + 0.5 * (y[0] - 1) ** 2


def run_flat_problem(make_head, num_outer_steps, y2=0.0):
  inner = jaxbo.inner_solver(flat_inner_loss, optax.sgd(1.0), 2)
  outer = optax.chain(make_head(inner), optax.sgd(0.2))
  init, step = jaxbo.bilevel_loop(flat_outer_loss, inner, outer)
  state = init(jnp.float32(0.0), jnp.array([0.0, y2]))
  return jax.lax.scan(lambda s, _: step(s, None, None), state, length=num_outer_steps)


@pytest.mark.parametrize(
  "make_head",
  [
    jaxbo.add_unrolled_response,
    lambda s: jaxbo.add_implicit_response(s, jaxbo.conjugate_gradient(10, damping=1e-3)),
    lambda s: jaxbo.add_implicit_response(s, jaxbo.fixed_point(50, 0.5)),
    lambda s: jaxbo.add_implicit_response(s, jaxbo.neumann(50, 0.5)),
    lambda s: jaxbo.add_es_response(s, num_samples=4096),
  ],
  ids=["itd", "damped_cg", "fixed_point", "neumann", "esj"],
)
@pytest.mark.parametrize("y2", [0.0, -2.0])
def test_flat_inner_direction_ends_where_the_theory_says(make_head, y2, request):
  """T1: y2 never moves, so x -> (1 + y2) / 2 and f -> (1 - y2)^2 / 4, not the optimum."""
  state, info = run_flat_problem(make_head, 100, y2)
  response = abs(y2 - 1) / 2
  tolerance = 2e-3 * response
  if "esj" in request.node.name:
    # The noise of D2, sd = |response| sqrt(2 / Q), through x <- (1 - 2 * 0.2) x + 0.2 noise.
    tolerance = 4 * 0.2 / 0.8 * response * np.sqrt(2 / 4096)
  np.testing.assert_allclose(state.x, (1 + y2) / 2, atol=tolerance)
  np.testing.assert_allclose(info.outer_loss[-1], (1 - y2) ** 2 / 4, atol=4 * response * tolerance)
  assert state.solution.params[1] == y2


def test_undamped_conjugate_gradient_on_a_flat_direction_stays_finite_and_says_so():
  state, _ = run_flat_problem(
    lambda s: jaxbo.add_implicit_response(s, jaxbo.conjugate_gradient(10)), 60
  )
  chex.assert_tree_all_finite(state)
  assert optax.tree.get(state.outer_state, "ImplicitInfo").linear_breakdown


# Errors.

HEADS = {
  "add_unrolled_response": jaxbo.add_unrolled_response,
  "add_implicit_response": lambda s: jaxbo.add_implicit_response(s, jaxbo.conjugate_gradient(2)),
  "add_finite_difference_response": jaxbo.add_finite_difference_response,
  "add_es_response": jaxbo.add_es_response,
}


@cases("name", HEADS)
def test_batches_of_another_number_of_steps_are_refused(name):
  solver = jaxbo.inner_solver(
    lambda x, y, batch: jnp.sum((y - batch * x) ** 2), optax.sgd(0.1), 3, per_step_batches=True
  )
  x, head = jnp.ones(2), HEADS[name](solver)
  solution = solver.solve(x, solver.init(jnp.ones(2)), jnp.ones(3))
  with pytest.raises(ValueError, match=r"batch must have the leading axis num_steps=3 .* \(4,\)"):
    head.update((x, x), head.init(x), x, solution=solution, batch=jnp.ones(4))


@cases("name", HEADS)
@cases("wrong", [0.1, optax.sgd(0.1), lambda x, y, batch: y])
def test_a_head_wants_an_inner_solver(name, wrong, as_users_run):
  with pytest.raises(TypeError, match=r"inner must be an InnerSolver, made by jaxbo\.inner_solver"):
    HEADS[name](wrong)


@pytest.mark.parametrize("name", HEADS)
def test_python_floats_are_parameters(name):
  solver = jaxbo.inner_solver(lambda x, y, batch: (y - 2 * x) ** 2, optax.sgd(0.5), 1)
  head = HEADS[name](solver)
  solution = solver.solve(1.0, solver.init(0.0), None)
  grads = jax.grad(lambda x, y: y + 0 * x, (0, 1))(1.0, solution.params)
  result, _ = head.update(grads, head.init(1.0), 1.0, solution=solution, batch=None)
  if name != "add_es_response":
    np.testing.assert_allclose(result, 2.0, rtol=1e-6)
  assert np.isfinite(result)


@pytest.mark.parametrize("name", HEADS)
def test_bad_updates_are_refused(name):
  _, solver, x, solution, grads, *_ = setting(0, False, 5)
  head = HEADS[name](solver)
  state = head.init(x)
  cases = [
    ((grads, state, None), {"solution": solution, "batch": None}, ValueError, "given params"),
    ((grads, state, x), {"batch": None}, TypeError, "given solution="),
    ((grads, state, x), {"solution": solution}, TypeError, "given batch="),
    ((grads[0], state, x), {"solution": solution, "batch": None}, ValueError, "the pair"),
    (
      ((grads[0], grads[0]), state, x),
      {"solution": solution, "batch": None},
      ValueError,
      "df/dy must have the structure and shapes of solution.params",
    ),
    (
      ((grads[1], grads[1]), state, x),
      {"solution": solution, "batch": None},
      ValueError,
      "df/dx must have the structure and shapes of x",
    ),
    (
      (grads, state, x),
      {"solution": solution.params, "batch": None},
      TypeError,
      "solution must be an InnerSolution",
    ),
    (
      (grads, state, jnp.arange(2)),
      {"solution": solution, "batch": None},
      TypeError,
      "x must be real floats, got dtype int32",
    ),
  ]
  for arguments, extra, error, message in cases:
    with pytest.raises(error, match=message) as caught:
      head.update(*arguments, **extra)
    if "x must be" not in message and "df/d" not in message and "solution must" not in message:
      assert name in str(caught.value)


def test_bad_arguments_of_heads_are_refused(as_users_run):
  _, solver, x, solution, grads, *_ = setting(0, False, 5)
  with pytest.raises(ValueError, match="num_steps must be at most the solver's num_steps=5, got 6"):
    jaxbo.add_unrolled_response(solver, 6)
  with pytest.raises(ValueError, match="num_steps must be at least 1"):
    jaxbo.add_unrolled_response(solver, 0)
  with pytest.raises(TypeError, match=r"linear_solver\(matvec, b, x0\)"):
    jaxbo.add_implicit_response(solver, lambda matvec, b: b)
  with pytest.raises(ValueError, match="inner_params must be given"):
    jaxbo.add_implicit_response(solver, jaxbo.conjugate_gradient(2, warm_start=True))
  head = jaxbo.add_implicit_response(
    solver, jaxbo.conjugate_gradient(2, warm_start=True), inner_params=jnp.arange(3)
  )
  with pytest.raises(TypeError, match="inner_params must be real floats, got dtype int32"):
    head.init(jnp.ones(2))
  head = jaxbo.add_implicit_response(
    solver, jaxbo.conjugate_gradient(2, warm_start=True), inner_params=jnp.ones(7)
  )
  with pytest.raises(ValueError, match=r"inner_params must have the structure .* solution\.params"):
    head.update(grads, head.init(x), x, solution=solution, batch=None)
  with pytest.raises(TypeError, match=r"such as conjugate_gradient\(10\), got conjugate_gradient"):
    jaxbo.add_implicit_response(solver, jaxbo.conjugate_gradient)
  head = jaxbo.add_implicit_response(solver, lambda matvec, b, x0: b)
  with pytest.raises(TypeError, match=r"linear_solver must return \(x, info\), got"):
    head.update(grads, head.init(x), x, solution=solution, batch=None)
  for damping in (None, "a", jnp.ones(2)):
    with pytest.raises(TypeError, match="damping must be a number, got"):
      jaxbo.conjugate_gradient(2, damping=damping)


def test_inner_params_of_another_precision_are_refused(x64):
  """The kept solution of the linear system would change its dtype."""
  loss = lambda x, y, batch: 0.5 * jnp.sum((y - x) ** 2)
  solver = jaxbo.inner_solver(loss, optax.sgd(0.5), 2)
  x = jnp.ones(2)
  solution = solver.solve(x, solver.init(jnp.zeros(2)), None)
  for linear_solver in (jaxbo.conjugate_gradient, lambda n, **kw: jaxbo.fixed_point(n, 0.5, **kw)):
    head = jaxbo.add_implicit_response(
      solver, linear_solver(2, warm_start=True), inner_params=jnp.zeros(2, jnp.bfloat16)
    )
    message = r"inner_params must have the dtypes .* got float32 against float64"
    with pytest.raises(TypeError, match=message):
      head.update((x, x), head.init(x), x, solution=solution, batch=None)


RESPONSES = {
  "itd": jaxbo.add_unrolled_response,
  "aid": lambda inner: jaxbo.add_implicit_response(inner, jaxbo.conjugate_gradient(3)),
  "darts": jaxbo.add_finite_difference_response,
  "es": lambda inner: jaxbo.add_es_response(inner, 3),
  "es exact": lambda inner: jaxbo.add_es_response(inner, 3, difference="exact"),
}


def respond(inner, make_response, x):
  tx = make_response(inner)

  @jax.jit
  def at(x):
    y = inner.solve(x, inner.init(jnp.zeros(3)), None)
    grads = (jnp.zeros_like(x), jnp.array([1.0, -2.0, 0.5]))
    return tx.update(grads, tx.init(x), x, solution=y, batch=None)[0]

  return at(x)


@pytest.mark.parametrize("tasks", [False, True], ids=["one task", "tasks"])
@pytest.mark.parametrize("name", RESPONSES)
def test_an_inner_loss_that_ignores_x_is_refused(name, tasks):
  """It may close over ``x``, or add what depends on ``x`` to a loss that does not."""
  x = jnp.ones(3)
  for loss in (
    lambda _, y, batch: jnp.sum((y - 3 * x) ** 2),
    lambda x, y, batch: jnp.sum(y**2) + jnp.sum(x**2),
  ):
    inner = jaxbo.inner_solver(loss, optax.sgd(0.25), 2)
    if tasks:
      inner = jaxbo.over_tasks(inner, 3)
    tx = RESPONSES[name](inner)
    y = inner.init(jnp.zeros(3), x, jnp.zeros(3))
    with pytest.raises(ValueError, match="inner_loss must use its argument x"):
      tx.update((x, y.params), tx.init(x), x, solution=y, batch=jnp.zeros(3))


@pytest.mark.parametrize("name", RESPONSES)
def test_an_inner_loss_that_loses_the_derivative_is_refused_by_who_needs_it(name):
  """Differences of whole runs do not: they respond to a rounded ``x``, too."""
  for lose in (jax.lax.stop_gradient, lambda x: jnp.round(8 * x) / 8):
    loss = lambda x, y, batch, lose=lose: jnp.sum((y - lose(x)) ** 2)
    inner = jaxbo.inner_solver(loss, optax.sgd(0.5), 2)
    if name == "es":
      by_differences = lambda inner: jaxbo.add_es_response(inner, 3, 0.25, directions="orthogonal")
      h = respond(inner, by_differences, jnp.ones(3))
      assert np.linalg.norm(h) > 0.1
    else:
      with pytest.raises(ValueError, match="or lose the derivative"):
        respond(inner, RESPONSES[name], jnp.ones(3))


@pytest.mark.parametrize("optimizer", [optax.lbfgs(), optax.lbfgs(0.7, linesearch=None)])
def test_what_lbfgs_can_be_used_with(optimizer, x64):
  """Its run has no useful derivative: a clear error, or the right number."""
  A = np.diag([1.0, 3.0, 10.0])
  loss = lambda x, y, batch: 0.5 * y @ A @ y - x @ y
  inner = jaxbo.inner_solver(loss, optimizer, 40)
  expected = np.linalg.solve(A, [1.0, -2.0, 0.5])
  h = respond(inner, RESPONSES["aid"], jnp.ones(3))
  np.testing.assert_allclose(h, expected, rtol=1e-8)
  central = lambda inner: jaxbo.add_es_response(
    inner, 3, 1e-3, directions="orthogonal", difference="central"
  )
  np.testing.assert_allclose(respond(inner, central, jnp.ones(3)), expected, rtol=1e-4)
  for name in ("itd", "es exact"):
    with pytest.raises(ValueError, match="inner must not use L-BFGS or a line search"):
      respond(inner, RESPONSES[name], jnp.ones(3))


@pytest.mark.parametrize("name", ["itd", "es"])
def test_a_solution_of_another_solver_is_refused(name):
  loss = lambda x, y, batch: jnp.sum((y - x) ** 2)
  inner, more_steps, adam = (
    jaxbo.inner_solver(loss, optimizer, num_steps)
    for optimizer, num_steps in ((optax.sgd(0.1), 2), (optax.sgd(0.1), 3), (optax.adam(0.1), 2))
  )
  x = jnp.ones(3)
  for other, message in (
    (more_steps, "of add_.*_response, of 2 steps, got one of 3 steps"),
    (adam, "solution must come from this inner solver, got another optimizer's state"),
  ):
    y = other.solve(x, other.init(jnp.zeros(3)), None)
    tx = RESPONSES[name](inner)
    with pytest.raises(ValueError, match=message):
      tx.update((x, x), tx.init(x), x, solution=y, batch=None)


@pytest.mark.parametrize("projected", [False, True])
def test_a_third_level_differentiates_an_implicit_response(projected, x64):
  """In reverse, through conjugate gradient or GMRES: the Hessian of F, by differences of h."""
  inner_loss = lambda x, y, batch: (
    jnp.sum(jnp.cosh(y)) / 2 - jnp.sin(x) @ y + jnp.sum(y**2) * jnp.sum(x**2) / 4
  )
  outer_loss = lambda x, y, batch: jnp.sum((y - 1) ** 4)
  optimizer = optax.sgd(0.3)
  if projected:
    box = jaxbo.bilevel.project_params(lambda y: jnp.clip(y, -9.0, 0.5))
    optimizer = optax.chain(optimizer, box)
  inner = jaxbo.inner_solver(inner_loss, optimizer, 100)
  tx = jaxbo.add_implicit_response(inner, jaxbo.conjugate_gradient(4))

  @jax.jit
  def hypergradient(x):
    y = inner.solve(x, inner.init(jnp.zeros(2)), None)
    grads = jax.grad(outer_loss, (0, 1))(x, y.params, None)
    return tx.update(grads, tx.init(x), x, solution=y, batch=None)[0]

  x, steps = jnp.array([0.3, 0.9]), 1e-5 * np.eye(2)
  expected = [(hypergradient(x + s) - hypergradient(x - s)) / 2e-5 for s in steps]
  np.testing.assert_allclose(jax.jacrev(hypergradient)(x), np.transpose(expected), rtol=1e-6)


@pytest.mark.parametrize("condition", ["gradient", "fixed_point"])
def test_an_implicit_response_inside_shard_map(condition):
  """Each device has a part of the batch, and the losses are means over all of them."""
  over = lambda loss: jax.lax.pmean(loss, "data")
  inner_loss = lambda x, y, batch: over(jnp.mean((y - jnp.sin(x) * batch) ** 2))
  outer_loss = lambda x, y, batch: over(jnp.mean((y - batch) ** 2))
  batch, x = jnp.linspace(0.5, 2.0, 8), jnp.float32(0.4)

  def hypergradient(batch):
    inner = jaxbo.inner_solver(inner_loss, optax.sgd(0.3), 30)
    y = inner.solve(x, inner.init(jnp.float32(0.0)), batch)
    tx = jaxbo.add_implicit_response(inner, jaxbo.conjugate_gradient(3), condition=condition)
    grads = jax.grad(outer_loss, (0, 1))(x, y.params, batch)
    return tx.update(grads, tx.init(x), x, solution=y, batch=batch)[0]

  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  data, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
  divided = jax.shard_map(hypergradient, mesh=mesh, in_specs=data, out_specs=whole)
  mean = np.mean(batch)  # y = sin(x) * mean
  expected = 2 * (np.sin(x) * mean - mean) * np.cos(x) * mean
  np.testing.assert_allclose(jax.jit(divided)(batch), expected, rtol=1e-4)
