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
from jaxbo.adversarial import Box
from jaxbo.adversarial.attack import Found, best
from jaxbo.adversarial.box import make_ball
from jaxbo.adversarial.losses import kl_divergence
from jaxbo.adversarial.objectives import difference_of_logits_ratio, targeted_dlr
from jaxbo.adversarial.square import _paint, _shrunk
from tests.adversarial import problem
from tests.adversarial.problem import EPSILON, look, model

pytestmark = pytest.mark.slow

PARAMS, (IMAGES, LABELS) = problem.params(), problem.batch()
TINY = {"box": Box(EPSILON), "step_size": 0.03, "num_steps": 6}


def guarded(params, images):
  """NaN outside the range, so that no attack may look there on its way."""
  inside = jnp.all((images > -1e-6) & (images < 1 + 1e-6), axis=(1, 2, 3))
  return jnp.where(inside[:, None], model(params, images), jnp.nan)


def make_attacks(epsilon, num_steps=6):
  """All kinds of attacks; ``epsilon`` may be traced."""
  options, in_l2 = {"box": Box(epsilon), "num_steps": num_steps}, Box(epsilon, norm="l2")
  pgd = functools.partial(jaxbo.adversarial.pgd, guarded, step_size=epsilon / 3 + 1e-6, **options)
  return {
    "fgsm": jaxbo.adversarial.fgsm(guarded, Box(epsilon)),
    "fgsm_l2": jaxbo.adversarial.fgsm(guarded, in_l2, random_start=False),
    "pgd": pgd(),
    "pgd_adam": pgd(direction="adam", objective="margin"),
    "pgd_l2": pgd(box=in_l2, restarts=2),
    "pgd_noise": pgd(random_start=0.001, objective="kl"),
    "apgd": jaxbo.adversarial.apgd(guarded, **options),
    "apgd_l2": jaxbo.adversarial.apgd(
      guarded, in_l2, num_steps=num_steps, objective="dlr", restarts=2
    ),
    "apgd_t": jaxbo.adversarial.apgd(guarded, objective="targeted_dlr", num_targets=2, **options),
    "square": jaxbo.adversarial.square(guarded, Box(epsilon), num_queries=30),
    "square_l2": jaxbo.adversarial.square(guarded, in_l2, num_queries=30),
    "fab": jaxbo.adversarial.fab(guarded, num_targets=2, **options),
    "fab_l2": jaxbo.adversarial.fab(guarded, in_l2, num_steps=num_steps, num_targets=2),
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
    elif name.startswith("fab"):  # moves what it fools
      moved = np.any(perturbed != IMAGES, axis=(1, 2, 3))
      assert np.all(np.argmax(model(PARAMS, perturbed), axis=1)[moved] != LABELS[moved])
      assert moved.any() == (name == "fab")
    elif name != "square_l2":  # whose first guess is worse than none, in a ball so small
      assert np.mean(attacked) > np.mean(clean) + 0.02, name


def test_the_key_decides_what_is_drawn():
  again = jax.device_get(run_all(EPSILON, IMAGES, LABELS, jax.random.key(0)))
  for name, (perturbed, _) in results().items():
    np.testing.assert_array_equal(again[name][0], perturbed)
    draws = name not in ("fgsm_l2", "fab", "fab_l2")
    assert np.any(results(1)[name][0] != perturbed) == draws, name
  attack = jaxbo.adversarial.pgd(model, **TINY)
  keys = (7, jax.random.key(7), jax.random.PRNGKey(7))
  kinds = [attack(PARAMS, (IMAGES, LABELS), key) for key in keys]
  np.testing.assert_array_equal(kinds[0], kinds[1])
  np.testing.assert_array_equal(kinds[0], kinds[2])


# What follows is one example and one step at a time, in NumPy.


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
  attack = jaxbo.adversarial.pgd(model, stop_after=stop_after, random_start=False, **TINY)
  perturbed, info = attack.run(PARAMS, (IMAGES, LABELS))
  for i in range(problem.BATCH):
    expected, num_correct = pgd_by_hand(IMAGES[i], LABELS[i], 0.03, 6, stop_after)
    np.testing.assert_allclose(perturbed[i], expected, atol=1e-6)
    # A stopped example is looked at again where it stands, and is wrong there.
    assert info.num_correct[i] == num_correct
  assert 0 < np.mean(info.num_correct) < 6


def test_the_best_run_is_a_misclassified_one_and_then_the_highest():
  """Columns: none wrong; one wrong with the lower value; two wrong; the wrong one not finite."""
  values = np.array([[1.0, 5.0, 1.0, np.inf], [2.0, 1.0, 2.0, 3.0], [0.0, 2.0, 9.0, 4.0]], "f")
  wrong = np.array([[0, 0, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0]], bool)
  runs = np.broadcast_to(np.arange(3, dtype="f")[:, None, None], (3, 4, 2))
  counts = np.arange(12).reshape(3, 4)
  found = jax.jit(best)(Found(runs, values, wrong, counts, ~np.isfinite(values)))
  assert np.asarray(found.perturbed)[:, 0].tolist() == [1, 1, 1, 2]
  assert found.wrong.tolist() == [False, True, True, False]
  assert found.num_correct.tolist() == [4, 5, 6, 11]
  assert found.not_finite.tolist() == [False, False, False, True]


def test_plain_and_adam_steps_are_those_of_optax():
  fixed = {"num_steps": 1, "random_start": False}
  slope = np.stack([look(*pair)[1] for pair in zip(IMAGES, LABELS, strict=True)])
  sizes = np.linalg.norm(slope.reshape(len(slope), -1), axis=1).reshape(-1, 1, 1, 1)
  expected = {
    ("linf", "gradient"): slope,
    ("linf", "adam"): np.sign(slope),
    ("linf", "steepest"): np.sign(slope),
    ("l2", "steepest"): slope / sizes,
  }
  for (norm, direction), move in expected.items():
    box = Box(10.0, -20.0, 20.0, norm)
    attack = jaxbo.adversarial.pgd(model, box, step_size=0.5, direction=direction, **fixed)
    perturbed = attack(PARAMS, (IMAGES, LABELS))
    np.testing.assert_allclose(perturbed - IMAGES, 0.5 * move, atol=1e-4)


def test_the_step_of_fgsm_is_longer_from_a_random_start():
  """1.25 epsilon, cut to the ball; without the cut at the range it is seen from inside."""
  linear = lambda params, x: jnp.stack([x.sum(axis=1), -x.sum(axis=1)], axis=1)
  images, labels = jnp.full((64, 3), 0.5), jnp.zeros(64, jnp.int32)
  moved = jaxbo.adversarial.fgsm(linear, Box(0.1))((), (images, labels), 0) - 0.5
  # From u in (-0.1, 0.1) down by 0.125: all end at the wall but those above 0.025.
  assert moved.min() >= -0.1 - 1e-6
  inside = np.asarray(moved) > -0.1 + 1e-6
  assert 0.25 < inside.mean() < 0.5
  assert np.asarray(moved).max() == pytest.approx(-0.025, abs=0.003)
  exact = jaxbo.adversarial.fgsm(linear, Box(0.1), random_start=False)((), (images, labels)) - 0.5
  np.testing.assert_allclose(exact, -0.1, rtol=1e-5)
  # Otherwise it is one step of PGD.
  options = {"box": Box(0.5, -1.0, 2.0, "l2"), "random_start": False, "objective": "margin"}
  attacks = (
    jaxbo.adversarial.fgsm(model, **options),
    jaxbo.adversarial.pgd(model, step_size=0.5, num_steps=1, **options),
  )
  np.testing.assert_array_equal(*(attack(PARAMS, (IMAGES, LABELS)) for attack in attacks))


def test_objectives_are_their_formulas():
  logits = jnp.array([[3.0, 1.0, 0.5, 2.0], [0.0, 1.0, 4.0, -1.0]])
  both = lambda z, y, t: (difference_of_logits_ratio(z, y), targeted_dlr(z, y, t))
  dlr, targeted = jax.jit(both)(logits, np.array([0, 0]), np.array([1, 1]))
  np.testing.assert_allclose(dlr, [-1 / 2, 4 / 4], rtol=1e-6)
  # z_1 = 3 against the mean of z_3 = 1 and z_4 = 0.5; then 4 against that of 0 and -1.
  expected = [-(3 - 1) / (3 - 0.75), -(0 - 1) / (4 + 0.5)]
  np.testing.assert_allclose(targeted, expected, rtol=1e-6)


def test_a_restart_can_only_help():
  """On a loss with two hills the random start decides; of many starts one finds the higher."""

  def hills(params, images):
    x = images[:, 0]
    height = jnp.exp(-50 * (x - 0.35) ** 2) + 3 * jnp.exp(-50 * (x - 0.65) ** 2)
    return jnp.stack([2 - height, jnp.zeros_like(height)], axis=1)

  images, labels = jnp.full((20, 1), 0.5), jnp.zeros(20, jnp.int32)
  options = {"box": Box(0.3), "step_size": 0.02, "num_steps": 20}
  loss_at = lambda x: np.asarray(-hills((), x)[:, 0])
  one = loss_at(jaxbo.adversarial.pgd(hills, **options)((), (images, labels), 0))
  many = loss_at(jaxbo.adversarial.pgd(hills, restarts=8, **options)((), (images, labels), 0))
  assert one.min() < 0 < many.min()


def test_random_starts_fill_the_ball():
  images = np.full((4000, 3), 0.5, "f")
  for norm in ("linf", "l2"):
    start = np.asarray(jax.jit(make_ball(Box(0.1, norm=norm)).random)(jax.random.key(0), images))
    share = np.linalg.norm(start, axis=1, ord=2 if norm == "l2" else np.inf)
    # The share of a ball within half its radius, in three dimensions; four standard errors.
    assert np.mean(share < 0.05) == pytest.approx(1 / 8, abs=4 * np.sqrt(1 / 8 * 7 / 8 / 4000))
    assert np.all(share <= 0.1 + 1e-6)
    assert np.all(np.abs(np.mean(start, axis=0)) < 0.1 * 4 / np.sqrt(4000))


FLAT = lambda params, images: jax.lax.stop_gradient(model(params, images))
FEW, MANY = (jaxbo.adversarial.square(FLAT, Box(EPSILON), num_queries=n) for n in (1, 200))


def test_square_needs_no_gradient_and_improves_with_its_queries():
  margins = []
  for attack in (FEW, MANY):
    perturbed, info = attack.run(PARAMS, (IMAGES, LABELS), 0)
    margins.append(np.asarray(jaxbo.adversarial.margin_loss(model(PARAMS, perturbed), LABELS)))
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


def test_square_starts_with_vertical_stripes():
  attack = jaxbo.adversarial.square(FLAT, Box(EPSILON), num_queries=1, area=1e-6)  # Of one pixel.
  moved = attack(PARAMS, (jnp.full_like(IMAGES, 0.5), LABELS), 0) - 0.5
  of_columns = np.median(moved, axis=1)
  np.testing.assert_allclose(np.abs(of_columns), EPSILON, rtol=1e-5)
  assert np.ptp(of_columns, axis=1).max() > EPSILON


def test_squares_shrink_as_published():
  """By 10,000 queries: halved after 10, 50, 200, 500, 1000, 2000, 4000, 6000 and 8000."""
  parts = [1 / float(_shrunk(i, 10000)) for i in (0, 10, 11, 50, 51, 1000, 1001, 8000, 8001)]
  assert parts == [1, 1, 2, 2, 4, 16, 32, 256, 512]
  # The last of them find a chessboard, whose fields are pixels.
  board = 1 - 2.0 * (np.indices((4, 4)).sum(axis=0)[None, :, :, None] % 2)
  fine = lambda params, x: jnp.stack([9 - (total := jnp.sum(board * x, (1, 2, 3))), total], axis=1)
  attack = jaxbo.adversarial.square(fine, Box(EPSILON), num_queries=500)
  perturbed = attack((), (jnp.full((8, 4, 4, 1), 0.5), jnp.zeros(8, jnp.int32)), 0)
  np.testing.assert_allclose(perturbed - 0.5, np.repeat(EPSILON * board, 8, 0), atol=1e-6)


def test_square_leaves_points_that_are_not_finite():
  """Where the first pixel is bright; a start there is no success."""
  cliff = lambda params, x: jnp.where(x[:, 0, 0] > 0.5, jnp.nan, model(params, x))
  images = jnp.full((32, 4, 4, 1), 0.5)
  labels = jnp.argmax(model(PARAMS, images), axis=1)
  attack = jaxbo.adversarial.square(cliff, Box(EPSILON), num_queries=500)
  perturbed, info = attack.run(PARAMS, (images, labels), 0)
  assert np.all(perturbed[:, 0, 0] < 0.5)
  assert info.num_not_finite > 10


def test_a_square_is_one_square_of_the_asked_area():
  delta = np.asarray(jax.jit(_paint)(jax.random.key(0), np.zeros((50, 6, 8, 3), "f"), 9 / 48, 0.1))
  touched = delta != 0
  assert np.all(touched.sum(axis=(1, 2)) == 9)
  rows, columns = touched.any(axis=(2, 3)).sum(axis=1), touched.any(axis=(1, 3)).sum(axis=1)
  assert np.all(rows == 3)
  assert np.all(columns == 3)
  # One sign for a channel, both signs over all, and corners everywhere, the last ones too.
  signs = np.sign(delta).sum(axis=(1, 2)) / 9
  assert set(np.unique(signs)) == {-1.0, 1.0}
  assert touched[:, -1].any()
  assert touched[:, :, -1].any()
  assert touched[:, 0].any()
  places = zip(touched.any(axis=(2, 3)).argmax(1), touched.any(axis=(1, 3)).argmax(1), strict=True)
  assert len(set(places)) > 15  # of 24: rows do not go with columns
