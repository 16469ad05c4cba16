"""The configuration of a decoder-only transformer, and the published sizes."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import jax.typing

ACTIVATIONS = {
  "gelu_tanh": nn.gelu,
  "gelu": functools.partial(nn.gelu, approximate=False),
  "relu": nn.relu,
}
ATTENTIONS = (None, "xla", "cudnn")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """The configuration of a :class:`Transformer`; immutable and hashable.

  >>> TransformerConfig(vocab_size=257, max_length=64, num_layers=2, width=32, num_heads=4).head_dim
  8

  Attributes:
    vocab_size: number of tokens; ids are in [0, vocab_size).
    max_length: length of the longest sequence, in tokens.
    num_layers: number of blocks.
    width: width of the residual stream; a multiple of ``num_heads``.
    num_heads: number of attention heads.
    ffn_width: number of hidden units in the feed-forward layer; None for four times the width.
    activation: ``"gelu_tanh"`` (GPT-2's approximation), ``"gelu"`` (exact) or ``"relu"``.
    parallel_residual: True computes ``x + attention(norm(x)) + ffn(norm'(x))``; False applies
      attention first and the feed-forward layer to its result.
    rotary_fraction: share of each head's dimensions that rotary positions rotate, in (0, 1]; 0 for
      a learned table of positions.
    rotary_base: base of the wavelengths of rotary positions.
    position_offset: number of unused rows at the top of the learned table: 2 for OPT.
    tied_head: True uses the embedding as the kernel of the head; False gives the head its own
      kernel.
    epsilon: the constant that layer normalization adds to the variance.
    remat: recompute each block in the backward pass. Memory then holds one block's activations and
      the residual stream of every block; the cost is 4/3 of the operations. With
      ``unroll=num_layers`` there is no loop, and XLA's CPU backend undoes the recomputation.
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
  ffn_width: int | None = None
  activation: str = "gelu_tanh"
  parallel_residual: bool = False
  rotary_fraction: float = 0.0
  rotary_base: float = 10_000.0
  position_offset: int = 0
  tied_head: bool = True
  epsilon: float = 1e-5
  remat: bool = False
  unroll: int = 1
  attention: str | None = None
  dtype: jax.typing.DTypeLike = jnp.float32

  def __post_init__(self):
    for name in ("vocab_size", "max_length", "num_layers", "width", "num_heads", "ffn_width"):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    if self.width % self.num_heads:
      raise ValueError(
        f"width must be a multiple of num_heads, got {self.width} and {self.num_heads}"
      )
    for name, allowed in (
      ("activation", tuple(ACTIVATIONS)),
      ("attention", ATTENTIONS),
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
    if self.position_offset < 0:
      raise ValueError(f"position_offset must not be negative, got {self.position_offset}")
    if not 1 <= self.unroll <= self.num_layers:
      raise ValueError(f"unroll must be in [1, num_layers = {self.num_layers}], got {self.unroll}")
    if not jnp.issubdtype(self.dtype, jnp.floating):
      raise ValueError(f"dtype must be a floating-point type, got {self.dtype}")

  @property
  def head_dim(self) -> int:
    """The number of dimensions of each head."""
    return self.width // self.num_heads

  @property
  def rotary_dim(self) -> int:
    """The number of dimensions of each head that rotary positions rotate."""
    return int(self.head_dim * self.rotary_fraction)


# Layers, width, heads.
_GPT2 = {
  "small": (12, 768, 12),
  "medium": (24, 1024, 16),
  "large": (36, 1280, 20),
  "xl": (48, 1600, 25),
}
_OPT = {
  "125m": (12, 768, 12),
  "1.3b": (24, 2048, 32),
  "2.7b": (32, 2560, 32),
  "6.7b": (32, 4096, 32),
}
_PYTHIA = {
  "70m": (6, 512, 8),
  "160m": (12, 768, 12),
  "410m": (24, 1024, 16),
  "1b": (16, 2048, 8),
  "1.4b": (24, 2048, 16),
  "2.8b": (32, 2560, 32),
}


def gpt2(size: str = "small", **overrides: Any) -> TransformerConfig:
  """GPT-2: learned positions, GELU in its tanh approximation, and a tied head.

  >>> gpt2(num_layers=2).width
  768

  Source: Radford et al., *Language models are unsupervised multitask learners* (2019).

  Args:
    size: ``"small"`` (124,439,808 parameters), ``"medium"``, ``"large"`` or ``"xl"``.
    **overrides: fields of :class:`TransformerConfig` to change.

  Raises:
    ValueError: ``size`` is unknown, or a field is out of its range.
  """
  return _published(_GPT2, size, overrides, vocab_size=50257, max_length=1024)


def opt(size: str = "125m", **overrides: Any) -> TransformerConfig:
  """OPT: learned positions that start at row 2 of their table, ReLU, and a tied head.

  The 350M model is not supported: it normalizes after its layers and projects its embedding.

  >>> opt().activation
  'relu'

  Source: Zhang et al., *OPT: open pre-trained transformer language models*
  (https://arxiv.org/abs/2205.01068).

  Args:
    size: ``"125m"`` (125,239,296 parameters), ``"1.3b"``, ``"2.7b"`` or ``"6.7b"``.
    **overrides: fields of :class:`TransformerConfig` to change.

  Raises:
    ValueError: ``size`` is unknown, or a field is out of its range.
  """
  return _published(
    _OPT, size, overrides, vocab_size=50272, max_length=2048, position_offset=2, activation="relu"
  )


def pythia(size: str = "160m", **overrides: Any) -> TransformerConfig:
  """Pythia, the small GPT-NeoX models: rotary positions, parallel residuals, and an untied head.

  Positions rotate a quarter of each head. GELU is exact.

  >>> pythia("70m").rotary_dim
  16

  Source: Biderman et al., *Pythia* (https://arxiv.org/abs/2304.01373).

  Args:
    size: ``"70m"`` (70,426,624 parameters), ``"160m"`` (162,322,944), ``"410m"``, ``"1b"``,
      ``"1.4b"`` or ``"2.8b"``.
    **overrides: fields of :class:`TransformerConfig` to change.

  Raises:
    ValueError: ``size`` is unknown, or a field is out of its range.
  """
  return _published(
    _PYTHIA,
    size,
    overrides,
    vocab_size=50304,
    max_length=2048,
    activation="gelu",
    parallel_residual=True,
    rotary_fraction=0.25,
    tied_head=False,
  )


def _published(
  sizes: Mapping[str, tuple[int, int, int]], size: str, overrides: dict[str, Any], **family: Any
) -> TransformerConfig:
  if size not in sizes:
    raise ValueError(f"size must be one of {list(sizes)}, got {size!r}")
  num_layers, width, num_heads = sizes[size]
  shape: dict[str, Any] = {"num_layers": num_layers, "width": width, "num_heads": num_heads}
  return TransformerConfig(**(shape | family | overrides))
