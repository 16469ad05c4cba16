"""Streams of Gaussians: the Bayes answer, exact error rates, jumps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import jaxbo.tasks
from tests.cases import cases

pytestmark = pytest.mark.slow  # All together, not each.


@functools.partial(jax.jit, static_argnums=(1, 2))
def play(state, stream, num_rounds):
  return jax.lax.scan(lambda state, _: stream.step(state), state, length=num_rounds)


def test_the_moving_gaussian_of_p15():
  """The domain begins at -5 and moves by one at each switch; variances are right."""
  stream = jaxbo.tasks.moving_gaussian_stream(2, 4, stay_probability=0.5, num_queries=3)
  _, batch = play(stream.init(0), stream, 4000)
  truth = batch.extra
  assert batch.train.shape == (4000, 4, 2)
  assert batch.val.shape == (4000, 3, 2)
  np.testing.assert_array_equal(truth.domain_mean[0], [-5, -5])
  np.testing.assert_array_equal(truth.domain_switch[1:], truth.task_switch[1:])
  assert truth.task_switch[0]
  assert not truth.domain_switch[0]
  expected = -5 + np.cumsum(truth.domain_switch)
  np.testing.assert_allclose(truth.domain_mean, np.stack([expected] * 2, axis=1))
  np.testing.assert_array_equal(truth.domain, np.cumsum(truth.domain_switch))
  switches = np.asarray(truth.task_switch)
  assert abs(switches[1:].mean() - 0.5) < 4 * np.sqrt(0.25 / 4000)
  kept = ~switches[1:]
  np.testing.assert_array_equal(truth.task_mean[1:][kept], truth.task_mean[:-1][kept])
  spread = np.asarray(truth.task_mean - truth.domain_mean)[switches]
  noise = np.asarray(batch.train - truth.task_mean[:, None])
  query_noise = np.asarray(batch.val - truth.task_mean[:, None])
  for sample, variance in ((spread, 1.0), (noise, 0.1), (query_noise, 0.1)):
    assert abs(sample.mean()) < 4 * np.sqrt(variance / sample.size)
    assert abs(sample.var() / variance - 1) < 4 * np.sqrt(2 / sample.size)
  correlation = np.corrcoef(noise[:, :3].ravel(), query_noise.ravel())[0, 1]
  assert abs(correlation) < 4 / np.sqrt(query_noise.size)


def test_nothing_beats_the_posterior_mean():
  """Its squared error is d / (n / s^2 + 1); sample and domain mean have larger ones."""
  stream = jaxbo.tasks.moving_gaussian_stream(
    2, 3, stay_probability=0.0, data_variance=2.0, domain_switch_probability=0.3
  )
  _, batch = play(stream.init(1), stream, 20_000)
  truth = batch.extra
  posterior = functools.partial(jaxbo.tasks.gaussian_posterior_mean, data_variance=2.0)
  answers = {
    "bayes": (jax.vmap(posterior)(batch.train, truth.domain_mean), 2 / (3 / 2 + 1)),
    "sample": (jnp.mean(batch.train, axis=1), 2 * 2 / 3),
    "domain": (truth.domain_mean, 2.0),
  }
  for answer, expected in answers.values():
    errors = np.sum((np.asarray(answer) - truth.task_mean) ** 2, axis=1)
    # A sum of two squared normals is exponential: its sd is its mean.
    assert abs(errors.mean() / expected - 1) < 4 / np.sqrt(20_000)


def test_the_posterior_mean_is_the_minimum_of_its_quadratic():
  samples, prior_mean = jnp.array([[1.0, -2.0], [3.0, 0.5], [2.0, 4.0]]), jnp.array([-1.0, 5.0])
  found = jaxbo.tasks.gaussian_posterior_mean(
    samples, prior_mean, task_variance=4.0, data_variance=0.5
  )
  slope = np.sum(np.asarray(found) - np.asarray(samples), axis=0) / 0.5 + (found - prior_mean) / 4.0
  np.testing.assert_allclose(slope, 0, atol=1e-5)


def test_jumps_have_their_length_and_the_loss_the_exact_error_rates():
  """P12 on the stream itself, for the model that knows the last task's mean."""
  stream = jaxbo.tasks.jumping_gaussian_stream(5, 10, stay_probability=0.5, distance=2.0)
  _, batch = play(stream.init(2), stream, 40_000)
  means = np.asarray(batch.extra.task_mean, np.float64)
  last = np.concatenate([np.zeros((1, 5)), means[:-1]])
  jumps = np.linalg.norm(means - last, axis=1)
  switches = np.asarray(batch.task_switch)
  np.testing.assert_allclose(jumps[switches], 2, rtol=1e-3)  # Far from the origin, in float32.
  assert not np.any(jumps[~switches])
  assert not np.any(batch.domain)
  directions = (means - last)[switches] / 2
  np.testing.assert_allclose(np.mean(directions, 0), 0, atol=4 / np.sqrt(5 * len(directions)))
  losses = np.sum((last[:, None] - batch.train) ** 2, axis=(1, 2)) / 20
  for threshold in (3.0, 3.5):
    for kind, parameter in ((switches, 40.0), (~switches, 1e-12)):
      expected = stats.ncx2.sf(20 * threshold, 50, parameter)
      sd = np.sqrt(expected * (1 - expected) / kind.sum())
      assert abs(np.mean(losses[kind] > threshold) - expected) < 4 * sd


def test_streams_resume_and_depend_on_the_key():
  stream = jaxbo.tasks.moving_gaussian_stream(2, 3, stay_probability=0.5)
  middle, first = play(stream.init(3), stream, 3)
  _, second = play(middle, stream, 3)
  _, whole = play(stream.init(3), stream, 6)
  joined = jax.tree.map(lambda a, b: np.concatenate([a, b]), first, second)
  jax.tree.map(np.testing.assert_array_equal, joined, whole)
  assert np.any(play(stream.init(4), stream, 3)[1].train != first.train)


@cases(
  ("name", "value", "message"),
  [
    ("stay_probability", 1.5, r"must be in \[0, 1\], got 1.5"),
    ("domain_switch_probability", -0.5, r"must be in \[0, 1\], got -0.5"),
    ("num_queries", 0, "must be at least 1, got 0"),
    ("first_mean", float("nan"), "must be finite, got nan"),
    ("domain_step", float("inf"), "must be finite, got inf"),
    ("task_variance", -1.0, "must be non-negative and finite, got -1.0"),
    ("data_variance", -1.0, "must be non-negative and finite, got -1.0"),
  ],
)
def test_bad_arguments(name, value, message):
  with pytest.raises(ValueError, match=f"{name} {message}"):
    jaxbo.tasks.moving_gaussian_stream(2, 3, **{"stay_probability": 0.5, name: value})


def test_more_bad_arguments():
  with pytest.raises(ValueError, match="dim must be at least 1, got 0"):
    jaxbo.tasks.moving_gaussian_stream(0, 3, stay_probability=0.5)
  with pytest.raises(ValueError, match="distance must be non-negative and finite, got -2"):
    jaxbo.tasks.jumping_gaussian_stream(2, 3, stay_probability=0.5, distance=-2.0)
  with pytest.raises(ValueError, match="data_variance must be positive and finite, got 0"):
    jaxbo.tasks.gaussian_posterior_mean(jnp.ones((2, 3)), jnp.zeros(3), data_variance=0.0)
