"""SmallCNN: its size, its values and gradients against NumPy and between convolutions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxbo_models import SmallCNN

from tests.models import oracle

pytestmark = pytest.mark.slow  # All together, not each.


def reference(params, x):
  for i in range(2):
    layer = params[f"Conv_{i}"]
    x = oracle.relu(oracle.conv(x, layer["kernel"], layer["bias"], padding=1)[:, ::2, ::2])
  x = x.reshape(len(x), -1)
  x = oracle.relu(x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"])
  return x @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]


def test_size_is_that_of_wong_and_kolter():
  images = jax.ShapeDtypeStruct((5, 28, 28, 1), jnp.uint8)
  variables = jax.eval_shape(SmallCNN().init, jax.random.key(0), images)
  assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == 166_406
  assert set(variables) == {"params"}


def test_logits_equal_those_of_numpy_and_both_convolutions_agree(x64):
  """Values, and gradients in the images and in every parameter; odd and even sizes."""
  images = jnp.asarray(oracle.images(3, 13, 18, 2))
  variables = oracle.draw_variables(SmallCNN(4, (3, 5), 6), images)
  weights = np.random.default_rng(5).normal(size=(3, 4))

  def value(conv, variables, images):
    logits = SmallCNN(4, (3, 5), 6, conv=conv).apply(variables, images)
    return jnp.sum(weights * logits), logits

  @jax.jit
  def both(variables, images):
    return [
      jax.value_and_grad(lambda v, x, conv=conv: value(conv, v, x), (0, 1), has_aux=True)(
        variables, images
      )
      for conv in ("patches", "native")
    ]

  patches, native = both(variables, images)
  expected = reference(variables["params"], np.asarray(images))
  np.testing.assert_allclose(patches[0][1], expected, rtol=1e-6, atol=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), patches, native)
  assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(patches[1]))


def test_bfloat16_gives_logits_in_float32_and_what_is_wrong_is_refused():
  key, images = jax.random.key(0), jnp.ones((2, 8, 8, 1))
  model = SmallCNN(widths=(2, 3), num_hidden=4, dtype=jnp.bfloat16)
  variables = jax.eval_shape(model.init, key, images)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
  assert jax.eval_shape(model.apply, variables, images).dtype == jnp.float32
  with pytest.raises(ValueError, match=r"widths must be two numbers, got \(4,\)"):
    jax.eval_shape(SmallCNN(widths=(4,)).init, key, images)
  with pytest.raises(ValueError, match=r"at least 8 pixels high and wide"):
    jax.eval_shape(SmallCNN().init, key, images[:, :7])
