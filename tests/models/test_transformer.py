"""The transformer: sizes, what may see what, padding, scans, dtypes, losses, errors.

That its numbers are those of GPT-2, OPT and Pythia is shown in test_huggingface.py.
"""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec
from jaxbo_models import transformer

import jaxbo
from benchmarks import measure
from tests.cases import cases
from tests.catalogue import assert_same_on_meshes

pytestmark = pytest.mark.slow  # All together, not each.

SMALL = {"vocab_size": 52, "max_length": 16, "num_layers": 3, "width": 32, "num_heads": 4}
# GPT-2 is OPT with another activation and no offset.
FAMILIES = {
  "opt": transformer.opt(**SMALL, ffn_width=48),
  "pythia": transformer.pythia(**SMALL, rotary_fraction=0.5),
}
every_family = pytest.mark.parametrize("family", FAMILIES)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(52, size=(3, 12)), jnp.int32)
WEIGHTS = np.array([1.0, 2.0, 3.0], np.float32)


@functools.cache
def setup(family):
  """A model, and parameters none of which is special."""
  model = transformer.Transformer(FAMILIES[family])
  shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
  rng = np.random.default_rng(1)

  def draw(path, leaf):
    centre = 1.0 if path[-1].key == "scale" else 0.0
    return jnp.asarray(rng.normal(centre, 0.2, leaf.shape), jnp.float32)

  return model, jax.tree.map_with_path(draw, shapes)


@functools.cache
def logits_of(family):
  """``(params, tokens)`` to logits, compiled once."""
  model, _ = setup(family)
  return jax.jit(lambda params, tokens: model.apply({"params": params}, tokens))


@functools.cache
def losses_and_gradient(family):
  """Of their weighted sum, compiled once."""
  loss_fn = transformer.sequence_losses(setup(family)[0])

  def weighted(params, tokens, mask, weights):
    losses = loss_fn(params, {"tokens": tokens, "mask": mask})
    return jnp.dot(losses, weights), losses

  run = jax.jit(jax.value_and_grad(weighted, has_aux=True))
  return lambda params, tokens, mask, weights=WEIGHTS: run(params, tokens, mask, weights)


def assert_close(actual, expected, rtol=1e-4, atol=1e-5):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), actual, expected
  )


@pytest.mark.parametrize(
  "config, num_parameters",
  [
    (transformer.gpt2(), 124_439_808),
    (transformer.gpt2("medium"), 354_823_168),
    (transformer.gpt2("large"), 774_030_080),
    (transformer.gpt2("xl"), 1_557_611_200),
    (transformer.opt(), 125_239_296),
    (transformer.pythia("70m"), 70_426_624),
    (transformer.pythia("160m"), 162_322_944),
    (transformer.llama(), 1_235_814_400),
    (transformer.llama("3.2-3b"), 3_212_749_824),
    (transformer.llama("3.1-8b"), 8_030_261_248),
    (transformer.llama("2-7b"), 6_738_415_616),
    (transformer.mistral("7b-v0.1"), 7_241_732_096),
    (transformer.mistral(), 7_248_023_552),
    (transformer.qwen2(), 494_032_768),
    (transformer.qwen2("1.5b"), 1_543_714_304),
    (transformer.qwen2("7b"), 7_615_616_512),
    (transformer.qwen3(), 596_049_920),
    (transformer.qwen3("1.7b"), 1_720_574_976),
    (transformer.smollm(), 134_515_008),
    (transformer.smollm("360m"), 361_821_120),
    (transformer.smollm("1.7b"), 1_711_376_384),
  ],
)
def test_sizes_are_the_published_ones(config, num_parameters):
  variables = jax.eval_shape(transformer.Transformer(config).init, jax.random.key(0), TOKENS)
  assert set(variables) == {"params"}
  leaves = jax.tree.leaves(variables)
  assert sum(math.prod(leaf.shape) for leaf in leaves) == num_parameters
  assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("family", [transformer.gpt2, transformer.opt, transformer.pythia])
