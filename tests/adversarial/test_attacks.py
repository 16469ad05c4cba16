"""Attacks stay in their balls, raise the loss, and do step by step what their papers say."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis.extra import numpy as hnp

import jaxbo
from jaxbo.adversarial.apgd import _check_point, _start, intervals
from jaxbo.adversarial.attack import Found, best, difference_of_logits_ratio, targeted_dlr
from jaxbo.adversarial.box import make_ball
from jaxbo.adversarial.losses import kl_divergence
from jaxbo.adversarial.square import _paint
from tests.adversarial import problem
from tests.adversarial.problem import EPSILON, model

pytestmark = pytest.mark.slow

PARAMS, (IMAGES, LABELS) = problem.params(), problem.batch()
TINY = {"epsilon": EPSILON, "step_size": 0.03, "num_steps": 6}


def guarded(params, images):
  """NaN outside the range, so that no attack may look there on its way."""
  inside = jnp.all((images > -1e-6) & (images < 1 + 1e-6), axis=(1, 2, 3))
  return jnp.where(inside[:, None], model(params, images), jnp.nan)


def make_attacks(epsilon, num_steps=6):
  """All kinds of attacks; ``epsilon`` may be traced."""
  options = {"epsilon": epsilon, "num_steps": num_steps}
  pgd = functools.partial(jaxbo.pgd, guarded, step_size=epsilon / 3 + 1e-6, **options)
  return {
    "fgsm": jaxbo.fgsm(guarded, epsilon=epsilon),
    "fgsm_l2": jaxbo.fgsm(guarded, epsilon=epsilon, norm="l2", random_start=False),
    "pgd": pgd(),
    "pgd_adam": pgd(direction="adam", objective="margin"),
    "pgd_l2": pgd(norm="l2", restarts=2),
    "pgd_noise": pgd(random_start=0.001, objective="kl"),
    "apgd": jaxbo.apgd(guarded, **options),
    "apgd_l2": jaxbo.apgd(guarded, norm="l2", objective="dlr", restarts=2, **options),
    "apgd_t": jaxbo.apgd(guarded, objective="targeted_dlr", num_targets=2, **options),
    "square": jaxbo.square(guarded, epsilon=epsilon, num_queries=30),
  }


@jax.jit
def run_all(epsilon, images, labels, key):
  attacks = make_attacks(epsilon)
  keys = jax.random.split(key, len(attacks))
  return {
    name: attack.run(PARAMS, (images, labels), k)
    for (name, attack), k in zip(attacks.items(), keys, strict=True)
  }


@functools.cache
def results(seed=0):
  return jax.device_get(run_all(EPSILON, IMAGES, LABELS, jax.random.key(seed)))


pixels = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1, width=32))


@hypothesis.settings(max_examples=30, deadline=None, derandomize=True)
@hypothesis.given(
  images=hnp.arrays(np.float32, IMAGES.shape, elements=pixels),
  epsilon=st.one_of(st.just(0.0), st.floats(1e-6, 2.0)),
  seed=st.integers(0, 2**31 - 1),
)
def test_attacks_never_leave_the_ball_nor_the_range(images, epsilon, seed):
  found = run_all(epsilon, images, LABELS, jax.random.key(seed))
  for name, (perturbed, info) in jax.device_get(found).items():
    assert perturbed.min() >= 0, name
    assert perturbed.max() <= 1, name
    delta = (perturbed.astype(np.float64) - images).reshape(len(images), -1)
    size = np.linalg.norm(delta, axis=1) if name.endswith("l2") else np.abs(delta).max(axis=1)
    assert np.all(size <= epsilon * (1 + 1e-6) + 1e-6), name
    assert not info.not_finite.any(), name


def test_attacks_raise_the_loss():
  clean = problem.cross_entropy(model(PARAMS, IMAGES), LABELS)
  for name, (perturbed, _) in results().items():
    attacked = problem.cross_entropy(model(PARAMS, perturbed), LABELS)
    if name in ("fgsm", "fgsm_l2", "pgd", "apgd"):
      assert np.all(attacked > clean), name
    if name == "pgd_noise":  # raises the divergence from clean predictions
      moved = kl_divergence(model(PARAMS, IMAGES), model(PARAMS, perturbed))
      assert np.all(moved > 1e-3)
    else:
      assert np.mean(attacked) > np.mean(clean) + 0.02, name


APGD = jaxbo.apgd(model, epsilon=EPSILON, num_steps=20)


def test_apgd_is_at_least_as_strong_as_pgd_at_equal_steps():
  pgd = jaxbo.pgd(model, epsilon=EPSILON, step_size=EPSILON / 4, num_steps=20)
  losses, wrong = {}, {}
  for name, attack in {"pgd": pgd, "apgd": APGD}.items():
    logits = model(PARAMS, attack(PARAMS, (IMAGES, LABELS), 3))
    losses[name] = problem.cross_entropy(logits, LABELS)
    wrong[name] = np.argmax(logits, axis=1) != np.asarray(LABELS)
  assert np.all(losses["apgd"] >= losses["pgd"] - 1e-5)
  assert wrong["apgd"].sum() >= wrong["pgd"].sum()


def test_the_key_decides_what_is_drawn():
  again = jax.device_get(run_all(EPSILON, IMAGES, LABELS, jax.random.key(0)))
  for name, (perturbed, _) in results().items():
    np.testing.assert_array_equal(again[name][0], perturbed)
    draws = name != "fgsm_l2"
    assert np.any(results(1)[name][0] != perturbed) == draws, name
  attack = jaxbo.pgd(model, **TINY)
  keys = (7, jax.random.key(7), jax.random.PRNGKey(7))
  kinds = [attack(PARAMS, (IMAGES, LABELS), key) for key in keys]
  np.testing.assert_array_equal(kinds[0], kinds[1])
  np.testing.assert_array_equal(kinds[0], kinds[2])


# What follows is one example and one step at a time, in NumPy.


def wavy(params, images):
  """Hills and valleys within the box, so that momentum and step sizes matter."""
  return model(params, jnp.sin(9 * images))


@functools.partial(jax.jit, static_argnums=2)
def _look(image, label, model):
  logits_of = lambda x: model(PARAMS, x[None])
  value = lambda x: jaxbo.cross_entropy_loss(logits_of(x), label[None])[0]
  loss, slope = jax.value_and_grad(value)(image)
  return loss, slope, jnp.argmax(logits_of(image)[0])


def look(image, label, model=model):
  loss, slope, predicted = _look(jnp.asarray(image), label, model)
  return float(loss), np.asarray(slope), int(predicted) != int(label)


def pgd_by_hand(image, label, step_size, num_steps, stop_after=None):
  image = np.asarray(image)
  delta, num_correct, left = np.zeros_like(image), 0, stop_after
  for _ in range(num_steps):
    _, slope, wrong = look(image + delta, label)
    num_correct += not wrong
    if wrong and left is not None:
      if left == 0:
        return image + delta, num_correct + 0
      left -= 1
    delta = np.clip(delta + step_size * np.sign(slope), -EPSILON, EPSILON)
    delta = np.clip(image + delta, 0, 1) - image
  return image + delta, num_correct


@pytest.mark.parametrize("stop_after", [None, 1])
def test_pgd_and_its_early_stop_are_those_of_the_papers(stop_after):
  attack = jaxbo.pgd(model, stop_after=stop_after, random_start=False, **TINY)
  perturbed, info = attack.run(PARAMS, (IMAGES, LABELS))
  for i in range(problem.BATCH):
    expected, num_correct = pgd_by_hand(IMAGES[i], LABELS[i], 0.03, 6, stop_after)
    np.testing.assert_allclose(perturbed[i], expected, atol=1e-6)
    # A stopped example is looked at again where it stands, and is wrong there.
    assert info.num_correct[i] == num_correct
  assert 0 < np.mean(info.num_correct) < 6


def apgd_by_hand(image, start, label, epsilon, num_steps):
  """As in AutoAttack's code, for one example of the wavy model."""
  project = lambda x: np.clip(np.clip(x, image - epsilon, image + epsilon), 0, 1)
  look = functools.partial(globals()["look"], model=wavy)
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
  attack = jaxbo.apgd(wavy, epsilon=epsilon, num_steps=30)
  perturbed = attack(PARAMS, (images, LABELS), jax.random.clone(key))
  start = images + make_ball("linf", epsilon, 0.0, 1.0).random(key, images)
  for i in range(problem.BATCH):
    expected = apgd_by_hand(np.asarray(images[i]), start[i], LABELS[i], epsilon, 30)
    np.testing.assert_allclose(perturbed[i], expected, atol=1e-6)


