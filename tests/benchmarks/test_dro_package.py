"""The robust regressions of the benchmark, without the package that it compares with."""

import functools

import jax.numpy as jnp
import numpy as np

from benchmarks import dro_package


def test_the_dual_of_the_wasserstein_ball_is_its_closed_form_at_the_optimum(x64):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(40, 2))
  batch = {"x": jnp.asarray(x), "y": jnp.asarray(x @ [1.0, -0.5] + rng.normal(size=40))}
  objective = functools.partial(dro_package.wasserstein, batch=batch)
  zeros = {"theta": jnp.zeros(2), "b": jnp.zeros(()), "penalty": jnp.zeros(())}
  best, _, _ = dro_package.minimize(objective, zeros)

  def closed_form(theta, b):
    root = np.sqrt(np.mean((batch["y"] - x @ theta - b) ** 2))
    return (root + np.sqrt(dro_package.RADIUS) * np.linalg.norm(theta)) ** 2

  theta, b = np.asarray(best["theta"]), float(best["b"])
  value = closed_form(theta, b)
  np.testing.assert_allclose(objective(best), value, rtol=1e-8)
  for step in 1e-3 * np.eye(2):  # It is a minimum.
    assert closed_form(theta + step, b) > value < closed_form(theta - step, b)
