"""Conv4: its size, its values against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxbo_models import Conv4

from tests.models import oracle

pytestmark = pytest.mark.slow  # All together, not each.


@pytest.mark.parametrize(
  "features, shape, num_parameters, num_features",
  [(64, (28, 28, 1), 111_936, 64), (32, (84, 84, 3), 28_896, 800)],
)
def test_sizes_are_those_of_the_few_shot_experiments(features, shape, num_parameters, num_features):
  model, images = Conv4(features), jax.ShapeDtypeStruct((5, *shape), jnp.uint8)
  variables = jax.eval_shape(model.init, jax.random.key(0), images)
  assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == num_parameters
  assert set(variables) == {"params"}
  features = jax.eval_shape(model.apply, variables, images)
  assert (features.shape, features.dtype) == ((5, num_features), jnp.float32)
  kernel = variables["params"]["Conv_0"]["kernel"]
  assert kernel.shape == (3, 3, shape[-1], model.features)


def reference(variables, x):
  params, stats = variables["params"], variables.get("batch_stats")
  for i in range(4):
    layer = params[f"Conv_{i}"]
    x = oracle.pool(oracle.relu(oracle.conv(x, layer["kernel"], layer["bias"], padding=1)))
    x = oracle.normalize(x, params[f"BatchNorm_{i}"], **(stats[f"BatchNorm_{i}"] if stats else {}))
  return x.reshape(len(x), -1)


@pytest.mark.parametrize("batch_stats", ["batch", "running"])
def test_features_equal_those_of_numpy(batch_stats, x64):
  model, images = Conv4(3, batch_stats), oracle.images(4, 21, 34, 2)  # 21 -> 10 -> 5 -> 2 -> 1
  variables = oracle.draw_variables(model, images)
  features = jax.jit(model.apply)(variables, jnp.asarray(images))
  np.testing.assert_allclose(features, reference(variables, images), rtol=1e-6, atol=1e-6)
