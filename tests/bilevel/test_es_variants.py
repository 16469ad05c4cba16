"""Families of directions, kinds of differences and ways to sum, as the ES response uses them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbo
from jaxbo.bilevel.directions import FAMILIES
from tests.bilevel.es_estimates import (
  assert_within_standard_errors,
  estimates,
  quadratic_setting,
  scalar_directions,
)
from tests.cases import cases
from tests.problems import flat

pytestmark = pytest.mark.slow  # All together, not each.

SQUARED_ERROR = {
  "gaussian": lambda p, q: (p + 1) / q,
  "sphere": lambda p, q: (p - 1) / q,
  "rademacher": lambda p, q: (p - 1) / q,
  "orthogonal": lambda p, q: p / q - 1,
}


@pytest.mark.parametrize("num_samples", [1, 8])
@pytest.mark.parametrize("directions", SQUARED_ERROR)
def test_relative_error_is_the_law_of_the_family(directions, num_samples, x64):
  """D2; and the mean is exact (D1)."""
  p = 20
  _, solver, x, _, solution, grads, exact = quadratic_setting(p, 8)
  kwargs = {"num_samples": num_samples, "directions": directions}
  samples = estimates(solver, x, solution, grads, 1500, **kwargs)
  response = exact - flat(grads[0])
  errors = np.sum((samples - exact) ** 2, axis=1) / np.sum(response**2)
  assert_within_standard_errors(errors, SQUARED_ERROR[directions](p, num_samples))
  assert_within_standard_errors(samples, exact, 4.5)  # The worst of 20 coordinates.


@pytest.mark.parametrize("directions", ["gaussian", "orthogonal"])
def test_the_best_scale_has_the_least_error_of_all(directions, x64):
  """1 / (1 + c) leaves c / (1 + c), less than dropping the response does, which leaves 1."""
  p, q = 20, 4
  _, solver, x, _, solution, grads, exact = quadratic_setting(p, 8)
  c = SQUARED_ERROR[directions](p, q)
  samples = estimates(
    solver,
    x,
    solution,
    grads,
    1500,
    num_samples=q,
    directions=directions,
    response_scale=1 / (1 + c),
  )
  response = exact - flat(grads[0])
  errors = np.sum((samples - exact) ** 2, axis=1) / np.sum(response**2)
  assert_within_standard_errors(errors, c / (1 + c))


@pytest.mark.parametrize("difference", ["forward", "central", "exact"])
def test_as_many_orthogonal_directions_as_parameters_give_the_exact_response(difference, x64):
  """D10, on unequal leaves."""
  _, solver, x, _, solution, grads, exact = quadratic_setting()
  samples = estimates(
    solver, x, solution, grads, 2, num_samples=43, directions="orthogonal", difference=difference
  )
  np.testing.assert_allclose(samples, [exact, exact], rtol=1e-7, atol=1e-8)


def test_official_scaling_shrinks_the_response_of_each_leaf_by_its_size(x64):
  """The finding of section 3.6, on leaves of 1, 12 and 30 entries."""
  _, solver, x, _, solution, grads, exact = quadratic_setting()
  samples = estimates(solver, x, solution, grads, 3000, num_samples=4, directions="official")
  outer = flat(grads[0])
  sizes = np.repeat([1, 12, 30], [1, 12, 30])
  assert_within_standard_errors(samples, outer + (exact - outer) / sizes, 4.5)


def scalar_setting(response, x):
  """One step of 1 on ``(y - response(x))^2 / 2`` ends at ``response(x)``; df/dy is 1."""
  loss = lambda x, y, batch: 0.5 * jnp.sum((y - response(x)) ** 2)
  solver = jaxbo.inner_solver(loss, optax.sgd(1.0), 1)
  solution = solver.solve(x, solver.init(jnp.zeros_like(x)), None)
  return solver, x, solution, (jnp.zeros_like(x), jnp.ones_like(x))


def test_central_differences_have_no_error_of_second_order(x64):
  """For y = x^2 the forward difference is (2 x + mu u) u, the central one 2 x u."""
  setting = scalar_setting(lambda x: x**2, jnp.float64(0.7))
  kwargs = {"directions": "rademacher", "num_samples": 1, "smoothing": 0.5}
  forward = estimates(*setting, 50, **kwargs)
  assert set(np.round(forward[:, 0], 9)) == {0.9, 1.9}
  central = estimates(*setting, 50, difference="central", **kwargs)
  np.testing.assert_allclose(central, 1.4, rtol=1e-12)


@pytest.mark.parametrize(
  ("difference", "expected"), [("forward", 3 * 0.3**2), ("central", 3 * 0.3**2), ("exact", 0.0)]
)
def test_only_the_exact_derivative_has_no_smoothing_bias(difference, expected, x64):
  """D4: y = x^3 at 0, whose smoothed derivative is 3 mu^2."""
  setting = scalar_setting(lambda x: x**3, jnp.float64(0.0))
  samples = estimates(*setting, 1000, num_samples=100, smoothing=0.3, difference=difference)
  if difference == "exact":
    np.testing.assert_array_equal(samples, 0.0)
  else:
    assert_within_standard_errors(samples[:, 0], expected)


@pytest.mark.parametrize("directions", FAMILIES)
def test_the_exact_derivative_is_the_limit_of_small_smoothing(directions, x64):
  """D8, for a nonlinear run with momentum."""
  loss = lambda x, y, batch: jnp.sum((y - jnp.tanh(x) * batch) ** 2) + jnp.sum(jnp.cosh(y * x))
  solver = jaxbo.inner_solver(loss, optax.sgd(0.05, momentum=0.8), 8)
  x, batch = jnp.array([0.3, -0.7, 1.1]), jnp.array([1.0, 2.0, -1.0])
  solution = jax.jit(solver.solve)(x, solver.init(jnp.zeros(3)), batch)
  grads = (jnp.zeros(3), jnp.array([1.0, -0.5, 2.0]))
  arguments = (solver, x, solution, grads, 3)
  kwargs = {"num_samples": 2, "directions": directions, "batch": batch}
  exact = estimates(*arguments, difference="exact", **kwargs)
  error = lambda difference, smoothing: np.linalg.norm(
    estimates(*arguments, difference=difference, smoothing=smoothing, **kwargs) - exact
  )
  first, second = error("forward", 1e-3), error("forward", 1e-4)
  np.testing.assert_allclose(first / second, 10, rtol=0.1)
  first, second = error("central", 1e-2), error("central", 1e-3)
  np.testing.assert_allclose(first / second, 100, rtol=0.2)


def test_bias_and_error_are_within_their_bounds(x64):
  """D3: y = sin(x) in every coordinate has a 1-Lipschitz Jacobian."""
  p, mu = 5, 0.5
  x = jnp.linspace(-1.0, 2.0, p)
  setting = scalar_setting(jnp.sin, x)
  samples = estimates(*setting, 2000, num_samples=100, smoothing=mu)
  v, b = np.cos(np.asarray(x)), np.ones(p)
  errors = samples - v
  bias = np.linalg.norm(errors.mean(axis=0))
  noise = np.linalg.norm(errors.std(axis=0)) / np.sqrt(len(errors))
  assert bias < mu * np.sqrt(p) * np.linalg.norm(b) + 4 * noise
  assert bias > 4 * noise  # There is one.
  single = estimates(*setting, 4000, num_samples=1, smoothing=mu)
  squares = np.sum((single - v) ** 2, axis=1)
  bound = 2 * (p + 1) * v @ v + 0.5 * mu**2 * (b @ b) * p * (p + 2) * (p + 4)
  assert squares.mean() + 4 * squares.std() / np.sqrt(len(squares)) < bound


def test_rounding_and_smoothing_errors_of_float32_are_where_they_were_measured():
  """D7: forward differences are best near 1e-3, central ones near 1e-2, and ten times better."""
  loss = lambda x, y, batch: jnp.mean((jnp.tanh(batch @ y) - jnp.tanh(batch @ x)) ** 2)
  rng = np.random.default_rng(0)
  batch = jnp.asarray(rng.normal(size=(20, 5)), jnp.float32)
  solver = jaxbo.inner_solver(loss, optax.sgd(0.3), 50)
  x = jnp.asarray(rng.normal(size=5), jnp.float32)
  solution = solver.solve(x, solver.init(jnp.zeros(5)), batch)
  arguments = (solver, x, solution, (jnp.zeros(5), jnp.ones(5)), 20)
  kwargs = {"num_samples": 4, "batch": batch}
  exact = estimates(*arguments, difference="exact", **kwargs)

  def error(difference, smoothing):
    result = estimates(*arguments, difference=difference, smoothing=smoothing, **kwargs)
    return np.linalg.norm(result - exact) / np.linalg.norm(exact)

  assert error("forward", 1e-3) < 0.2 * min(error("forward", 1e-6), error("forward", 1e-1))
  assert error("central", 1e-2) < 0.1 * error("forward", 1e-2)


@pytest.mark.parametrize("directions", FAMILIES)
def test_one_pass_and_two_give_the_same(directions, x64):
  """On several leaves for one family, and for that whose leaves have scales of their own."""
  several = directions in ("gaussian", "official")
  _, solver, x, _, solution, grads, _ = quadratic_setting() if several else quadratic_setting(20, 8)
  kwargs = {"num_samples": 7, "directions": directions, "sample_batch_size": 3}
  two = estimates(solver, x, solution, grads, 2, **kwargs)
  one = estimates(solver, x, solution, grads, 2, redraw=False, **kwargs)
  np.testing.assert_allclose(one, two, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("redraw", [True, False])
@pytest.mark.parametrize("difference", ["forward", "central", "exact"])
def test_samples_that_diverge_are_left_out_whatever_the_difference(redraw, difference):
  response = lambda x: jnp.where(x > 0, x, jnp.nan)
  solver, x, solution, grads = scalar_setting(response, jnp.float32(0.5))
  head = jaxbo.add_es_response(
    solver, 50, 1.0, difference=difference, redraw=redraw, sample_batch_size=8, key=1
  )
  update = jax.jit(lambda state: head.update(grads, state, x, solution=solution, batch=None))
  result, state = update(head.init(x))
  u = scalar_directions(1, 50)
  kept = {"forward": u > -0.5, "central": np.abs(u) < 0.5, "exact": np.full(50, True)}[difference]
  assert state.info.num_finite == kept.sum()
  np.testing.assert_allclose(result, np.mean(u[kept] ** 2), rtol=1e-5)


@pytest.mark.parametrize(("factor", "grows"), [(0.8, False), (1.2, True)])
def test_descent_is_stable_up_to_the_step_of_the_theory(factor, grows, x64):
  """D9 for F = |x|^2 / 2 and Q = 1: |x|^2 contracts by 1 - 2 beta + beta^2 (p + 2) on average."""
  p = 10
  solver, x, solution, _ = scalar_setting(lambda x: x, jnp.ones(p))
  samples = estimates(solver, x, solution, (jnp.zeros(p), solution.params), 4000, num_samples=1)
  beta = factor * 2 / (1 + (p + 1))
  after = np.sum((np.asarray(x) - beta * samples) ** 2, axis=1) / p
  expected = 1 - 2 * beta + beta**2 * (p + 2)
  assert (expected > 1) == grows
  assert_within_standard_errors(after, expected)


def test_mean_over_many_directions_points_along_the_itd_response_of_hyper_representation(x64):
  """T11: an 8 x 6 embedding under a regression head; the direct gradient taken off."""
  rng = np.random.default_rng(0)
  X, Z = rng.normal(size=(2, 30, 8))
  truth, w_true = rng.normal(size=(8, 6)), rng.normal(size=6)
  train, val = ({"X": jnp.asarray(A), "y": jnp.asarray(A @ truth @ w_true)} for A in (X, Z))
  fit = lambda H, w, b: 0.5 * jnp.mean((b["X"] @ H @ w - b["y"]) ** 2)
  inner = jaxbo.inner_solver(
    lambda H, w, b: fit(H, w, b) + 0.05 * jnp.sum(w**2), optax.sgd(1e-2), 20, warm_start=False
  )
  H = jnp.asarray(rng.normal(size=(8, 6)))
  w = inner.solve(H, inner.init(jnp.asarray(rng.normal(size=6))), train)
  outer_grad, inner_grad = jax.grad(fit, (0, 1))(H, w.params, val)
  itd, _ = jaxbo.add_unrolled_response(inner).update(
    (outer_grad, inner_grad), None, H, solution=w, batch=train
  )
  response = flat(itd - outer_grad)
  assert np.linalg.norm(response) > 0.1 * np.linalg.norm(outer_grad)
  samples = estimates(
    inner, H, w, (outer_grad, inner_grad), 20 * 48, num_samples=1, smoothing=1e-4, batch=train
  )
  estimated = samples.mean(axis=0) - flat(outer_grad)
  cosine = estimated @ response / np.linalg.norm(estimated) / np.linalg.norm(response)
  assert cosine > 0.9
  assert_within_standard_errors(samples, flat(itd), 4.5)


def linear_through(p=6, d=4):
  """z = W x, and one step of 1 ends at y = M z."""
  rng = np.random.default_rng(0)
  W, M = jnp.asarray(rng.normal(size=(d, p))), jnp.asarray(rng.normal(size=(3, d)))
  solver = jaxbo.inner_solver(
    lambda z, y, batch: 0.5 * jnp.sum((y - M @ z) ** 2),
    optax.sgd(1.0),
    1,
    through=lambda x, b: W @ x,
  )
  x, b = jnp.asarray(rng.normal(size=p)), jnp.asarray(rng.normal(size=3))
  return solver, x, solver.solve(x, solver.init(jnp.zeros(3)), None), (jnp.zeros(p), b), W, M.T @ b


@pytest.mark.parametrize("num_samples", [1, 5])
def test_error_through_features_is_the_law_of_the_features(num_samples, x64):
  """In z it is D2 with p = dim z; in x it is (|J|_F^2 |v|^2 / |J'v|^2 + 1) / Q with J = dz/dx."""
  solver, x, solution, grads, W, v = linear_through()
  samples = estimates(solver, x, solution, grads, 3000, num_samples=num_samples)
  exact = np.asarray(W.T @ v)
  assert_within_standard_errors(samples, exact)
  errors = np.sum((samples - exact) ** 2, axis=1) / np.sum(exact**2)
  law = np.sum(W**2) * (v @ v) / np.sum(exact**2) + 1
  assert_within_standard_errors(errors, law / num_samples)
  in_z = samples @ np.linalg.pinv(W)  # W has full row rank: W'z determines z.
  errors = np.sum((in_z - np.asarray(v)) ** 2, axis=1) / float(v @ v)
  assert_within_standard_errors(errors, (4 + 1) / num_samples)


def test_as_many_orthogonal_directions_as_features_give_the_exact_response(x64):
  solver, x, solution, grads, W, v = linear_through()
  samples = estimates(solver, x, solution, grads, 1, num_samples=4, directions="orthogonal")
  np.testing.assert_allclose(samples[0], W.T @ v, rtol=1e-9)


def test_parameters_can_be_perturbed_in_spite_of_features(x64):
  """The error is then that of p parameters: y = M W x is affine in x."""
  solver, x, solution, grads, W, v = linear_through()
  samples = estimates(solver, x, solution, grads, 3000, num_samples=2, perturb_features=False)
  exact = np.asarray(W.T @ v)
  assert_within_standard_errors(samples, exact)
  errors = np.sum((samples - exact) ** 2, axis=1) / np.sum(exact**2)
  assert_within_standard_errors(errors, (len(x) + 1) / 2)


def test_features_that_the_loss_does_not_use_are_refused():
  loss = lambda z, y, batch: jnp.sum(y**2) + jnp.sum(batch)
  for per_step, of_a_step in ((False, loss), (True, loss), (False, jax.jit(loss))):
    solver = jaxbo.inner_solver(
      of_a_step,
      optax.sgd(1.0),
      2,
      per_step_batches=per_step,
      through=lambda x, batch: x * batch,
    )
    with pytest.raises(ValueError, match="loss must use the output of through"):
      solver.solve(jnp.float32(1.0), solver.init(jnp.zeros(2)), jnp.ones((2, 2)))


@cases(
  ("kwargs", "message"),
  [
    ({"directions": "normal"}, "directions must be one of 'gaussian', .* got 'normal'"),
    ({"difference": "backward"}, "difference must be one of 'forward', 'central', 'exact', got"),
    ({"response_scale": 0.0}, "response_scale must be positive and finite, got 0.0"),
    ({"per_task": True}, "per_task=True needs a solver with tasks"),
    ({"axis_name": "d", "redraw": False}, "redraw must be True with axis_name"),
  ],
)
def test_bad_options_are_refused_when_built(kwargs, message):
  solver = jaxbo.inner_solver(lambda x, y, b: jnp.sum((y - x) ** 2), optax.sgd(0.5), 1)
  with pytest.raises(ValueError, match=message):
    jaxbo.add_es_response(solver, **kwargs)


def test_more_orthogonal_samples_than_parameters_are_refused():
  solver, x, solution, grads = scalar_setting(lambda x: x, jnp.ones(3))
  head = jaxbo.add_es_response(solver, 4, directions="orthogonal")
  with pytest.raises(
    ValueError, match=r"num_samples must be at most .* 3, for orthogonal .* got 4"
  ):
    head.update(grads, head.init(x), x, solution=solution, batch=None)


def test_dropout_keys_in_the_batch_are_shared_between_runs(x64):
  """D6 for randomness: the error does not grow as the smoothing shrinks."""

  def loss(x, y, batch):
    keep = jax.random.bernoulli(batch["key"], 0.5, y.shape)
    return 0.5 * jnp.sum(jnp.where(keep, y - batch["scale"] * x, 0.0) ** 2)

  solver = jaxbo.inner_solver(loss, optax.sgd(0.5), 6, per_step_batches=True)
  batch = {"key": jax.random.split(jax.random.key(0), 6), "scale": jnp.linspace(0.5, 2.0, 6)}
  x = jnp.array([0.3, -1.0, 2.0])
  solution = solver.solve(x, solver.init(jnp.zeros(3)), batch)
  grads = (jnp.zeros(3), jnp.ones(3))
  with jax.debug_key_reuse(False):  # All runs use the same keys, on purpose.
    results = [
      estimates(solver, x, solution, grads, 3, smoothing=s, num_samples=2, batch=batch)
      for s in (1e-3, 10.0)
    ]
  np.testing.assert_allclose(*results, rtol=1e-9)