def test_every_published_size_has_the_parameters_in_its_name(family):
  sizes = {"opt": ["1.3b", "2.7b", "6.7b"], "pythia": ["410m", "1b", "1.4b", "2.8b"]}
  for size in sizes.get(family.__name__, []):
    model = transformer.Transformer(family(size))
    params = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    named = float(size[:-1]) * {"m": 1e6, "b": 1e9}[size[-1]]
    assert count == pytest.approx(named, rel=0.03), size


def test_the_first_parameters_are_those_of_gpt2_and_differ_between_layers():
  config = dataclasses.replace(FAMILIES["opt"], num_layers=8, tied_head=False)
  model = transformer.Transformer(config)
  params = jax.jit(model.init)(jax.random.key(0), TOKENS)["params"]
  for path, leaf in jax.tree.leaves_with_path(params):
    name = jax.tree_util.keystr(path)
    if "bias" in name:
      np.testing.assert_array_equal(leaf, 0, err_msg=name)
    elif "scale" in name:
      np.testing.assert_array_equal(leaf, 1, err_msg=name)
    else:
      expected = 0.02 / 4 if "_out" in name else 0.02  # 4 = sqrt(2 * 8)
      error = 4 * expected / math.sqrt(2 * leaf.size)
      assert np.std(leaf) == pytest.approx(expected, abs=error), name
  first, second = params["blocks"]["qkv"]["kernel"][:2]
  assert np.abs(np.corrcoef(np.ravel(first), np.ravel(second))[0, 1]) < 4 / math.sqrt(first.size)


@every_family
def test_the_future_and_other_examples_change_nothing(family):
  _, params = setup(family)
  other = np.array(TOKENS)
  other[0, 7] = (other[0, 7] + 1) % 52
  before, after = (np.asarray(logits_of(family)(params, tokens)) for tokens in (TOKENS, other))
  changed = np.abs(after - before).max(axis=-1) > 1e-3
  np.testing.assert_array_equal(changed[0], np.arange(12) >= 7)
  np.testing.assert_array_equal(after[0, :7], before[0, :7])
  np.testing.assert_array_equal(after[1:], before[1:])


@every_family
def test_order_matters(family):
  """Positions are seen: attention alone takes the tokens before the last as a set."""
  model, params = setup(family)
  one = transformer.Transformer(dataclasses.replace(model.config, num_layers=1))
  params = params | {"blocks": jax.tree.map(lambda leaf: np.asarray(leaf)[:1], params["blocks"])}
  pair = np.tile(TOKENS[:1], (2, 1))
  pair[1, :2] = pair[0, 1::-1]
  first, swapped = np.asarray(jax.jit(one.apply)({"params": params}, pair))[:, -1]
  assert np.abs(first - swapped).max() > 1e-2


def test_normalization_does_not_cancel_where_the_mean_is_large():
  """A shift of the whole residual stream changes nothing, but for rounding."""
  _, params = setup("pythia")
  shifted = params | {"token_embedding": params["token_embedding"] + 100}
  logits, expected = (logits_of("pythia")(p, TOKENS) for p in (shifted, params))
  np.testing.assert_allclose(logits, expected, atol=0.02)


@every_family
def test_padding_on_either_side_changes_neither_losses_nor_gradients(family):
  """Whatever lies there: ids that are none, too."""
  model, params = setup(family)
  rows = TOKENS[:, :7]
  losses = jax.jit(transformer.sequence_losses(model))(params, {"tokens": rows})
  gradients = []
  real, none = np.ones((3, 7), bool), np.zeros((3, 5), bool)
  for junk in (0, 10**6, -100):
    padding = np.full((3, 5), junk, np.int32)
    for order in (slice(None), slice(None, None, -1)):
      tokens = np.concatenate([rows, padding][order], axis=1)
      mask = np.concatenate([real, none][order], axis=1)
      (_, padded), padded_gradient = losses_and_gradient(family)(params, tokens, mask)
      assert_close(padded, losses)
      gradients.append(padded_gradient)
  for gradient in gradients[1:]:
    assert_close(gradient, gradients[0])


