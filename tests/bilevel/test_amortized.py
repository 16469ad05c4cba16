"""SOBA and AmIGO against loops of their updates in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbo
from tests.problems import Quadratic

PROBLEM = Quadratic.make(5, 4, condition=3)
X, Y = np.linspace(-1.0, 1.0, 5), np.linspace(2.0, -1.0, 4)
INNER_RATE, LINEAR_RATE, OUTER_RATE = 0.8, 0.6, 0.2


def by_hand(num_rounds, *, inner_steps=1, linear_steps=1, before=False):
  """``(x, y, v)`` after each round; with ``before``, the response is at the y before its steps."""
  x, y, v, told = X, Y, np.zeros(4), []
  for _ in range(num_rounds):
    after = y
    for _ in range(inner_steps):
      after = after - INNER_RATE * (PROBLEM.A @ after - PROBLEM.B @ x - PROBLEM.c)
    in_x, in_y = PROBLEM.outer_grads(x, y if before else after)
    for _ in range(linear_steps):
      v = v - LINEAR_RATE * (PROBLEM.A @ v - in_y)
    x, y = x - OUTER_RATE * (in_x + PROBLEM.B.T @ v), after
    told.append((x, y, v))
  return told


def solver(num_steps):
  return jaxbo.inner_solver(PROBLEM.inner_loss, optax.sgd(INNER_RATE), num_steps)


def methods(inner):
  shape = jax.ShapeDtypeStruct((4,), jnp.float64)
  return {
    "soba": (jaxbo.soba(OUTER_RATE, inner, LINEAR_RATE, inner_params=shape), 1),
    "amigo": (jaxbo.amigo(OUTER_RATE, inner, 3, LINEAR_RATE, inner_params=shape), 3),
  }


@pytest.mark.parametrize(("name", "inner_steps"), [("soba", 1), ("amigo", 2)])
def test_each_round_is_that_of_a_loop_in_numpy_and_the_last_is_the_optimum(name, inner_steps, x64):
  inner = solver(inner_steps)
  outer, linear_steps = methods(inner)[name]
  init, step = jaxbo.bilevel_loop(PROBLEM.outer_loss, inner, outer)

  @jax.jit
  def run(state):
    def body(state, _):
      state, _ = step(state, None, None)
      v = optax.tree.get(state.outer_state, "linear_solution")
      return state, (state.x, state.solution.params, v)

    return jax.lax.scan(body, state, length=400)

  _, found = run(init(jnp.asarray(X), jnp.asarray(Y)))
  expected = by_hand(400, inner_steps=inner_steps, linear_steps=linear_steps)
  for i, series in enumerate(found):
    np.testing.assert_allclose(series, np.stack([row[i] for row in expected]), rtol=1e-8, atol=1e-9)
  np.testing.assert_allclose(found[0][-1], PROBLEM.optimum(), atol=1e-6)


def test_hyper_at_before_takes_the_inner_and_the_linear_step_at_one_point(x64):
  """The paper's SOBA, except that x moves with the new v."""
  inner = solver(1)
  outer, _ = methods(inner)["soba"]
  loop = jaxbo.online_loop(PROBLEM.outer_loss, inner, outer, hyper_at="before")
  stream = lambda key, t: (None, None)
  state = loop.init(jnp.asarray(X), jnp.asarray(Y), stream)
  state, _ = jax.jit(lambda state: loop.run(state, stream, 20))(state)
  x, y, _ = by_hand(20, before=True)[-1]
  np.testing.assert_allclose(state.x, x, rtol=1e-9)
  np.testing.assert_allclose(optax.tree.get(state, "solution").params, y, rtol=1e-9)