def test_the_best_run_is_a_misclassified_one_and_then_the_highest():
  """Columns: none wrong; one wrong with the lower value; two wrong; the wrong one not finite."""
  values = jnp.array([[1.0, 5.0, 1.0, jnp.inf], [2.0, 1.0, 2.0, 3.0], [0.0, 2.0, 9.0, 4.0]])
  wrong = jnp.array([[0, 0, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0]], bool)
  runs = jnp.broadcast_to(jnp.arange(3.0)[:, None, None], (3, 4, 2))
  info = jaxbo.AttackInfo(jnp.arange(12).reshape(3, 4), ~jnp.isfinite(values))
  found = best(Found(runs, values, wrong, info))
  assert found.perturbed[:, 0].tolist() == [1, 1, 1, 2]
  assert found.wrong.tolist() == [False, True, True, False]
  assert found.info.num_correct.tolist() == [4, 5, 6, 11]
  assert found.info.not_finite.tolist() == [False, False, False, True]


def test_checkpoints_are_those_of_autoattack():
  lengths = intervals(100)
  assert (np.flatnonzero(lengths) + 1).tolist() == [22, 41, 57, 70, 80, 87, 93, 99]
  assert lengths[lengths > 0].tolist() == [22, 19, 16, 13, 10, 7, 6, 6]
  assert intervals(1).tolist() == [1]


