"""The report is the worst case of its attacks, and doubts what masked gradients make of it."""

import functools
import importlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbo
from jaxbo.adversarial import Box
from tests.adversarial import problem
from tests.adversarial.problem import EPSILON, model

pytestmark = pytest.mark.slow

PARAMS, (IMAGES, LABELS) = problem.params(), problem.batch()
CHEAP = {"box": Box(EPSILON), "num_steps": 5, "num_queries": 8}


@functools.cache
def report(batch_size=3):
  attacks = jaxbo.adversarial.standard_attacks(model, **CHEAP)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    return jaxbo.adversarial.evaluate_robustness(
      model, PARAMS, (np.asarray(IMAGES), LABELS), 0, attacks, batch_size=batch_size
    )


def test_the_worst_case_is_that_of_every_image():
  ours = report()
  assert list(ours.correct) == ["pgd_20", "pgd", "apgd_ce", "apgd_t", "square"]
  predicted = np.argmax(model(PARAMS, IMAGES), axis=1)
  np.testing.assert_array_equal(ours.clean, predicted == np.asarray(LABELS))
  rows = np.stack([ours.clean, *ours.correct.values()])
  np.testing.assert_array_equal(ours.worst_case, rows.all(axis=0))
  accuracies = ours.accuracies()
  assert list(accuracies) == ["clean", *ours.correct, "worst_case"]
  assert accuracies["clean"] == ours.clean.mean() > accuracies["worst_case"]
  assert min(accuracies.values()) == accuracies["worst_case"] == ours.worst_case.mean()
  assert all(np.all(row <= ours.clean) for row in ours.correct.values())
  assert ours.num_classes == problem.CLASSES
  assert set(ours.num_not_finite.values()) == {0}
  assert ours.labels.shape == ours.clean.shape == (problem.BATCH,)


def test_metrics_of_classes_are_those_of_the_worst_case():
  ours = report()
  expected = jaxbo.adversarial.class_accuracy(ours.worst_case, LABELS, problem.CLASSES)
  np.testing.assert_array_equal(ours.class_accuracies(), expected)
  for fraction in (0.3, 1.0):
    tail = jaxbo.adversarial.tail_accuracy(ours.worst_case, LABELS, problem.CLASSES, fraction)
    assert ours.tail_accuracy(fraction) == tail
  assert ours.tail_accuracy() == ours.tail_accuracy(0.3)


def test_the_tail_is_the_worst_third_of_classes():
  """RA-Tail-30: the mean over the worst 3 of 10 classes, over ceil(k C) in general."""
  labels = np.repeat(np.arange(10), 10)
  accuracies = np.array([0.9, 0.1, 0.8, 0.3, 0.5, 0.7, 0.2, 1.0, 0.6, 0.4])
  correct = np.tile(np.arange(10), 10) < 10 * np.repeat(accuracies, 10) - 0.5
  np.testing.assert_allclose(jaxbo.adversarial.class_accuracy(correct, labels, 10), accuracies)
  tail = functools.partial(jaxbo.adversarial.tail_accuracy, correct, labels)
  assert tail(10) == tail(10, 0.3) == pytest.approx((0.1 + 0.2 + 0.3) / 3)
  assert tail(10, 0.31) == pytest.approx((0.1 + 0.2 + 0.3 + 0.4) / 4)
  assert tail(10, 1e-3) == pytest.approx(0.1)
  assert tail(10, 1.0) == pytest.approx(np.mean(accuracies))
  # Classes without images do not count, neither as bad nor in number.
  assert tail(20, 0.3) == pytest.approx(0.2)
  assert np.isnan(jaxbo.adversarial.class_accuracy(correct, labels, 11)[10])
  assert np.isnan(jaxbo.adversarial.tail_accuracy([], [], 3))


def doubts(other, attacks=None, params=PARAMS, batch_size=8):
  attacks = {} if attacks is None else attacks
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    ours = jaxbo.adversarial.evaluate_robustness(
      other, params, (IMAGES, LABELS), 0, attacks, batch_size=batch_size
    )
  assert [str(w.message) for w in caught] == [f"evaluate_robustness: {r}" for r in ours.warnings]
  assert all(w.category is UserWarning for w in caught)
  return " ".join(ours.warnings)


