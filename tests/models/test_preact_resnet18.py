"""PreActResNet18: its size, its values against NumPy, its convolutions, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxbo_models import PreActResNet18

from tests.models import oracle

pytestmark = pytest.mark.slow  # All together, not each.

WIDTHS = (4, 6, 8, 10)


@pytest.mark.parametrize(
  "num_classes, final_norm, num_parameters",
  [(10, True, 11_172_170), (10, False, 11_171_146), (100, True, 11_218_340)],
)
def test_sizes_are_those_of_the_usual_implementations(num_classes, final_norm, num_parameters):
  """By hand: 1,728 + 147,968 + 525,184 + 2,098,944 + 8,392,192 + 513 a class, + 1,024."""
  model = PreActResNet18(num_classes, final_norm=final_norm)
  images = jax.ShapeDtypeStruct((5, 32, 32, 3), jnp.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), images)
  assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == num_parameters
  assert set(variables) == {"params"}
  logits = jax.eval_shape(model.apply, variables, images)
  assert (logits.shape, logits.dtype) == ((5, num_classes), jnp.float32)


def reference(variables, x):
  params, all_stats = variables["params"], variables.get("batch_stats", {})

  def activate(x, tree, stats, name):
    return oracle.relu(oracle.normalize(x, tree[name], **stats.get(name, {})))

  x = oracle.conv(x, params["Conv_0"]["kernel"], padding=1)
  for i in range(8):
    block, stats = params[f"PreActBlock_{i}"], all_stats.get(f"PreActBlock_{i}", {})
    stride = 2 if i in (2, 4, 6) else 1
    active = activate(x, block, stats, "BatchNorm_0")
    if stride == 2:
      x = oracle.conv(active, block["shortcut"]["kernel"])[:, ::2, ::2]
    assert ("shortcut" in block) == (stride == 2)
    y = oracle.conv(active, block["Conv_0"]["kernel"], padding=1)[:, ::stride, ::stride]
    y = activate(y, block, stats, "BatchNorm_1")
    x = x + oracle.conv(y, block["Conv_1"]["kernel"], padding=1)
  x = activate(x, params, all_stats, "BatchNorm_0")
  return x.mean((1, 2)) @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]


def test_logits_equal_those_of_numpy_for_all_statistics_and_convolutions(x64):
  """Odd and even sizes; with running statistics an example does not depend on others."""
  images = jnp.asarray(oracle.images(3, 9, 18, 2))
  kinds = [("batch", "patches"), ("running", "native")]
  models = {kind: PreActResNet18(4, WIDTHS, batch_stats=kind[0], conv=kind[1]) for kind in kinds}
  variables = oracle.draw_variables(models[kinds[1]], images)
  given = {"batch": {"params": variables["params"]}, "running": variables}
  apply = jax.jit(lambda v, x: {kind: m.apply(v[kind[0]], x) for kind, m in models.items()})
  logits = apply(given, images)
  for kind, values in logits.items():
    expected = reference(given[kind[0]], np.asarray(images))
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)
  change = jax.tree.map(
    lambda a, b: np.abs(a - b).max(axis=1), logits, apply(given, images.at[1].multiply(2.0))
  )
  assert change[kinds[0]].min() > 1e-3
  np.testing.assert_array_equal(change[kinds[1]] > 0, [False, True, False])


def test_bfloat16_computes_in_bfloat16_and_training_moves_running_statistics():
  model = PreActResNet18(4, WIDTHS, batch_stats="running", dtype=jnp.bfloat16)
  images = jnp.asarray(oracle.images(4, 8, 8, 1), jnp.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), images)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
  train = lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"])
  logits, moved = jax.eval_shape(train, variables, images)
  assert logits.dtype == jnp.float32
  assert moved["batch_stats"] == variables["batch_stats"]  # shapes and dtypes
  products = [
    eqn.outvars[0].aval.dtype
    for eqn in jax.make_jaxpr(model.apply)(variables, images).jaxpr.eqns
    if eqn.primitive.name == "dot_general" and eqn.outvars[0].aval.ndim == 4
  ]
  assert len(products) == 20  # 17 convolutions of 3 by 3 and 3 of 1 by 1
  assert set(products) == {jnp.dtype(jnp.bfloat16)}


def test_bad_images_and_other_than_four_widths_are_refused():
  key, images = jax.random.key(0), jnp.ones((2, 8, 8, 3))
  with pytest.raises(ValueError, match=r"widths must be four numbers, got \(4, 6\)"):
    jax.eval_shape(PreActResNet18(widths=(4, 6)).init, key, images)
  with pytest.raises(ValueError, match=r"at least 8 pixels high and wide, got the shape"):
    jax.eval_shape(PreActResNet18(widths=WIDTHS).init, key, images[:, :7])
  with pytest.raises(ValueError, match="batch_stats must be 'batch' or 'running', got 'group'"):
    jax.eval_shape(PreActResNet18(widths=WIDTHS, batch_stats="group").init, key, images)
  with pytest.raises(ValueError, match="conv must be 'auto', 'patches' or 'native', got 'fft'"):
    jax.eval_shape(PreActResNet18(widths=WIDTHS, conv="fft").init, key, images)
