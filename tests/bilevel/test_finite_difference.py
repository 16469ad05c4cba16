"""DARTS' response against the closed form, one-step ITD in double precision, and its own paper."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbo
from tests import problems
from tests.problems import Quadratic, flat, tree_of

INNER = {"w": jnp.linspace(-1.0, 1.0, 3), "b": jnp.float32(0.1)}
X = {"a": jnp.float32(0.3), "rate": jnp.linspace(0.5, 1.5, 3)}


def loss(x, y, batch):
  """Nonlinear in both levels, with second and third derivatives between them."""
  fit = jnp.sum(jnp.tanh(x["rate"] * y["w"] + x["a"] * batch) ** 2)
  return fit + jnp.exp(x["a"]) * y["b"] ** 2 * jnp.sum(y["w"] ** 2)


def outer_loss(x, y, batch):
  return jnp.sum(jnp.sin(y["w"]) * x["rate"]) + (y["b"] - 1) ** 2 + 0 * batch


def double(tree):
  return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)


def responses(inner, heads, *, x, y0, batch, solves=2):
  """What each head makes of the gradients at the end of the last of several warm solves."""

  @jax.jit
  def respond():
    solution = inner.init(y0, x, batch)
    for _ in range(solves):
      solution = inner.solve(x, solution, batch)
    val = jnp.zeros((), jax.tree.leaves(y0)[0].dtype)
    grads = jax.grad(lambda x, y: jnp.sum(outer_of(x, y, val)), (0, 1))
    grads = grads(x, solution.params)
    given = {"solution": solution, "batch": batch}
    return grads, [head.update(grads, head.init(x), x, **given) for head in heads]

  outer_of = outer_loss if inner.task is None else jax.vmap(outer_loss, (None, 0, None))
  return respond()


@pytest.mark.parametrize("wide", [False, True])
def test_response_of_a_quadratic_is_the_step_times_the_mixed_product(wide):
  """h = df/dx + xi B' df/dy, whatever the radius, since the mixed derivative is constant."""
  with jax.enable_x64(wide):
    dtype = jnp.float64 if wide else jnp.float32
    problem = Quadratic.make(
      problems.count(problems.OUTER_SHAPES), problems.count(problems.INNER_SHAPES)
    )
    inner = jaxbo.inner_solver(problem.inner_loss, optax.sgd(0.9), 1)
    x, x_flat = tree_of(problems.OUTER_SHAPES, dtype, seed=1)
    y0, y0_flat = tree_of(problems.INNER_SHAPES, dtype, seed=2)
    solution = jax.jit(inner.solve)(x, inner.init(y0), None)
    grads = jax.jit(jax.grad(problem.outer_loss, (0, 1)))(x, solution.params, None)
    outer, v = problem.outer_grads(x_flat, problem.run(x_flat, y0_flat, 0.9, 1))
    for radius in (1e-1, 10.0):
      head = jaxbo.add_finite_difference_response(inner, radius)
      result, state = jax.jit(
        lambda head=head: head.update(grads, head.init(x), x, solution=solution, batch=None)
      )()
      expected = outer + 0.9 * problem.B.T @ v
      tolerance = 1e-12 if wide else 2e-4
      np.testing.assert_allclose(flat(result), expected, rtol=tolerance, atol=tolerance)
      np.testing.assert_allclose(
        state.info.response_norm, np.linalg.norm(expected - outer), rtol=1e-4
      )
      np.testing.assert_allclose(state.info.hypergradient_norm, np.linalg.norm(expected), rtol=1e-4)
      assert state.info.finite


def test_the_points_of_the_difference_are_those_of_the_paper():
  """y ± radius df/dy / |df/dy| around the start of the step: seen by a loss cubic in ``y``."""
  rate, y, v, x, radius = 0.2, 0.7, 1.5, 2.0, 0.25
  inner = jaxbo.inner_solver(lambda x, y, batch: x * y**3, optax.sgd(rate), 1)
  solution = inner.solve(jnp.float32(x), inner.init(jnp.float32(y)), None)
  head = jaxbo.add_finite_difference_response(inner, radius)
  grads = jnp.float32(0.0), jnp.float32(v)
  h, _ = head.update(
    grads, head.init(jnp.float32(x)), jnp.float32(x), solution=solution, batch=None
  )
  expected = -rate * v * ((y + radius) ** 3 - (y - radius) ** 3) / (2 * radius)
  np.testing.assert_allclose(h, expected, rtol=1e-5)


