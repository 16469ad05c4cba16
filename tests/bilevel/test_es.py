"""The ES response: its mean, its variance, its bias, its keys, and what it shares between runs."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbo
from tests.bilevel.es_estimates import (
  LEARNING_RATE,
  NUM_STEPS,
  assert_within_standard_errors,
  estimates,
  quadratic_setting,
  scalar_directions,
)
from tests.cases import cases
from tests.problems import Quadratic, flat

pytestmark = pytest.mark.slow  # All together, not each.


def directional_derivatives(solver, x, start, grads, key, count, num_samples, batch=None):
  """D8, written anew: every direction from the keys of the law, its derivative by ``jax.jvp``."""
  update_key = jax.random.fold_in(jax.random.key(key), count)
  total = jax.tree.map(jnp.zeros_like, x)
  leaves, structure = jax.tree.flatten(x)
  for sample in range(num_samples):
    keys = jax.random.split(jax.random.fold_in(update_key, sample), len(leaves))
    direction = structure.unflatten(
      [jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
    )
    _, change = jax.jvp(lambda x: solver.path(x, start, batch), (x,), (direction,))
    product = sum(
      jnp.sum(a * b)
      for a, b in zip(jax.tree.leaves(change), jax.tree.leaves(grads[1]), strict=True)
    )
    total = jax.tree.map(lambda t, u: t + product * u / num_samples, total, direction)  # noqa: B023
  return jax.tree.map(jnp.add, grads[0], total)


def test_estimate_equals_the_directional_derivatives_of_its_own_directions(x64):
  """D8, D11 and D12: affine runs, so any smoothing gives the derivative."""
  _, solver, x, first, solution, grads, _ = quadratic_setting()
  start = (first.params, first.opt_state)
  head = jaxbo.add_es_response(solver, num_samples=3, smoothing=0.5, key=7)
  state = head.init(x)
  update = jax.jit(lambda s: head.update(grads, s, x, solution=solution, batch=None))
  derivatives = jax.jit(lambda t: directional_derivatives(solver, x, start, grads, 7, t, 3))
  for count in range(2):
    result, state = update(state)
    expected = derivatives(count)
    chex.assert_trees_all_close(result, expected, rtol=1e-9, atol=1e-10)
  assert state.es_count == 2


def test_smoothing_does_not_matter_for_affine_runs(x64):
  """D1."""
  _, solver, x, _, solution, grads, _ = quadratic_setting()
  results = [
    estimates(solver, x, solution, grads, 2, num_samples=2, smoothing=smoothing)
    for smoothing in (1e-3, 1.0, 100.0)
  ]
  np.testing.assert_allclose(results[1], results[0], rtol=1e-7, atol=1e-8)
  np.testing.assert_allclose(results[2], results[0], rtol=1e-7, atol=1e-8)


def test_mean_is_the_unrolled_hypergradient(x64):
  """D1, on unequal leaves: no leaf is transposed, shrunken or correlated with another."""
  _, solver, x, _, solution, grads, exact = quadratic_setting()
  samples = estimates(solver, x, solution, grads, 2000, num_samples=1)
  assert_within_standard_errors(samples, exact, 4.5)  # The worst of 43 coordinates.


def test_equal_leaves_get_different_directions(x64):
  """One key for both leaves would give the sum of both responses in each."""
  loss = lambda x, y, batch: 0.5 * jnp.sum((y - x["a"] + x["b"]) ** 2)
  solver = jaxbo.inner_solver(loss, optax.sgd(1.0), 1)
  x = {"a": jnp.ones(2), "b": jnp.ones(2)}
  solution = solver.solve(x, solver.init(jnp.zeros(2)), None)
  grads = (jax.tree.map(jnp.zeros_like, x), jnp.array([1.0, -2.0]))
  samples = estimates(solver, x, solution, grads, 1000, num_samples=1)
  assert_within_standard_errors(samples, [1.0, -2.0, -1.0, 2.0])
  one = samples[0].reshape(2, 2)
  assert not np.allclose(np.abs(one[0]), np.abs(one[1]))


@pytest.mark.parametrize(
  ("response", "bias"),
  [
    (lambda x: x**3, lambda mu: 3 * mu**2),
    (lambda x: x * jnp.abs(x) / 2, lambda mu: mu * np.sqrt(2 / np.pi)),
  ],
  ids=["cubic", "kink"],
)
@pytest.mark.parametrize("mu", [0.1, 1.0])
def test_smoothing_bias_is_the_closed_form(response, bias, mu, x64):
  """D4 on T6, at x = 0 where the derivative is 0."""
  loss = lambda x, y, batch: 0.5 * (y - response(x)) ** 2
  solver = jaxbo.inner_solver(loss, optax.sgd(1.0), 1)  # One step of 1 ends at response(x).
  x = jnp.float64(0.0)
  solution = solver.solve(x, solver.init(jnp.float64(0.3)), None)
  grads = (jnp.float64(0.0), jnp.float64(1.0))
  samples = estimates(solver, x, solution, grads, 1000, num_samples=100, smoothing=mu)
  assert_within_standard_errors(samples[:, 0], bias(mu))


def test_minibatches_are_shared_between_runs(x64):
  """D6: shared minibatches leave no error from mu; others give one that grows as 1/mu^2."""
  problem = Quadratic.make(6, 4)
  solver = jaxbo.inner_solver(
    problem.inner_loss, optax.sgd(LEARNING_RATE), NUM_STEPS, per_step_batches=True
  )
  rng = np.random.default_rng(0)
  x, y0 = jnp.asarray(rng.normal(size=6)), jnp.asarray(rng.normal(size=4))
  batch, other = jnp.asarray(1 + 0.3 * rng.normal(size=(2, NUM_STEPS)))
  unrolled = jaxbo.add_unrolled_response(solver)

  @jax.jit
  def solved():
    solution = solver.solve(x, solver.init(y0), batch)
    grads = jax.grad(problem.outer_loss, (0, 1))(x, solution.params, None)
    exact, _ = unrolled.update(grads, None, x, solution=solution, batch=batch)
    return solution, grads, exact

  solution, grads, exact = solved()

  def error(smoothing, batch):
    samples = estimates(
      solver, x, solution, grads, 200, num_samples=4, smoothing=smoothing, batch=batch
    )
    return np.mean(np.sum((samples - flat(exact)) ** 2, axis=1))

  np.testing.assert_allclose(error(1e-3, batch), error(1.0, batch), rtol=1e-6)
  ratio = error(1e-3, other) / error(1e-2, other)
  np.testing.assert_allclose(ratio, 100, rtol=0.1)


def test_run_from_the_same_x_ends_at_the_same_place():
  """A zero direction must give a zero difference, an inner optimizer with momentum included."""
  loss = lambda x, y, batch: jnp.sum((y - jnp.tanh(x) * batch) ** 2)
  solver = jaxbo.inner_solver(loss, optax.adam(0.1), 10)
  batch = jnp.linspace(0.0, 1.0, 3)
  solution = solver.init(jnp.zeros(3))
  for x in (jnp.float32(0.3), jnp.float32(0.5)):
    solution = solver.solve(x, solution, batch)
  chex.assert_trees_all_equal(solver.path(x, solution.start, batch), solution.params)


@pytest.mark.parametrize("sample_batch_size", [1, 3, 7, 100])
def test_chunks_change_nothing_but_rounding(sample_batch_size, x64):
  _, solver, x, _, solution, grads, _ = quadratic_setting()
  kwargs = {"num_samples": 7, "smoothing": 0.1}
  expected = estimates(solver, x, solution, grads, 1, **kwargs)
  result = estimates(solver, x, solution, grads, 1, sample_batch_size=sample_batch_size, **kwargs)
  np.testing.assert_allclose(result, expected, rtol=1e-9, atol=1e-10)


def test_through_perturbs_the_features_and_pulls_back_once(x64):
  """The estimate in x is the estimate in z, of the same key, pulled back through the features."""
  features = lambda x, batch: jnp.tanh(batch @ x)
  head_loss = lambda z, y, batch: 0.5 * jnp.mean((z @ y - 1.0) ** 2)
  rng = np.random.default_rng(0)
  x, batch, y0 = (jnp.asarray(rng.normal(size=s)) for s in ((5, 3), (6, 5), (3,)))
  arguments = {"optimizer": optax.sgd(0.3), "num_steps": 4}
  through = jaxbo.inner_solver(head_loss, **arguments, through=features)
  plain = jaxbo.inner_solver(head_loss, **arguments)
  heads = [jaxbo.add_es_response(solver, 5, key=3) for solver in (through, plain)]

  @jax.jit
  def both():
    z, pull_back = jax.vjp(lambda x: features(x, batch), x)
    solution = through.solve(x, through.init(y0), batch)
    in_x, in_z = (
      head.update((outer, jnp.ones(3)), head.init(at), at, solution=solution, batch=batch)[0]
      for head, at, outer in zip(heads, (x, z), (jnp.ones_like(x), jnp.zeros_like(z)), strict=True)
    )
    return (solution, in_x), (plain.solve(z, plain.init(y0), batch), pull_back(in_z)[0])

  (solution, in_x), (plain_solution, pulled_back) = both()
  chex.assert_trees_all_close(solution, plain_solution, rtol=1e-12)
  np.testing.assert_allclose(in_x, 1.0 + pulled_back, rtol=1e-10)


def test_samples_whose_run_is_not_finite_are_left_out():
  loss = lambda x, y, batch: 0.5 * jnp.sum((y - jnp.where(x > 0, x, jnp.nan)) ** 2)
  solver = jaxbo.inner_solver(loss, optax.sgd(1.0), 1)
  x = jnp.float32(0.5)
  solution = solver.solve(x, solver.init(jnp.float32(0.0)), None)
  head = jaxbo.add_es_response(solver, 50, 1.0, key=1)
  grads = jnp.float32(0.0), jnp.float32(1.0)
  update = jax.jit(lambda state: head.update(grads, state, x, solution=solution, batch=None))
  result, state = update(head.init(x))
  u = scalar_directions(1, 50)
  kept = u[0.5 + u > 0]
  assert 0 < len(kept) < 50
  assert state.info.num_finite == len(kept)
  np.testing.assert_allclose(result, np.mean(kept**2), rtol=1e-5)


def test_no_finite_sample_leaves_the_outer_gradient():
  solver = jaxbo.inner_solver(lambda x, y, batch: jnp.sum(x * y) * jnp.nan, optax.sgd(1.0), 1)
  x = jnp.ones(2)
  solution = solver.init(jnp.ones(2))
  head = jaxbo.add_es_response(solver, 3)
  result, state = head.update((x, x), head.init(x), x, solution=solution, batch=None)
  np.testing.assert_array_equal(result, x)
  assert state.info.num_finite == 0


def test_features_without_a_finite_derivative_leave_the_outer_gradient():
  """All runs are finite, but the response cannot be pulled back through the root at 0."""
  loss = lambda z, y, batch: jnp.sum((y - z) ** 2)
  solver = jaxbo.inner_solver(loss, optax.sgd(0.5), 1, through=lambda x, batch: jnp.sqrt(x))
  x = jnp.array([0.0, 4.0])
  solution = solver.solve(x, solver.init(jnp.zeros(2)), None)
  assert solution.info.finite
  head = jaxbo.add_es_response(solver, 3)
  result, state = head.update((x, x), head.init(x), x, solution=solution, batch=None)
  np.testing.assert_array_equal(result, x)
  assert state.info == (4.0, 0.0, 0)


@functools.cache
def one_step():
  solver = jaxbo.inner_solver(lambda x, y, b: jnp.sum((y - x) ** 2), optax.sgd(0.5), 1)
  x = jnp.ones(3)
  return solver, x, jax.jit(solver.solve)(x, solver.init(jnp.zeros(3)), None)


@pytest.mark.parametrize(
  "key",
  [
    3,
    np.int64(3),
    np.array(3),
    jax.random.PRNGKey(3),
    np.array(jax.random.PRNGKey(3)),
    jax.random.key(3),
  ],
  ids=["int", "numpy", "numpy_scalar", "raw", "numpy_raw", "typed"],
)
def test_every_form_of_a_key_gives_the_same_directions(key):
  solver, x, solution = one_step()
  head = jaxbo.add_es_response(solver, 2, key=key)
  update = jax.jit(lambda: head.update((x, x), head.init(x), x, solution=solution, batch=None))
  result, _ = update()
  expected = estimates(solver, x, solution, (x, x), 4, num_samples=2)[3]
  np.testing.assert_allclose(result, expected, rtol=1e-5)


def test_another_generator_stays_that_generator():
  solver, x, solution = one_step()
  head = jaxbo.add_es_response(solver, 1, key=jax.random.key(0, impl="rbg"))
  update = jax.jit(lambda state: head.update((0 * x, x), state, x, solution=solution, batch=None))
  result, state = update(head.init(x))
  sample_key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0, impl="rbg"), 0), 0)
  u = jax.random.normal(jax.random.split(sample_key, 1)[0], (3,))
  np.testing.assert_allclose(result, jnp.sum(u) * u, rtol=1e-3, atol=1e-3)
  assert state.es_key.shape == (4,)


def test_injected_smoothing_is_a_hyperparameter(x64):
  _, solver, x, _, solution, grads, _ = quadratic_setting()
  head = optax.inject_hyperparams(
    jaxbo.add_es_response, static_args=("inner", "num_samples", "sample_batch_size", "key")
  )(solver, num_samples=2, smoothing=0.1)
  state = head.init(x)
  result, _ = jax.jit(lambda s: head.update(grads, s, x, solution=solution, batch=None))(state)
  expected = estimates(solver, x, solution, grads, 1, num_samples=2, smoothing=0.1)[0]
  np.testing.assert_allclose(flat(result), expected, rtol=1e-9)


@cases(
  ("kwargs", "error", "message"),
  [
    ({"num_samples": 0}, ValueError, "num_samples must be at least 1, got 0"),
    ({"num_samples": 2.0}, TypeError, "num_samples must be a positive Python int, got 2.0"),
    ({"smoothing": 0.0}, ValueError, "smoothing must be positive and finite, got 0.0"),
    ({"smoothing": -0.01}, ValueError, "smoothing must be positive and finite, got -0.01"),
    ({"smoothing": float("nan")}, ValueError, "smoothing must be positive"),
    ({"sample_batch_size": 0}, ValueError, "sample_batch_size must be at least 1, got 0"),
    ({"key": 0.5}, TypeError, "key must be an int, a raw key array or a typed key"),
    ({"key": jnp.zeros((2, 2), jnp.uint32)}, TypeError, "key must be an int, a raw key array"),
  ],
)
def test_bad_arguments_are_refused(kwargs, error, message, as_users_run):
  solver = jaxbo.inner_solver(lambda x, y, b: jnp.sum(y), optax.sgd(0.5), 1)
  with pytest.raises(error, match=message):
    jaxbo.add_es_response(solver, **kwargs)


def test_features_that_are_no_floats_are_refused():
  solver = jaxbo.inner_solver(
    lambda z, y, b: jnp.sum(z * y), optax.sgd(0.5), 1, through=lambda x, b: (x * 2).astype(int)
  )
  x = jnp.ones(2)
  head = jaxbo.add_es_response(solver)
  with pytest.raises(TypeError, match="the output of through must be real floats, got dtype int32"):
    head.update((x, x), head.init(x), x, solution=solver.init(x), batch=None)
