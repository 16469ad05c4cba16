"""The captioner: sizes, its equations, its published neighbours, masks, dtypes, errors."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxbo_models import captioner

from benchmarks import measure
from tests.cases import cases
from tests.models import captioner_oracle as oracle
from tests.models.captioner_setup import FEATURES, SMALL, TOKENS, batch, draw_params, make

pytestmark = pytest.mark.slow

UP_DOWN = {"decoder_word": False}
ATT2IN = {
  "guide": "none",
  "attention_query": "hidden",
  "candidate": "maxout",
  "context_gates": "candidate",
}
ATT2ALL = ATT2IN | {"context_gates": "all"}
CELL_MASK = np.array([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 1]], bool)
TOKEN_MASK = np.arange(6)[None] < np.array([6, 4, 3])[:, None]


def count(shapes):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@functools.cache
def setup():
  model = make()
  return model, draw_params(model), jax.jit(model.apply, static_argnames="train")


@pytest.mark.parametrize(
  "flags, expected",
  [({}, 20_741_905), ({"guide": "none", "attention_query": "hidden"}, 14_447_889)],
)
def test_sizes_are_those_of_the_specification(flags, expected):
  model = captioner.GuidedCaptioner(vocab_size=9488, **flags)
  features = jax.ShapeDtypeStruct((2, 196, 2048), jnp.float32)
  tokens = jax.ShapeDtypeStruct((2, 17), jnp.int32)
  variables = jax.eval_shape(model.init, jax.random.key(0), features, tokens)
  assert set(variables) == {"params"}
  assert count(variables) == expected
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
  parts = {name: count(part) for name, part in variables["params"].items()}
  assert parts["embedding"] == 9488 * 512
  assert parts["output_kernel"] + parts["output_bias"] == 513 * 9488
  assert parts["cells"] == 2049 * 512
  assert parts["keys"] + parts["attention"] == 2 * 512 * 512 + 3 * 512 + 1
  if not flags:
    assert parts["pooled"] == parts["cells"]
    assert parts["guide_lstm"] == parts["decoder_lstm"] == 4 * 512 * (1536 + 512 + 1)


@pytest.mark.parametrize(
  "flags",
  [
    {},
    {"attention_query": "hidden_word", "init_state": "pooled", "unroll": 3},
    {"attention_query": "hidden", "guide_pooled": False, "guide_scale": 0.7, "remat": True},
    {"guide": "static", "init_state": "pooled", "candidate": "maxout", "guide_scale": 0.7},
    {"guide": "static", "context_gates": "candidate", "attention_query": "hidden_word"},
    {"guide": "none", "attention_query": "hidden_word"},
    UP_DOWN | {"context_gates": "candidate", "candidate": "maxout"},
  ],
  ids=str,
)
def test_numbers_are_those_of_a_loop_in_numpy(flags, x64):
  model = make(dtype=jnp.float64, **flags)
  params = draw_params(model, dtype=np.float64)
  output = jax.jit(model.apply)(
    {"params": params}, FEATURES, TOKENS, None, cell_mask=jnp.asarray(CELL_MASK)
  )
  logits, attention, guide = oracle.captioner(
    model, jax.tree.map(np.asarray, params), FEATURES, TOKENS, CELL_MASK
  )
  assert output.logits.dtype == np.float64
  np.testing.assert_allclose(output.logits, logits, rtol=1e-9, atol=1e-12)
  np.testing.assert_allclose(output.attention, attention, rtol=1e-9, atol=1e-12)
  if model.guide == "none":
    assert output.guide is None
  else:
    np.testing.assert_allclose(output.guide, guide, rtol=1e-9, atol=1e-12)


def torch_parameters(shapes, seed=5):
  """Normal weights and biases of ``torch.nn.Linear``s, given (outputs, inputs)."""
  rng = np.random.default_rng(seed)
  return {
    name: {"weight": rng.normal(0, 0.5, shape), "bias": rng.normal(0, 0.5, shape[0])}
    for name, shape in shapes.items()
  }


def ours(p, query=6):
  """What all three cells share, in our names."""
  return {
    "query": p["h2att"]["weight"].T,
    "bias": p["h2att"]["bias"],
    "score": p["alpha_net"]["weight"][0],
    "score_bias": p["alpha_net"]["bias"],
  }


def run_neighbour(model, params, parts):
  """The model's logits, and what a neighbour starts from: words, cells, keys, pooled features."""
  params = draw_params(model, dtype=np.float64) | params
  logits = jax.jit(model.apply)({"params": params}, FEATURES, TOKENS).logits
  words = oracle.relu(np.asarray(params["embedding"])[TOKENS])
  cells = oracle.relu(oracle.dense(params["cells"], FEATURES))
  keys = oracle.dense(params["keys"], cells)
  pooled = (
    oracle.relu(oracle.dense(params["pooled"], FEATURES.mean(1))) if "pooled" in params else 0
  )
  head = lambda h: h @ np.asarray(params["output_kernel"]) + np.asarray(params["output_bias"])
  return logits, words, cells, keys, pooled, head


