"""The inner solver: what a run is, what it stores, and what it refuses."""

import functools
import itertools

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


def quadratic_run(dtype=jnp.float32, num_steps=7, **kwargs):
  problem = Quadratic.make(problems.count(problems.OUTER_SHAPES), 8)
  solver = jaxbo.inner_solver(problem.inner_loss, optax.sgd(0.9), num_steps, **kwargs)
  x, x_flat = tree_of(problems.OUTER_SHAPES, dtype, seed=1)
  y0, y0_flat = tree_of(problems.INNER_SHAPES, dtype, seed=2)
  return problem, solver, x, y0, x_flat, y0_flat


def test_run_of_gradient_descent_equals_the_closed_form(x64):
  problem, solver, x, y0, x_flat, y0_flat = quadratic_run(jnp.float64)
  solution = jax.jit(solver.solve)(x, solver.init(y0), None)
  expected = problem.run(x_flat, y0_flat, 0.9, 7)
  np.testing.assert_allclose(flat(solution.params), expected, rtol=1e-12)
  path = solver.path(x, solution.start, None)
  np.testing.assert_allclose(flat(path), expected, rtol=1e-12)


def test_losses_are_those_before_each_step(x64):
  problem, solver, x, y0, x_flat, y0_flat = quadratic_run(jnp.float64)
  solution = jax.jit(solver.solve)(x, solver.init(y0), None)
  runs = [problem.run(x_flat, y0_flat, 0.9, n) for n in range(7)]
  expected = [0.5 * y @ problem.A @ y - y @ (problem.B @ x_flat + problem.c) for y in runs]
  np.testing.assert_allclose(solution.info.losses, expected, rtol=1e-10)


def test_a_run_is_a_solve_from_any_start_also_of_several_tasks():
  """And it ends where it began if it was not finite."""
  one = jaxbo.inner_solver(lambda x, y, scale: (scale * y - x) ** 2, optax.sgd(0.1, 0.9), 3)
  for inner, batch in ((one, jnp.float32(2.0)), (jaxbo.over_tasks(one, 2), jnp.array([2.0, 3.0]))):
    first = inner.init(jnp.float32(1.0), 0.0, batch)
    run = jax.jit(lambda batch, inner=inner, start=first.start: inner.run(0.5, start, batch))
    solution = inner.solve(jnp.float32(0.5), first, batch)
    chex.assert_trees_all_close(run(batch), solution)
    bad = run(batch * jnp.nan)
    chex.assert_trees_all_equal((bad.params, bad.opt_state), first.start)
    assert not np.any(bad.info.finite)


def test_warm_start_goes_on_and_cold_start_begins_again():
  problem, warm, x, y0, x_flat, y0_flat = quadratic_run()
  solution = warm.solve(x, warm.solve(x, warm.init(y0), None), None)
  np.testing.assert_allclose(
    flat(solution.params), problem.run(x_flat, y0_flat, 0.9, 14), rtol=1e-4
  )
  np.testing.assert_allclose(
    flat(solution.start[0]), problem.run(x_flat, y0_flat, 0.9, 7), rtol=1e-4
  )
  _, cold, *_ = quadratic_run(warm_start=False)
  first = cold.solve(x, cold.init(y0), None)
  second = cold.solve(x, first, None)
  chex.assert_trees_all_equal(first, second)