def test_a_sound_model_raises_no_doubt():
  assert doubts(model) == ""


def test_what_masks_gradients_is_warned_of():
  calls = []

  def random(params, images):
    calls.append(0)
    return model(params, images) + 0.1 * len(calls) * jnp.arange(5.0)[None]

  def optimised(params, images):
    shrink = lambda x: 0.5 * x
    small = jax.lax.while_loop(lambda x: jnp.max(jnp.abs(x)) > 10, shrink, images)
    return model(params, jax.lax.stop_gradient(small)) + 0 * jnp.sum(images)

  looped = lambda p, x: jax.lax.fori_loop(0, 2, lambda i, z: z / 2, model(p, x))
  rounded = lambda p, x: model(p, jnp.round(4 * x) / 4)
  assert doubts(lambda p, x: jax.nn.softmax(model(p, x))).startswith(
    "the model gives probabilities"
  )
  assert "two calls on the same images differ" in doubts(random)
  assert "exactly zero for 100% of the images" in doubts(rounded)
  assert "loop of unknown length" in doubts(jax.jit(optimised))
  assert doubts(looped) == ""


@pytest.mark.parametrize("batch_size", [8, 3, 2, 1])
def test_logits_that_depend_on_the_other_images_are_warned_of(batch_size):
  """Batch normalization in training mode, and dropout by one key for the batch."""

  def normalised(params, images):
    x = images.reshape(len(images), 16)
    mean, std = jnp.mean(x, axis=0, keepdims=True), jnp.std(x, axis=0, keepdims=True)
    return model(params, ((x - mean) / (std + 1e-3)).reshape(images.shape))

  def dropped(params, images):
    kept = jax.random.bernoulli(jax.random.key(0), 0.9, images.shape)
    return model(params, jnp.where(kept, images, 0))

  reason = "the logits of an image depend on the other images of its batch, or on its place"
  assert reason in doubts(normalised, batch_size=batch_size)
  assert reason in doubts(dropped, batch_size=batch_size)
  assert doubts(model, batch_size=batch_size) == ""


def test_square_that_breaks_what_withstood_the_others_is_warned_of():
  """A staircase has no slope, so that gradients find nothing."""
  stairs = lambda p, x: model(p, jnp.round(8 * x) / 8)
  attacks = {
    "pgd": jaxbo.adversarial.pgd(stairs, Box(0.3), step_size=0.1, num_steps=3, random_start=False),
    "square": jaxbo.adversarial.square(stairs, Box(0.3), num_queries=100),
  }
  assert "square, which uses no gradients, breaks" in doubts(stairs, attacks)


def test_images_that_an_attack_clips_under_a_jit_are_reported():
  attack = jaxbo.adversarial.pgd(model, Box(0.1), step_size=0.1, num_steps=1)
  hidden = jaxbo.adversarial.Attack(jax.jit(attack.run))
  batch = jnp.where(jnp.arange(8)[:, None, None, None] > 4, 2 * IMAGES + 0.1, IMAGES), LABELS
  with pytest.warns(
    UserWarning, match=r"pgd clipped 3 clean images to its range.*Box\(epsilon, low"
  ):
    ours = jaxbo.adversarial.evaluate_robustness(
      model, PARAMS, batch, 0, {"pgd": hidden}, batch_size=3
    )
  assert ours.num_clipped == {"pgd": 3}
  with pytest.raises(ValueError, match="images must be from low"):
    jaxbo.adversarial.evaluate_robustness(model, PARAMS, batch, 0, {"pgd": attack})
  assert report().num_clipped == dict.fromkeys(report().correct, 0)


def test_attacks_that_meet_nan_are_counted_once_for_an_image():
  """Also where the last batch is filled up with the last image."""
  batch = IMAGES[:4], jnp.zeros(4, jnp.int32)  # Of logits that are NaN argmax takes the first.
  broken = lambda p, x: jnp.where(x[:, 0, 0] < -1, 0.0, model(p, x) * jnp.nan)
  attack = jaxbo.adversarial.pgd(broken, Box(0.1), step_size=0.1, num_steps=1)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    ours = jaxbo.adversarial.evaluate_robustness(
      broken, PARAMS, batch, 0, {"pgd": attack}, batch_size=3
    )
  assert ours.num_not_finite == {"pgd": 4}
  assert ours.accuracies() == {"clean": 0.0, "pgd": 0.0, "worst_case": 0.0}