@pytest.mark.parametrize("flags, cell", [(ATT2IN, "att2in2"), (ATT2ALL, "att2all2")])
def test_without_a_guide_and_with_maxout_it_is_att2in_or_att2all(flags, cell, x64):
  context = "a2c" if cell == "att2in2" else "a2h"
  shapes = {"i2h": (30, 5), "h2h": (30, 6), "h2att": (4, 6), "alpha_net": (1, 4)}
  p = torch_parameters(shapes | {context: (12 if cell == "att2in2" else 30, 6)})
  bias = p["i2h"]["bias"] + p["h2h"]["bias"]
  bias[-len(p[context]["bias"]) :] += p[context]["bias"]
  # Their gates are input, forget, output and two candidates: ours, too.
  decoder = {
    "word": p["i2h"]["weight"].T,
    "recurrent": p["h2h"]["weight"].T,
    "context": p[context]["weight"].T,
    "bias": bias,
  }
  model = make(dtype=jnp.float64, **flags)
  params = {"decoder_lstm": decoder, "attention": ours(p)}
  logits, words, cells, keys, _, head = run_neighbour(model, params, p)
  h = c = np.zeros((3, 6))
  for t in range(6):
    h, c = getattr(oracle, cell)(p, words[:, t], cells, keys, h, c)
    np.testing.assert_allclose(logits[:, t], head(h), rtol=1e-9, atol=1e-12)


def test_a_decoder_that_reads_no_words_is_up_down(x64):
  p = torch_parameters({"h2att": (4, 6), "alpha_net": (1, 4)})
  rng = np.random.default_rng(6)
  for name, inputs in (("att_lstm", 6 + 6 + 5), ("lang_lstm", 6 + 6)):
    shapes = {"weight_ih": (24, inputs), "weight_hh": (24, 6), "bias_ih": 24, "bias_hh": 24}
    p[name] = {key: rng.normal(0, 0.5, shape) for key, shape in shapes.items()}

  def convert(name, slices):
    # torch's gates are input, forget, cell, output; ours end with the candidate.
    order = np.concatenate([np.arange(12), np.arange(18, 24), np.arange(12, 18)])
    weights = {key: value[order] for key, value in p[name].items()}
    made = {key: weights["weight_ih"][:, part].T for key, part in slices.items()}
    bias = weights["bias_ih"] + weights["bias_hh"]
    return made | {"recurrent": weights["weight_hh"].T, "bias": bias}

  guide = {"hidden": slice(0, 6), "pooled": slice(6, 12), "word": slice(12, 17)}
  params = {
    "guide_lstm": convert("att_lstm", guide),
    "decoder_lstm": convert("lang_lstm", {"context": slice(0, 6), "guide": slice(6, 12)}),
    "attention": ours(p),
  }
  model = make(dtype=jnp.float64, **UP_DOWN)
  logits, words, cells, keys, pooled, head = run_neighbour(model, params, p)
  state = ((np.zeros((3, 6)),) * 2,) * 2
  for t in range(6):
    state = oracle.up_down(p, words[:, t], pooled, cells, keys, state)
    np.testing.assert_allclose(logits[:, t], head(state[1][0]), rtol=1e-9, atol=1e-12)


