"""How ``config.json`` is written: settings of each family, as transformers 4 and 5 read them."""

from typing import Any

from jaxbo_models.transformer.config import TransformerConfig
from jaxbo_models.transformer.rotary import (
  DynamicScaling,
  LinearScaling,
  Llama3Scaling,
  RotaryScaling,
  YarnScaling,
)

_ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu", "silu": "silu"}


def describe_gpt2(config: TransformerConfig) -> dict[str, Any]:
  """Settings of a GPT-2."""
  return {
    "vocab_size": config.vocab_size,
    "n_positions": config.max_length,
    "n_layer": config.num_layers,
    "n_embd": config.width,
    "n_head": config.num_heads,
    "n_inner": config.ffn_width,
    "activation_function": _ACTIVATIONS[config.activation],
    "layer_norm_epsilon": config.epsilon,
    "tie_word_embeddings": config.tied_head,
  }


def _sizes(config: TransformerConfig) -> dict[str, Any]:
  return {
    "vocab_size": config.vocab_size,
    "max_position_embeddings": config.max_length,
    "num_hidden_layers": config.num_layers,
    "hidden_size": config.width,
    "num_attention_heads": config.num_heads,
    "tie_word_embeddings": config.tied_head,
  }


def describe_opt(config: TransformerConfig) -> dict[str, Any]:
  """Settings of an OPT."""
  return _sizes(config) | {
    "ffn_dim": config.ffn_width or 4 * config.width,
    "word_embed_proj_dim": config.width,
    "activation_function": _ACTIVATIONS[config.activation],
  }


def describe_gpt_neox(config: TransformerConfig) -> dict[str, Any]:
  """Settings of a GPT-NeoX."""
  return _sizes(config) | {
    "intermediate_size": config.ffn_width or 4 * config.width,
    "hidden_act": _ACTIVATIONS[config.activation],
    "use_parallel_residual": config.parallel_residual,
    "rotary_pct": config.rotary_fraction,
    "rotary_emb_base": config.rotary_base,
    "layer_norm_eps": config.epsilon,
  }


def describe_mistral(config: TransformerConfig) -> dict[str, Any]:
  """Settings of a Mistral, and of what the family of Llama has in common."""
  return _sizes(config) | {
    "num_key_value_heads": config.kv_heads,
    "head_dim": config.head_dim,
    "intermediate_size": config.ffn_width or 4 * config.width,
    "hidden_act": _ACTIVATIONS[config.activation],
    "rms_norm_eps": config.epsilon,
    "rope_theta": config.rotary_base,
    "rope_scaling": _scaling(config.rotary_scaling),
    "sliding_window": config.window,
  }


def describe_llama(config: TransformerConfig) -> dict[str, Any]:
  """Settings of a Llama."""
  settings = describe_mistral(config) | _biases(config)
  del settings["sliding_window"]
  return settings


def describe_qwen2(config: TransformerConfig) -> dict[str, Any]:
  """Settings of a Qwen2."""
  return describe_mistral(config) | _windows(config)


def describe_qwen3(config: TransformerConfig) -> dict[str, Any]:
  """Settings of a Qwen3."""
  settings = describe_mistral(config) | _biases(config) | _windows(config)
  del settings["mlp_bias"]
  return settings


def describe_smollm3(config: TransformerConfig) -> dict[str, Any]:
  """Settings of a SmolLM3."""
  rotated = [int(i not in config.unrotated_layers) for i in range(config.num_layers)]
  settings = describe_mistral(config) | _biases(config) | _windows(config)
  return settings | {"no_rope_layers": rotated}


def _biases(config: TransformerConfig) -> dict[str, Any]:
  return {"attention_bias": config.attention_out_bias, "mlp_bias": config.ffn_bias}


def _windows(config: TransformerConfig) -> dict[str, Any]:
  used = config.window is not None
  full = config.full_attention_layers if used else range(config.num_layers)
  types = ["full_attention" if i in full else "sliding_attention" for i in range(config.num_layers)]
  return {"use_sliding_window": used, "sliding_window": config.window, "layer_types": types}


def _scaling(scaling: RotaryScaling | None) -> dict[str, Any] | None:
  match scaling:
    case LinearScaling(factor):
      return {"rope_type": "linear", "factor": factor}
    case DynamicScaling(factor):
      return {"rope_type": "dynamic", "factor": factor}
    case Llama3Scaling(factor, low, high, length):
      return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": length,
      }
    case YarnScaling(factor, length, attention_factor, fast, slow, truncate):
      return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": length,
        "attention_factor": attention_factor,
        "beta_fast": fast,
        "beta_slow": slow,
        "truncate": truncate,
      }
    case _:
      return None
