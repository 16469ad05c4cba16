"""The configuration of a decoder-only transformer."""

import dataclasses
import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import jax.typing

from jaxbo_models.transformer.rotary import DynamicScaling, RotaryScaling

ACTIVATIONS = {
  "gelu_tanh": nn.gelu,
  "gelu": functools.partial(nn.gelu, approximate=False),
  "relu": nn.relu,
  "silu": nn.silu,
}
ATTENTIONS = (None, "xla", "cudnn")
NORMS = ("layer", "rms")
POLICIES = (
  "everything_saveable",
  "nothing_saveable",
  "dots_saveable",
  "dots_with_no_batch_dims_saveable",
)


# What the models of the family of Llama have in common.
LLAMA_FIELDS: Mapping[str, Any] = MappingProxyType(
  {
    "activation": "silu",
    "gated": True,
    "norm": "rms",
    "qkv_bias": False,
    "attention_out_bias": False,
    "ffn_bias": False,
    "rotary_fraction": 1.0,
  }
)
_SIZES = (
  "vocab_size",
  "max_length",
  "num_layers",
  "width",
  "num_heads",
  "num_kv_heads",
  "head_width",
  "ffn_width",
  "window",
)


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """The configuration of a :class:`Transformer`; immutable and hashable.

  >>> TransformerConfig(vocab_size=257, max_length=64, num_layers=2, width=32, num_heads=4).head_dim
  8

  Attributes:
    vocab_size: number of tokens; ids are in [0, vocab_size).
    max_length: length of the longest sequence, in tokens.
    num_layers: number of blocks.
    width: width of the residual stream; a multiple of ``num_heads`` unless ``head_width`` is given.
    num_heads: number of attention heads.
    num_kv_heads: number of heads of keys and values, a divisor of ``num_heads``: grouped-query
      attention. None for ``num_heads``.
    head_width: number of dimensions of each head; None for ``width / num_heads``.
    ffn_width: number of hidden units in the feed-forward layer; None for four times the width.
    activation: ``"gelu_tanh"`` (GPT-2's approximation), ``"gelu"`` (exact), ``"relu"`` or
      ``"silu"``.
    gated: True computes ``ffn_out(activation(ffn_gate(x)) * ffn_in(x))``: SwiGLU with ``"silu"``,
      GeGLU with GELU.
    norm: ``"layer"`` (layer normalization) or ``"rms"`` (RMSNorm: neither mean nor bias).
    qk_norm: normalize each head's queries and keys before they are rotated.
    qkv_bias: whether queries, keys and values have a bias.
    attention_out_bias: whether the output of attention has a bias.
    ffn_bias: whether the feed-forward layer has biases.
    parallel_residual: True computes ``x + attention(norm(x)) + ffn(norm'(x))``; False applies
      attention first and the feed-forward layer to its result.
    rotary_fraction: share of each head's dimensions that rotary positions rotate, in (0, 1]; 0 for
      a learned table of positions.
    rotary_base: base of the wavelengths of rotary positions.
    rotary_scaling: None, or how frequencies are scaled for longer texts: a :class:`LinearScaling`,
      :class:`Llama3Scaling`, :class:`YarnScaling` or :class:`DynamicScaling`.
    unrotated_layers: the layers whose queries and keys are not rotated.
    window: a token sees itself and the ``window - 1`` places before it; None for all places.
    full_attention_layers: the layers without a window.
    position_offset: number of unused rows at the top of the learned table: 2 for OPT.
    tied_head: True uses the embedding as the kernel of the head; False gives the head its own
      kernel.
    epsilon: the constant that normalization adds to the variance.
    remat: recompute each block in the backward pass. Memory then holds one block's activations and
      the residual stream of every block; the cost is 4/3 of the operations. With
      ``unroll=num_layers`` the loop is gone, and XLA's CPU backend undoes the recomputation. The
      name of a policy of :data:`jax.checkpoint_policies` instead says what to keep:
      ``"everything_saveable"``, ``"nothing_saveable"`` (the same as True), ``"dots_saveable"`` or
      ``"dots_with_no_batch_dims_saveable"``.
    unroll: number of blocks in one step of the scan over blocks, in [1, num_layers]; more blocks
      take longer to compile and less time to run.
    attention: implementation of :func:`jax.nn.dot_product_attention`: ``"xla"``, ``"cudnn"`` (GPUs,
      in bfloat16 or float16), or None to let JAX choose.
    dtype: dtype of products and activations. Parameters, normalization and losses are float32 at
      least.

  Raises:
    ValueError: a field is out of its range.
  """

  vocab_size: int
  max_length: int
  num_layers: int
  width: int
  num_heads: int
  num_kv_heads: int | None = None
  head_width: int | None = None
  ffn_width: int | None = None
  activation: str = "gelu_tanh"
  gated: bool = False
  norm: str = "layer"
  qk_norm: bool = False
  qkv_bias: bool = True
  attention_out_bias: bool = True
  ffn_bias: bool = True
  parallel_residual: bool = False
  rotary_fraction: float = 0.0
  rotary_base: float = 10_000.0
  rotary_scaling: RotaryScaling | None = None
  unrotated_layers: tuple[int, ...] = ()
  window: int | None = None
  full_attention_layers: tuple[int, ...] = ()
  position_offset: int = 0
  tied_head: bool = True
  epsilon: float = 1e-5
  remat: bool | str = False
  unroll: int = 1
  attention: str | None = None
  dtype: jax.typing.DTypeLike = jnp.float32

  def __post_init__(self):
    for name in _SIZES:
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    if self.head_width is None and self.width % self.num_heads:
      raise ValueError(
        f"width must be a multiple of num_heads, got {self.width} and {self.num_heads}"
      )
    if self.num_heads % self.kv_heads:
      raise ValueError(
        f"num_kv_heads must divide num_heads, got {self.num_kv_heads} and {self.num_heads}"
      )
    for name, allowed in (
      ("activation", tuple(ACTIVATIONS)),
      ("attention", ATTENTIONS),
      ("norm", NORMS),
      ("remat", (False, True, *POLICIES)),
    ):
      if getattr(self, name) not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
    if not 0 <= self.rotary_fraction <= 1:
      raise ValueError(f"rotary_fraction must be in [0, 1], got {self.rotary_fraction}")
    if self.rotary_fraction and (self.rotary_dim < 2 or self.rotary_dim % 2):
      raise ValueError(
        "rotary_fraction must leave an even number of each head's dimensions, at least 2, got "
        f"{self.rotary_fraction} of {self.head_dim}"
      )
    scaling = self.rotary_scaling
    if isinstance(scaling, DynamicScaling) and self.max_length > scaling.length:
      raise ValueError(
        f"max_length must be at most {scaling.length} with dynamic scaling, got {self.max_length}"
      )
    for name in ("unrotated_layers", "full_attention_layers"):
      layers = getattr(self, name)
      if not all(0 <= layer < self.num_layers for layer in layers):
        raise ValueError(f"{name} must be in [0, num_layers = {self.num_layers}), got {layers}")
    if self.position_offset < 0:
      raise ValueError(f"position_offset must not be negative, got {self.position_offset}")
    if not 1 <= self.unroll <= self.num_layers:
      raise ValueError(f"unroll must be in [1, num_layers = {self.num_layers}], got {self.unroll}")
    if not jnp.issubdtype(self.dtype, jnp.floating):
      raise ValueError(f"dtype must be a floating-point type, got {self.dtype}")

  @property
  def head_dim(self) -> int:
    """The number of dimensions of each head."""
    return self.head_width or self.width // self.num_heads

  @property
  def kv_heads(self) -> int:
    """The number of heads of keys and values."""
    return self.num_kv_heads or self.num_heads

  @property
  def rotary_dim(self) -> int:
    """The number of dimensions of each head that rotary positions rotate."""
    return int(self.head_dim * self.rotary_fraction)
