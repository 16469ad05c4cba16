"""How Hugging Face's families of models name and lay out their weights."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxbo_models.transformer.config import TransformerConfig
from jaxbo_models.transformer.describe import (
  describe_gpt2,
  describe_gpt_neox,
  describe_llama,
  describe_mistral,
  describe_opt,
  describe_qwen2,
  describe_qwen3,
  describe_smollm3,
)
from jaxbo_models.transformer.settings import Settings, read_gpt2, read_gpt_neox, read_opt
from jaxbo_models.transformer.settings_llama import (
  read_llama,
  read_mistral,
  read_qwen2,
  read_qwen3,
  read_smollm3,
)


class Family(NamedTuple):
  """How a family of models names and lays out its tensors.

  Attributes:
    configure: reads the fields of :class:`TransformerConfig` from ``config.json``.
    describe: the inverse of ``configure``.
    architecture: transformers' class; empty if a family is another one in disguise.
    prefixes: what tensor names may begin with; some programs save the prefix and some do not.
    layer: what the names of a layer's tensors begin with.
    qkv: the modules of queries, keys and values: one for all, or three.
    per_head: whether the outputs of ``qkv`` are ``[heads, 3, head_dim]`` instead of
      ``[3, heads, head_dim]``.
    transposed: whether kernels are ``[outputs, inputs]``, as in PyTorch's Linear; GPT-2's are not.
  """

  configure: Callable[[Settings], dict[str, Any]]
  describe: Callable[[TransformerConfig], dict[str, Any]]
  architecture: str
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
  ffn_gate: str = ""
  query_norm: str = ""
  key_norm: str = ""


_LLAMA = Family(
  configure=read_llama,
  describe=describe_llama,
  architecture="LlamaForCausalLM",
  prefixes=("model.",),
  token_embedding="embed_tokens",
  position_embedding="",
  final_norm="norm",
  head="lm_head",
  layer="layers.{}.",
  attention_norm="input_layernorm",
  qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
  attention_out="self_attn.o_proj",
  ffn_norm="post_attention_layernorm",
  ffn_in="mlp.up_proj",
  ffn_out="mlp.down_proj",
  per_head=False,
  transposed=True,
  ffn_gate="mlp.gate_proj",
  query_norm="self_attn.q_norm",
  key_norm="self_attn.k_norm",
)

FAMILIES = {
  "gpt2": Family(
    configure=read_gpt2,
    describe=describe_gpt2,
    architecture="GPT2LMHeadModel",
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
    configure=read_opt,
    describe=describe_opt,
    architecture="OPTForCausalLM",
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
    configure=read_gpt_neox,
    describe=describe_gpt_neox,
    architecture="GPTNeoXForCausalLM",
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
  "llama": _LLAMA,
  "mistral": _LLAMA._replace(
    configure=read_mistral, describe=describe_mistral, architecture="MistralForCausalLM"
  ),
  "qwen2": _LLAMA._replace(
    configure=read_qwen2, describe=describe_qwen2, architecture="Qwen2ForCausalLM"
  ),
  "qwen3": _LLAMA._replace(
    configure=read_qwen3, describe=describe_qwen3, architecture="Qwen3ForCausalLM"
  ),
  "smollm": _LLAMA._replace(architecture=""),  # SmolLM says llama.
  "smollm3": _LLAMA._replace(
    configure=read_smollm3, describe=describe_smollm3, architecture="SmolLM3ForCausalLM"
  ),
}
