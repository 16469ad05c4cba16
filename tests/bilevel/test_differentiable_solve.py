"""The inner solution as a differentiable function: against a closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbo

RNG = np.random.default_rng(0)
A, C, T = np.diag([1.0, 2.0, 4.0]), RNG.normal(size=(3, 2)), RNG.normal(size=3)


def inner_loss(x, y, batch):
  return 0.5 * y @ A @ y - y @ C @ jnp.sin(x) * batch["scale"]


INNER = jaxbo.inner_solver(inner_loss, optax.sgd(0.3), 100)
RESPONSES = {
  "aid": jaxbo.add_implicit_response(INNER, jaxbo.conjugate_gradient(3)),
  "itd": jaxbo.add_unrolled_response(INNER),
  "es": jaxbo.add_es_response(INNER, 2, 1e-6, directions="orthogonal", difference="central"),
}
BATCH = {"scale": np.float64(2.0), "index": np.arange(3)}  # Integers have no derivative.


def value(solve, x):
  return jnp.sum(jnp.exp(x)) + jnp.sum(jnp.cos(solve(x, jnp.zeros(3), BATCH) * T))


def exact(x):
  y = np.linalg.solve(A, C @ np.sin(x)) * 2.0
  jacobian = np.linalg.solve(A, C * np.cos(x)) * 2.0
  return np.exp(x) - jacobian.T @ (np.sin(y * T) * T)


@pytest.mark.parametrize("name", RESPONSES)
def test_jax_grad_is_the_hypergradient(name, x64):
  solve = jaxbo.bilevel.differentiable_solve(INNER, RESPONSES[name])
  x = jnp.asarray(RNG.normal(size=(2, 2)))
  found = jax.jit(jax.vmap(jax.grad(lambda x: value(solve, x))))(x)
  np.testing.assert_allclose(found, [exact(np.asarray(row)) for row in x], rtol=1e-6)


@pytest.mark.parametrize("optimizer", [optax.sgd(0.3), optax.sgd(0.05), optax.lbfgs()])
def test_hessians_of_a_third_level(optimizer, x64):
  """By the response alone: the run may be short, from the solution, or without a derivative."""
  inner = jaxbo.inner_solver(inner_loss, optimizer, 3)
  response = jaxbo.add_implicit_response(inner, jaxbo.conjugate_gradient(3))
  solve = jaxbo.bilevel.differentiable_solve(inner, response)
  x, steps = np.array([0.4, -0.8]), 1e-6 * np.eye(2)
  y0 = jnp.asarray(np.linalg.solve(A, C @ np.sin(x)) * 2.0)
  F = lambda x: jnp.sum(jnp.exp(x)) + jnp.sum(jnp.cos(solve(x, y0, BATCH) * T))
  expected = [(exact(x + s) - exact(x - s)) / 2e-6 for s in steps]
  np.testing.assert_allclose(jax.jacrev(jax.grad(F))(x), expected, rtol=1e-6)


def test_two_inner_problems_in_one_loss(x64):
  solve = jaxbo.bilevel.differentiable_solve(INNER, RESPONSES["aid"])
  both = lambda x: value(solve, x) + jnp.sum(solve(2 * x, jnp.zeros(3), BATCH))
  x = np.array([0.4, -0.8])
  second = 2 * (np.linalg.solve(A, C * np.cos(2 * x)) * 2.0).T @ np.ones(3)
  np.testing.assert_allclose(jax.grad(both)(x), exact(x) + second, rtol=1e-6)


def test_what_is_constant_must_not_be_differentiated():
  solve = jaxbo.bilevel.differentiable_solve(INNER, RESPONSES["aid"])
  x, y0 = jnp.ones(2), jnp.zeros(3)
  with pytest.raises(ValueError, match="y0 must not be differentiated"):
    jax.grad(lambda y0: jnp.sum(solve(x, y0, BATCH)))(y0)
  with pytest.raises(ValueError, match="batch must not be differentiated"):
    jax.grad(lambda s: jnp.sum(solve(x, y0, BATCH | {"scale": s})))(2.0)


@pytest.mark.parametrize(
  "response", [optax.sgd(0.1), jaxbo.aid(0.1, INNER)], ids=["no response", "a whole method"]
)
def test_what_is_not_a_response_alone_is_refused(response):
  solve = jaxbo.bilevel.differentiable_solve(INNER, response)
  with pytest.raises(ValueError, match="response must be a response alone"):
    jax.grad(lambda x: jnp.sum(solve(x, jnp.zeros(3), BATCH)))(jnp.ones(2))


def test_a_black_box_on_the_host_is_solved_without_a_derivative_of_its_own():
  inner = jaxbo.black_box(lambda x, batch: np.square(x), host=True)
  response = jaxbo.add_es_response(
    inner, num_samples=1, directions="orthogonal", difference="central"
  )
  solve = jaxbo.bilevel.differentiable_solve(inner, response)
  gradient = jax.grad(lambda x: solve(x, jnp.float32(0.0), None))(jnp.float32(3.0))
  np.testing.assert_allclose(gradient, 6.0, rtol=1e-4)