def tensor_parallel(path, leaf):
  """Divides heads and the width of the ffn, in all that the blocks have, and the vocabulary."""
  layer, kind = path[-2].key if len(path) > 1 else "", path[-1].key
  axes = {"qkv/kernel": 3, "qkv/bias": 2, "attention_out/kernel": 1}
  axes |= {"ffn_in/kernel": 2, "ffn_in/bias": 1, "ffn_out/kernel": 1}
  axes |= {"/token_embedding": 0, "head/kernel": 1}
  return along("m", axes.get(f"{layer}/{kind}"))


def fully_sharded(path, leaf):
  del path
  even = [axis for axis, size in enumerate(leaf.shape) if size % 2 == 0]
  return along("d", even[0] if even else None)


def along(name, axis):
  return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, name)


@pytest.mark.parametrize("divide", [tensor_parallel, fully_sharded])
def test_sequences_and_parameters_divided_on_a_mesh_give_the_gradient_of_one_device(divide):
  model, params = setup("opt" if divide is fully_sharded else "pythia")
  batch = {"tokens": jnp.resize(TOKENS, (8, 12)), "mask": np.arange(12) < np.arange(4, 12)[:, None]}
  loss_fn = transformer.sequence_losses(model)

  def whole(leaf):
    """FSDP: explicit axes are told where the parameters meet."""
    sharding = jax.typeof(leaf).sharding
    explicit = divide is fully_sharded and AxisType.Explicit in sharding.mesh.axis_types
    return jax.sharding.reshard(leaf, sharding.update(spec=PartitionSpec())) if explicit else leaf

  mean = lambda params, batch: jnp.mean(loss_fn(jax.tree.map(whole, params), batch))
  specs = jax.tree.map_with_path(divide, params), PartitionSpec("d")
  assert_same_on_meshes(jax.value_and_grad(mean), (params, batch), specs, sizes=(2, 4))


@every_family
def test_an_empty_sequence_has_the_loss_0_and_no_gradient(family):
  _, params = setup(family)
  mask, sevens = np.ones((3, 12), bool), np.array(TOKENS)
  sevens[2] = 7
  function = losses_and_gradient(family)
  for empty in (np.zeros(12, bool), np.arange(12) == 4):  # One token alone has no target.
    mask[2] = empty
    (_, losses), gradient = function(params, TOKENS, mask.copy())
    assert losses[2] == 0
    assert np.asarray(losses)[:2].min() > 1
    mask[2] = False
    (_, others), expected = function(params, sevens, mask.copy())
    assert_close((losses, gradient), (others, expected))
  (_, losses), gradient = function(params, TOKENS, np.zeros((3, 12), bool))
  np.testing.assert_array_equal(losses, 0)
  for leaf in jax.tree.leaves(gradient):
    np.testing.assert_array_equal(leaf, 0)


def test_an_unknown_token_makes_its_own_loss_nan_and_no_other():
  _, params = setup("opt")
  for unknown in (52, -1):
    tokens = np.array(TOKENS)
    tokens[1, 3] = unknown
    (_, losses), _ = losses_and_gradient("opt")(params, tokens, np.ones(tokens.shape, bool))
    np.testing.assert_array_equal(np.isnan(losses), [False, True, False])


def test_token_losses_are_cross_entropies_of_the_next_token():
  rng = np.random.default_rng(2)
  logits = rng.normal(size=(2, 5, 8)).astype(np.float32)
  tokens = rng.integers(8, size=(2, 5))
  mask = np.array([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]], bool)
  expected = np.zeros((2, 4))
  for row, t in ((0, 0), (0, 1), (1, 1), (1, 2), (1, 3)):
    z = logits[row, t].astype(float)
    expected[row, t] = np.log(np.exp(z).sum()) - z[tokens[row, t + 1]]
  bad = np.where(mask[:, :, None], logits, np.nan)  # What lies at padding may be anything.

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def function(logits):
    found = transformer.token_losses(logits, jnp.asarray(tokens), jnp.asarray(mask))
    return found[0].sum(), found

  for z in (logits, bad):
    (_, (losses, weights)), gradient = jax.device_get(function(z))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_array_equal(weights, expected > 0)
  assert np.isfinite(gradient).all()
  assert np.abs(gradient[0, 2:]).max() == np.abs(gradient[1, 0]).max() == 0
  unmasked = jax.jit(transformer.token_losses)
  whole, _ = jax.device_get(unmasked(logits, tokens))
  np.testing.assert_allclose(np.where(expected > 0, whole, 0), expected, rtol=1e-5)
  assert whole.min() > 0
  half = jax.eval_shape(unmasked, jnp.asarray(logits, jnp.bfloat16), tokens)
  assert {leaf.dtype for leaf in half} == {jnp.dtype(jnp.float32)}


