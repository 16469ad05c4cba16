"""LeNet5: its size, its values against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxbo_models import LeNet5

from tests.models import oracle

pytestmark = pytest.mark.slow  # All together, not each.


def test_has_60856_parameters():
  images = jax.ShapeDtypeStruct((2, 32, 32, 1), jnp.float32)
  variables = jax.eval_shape(LeNet5().init, jax.random.key(0), images)
  assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == 60_856
  features = jax.eval_shape(LeNet5().apply, variables, images)
  assert (features.shape, features.dtype) == ((2, 84), jnp.float32)


def test_features_equal_those_of_numpy(x64):
  images = oracle.images(3, 32, 32, 1)
  variables = oracle.draw_variables(LeNet5(), images)
  x, params = images, variables["params"]
  for i in range(3):
    layer = params[f"Conv_{i}"]
    x = oracle.relu(oracle.conv(x, layer["kernel"], layer["bias"]))
    x = oracle.pool(x) if i < 2 else x
  dense = params["Dense_0"]
  expected = oracle.relu(x[:, 0, 0] @ dense["kernel"] + dense["bias"])
  features = jax.jit(LeNet5().apply)(variables, jnp.asarray(images))
  np.testing.assert_allclose(features, expected, rtol=1e-6, atol=1e-6)