def test_a_static_guide_depends_on_the_image_alone_and_a_sequential_one_on_the_words():
  for guide, expected in (("static", False), ("sequential", True)):
    model = make(guide=guide)
    params = draw_params(model)

    def energy(table, tokens, model=model, params=params):
      variables = {"params": params | {"embedding": table}}
      guide = model.apply(variables, batch()["features"], tokens).guide
      return jnp.square(guide).sum(), guide

    run = jax.jit(jax.grad(energy, has_aux=True))
    by_words, before = jax.device_get(run(params["embedding"], TOKENS))
    assert (np.abs(by_words).max() > 1e-3) == expected
    _, after = jax.device_get(run(params["embedding"], TOKENS[:, ::-1]))
    assert (np.abs(before - after).max() > 1e-3) == expected
    constant = np.abs(before - before[:, :1]).max() < 1e-6
    assert constant == (not expected)
    assert np.abs(before[0] - before[1]).max() > 1e-3


def test_a_muted_guide_has_no_influence_and_leaves_the_plain_decoder():
  model = make(guide_scale=0.0, attention_query="hidden")
  params = draw_params(model)
  plain = make(guide="none", attention_query="hidden")
  decoder = {k: v for k, v in params["decoder_lstm"].items() if k != "guide"}
  without = {k: v for k, v in params.items() if k not in ("guide_lstm", "pooled")}
  without["decoder_lstm"] = decoder
  logits = lambda model, params: model.apply({"params": params}, **batch()).logits

  @jax.jit
  def both(params, without):
    loss = lambda params: jnp.square(logits(model, params)).sum()
    return logits(model, params), logits(plain, without), jax.grad(loss)(params)

  muted, expected, gradient = both(params, without)
  np.testing.assert_allclose(muted, expected, rtol=1e-5, atol=1e-5)
  for leaf in jax.tree.leaves([gradient["guide_lstm"], gradient["decoder_lstm"]["guide"]]):
    np.testing.assert_array_equal(leaf, 0)
  assert np.abs(gradient["decoder_lstm"]["word"]).max() > 1e-3


def test_nothing_is_seen_of_later_words_other_captions_absent_cells_or_padding():
  _, params, apply = setup()
  features = jnp.asarray(FEATURES, jnp.float32)
  mask, cell_mask = jnp.asarray(TOKEN_MASK), jnp.asarray(CELL_MASK)
  run = lambda features, tokens, cell_mask=cell_mask: jax.device_get(
    apply({"params": params}, features, jnp.asarray(tokens), mask, cell_mask=cell_mask)
  )
  before = run(features, TOKENS)
  changed = TOKENS.copy()
  changed[0, 3] = (changed[0, 3] + 1) % 11
  after = run(features, changed)
  moved = np.abs(after.logits - before.logits).max(-1) > 1e-6
  np.testing.assert_array_equal(moved[0], np.arange(6) >= 3)
  assert not moved[1:].any()
  padded = np.where(TOKEN_MASK, TOKENS, 10**6)
  junk = np.where(CELL_MASK[:, :, None], features, np.nan)
  for output in (run(features, padded), run(junk, padded)):
    for new, old in zip(output[:3], before[:3], strict=True):
      kept = TOKEN_MASK[:, :, None]
      np.testing.assert_array_equal(np.where(kept, new, 0), np.where(kept, old, 0))
  np.testing.assert_array_equal(np.where(CELL_MASK[:, None], 0, before.attention), 0)
  np.testing.assert_allclose(before.attention.sum(-1), 1, rtol=1e-5)
  # Absent cells are as if they had been left out.
  row = apply({"params": params}, np.asarray(features)[1:2, [0, 2]], TOKENS[1:2])
  np.testing.assert_allclose(row.logits[0, :4], before.logits[1, :4], rtol=1e-4, atol=1e-5)
  blind = run(features, TOKENS, jnp.zeros((3, 4), bool))
  assert np.isfinite(blind.logits).all()
  np.testing.assert_array_equal(blind.attention, 0)


def test_an_unknown_token_makes_its_own_caption_nan_from_there_on():
  _, params, apply = setup()
  for unknown in (11, -1):
    tokens = TOKENS.copy()
    tokens[1, 3] = unknown
    output = apply({"params": params}, jnp.asarray(FEATURES, jnp.float32), tokens)
    bad = np.isnan(output.logits).any(-1)
    np.testing.assert_array_equal(bad, np.outer([0, 1, 0], np.arange(6) >= 3).astype(bool))


