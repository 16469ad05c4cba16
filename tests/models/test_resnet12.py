"""ResNet12: its size, its values against NumPy, what DropBlock drops."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxbo_models import ResNet12, drop_block

from tests.cases import cases
from tests.models import oracle

pytestmark = pytest.mark.slow  # All together, not each.

WIDTHS = (4, 6, 8, 10)


@pytest.mark.parametrize(
  "widths, num_parameters",
  [((64, 160, 320, 640), 12_424_320), ((64, 128, 256, 512), 7_996_800)],
)
def test_sizes_are_those_of_the_few_shot_experiments(widths, num_parameters):
  model, images = ResNet12(widths), jax.ShapeDtypeStruct((5, 84, 84, 3), jnp.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), images)
  assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == num_parameters
  assert set(variables) == {"params"}
  features = jax.eval_shape(model.apply, variables, images)
  assert (features.shape, features.dtype) == ((5, widths[-1]), jnp.float32)


def reference(variables, x):
  for i in range(4):
    params = variables["params"][f"ResidualBlock_{i}"]
    stats = variables.get("batch_stats", {}).get(f"ResidualBlock_{i}", {})

    def layer(x, conv, norm, padding, params=params, stats=stats):
      x = oracle.conv(x, params[conv]["kernel"], padding=padding)
      return oracle.normalize(x, params[norm], **stats.get(norm, {}))

    shortcut = layer(x, "shortcut", "shortcut_norm", 0)
    x = oracle.relu(layer(x, "Conv_0", "BatchNorm_0", 1), 0.1)
    x = oracle.relu(layer(x, "Conv_1", "BatchNorm_1", 1), 0.1)
    x = oracle.pool(oracle.relu(layer(x, "Conv_2", "BatchNorm_2", 1) + shortcut, 0.1))
  return x.mean((1, 2))


@pytest.mark.parametrize("batch_stats", ["batch", "running"])
def test_features_equal_those_of_numpy(batch_stats, x64):
  model, images = ResNet12(WIDTHS, batch_stats), oracle.images(3, 19, 34, 2)
  variables = oracle.draw_variables(model, images)
  features = jax.jit(model.apply)(variables, jnp.asarray(images))
  np.testing.assert_allclose(features, reference(variables, images), rtol=1e-6, atol=1e-6)


def test_kernels_begin_with_variance_2_over_fan_out():
  model, images = ResNet12((16, 16, 16, 32)), jnp.ones((1, 16, 16, 3))
  last_block = lambda key: model.init(key, images)["params"]["ResidualBlock_3"]
  block = jax.jit(last_block)(jax.random.key(0))
  for layer, fan_out in [("Conv_0", 9 * 32), ("Conv_2", 9 * 32), ("shortcut", 32)]:
    kernel = np.asarray(block[layer]["kernel"])
    standard_error = np.sqrt(2 / kernel.size)  # of a variance, relative, if normal
    assert abs(kernel.var() * fan_out / 2 - 1) < 4 * standard_error
    assert abs(kernel.mean()) < 4 * np.sqrt(2 / fan_out / kernel.size)


def share_dropped(height, width, rate, block_size):
  """The expected share: an entry survives if no square that covers it is dropped."""
  rows, columns = min(block_size, height), min(block_size, width)
  corners = list(itertools.product(range(height - rows + 1), range(width - columns + 1)))
  gamma = rate / (rows * columns) * height * width / len(corners)
  covered = np.zeros((height, width))
  for i, j in corners:
    covered[i : i + rows, j : j + columns] += 1
  return (1 - (1 - gamma) ** covered).mean()


@pytest.mark.parametrize(
  "height, width, rate, block_size",
  [(8, 8, 0.3, 1), (8, 10, 0.2, 3), (5, 5, 0.1, 5), (2, 3, 0.4, 5), (7, 4, 0.1, 5)],
)
def test_drop_block_drops_the_share_that_its_probabilities_say(height, width, rate, block_size):
  num_images, num_channels = 300, 10
  x = jnp.ones((num_images, height, width, num_channels))
  y = np.asarray(jax.jit(drop_block, static_argnums=3)(x, jax.random.key(0), rate, block_size))
  shares = (y == 0).mean((1, 2)).ravel()  # of each channel of each image: independent
  expected = share_dropped(height, width, rate, block_size)
  assert abs(shares.mean() - expected) < 4 * shares.std() / np.sqrt(shares.size)
  assert expected <= rate + 1e-12
  if (block_size in (1, 5) and height <= block_size >= width) or block_size == 1:
    assert expected == pytest.approx(rate)
  kept = np.unique(y[y != 0])  # one factor, which keeps the sum
  np.testing.assert_allclose(kept, 1 / (1 - shares.mean()), rtol=1e-5)


def test_drop_block_drops_whole_squares_inside_the_image():
  drop = jax.jit(drop_block, static_argnums=3)
  y = np.asarray(drop(np.ones((20, 9, 8, 2), "f"), jax.random.key(0), 0.1, 3))
  dropped = y == 0
  assert dropped.any()
  for n, i, j, c in zip(*np.nonzero(dropped), strict=True):
    assert any(
      dropped[n, a : a + 3, b : b + 3, c].all()
      for a in range(max(i - 2, 0), min(i, 6) + 1)
      for b in range(max(j - 2, 0), min(j, 5) + 1)
    )
  assert (dropped[..., 0] != dropped[..., 1]).any()


@pytest.mark.parametrize("rate", [0.0, jnp.zeros(())])
def test_drop_block_at_rate_zero_is_the_identity(rate):
  x = jax.random.normal(jax.random.key(1), (4, 5, 5, 3))
  np.testing.assert_array_equal(jax.jit(drop_block, static_argnums=3)(x, KEY(), rate, 3), x)


def KEY(seed=0):
  return jax.random.key(seed)


def test_drop_block_keeps_what_is_not_finite_out_and_survives_dropping_everything():
  x = jnp.full((1, 1, 1, 1), jnp.inf)
  keys = jax.random.split(KEY(), 20)
  y = jax.jit(jax.vmap(lambda key: drop_block(x, key, 0.5, 1)))(keys)
  assert set(np.asarray(y).ravel().tolist()) == {0.0, np.inf}


def test_features_with_drop_block_depend_on_the_key_and_on_nothing_else():
  model, images = ResNet12(WIDTHS, drop_rate=0.3), jnp.asarray(oracle.images(3, 34, 32, 2), "f")
  variables = oracle.draw_variables(model, images)  # needs no key for dropout

  @jax.jit
  def trained(key, rate):
    model = ResNet12(WIDTHS, drop_rate=rate)  # the rate may be traced
    return model.apply(variables, images, train=True, rngs={"dropout": key})

  one, again, other = trained(KEY(1), 0.3), trained(KEY(1), 0.3), trained(KEY(2), 0.3)
  np.testing.assert_array_equal(one, again)
  assert np.abs(one - other).max() > 1e-3
  plain = ResNet12(WIDTHS)

  @jax.jit
  def without_key(v, x):
    return model.apply(v, x), plain.apply(v, x), plain.apply(v, x, train=True)

  evaluated, *others = without_key(variables, images)
  np.testing.assert_allclose(trained(KEY(1), 0.0), evaluated, rtol=1e-5, atol=1e-5)
  for features in others:
    np.testing.assert_array_equal(features, evaluated)


@cases("rate", [-0.1, 1.0, float("nan")])
def test_a_drop_rate_outside_its_range_is_refused(rate):
  with pytest.raises(ValueError, match=r"^rate must be in \[0, 1\), got"):
    drop_block(jnp.ones((1, 2, 2, 1)), KEY(), rate, 1)
  with pytest.raises(ValueError, match=r"drop_rate must be in \[0, 1\), got"):
    jax.eval_shape(ResNet12(WIDTHS, drop_rate=rate).init, KEY(), jnp.ones((1, 16, 16, 1)))


def test_other_than_four_blocks_and_empty_squares_are_refused():
  images = jnp.ones((1, 16, 16, 1))
  with pytest.raises(ValueError, match=r"widths must be four numbers, got \(4, 6\)"):
    ResNet12((4, 6)).init(KEY(), images)
  with pytest.raises(ValueError, match=r"block_sizes must be four numbers, got \(1,\)"):
    ResNet12(WIDTHS, block_sizes=(1,)).init(KEY(), images)
  with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
    drop_block(images, KEY(), 0.1, 0)
