"""The settings of published models, as their ``config.json`` has them, are those of the presets."""

import pytest
from jaxbo_models import transformer
from jaxbo_models.transformer import families, huggingface

COMMON = {
  "attention_dropout": 0.0,
  "hidden_act": "silu",
  "initializer_range": 0.02,
  "torch_dtype": "bfloat16",
  "transformers_version": "4.46.0",
  "use_cache": True,
}


def sizes(layers, width, heads, kv_heads, ffn_width, vocab_size, max_length):
  return {
    "num_hidden_layers": layers,
    "hidden_size": width,
    "num_attention_heads": heads,
    "num_key_value_heads": kv_heads,
    "intermediate_size": ffn_width,
    "vocab_size": vocab_size,
    "max_position_embeddings": max_length,
  }


PUBLISHED = {
  "Llama-3.2-1B": (
    transformer.llama("3.2-1b"),
    sizes(16, 2048, 32, 8, 8192, 128256, 131072)
    | {
      "architectures": ["LlamaForCausalLM"],
      "attention_bias": False,
      "bos_token_id": 128000,
      "eos_token_id": 128001,
      "head_dim": 64,
      "mlp_bias": False,
      "model_type": "llama",
      "pretraining_tp": 1,
      "rms_norm_eps": 1e-05,
      "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
      },
      "rope_theta": 500000.0,
      "tie_word_embeddings": True,
    },
  ),
  "Llama-2-7b": (
    transformer.llama("2-7b"),
    sizes(32, 4096, 32, 32, 11008, 32000, 4096)
    | {
      "_name_or_path": "meta-llama/Llama-2-7b-hf",
      "model_type": "llama",
      "pretraining_tp": 1,
      "rms_norm_eps": 1e-05,
      "rope_scaling": None,
      "tie_word_embeddings": False,
    },
  ),
  "Mistral-7B-v0.1": (
    transformer.mistral("7b-v0.1"),
    sizes(32, 4096, 32, 8, 14336, 32000, 32768)
    | {
      "model_type": "mistral",
      "rms_norm_eps": 1e-05,
      "rope_theta": 10000.0,
      "sliding_window": 4096,
      "tie_word_embeddings": False,
    },
  ),
  "Qwen2.5-0.5B": (
    transformer.qwen2("0.5b"),
    sizes(24, 896, 14, 2, 4864, 151936, 32768)
    | {
      "bos_token_id": 151643,
      "eos_token_id": 151643,
      "max_window_layers": 24,
      "model_type": "qwen2",
      "rms_norm_eps": 1e-06,
      "rope_theta": 1000000.0,
      "sliding_window": 32768,
      "tie_word_embeddings": True,
      "use_mrope": False,
      "use_sliding_window": False,
    },
  ),
  "Qwen3-0.6B": (
    transformer.qwen3("0.6b"),
    sizes(28, 1024, 16, 8, 3072, 151936, 40960)
    | {
      "attention_bias": False,
      "head_dim": 128,
      "max_window_layers": 28,
      "model_type": "qwen3",
      "rms_norm_eps": 1e-06,
      "rope_scaling": None,
      "rope_theta": 1000000,
      "sliding_window": None,
      "tie_word_embeddings": True,
      "use_sliding_window": False,
    },
  ),
  "SmolLM-135M": (
    transformer.smollm("135m"),
    sizes(30, 576, 9, 3, 1536, 49152, 2048)
    | {
      "attention_bias": False,
      "is_llama_config": True,
      "model_type": "llama",
      "pretraining_tp": 1,
      "rms_norm_eps": 1e-05,
      "rope_interleaved": False,
      "rope_scaling": None,
      "rope_theta": 10000.0,
      "tie_word_embeddings": True,
    },
  ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_the_published_models(name):
  preset, settings = PUBLISHED[name]
  family = families.FAMILIES[settings["model_type"]]
  fields = huggingface.read_fields(family, COMMON | settings)
  read = transformer.TransformerConfig(**fields)
  assert read == preset


def test_smollm3_does_not_rotate_every_fourth_layer():
  settings = sizes(36, 2048, 16, 4, 11008, 128256, 65536) | {
    "attention_bias": False,
    "layer_types": ["full_attention"] * 36,
    "max_window_layers": 28,
    "mlp_bias": False,
    "model_type": "smollm3",
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9,
    "pretraining_tp": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "sliding_window": None,
    "use_sliding_window": False,
  }
  family = families.FAMILIES["smollm3"]
  for given in (settings, {name: x for name, x in settings.items() if name != "no_rope_layers"}):
    fields = huggingface.read_fields(family, COMMON | given)
    assert fields["unrotated_layers"] == tuple(range(3, 36, 4))
    assert (fields["rotary_base"], fields["tied_head"]) == (5e6, True)
    assert "window" not in fields