def test_what_a_warm_start_carries():
  """Parameters alone, or the optimizer's state too; a single loop is one run by default."""
  loss = lambda x, y, batch: jnp.sum((y - x) ** 2)
  solver = functools.partial(jaxbo.inner_solver, loss, optax.adam(0.1))
  x, y0 = jnp.float32(1.0), jnp.zeros(3)
  whole = solver(10).solve(x, solver(10).init(y0), None)

  def halves(num_steps, second, **options):
    short = solver(num_steps, **options)
    solution = short.init(y0)
    for _ in range(10 // num_steps):
      solution = short.solve(x, second(solution, short), None)
    return solution.params

  as_it_is = lambda solution, short: solution
  anew = lambda solution, short: short.init(solution.params)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
  close(halves(5, as_it_is, warm_start="all"), whole.params)
  close(halves(1, as_it_is), whole.params)
  restarted = halves(5, anew)
  close(halves(5, as_it_is), restarted)
  close(halves(5, as_it_is, warm_start="params"), restarted)
  assert np.all(np.abs(restarted - whole.params) > 1e-3)
  close(halves(1, as_it_is, warm_start="params"), halves(1, anew))


def test_a_schedule_begins_anew_with_each_solve():
  """With a decay over the steps of a run, later inner problems are solved too."""
  track = lambda x, y, batch: 0.5 * jnp.sum((y - x) ** 2)
  optimizer = optax.sgd(optax.cosine_decay_schedule(0.5, 20))
  inner = jaxbo.inner_solver(track, optimizer, 20)
  outer_loss = lambda x, y, batch: 0.5 * jnp.sum((y - 3.0) ** 2)
  for method in (jaxbo.itd, jaxbo.aid):
    init, step = jaxbo.bilevel_loop(outer_loss, inner, method(0.2, inner))
    run = lambda state, step=step: jax.lax.scan(
      lambda s, _: (step(s, None, None)[0], None), state, length=50
    )
    state, _ = jax.jit(run)(init(jnp.float32(0.0), jnp.float32(1.0)))
    np.testing.assert_allclose([state.x, state.solution.params], 3.0, rtol=1e-3)


def test_the_memory_of_lbfgs_is_of_one_outer_point(x64):
  rng = np.random.default_rng(0)
  A, b = rng.normal(size=(30, 6)), rng.normal(size=30)
  ridge = lambda x, y, batch: jnp.mean((A @ y - b) ** 2) + jnp.exp(x) * jnp.sum(y**2)
  inner = jaxbo.inner_solver(ridge, optax.lbfgs(), 20)
  solve = jax.jit(lambda x, y: inner.solve(x, y, None))
  y = inner.init(jnp.zeros(6))
  for x in np.linspace(-4.0, 2.0, 20):
    y = solve(x, y)
    exact = np.linalg.solve(A.T @ A / 30 + np.exp(x) * np.eye(6), A.T @ b / 30)
    np.testing.assert_allclose(y.params, exact, rtol=1e-5)


def test_per_step_batches_are_seen_in_order(x64):
  problem, *_ = quadratic_run(jnp.float64)
  solver = jaxbo.inner_solver(problem.inner_loss, optax.sgd(0.9), 3, per_step_batches=True)
  x, x_flat = tree_of(problems.OUTER_SHAPES, jnp.float64, seed=1)
  y0, y = tree_of(problems.INNER_SHAPES, jnp.float64, seed=2)
  batch = jnp.array([1.0, -2.0, 0.5])
  for scale in batch:
    y = y - 0.9 * (problem.A @ y - float(scale) * (problem.B @ x_flat + problem.c))
  solution = solver.solve(x, solver.init(y0), batch)
  np.testing.assert_allclose(flat(solution.params), y, rtol=1e-12)


@pytest.mark.parametrize("remat", [True, 1, 4, 100])
@pytest.mark.parametrize("num_steps", [1, 7, 16])
def test_remat_changes_neither_the_run_nor_its_gradient(remat, num_steps):
  batch = jnp.linspace(0.5, 1.5, num_steps)
  loss = lambda x, y, batch: jnp.sum((jnp.tanh(y) - batch * x) ** 2)

  def run(remat):
    solver = jaxbo.inner_solver(
      loss, optax.adam(0.1, eps_root=1e-8), num_steps, per_step_batches=True, remat=remat
    )
    start = solver.init(jnp.zeros(3)).start
    path = lambda x: jnp.sum(solver.path(x, start, batch) ** 2)
    return jax.jit(jax.value_and_grad(path))(jnp.array([0.1, -0.3, 0.7]))

  chex.assert_trees_all_close(run(remat), run(False), rtol=1e-5)


def test_truncation_stops_the_gradient_before_the_last_steps(x64):
  problem, solver, x, y0, x_flat, y0_flat = quadratic_run(jnp.float64)
  start = solver.init(y0).start
  for last in (1, 3, 7):
    y, pull_back = jax.vjp(lambda x: solver.path(x, start, None, last=last), x)  # noqa: B023
    np.testing.assert_allclose(flat(y), problem.run(x_flat, y0_flat, 0.9, 7), rtol=1e-12)
    (gradient,) = pull_back(jax.tree.map(jnp.ones_like, y))
    # The last k steps have the Jacobian of a run of k steps.
    expected = problem.run_jacobian(0.9, last).T @ np.ones(8)
    np.testing.assert_allclose(flat(gradient), expected, rtol=1e-10)


@cases("last, message", [(0, "1, got 0"), (8, "num_steps=7, got 8")])
def test_truncation_outside_the_run_is_refused(last, message):
  _, solver, x, y0, *_ = quadratic_run()
  with pytest.raises(ValueError, match=f"last must be at .*{message}$"):
    solver.path(x, solver.init(y0).start, None, last=last)


def test_structure_is_the_same_before_and_after_a_solve():
  _, solver, x, y0, *_ = quadratic_run()
  before = solver.init(y0)
  chex.assert_trees_all_equal_shapes_and_dtypes(before, solver.solve(x, before, None))


def test_aux_is_stacked_over_steps_and_keeps_the_structure():
  loss = lambda x, y, batch: (jnp.sum((y - x) ** 2), {"norm": jnp.sum(y**2), "batch": batch})
  solver = jaxbo.inner_solver(loss, optax.sgd(0.25), 3, has_aux=True)
  x, batch = jnp.float32(1.0), jnp.arange(2)
  before = solver.init(jnp.zeros(2), x, batch)
  after = solver.solve(x, before, batch)
  chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
  np.testing.assert_allclose(after.info.aux["norm"], [0.0, 0.5, 2 * 0.75**2])
  assert after.info.aux["batch"].shape == (3, 2)


def test_line_search_optimizers_get_the_loss():
  problem, *_ = quadratic_run()
  solver = jaxbo.inner_solver(problem.inner_loss, optax.lbfgs(), 20)
  x, x_flat = tree_of(problems.OUTER_SHAPES, jnp.float32, seed=1)
  y0, _ = tree_of(problems.INNER_SHAPES, jnp.float32, seed=2)
  solution = jax.jit(solver.solve)(x, solver.init(y0), None)
  np.testing.assert_allclose(flat(solution.params), problem.solution(x_flat), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("per_step", [False, True])
def test_through_equals_the_composed_loss(per_step, x64):
  """Features are computed outside the scan; run and gradients are those of the plain loss."""
  features = lambda x, batch: jnp.tanh(batch @ x)
  head = lambda z, y, batch: 0.5 * jnp.mean((z @ y - jnp.sum(batch, axis=-1)) ** 2)
  composed = lambda x, y, batch: head(features(x, batch), y, batch)
  rng = np.random.default_rng(0)
  x, y0 = jnp.asarray(rng.normal(size=(4, 3))), jnp.asarray(rng.normal(size=3))
  batch = jnp.asarray(rng.normal(size=(5, 6, 4) if per_step else (6, 4)))
  arguments = {"optimizer": optax.sgd(0.3), "num_steps": 5, "per_step_batches": per_step}
  plain = jaxbo.inner_solver(composed, **arguments)
  through = jaxbo.inner_solver(head, **arguments, through=features)
  results = []
  for solver in (plain, through):
    start = solver.init(y0).start
    y, pull_back = jax.vjp(lambda x: solver.path(x, start, batch, last=3), x)  # noqa: B023
    one_batch = batch[-1] if per_step else batch
    results.append(
      (
        y,
        pull_back(jnp.ones(3)),
        solver.loss(x, y, one_batch),
        solver.solve(x, solver.init(y0), batch),
      )
    )
  chex.assert_trees_all_close(*results, rtol=1e-10)


def test_aux_of_python_numbers_does_not_change_its_type():
  """Else the second step would be traced again."""
  loss = lambda x, y, batch: (jnp.sum((y - x) ** 2), {"c": 1.0, "d": 2})
  solver = jaxbo.inner_solver(loss, optax.sgd(0.1), 2, has_aux=True)
  x = jnp.float32(1.0)
  before = solver.init(jnp.zeros(2), x, None)
  after = solver.solve(x, before, None)
  types = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)
  assert types(before) == types(after)


def test_init_copies_and_strips_weak_types():
  solver = jaxbo.inner_solver(lambda x, y, b: (y - x) ** 2, optax.sgd(0.1, momentum=0.9), 2)
  y0 = jnp.asarray(3.0)
  assert y0.weak_type
  solution = solver.init(y0)
  assert not any(leaf.weak_type for leaf in jax.tree.leaves(solution))
  buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((y0, solution))]
  assert len(set(buffers)) == len(buffers)