def test_a_step_is_halved_where_few_steps_climb_or_nothing_improves():
  """Three of four climb but in the first; the best value has changed in the first two alone."""
  one = lambda *values: jnp.array(values, jnp.float32)
  places, zeros = jnp.zeros((4, 2)), jnp.zeros(4)
  carry = _start(places, (places, zeros, zeros > 0, zeros > 0), 0.5)._replace(
    best_delta=places + 1,
    best_value=one(3, 3, 2, 2),
    checkpoint_value=one(1, 1, 2, 2),
    num_climbs=jnp.array([3, 4, 4, 4]),
    halved=jnp.array([False, False, False, True]),
  )
  after = _check_point(carry, jnp.int32(4))
  assert (after.step_size / carry.step_size).tolist() == [0.5, 1, 0.5, 1]
  assert after.halved.tolist() == [True, False, True, False]
  assert after.delta[:, 0].tolist() == [1, 0, 1, 0]
  assert after.value.tolist() == [3, 0, 2, 0]
  assert after.num_climbs.tolist() == [0, 0, 0, 0]
  assert after.checkpoint_value.tolist() == [3, 3, 2, 2]
  between = _check_point(carry, jnp.int32(0))
  for mine, theirs in zip(between, carry, strict=True):
    np.testing.assert_array_equal(mine, theirs)


def test_plain_and_adam_steps_are_those_of_optax():
  fixed = {"epsilon": 10.0, "low": -20.0, "high": 20.0, "num_steps": 1, "random_start": False}
  slope = np.stack([look(*pair)[1] for pair in zip(IMAGES, LABELS, strict=True)])
  sizes = np.linalg.norm(slope.reshape(len(slope), -1), axis=1).reshape(-1, 1, 1, 1)
  expected = {
    ("linf", "gradient"): slope,
    ("linf", "adam"): np.sign(slope),
    ("linf", "steepest"): np.sign(slope),
    ("l2", "steepest"): slope / sizes,
  }
  for (norm, direction), move in expected.items():
    attack = jaxbo.pgd(model, step_size=0.5, norm=norm, direction=direction, **fixed)
    perturbed = attack(PARAMS, (IMAGES, LABELS))
    np.testing.assert_allclose(perturbed - IMAGES, 0.5 * move, atol=1e-4)


