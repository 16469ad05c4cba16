"""The ES response of parameters and optimizer states that are narrower than float32."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbo
from tests.problems import flat

pytestmark = pytest.mark.slow  # All together, not each.


@pytest.mark.parametrize(
  ("outer", "inner"), [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16")]
)
def test_bfloat16_parameters_are_perturbed_in_float32(outer, inner):
  """In bfloat16 a perturbation of 1e-3 would move few entries of ``x``, and few ends of runs."""
  loss = lambda x, y, batch: 0.5 * jnp.sum((y - jnp.tanh(x)) ** 2)
  solver = jaxbo.inner_solver(loss, optax.sgd(1.0), 1)  # One step of 1 ends at tanh(x).
  results = []
  for x_dtype, y_dtype in ((outer, inner), ("float32", "float32")):
    x = jnp.asarray(np.arange(4) / 4, x_dtype)
    solution = jax.jit(solver.solve)(x, solver.init(jnp.zeros(4, y_dtype)), None)
    grads = (jnp.zeros_like(x), jnp.arange(1, 5, dtype=y_dtype))
    head = jaxbo.add_es_response(solver, 4, 1e-3)
    update = lambda state: head.update(grads, state, x, solution=solution, batch=None)  # noqa: B023
    result, _ = jax.jit(update)(head.init(x))
    assert result.dtype == x_dtype
    results.append(flat(result))
  np.testing.assert_allclose(results[0], results[1], rtol=1e-2, atol=1e-2)


def test_bfloat16_features_are_perturbed_in_float32():
  """And pulled back in bfloat16, as they came."""
  arguments = {"optimizer": optax.sgd(1.0), "num_steps": 1}

  def rounded(v):  # Left alone, XLA may compute in float32 what is bfloat16.
    return jax.lax.reduce_precision(v, jnp.finfo(v.dtype).nexp, jnp.finfo(v.dtype).nmant)

  loss = lambda z, y, batch: 0.5 * jnp.sum((y - rounded(z**2)) ** 2)
  x, y0 = jnp.linspace(1.0, 2.0, 4), jnp.zeros(4)
  results = []
  for dtype in (jnp.bfloat16, jnp.float32):
    through = lambda x, batch, dtype=dtype: x.astype(dtype)
    solver = jaxbo.inner_solver(loss, **arguments, through=through)
    solution = solver.solve(x, solver.init(y0), None)
    head = jaxbo.add_es_response(solver, 8, 1e-3)
    result, _ = head.update((x, jnp.ones(4)), head.init(x), x, solution=solution, batch=None)
    results.append(result)
  np.testing.assert_allclose(*results, rtol=2e-2)


@pytest.mark.parametrize(
  ("dtype", "num_tasks"), [("float32", None), ("float32", 2), ("bfloat16", None)]
)
@pytest.mark.parametrize(
  "optimizer",
  [
    optax.adam(0.1, mu_dtype=jnp.bfloat16),
    optax.sgd(0.5, momentum=0.5, accumulator_dtype=jnp.bfloat16),
    optax.sgd(0.5, momentum=0.5),
  ],
  ids=["adam", "sgd", "sgd_like_params"],
)
def test_what_an_optimizer_keeps_in_bfloat16_stays_so(optimizer, dtype, num_tasks):
  """Moments of a dtype of their own are what the optimizer makes of them in every run."""
  loss = lambda x, y, batch: (0.5 * jnp.sum((y - batch * jnp.tanh(x)) ** 2), batch)
  solver = jaxbo.inner_solver(loss, optimizer, 2, has_aux=True, warm_start="all")
  batch = jnp.ones((), dtype)
  if num_tasks:
    solver, batch = jaxbo.over_tasks(solver, num_tasks), jnp.ones(num_tasks, dtype)
  x = jnp.linspace(0.1, 1.0, 4)
  head = jaxbo.add_es_response(solver, 4, 0.1, directions="orthogonal", difference="central")
  unrolled = jaxbo.add_unrolled_response(solver)

  @jax.jit
  def updates():
    solution = solver.solve(x, solver.init(jnp.zeros(4, dtype), x, batch), batch)
    solution = solver.solve(x, solution, batch)
    grads = jnp.zeros(4), jnp.ones_like(solution.params)
    result, state = head.update(grads, head.init(x), x, solution=solution, batch=batch)
    return result, state, unrolled.update(grads, None, x, solution=solution, batch=batch)[0]

  result, state, exact = updates()
  assert state.info.num_finite == 4
  chex.assert_trees_all_equal_dtypes(state, head.init(x))
  np.testing.assert_allclose(result, exact, rtol=0.1, atol=0.1)