@cases(
  ("kwargs", "error", "message"),
  [
    ({"num_steps": 0}, ValueError, "num_steps must be at least 1, got 0"),
    ({"num_steps": 2.5}, TypeError, "num_steps must be a positive Python int, got 2.5"),
    ({"remat": 0}, ValueError, "remat must be at least 1, got 0"),
    ({"inner_loss": lambda y, batch: 0.0}, TypeError, r"inner_loss\(x, y, batch\)"),
    ({"optimizer": 0.1}, TypeError, "optimizer must be an optax transformation, .* got 0.1"),
    ({"optimizer": optax.sgd}, TypeError, r"say optax\.sgd\(0\.1\), or a function of x, got <func"),
    ({"optimizer": lambda: optax.sgd(0.1)}, TypeError, r"function optimizer\(x\)"),
    ({"tolerance": 0.1, "remat": True}, ValueError, "remat must be False with tolerance"),
    ({"tolerance": -1.0}, ValueError, "tolerance must be non-negative"),
    ({"warm_start": True}, ValueError, "one of 'params', 'all', False, got True"),
    ({"warm_start": "state"}, ValueError, "one of 'params', 'all', False, got 'state'"),
    ({"start": lambda x: x, "warm_start": "all"}, ValueError, "not be given with start, got 'all'"),
    ({"keep": lambda y, aux: y}, ValueError, "has_aux must be True with keep"),
    ({"keep": lambda y: y, "has_aux": True}, TypeError, r"keep\(y, aux\)"),
    ({"start": lambda: 0}, TypeError, r"start must be a function start\(x\)"),
    ({"start": lambda x: x, "through": lambda x, b: x}, ValueError, "through must be None"),
    (
      {
        "optimizer": lambda x: optax.sgd(x),
        "through": lambda x, b: x,
        "inner_loss": lambda z, y, b: 0.0,
      },
      ValueError,
      "through must be None with an optimizer",
    ),
    (
      {"inner_loss": 3},
      TypeError,
      r"inner_loss must be a function inner_loss\(x, y, batch\), got 3",
    ),
    ({"through": lambda x: x}, TypeError, r"through\(x, batch\)"),
    (
      {"inner_loss": lambda z: 0.0, "through": lambda x, b: x},
      TypeError,
      r"inner_loss\(z, y, batch\)",
    ),
  ],
)
def test_bad_arguments_are_refused_when_built(kwargs, error, message, as_users_run):
  arguments = {
    "inner_loss": lambda x, y, b: jnp.sum((x - y) ** 2),
    "optimizer": optax.sgd(0.1),
    "num_steps": 2,
    **kwargs,
  }
  with pytest.raises(error, match=message):
    jaxbo.inner_solver(**arguments)


