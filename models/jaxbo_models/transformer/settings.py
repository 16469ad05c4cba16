"""How ``config.json`` is read: what every family shares, and GPT-2, OPT and GPT-NeoX."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

Settings = Mapping[str, Any]
_NEOX_ROPE = ("rope_theta", "partial_rotary_factor")


class ReadSettings(Mapping[str, Any]):
  """Settings that remember which of them were read; to ``[]``, None is missing."""

  def __init__(self, settings: Settings):
    self._settings = settings
    self._read: set[str] = set()

  def __getitem__(self, name: str) -> Any:
    self._read.add(name)
    if self._settings[name] is None:
      raise KeyError(name)
    return self._settings[name]

  def get(self, name: str, default: Any = None) -> Any:
    """The setting, which may be None, or the default where it is missing."""
    self._read.add(name)
    return self._settings.get(name, default)

  def __iter__(self) -> Iterator[str]:
    return iter(self._settings)

  def __len__(self) -> int:
    return len(self._settings)

  def check_all_read(self, ignore: Collection[str]) -> None:
    """Raises ``ValueError`` for a setting that nobody read and that may change the result.

    None and False ask for nothing.
    """
    for name, value in self._settings.items():
      known = name in (self._read | HARMLESS | set(ignore))
      if not (known or value is None or value is False):
        raise ValueError(
          f"config.json has the setting {name} = {value!r}, which Transformer does not know; if it "
          f"does not change the logits, ignore it: ignore=({name!r},)"
        )


def read_gpt2(settings: Settings) -> dict[str, Any]:
  """Fields of GPT-2's models."""
  require(
    settings,
    scale_attn_weights=True,
    scale_attn_by_inverse_layer_idx=False,
    add_cross_attention=False,
  )
  return {
    "vocab_size": settings["vocab_size"],
    "max_length": settings["n_positions"],
    "num_layers": settings["n_layer"],
    "width": settings["n_embd"],
    "num_heads": settings["n_head"],
    "ffn_width": settings.get("n_inner"),
    "activation": activation(settings.get("activation_function", "gelu_new")),
    "epsilon": settings.get("layer_norm_epsilon", 1e-5),
    "tied_head": settings.get("tie_word_embeddings", True),
  }


def read_opt(settings: Settings) -> dict[str, Any]:
  """Fields of OPT's models."""
  if settings.get("word_embed_proj_dim") is not None:  # OPT-350M projects its embedding.
    require(settings, word_embed_proj_dim=settings["hidden_size"])
  require(
    settings,
    do_layer_norm_before=True,  # OPT-350M normalizes after its layers.
    enable_bias=True,
    layer_norm_elementwise_affine=True,
    _remove_final_layer_norm=False,
  )
  return {
    "vocab_size": settings["vocab_size"],
    "max_length": settings["max_position_embeddings"],
    "num_layers": settings["num_hidden_layers"],
    "width": settings["hidden_size"],
    "num_heads": settings["num_attention_heads"],
    "ffn_width": settings["ffn_dim"],
    "activation": activation(settings.get("activation_function", "relu")),
    "position_offset": 2,
    "tied_head": settings.get("tie_word_embeddings", True),
  }


def read_gpt_neox(settings: Settings) -> dict[str, Any]:
  """Fields of GPT-NeoX's models, Pythia among them."""
  require(settings, attention_bias=True)
  scaling, rope = settings.get("rope_scaling"), settings.get("rope_parameters")
  if scaling is not None and scaling.get("rope_type", scaling.get("type")) != "default":
    require(settings, rope_scaling=None)
  # Since transformers 5 all is in rope_parameters; before, names were flat.
  rope = scaling or rope or {}
  require(rope, rope_type="default", type="default")
  require_known(rope, "rope_parameters", ("rope_type", "type", *_NEOX_ROPE))
  # Read both, so that both are known.
  fraction, base = settings.get("rotary_pct", 0.25), settings.get("rotary_emb_base", 10_000)
  return {
    "vocab_size": settings["vocab_size"],
    "max_length": settings["max_position_embeddings"],
    "num_layers": settings["num_hidden_layers"],
    "width": settings["hidden_size"],
    "num_heads": settings["num_attention_heads"],
    "ffn_width": settings["intermediate_size"],
    "activation": activation(settings.get("hidden_act", "gelu")),
    "parallel_residual": settings.get("use_parallel_residual", True),
    "rotary_fraction": float(rope.get("partial_rotary_factor", fraction)),
    "rotary_base": float(rope.get("rope_theta", base)),
    "epsilon": settings.get("layer_norm_eps", 1e-5),
    "tied_head": settings.get("tie_word_embeddings", False),
  }


def activation(name: str) -> str:
  """Returns our name of an activation."""
  ours = {
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
  }
  if name not in ours:
    raise ValueError(f"the activation in config.json must be one of {list(ours)}, got {name!r}")
  return ours[name]


def require(settings: Settings, **required: Any) -> None:
  """Raises ``ValueError`` for settings that :class:`Transformer` does not support."""
  for name, value in required.items():
    if settings.get(name, value) != value:
      raise ValueError(f"{name} in config.json must be {value}, got {settings[name]}")


def require_known(settings: Settings, where: str, known: Collection[str]) -> None:
  """Raises ``ValueError`` for settings in a part of ``config.json`` that are not known."""
  for name, value in settings.items():
    if name not in known and value is not None:
      raise ValueError(f"{where} in config.json must have only {list(known)}, got {name} = {value}")


def refuse(settings: Settings, *names: str) -> None:
  """Raises ``ValueError`` for settings that ask for what :class:`Transformer` does not have."""
  for name in names:
    if settings.get(name):
      raise ValueError(f"{name} in config.json must be false, got {settings[name]}")


# What says how to train, to generate, to store or to split a model, but not what its logits are.
_NAMES = """
_attn_implementation _attn_implementation_autoset _commit_hash _name_or_path _num_labels
activation_dropout architectures attention_dropout attention_probs_dropout_prob attn_pdrop
auto_map bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
classifier_dropout cross_attention_hidden_size decoder_start_token_id diversity_penalty
do_sample dropout dtype early_stopping embd_pdrop encoder_no_repeat_ngram_size eos_token_id
exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
gradient_checkpointing hidden_dropout hidden_dropout_prob id2label init_std initializer_range
is_decoder is_llama_config label2id layerdrop length_penalty max_length max_sequence_length
min_length model_type n_ctx no_repeat_ngram_size num_beam_groups num_beams num_labels
num_return_sequences output_attentions output_hidden_states output_past output_scores
pad_token_id prefix pretraining_tp problem_type remove_invalid_values reorder_and_upcast_attn
repetition_penalty resid_pdrop return_dict return_dict_in_generate sep_token_id
summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
tie_last_hidden_states tokenizer_class top_k top_p torch_dtype torchscript
transformers.js_config transformers_version typical_p unk_token_id unsloth_fixed unsloth_version
use_bfloat16 use_cache
"""
HARMLESS = frozenset(_NAMES.split())