def test_vmap_over_parameters_is_a_loop_over_them():
  model, _, apply = setup()
  seeds = [draw_params(model, seed=seed) for seed in (3, 4)]
  stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *seeds)
  features, tokens = jnp.asarray(FEATURES, jnp.float32), jnp.asarray(TOKENS)
  run = lambda params: model.apply({"params": params}, features, tokens).logits
  for params, logits in zip(seeds, jax.jit(jax.vmap(run))(stacked), strict=True):
    expected = apply({"params": params}, features, tokens).logits
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def equations(jaxpr):
  for eqn in jaxpr.eqns:
    yield eqn
    for inner in measure.sub_jaxprs(eqn.params):
      yield from equations(inner)


def test_one_scan_over_words_and_the_logits_after_it():
  model, params, _ = setup()
  run = lambda params: model.apply({"params": params}, **batch()).logits
  traced = list(equations(jax.make_jaxpr(run)(params).jaxpr))
  scans = [eqn for eqn in traced if eqn.primitive.name == "scan"]
  assert [eqn.params["length"] for eqn in scans] == [6]
  inside = [
    e for e in equations(scans[0].params["jaxpr"].jaxpr) if e.primitive.name == "dot_general"
  ]
  assert {e.outvars[0].aval.shape[-1] for e in inside}.isdisjoint({SMALL["vocab_size"]})
  heads = [
    eqn.outvars[0].aval.shape
    for eqn in traced
    if eqn.primitive.name == "dot_general" and eqn.outvars[0].aval.shape[-1] == 11
  ]
  assert heads == [(3, 6, 11)]
  # No kernel of words, and no keys of cells, within the scan.
  operands = {e.invars[1].aval.shape for e in inside}
  assert (5, 24) not in operands
  assert (6, 4) in operands  # the query's


def test_bfloat16_products_and_float32_cells_softmax_and_logits():
  _, params, apply = setup()
  half = make(dtype=jnp.bfloat16)
  arguments = {"params": params}, jnp.asarray(FEATURES, jnp.float32), jnp.asarray(TOKENS)
  exact, output = apply(*arguments), jax.jit(half.apply)(*arguments)
  assert output.logits.dtype == output.attention.dtype == jnp.float32
  error = np.linalg.norm(output.logits - exact.logits) / np.linalg.norm(exact.logits)
  assert 1e-4 < error < 0.05
  made = jax.eval_shape(half.init, jax.random.key(0), *arguments[1:])
  assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {jnp.dtype(jnp.float32)}
  loss = lambda params: jnp.square(half.apply({"params": params}, *arguments[1:]).logits).sum()
  traced = list(equations(jax.make_jaxpr(jax.grad(loss))(params).jaxpr))
  dtypes = {}
  for eqn in traced:
    names = {v.aval.dtype.name for v in eqn.invars if jnp.issubdtype(v.aval.dtype, jnp.floating)}
    dtypes.setdefault(eqn.primitive.name, set()).update(names)
  assert "bfloat16" in dtypes["dot_general"]
  assert dtypes["scatter-add"] == {"float32"}
  assert dtypes["exp"] == dtypes["logistic"] == {"float32"}
  encoded = jax.eval_shape(
    functools.partial(half.apply, method="encode"), {"params": params}, arguments[1]
  )
  state = jax.eval_shape(
    functools.partial(half.apply, method="initial_state"), {"params": params}, encoded
  )
  assert [leaf.dtype.name for leaf in state] == ["bfloat16", "float32"] * 2


def test_training_lowers_for_accelerators():
  _, params, _ = setup()
  half = make(dtype=jnp.bfloat16, remat=True)
  loss = lambda params: jnp.square(half.apply({"params": params}, **batch()).logits).sum()
  traced = jax.jit(jax.grad(loss)).trace(params)
  for platform in ("cuda", "tpu"):
    assert "module" in traced.lower(lowering_platforms=(platform,)).as_text(), platform


