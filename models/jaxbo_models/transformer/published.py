"""The published sizes of families of models."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxbo_models.transformer.config import LLAMA_FIELDS, TransformerConfig
from jaxbo_models.transformer.rotary import Llama3Scaling

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


class _Gated(NamedTuple):
  """A size of a model in the family of Llama."""

  num_layers: int
  width: int
  num_heads: int
  num_kv_heads: int
  ffn_width: int
  vocab_size: int
  max_length: int
  rotary_base: float
  others: Mapping[str, Any]


_LLAMA = {
  "2-7b": _Gated(32, 4096, 32, 32, 11008, 32000, 4096, 1e4, {"tied_head": False}),
  "3.1-8b": _Gated(
    *(32, 4096, 32, 8, 14336, 128256, 131072, 5e5),
    {"rotary_scaling": Llama3Scaling(8.0, 1.0, 4.0, 8192), "tied_head": False},
  ),
  "3.2-1b": _Gated(
    *(16, 2048, 32, 8, 8192, 128256, 131072, 5e5),
    {"rotary_scaling": Llama3Scaling(32.0, 1.0, 4.0, 8192)},
  ),
  "3.2-3b": _Gated(
    *(28, 3072, 24, 8, 8192, 128256, 131072, 5e5),
    {"rotary_scaling": Llama3Scaling(32.0, 1.0, 4.0, 8192)},
  ),
}
_MISTRAL = {
  "7b-v0.1": _Gated(32, 4096, 32, 8, 14336, 32000, 32768, 1e4, {"window": 4096}),
  "7b-v0.3": _Gated(32, 4096, 32, 8, 14336, 32768, 32768, 1e6, {}),
}
_QWEN2 = {
  "0.5b": _Gated(24, 896, 14, 2, 4864, 151936, 32768, 1e6, {}),
  "1.5b": _Gated(28, 1536, 12, 2, 8960, 151936, 131072, 1e6, {}),
  "7b": _Gated(28, 3584, 28, 4, 18944, 152064, 131072, 1e6, {"tied_head": False}),
}
_QWEN3 = {
  "0.6b": _Gated(28, 1024, 16, 8, 3072, 151936, 40960, 1e6, {}),
  "1.7b": _Gated(28, 2048, 16, 8, 6144, 151936, 40960, 1e6, {}),
}
_SMOLLM = {
  "135m": _Gated(30, 576, 9, 3, 1536, 49152, 2048, 1e4, {}),
  "360m": _Gated(32, 960, 15, 5, 2560, 49152, 2048, 1e4, {}),
  "1.7b": _Gated(24, 2048, 32, 32, 8192, 49152, 2048, 1e4, {}),
}


def llama(size: str = "3.2-1b", **overrides: Any) -> TransformerConfig:
  """Llama: RMSNorm, SwiGLU, grouped queries, rotary positions, and no biases.

  >>> llama().head_dim
  64

  Sources: Touvron et al. (https://arxiv.org/abs/2307.09288) and *The Llama 3 herd of models*
  (https://arxiv.org/abs/2407.21783).

  Args:
    size: ``"2-7b"``, ``"3.1-8b"``, ``"3.2-1b"`` (1,235,814,400 parameters) or ``"3.2-3b"``.
    **overrides: fields of :class:`TransformerConfig` to change.

  Raises:
    ValueError: ``size`` is unknown, or a field is out of its range.
  """
  return _gated(_LLAMA, size, overrides)


def mistral(size: str = "7b-v0.3", **overrides: Any) -> TransformerConfig:
  """Mistral: Llama with an untied head and, in version 0.1, a sliding window.

  >>> mistral("7b-v0.1").window
  4096

  Source: Jiang et al. (https://arxiv.org/abs/2310.06825).

  Args:
    size: ``"7b-v0.1"`` or ``"7b-v0.3"`` (7,248,023,552 parameters).
    **overrides: fields of :class:`TransformerConfig` to change.

  Raises:
    ValueError: ``size`` is unknown, or a field is out of its range.
  """
  return _gated(_MISTRAL, size, overrides, tied_head=False)


def qwen2(size: str = "0.5b", **overrides: Any) -> TransformerConfig:
  """Qwen2 and Qwen2.5: Llama with biases of queries, keys and values.

  >>> qwen2().qkv_bias
  True

  Source: the Qwen team (https://arxiv.org/abs/2412.15115).

  Args:
    size: ``"0.5b"`` (494,032,768 parameters), ``"1.5b"`` or ``"7b"``.
    **overrides: fields of :class:`TransformerConfig` to change.

  Raises:
    ValueError: ``size`` is unknown, or a field is out of its range.
  """
  return _gated(_QWEN2, size, overrides, qkv_bias=True, epsilon=1e-6)


def qwen3(size: str = "0.6b", **overrides: Any) -> TransformerConfig:
  """Qwen3: Llama with normalized queries and keys, and heads of 128 dimensions.

  >>> qwen3().head_dim
  128

  Source: the Qwen team (https://arxiv.org/abs/2505.09388).

  Args:
    size: ``"0.6b"`` (596,049,920 parameters) or ``"1.7b"``.
    **overrides: fields of :class:`TransformerConfig` to change.

  Raises:
    ValueError: ``size`` is unknown, or a field is out of its range.
  """
  return _gated(_QWEN3, size, overrides, qk_norm=True, head_width=128, epsilon=1e-6)


def smollm(size: str = "135m", **overrides: Any) -> TransformerConfig:
  """SmolLM: small models with the architecture of Llama.

  >>> smollm().width
  576

  Source: Ben Allal et al. (https://arxiv.org/abs/2502.02737 describes its successor).

  Args:
    size: ``"135m"`` (134,515,008 parameters), ``"360m"`` or ``"1.7b"``.
    **overrides: fields of :class:`TransformerConfig` to change.

  Raises:
    ValueError: ``size`` is unknown, or a field is out of its range.
  """
  return _gated(_SMOLLM, size, overrides)


def _gated(
  sizes: Mapping[str, _Gated], size: str, overrides: dict[str, Any], **family: Any
) -> TransformerConfig:
  if size not in sizes:
    raise ValueError(f"size must be one of {list(sizes)}, got {size!r}")
  shape = sizes[size]._asdict()
  others = shape.pop("others")
  fields = dict(LLAMA_FIELDS) | shape | family | others
  if "num_heads" in overrides:
    fields.pop("num_kv_heads")  # As many as heads, unless it is given too.
  return TransformerConfig(**(fields | overrides))


def _published(
  sizes: Mapping[str, tuple[int, int, int]], size: str, overrides: dict[str, Any], **family: Any
) -> TransformerConfig:
  if size not in sizes:
    raise ValueError(f"size must be one of {list(sizes)}, got {size!r}")
  num_layers, width, num_heads = sizes[size]
  shape: dict[str, Any] = {"num_layers": num_layers, "width": width, "num_heads": num_heads}
  return TransformerConfig(**(shape | family | overrides))
