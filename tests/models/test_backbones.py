"""What every backbone promises: pure losses, the same numbers for every convolution, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from jaxbo_models import MLP, Conv4, LeNet5, PreActResNet18, ResNet12, SmallCNN
from jaxbo_models.layers import BatchNorm

from tests.catalogue import assert_same_on_meshes
from tests.models import oracle

pytestmark = pytest.mark.slow  # All together, not each.

# Each with the shape of its images.
BACKBONES = {
  # 32 pixels are left: with fewer, all maxima may be positive, and then the next normalization
  # takes the bias of the convolution out again.
  "Conv4": (functools.partial(Conv4, features=3), (16, 17, 34, 2)),
  "LeNet5": (LeNet5, (4, 33, 32, 1)),
  "ResNet12": (functools.partial(ResNet12, widths=(4, 6, 8, 10)), (4, 17, 34, 2)),
}
NORMALIZED = {name: BACKBONES[name] for name in ("Conv4", "ResNet12")}
every_backbone = pytest.mark.parametrize("build, shape", BACKBONES.values(), ids=BACKBONES)
every_normalized = pytest.mark.parametrize("build, shape", NORMALIZED.values(), ids=NORMALIZED)


def setup(model, shape):
  """Variables and images in float64, which is float32 outside of double precision."""
  images = jnp.asarray(oracle.images(*shape))
  return oracle.draw_variables(model, images), images


@functools.cache
def forward(model):
  return jax.jit(model.apply)


def loss(model, params, images):
  """Weights every feature of every example differently."""
  features = model.apply(params, images)
  weights = np.random.default_rng(5).normal(size=features.shape).astype(np.float32)
  return jnp.sum(jnp.sin(features) * weights)


@functools.cache
def value_and_gradient(model):
  return jax.jit(jax.value_and_grad(functools.partial(loss, model)))


@every_backbone
def test_convolutions_have_the_same_parameters_values_and_gradients(build, shape, x64):
  variables, images = setup(build(), shape)
  results = []
  for conv in ("patches", "native"):
    model = build(conv=conv)
    made = jax.eval_shape(model.init, jax.random.key(0), images)
    results.append((made, value_and_gradient(model)(variables, images)))
  (made, patches), (other, native) = results
  assert made == other
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), patches, native)
  # A gradient reaches every parameter.
  for path, leaf in jax.tree.leaves_with_path(patches[1]):
    assert np.abs(leaf).max() > 1e-4, jax.tree_util.keystr(path)


@pytest.mark.parametrize("conv", ["patches", "native"])
def test_images_divided_on_a_mesh_give_the_gradient_of_one_device(conv):
  """Convolutions, batch normalization and pooling."""
  model = Conv4(features=3, conv=conv)
  variables, images = setup(model, (8, 17, 17, 1))
  specs = PartitionSpec(), PartitionSpec("d")
  run = jax.value_and_grad(functools.partial(loss, model))
  assert_same_on_meshes(run, (variables, images), specs, rtol=1e-3, atol=1e-4)


@every_backbone
def test_auto_is_patches_on_the_cpu_and_native_elsewhere(build, shape, monkeypatch):
  model, images = build(), jnp.ones(shape)

  def has_native_convolutions():
    traced = jax.make_jaxpr(lambda key: model.init(key, images))(jax.random.key(0))
    return "conv_general_dilated" in str(traced)

  assert not has_native_convolutions()
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert has_native_convolutions()


@every_backbone
def test_bfloat16_computes_in_bfloat16_with_parameters_and_features_in_float32(build, shape):
  model = build(dtype=jnp.bfloat16)
  variables, images = setup(model, shape)
  made = jax.eval_shape(model.init, jax.random.key(0), images)
  assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {jnp.dtype(jnp.float32)}
  features, exact = (forward(m)(variables, images) for m in (model, build()))
  assert features.dtype == exact.dtype == jnp.float32
  error = np.linalg.norm(features - exact) / np.linalg.norm(exact)
  assert 1e-4 < error < 0.1  # bfloat16 rounds by up to 0.004


@every_backbone
def test_vmap_over_parameters_and_scan_over_steps_equal_loops(build, shape, x64):
  model = build(conv="patches")
  variables, images = setup(model, shape)
  starts = [jax.tree.map(lambda leaf, s=s: leaf * s, variables) for s in (1, 1.1)]

  def step(params, _):
    value, gradient = value_and_gradient(model)(params, images)
    return descend(params, gradient), value

  descend = functools.partial(jax.tree.map, lambda p, g: p - 1e-3 * g)
  run = jax.jit(jax.vmap(lambda params: jax.lax.scan(step, params, length=3)[1]))
  values = run(jax.tree.map(lambda *leaves: np.stack(leaves), *starts))
  for params, row in zip(starts, values, strict=True):
    for value in row:
      expected, gradient = jax.device_get(value_and_gradient(model)(params, images))
      params = descend(params, gradient)
      np.testing.assert_allclose(value, expected, rtol=1e-3, atol=1e-3)


def test_second_derivatives_are_symmetric():
  model = Conv4(3)
  variables, images = setup(model, (4, 17, 34, 2))
  u, v = (oracle.perturbed(variables, seed) for seed in (1, 2))
  gradient = jax.grad(functools.partial(loss, model))

  @jax.jit
  def product(variables, v):
    return jax.jvp(lambda params: gradient(params, images), (variables,), (v,))[1]

  def inner(a, b):
    return sum(jax.tree.leaves(jax.tree.map(np.vdot, a, b)))

  forward, backward = inner(u, product(variables, v)), inner(v, product(variables, u))
  assert abs(forward) > 1e-2
  np.testing.assert_allclose(forward, backward, rtol=1e-3)


@every_normalized
def test_batch_statistics_are_transductive_and_running_ones_are_not(build, shape):
  for batch_stats in ("batch", "running"):
    model = build(batch_stats=batch_stats)
    variables, images = setup(model, shape)
    assert ("batch_stats" in variables) == (batch_stats == "running")
    doubled = images.at[1].multiply(2.0)
    before, after = (np.asarray(forward(model)(variables, x)) for x in (images, doubled))
    change = np.abs(after - before)
    assert change[1].max() > 1e-3
    if batch_stats == "batch":
      assert change[0].max() > 1e-3
    else:
      np.testing.assert_array_equal(np.delete(change, 1, axis=0), 0)


@every_normalized
def test_training_with_running_statistics_normalizes_by_the_batch_and_says_what_moved(build, shape):
  model = build(batch_stats="running", momentum=0.75)
  variables, images = setup(model, shape)
  train = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))
  features, moved = train(variables, images)
  transductive = forward(build())({"params": variables["params"]}, images)
  np.testing.assert_allclose(features, transductive, rtol=1e-4, atol=1e-4)
  assert jax.tree.structure(moved["batch_stats"]) == jax.tree.structure(variables["batch_stats"])
  changes = jax.tree.map(np.subtract, moved["batch_stats"], variables["batch_stats"])
  assert {leaf.dtype for leaf in jax.tree.leaves(moved)} == {jnp.dtype(jnp.float32)}
  assert all(np.abs(change).max() > 1e-3 for change in jax.tree.leaves(changes))
  with pytest.raises(ValueError, match=r"train=True .* needs mutable=\['batch_stats'\]"):
    model.apply(variables, images, train=True)


@every_backbone
def test_bad_images_and_unknown_choices_are_refused(build, shape):
  key = jax.random.key(0)
  with pytest.raises(
    ValueError, match=r"images must have the shape \[n, height, width, channels\]"
  ):
    build().init(key, jnp.ones(shape[1:]))
  with pytest.raises(ValueError, match=r"at least (16|32) pixels high and wide, got .*4, 15"):
    build().init(key, jnp.ones((4, 15, *shape[2:])))
  with pytest.raises(ValueError, match=r"images must be at least one, got the shape \(0, "):
    build().init(key, jnp.ones((0, *shape[1:])))
  with pytest.raises(ValueError, match="conv must be 'auto', 'patches' or 'native', got 'im2col'"):
    build(conv="im2col").init(key, jnp.ones(shape))


@every_normalized
def test_unknown_statistics_and_statistics_of_one_value_are_refused(build, shape):
  with pytest.raises(ValueError, match="batch_stats must be 'batch' or 'running', got 'group'"):
    jax.eval_shape(build(batch_stats="group").init, jax.random.key(0), jnp.ones(shape))
  with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\), got 1"):
    jax.eval_shape(build(momentum=1.0).init, jax.random.key(0), jnp.ones(shape))


def test_sizes_and_epsilon_that_make_no_layer_are_refused():
  """Without a check a width of 0 gives features of nothing, and a negative epsilon NaN."""
  images, key = jnp.ones((2, 32, 32, 1)), jax.random.key(0)
  for model, message in (
    (Conv4(0), "features must be at least 1, an integer, got 0"),
    (SmallCNN(widths=(4, 0)), "widths must be at least 1, an integer, got 0"),
    (SmallCNN(num_hidden=0), "num_hidden must be at least 1"),
    (SmallCNN(num_classes=0), "num_classes must be at least 1"),
    (PreActResNet18(num_classes=0), "num_classes must be at least 1"),
    (PreActResNet18(widths=(4, 4, 4, -4)), "widths must be at least 1, an integer, got -4"),
    (ResNet12(widths=(4, 4, 4, 0)), "widths must be at least 1"),
    (MLP((4, 0)), "features must be at least 1"),
    (MLP(()), r"features must be at least one width, got \(\)"),
  ):
    with pytest.raises(ValueError, match=message):
      jax.eval_shape(model.init, key, images)
  for epsilon in (0.0, -1e-5, float("nan"), float("inf")):
    with pytest.raises(ValueError, match=f"epsilon must be positive .*, got {epsilon}"):
      jax.eval_shape(BatchNorm(epsilon=epsilon).init, key, images)


def test_one_pixel_of_one_image_has_no_batch_statistics():
  images = jnp.ones((1, 28, 28, 1))
  variables = jax.eval_shape(Conv4(3).init, jax.random.key(0), images)  # init does not mind
  with pytest.raises(ValueError, match="more than one value for each channel"):
    jax.eval_shape(Conv4(3).apply, variables, images)
