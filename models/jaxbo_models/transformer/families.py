"""How Hugging Face's GPT-2, OPT and GPT-NeoX models name, lay out and configure their weights."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Settings = Mapping[str, Any]


class Family(NamedTuple):
  """How a family of models names and lays out its tensors.

  Attributes:
    configure: reads the fields of :class:`TransformerConfig` from ``config.json``.
    prefixes: what tensor names may begin with; some programs save the prefix and some do not.
    layer: what the names of a layer's tensors begin with.
    qkv: the modules of queries, keys and values: one for all, or three.
    per_head: whether the outputs of ``qkv`` are ``[heads, 3, head_dim]`` instead of
      ``[3, heads, head_dim]``.
    transposed: whether kernels are ``[outputs, inputs]``, as in PyTorch's Linear; GPT-2's are not.
  """

  configure: Callable[[Settings], dict[str, Any]]
  prefixes: Sequence[str]
  token_embedding: str
  position_embedding: str
  final_norm: str
  head: str
  layer: str
  attention_norm: str
  qkv: Sequence[str]
  attention_out: str
  ffn_norm: str
  ffn_in: str
  ffn_out: str
  per_head: bool
  transposed: bool


def _gpt2(settings: Settings) -> dict[str, Any]:
  _require(
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
    "activation": _activation(settings.get("activation_function", "gelu_new")),
    "epsilon": settings.get("layer_norm_epsilon", 1e-5),
    "tied_head": settings.get("tie_word_embeddings", True),
  }


def _opt(settings: Settings) -> dict[str, Any]:
  _require(
    settings,
    do_layer_norm_before=True,  # OPT-350M normalizes after its layers
    word_embed_proj_dim=settings["hidden_size"],  # and projects its embedding.
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
    "activation": _activation(settings.get("activation_function", "relu")),
    "position_offset": 2,
    "tied_head": settings.get("tie_word_embeddings", True),
  }


def _gpt_neox(settings: Settings) -> dict[str, Any]:
  _require(settings, attention_bias=True, rope_scaling=None)
  rope = settings.get("rope_parameters") or {}  # Since transformers 5; before, names were flat.
  _require(rope, rope_type="default")
  fraction = rope.get("partial_rotary_factor", settings.get("rotary_pct", 0.25))
  return {
    "vocab_size": settings["vocab_size"],
    "max_length": settings["max_position_embeddings"],
    "num_layers": settings["num_hidden_layers"],
    "width": settings["hidden_size"],
    "num_heads": settings["num_attention_heads"],
    "ffn_width": settings["intermediate_size"],
    "activation": _activation(settings.get("hidden_act", "gelu")),
    "parallel_residual": settings.get("use_parallel_residual", True),
    "rotary_fraction": fraction,
    "rotary_base": float(rope.get("rope_theta", settings.get("rotary_emb_base", 10_000))),
    "epsilon": settings.get("layer_norm_eps", 1e-5),
    "tied_head": settings.get("tie_word_embeddings", False),
  }


def _activation(name: str) -> str:
  ours = {
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
  }
  if name not in ours:
    raise ValueError(f"the activation in config.json must be one of {list(ours)}, got {name!r}")
  return ours[name]


def _require(settings: Settings, **required: Any) -> None:
  """Raises ``ValueError`` for settings that :class:`Transformer` does not support."""
  for name, value in required.items():
    if settings.get(name, value) != value:
      raise ValueError(f"{name} in config.json must be {value}, got {settings[name]}")


FAMILIES = {
  "gpt2": Family(
    configure=_gpt2,
    prefixes=("transformer.",),
    token_embedding="wte",
    position_embedding="wpe",
    final_norm="ln_f",
    head="lm_head",
    layer="h.{}.",
    attention_norm="ln_1",
    qkv=("attn.c_attn",),
    attention_out="attn.c_proj",
    ffn_norm="ln_2",
    ffn_in="mlp.c_fc",
    ffn_out="mlp.c_proj",
    per_head=False,
    transposed=False,
  ),
  "opt": Family(
    configure=_opt,
    prefixes=("model.", "decoder."),
    token_embedding="embed_tokens",
    position_embedding="embed_positions",
    final_norm="final_layer_norm",
    head="lm_head",
    layer="layers.{}.",
    attention_norm="self_attn_layer_norm",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    attention_out="self_attn.out_proj",
    ffn_norm="final_layer_norm",
    ffn_in="fc1",
    ffn_out="fc2",
    per_head=False,
    transposed=True,
  ),
  "gpt_neox": Family(
    configure=_gpt_neox,
    prefixes=("gpt_neox.",),
    token_embedding="embed_in",
    position_embedding="",
    final_norm="final_layer_norm",
    head="embed_out",
    layer="layers.{}.",
    attention_norm="input_layernorm",
    qkv=("attention.query_key_value",),
    attention_out="attention.dense",
    ffn_norm="post_attention_layernorm",
    ffn_in="mlp.dense_h_to_4h",
    ffn_out="mlp.dense_4h_to_h",
    per_head=True,
    transposed=True,
  ),
}
