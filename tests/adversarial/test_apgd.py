"""APGD is the published attack, and keeps what is best among starts, targets and steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbo
from jaxbo.adversarial import Box
from jaxbo.adversarial.apgd import _check_point, _start, _visit, intervals
from jaxbo.adversarial.box import make_ball
from tests.adversarial import problem
from tests.adversarial.problem import EPSILON, model

pytestmark = pytest.mark.slow

PARAMS, (IMAGES, LABELS) = problem.params(), problem.batch()


def test_apgd_is_at_least_as_strong_as_pgd_at_equal_steps():
  pgd = jaxbo.adversarial.pgd(model, Box(EPSILON), step_size=EPSILON / 4, num_steps=20)
  apgd = jaxbo.adversarial.apgd(model, Box(EPSILON), num_steps=20)
  losses, wrong = {}, {}
  for name, attack in {"pgd": pgd, "apgd": apgd}.items():
    logits = model(PARAMS, attack(PARAMS, (IMAGES, LABELS), 3))
    losses[name] = problem.cross_entropy(logits, LABELS)
    wrong[name] = np.argmax(logits, axis=1) != np.asarray(LABELS)
  assert np.all(losses["apgd"] >= losses["pgd"] - 1e-5)
  assert wrong["apgd"].sum() >= wrong["pgd"].sum()


def wavy(params, images):
  """Hills and valleys within the box, so that momentum and step sizes matter."""
  return model(params, jnp.sin(9 * images))


def apgd_by_hand(image, start, label, epsilon, num_steps):
  """As in AutoAttack's code, for one example of the wavy model."""
  project = lambda x: np.clip(np.clip(x, image - epsilon, image + epsilon), 0, 1)
  look = functools.partial(problem.look, model=wavy)
  x = x_old = x_best = np.asarray(start)
  loss, slope, wrong = look(x, label)
  best, best_slope, adversarial = loss, slope, [(loss, x)] if wrong else []
  step, history, reduced, last_best = 2 * epsilon, [], True, loss
  length, smallest = max(int(0.22 * num_steps), 1), max(int(0.06 * num_steps), 1)
  shrink, counter, before = max(int(0.03 * num_steps), 1), 0, loss
  for k in range(num_steps):
    z = project(x + step * np.sign(slope))
    share = 1.0 if k == 0 else 0.75
    x, x_old = project(x + share * (z - x) + (1 - share) * (x - x_old)), x
    loss, slope, wrong = look(x, label)
    if wrong:
      adversarial.append((loss, x))
    history.append(loss > before)
    before = loss
    if loss > best:
      best, x_best, best_slope = loss, x, slope
    counter += 1
    if counter == length:
      few = sum(history[-length:]) <= 0.75 * length
      if few or (not reduced and last_best >= best):
        step /= 2
        x, slope, before, reduced = x_best, best_slope, best, True
      else:
        reduced = False
      last_best, counter, length = best, 0, max(length - shrink, smallest)
  return max(adversarial, key=lambda pair: pair[0])[1] if adversarial else x_best


def test_apgd_is_that_of_the_paper(x64):
  epsilon, key, images = 0.3, jax.random.key(5), IMAGES.astype(jnp.float64)
  attack = jaxbo.adversarial.apgd(wavy, Box(epsilon), num_steps=30)
  perturbed = attack(PARAMS, (images, LABELS), jax.random.clone(key))
  start = images + make_ball(Box(epsilon)).random(key, images)
  for i in range(problem.BATCH):
    expected = apgd_by_hand(np.asarray(images[i]), start[i], LABELS[i], epsilon, 30)
    np.testing.assert_allclose(perturbed[i], expected, atol=1e-6)


def test_checkpoints_are_those_of_autoattack():
  lengths = intervals(100)
  assert (np.flatnonzero(lengths) + 1).tolist() == [22, 41, 57, 70, 80, 87, 93, 99]
  assert lengths[lengths > 0].tolist() == [22, 19, 16, 13, 10, 7, 6, 6]
  assert intervals(1).tolist() == [1]


def test_a_step_is_halved_where_few_steps_climb_or_nothing_improves():
  """Three of four climb but in the first; the best value has changed in the first two alone."""
  one = lambda *values: np.array(values, np.float32)
  places, zeros = np.zeros((4, 2), np.float32), np.zeros(4, np.float32)
  carry = jax.jit(_start)(places, (places, zeros, zeros > 0, zeros > 0))._replace(
    best_delta=places + 1,
    best_value=one(3, 3, 2, 2),
    checkpoint_value=one(1, 1, 2, 2),
    num_climbs=np.array([3, 4, 4, 4], np.int32),
    halved=np.array([False, False, False, True]),
  )
  check_point = jax.jit(_check_point)
  after = jax.device_get(check_point(carry, 4))
  assert (after.step_size / carry.step_size).tolist() == [0.5, 1, 0.5, 1]
  assert after.halved.tolist() == [True, False, True, False]
  assert after.delta[:, 0].tolist() == [1, 0, 1, 0]
  assert after.value.tolist() == [3, 0, 2, 0]
  assert after.num_climbs.tolist() == [0, 0, 0, 0]
  assert after.checkpoint_value.tolist() == [3, 3, 2, 2]
  between = check_point(carry, 0)
  for mine, theirs in zip(between, carry, strict=True):
    np.testing.assert_array_equal(mine, theirs)


