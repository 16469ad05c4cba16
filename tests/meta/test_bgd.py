"""Bayesian gradient descent: P14, and what it does with samples."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbo

pytestmark = pytest.mark.slow  # All together, not each.


def updated(mean, deviation, curvature, target, num_samples, **options):
  """Means and deviations of equal weights after one update on ``(h / 2) (theta - m)^2``."""
  tx = jaxbo.meta.bayesian_gradient_descent(1.0, deviation, num_samples=num_samples, **options)
  value_fn = lambda theta: 0.5 * curvature * jnp.sum((theta - target) ** 2)

  @jax.jit
  def update(params):
    updates, state = tx.update(
      jax.grad(value_fn)(params), tx.init(params), params, value_fn=value_fn
    )
    return optax.apply_updates(params, updates), state

  return update(mean)


def test_the_step_of_p14():
  """40,000 independent weights of 50 samples each: means within four standard errors.

  With exact expectations the new mean is 1.12 and the new deviation 0.1809975124. The mean is
  linear in the noise; the deviation is not, so its law of averages is checked on samples as well.
  """
  mean, state = updated(jnp.full(40_000, 1.3), 0.2, 5.0, 0.4, 50)
  moved, deviations = np.asarray(mean, np.float64), np.asarray(state.deviations, np.float64)
  # mu' = mu - s^2 h (mu - m + s mean(eps)): its sd is s^3 h / sqrt(50).
  sd = 0.2**3 * 5 / np.sqrt(50)
  assert abs(moved.mean() - 1.12) < 4 * sd / np.sqrt(40_000)
  assert abs(moved.std() / sd - 1) < 4 / np.sqrt(2 * 40_000)
  # E[g eps] is h (mu - m) mean(eps) + h s mean(eps^2): its variance over samples by moments.
  sd_a = 0.5 * 0.2 * 5 * np.sqrt((0.9**2 + 2 * 0.2**2) / 50)
  a = np.sinh(-np.log(deviations / 0.2))
  assert abs(a.mean() - 5 * 0.2**2 / 2) < 4 * sd_a / np.sqrt(40_000)
  np.testing.assert_allclose(0.2 * np.exp(-np.arcsinh(a.mean())), 0.1809975124, rtol=2e-3)


def test_the_rule_equals_that_of_the_published_code(x64):
  """``s sqrt(1 + (s c / 2)^2) - s^2 c / 2`` on the very samples of the update."""
  scale = jnp.array([1.0, -2.0, 30.0])
  value_fn = lambda theta: jnp.sum(scale * jnp.sin(theta)) + 0.1 * jnp.sum(theta**4)
  tx = jaxbo.meta.bayesian_gradient_descent(0.7, 0.3, num_samples=4, num_examples=10, key=5)
  mean, state = jnp.array([0.2, 0.5, -1.0]), tx.init(jnp.zeros(3))
  updates, after = tx.update(mean, state, mean, value_fn=value_fn)
  base = jax.random.fold_in(jax.random.key(5), 0)
  keys = [jax.random.fold_in(base, sample) for sample in range(4)]
  noise = [np.asarray(optax.tree.random_like(key, mean)) for key in keys]
  grads = [10 * (scale * np.cos(mean + 0.3 * e) + 0.4 * (mean + 0.3 * e) ** 3) for e in noise]
  gradient = np.mean(grads, axis=0)
  c = np.mean([g * e for g, e in zip(grads, noise, strict=True)], axis=0)
  np.testing.assert_allclose(updates, -0.7 * 0.09 * gradient, rtol=1e-12)
  expected = 0.3 * np.sqrt(1 + (0.3 * c / 2) ** 2) - 0.09 * c / 2
  np.testing.assert_allclose(after.deviations, expected, rtol=1e-10)
  assert np.all(np.asarray(after.deviations) > 0)


def test_updates_draw_anew_and_depend_on_the_key():
  loss = lambda theta: jnp.sum(theta**2)
  steps = []
  for key in (0, 1):
    tx = jaxbo.meta.bayesian_gradient_descent(1.0, 0.1, key=key)
    state = tx.init(jnp.zeros(2))
    for _ in range(2):
      step, state = tx.update(jnp.zeros(2), state, jnp.zeros(2), value_fn=loss)
      steps.append(tuple(np.asarray(step)))
  assert len(set(steps)) == 4


def test_a_gradient_that_is_not_finite_moves_nothing():
  tx = jaxbo.meta.bayesian_gradient_descent(1.0, 0.1)
  params = {"a": jnp.ones(2), "b": jnp.float32(1.0)}
  state = tx.init(params)
  bad = lambda p: jnp.sum(p["a"] ** 2) + p["b"] * jnp.nan
  updates, after = tx.update(params, state, params, value_fn=bad)
  np.testing.assert_array_equal(updates["a"], [0, 0])
  np.testing.assert_array_equal(after.deviations["a"], state.deviations["a"])
  assert not after.info.finite
  assert after.bgd_count == 1


def test_bad_arguments():
  for name in ("learning_rate", "deviation"):
    arguments = {"learning_rate": 1.0, "deviation": 1.0, name: 0.0}
    with pytest.raises(ValueError, match=f"{name} must be positive and finite, got 0"):
      jaxbo.meta.bayesian_gradient_descent(**arguments)
  for name in ("num_samples", "num_examples"):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
      jaxbo.meta.bayesian_gradient_descent(1.0, 1.0, **{name: 0})
  tx = jaxbo.meta.bayesian_gradient_descent(1.0, 1.0)
  params = jnp.zeros(2)
  with pytest.raises(TypeError, match="update must be given value_fn="):
    tx.update(params, tx.init(params), params)
  with pytest.raises(ValueError, match="update must be given params"):
    tx.update(params, tx.init(params), value_fn=jnp.sum)
