"""Attacks on images as people have them: in [0, 1], in 0 to 255, normalized by channel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbo
from jaxbo.adversarial import Box, normalized

pytestmark = pytest.mark.slow

BATCH, SIDE, CHANNELS, CLASSES = 12, 4, 3, 5
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
RNG = np.random.default_rng(0)
PIXELS = RNG.uniform(-0.2, 1.2, (BATCH, SIDE, SIDE, CHANNELS)).clip(0, 1).astype(np.float32)
IMAGES = ((PIXELS - MEAN) / STD).astype(np.float32)
WEIGHTS = RNG.normal(size=(SIDE * SIDE * CHANNELS, 8)), RNG.normal(size=(8, CLASSES))
PARAMS = tuple(jnp.asarray(w / np.sqrt(len(w)), jnp.float32) for w in WEIGHTS)


@jax.jit
def model(params, images):
  """Of normalized images."""
  return jnp.tanh(images.reshape(images.shape[0], -1) @ params[0]) @ params[1]


LABELS = np.asarray(model(PARAMS, IMAGES)).argmax(axis=1)
LABELS[::3] = (LABELS[::3] + 1) % CLASSES
EPSILON = 0.05
OF_IMAGES = Box(EPSILON / STD, (0 - MEAN) / STD, (1 - MEAN) / STD)


def loss(params, images, labels):
  return jaxbo.adversarial.cross_entropy_loss(model(params, images), labels)


def make_attacks(model, box):
  epsilon = np.asarray(box.epsilon)
  return {
    "pgd": jaxbo.adversarial.pgd(model, box, step_size=epsilon / 4, num_steps=5),
    "adam": jaxbo.adversarial.pgd(
      model, box, step_size=epsilon / 4, num_steps=5, direction="adam", restarts=2
    ),
    "fgsm": jaxbo.adversarial.fgsm(model, box),
    "apgd": jaxbo.adversarial.apgd(model, box, num_steps=10),
    "square": jaxbo.adversarial.square(model, box, num_queries=20),
  }


def run_all(model, box, images):
  """In one jitted function, where an attack cannot look at values."""
  attacks = make_attacks(model, box)
  found = jax.jit(lambda x: {n: a.run(PARAMS, (x, LABELS), 0) for n, a in attacks.items()})(images)
  return jax.device_get(found)


def test_normalized_images_move_by_epsilon_of_their_channel():
  for name, (perturbed, info) in run_all(model, OF_IMAGES, IMAGES).items():
    change = np.abs(perturbed - IMAGES).max(axis=(0, 1, 2))
    np.testing.assert_allclose(change, EPSILON / STD, rtol=1e-4, err_msg=name)
    assert np.all((perturbed >= (0 - MEAN) / STD - 1e-5) & (perturbed <= (1 - MEAN) / STD + 1e-5))
    assert info.num_clipped == 0, name


def test_normalization_inside_the_model_is_that_of_the_images():
  """Pixels with their normalization in the model, and normalized images: the same attack."""
  outside = run_all(model, OF_IMAGES, IMAGES)
  inside = run_all(normalized(model, MEAN, STD), Box(EPSILON), PIXELS)
  wide = run_all(normalized(model, 255 * MEAN, 255 * STD), Box(255 * EPSILON, 0, 255), 255 * PIXELS)
  for name, (perturbed, info) in outside.items():
    atol = 1e-3 if name == "adam" else 1e-5  # Its eps has the unit of the gradient.
    np.testing.assert_allclose(perturbed * STD + MEAN, inside[name][0], atol=atol, err_msg=name)
    np.testing.assert_allclose(wide[name][0] / 255, inside[name][0], atol=atol, err_msg=name)
    assert info.num_clipped == inside[name][1].num_clipped == wide[name][1].num_clipped == 0


@pytest.mark.parametrize("images", [IMAGES, 255 * PIXELS], ids=["normalized", "bytes"])
def test_images_of_another_range_are_counted_under_jit(images):
  images = images.copy()
  images[4:7] = PIXELS[4:7]  # These are in [0, 1].
  expected = [i for i in range(BATCH) if i not in (4, 5, 6)]
  for name, (_, info) in run_all(model, Box(EPSILON), images).items():
    assert np.flatnonzero(info.clipped).tolist() == expected, name
    assert info.num_clipped == BATCH - 3
  for grad in (
    jaxbo.adversarial.done_grad(loss, loss, Box(EPSILON), barrier=1e-3, num_steps=2, step_size=1.0),
    jaxbo.adversarial.fast_bat_grad(loss, loss, Box(EPSILON), step_size=1.0),
  ):
    info = jax.jit(lambda x, grad=grad: grad(PARAMS, (x, LABELS), 0).aux)(images)
    assert np.flatnonzero(info.clipped).tolist() == expected
    assert info.num_clipped == BATCH - 3
    with pytest.raises(ValueError, match=r"Box\(epsilon, low, high\), or normalize inside"):
      grad(PARAMS, (images, LABELS), 0)


def test_gradients_through_the_attack_take_the_range_of_each_channel():
  of_bytes = functools.partial(loss, PARAMS)
  attack_loss = lambda p, x, y: -loss(p, x, y)
  for make, options in (
    (jaxbo.adversarial.done_grad, {"barrier": 1e-6, "num_steps": 20, "step_size": 1e3}),
    (jaxbo.adversarial.fast_bat_grad, {"step_size": 1e3}),
  ):
    grad = make(loss, attack_loss, OF_IMAGES, **options)
    info = jax.jit(lambda x, grad=grad: grad(PARAMS, (x, LABELS), 0).aux)(IMAGES)
    change = np.abs(info.perturbed - IMAGES).max(axis=(0, 1, 2))
    np.testing.assert_allclose(change, EPSILON / STD, rtol=1e-2)
    assert np.all(np.asarray(info.perturbed) >= (0 - MEAN) / STD - 1e-5)
    assert np.all(of_bytes(info.perturbed, LABELS) > of_bytes(IMAGES, LABELS))
    assert info.num_clipped == 0


def test_rounding_is_not_outside():
  """A product and a difference in float32 end elsewhere; in bfloat16 -2.118 is -2.125."""
  scale, shift = np.float32(1 / STD), np.float32(MEAN / STD)
  rounded = PIXELS * scale - shift
  assert np.any(rounded > np.float32((1 - MEAN) / STD))
  for images in (rounded, IMAGES, jnp.asarray(IMAGES, jnp.bfloat16)):
    assert not OF_IMAGES.outside(jnp.asarray(images)).any()
  assert OF_IMAGES.outside(jnp.asarray(IMAGES - 1e-3 * (PIXELS == 0))).any()
  assert Box(0.1).outside(jnp.array([[1.0001, 0.5], [0.5, -1e-4], [jnp.nan, 1.0]])).tolist() == [
    True,
    True,
    False,
  ]


def test_errors_name_the_argument(as_users_run):
  images, labels = jnp.asarray(PIXELS), LABELS
  pgd = functools.partial(jaxbo.adversarial.pgd, model, step_size=0.1, num_steps=1)
  for box in (0.1, (0.1, 0.0, 1.0), None):
    with pytest.raises(TypeError, match=r"box must be a jaxbo.adversarial.Box, say Box\(8 / 255\)"):
      pgd(box)
  for change in ({"epsilon": np.ones(2)}, {"low": np.zeros(4)}, {"high": np.ones((5, 1, 1))}):
    name, value = next(iter(change.items()))
    message = rf"{name} must broadcast over one image, \(4, 4, 3\), got shape .{value.shape[0]},"
    with pytest.raises(ValueError, match=message):
      pgd(Box(0.1)._replace(**change))(PARAMS, (images, labels), 0)
  with pytest.raises(ValueError, match=r"step_size must broadcast over one image"):
    jaxbo.adversarial.pgd(model, Box(0.1), step_size=np.ones(2), num_steps=1)(
      PARAMS, (images, labels), 0
    )
  with pytest.raises(ValueError, match="norm must be one of 'linf', got 'l1'"):
    jaxbo.adversarial.fast_bat_grad(loss, loss, Box(0.1, norm="l1"), step_size=1.0)
  with pytest.raises(ValueError, match="std must be positive"):
    normalized(model, 0.5, np.array([0.1, 0.0, 0.2]))
  with pytest.raises(ValueError, match="mean must be finite"):
    normalized(model, np.nan, 1.0)
  with pytest.raises(ValueError, match="mean must broadcast over one image"):
    normalized(model, np.zeros(2), 1.0)(PARAMS, images)
  with pytest.raises(TypeError, match="images must be real floats, got dtype uint8"):
    normalized(model, MEAN, STD)(PARAMS, images.astype(jnp.uint8))
  with pytest.raises(TypeError, match=r"model must be a function model\(params, images\)"):
    normalized(lambda images: images, 0.0, 1.0)
