"""Batch normalization against NumPy; the gradient of the maximum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxbo_models.layers import BatchNorm, max_pool

from tests.models import oracle


def batch(dtype=jnp.float32):
  """Channels far from zero, where E[x^2] - E[x]^2 would lose everything in this dtype."""
  offset = 1000.0 if dtype == jnp.float32 else 8.0
  return jnp.asarray(oracle.images(3, 4, 5, 2) * np.array([1.0, 0.5]) + offset, dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_batch_statistics_equal_those_of_numpy(dtype):
  x = batch(dtype)
  params = oracle.perturbed(BatchNorm("batch").init(jax.random.key(0), x))["params"]
  y = BatchNorm("batch").apply({"params": params}, x)
  assert y.dtype == dtype
  expected = oracle.normalize(np.asarray(x, float), params)
  tolerance = 2e-2 if dtype == jnp.bfloat16 else 1e-3
  np.testing.assert_allclose(np.asarray(y, float), expected, atol=tolerance, rtol=tolerance)


def test_running_statistics_move_by_one_minus_momentum_and_stay_float32():
  x = batch(jnp.bfloat16)
  norm = BatchNorm("running", momentum=0.9)
  variables = norm.init(jax.random.key(0), x, train=True)
  np.testing.assert_array_equal(variables["batch_stats"]["mean"], 0)  # init moves nothing
  np.testing.assert_array_equal(variables["batch_stats"]["var"], 1)
  _, updates = norm.apply(variables, x, train=True, mutable=["batch_stats"])
  exact = np.asarray(x, float)
  moved = updates["batch_stats"]
  assert {leaf.dtype for leaf in moved.values()} == {jnp.dtype(jnp.float32)}
  np.testing.assert_allclose(moved["mean"], 0.1 * exact.mean((0, 1, 2)), rtol=1e-5)
  np.testing.assert_allclose(moved["var"], 0.9 + 0.1 * exact.var((0, 1, 2)), rtol=1e-4)
  y = norm.apply({**variables, "batch_stats": {"mean": jnp.ones(2), "var": jnp.full(2, 4.0)}}, x)
  np.testing.assert_allclose(np.asarray(y, float), (exact - 1) / 2, rtol=1e-2)


def test_the_first_of_equal_maxima_gets_the_gradient_and_an_odd_rest_gets_none():
  x = jnp.asarray([[1.0, 1.0, 9.0], [0.0, 1.0, 9.0]])[None, :, :, None]
  gradient = jax.grad(lambda x: max_pool(x).sum())(x)
  np.testing.assert_array_equal(gradient[0, :, :, 0], [[1, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize("place", range(4))
def test_a_nan_among_four_pixels_is_their_maximum_and_gets_the_gradient(place):
  x = jnp.arange(8.0).at[place].set(jnp.nan).reshape(2, 2, 2, 1)
  np.testing.assert_array_equal(max_pool(x).ravel(), [jnp.nan, 7])
  gradient = jax.grad(lambda x: max_pool(x).sum())(x)
  np.testing.assert_array_equal(gradient.ravel(), jnp.zeros(8).at[jnp.array([place, 7])].set(1))


def test_maxima_and_their_gradients_equal_those_of_numpy_where_many_are_equal():
  """Relu makes ties of zeros; the gradient goes to the first maximum of the first row with one."""
  x = np.maximum(np.random.default_rng(0).integers(-3, 3, (2, 6, 8, 3)), 0).astype(np.float32)
  pooled, pull_back = jax.vjp(max_pool, jnp.asarray(x))
  cells = x.reshape(2, 3, 2, 4, 2, 3)
  np.testing.assert_array_equal(pooled, cells.max(axis=(2, 4)))
  cotangent = np.random.default_rng(1).normal(size=pooled.shape).astype(np.float32)
  # Rows are compared first, column by column, and then the two winners.
  rows = cells.argmax(axis=2)
  columns = cells.max(axis=2).argmax(axis=3)
  expected = np.zeros_like(cells)
  for place in np.ndindex(*cotangent.shape):
    n, i, j, c = place
    column = columns[n, i, j, c]
    expected[n, i, rows[n, i, j, column, c], j, column, c] = cotangent[place]
  np.testing.assert_array_equal(pull_back(jnp.asarray(cotangent))[0], expected.reshape(x.shape))