@cases(
  ("loss", "kwargs", "error", "message"),
  [
    (
      lambda x, y, b: (x - y) ** 2,
      {},
      ValueError,
      r"inner_loss must return a scalar, got shape \(2,\)",
    ),
    (lambda x, y, b: (jnp.sum(y), 1), {}, TypeError, "has_aux=True"),
    (lambda x, y, b: jnp.sum(y), {"has_aux": True}, TypeError, r"must return \(scalar, aux\)"),
    (lambda x, y, b: jnp.int32(0), {}, TypeError, "inner_loss must return a real float"),
  ],
)
def test_bad_losses_are_refused_when_traced(loss, kwargs, error, message):
  solver = jaxbo.inner_solver(loss, optax.sgd(0.1), 2, **kwargs)
  with pytest.raises(error, match=message):
    solver.solve(jnp.ones(2), solver.init(jnp.ones(2), jnp.ones(2)), None)


@cases(
  ("batch", "message"),
  [
    ({"a": jnp.ones((2, 3)), "b": jnp.ones(3)}, r"batch\['b'\] .* num_steps=2 .* shape \(3,\)"),
    (jnp.float32(1.0), r"num_steps=2 .* shape \(\)"),
    (None, r"num_steps=2, \.\.\."),
  ],
)
def test_per_step_batches_of_another_length_are_refused(batch, message):
  solver = jaxbo.inner_solver(
    lambda x, y, b: jnp.sum(y**2), optax.sgd(0.1), 2, per_step_batches=True
  )
  with pytest.raises(ValueError, match=message):
    solver.solve(jnp.ones(2), solver.init(jnp.ones(2)), batch)


def test_integer_parameters_are_refused():
  solver = jaxbo.inner_solver(lambda x, y, b: jnp.sum(y["w"] * x), optax.sgd(0.1), 2)
  with pytest.raises(TypeError, match=r"y0 must be real floats, got dtype int32 at y0\['w'\]"):
    solver.init({"w": jnp.arange(3)})
  with pytest.raises(TypeError, match="x must be real floats, got dtype int32 at x"):
    solver.solve(jnp.int32(1), solver.init({"w": jnp.ones(3)}), None)


