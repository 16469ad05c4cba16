"""Low-rank adapters: closed forms, gradients, reweighting, divided and saved parameters."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxbo_models import SmallCNN, lora, transformer

import jaxbo
from tests.models.random_params import random_params

pytestmark = pytest.mark.slow  # All together, not each.

CONFIG = transformer.llama(
  vocab_size=48, max_length=16, num_layers=2, width=32, num_heads=4, num_kv_heads=2, ffn_width=48
)
MODEL = transformer.Transformer(CONFIG)
LOSS_FN = transformer.sequence_losses(MODEL)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(48, size=(8, 12)), jnp.int32)
LABELS = TOKENS.at[:, :4].set(-100).at[-1].set(-100)
BATCH = {"tokens": TOKENS, "labels": LABELS}


@functools.cache
def base():
  """Weights in bfloat16."""
  return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_params(MODEL))


def random_adapters(seed=0, **options):
  adapters = lora.init(seed, base(), rank=3, **options)
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), adapters
  )


def test_new_adapters_change_nothing():
  params = base()
  adapters = lora.init(0, params, rank=3)
  merged = lora.merge(params, adapters, alpha=16.0)
  chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), merged), params)
  kernels = adapters["blocks"]
  assert kernels["query"]["kernel"].down.shape == (2, 32, 3)
  assert kernels["query"]["kernel"].up.shape == (2, 3, 4, 8)
  assert kernels["key_value"]["kernel"].up.shape == (2, 3, 2, 2, 8)
  assert kernels["attention_out"]["kernel"].down.shape == (2, 4, 8, 3)
  assert set(adapters) == {"blocks"}  # The head is tied, and norms are no kernels.
  for path, leaf in jax.tree.leaves_with_path(adapters):
    assert leaf.dtype == jnp.float32
    if path[-1].name == "down":
      num_inputs = leaf[0].size / 3
      assert np.std(leaf) == pytest.approx(
        num_inputs**-0.5, abs=4 * (2 * leaf.size * num_inputs) ** -0.5
      )


def test_what_is_merged_is_the_weight_and_the_product():
  params, adapters = base(), random_adapters()
  merged = lora.merge(params, adapters, alpha=6.0)
  letters = {"query": "lir,lrhd->lihd", "key_value": "lir,lrphd->liphd", "ffn_out": "lir,lro->lio"}
  letters["attention_out"] = "lhdr,lro->lhdo"
  for name, equation in letters.items():
    adapter = adapters["blocks"][name]["kernel"]
    update = np.einsum(equation, *(np.asarray(x, np.float64) for x in adapter))
    weight = np.asarray(params["blocks"][name]["kernel"], np.float64)
    np.testing.assert_allclose(
      merged["blocks"][name]["kernel"], weight + 2 * update, rtol=1e-5, atol=1e-5
    )
  assert merged["token_embedding"] is params["token_embedding"]


def test_adapters_of_any_flax_model_and_of_chosen_kernels():
  model = SmallCNN(3)
  images = jnp.ones((1, 16, 16, 3))
  params = model.init(jax.random.key(0), images)["params"]
  adapters = lora.init(1, params, rank=2, where=lambda path: path.startswith("Conv_0/kernel"))
  (adapter,) = jax.tree.leaves(adapters, is_leaf=lambda leaf: isinstance(leaf, lora.Adapter))
  kernel = params["Conv_0"]["kernel"]
  assert adapter.down.shape == (*kernel.shape[:-1], 2)
  assert adapter.up.shape == (2, kernel.shape[-1])
  assert lora.merge(params, adapters).keys() == params.keys()
  sideways = lora.init(1, params, rank=2, axes=lambda path, kernel: lora.Axes(0, 1))
  assert sideways["Conv_0"]["kernel"].down.shape == (kernel.shape[0], 2)


@jax.jit
def step(params, adapters, state, batch):
  loss_fn = lora.adapted(LOSS_FN, params)
  grads = jaxbo.per_example_grad(loss_fn)(adapters, batch)
  updates, state = TX.update(grads, state, adapters)
  return optax.apply_updates(adapters, updates), state, grads.losses


TX = optax.chain(jaxbo.reweight(jaxbo.dro.kl(0.5)), optax.adam(0.02))


def test_gradients_are_those_of_the_chain_rule_with_weights_on_rows_with_targets():
  params, adapters = base(), random_adapters()
  tx = jaxbo.reweight(jaxbo.dro.kl(0.5))

  @jax.jit
  def both(adapters):
    grads = jaxbo.per_example_grad(lora.adapted(LOSS_FN, params, alpha=6.0))(adapters, BATCH)
    updates, state = tx.update(grads, tx.init(adapters), adapters)
    weights = jnp.where(
      jnp.arange(8) < 7, jax.nn.softmax(2 * grads.losses, where=jnp.arange(8) < 7), 0
    )
    weighted = lambda merged: jnp.dot(weights, LOSS_FN(merged, BATCH))
    return (
      updates,
      state.info.num_valid,
      jax.grad(weighted)(lora.merge(params, adapters, alpha=6.0)),
    )

  updates, num_valid, full = jax.device_get(both(adapters))
  assert num_valid == 7  # The last row has no target.
  down, up = (np.asarray(x) for x in adapters["blocks"]["ffn_in"]["kernel"])
  expected = full["blocks"]["ffn_in"]["kernel"]
  found = updates["blocks"]["ffn_in"]["kernel"]
  np.testing.assert_allclose(found.down, 2 * expected @ up.swapaxes(1, 2), rtol=1e-3, atol=1e-6)
  np.testing.assert_allclose(found.up, 2 * down.swapaxes(1, 2) @ expected, rtol=1e-3, atol=1e-6)


def test_adapters_learn_while_weights_in_bfloat16_stay_and_runs_go_on_from_checkpoints(tmp_path):
  import orbax.checkpoint as ocp

  params = base()
  before = jax.device_get(params)
  adapters = lora.init(0, params, rank=3)
  state = TX.init(adapters)
  history = []
  for i in range(30):
    adapters, state, losses = step(params, adapters, state, BATCH)
    history.append(np.asarray(losses)[:-1].mean())
    if i == 19:
      with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", (adapters, state))
  assert history[-1] < 0.7 * history[0]
  chex.assert_trees_all_equal(jax.device_get(params), before)
  with ocp.StandardCheckpointer() as checkpointer:
    restored = checkpointer.restore(tmp_path / "state", (adapters, state))
  for _ in range(10):
    restored = step(params, *restored, BATCH)[:2]
  chex.assert_trees_all_equal(restored, (adapters, state))


def test_weights_and_adapters_divided_among_devices_give_the_step_of_one():
  params, adapters = base(), random_adapters()
  expected = step(params, adapters, TX.init(adapters), BATCH)
  mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))

  def divide(leaf):
    """Along the first axis that can be divided."""
    axes = [axis for axis, size in enumerate(leaf.shape) if size % 8 == 0][:1]
    return jax.device_put(
      leaf, NamedSharding(mesh, PartitionSpec(*[None] * axes[0], "d") if axes else PartitionSpec())
    )

  params, adapters, batch = (jax.tree.map(divide, tree) for tree in (params, adapters, BATCH))
  state = TX.init(adapters)
  found = step(params, adapters, state, batch)
  for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-4)
  assert "d" in str(adapters["blocks"]["ffn_in"]["kernel"].down.sharding.spec)


def test_what_cannot_be_adapted_is_refused():
  params = base()

  def refused(message, call):
    with pytest.raises(ValueError, match=message):
      call()

  refused("rank must be at least 1, got 0", lambda: lora.init(0, params, rank=0))
  refused(
    r"where must choose a parameter of \['blocks/attention_norm/scale', .*\]",
    lambda: lora.init(0, params, rank=1, where=lambda path: False),
  )
  refused(
    r"axes of inputs and of outputs, got final_norm/scale of the shape \(32,\)",
    lambda: lora.init(0, params, rank=1, where=lambda path: path == "final_norm/scale"),
  )
  adapters = random_adapters(where=lambda path: path == "blocks/query/kernel")
  others = random_params(
    transformer.Transformer(
      transformer.gpt2(
        **{"vocab_size": 48, "max_length": 16, "num_layers": 2, "width": 32, "num_heads": 4}
      )
    )
  )
  refused(
    r"shapes \(2, 32, 3\) and \(2, 3, 4, 8\) for blocks/query/kernel of the shape none",
    lambda: lora.merge(others, adapters),
  )
  wide = {"blocks": {"query": {"kernel": jnp.ones((2, 32, 4, 9))}}}
  refused(
    r"for blocks/query/kernel of the shape \(2, 32, 4, 9\)", lambda: lora.merge(wide, adapters)
  )