def test_restarts_and_targets_start_at_points_of_their_own():
  """Without a slope attacks stay where they start; the best of four is at 0.06 in the mean."""

  def flat(params, images):
    x = jax.lax.stop_gradient(images)
    return jnp.concatenate([9 + 0 * x, x, x - 1, x - 2, x - 3], axis=1)

  options = {"box": Box(0.1), "num_steps": 1}
  images = jnp.full((200, 1), 0.5)
  for attack, num_points in (
    (jaxbo.adversarial.pgd(flat, step_size=0.1, objective="margin", restarts=4, **options), 1),
    (jaxbo.adversarial.apgd(flat, objective="margin", restarts=4, **options), 2),
    (jaxbo.adversarial.apgd(flat, objective="targeted_dlr", num_targets=4, **options), 2),
  ):
    perturbed, info = attack.run((), (images, jnp.zeros(200, jnp.int32)), 0)
    assert np.mean(perturbed - 0.5) == pytest.approx(0.06, abs=4 * 0.033 / np.sqrt(200))
    assert np.all(info.num_correct == num_points)


def test_apgd_keeps_the_misclassified_point_of_the_largest_objective():
  """Its only step is to the top of the objective, where all is classified correctly."""
  uphill = lambda params, x: jnp.concatenate([10 * (x - 0.45), 0 * x], axis=1)
  options = {"box": Box(0.1), "num_steps": 1, "restarts": 4}
  attack = jaxbo.adversarial.apgd(
    uphill, objective=lambda logits, labels, clean: logits[:, 0], **options
  )
  images, key = jnp.full((50, 1), 0.5), jax.random.key(0)
  found = attack((), (images, jnp.zeros(50, jnp.int32)), jax.random.clone(key))
  draw = lambda key: images + make_ball(Box(0.1)).random(key, images)
  starts = np.asarray(jax.vmap(draw)(jax.random.split(key, 4)))
  expected = np.max(np.where(starts < 0.45, starts, 0), axis=0)
  assert 0 < np.mean(expected == 0) < 0.6
  np.testing.assert_allclose(found, np.where(expected > 0, expected, 0.6), atol=1e-6)


def test_apgd_turns_back_where_numbers_are_not_finite():
  """They are beyond 0.55, where its first steps end; they are no success."""
  cliff = lambda p, x: jnp.where(x > 0.55, jnp.nan, jnp.concatenate([2 - x, x], axis=1))
  images, key = jnp.full((50, 1), 0.5), jax.random.key(0)
  attack = jaxbo.adversarial.apgd(cliff, Box(0.3), num_steps=30)
  found, info = attack.run((), (images, jnp.zeros(50, jnp.int32)), jax.random.clone(key))
  start = images + make_ball(Box(0.3)).random(key, images)
  lost = np.asarray(start > 0.55)
  assert 0.2 < lost.mean() < 0.8
  np.testing.assert_allclose(found[lost], start[lost], atol=1e-6)
  assert np.all((found[~lost] > 0.5) & (found[~lost] <= 0.55))
  assert info.not_finite.all()

  @jax.jit
  def start_and_visit(place, nothing, yes):
    carry = _start(place, (place, nothing, ~yes, ~yes))
    return carry, _visit(carry, place + 1, (place, nothing + jnp.nan, yes, yes))

  carry, after = start_and_visit(np.zeros((1, 2), "f"), np.zeros(1, "f"), np.ones(1, bool))
  assert after.adversarial_value == carry.adversarial_value == -jnp.inf


def test_targets_are_the_likeliest_other_classes():
  """Where only the third class can be reached, the third target finds it."""

  def steps(params, images):
    x = images[:, 0]
    return jnp.stack([3 + 0 * x, 2 - x, 1 - x, 40 * x - 3.9, -9 + 0 * x], axis=1)

  batch = jnp.full((1, 1), 0.05), jnp.zeros(1, jnp.int32)
  options = {"box": Box(0.15, low=-1.0), "num_steps": 12, "objective": "targeted_dlr"}
  attack = jaxbo.adversarial.apgd(steps, num_targets=3, **options)
  # Towards the first two classes, down the slope, nothing is found but by the start.
  few = jaxbo.adversarial.apgd(steps, num_targets=2, **options)
  predicted = lambda attack: [int(steps((), attack((), batch, k)).argmax()) for k in range(4)]
  assert predicted(attack) == [3, 3, 3, 3]
  assert 0 in predicted(few)


def test_where_all_targets_fail_the_largest_margin_is_kept():
  """Up the slope the margin is -1 and DLR -1 / 5, down it -2 and -2 / 16.5."""

  def out_of_reach(params, images):
    x = images[:, 0]
    return jnp.stack([0 * x + 10, 7 + 20 * x, 7 - 10 * x, 110 * x - 7, 0 * x - 60], axis=1)

  batch = jnp.zeros((2, 1)), jnp.zeros(2, jnp.int32)
  options = {"box": Box(0.1, low=-1.0), "num_steps": 5, "num_targets": 2}
  attack = jaxbo.adversarial.apgd(out_of_reach, objective="targeted_dlr", **options)
  np.testing.assert_allclose(attack((), batch, 0), 0.1, rtol=1e-5)