def test_solve_takes_a_solution_not_parameters():
  solver = jaxbo.inner_solver(lambda x, y, b: jnp.sum(y * x), optax.sgd(0.1), 2)
  with pytest.raises(
    TypeError, match=r"solution must be an InnerSolution, say from init\(y0\), got"
  ):
    solver.solve(jnp.float32(1), jnp.ones(3), None)


def test_aux_needs_x_at_init():
  solver = jaxbo.inner_solver(lambda x, y, b: (0.0, 1), optax.sgd(0.1), 2, has_aux=True)
  with pytest.raises(ValueError, match=r"init\(y0, x, batch\)"):
    solver.init(jnp.ones(2))


def test_a_run_stops_once_it_changes_little(x64):
  """The same steps as without a tolerance; what is left out repeats the last loss."""
  loss = lambda x, y, batch: (jnp.sum(batch * (y - x) ** 2), y[0])
  make = lambda **options: jaxbo.inner_solver(
    loss, optax.sgd(0.1), 60, per_step_batches=True, has_aux=True, **options
  )
  whole, early = make(), make(tolerance=1e-3)
  x, y0, batch = jnp.array([1.0, -2.0]), jnp.zeros(2), jnp.linspace(1.0, 1.5, 60)
  step_by_step = [np.zeros(2)]
  for scale in batch:
    step_by_step.append(step_by_step[-1] - 0.2 * scale * (step_by_step[-1] - x))
  norm = np.linalg.norm
  changes = [norm(b - a) / norm(b) for a, b in itertools.pairwise(step_by_step)]
  count = int(np.argmax(np.array(changes) <= 1e-3)) + 1
  assert 10 < count < 50
  solution = jax.jit(early.solve)(x, early.init(y0, x, batch), batch)
  np.testing.assert_allclose(solution.params, step_by_step[count], rtol=1e-12)
  full = whole.solve(x, whole.init(y0, x, batch), batch).info
  for found, expected in ((solution.info.losses, full.losses), (solution.info.aux, full.aux)):
    np.testing.assert_allclose(found[:count], expected[:count], rtol=1e-12)
    np.testing.assert_array_equal(found[count:], found[count - 1])


def test_responses_to_a_run_that_stops_early(x64):
  loss = lambda x, y, batch: jnp.sum((y - jnp.sin(x)) ** 2)
  inner = jaxbo.inner_solver(loss, optax.sgd(0.2), 200, tolerance=1e-12)
  x = jnp.array([0.3, 0.8])
  solution = jax.jit(inner.solve)(x, inner.init(jnp.zeros(2)), None)
  changes = np.diff(solution.info.losses)
  assert np.all(changes[:20] < 0)
  assert np.all(changes[100:] == 0)
  es = {"directions": "orthogonal", "difference": "exact"}
  for tx in (
    jaxbo.add_implicit_response(inner, jaxbo.conjugate_gradient(2)),
    jaxbo.add_es_response(inner, 2, **es),
  ):
    arguments = {"solution": solution, "batch": None}
    h, _ = jax.jit(tx.update)((np.zeros(2), np.ones(2)), tx.init(x), x, **arguments)
    np.testing.assert_allclose(h, np.cos(x), rtol=1e-8)
  tx = jaxbo.add_unrolled_response(inner)
  with pytest.raises(ValueError, match="inner must not have a tolerance"):
    tx.update((0 * x, jnp.ones(2)), tx.init(x), x, solution=solution, batch=None)


@pytest.mark.parametrize(
  "optimizer",
  [
    optax.sgd(optax.schedules.warmup_constant_schedule(0.0, 0.25, 5)),
    optax.MultiSteps(optax.sgd(0.25), 2).gradient_transformation(),
  ],
)
def test_a_step_of_no_length_does_not_end_a_run(optimizer):
  loss = lambda x, y, batch: jnp.sum((y - x) ** 2)
  inner = jaxbo.inner_solver(loss, optimizer, 100, tolerance=1e-4)
  solution = inner.solve(jnp.ones(1), inner.init(jnp.full(1, 3.0)), None)
  np.testing.assert_allclose(solution.params, 1.0, rtol=1e-3)
