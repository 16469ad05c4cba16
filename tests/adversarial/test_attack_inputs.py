"""What attacks are given: bad input, numbers that are not finite, narrow floats, many devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxbo
from jaxbo.adversarial import Box
from tests.adversarial import problem
from tests.adversarial.problem import EPSILON, model

pytestmark = pytest.mark.slow

PARAMS, (IMAGES, LABELS) = problem.params(), problem.batch()
TINY = {"box": Box(EPSILON), "step_size": 0.03, "num_steps": 4}
PGD = jaxbo.adversarial.pgd(model, random_start=False, **TINY)


def test_errors_name_the_argument(as_users_run):
  pgd = functools.partial(jaxbo.adversarial.pgd, model)
  cases = {
    "epsilon must be non-negative": {"box": Box(-0.1)},
    "step_size must be positive": {"step_size": 0.0},
    "num_steps must be at least 1": {"num_steps": 0},
    "restarts must be at least 1": {"restarts": 0},
    "norm must be one of 'linf', 'l2'": {"box": Box(0.1, norm="l1")},
    "direction must be one of 'steepest', 'gradient', 'adam'": {"direction": "newton"},
    "objective must be one of 'cross_entropy', 'margin', 'kl', 'dlr'": {"objective": "ce"},
    "random_start must be positive": {"random_start": 0.0},
    "random_start must not be False with objective='kl'": {
      "random_start": False,
      "objective": "kl",
    },
    "random_start must not be False with restarts=2": {"random_start": False, "restarts": 2},
    "stop_after must be at least 0": {"stop_after": -1},
    "low must be below high": {"box": Box(0.1, low=2.0)},
    "low must be finite": {"box": Box(0.1, low=float("nan"))},
    "epsilon must be non-negative and finite, got -1.0": {"box": Box(np.array([0.1, -1.0]))},
    r"low must be below high, got low=\[0. 1.\]": {"box": Box(0.1, low=np.array([0.0, 1.0]))},
    r"epsilon must be one number with norm='l2', got shape \(2,\)": {
      "box": Box(np.array([0.1, 0.2]), norm="l2")
    },
  }
  for message, change in cases.items():
    with pytest.raises(ValueError, match=message):
      pgd(**{**TINY, **change})
  for make, options, message in [
    (jaxbo.adversarial.fgsm, {"box": Box(-1.0)}, "epsilon must be non-negative"),
    (jaxbo.adversarial.apgd, {"box": Box(0.1), "num_steps": 0}, "num_steps must be at least 1"),
    (jaxbo.adversarial.apgd, {"box": Box(0.1), "num_targets": 0}, "num_targets must be at least 1"),
    (
      jaxbo.adversarial.apgd,
      {"box": Box(0.1), "objective": "targeted"},
      "objective must be one of",
    ),
    (
      jaxbo.adversarial.square,
      {"box": Box(0.1), "num_queries": 0},
      "num_queries must be at least 1",
    ),
    (jaxbo.adversarial.square, {"box": Box(0.1), "area": 0.0}, r"area must be in \(0, 1\]"),
  ]:
    with pytest.raises(ValueError, match=message):
      make(model, **options)
  with pytest.raises(TypeError, match=r"model must be a function model\(params, images\)"):
    jaxbo.adversarial.pgd(lambda images: images, **TINY)
  with pytest.raises(TypeError, match="objective must be a function"):
    pgd(objective=lambda logits: logits, **TINY)
  with pytest.raises(TypeError, match=r"stop_after must be a non-negative Python int, got 1\.5"):
    pgd(stop_after=1.5, **TINY)


def test_errors_name_what_is_wrong_with_the_batch():
  for images, message in [
    (IMAGES * 255, "images must be from low=0.0 to high=1.0, got values from 0 to 255"),
    (IMAGES - 0.5, "images must be from low=0.0 to high=1.0, got values from -0.5 to"),
    (IMAGES[:, 0, 0, 0], r"images must be \[batch, ...\], at least one, got shape \(8,\)"),
    (IMAGES[:0], r"images must be \[batch, ...\], at least one, got shape \(0, 4, 4, 1\)"),
  ]:
    with pytest.raises(ValueError, match=message):
      PGD(PARAMS, (images, LABELS))
  for labels, message in [
    (LABELS.at[0].set(5), "labels must be from 0 to 4, got 0 to 5"),
    (LABELS.at[0].set(-1), "labels must be from 0 to 4, got -1 to 4"),
    (LABELS[:3], r"labels must be \[batch\], one for each of 8 images, got shape \(3,\)"),
  ]:
    with pytest.raises(ValueError, match=message):
      PGD(PARAMS, (IMAGES, labels))
  with pytest.raises(TypeError, match="labels must be integers, got dtype float32"):
    PGD(PARAMS, (IMAGES, LABELS.astype(jnp.float32)))
  with pytest.raises(TypeError, match="images must be real floats, got dtype uint8"):
    PGD(PARAMS, (IMAGES.astype(jnp.uint8), LABELS))
  with pytest.raises(TypeError, match=r"batch must be a pair \(images, labels\), got dict"):
    PGD(PARAMS, {"images": IMAGES})
  with pytest.raises(TypeError, match="key must be an int, a raw key array or a typed key"):
    jaxbo.adversarial.pgd(model, **TINY)(PARAMS, (IMAGES, LABELS))
  with pytest.raises(ValueError, match=r"model must return logits, \[8, num_classes\], got \(8,\)"):
    jaxbo.adversarial.pgd(lambda p, x: x[:, 0, 0, 0], **TINY)(PARAMS, (IMAGES, LABELS), 0)
  two = lambda p, x: model(p, x)[:, :3]
  with pytest.raises(ValueError, match="must have at least 4 classes to compare, got 3"):
    jaxbo.adversarial.apgd(two, Box(0.1), objective="targeted_dlr")(PARAMS, (IMAGES, LABELS), 0)
  flat = jaxbo.adversarial.square(lambda p, x: model(p, x.reshape(-1, 4, 4, 1)), Box(0.1))
  with pytest.raises(ValueError, match=r"images must be \[batch, height, width, channels\]"):
    flat(PARAMS, (IMAGES.reshape(8, 16), LABELS), 0)


def test_objectives_give_a_number_for_each_image():
  """A mean would be the same for all: neither step sizes nor restarts could be told apart."""
  make = {
    "pgd": functools.partial(jaxbo.adversarial.pgd, **TINY),
    "apgd": functools.partial(jaxbo.adversarial.apgd, box=Box(EPSILON), num_steps=2),
    "square": functools.partial(jaxbo.adversarial.square, box=Box(EPSILON), num_queries=2),
  }
  for attack in make.values():
    for objective, shape in [
      (lambda logits, labels, clean: jnp.mean(logits), r"\(\)"),
      (lambda logits, labels, clean: logits, r"\(8, 5\)"),
    ]:
      message = rf"objective must return \(8,\), one for each image, got {shape}"
      with pytest.raises(ValueError, match=message):
        attack(model, objective=objective)(PARAMS, (IMAGES, LABELS), 0)
  count = lambda logits, labels, clean: jnp.argmax(logits, axis=1)
  with pytest.raises(TypeError, match="objective must be real floats, got dtype int32"):
    make["pgd"](model, objective=count)(PARAMS, (IMAGES, LABELS), 0)


def test_labels_of_few_bits_are_as_good_as_others():
  """With 200 classes, which int8 cannot count."""
  wide = jnp.asarray(np.random.default_rng(0).normal(size=(16, 200)), jnp.float32)
  linear = lambda params, images: images.reshape(len(images), 16) @ params
  labels = np.arange(8, dtype=np.int8)
  for attack in (
    jaxbo.adversarial.pgd(linear, **TINY),
    jaxbo.adversarial.apgd(
      linear, Box(EPSILON), num_steps=2, objective="targeted_dlr", num_targets=1
    ),
  ):
    ours, info = attack.run(wide, (IMAGES, labels), 0)
    expected, _ = attack.run(wide, (IMAGES, labels.astype(np.int32)), 0)
    np.testing.assert_array_equal(ours, expected)
    assert not info.not_finite.any()


def test_under_jit_images_are_clipped_and_unknown_labels_left_alone():
  run = jax.jit(lambda images, labels: PGD.run(PARAMS, (images, labels)))
  outside = np.array(IMAGES)
  outside[:2, 0, 0, 0] = 7.0, -3.0
  clipped = outside.clip(0, 1)
  ours, expected = run(outside, LABELS), run(clipped, LABELS)
  np.testing.assert_array_equal(ours[0], expected[0])
  unknown = np.array(LABELS)
  unknown[3:5] = 99, -1
  perturbed, info = jax.device_get(run(IMAGES, unknown))
  np.testing.assert_array_equal(perturbed[3:5], IMAGES[3:5])
  assert np.flatnonzero(info.not_finite).tolist() == [3, 4]
  assert info.num_not_finite == 2
  # An objective that does not look at labels knows them no better.
  attacks = (
    jaxbo.adversarial.pgd(model, objective="kl", random_start=0.001, **TINY),
    jaxbo.adversarial.square(model, objective="kl", box=Box(EPSILON), num_queries=2),
  )
  for info in jax.jit(lambda y: [a.run(PARAMS, (IMAGES, y), 0)[1] for a in attacks])(unknown):
    assert np.flatnonzero(info.not_finite).tolist() == [3, 4]
  others, expected = np.array([0, 1, 2, 5, 6, 7]), np.asarray(run(IMAGES, LABELS)[0])
  np.testing.assert_array_equal(perturbed[others], expected[others])


def brittle(params, images, broken):
  """If broken, the logits of the third image are NaN, and so is the gradient of the sixth."""
  logits = model(params, images)
  row = jnp.where(broken, jnp.arange(images.shape[0]), -1)[:, None]
  # The root has no slope at zero, where its argument always is.
  nothing = jnp.sum(images - jax.lax.stop_gradient(images), axis=(1, 2, 3))[:, None]
  rough = jnp.sqrt(jnp.where(row == 5, nothing, 1.0)) * jnp.arange(1.0, 6.0)[None]
  return jnp.where(row == 2, jnp.nan, logits + jnp.where(row == 5, rough, 0))


@jax.jit
def attack_brittle(images, labels, broken):
  model = lambda params, images: brittle(params, images, broken)
  pgd = functools.partial(jaxbo.adversarial.pgd, model, random_start=False, **TINY)
  attacks = {
    "whole": pgd(),
    "adam": pgd(direction="adam"),
    "apgd": jaxbo.adversarial.apgd(model, Box(EPSILON), num_steps=6),
    "square": jaxbo.adversarial.square(model, Box(EPSILON), num_queries=6),
    "fab": jaxbo.adversarial.fab(model, Box(3 * EPSILON), num_steps=6),
  }
  return {name: attack.run(PARAMS, (images, labels), 0) for name, attack in attacks.items()}


def test_examples_that_are_not_finite_stay_where_they_were_and_are_counted():
  found, untouched = (
    jax.device_get(attack_brittle(IMAGES, LABELS, broken)) for broken in (True, False)
  )
  for name, ours in found.items():
    sound = untouched[name]
    expected = [2] if name == "square" else [2, 5]
    assert np.flatnonzero(ours[1].not_finite).tolist() == expected, name
    assert np.isfinite(ours[0]).all(), name
    others = np.array([i for i in range(problem.BATCH) if i not in expected])
    np.testing.assert_allclose(ours[0][others], sound[0][others], atol=1e-6)
    np.testing.assert_array_equal(ours[1].num_correct[others], sound[1].num_correct[others])
    if name in ("whole", "adam"):
      np.testing.assert_array_equal(ours[0][[2, 5]], np.asarray(IMAGES)[[2, 5]])
    assert not sound[1].not_finite.any()
  assert PGD.run(PARAMS, (np.full_like(IMAGES, np.nan), LABELS))[1].num_not_finite == problem.BATCH


@pytest.mark.parametrize("direction", ["steepest", "adam"])
def test_a_gradient_that_breaks_on_the_way_leaves_the_last_finite_point(direction):
  """Beyond 0.55 the loss is NaN: a climb from 0.5 by 0.02 ends at 0.56, momentum or not."""
  cliff = lambda p, x: jnp.where(x > 0.55, jnp.nan, jnp.concatenate([-x, x], axis=1))
  batch = jnp.full((1, 1), 0.5), jnp.zeros(1, jnp.int32)
  sizes = {"box": Box(0.3), "step_size": 0.02, "num_steps": 9}
  attack = jaxbo.adversarial.pgd(cliff, random_start=False, direction=direction, **sizes)
  perturbed, info = attack.run((), batch)
  assert float(perturbed[0, 0]) == pytest.approx(0.56, abs=1e-3)
  assert bool(info.not_finite[0])


def test_bfloat16_images_and_parameters_are_perturbed_in_float32():
  narrow = problem.params(jnp.bfloat16)
  images = problem.batch(dtype=jnp.bfloat16)[0]
  for attack in (PGD, jaxbo.adversarial.apgd(model, Box(EPSILON), num_steps=4)):
    perturbed, info = attack.run(narrow, (images, LABELS), 0)
    assert perturbed.dtype == jnp.float32
    assert np.abs(perturbed - images.astype(jnp.float32)).max() <= EPSILON + 1e-6
    assert info.num_correct.dtype == jnp.int32
  near = PGD(PARAMS, (images.astype(jnp.float32), LABELS))
  assert np.mean(np.abs(PGD(narrow, (images, LABELS)) - near) < 1e-3) > 0.9


def equations(jaxpr):
  for equation in jaxpr.eqns:
    yield equation
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
      yield from equations(inner)


def test_no_gradient_of_the_parameters_is_taken():
  """No product has the shape of a weight; with the gradient of the parameters two have."""
  shapes = {p.shape for p in jax.tree.leaves(PARAMS) if p.ndim == 2}

  def products(function):
    jaxpr = jax.make_jaxpr(function)(PARAMS).jaxpr
    found = [e.outvars[0].aval.shape for e in equations(jaxpr) if "dot" in e.primitive.name]
    assert found
    return sum(shape in shapes or shape[::-1] in shapes for shape in found)

  batch = (IMAGES, LABELS)
  assert products(lambda params: PGD(params, batch)) == 0
  attack = jaxbo.adversarial.apgd(model, Box(EPSILON), num_steps=3, objective="targeted_dlr")
  assert products(lambda params: attack(params, batch, 0)) == 0
  trained = jax.grad(lambda p: jnp.sum(problem.loss(p, PGD(p, batch), LABELS)))
  assert products(trained) == 2


def test_no_gradient_flows_through_an_attack():
  total = lambda p, x: jnp.sum(problem.loss(p, x, LABELS))
  batch = (IMAGES, LABELS)
  noisy = jaxbo.adversarial.pgd(model, direction="gradient", **TINY)
  through, constant = jax.jit(
    lambda params: (
      jax.grad(lambda p: total(p, noisy(p, batch, 0)))(params),
      jax.grad(total)(params, noisy(params, batch, 0)),
    )
  )(PARAMS)
  for a, b in zip(*map(jax.tree.leaves, (through, constant)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


ATTACKS = [
  PGD,
  jaxbo.adversarial.apgd(model, Box(EPSILON), num_steps=3, objective="targeted_dlr", num_targets=2),
  jaxbo.adversarial.square(model, Box(EPSILON), num_queries=3),
  jaxbo.adversarial.square(model, Box(EPSILON, norm="l2"), num_queries=3),
  jaxbo.adversarial.fab(model, Box(3 * EPSILON), num_steps=3, num_targets=2),
]
ROWS = PartitionSpec("d")


def attack_by_all(images, labels):
  return [a.run(PARAMS, (images, labels), 0) for a in ATTACKS]


def test_eight_devices_attack_as_one():
  """With the replication check on, which looks at the types of the loops."""
  mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
  sharded = jax.shard_map(attack_by_all, mesh=mesh, in_specs=ROWS, out_specs=ROWS)
  ours = jax.device_get(jax.jit(sharded)(IMAGES, LABELS))
  np.testing.assert_allclose(ours[0][0], PGD(PARAMS, (IMAGES, LABELS)), atol=1e-6)
  # The others draw, on every device the same.
  before = problem.cross_entropy(model(PARAMS, IMAGES), LABELS)
  for perturbed, info in ours[1:]:
    assert np.mean(problem.cross_entropy(model(PARAMS, perturbed), LABELS)) > np.mean(before)
    assert info.num_correct.shape == (problem.BATCH,)


def test_an_explicit_mesh_attacks_as_one_device():
  """The carries of the loops are divided as the images are, from the start."""
  mesh = jax.make_mesh((8,), ("d",))
  batch = jax.device_put((IMAGES, LABELS), NamedSharding(mesh, ROWS))
  jax.eval_shape(attack_by_all, *batch)
  with jax.set_mesh(mesh):
    ours = jax.jit(attack_by_all)(*batch)
    report = jaxbo.adversarial.evaluate_robustness(model, PARAMS, batch, 0, {"pgd": PGD})
  alone = jax.jit(attack_by_all)(IMAGES, LABELS)
  for a, b in zip(*map(jax.tree.leaves, jax.device_get((ours, alone))), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)
  assert ours[0][0].sharding.spec[0] == "d"
  falls = np.argmax(model(PARAMS, ours[0][0]), axis=1) != np.asarray(LABELS)
  np.testing.assert_array_equal(report.correct["pgd"], report.clean & ~falls)


def test_foolbox_agrees_on_which_images_fall():
  """An independent implementation, where it is installed: the same attack, the same images."""
  foolbox = pytest.importorskip("foolbox")
  wide = problem.batch(seed=5)
  bounded = foolbox.JAXModel(lambda x: model(PARAMS, x), bounds=(0, 1))
  theirs = foolbox.attacks.LinfPGD(abs_stepsize=0.02, steps=10, random_start=False)
  points, _, success = theirs(bounded, *wide, epsilons=EPSILON)
  attack = jaxbo.adversarial.pgd(
    model, Box(EPSILON), step_size=0.02, num_steps=10, random_start=False
  )
  ours = attack(PARAMS, wide)
  np.testing.assert_allclose(ours, np.asarray(points), atol=1e-6)
  wrong = np.argmax(model(PARAMS, ours), axis=1) != np.asarray(wide[1])
  np.testing.assert_array_equal(wrong, np.asarray(success))
