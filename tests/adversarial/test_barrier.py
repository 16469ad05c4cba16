"""The lower level of DONE alone: one pixel, pushed up a slope, whose minimum has a closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbo.adversarial import Box
from jaxbo.adversarial import barrier as lower_level
from tests.adversarial.problem import EPSILON

pytestmark = pytest.mark.slow


def stationary(slope, barrier, epsilon):
  """The root of ``s = 2 c d / (e^2 - d^2)``."""
  return (-barrier + np.sqrt(barrier**2 + (slope * epsilon) ** 2)) / slope


@functools.partial(jax.jit, static_argnames=("direction", "num_steps"))
def solve(slopes, barrier, step_size, direction="gradient", num_steps=400):
  images = jnp.full((slopes.size, 1), 0.5)
  box = Box(EPSILON).bounds(images)
  attack_loss = lambda x: -slopes * x[:, 0]
  return lower_level.minimize(
    attack_loss,
    images,
    box,
    box.center + 0.4 * EPSILON,
    barrier=barrier,
    num_steps=num_steps,
    step_size=step_size,
    direction=direction,
  )


SLOPES = np.array([0.3, 1.0, 10.0, -2.0])


def test_steps_of_any_size_find_the_minimum_of_the_barrier():
  """Also where plain descent, whose safe step is d^2 / c, would bounce between the walls."""
  for barrier in (1e-1, 1e-2, 1e-3):
    expected = stationary(SLOPES, barrier, EPSILON)
    for step_size in (0.1, 10.0, 1e4):
      minimum = solve(jnp.asarray(SLOPES, jnp.float32), barrier, step_size)
      np.testing.assert_allclose(minimum.delta[:, 0], expected, atol=2e-6)
      assert minimum.last_step.max() < 1e-6
    # Plain descent with one of these steps, cut at the walls, does not.
    delta, path = 0.04, []
    for _ in range(400):
      slope = -SLOPES[1] + barrier * (1 / (EPSILON - delta) - 1 / (EPSILON + delta))
      delta = np.clip(delta - 10.0 * slope, -0.999 * EPSILON, 0.999 * EPSILON)
      path.append(delta)
    assert np.abs(np.diff(path[-20:])).max() > EPSILON


def test_one_step_has_the_barriers_curvature_in_it():
  minimum = solve(jnp.asarray(SLOPES, jnp.float32), 1e-2, 0.02, num_steps=1)
  below, above = 1.4 * EPSILON, 0.6 * EPSILON
  slope = -SLOPES + 1e-2 * (1 / above - 1 / below)
  move = -slope / (1 / 0.02 + 1e-2 * (above**-2 + below**-2))
  move = np.clip(move, -0.9 * below, 0.9 * above)
  np.testing.assert_allclose(minimum.delta[:, 0], 0.4 * EPSILON + move, rtol=1e-5)
  np.testing.assert_allclose(minimum.last_step, np.abs(move), rtol=1e-4)
  far = solve(jnp.full(4, 1e6), 1e-2, 1e6, num_steps=1)
  np.testing.assert_allclose(far.delta[:, 0], 0.4 * EPSILON + 0.9 * above, rtol=1e-5)


def test_a_start_on_a_wall_is_taken_inside():
  """A uniform draw is zero now and then: the barrier would be infinite there."""
  images = jnp.full((2, 1), 0.5)
  box = Box(EPSILON).bounds(images)
  sizes = {"barrier": 1e-2, "num_steps": 1, "step_size": 1.0, "margin": 0.1}
  minimum = lower_level.minimize(lambda x: -x[:, 0], images, box, box.low, **sizes)
  assert np.all((minimum.delta > box.low) & (minimum.delta < box.high))
  assert not minimum.not_finite.any()


def test_adam_ends_within_a_step_of_the_minimum():
  slopes = jnp.asarray(SLOPES, jnp.float32)
  minimum = solve(slopes, 1e-2, 1e-3, direction="adam")
  np.testing.assert_allclose(minimum.delta[:, 0], stationary(SLOPES, 1e-2, EPSILON), atol=1e-3)
  first = solve(slopes, 1e-2, 1e-3, direction="adam", num_steps=1)
  slope = -SLOPES + 1e-2 * (1 / 0.06 - 1 / 0.14)
  np.testing.assert_allclose(first.delta[:, 0] - 0.04, -1e-3 * np.sign(slope), rtol=1e-3)