def test_the_step_of_fgsm_is_longer_from_a_random_start():
  """1.25 epsilon, cut to the ball; without the cut at the range it is seen from inside."""
  linear = lambda params, x: jnp.stack([x.sum(axis=1), -x.sum(axis=1)], axis=1)
  images, labels = jnp.full((64, 3), 0.5), jnp.zeros(64, jnp.int32)
  moved = jaxbo.fgsm(linear, epsilon=0.1)((), (images, labels), 0) - 0.5
  # From u in (-0.1, 0.1) down by 0.125: all end at the wall but those above 0.025.
  assert moved.min() >= -0.1 - 1e-6
  inside = np.asarray(moved) > -0.1 + 1e-6
  assert 0.25 < inside.mean() < 0.5
  assert np.asarray(moved).max() == pytest.approx(-0.025, abs=0.003)
  exact = jaxbo.fgsm(linear, epsilon=0.1, random_start=False)((), (images, labels)) - 0.5
  np.testing.assert_allclose(exact, -0.1, rtol=1e-5)


def test_objectives_are_their_formulas():
  logits = jnp.array([[3.0, 1.0, 0.5, 2.0], [0.0, 1.0, 4.0, -1.0]])
  labels = jnp.array([0, 0])
  np.testing.assert_allclose(difference_of_logits_ratio(logits, labels), [-1 / 2, 4 / 4], rtol=1e-6)
  # z_1 = 3 against the mean of z_3 = 1 and z_4 = 0.5; then 4 against that of 0 and -1.
  expected = [-(3 - 1) / (3 - 0.75), -(0 - 1) / (4 + 0.5)]
  np.testing.assert_allclose(targeted_dlr(logits, labels, jnp.array([1, 1])), expected, rtol=1e-6)


def test_a_restart_can_only_help():
  """On a loss with two hills the random start decides; of many starts one finds the higher."""

  def hills(params, images):
    x = images[:, 0]
    height = jnp.exp(-50 * (x - 0.35) ** 2) + 3 * jnp.exp(-50 * (x - 0.65) ** 2)
    return jnp.stack([2 - height, jnp.zeros_like(height)], axis=1)

  images, labels = jnp.full((20, 1), 0.5), jnp.zeros(20, jnp.int32)
  options = {"epsilon": 0.3, "step_size": 0.02, "num_steps": 20}
  loss_at = lambda x: np.asarray(-hills((), x)[:, 0])
  one = loss_at(jaxbo.pgd(hills, **options)((), (images, labels), 0))
  many = loss_at(jaxbo.pgd(hills, restarts=8, **options)((), (images, labels), 0))
  assert one.min() < 0 < many.min()


def test_restarts_and_targets_start_at_points_of_their_own():
  """Without a slope attacks stay where they start; the best of four is at 0.06 in the mean."""

  def flat(params, images):
    x = jax.lax.stop_gradient(images)
    return jnp.concatenate([9 + 0 * x, x, x - 1, x - 2, x - 3], axis=1)

  options = {"epsilon": 0.1, "num_steps": 1}
  images = jnp.full((200, 1), 0.5)
  for attack in (
    jaxbo.pgd(flat, step_size=0.1, objective="margin", restarts=4, **options),
    jaxbo.apgd(flat, objective="margin", restarts=4, **options),
    jaxbo.apgd(flat, objective="targeted_dlr", num_targets=4, **options),
  ):
    moved = attack((), (images, jnp.zeros(200, jnp.int32)), 0) - images
    assert np.mean(moved) == pytest.approx(0.06, abs=4 * 0.033 / np.sqrt(200))


def test_random_starts_fill_the_ball():
  images = jnp.full((4000, 3), 0.5)
  for norm in ("linf", "l2"):
    start = make_ball(norm, 0.1, 0.0, 1.0).random(jax.random.key(0), images)
    share = np.linalg.norm(start, axis=1, ord=2 if norm == "l2" else np.inf)
    # The share of a ball within half its radius, in three dimensions; four standard errors.
    assert np.mean(share < 0.05) == pytest.approx(1 / 8, abs=4 * np.sqrt(1 / 8 * 7 / 8 / 4000))
    assert np.all(share <= 0.1 + 1e-6)
    assert np.all(np.abs(np.mean(start, axis=0)) < 0.1 * 4 / np.sqrt(4000))


