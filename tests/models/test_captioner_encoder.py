"""Encoders: each cell sees its patch alone, images of another shape are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxbo_models import ResNet12, captioner

from tests.cases import cases
from tests.models.captioner_setup import TOKENS, make

pytestmark = pytest.mark.slow

ENCODER = captioner.PatchEncoder((8, 12, 3), patch_size=4, features=6)


def test_a_cell_sees_its_patch_and_no_other_and_positions_differ():
  rng = np.random.default_rng(0)
  images = rng.normal(size=(2, 8, 12, 3)).astype(np.float32)
  params = jax.jit(ENCODER.init)(jax.random.key(0), jnp.asarray(images))["params"]
  features = np.asarray(ENCODER.apply({"params": params}, jnp.asarray(images)))
  for cell in range(6):
    row, column = divmod(cell, 3)
    patch = images[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].reshape(2, -1)
    x = patch
    for i in range(2):
      layer = {k: np.asarray(v) for k, v in params[f"Dense_{i}"].items()}
      x = np.maximum(x @ layer["kernel"] + layer["bias"], 0)
    np.testing.assert_allclose(
      features[:, cell], x + np.asarray(params["position"])[cell], rtol=1e-4, atol=1e-5
    )


def test_images_take_the_place_of_features():
  model = make(encoder=ENCODER)
  images = jax.ShapeDtypeStruct((3, 8, 12, 3), jnp.uint8)
  params = jax.eval_shape(model.init, jax.random.key(0), images, TOKENS)["params"]
  output = jax.eval_shape(model.apply, {"params": params}, images, TOKENS)
  assert output.attention.shape == (3, 6, 6)
  assert "position" in params["encoder"]
  bad = jax.ShapeDtypeStruct((3, 12, 8, 3), jnp.uint8)
  with pytest.raises(ValueError, match=r"images must have .* \[n, 8, 12, 3\], got \(3, 12, 8, 3\)"):
    jax.eval_shape(model.apply, {"params": params}, bad, TOKENS)


def test_a_backbone_that_pools_has_no_cells():
  images = jax.ShapeDtypeStruct((2, 32, 48, 3), jnp.float32)
  grid = captioner.GridEncoder(ResNet12(widths=(2, 2, 2, 2), pool=False))
  assert jax.eval_shape(grid.init_with_output, jax.random.key(0), images)[0].shape == (2, 6, 2)
  pooled = captioner.GridEncoder(ResNet12(widths=(2, 2, 2, 2)))
  with pytest.raises(ValueError, match=r"must return \[n, rows, columns, dim\].*got .*\(2, 2\)"):
    jax.eval_shape(pooled.init, jax.random.key(0), images)


@cases(
  "options, message",
  [
    ({"patch_size": 0}, "patch_size must be at least 1, got 0"),
    ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
    ({"image_shape": (30, 32, 3)}, r"multiples of patch_size = 8, got \(30, 32, 3\)"),
  ],
)
def test_encoders_that_cannot_be_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    captioner.PatchEncoder(**options)