def test_standard_attacks_adapt_to_the_task():
  few = jaxbo.adversarial.standard_attacks(model, Box(0.1), num_queries=0, num_classes=3)
  assert list(few) == ["pgd_20", "pgd", "apgd_ce", "apgd_t"]
  three = lambda p, x: model(p, x)[:, :3]
  attack = jaxbo.adversarial.standard_attacks(three, **CHEAP, num_classes=3)["apgd_t"]
  assert np.isfinite(attack(PARAMS, (IMAGES, LABELS % 3), 0)).all()
  nothing = jaxbo.adversarial.standard_attacks(model, Box(0.0), num_steps=2)["pgd"]
  np.testing.assert_array_equal(nothing(PARAMS, (IMAGES, LABELS), 0), IMAGES)


def test_standard_attacks_are_those_of_the_protocol(as_users_run, monkeypatch):
  asked = []
  for name in ("pgd", "apgd", "square"):
    make = lambda model, box, *, name=name, **options: asked.append((name, box, options))
    monkeypatch.setattr(importlib.import_module("jaxbo.adversarial.autoattack"), name, make)
  box = Box(0.25, -1.0, 2.0)
  jaxbo.adversarial.standard_attacks(model, box, num_steps=50, num_queries=70)
  assert asked == [
    ("pgd", box, {"step_size": 0.0625, "num_steps": 20}),
    ("pgd", box, {"step_size": 0.0625, "num_steps": 50}),
    ("apgd", box, {"num_steps": 50}),
    ("apgd", box, {"num_steps": 50, "objective": "targeted_dlr"}),
    ("square", box, {"num_queries": 70}),
  ]


def test_standard_attacks_have_a_name_each_whatever_the_number_of_steps():
  attacks = jaxbo.adversarial.standard_attacks(model, Box(0.1), num_steps=20)
  assert list(attacks) == ["pgd_20", "pgd", "apgd_ce", "apgd_t", "square"]


def test_errors_name_the_argument(as_users_run):
  attacks = jaxbo.adversarial.standard_attacks(model, **CHEAP)
  of_batch = functools.partial(jaxbo.adversarial.evaluate_robustness, model, PARAMS)
  with pytest.raises(ValueError, match="batch_size must be at least 1"):
    of_batch((IMAGES, LABELS), 0, attacks, batch_size=0)
  with pytest.raises(ValueError, match=r"images must be from low=0\.0 to high=1\.0"):
    of_batch((255 * IMAGES, LABELS), 0, attacks)
  with pytest.raises(ValueError, match="labels must be from 0 to 4, got 0 to 9"):
    of_batch((IMAGES, LABELS.at[0].set(0).at[1].set(9)), 0, {})
  for name in ("clean", "worst_case"):
    with pytest.raises(ValueError, match=f"attacks must have other names than .*, got .'{name}'."):
      of_batch((IMAGES, LABELS), 0, {name: attacks["pgd"]})
  for wrong in (attacks["pgd"], [attacks["pgd"]], {"pgd": model}):
    with pytest.raises(TypeError, match="attacks must be a dict of attacks by name, got"):
      of_batch((IMAGES, LABELS), 0, wrong)
  with pytest.raises(TypeError, match="labels must be integers, got dtype float64"):
    jaxbo.adversarial.class_accuracy([True], [0.0], 2)
  with pytest.raises(ValueError, match="fraction must be in"):
    jaxbo.adversarial.tail_accuracy([True], [0], 1, 0.0)
  with pytest.raises(ValueError, match="labels must be from 0 to 1, got 2 to 2"):
    jaxbo.adversarial.class_accuracy([True], [2], 2)
  with pytest.raises(ValueError, match=r"correct must be \[num_images\]"):
    jaxbo.adversarial.class_accuracy([True, False], [0], 2)