def test_the_loss_of_a_sequence_is_the_mean_or_the_sum_over_its_targets():
  model, params = setup("opt")
  mask = jnp.arange(12)[None] < jnp.array([12, 9, 4])[:, None]
  batch = {"tokens": TOKENS, "mask": mask}

  @jax.jit
  def everything():
    logits = model.apply({"params": params}, TOKENS, mask)
    reduced = (transformer.sequence_losses(model, name)(params, batch) for name in ("sum", "mean"))
    return transformer.token_losses(logits, TOKENS, mask), *reduced

  (losses, weights), total, mean = jax.device_get(everything())
  np.testing.assert_array_equal(weights.sum(1), [11, 8, 3])
  np.testing.assert_allclose(total, losses.sum(1), rtol=1e-5)
  np.testing.assert_allclose(mean, losses.sum(1) / weights.sum(1), rtol=1e-5)
  with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum', got 'max'"):
    transformer.sequence_losses(model, "max")


def unrolled(model, params, tokens):
  """The model as a Python loop over its blocks, for learned positions and a tied head."""
  config = model.config
  positions = config.position_offset + np.arange(tokens.shape[1])
  x = params["token_embedding"][tokens] + params["position_embedding"][positions][None]
  for i in range(config.num_layers):
    layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
    x, _ = transformer.Block(config).apply({"params": layer}, x, None, None)
  x = nn.LayerNorm(config.epsilon).apply({"params": params["final_norm"]}, x)
  return x @ params["token_embedding"].T


def test_the_scan_is_a_loop_over_blocks_unrolled_or_not():
  model, params = setup("opt")
  expected = jax.jit(functools.partial(unrolled, model))(params, TOKENS)
  scanned = transformer.Transformer(dataclasses.replace(model.config, unroll=3))
  assert model.config.unroll == 1
  for logits in (
    logits_of("opt")(params, TOKENS),
    jax.jit(scanned.apply)({"params": params}, TOKENS),
  ):
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_remat_changes_no_number_but_costs_a_forward_pass_and_saves_memory():
  model, params = setup("pythia")
  mask = jnp.ones(TOKENS.shape, bool).at[0, :4].set(False)
  results, flops, num_bytes = [], [], []
  for remat in (False, True):
    config = dataclasses.replace(model.config, remat=remat)
    loss_fn = transformer.sequence_losses(transformer.Transformer(config))
    mean = lambda p, loss_fn=loss_fn: jnp.mean(loss_fn(p, {"tokens": TOKENS, "mask": mask}))
    step = jax.jit(jax.value_and_grad(mean))
    compiled = step.lower(params).compile()
    results.append(compiled(params))
    flops.append(measure.count_flops(step, params))
    num_bytes.append(measure.temporary_bytes(compiled))
  assert_close(*results)
  assert 1.15 < flops[1] / flops[0] < 4 / 3  # The head is not computed again.
  assert num_bytes[1] < 0.7 * num_bytes[0]


def test_float16_is_refused_on_a_cpu():
  model, params = setup("opt")
  half = transformer.Transformer(dataclasses.replace(model.config, dtype=jnp.float16))
  with pytest.raises(ValueError, match="dtype must not be float16 on a CPU"):
    jax.eval_shape(half.apply, {"params": params}, TOKENS)