def test_dropout_needs_training_and_its_key_alone_decides():
  model = make(dropout=0.5)
  params = draw_params(model)

  @functools.partial(jax.jit, static_argnums=2)
  def run(params, seed, train):
    rngs = {"dropout": jax.random.key(seed)}
    return model.apply({"params": params}, **batch(), train=train, rngs=rngs).logits

  first, again, other = (np.asarray(run(params, seed, True)) for seed in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  assert np.abs(first - other).max() > 1e-3
  still = setup()[2]({"params": params}, *batch().values()).logits
  np.testing.assert_allclose(run(params, 0, False), still, rtol=1e-5, atol=1e-5)
  # Half of what the logits are made of is dropped, and the rest doubled.
  identity = params | {"output_kernel": np.eye(6, 11, dtype="f"), "output_bias": np.zeros(11, "f")}
  hidden = [np.asarray(run(identity, seed, True))[:, :, :6] for seed in range(20)]
  share = np.mean(np.stack(hidden) == 0)
  assert abs(share - 0.5) < 4 * 0.5 / math.sqrt(20 * 3 * 6 * 6)


def test_scheduled_sampling_reads_given_words_at_rate_0_and_its_own_at_rate_1():
  model, params, apply = setup()
  sharp = params | {"output_kernel": 1e4 * params["output_kernel"]}  # Draws are then the maxima.
  arguments = {"params": sharp}, jnp.asarray(FEATURES, jnp.float32), jnp.asarray(TOKENS)

  @jax.jit
  def run(rate, key):
    return model.apply(*arguments, sampling_rate=rate, rngs={"sampling": key}).logits

  np.testing.assert_allclose(
    run(0.0, jax.random.key(0)), apply(*arguments).logits, rtol=1e-4, atol=0.1
  )
  logits = run(1.0, jax.random.key(0))
  drawn = np.concatenate([TOKENS[:, :1], np.argmax(logits, -1)[:, :-1]], axis=1)
  assert (drawn != TOKENS).mean() > 0.5
  read = apply({"params": sharp}, arguments[1], jnp.asarray(drawn, jnp.int32)).logits
  np.testing.assert_allclose(logits, read, rtol=1e-3, atol=1)
  first, other = (np.asarray(run(0.5, jax.random.key(seed))) for seed in (1, 2))
  np.testing.assert_array_equal(first[:, 0], other[:, 0])
  assert np.abs(first - other).max() > 1


def test_attributes_are_scored_by_the_largest_guiding_vectors_that_are_there():
  model = make(num_attributes=3)
  params = draw_params(model)
  run = jax.jit(lambda mask: model.apply({"params": params}, **batch(), mask=mask))
  output = run(jnp.asarray(TOKEN_MASK))
  largest = np.where(TOKEN_MASK[:, :, None], output.guide, -np.inf).max(1)
  expected = oracle.dense(params["attributes"], largest)
  np.testing.assert_allclose(output.attribute_scores, expected, rtol=1e-5)
  empty = run(jnp.zeros(TOKENS.shape, bool)).attribute_scores
  np.testing.assert_allclose(empty, np.tile(params["attributes"]["bias"], (3, 1)), rtol=1e-6)


@cases(
  "flags, message",
  [
    ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
    ({"unroll": 0}, "unroll must be at least 1, got 0"),
    ({"guide": "dynamic"}, r"guide must be one of \('sequential', .*\), got 'dynamic'"),
    ({"attention_query": "word"}, "attention_query must be one of .*, got 'word'"),
    ({"context_gates": "none"}, "context_gates must be one of .*, got 'none'"),
    ({"candidate": "relu"}, "candidate must be one of .*, got 'relu'"),
    ({"init_state": "mean"}, "init_state must be one of .*, got 'mean'"),
    ({"num_attributes": -1}, "num_attributes must not be negative, got -1"),
    ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ({"dtype": jnp.int32}, "dtype must be a floating-point type, got .*int32"),
    ({"guide": "none"}, "attention_query must be 'hidden' or 'hidden_word' with guide='none'"),
    (
      {"guide": "none", "attention_query": "hidden", "num_attributes": 2},
      "num_attributes must be 0 with guide='none', got 2",
    ),
    ({"guide": "static", "decoder_word": False}, "decoder_word=False needs .*, got 'static'"),
  ],
)
def test_flags_out_of_range_are_refused(flags, message):
  with pytest.raises(ValueError, match=message):
    make(**flags)


@cases(
  "changes, message",
  [
    ({"tokens": jnp.zeros(6, jnp.int32)}, r"tokens must be integers \[batch, length\], got int32"),
    ({"tokens": jnp.zeros((3, 6))}, r"tokens must be integers \[batch, length\], got float32"),
    (
      {"tokens": jnp.zeros((3, 0), jnp.int32)},
      r"a first token in each caption, got the shape \(3, 0\)",
    ),
    ({"mask": jnp.ones((3, 6))}, r"mask must be bool, .*\(3, 6\), got float32"),
    ({"mask": jnp.ones((3, 5), bool)}, r"mask must be bool, .*\(3, 6\), got bool .*\(3, 5\)"),
    ({"features": jnp.zeros((3, 7))}, r"features must be floats \[batch, num_cells, 7\], got"),
    ({"features": jnp.zeros((3, 4, 7), jnp.int32)}, "features must be floats .* got int32"),
    ({"features": jnp.zeros((3, 8, 8, 3))}, "images need an encoder"),
    ({"features": jnp.zeros((3, 0, 7))}, "with at least one cell"),
    ({"features": jnp.zeros((3, 4, 8))}, r"num_cells, 7\] as the parameters were made for, got"),
    ({"cell_mask": jnp.ones((3, 4))}, r"cell_mask must be bool, .*\(3, 4\), got float32"),
    ({"cell_mask": jnp.ones((3, 5), bool)}, r"cell_mask must be bool, .*got bool .*\(3, 5\)"),
  ],
)
def test_arrays_of_another_kind_are_refused(changes, message):
  model, params, _ = setup()
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(functools.partial(model.apply, {"params": params}), **(batch() | changes))


@pytest.mark.parametrize(
  "tokens, mask, message",
  [
    (
      [[1, 5, 2], [1, 11, 2]],
      None,
      r"in \[0, vocab_size = 11\), got 11 in caption 1 at position 1",
    ),
    ([[1, 5, -3]], None, "got -3 in caption 0 at position 2"),
    ([[1, 5, 2], [1, 5, 2]], [[1, 1, 1], [1, 0, 0]], "got an empty caption 1"),
    ([[1, 5, 2]], [[0, 0, 0]], "got an empty caption 0"),
    ([[1]], None, "got an empty caption 0"),
    ([[1, 5, 2], [1, 5, 2]], [[1, 1, 1], [0, 1, 1]], "padding at the end, got caption 1"),
    ([[1.0, 2.0]], None, r"tokens must be integers \[batch, length\], got float64"),
    ([[1, 2]], [[1, 1, 1]], r"mask must be bool, .* \(1, 2\), got bool of shape \(1, 3\)"),
  ],
)
def test_captions_that_a_loss_is_silent_about_are_found(tokens, mask, message):
  mask = None if mask is None else np.array(mask, bool)
  with pytest.raises(ValueError, match=message):
    captioner.check_captions(np.array(tokens), mask, vocab_size=11)
  junk = np.array([[1, 5, 99]])
  captioner.check_captions(junk, np.array([[True, True, False]]), vocab_size=11)


def test_a_checkpoint_of_another_configuration_is_refused():
  model, params, _ = setup()
  features, tokens = batch().values()
  captioner.check_params(model, params, features, tokens)
  names = {
    "'guide_lstm'.*'bias'.* must be none, got \\(24,\\)": make(guide="static"),
    "'attention'.*'query'.* must be \\(11, 4\\) of float32": make(attention_query="hidden_word"),
    "'initial'": make(init_state="pooled"),
    "'embedding'.* must be \\(12, 5\\) of float32, got \\(11, 5\\)": make(vocab_size=12),
    "'guide_lstm'.*'pooled'.* must be none, got \\(6, 24\\)": make(guide_pooled=False),
  }
  for message, other in names.items():
    with pytest.raises(
      ValueError, match=f"params must be those of this configuration: .*{message}"
    ):
      captioner.check_params(other, params, features, tokens)
  half = params | {"output_bias": params["output_bias"].astype(jnp.bfloat16)}
  with pytest.raises(ValueError, match=r"'output_bias'.* of float32, got .* of bfloat16"):
    captioner.check_params(model, half, features, tokens)
