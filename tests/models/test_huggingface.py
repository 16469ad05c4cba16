"""Loaded models have the logits of transformers and PyTorch; what cannot be loaded is refused.

``make_golden.py`` made the models and their logits.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxbo_models import transformer
from jaxbo_models.transformer import families
from safetensors import flax as safetensors

from tests.cases import cases

pytestmark = pytest.mark.slow  # All together, not each.

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ("gpt2", "opt", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "smollm3")
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def golden():
  with np.load(GOLDEN / "logits.npz") as arrays:
    return dict(arrays)


def error(golden, family, model, params):
  """The largest error of a logit that is not at padding."""
  tokens, mask = jnp.asarray(golden["tokens"]), jnp.asarray(golden["mask"])
  logits = jax.jit(model.apply)({"params": params}, tokens, mask)
  return np.abs(logits - golden[family])[golden["mask"]].max()


@every_family
def test_logits_are_those_of_pytorch(golden, family):
  model, params = transformer.from_safetensors(GOLDEN / family)
  assert np.abs(golden[family]).max() > 3
  assert error(golden, family, model, params) < 1e-4
  made = jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(golden["tokens"]))["params"]
  shape_and_dtype = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), tree)
  assert shape_and_dtype(params) == shape_and_dtype(made)


@pytest.mark.parametrize(
  "family, changes",
  [
    ("gpt2", {"activation": "gelu"}),
    ("gpt2", {"epsilon": 1e-3}),
    ("opt", {"activation": "gelu_tanh"}),
    ("gpt_neox", {"activation": "gelu_tanh"}),
    ("gpt_neox", {"parallel_residual": False}),
    ("gpt_neox", {"rotary_fraction": 1.0}),
    ("gpt_neox", {"rotary_base": 1000.0}),
    ("llama", {"rotary_scaling": None}),
    ("mistral", {"window": 4}),
    ("mistral", {"rotary_scaling": transformer.LinearScaling(1.5)}),
    ("qwen2", {"full_attention_layers": ()}),
    ("qwen2", {"rotary_scaling": transformer.YarnScaling(4.0, 16, 1.0)}),
    ("qwen3", {"activation": "gelu"}),
    ("smollm3", {"unrotated_layers": ()}),
  ],
)
def test_the_logits_tell_the_variants_apart(golden, family, changes):
  """So that what is compared above is not blind to them."""
  model, params = transformer.from_safetensors(GOLDEN / family)
  changed = transformer.Transformer(dataclasses.replace(model.config, **changes))
  assert error(golden, family, changed, params) > 3e-4


def test_overrides_say_how_to_compute(golden):
  model, params = transformer.from_safetensors(GOLDEN / "opt", dtype=jnp.bfloat16, remat=True)
  assert (model.config.dtype, model.config.remat) == (jnp.bfloat16, True)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
  assert 1e-3 < error(golden, "opt", model, params) < 1


@pytest.fixture
def copy(tmp_path):
  """A function that copies a model as one file, with changed settings and tensors."""

  def copied(family, settings=None, change=lambda tensors: tensors):
    tensors = {}
    for file in (GOLDEN / family).glob("*.safetensors"):
      tensors |= safetensors.load_file(file)
    config = json.loads((GOLDEN / family / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | (settings or {})))
    safetensors.save_file(change(tensors), tmp_path / "model.safetensors")
    return tmp_path

  return copied


@pytest.mark.parametrize(
  "family, prefix, others",
  [
    (
      "gpt2",
      "transformer.",
      {"lm_head.weight": "wte.weight", "h.0.attn.bias": (16, 16), "h.1.attn.masked_bias": ()},
    ),
    ("opt", "model.", {"lm_head.weight": "decoder.embed_tokens.weight"}),
    (
      "gpt_neox",
      "gpt_neox.",
      {
        "layers.0.attention.bias": (1, 1, 16, 16),
        "layers.0.attention.masked_bias": (),
        "layers.1.attention.rotary_emb.inv_freq": (2,),
      },
    ),
  ],
)
def test_prefixes_buffers_and_copies_of_embeddings_make_no_difference(
  golden, copy, family, prefix, others
):
  def change(tensors):
    assert any(name.startswith(prefix) for name in tensors)
    renamed = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return renamed | {
      name: renamed[shape] if isinstance(shape, str) else jnp.ones(shape)
      for name, shape in others.items()
    }

  assert error(golden, family, *transformer.from_safetensors(copy(family, change=change))) < 1e-4


def test_rotary_settings_are_read_from_old_configurations(golden, copy):
  path = copy("gpt_neox", {"rotary_pct": 0.5, "rotary_emb_base": 10000, "rope_parameters": None})
  assert error(golden, "gpt_neox", *transformer.from_safetensors(path)) < 1e-4
  path = copy("gpt_neox", {"rotary_pct": 0.25, "rotary_emb_base": 500, "rope_parameters": None})
  config = transformer.from_safetensors(path)[0].config
  assert (config.rotary_fraction, config.rotary_base) == (0.25, 500)


@cases(
  "family, settings, message",
  [
    ("gpt2", {"model_type": "bloom"}, r"model_type must be one of \['gpt2', .*\], got 'bloom'"),
    ("gpt2", {"activation_function": "relu6"}, "activation in config.json must be .* 'relu6'"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx .* False"),
    # OPT-350M
    ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before .* must be True, got False"),
    ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim .* must be 32, got 16"),
    ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine .* True, got"),
    ("gpt_neox", {"attention_bias": False}, "attention_bias .* must be True, got False"),
    ("gpt_neox", {"rope_scaling": {"type": "linear"}}, "rope_scaling .* must be None, got"),
    ("gpt_neox", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type .* must be default"),
    ("gpt2", {"n_head": 5}, "width must be a multiple of num_heads, got 32 and 5"),
    ("gpt2", {"n_inner": 64}, r"h.0.mlp.c_fc.weight must have the shape \(32, 64\) .*\(32, 48\)"),
    ("gpt2", {"n_layer": 3}, "has no tensor h.2.ln_1.weight"),
    ("gpt2", {"n_layer": 1}, "has an unknown tensor h.1."),
    ("gpt2", {"n_embd": None}, "config.json must have n_embd, got none"),
    ("gpt2", {"layer_norm_epsilon": None}, "config.json must give a value for epsilon, got null"),
    ("llama", {"rms_norm_eps": None}, "config.json must give a value for epsilon, got null"),
    ("gpt2", {"is_encoder_decoder": True}, "is_encoder_decoder .* must be false, got True"),
    ("llama", {"quantization_config": {"bits": 4}}, "the setting quantization_config = .*'bits'"),
    ("llama", {"sliding_window": 8}, "the setting sliding_window = 8"),
    ("llama", {"rope_scaling": {"type": "longrope"}}, "rope_type .* one of .* got 'longrope'"),
    ("llama", {"rope_scaling": {"type": "linear"}}, "the rotary scaling linear must have factor"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor .* must be 1, got 0.5"),
    (
      "llama",
      {"rope_scaling": {"type": "linear", "factor": 2.0, "sections": [1]}},
      r"the rotary scaling linear in config.json must have only .*, got sections = \[1\]",
    ),
    ("llama", {"num_key_value_heads": 3}, "num_kv_heads must divide num_heads, got 3 and 4"),
    ("llama", {"tie_word_embeddings": False}, "has no tensor lm_head.weight"),
    ("smollm3", {"no_rope_layers": [1]}, r"no_rope_layers .* each of 2 layers, got \[1\]"),
    ("qwen2", {"layer_types": ["chunked"] * 2}, r"layer_types .* got \['chunked', 'chunked'\]"),
    ("qwen2", {"use_sliding_window": False}, "layer_types .* full_attention without a window"),
  ],
)
def test_what_the_transformer_cannot_be_is_refused(copy, family, settings, message):
  path = copy(family, settings)
  with pytest.raises(ValueError, match=message):
    transformer.from_safetensors(path)


@pytest.mark.parametrize(
  "family, settings, field, value",
  [
    ("gpt2", {"tie_word_embeddings": False}, "tied_head", False),
    ("gpt2", {"layer_norm_epsilon": 0.5}, "epsilon", 0.5),
    ("opt", {"tie_word_embeddings": False}, "tied_head", False),
    ("opt", {"activation_function": "gelu"}, "activation", "gelu"),
    ("gpt_neox", {"tie_word_embeddings": True}, "tied_head", True),
    ("gpt_neox", {"use_parallel_residual": False}, "parallel_residual", False),
    ("gpt_neox", {"layer_norm_eps": 0.5}, "epsilon", 0.5),
    ("gpt_neox", {"hidden_act": "gelu_new"}, "activation", "gelu_tanh"),
    ("llama", {"attention_bias": True}, "attention_out_bias", True),
    ("llama", {"mlp_bias": True}, "ffn_bias", True),
    ("llama", {"num_key_value_heads": 2}, "num_kv_heads", 2),
    ("mistral", {"sliding_window": None}, "window", None),
    ("qwen3", {"head_dim": 16}, "head_width", 16),
    ("qwen3", {"rms_norm_eps": 1e-3}, "epsilon", 1e-3),
    ("smollm3", {"no_rope_layers": [0, 1]}, "unrotated_layers", (0,)),
  ],
)
def test_settings_that_are_not_the_default_are_read(copy, family, settings, field, value):
  read = json.loads((copy(family, settings) / "config.json").read_text())
  configure = families.FAMILIES[family].configure
  assert configure(read)[field] == value
  assert configure({name: read[name] for name in read if name not in settings})[field] != value


NEW = json.loads((GOLDEN / "llama" / "config.json").read_text())["rope_parameters"]
SCALING = {name: value for name, value in NEW.items() if name != "rope_theta"}
OLD = {name: value for name, value in SCALING.items() if name != "rope_type"} | {"type": "llama3"}


@pytest.mark.parametrize("scaling", [SCALING, OLD], ids=["rope_type", "type"])
def test_rotary_scaling_is_read_from_old_configurations(copy, scaling):
  expected = transformer.from_safetensors(GOLDEN / "llama")[0].config
  assert expected.rotary_scaling == transformer.Llama3Scaling(8.0, 1.0, 4.0, 16)
  old = {"rope_theta": 100, "rope_scaling": scaling, "rope_parameters": None}
  assert transformer.from_safetensors(copy("llama", old))[0].config == expected


def test_scaling_that_changes_nothing_is_accepted(copy):
  for family, scaling in (
    ("llama", {"type": "default"}),
    ("gpt_neox", {"rope_type": "default"}),
  ):
    path = copy(family, {"rope_scaling": scaling})
    assert transformer.from_safetensors(path)[0].config.rotary_scaling is None
  path = copy("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}})
  config = transformer.from_safetensors(path)[0].config  # It begins past the maximum.
  assert config.rotary_scaling == transformer.DynamicScaling(2.0, 64)
  with pytest.raises(
    ValueError, match="max_length must be at most 64 with dynamic scaling, got 65"
  ):
    transformer.from_safetensors(path, max_length=65)


def test_settings_that_a_user_knows_can_be_ignored(copy):
  path = copy("llama", {"favourite_colour": "blue"})
  with pytest.raises(ValueError, match="favourite_colour = 'blue', which Transformer"):
    transformer.from_safetensors(path)
  transformer.from_safetensors(path, ignore=("favourite_colour",))
  asks_for_nothing = {"favourite_colour": None, "use_colours": False}
  transformer.from_safetensors(copy("llama", asks_for_nothing))


def test_another_head_than_the_embedding_is_used_though_the_configuration_says_tied(copy):
  """As in transformers since version 5."""
  head = np.random.default_rng(0).normal(size=(50, 24))
  change = lambda tensors: tensors | {"lm_head.weight": jnp.asarray(head, jnp.float32)}
  model, params = transformer.from_safetensors(copy("llama", change=change))
  assert not model.config.tied_head
  np.testing.assert_allclose(params["head"]["kernel"], head.T, rtol=1e-6)
  swapped = lambda tensors: {
    "lm_head.weight" if "embed_tokens" in name else name: x for name, x in tensors.items()
  }
  model, tied = transformer.from_safetensors(copy("llama", change=swapped))
  assert model.config.tied_head
  np.testing.assert_array_equal(tied["token_embedding"], params["token_embedding"])


def test_one_file_comes_before_shards(copy):
  path = copy("gpt_neox")
  index = {"weight_map": {"embed_in.weight": "gone.safetensors"}}
  (path / "model.safetensors.index.json").write_text(json.dumps(index))
  transformer.from_safetensors(path)


def test_learned_positions_can_be_cropped(golden):
  for family, offset in (("gpt2", 0), ("opt", 2)):
    model, params = transformer.from_safetensors(GOLDEN / family, max_length=12)
    assert params["position_embedding"].shape == (offset + 12, 32)
    assert error(golden, family, model, params) < 1e-4
    with pytest.raises(ValueError, match="max_length must be at most 16, the learned positions"):
      transformer.from_safetensors(GOLDEN / family, max_length=17)
  assert transformer.from_safetensors(GOLDEN / "llama", max_length=99)[0].config.max_length == 99


def test_parameters_may_stay_in_bfloat16(golden):
  model, params = transformer.from_safetensors(GOLDEN / "qwen3", param_dtype=jnp.bfloat16)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
  assert error(golden, "qwen3", model, params) < 1e-4  # They were stored so.


def test_broken_files_are_refused(copy):
  path = copy("gpt2")
  (path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
  with pytest.raises(ValueError, match=r"model\.safetensors is not a whole file of safetensors: "):
    transformer.from_safetensors(path)
  (path / "config.json").write_text('{"model_type": "gpt2"}')
  with pytest.raises(ValueError, match=r"config.json must have vocab_size, got none in"):
    transformer.from_safetensors(path)
  (path / "config.json").write_text("Not found")
  with pytest.raises(ValueError, match=r"config.json is not JSON: Expecting value"):
    transformer.from_safetensors(path)


def test_a_folder_without_a_model_is_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"config.json does not exist: a model is a folder"):
    transformer.from_safetensors(tmp_path)
  shutil.copy(GOLDEN / "opt" / "config.json", tmp_path)
  with pytest.raises(FileNotFoundError, match=r"model.safetensors does not exist: a model is"):
    transformer.from_safetensors(tmp_path)