def test_remat_by_the_name_of_a_policy_keeps_what_the_policy_says():
  model, params = setup("opt")
  flops = {}
  for remat in (True, "nothing_saveable", "dots_with_no_batch_dims_saveable"):
    config = dataclasses.replace(model.config, remat=remat)
    loss_fn = transformer.sequence_losses(transformer.Transformer(config))
    mean = lambda p, loss_fn=loss_fn: jnp.mean(loss_fn(p, {"tokens": TOKENS}))
    flops[remat] = measure.count_flops(jax.grad(mean), params)
  assert flops["nothing_saveable"] == flops[True]
  assert flops["dots_with_no_batch_dims_saveable"] < 0.9 * flops[True]


def equations(jaxpr):
  for eqn in jaxpr.eqns:
    yield eqn
    for inner in measure.sub_jaxprs(eqn.params):
      yield from equations(inner)


@every_family
def test_bfloat16_products_with_parameters_logits_and_sums_over_tokens_in_float32(family):
  model, params = setup(family)
  config = dataclasses.replace(model.config, dtype=jnp.bfloat16)
  half = transformer.Transformer(config)
  made = jax.eval_shape(half.init, jax.random.key(0), TOKENS)
  assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {jnp.dtype(jnp.float32)}
  logits, exact = jax.jit(half.apply)({"params": params}, TOKENS), logits_of(family)(params, TOKENS)
  assert logits.dtype == exact.dtype == jnp.float32
  error = np.linalg.norm(logits - exact) / np.linalg.norm(exact)
  assert 1e-4 < error < 0.05  # bfloat16 rounds by up to 0.004
  loss_fn = transformer.sequence_losses(half)
  gradient = jax.grad(lambda params: loss_fn(params, {"tokens": TOKENS}).mean())
  dtypes = {}
  for eqn in equations(jax.make_jaxpr(gradient)(params).jaxpr):
    operands = {var.aval.dtype.name for var in eqn.invars if var.aval.dtype != jnp.int32}
    dtypes.setdefault(eqn.primitive.name, set()).update(operands)
  assert "bfloat16" in dtypes["dot_general"]
  assert dtypes["scatter-add"] == {"float32"}  # hundreds of equal tokens would stall in bfloat16
  assert dtypes["reduce_max"] == {"float32"}  # those of softmax


@every_family
def test_training_lowers_for_accelerators(family):
  model, params = setup(family)
  config = dataclasses.replace(model.config, dtype=jnp.bfloat16, remat=True)
  loss_fn = transformer.sequence_losses(transformer.Transformer(config))
  mean = lambda params, batch: jnp.mean(loss_fn(params, batch))
  batch = {"tokens": TOKENS, "mask": jnp.ones(TOKENS.shape, bool)}
  traced = jax.jit(jax.grad(mean)).trace(params, batch)
  for platform in ("cuda", "tpu"):
    assert "stablehlo.while" in traced.lower(lowering_platforms=(platform,)).as_text(), platform


def test_gradients_reweighted_by_jaxbo_are_weighted_sums():
  model, params = setup("opt")
  mask = jnp.ones(TOKENS.shape, bool).at[1, 5:].set(False)
  loss_fn = transformer.sequence_losses(model)
  tx = jaxbo.reweight(jaxbo.dro.kl(0.5))

  @jax.jit
  def robust(params):
    grads = jaxbo.per_example_grad(loss_fn)(params, {"tokens": TOKENS, "mask": mask})
    return grads.losses, tx.update(grads, tx.init(params), params)[0]

  losses, updates = jax.device_get(robust(params))
  weights = np.exp(2 * (losses - losses.max()))
  function = losses_and_gradient("opt")
  assert_close(updates, function(params, TOKENS, mask, weights / weights.sum())[1])
  assert np.ptp(weights) > 0.1


