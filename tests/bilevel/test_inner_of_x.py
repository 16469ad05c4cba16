"""Inner solvers whose optimizer or start is a function of the outer parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbo

RNG = np.random.default_rng(0)
A, B = RNG.normal(size=(12, 4)), RNG.normal(size=12)
TARGET = RNG.normal(size=4)


def fit(x, y, batch):
  return jnp.sum((A @ y - B) ** 2) / 12 + 0.05 * jnp.sum(y**2)


def outer_loss(x, y, batch):
  return jnp.sum((y - TARGET) ** 2)


def momentum_sgd(x):
  """Rate, momentum and weight decay, for all leaves."""
  rate, momentum, decay = jnp.exp(x["rate"]), jax.nn.sigmoid(x["momentum"]), jnp.exp(x["decay"])
  return optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, momentum))


def adam(x):
  return optax.adam(jnp.exp(x["rate"]), b1=jax.nn.sigmoid(x["momentum"]), eps_root=1e-12)


def rates_by_leaf(x):
  """A learning rate for each coordinate, as in learned optimizers."""

  def update(updates, state, params=None):
    return -jnp.exp(x["rates"]) * updates, state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


NUMBERS = {"rate": np.log(0.1), "momentum": 0.3, "decay": -2.0}
OPTIMIZERS = {
  "sgd": (momentum_sgd, NUMBERS),
  "adam": (adam, {"rate": np.log(0.1), "momentum": 1.0}),
  "by leaf": (rates_by_leaf, {"rates": np.log([0.1, 0.2, 0.05, 0.15])}),
}


def hypergradient(inner, make_response, x, y0):
  tx = make_response(inner)

  @jax.jit
  def at(x):
    y = inner.solve(x, inner.init(y0, x, None), None)
    grads = jax.grad(outer_loss, (0, 1))(x, y.params, None)
    return tx.update(grads, tx.init(x), x, solution=y, batch=None)[0]

  return at(x)


def by_differences(inner, x, y0):
  flat, unflatten = jax.flatten_util.ravel_pytree(x)
  end = jax.jit(
    lambda flat: outer_loss(
      None, inner.solve(unflatten(flat), inner.init(y0, unflatten(flat), None), None).params, None
    )
  )
  steps = 1e-6 * np.eye(flat.size)
  return np.array([(end(flat + s) - end(flat - s)) / 2e-6 for s in steps])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_hyperparameters_of_the_inner_optimizer(name, x64):
  """A short run, so that they matter: ITD and ES against differences of the whole run."""
  make, x = OPTIMIZERS[name]
  x = jax.tree.map(jnp.asarray, x)
  inner = jaxbo.inner_solver(fit, make, 5)
  expected = by_differences(inner, x, jnp.zeros(4))
  assert np.all(np.abs(expected) > 1e-4)
  size = expected.size
  for head in (
    jaxbo.add_unrolled_response,
    lambda i: jaxbo.add_es_response(i, size, 1e-5, directions="orthogonal", difference="central"),
  ):
    found = jax.jit(lambda x, head=head: hypergradient(inner, head, x, jnp.zeros(4)))(x)
    np.testing.assert_allclose(jax.flatten_util.ravel_pytree(found)[0], expected, rtol=1e-6)


def test_the_fixed_point_knows_the_weight_decay_and_that_rates_do_not_matter(x64):
  x = jax.tree.map(jnp.asarray, NUMBERS)
  inner = jaxbo.inner_solver(fit, momentum_sgd, 800)
  aid = lambda i: jaxbo.add_implicit_response(i, jaxbo.conjugate_gradient(8))
  found = jax.jit(lambda x: hypergradient(inner, aid, x, jnp.zeros(4)))(x)
  hessian = 2 * A.T @ A / 12 + (0.1 + np.exp(-2.0)) * np.eye(4)
  y = np.linalg.solve(hessian, 2 * A.T @ B / 12)
  expected = -np.exp(-2.0) * 2 * (y - TARGET) @ np.linalg.solve(hessian, y)
  np.testing.assert_allclose(found["decay"], expected, rtol=1e-6)
  np.testing.assert_allclose([found["rate"], found["momentum"]], 0, atol=1e-8)


def test_an_optimizer_whose_state_depends_on_x_is_refused():
  """Its derivative would be lost: the state that it starts from is a constant of a run."""
  make = lambda x: optax.inject_hyperparams(optax.sgd)(x)
  inner = jaxbo.inner_solver(fit, make, 2)
  with pytest.raises(ValueError, match="optimizer must not keep numbers that depend on x"):
    inner.init(jnp.zeros(4), jnp.float32(0.1), None)
  with pytest.raises(ValueError, match="init must be given x and batch"):
    inner.init(jnp.zeros(4))


# -- Starts.


def test_maml_by_its_name(x64):
  """The run begins at x: d/dx f(y^N(x)) of gradient descent, (I - a H)^N, in closed form."""
  inner = jaxbo.inner_solver(fit, optax.sgd(0.2), 3, start=lambda x: x)
  x = jnp.asarray(RNG.normal(size=4))
  hessian = 2 * A.T @ A / 12 + 0.1 * np.eye(4)
  contraction = np.linalg.matrix_power(np.eye(4) - 0.2 * hessian, 3)
  minimum = np.linalg.solve(hessian, 2 * A.T @ B / 12)
  y = minimum + contraction @ (x - minimum)
  expected = contraction @ (2 * (y - TARGET))
  es = {"directions": "orthogonal", "difference": "central"}
  for head in (
    jaxbo.add_unrolled_response,
    lambda i: jaxbo.add_es_response(i, 4, 1e-4, **es),
    lambda i: jaxbo.add_es_response(i, 4, directions="orthogonal", difference="exact"),
  ):
    found = jax.jit(lambda x, head=head: hypergradient(inner, head, x, None))(x)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
  truncated = hypergradient(inner, lambda i: jaxbo.add_unrolled_response(i, 2), x, None)
  np.testing.assert_array_equal(truncated, 0)  # x is a constant before the last steps.


def test_imaml_by_its_name(x64):
  """A proximal term ties y to x, which is also where the run begins."""
  proximal = lambda x, y, batch: fit(x, y, batch) + jnp.sum((y - x) ** 2) / 2
  inner = jaxbo.inner_solver(proximal, optax.sgd(0.2), 200, start=lambda x: x)
  x = jnp.asarray(RNG.normal(size=4))
  hessian = 2 * A.T @ A / 12 + 1.1 * np.eye(4)
  y = np.linalg.solve(hessian, 2 * A.T @ B / 12 + x)
  expected = np.linalg.solve(hessian, 2 * (y - TARGET))
  aid = lambda i: jaxbo.add_implicit_response(i, jaxbo.conjugate_gradient(4))
  np.testing.assert_allclose(hypergradient(inner, aid, x, None), expected, rtol=1e-8)


def test_reptile_is_a_step_towards_the_end_of_the_run(x64):
  """Its outer loss is half the squared distance to the end, which is held constant."""
  inner = jaxbo.inner_solver(fit, optax.sgd(0.2), 5, start=lambda x: x)
  distance = lambda x, y, batch: jnp.sum((x - jax.lax.stop_gradient(y)) ** 2) / 2
  outer = optax.chain(jaxbo.drop_response(), optax.sgd(0.5))
  init, step = jaxbo.bilevel_loop(distance, inner, outer)
  x = jnp.asarray(RNG.normal(size=4))
  state, _ = step(init(x, None, None), None, None)
  np.testing.assert_allclose(state.x, 0.5 * (x + state.solution.params), rtol=1e-12)


def test_tasks_begin_at_the_shared_parameters(x64):
  loss = lambda x, y, batch: jnp.sum((y - batch) ** 2)
  one = jaxbo.inner_solver(loss, optax.sgd(0.25), 1, start=lambda x: x)
  inner = jaxbo.over_tasks(one, 3)
  x, batch = jnp.array([1.0, 2.0]), jnp.asarray(RNG.normal(size=(3, 2)))
  y = inner.solve(x, inner.init(None, x, batch), batch)
  np.testing.assert_allclose(y.params, 0.5 * (x[None] + batch))
  tx = jaxbo.add_unrolled_response(inner)
  h, _ = tx.update((0 * x, y.params), tx.init(x), x, solution=y, batch=batch)
  np.testing.assert_allclose(h, 0.5 * jnp.sum(y.params, axis=0))


def test_a_start_takes_the_place_of_y0():
  inner = jaxbo.inner_solver(fit, optax.sgd(0.2), 3, start=lambda x: x)
  with pytest.raises(ValueError, match="y0 must be None with start"):
    inner.init(jnp.zeros(4), jnp.zeros(4), None)


def anchored():
  """L2-SP: a decay towards where the run began, which the state remembers."""

  def update(updates, state, params=None):
    return jax.tree.map(lambda u, p, s: u + 0.5 * (p - s), updates, params, state), state

  return optax.chain(optax.GradientTransformation(lambda y: y, update), optax.sgd(0.1))


@pytest.mark.parametrize("optimizer", [anchored(), optax.contrib.schedule_free_sgd(0.1)])
def test_a_state_that_remembers_the_start_responds_with_it(optimizer, x64):
  inner = jaxbo.inner_solver(fit, optimizer, 5, start=lambda x: x)
  x = jnp.asarray(RNG.normal(size=4))
  found = hypergradient(inner, jaxbo.add_unrolled_response, x, None)
  np.testing.assert_allclose(found, by_differences(inner, x, None), rtol=1e-6)


def test_a_start_in_low_precision_and_one_that_ignores_x():
  inner = jaxbo.inner_solver(fit, optax.sgd(0.2), 3, start=lambda x: x)
  x = jnp.ones(4, jnp.bfloat16)
  es = lambda i: jaxbo.add_es_response(i, 4, directions="orthogonal", difference="central")
  found = hypergradient(inner, es, x, None)
  exact = hypergradient(inner, es, jnp.ones(4), None)
  np.testing.assert_allclose(np.float32(found), exact, rtol=0.05, atol=0.02)
  closed = jaxbo.inner_solver(fit, optax.sgd(0.2), 3, start=lambda _: jnp.zeros(4))
  with pytest.raises(ValueError, match="inner_loss must use its argument x"):
    hypergradient(closed, es, jnp.ones(4), None)