FLAT = lambda params, images: jax.lax.stop_gradient(model(params, images))
FEW, MANY = (jaxbo.square(FLAT, epsilon=EPSILON, num_queries=n) for n in (1, 200))


def test_square_needs_no_gradient_and_improves_with_its_queries():
  margins = []
  for attack in (FEW, MANY):
    perturbed, info = attack.run(PARAMS, (IMAGES, LABELS), 0)
    margins.append(np.asarray(jaxbo.margin_loss(model(PARAMS, perturbed), LABELS)))
  assert np.mean(margins[1]) > np.mean(margins[0]) + 0.1
  assert np.all(margins[1] >= margins[0])
  assert np.max(info.num_correct) == 201
  # Every pixel is at a wall of its box.
  low, high = np.maximum(IMAGES - EPSILON, 0), np.minimum(IMAGES + EPSILON, 1)
  at_wall = np.isclose(perturbed, low, atol=1e-6) | np.isclose(perturbed, high, atol=1e-6)
  assert at_wall.all()


def test_square_leaves_alone_what_is_misclassified():
  wrong = (LABELS + 1) % problem.CLASSES
  short, info = FEW.run(PARAMS, (IMAGES, wrong), 0)
  long, _ = MANY.run(PARAMS, (IMAGES, wrong), 0)
  still = np.asarray(info.num_correct == 0)
  assert still.sum() > 3
  np.testing.assert_array_equal(short[still], long[still])


def test_a_square_is_one_square_of_the_asked_area():
  delta = _paint(jax.random.key(0), jnp.zeros((50, 6, 8, 3)), jnp.float32(9 / 48), 0.1)
  touched = np.asarray(delta != 0)
  assert np.all(touched.sum(axis=(1, 2)) == 9)
  rows, columns = touched.any(axis=(2, 3)).sum(axis=1), touched.any(axis=(1, 3)).sum(axis=1)
  assert np.all(rows == 3)
  assert np.all(columns == 3)
  # One sign for a channel, both signs over all, and corners everywhere, the last ones too.
  signs = np.sign(np.asarray(delta)).sum(axis=(1, 2)) / 9
  assert set(np.unique(signs)) == {-1.0, 1.0}
  assert touched[:, -1].any()
  assert touched[:, :, -1].any()
  assert touched[:, 0].any()


def test_targets_are_the_likeliest_other_classes():
  """Where only the third class can be reached, the third target finds it."""

  def steps(params, images):
    x = images[:, 0]
    return jnp.stack([3 + 0 * x, 2 - x, 1 - x, 40 * x - 3.9, -9 + 0 * x], axis=1)

  batch = jnp.full((1, 1), 0.05), jnp.zeros(1, jnp.int32)
  options = {"epsilon": 0.15, "num_steps": 12, "objective": "targeted_dlr", "low": -1.0}
  attack = jaxbo.apgd(steps, num_targets=3, **options)
  # Towards the first two classes, down the slope, nothing is found but by the start.
  few = jaxbo.apgd(steps, num_targets=2, **options)
  predicted = lambda attack: [int(steps((), attack((), batch, k)).argmax()) for k in range(4)]
  assert predicted(attack) == [3, 3, 3, 3]
  assert 0 in predicted(few)


def test_where_all_targets_fail_the_largest_margin_is_kept():
  """Up the slope the margin is -1 and DLR -1 / 5, down it -2 and -2 / 16.5."""

  def out_of_reach(params, images):
    x = images[:, 0]
    return jnp.stack([0 * x + 10, 7 + 20 * x, 7 - 10 * x, 110 * x - 7, 0 * x - 60], axis=1)

  batch = jnp.zeros((2, 1)), jnp.zeros(2, jnp.int32)
  options = {"epsilon": 0.1, "num_steps": 5, "low": -1.0, "num_targets": 2}
  attack = jaxbo.apgd(out_of_reach, objective="targeted_dlr", **options)
  np.testing.assert_allclose(attack((), batch, 0), 0.1, rtol=1e-5)
