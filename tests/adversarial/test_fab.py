"""FAB is the published search, and finds the shortest change where that is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq, linprog

import jaxbo
from jaxbo.adversarial import Box
from jaxbo.adversarial.fab import to_hyperplane
from tests.adversarial import problem
from tests.adversarial.problem import EPSILON, model

pytestmark = pytest.mark.slow

PARAMS, (IMAGES, LABELS) = problem.params(), problem.batch()


def shortest(norm, x, w, gap):
  """The length of the shortest change of ``x`` in [0, 1] with ``w @ d == gap``, in float64.

  By a linear program for linf, and by the multiplier of the constraint for l2.
  """
  x, w = np.asarray(x, np.float64).ravel(), np.asarray(w, np.float64).ravel()
  if norm == "linf":
    ones = np.ones((len(x), 1))
    both = np.block([[np.eye(len(x)), -ones], [-np.eye(len(x)), -ones]])
    bounds = [*zip(-x, 1 - x, strict=True), (0, None)]
    goal, row = np.append(0 * x, 1.0), np.append(w, 0.0)[None]
    found = linprog(goal, both, np.zeros(2 * len(x)), row, [gap], bounds)
    return found.fun if found.success else None
  change = lambda multiplier: np.clip(multiplier * w, -x, 1 - x)
  reach = lambda multiplier: w @ change(multiplier) - gap
  ends = -1e9 * abs(gap), 1e9 * abs(gap)
  if reach(ends[0]) * reach(ends[1]) >= 0:
    return None
  return np.linalg.norm(change(brentq(reach, *ends)))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_ways_to_the_hyperplane_are_the_shortest(norm, x64):
  """Pixels at walls and without a slope, hyperplanes on both sides, some out of reach."""
  rng = np.random.default_rng(0)
  images = rng.uniform(-0.5, 1.5, (40, 3, 3, 1)).clip(0, 1)
  slope = rng.normal(size=images.shape) * (rng.uniform(size=images.shape) < 0.8)
  gap = rng.normal(size=40) * np.repeat([0.1, 1.0, 5.0, 1e-2], 10)
  project = jax.jit(functools.partial(to_hyperplane, Box(1.0, norm=norm)))
  change = np.asarray(project(images, slope, gap))
  assert np.all((images + change >= -1e-12) & (images + change <= 1 + 1e-12))
  assert np.all(change[slope == 0] == 0)
  lengths = np.abs(change).max(axis=(1, 2, 3))
  if norm == "l2":
    lengths = np.linalg.norm(change.reshape(40, -1), axis=1)
  num_out_of_reach = 0
  for i in range(40):
    expected = shortest(norm, images[i], slope[i], gap[i])
    reached = np.sum(slope[i] * change[i])
    if expected is None:  # All go to their walls.
      num_out_of_reach += 1
      toward = np.sign(gap[i]) * np.sign(slope[i])
      np.testing.assert_allclose((images[i] + change[i])[toward > 0], 1, atol=1e-12)
      np.testing.assert_allclose((images[i] + change[i])[toward < 0], 0, atol=1e-12)
    else:
      assert reached == pytest.approx(gap[i], rel=1e-9)
      assert lengths[i] == pytest.approx(expected, rel=1e-6, abs=1e-12)
  assert 3 < num_out_of_reach < 20


def test_ways_are_finite_where_slopes_are_tiny_or_zero():
  images, gap = jnp.full((3, 4), 0.5), jnp.array([1.0, 1.0, 0.0])
  slope = jnp.stack([jnp.zeros(4), jnp.array([1e-30, -1e-30, 0, 1e-38]), jnp.ones(4)])
  for norm in ("linf", "l2"):
    change = np.asarray(
      jax.jit(functools.partial(to_hyperplane, Box(1.0, norm=norm)))(images, slope, gap)
    )
    np.testing.assert_array_equal(change[[0, 2]], 0)
    np.testing.assert_array_equal(change[1, :3], [0.5, -0.5, 0])


# The attack itself, in NumPy, one example and one target at a time, after AutoAttack's code.


def nearest(norm, x, w, b):
  """The point of the hyperplane ``w @ p == b`` in [0, 1] that is nearest to ``x``, by bisection."""
  gap = b - w @ x
  toward = np.sign(gap) * np.sign(w)
  room = np.where(toward > 0, 1 - x, x)
  speed = np.abs(w) if norm == "l2" else np.ones_like(w)
  change = lambda time: toward * np.minimum(time * speed, room)
  if np.abs(w) @ np.where(toward == 0, 0, room) <= abs(gap):
    return toward * room
  low, high = 0.0, 1e6
  for _ in range(200):
    middle = (low + high) / 2
    low, high = (middle, high) if abs(w @ change(middle)) < abs(gap) else (low, middle)
  return change(high)


def fab_by_hand(look, image, target, label, norm, num_steps):
  size = (lambda d: np.abs(d).max()) if norm == "linf" else np.linalg.norm
  x0 = np.asarray(image, np.float64).ravel()
  x, best, found = x0.copy(), np.inf, None
  for _ in range(num_steps):
    logits, jacobian = look(x)
    df, w = logits[target] - logits[label], jacobian[target] - jacobian[label]
    b = -df + w @ x
    d1, d2 = nearest(norm, x, w, b), nearest(norm, x0, w, b)
    a1, a2 = max(size(d1), 1e-8), max(size(d2), 1e-8)
    alpha = min(a1 / (a1 + a2), 0.1)
    x = np.clip((x + 1.05 * d1) * (1 - alpha) + (x0 + 1.05 * d2) * alpha, 0, 1)
    if np.argmax(look(x)[0]) != label:
      if size(x - x0) < best:
        best, found = size(x - x0), x.copy()
      x = x0 + 0.9 * (x - x0)
  return best, found


def numpy_model(x):
  """The logits of one image of the problem, and their slopes."""
  w, b, v = (np.asarray(PARAMS[name], np.float64) for name in ("w", "b", "v"))
  hidden = np.tanh(x @ w + b)
  return hidden @ v, ((1 - hidden**2)[:, None] * v).T @ w.T


@pytest.mark.parametrize("norm, epsilon", [("linf", 0.1), ("l2", 0.3)])
def test_fab_is_that_of_the_paper(norm, epsilon, x64):
  attack = jaxbo.adversarial.fab(model, Box(epsilon, norm=norm), num_steps=15, num_targets=3)
  images = IMAGES.astype(jnp.float64)
  params = jax.tree.map(lambda p: p.astype(jnp.float64), PARAMS)
  perturbed, info = attack.run(params, (images, LABELS))
  num_found = 0
  for i, label in enumerate(np.asarray(LABELS)):
    logits, _ = numpy_model(np.asarray(images[i]).ravel())
    expected = np.asarray(images[i]).ravel()
    if np.argmax(logits) == label:
      targets = np.argsort(-logits)[1:4]
      ways = [fab_by_hand(numpy_model, images[i], t, label, norm, 15) for t in targets]
      distance, found = min(ways, key=lambda pair: pair[0])
      if distance <= epsilon:
        expected, num_found = found, num_found + 1
    np.testing.assert_allclose(np.asarray(perturbed[i]).ravel(), expected, atol=1e-7)
  assert 1 < num_found < 5  # of five that the model classifies correctly
  assert not info.not_finite.any()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_shortest_change_of_a_linear_classifier_is_found(norm):
  """With the range of pixels in its way: the least over the other classes, known exactly."""
  rng = np.random.default_rng(0)
  weights, images = rng.normal(size=(16, 4)), rng.uniform(0, 1, (20, 16))
  linear = lambda params, x: x @ params
  labels = np.argmax(images @ weights, axis=1)
  attack = jaxbo.adversarial.fab(linear, Box(10.0, norm=norm), num_steps=60)
  batch = jnp.asarray(images, jnp.float32), jnp.asarray(labels, jnp.int32)
  perturbed, info = attack.run(jnp.asarray(weights, jnp.float32), batch)
  change = np.asarray(perturbed, np.float64) - images
  order = np.inf if norm == "linf" else 2
  for i, label in enumerate(labels):
    others = [k for k in range(4) if k != label]
    sides = [weights[:, k] - weights[:, label] for k in others]
    expected = min(shortest(norm, images[i], w, -w @ images[i]) or np.inf for w in sides)
    assert expected <= np.linalg.norm(change[i], order) * (1 + 1e-5) <= 1.01 * expected
  assert np.all(np.argmax(perturbed @ weights.astype("f"), axis=1) != labels)
  # A ball that is too small for most of them.
  lengths = np.linalg.norm(change, order, axis=1)
  radius = float(np.sort(lengths)[4] * 1.001)
  few = jaxbo.adversarial.fab(linear, Box(radius, norm=norm), num_steps=60)
  ours = few(jnp.asarray(weights, jnp.float32), batch)
  within = lengths <= radius
  np.testing.assert_array_equal(ours, np.where(within[:, None], perturbed, batch[0]))
  assert info.num_correct.shape == (20,)


def test_units_of_channels_are_those_of_epsilon():
  """As if each channel was divided by its epsilon first."""
  scale = np.tile([0.5, 1.0, 2.0, 4.0], 4)
  rng = np.random.default_rng(1)
  weights, images = rng.normal(size=(16, 4)), rng.uniform(0, 1, (10, 16)).astype("f")
  linear = lambda params, x: x @ params
  labels = jnp.asarray(np.argmax(images @ weights, axis=1), jnp.int32)
  even = jaxbo.adversarial.fab(linear, Box(0.3, high=1.0), num_steps=20)
  wide = jaxbo.adversarial.fab(linear, Box(0.3 * scale, high=scale), num_steps=20)
  ours = even(jnp.asarray(weights, jnp.float32), (images, labels))
  of_channels = wide(
    jnp.asarray(weights / scale[:, None], jnp.float32), (images * scale.astype("f"), labels)
  )
  np.testing.assert_allclose(of_channels / scale.astype("f")[None], ours, atol=1e-4)
  assert np.any(ours != images)
  # A channel that must not move does not.
  still = jaxbo.adversarial.fab(linear, Box(np.tile([0.0, 0.5], 8)), num_steps=20)
  perturbed = still(jnp.asarray(weights, jnp.float32), (images, labels))
  np.testing.assert_allclose(perturbed[:, ::2], images[:, ::2], atol=1e-5)
  assert np.any(perturbed != images)


def test_what_is_misclassified_stays_and_points_that_are_not_finite_do_not_count():
  wrong = (LABELS + 1) % problem.CLASSES
  attack = jaxbo.adversarial.fab(model, Box(EPSILON), num_steps=3)
  still = np.argmax(model(PARAMS, IMAGES), axis=1) != np.asarray(wrong)
  perturbed = attack(PARAMS, (IMAGES, wrong))
  np.testing.assert_array_equal(np.asarray(perturbed)[still], np.asarray(IMAGES)[still])
  # The boundary is at 0.3, where there are no numbers.
  cliff = lambda p, x: jnp.where(x < 0.35, jnp.nan, jnp.concatenate([x - 0.3, 0.3 - x], axis=1))
  batch = jnp.full((2, 1), 0.5), jnp.zeros(2, jnp.int32)
  found, info = jaxbo.adversarial.fab(cliff, Box(0.4), num_steps=5).run((), batch)
  np.testing.assert_array_equal(found, batch[0])
  assert info.num_not_finite == 2


def test_errors_name_the_argument(as_users_run):
  for options, message in [
    ({"num_steps": 0}, "num_steps must be at least 1"),
    ({"num_targets": 0}, "num_targets must be at least 1"),
    ({"overshoot": 0.9}, r"overshoot must be in \[1, inf\)"),
    ({"backward": 1.0}, r"backward must be in \(0, 1\)"),
    ({"bias": 1.5}, r"bias must be in \[0, 1\]"),
  ]:
    with pytest.raises(ValueError, match=message):
      jaxbo.adversarial.fab(model, Box(0.1), **options)
