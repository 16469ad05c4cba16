"""The chains of the benchmark, without the package that it compares with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gradhpo_package as benchmark

RATE, NUM_STEPS = 3.0, 3


@pytest.fixture(scope="module")
def given():
  return benchmark.problem(0, NUM_STEPS)


def test_a_response_of_one_step_is_the_product_of_two_gradients(given):
  """With rates r = softplus(x), the derivative of the step in x is -r'(x) times the gradient."""
  first_order, one_step, darts, _ = benchmark.our_methods(NUM_STEPS)
  x, y = given.x, given.y
  for t in range(NUM_STEPS):
    grads = jax.grad(benchmark.loss)(y, benchmark.taken(given.train, t))
    y = benchmark.descend(y, x, grads)
    outer = jax.grad(benchmark.loss)(y, benchmark.taken(given.val, t))
    rate = RATE * (1 - t / NUM_STEPS)
    x = jax.tree.map(lambda x, g, v, r=rate: x + r * v * g * jax.nn.sigmoid(x), x, grads, outer)
  for method in one_step, darts:
    state, _ = benchmark.play(method, given, RATE)
    for mine, theirs in ((state.x, x), (method.params(state), y)):
      jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), mine, theirs
      )
  state, _ = benchmark.play(first_order, given, RATE)
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), state.x, given.x))


def test_the_linearized_loss_has_the_step_as_its_gradient(given):
  batch = benchmark.taken(given.train, 0)
  x = jax.tree.map(lambda leaf: leaf + jnp.linspace(-1, 1, leaf.size).reshape(leaf.shape), given.x)
  step = jax.grad(benchmark.linearized)(given.y, x, batch)
  expected = benchmark.descend(given.y, x, jax.grad(benchmark.loss)(given.y, batch))
  for y, s, e in zip(*map(jax.tree.leaves, (given.y, step, expected)), strict=True):
    np.testing.assert_allclose(y - s, e, rtol=1e-6)