OPTIMIZERS = {
  "sgd": optax.sgd(0.1),
  "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
  "schedule": optax.sgd(optax.linear_schedule(0.0, 0.3, 3)),
  "adam": optax.adam(0.1),
  "decay": optax.chain(optax.clip(0.5), optax.add_decayed_weights(0.1), optax.sgd(0.1)),
  "of x": lambda x: optax.sgd(x["rate"][0] * 0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_response_is_that_of_unrolling_one_step(optimizer, x64):
  """From the optimizer's state at that step, with an error of second order in the radius."""
  inner = jaxbo.inner_solver(loss, optimizer, 1)
  heads = [jaxbo.add_unrolled_response(inner)]
  heads += [jaxbo.add_finite_difference_response(inner, radius) for radius in (1e-1, 1e-2, 1e-4)]
  (outer, _), results = responses(inner, heads, x=double(X), y0=double(INNER), batch=jnp.float64(1))
  exact, *found = (flat(result) for result, _ in results)
  errors = [np.linalg.norm(h - exact) for h in found]
  assert np.linalg.norm(exact - flat(outer)) > 0.01
  np.testing.assert_allclose(errors[0] / errors[1], 100, rtol=0.05)
  np.testing.assert_allclose(found[2], exact, rtol=1e-6)


def test_a_solver_of_more_steps_takes_one_more_from_its_solution(x64):
  long = jaxbo.inner_solver(loss, optax.sgd(0.1, momentum=0.9), 4, warm_start="all")
  one = jaxbo.inner_solver(loss, optax.sgd(0.1, momentum=0.9), 1, warm_start="all")
  x, y0, batch = double(X), double(INNER), jnp.float64(1)
  solution = long.solve(x, long.init(y0), batch)
  here = one.init(y0)._replace(params=solution.params, opt_state=solution.opt_state)
  after = one.solve(x, here, batch)
  grads = jax.grad(outer_loss, (0, 1))(x, solution.params, batch)
  exact, _ = jaxbo.add_unrolled_response(one).update(grads, None, x, solution=after, batch=batch)
  for found in (solution, solution._replace(start=None)):
    head = jaxbo.add_finite_difference_response(long, 1e-4)
    result, _ = head.update(grads, head.init(x), x, solution=found, batch=batch)
    np.testing.assert_allclose(flat(result), flat(exact), rtol=1e-6)


@pytest.mark.parametrize("tasks", [False, True], ids=["one task", "tasks"])
def test_tasks_per_step_batches_and_features(tasks, x64):
  """All are those of one-step unrolling; ``u`` is what the loss sees of ``x``."""
  inner = jaxbo.inner_solver(
    lambda u, y, batch: jnp.sum((jnp.tanh(y["w"]) - u) ** 2) + y["b"] ** 2 * jnp.sum(u),
    optax.sgd(0.1, momentum=0.5),
    1,
    per_step_batches=True,
    through=lambda x, batch: jnp.sin(x["rate"] * batch) + x["a"],
  )
  batch = jnp.array([2.0])
  if tasks:
    inner, batch = jaxbo.over_tasks(inner, 2), jnp.array([[2.0, -1.0]])
  heads = jaxbo.add_unrolled_response(inner), jaxbo.add_finite_difference_response(inner, 1e-4)
  _, ((exact, _), (found, _)) = responses(inner, heads, x=double(X), y0=double(INNER), batch=batch)
  np.testing.assert_allclose(flat(found), flat(exact), rtol=1e-6)


def test_the_last_of_per_step_batches_counts(x64):
  product = lambda x, y, batch: x * y * batch
  inner = jaxbo.inner_solver(product, optax.sgd(0.5), 3, per_step_batches=True)
  x, batch = jnp.float64(1.0), jnp.array([1.0, 2.0, 7.0])
  solution = inner.solve(x, inner.init(jnp.float64(0.0)), batch)
  head = jaxbo.add_finite_difference_response(inner)
  h, _ = head.update((x, x), head.init(x), x, solution=solution, batch=batch)
  np.testing.assert_allclose(h, 1 - 0.5 * 7)


def test_a_zero_inner_gradient_has_response_zero():
  inner = jaxbo.inner_solver(loss, optax.sgd(0.1), 1)
  solution = inner.solve(X, inner.init(INNER), jnp.float32(1))
  head = jaxbo.add_finite_difference_response(inner)
  grads = X, jax.tree.map(jnp.zeros_like, INNER)
  result, state = head.update(grads, head.init(X), X, solution=solution, batch=jnp.float32(1))
  np.testing.assert_array_equal(flat(result), flat(X))
  assert state.info.finite
  assert state.info.response_norm == 0


def test_low_precision_is_as_good_as_its_parameters():
  """A move of 0.01 is lost in bfloat16, so the difference is in float32."""
  narrow = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), tree)
  inner = jaxbo.inner_solver(loss, optax.sgd(0.1), 1)
  head = jaxbo.add_finite_difference_response(inner)
  results = []
  for cast in (narrow, lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)):
    x, y = cast(narrow(X)), cast(narrow(INNER))
    solution = inner.init(y)
    given = {"solution": solution, "batch": jnp.float32(1)}
    zeros = jax.tree.map(jnp.zeros_like, x)
    result, _ = head.update((zeros, y), head.init(x), x, **given)
    results.append(result)
  assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(results[0]))
  np.testing.assert_allclose(flat(results[0]), flat(results[1]), rtol=1e-2)


def test_what_cannot_work_is_refused():
  make = jaxbo.add_finite_difference_response
  from_x = jaxbo.inner_solver(lambda x, y, b: x * y, optax.sgd(0.1), 1, start=lambda x: x)
  with pytest.raises(ValueError, match=r"inner must not have start= .*add_unrolled_response"):
    make(from_x)
  inner = jaxbo.inner_solver(lambda x, y, b: x * y, optax.sgd(0.1), 1)
  for radius in (0.0, -1.0, float("nan")):
    with pytest.raises(ValueError, match="radius must be positive and finite, got"):
      make(inner, radius)
  x = jnp.float32(1.0)
  for inner, says in (
    (jaxbo.inner_solver(lambda x, y, b: y**2, optax.sgd(0.1), 1), "inner_loss must use its argum"),
    (jaxbo.inner_solver(lambda x, y, b: x * y, optax.lbfgs(), 1), "inner must not use L-BFGS"),
  ):
    head = make(inner)
    with pytest.raises(ValueError, match=says):
      head.update((x, x), head.init(x), x, solution=inner.init(x), batch=None)