def test_a_sequence_without_a_target_does_not_count_by_itself():
  """A batch that is filled up with padding gives the gradient of its real rows."""
  model, params = setup("opt")
  mask = (
    jnp.ones(TOKENS.shape, bool).at[-1].set(False).at[0, 1:].set(False)
  )  # One token: no target.
  loss_fn = transformer.sequence_losses(model)
  assert loss_fn.example_mask({"tokens": TOKENS, "mask": mask}).tolist() == (
    [False] + [True] * (len(TOKENS) - 2) + [False]
  )
  assert loss_fn.example_mask({"tokens": TOKENS}).all()
  tx = jaxbo.reweight(jaxbo.dro.kl(0.5))

  @jax.jit
  def robust(tokens, mask):
    grads = jaxbo.per_example_grad(loss_fn)(params, {"tokens": tokens, "mask": mask})
    updates, state = tx.update(grads, tx.init(params), params)
    return updates, state.info.num_valid

  updates, num_valid = robust(TOKENS, mask)
  expected, right = robust(TOKENS[1:-1], mask[1:-1])
  assert num_valid == right == len(TOKENS) - 2
  assert_close(updates, expected)


def test_a_small_model_learns_its_batch_by_heart():
  model, params = setup("opt")
  loss_fn = transformer.sequence_losses(model)
  optimizer = optax.adam(3e-3)

  @jax.jit
  def train(params):
    def step(carry, _):
      params, state = carry
      mean = lambda params: jnp.mean(loss_fn(params, {"tokens": TOKENS}))
      loss, gradient = jax.value_and_grad(mean)(params)
      updates, state = optimizer.update(gradient, state, params)
      return (optax.apply_updates(params, updates), state), loss

    return jax.lax.scan(step, (params, optimizer.init(params)), length=60)[1]

  losses = train(params)
  assert losses[0] > math.log(52)
  assert losses[-1] < 0.05


@cases(
  "changes, message",
  [
    ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
    ({"ffn_width": 0}, "ffn_width must be at least 1, got 0"),
    ({"width": 30}, "width must be a multiple of num_heads, got 30 and 4"),
    ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads, got 3 and 4"),
    ({"norm": "batch"}, "norm must be one of .*'rms'.*, got 'batch'"),
    ({"remat": "dots"}, "remat must be one of .*'dots_saveable'.*, got 'dots'"),
    ({"unrotated_layers": (3,)}, r"unrotated_layers must be in \[0, num_layers = 3\), got \(3,\)"),
    ({"window": 0}, "window must be at least 1, got 0"),
    ({"activation": "swish"}, "activation must be one of .*'gelu_tanh'.*, got 'swish'"),
    ({"attention": "flash"}, "attention must be one of .*'cudnn'.*, got 'flash'"),
    ({"rotary_fraction": 1.5}, r"rotary_fraction must be in \[0, 1\], got 1.5"),
    ({"rotary_fraction": 0.4}, "an even number of each head's dimensions, .* got 0.4 of 8"),
    ({"rotary_fraction": 0.1}, "an even number of each head's dimensions, .* got 0.1 of 8"),
    ({"position_offset": -1}, "position_offset must not be negative, got -1"),
    ({"unroll": 4}, r"unroll must be in \[1, num_layers = 3\], got 4"),
    ({"dtype": jnp.int32}, "dtype must be a floating-point type, got .*int32"),
  ],
)
def test_fields_out_of_range_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    transformer.TransformerConfig(**(SMALL | changes))


@cases("family", [transformer.gpt2, transformer.opt, transformer.pythia])
def test_unknown_sizes_are_refused(family):
  with pytest.raises(ValueError, match=r"size must be one of \[.*\], got '350m'"):
    family("350m")


@cases(
  "tokens, mask, message",
  [
    (jnp.zeros(12, jnp.int32), None, r"tokens must be integers \[batch, length\], got int32"),
    (jnp.zeros((3, 12)), None, r"tokens must be integers \[batch, length\], got float32"),
    (jnp.zeros((3, 17), jnp.int32), None, r"at most max_length = 16 long, got the shape \(3, 17\)"),
    (TOKENS, jnp.ones((3, 12)), r"mask must be bool .* \(3, 12\), got float32"),
    (TOKENS, jnp.ones((3, 11), bool), r"mask must be bool .* \(3, 12\), got bool .*\(3, 11\)"),
  ],
)
def test_bad_tokens_and_masks_are_refused(tokens, mask, message):
  model, params = setup("opt")
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(model.apply, {"params": params}, tokens, mask)
