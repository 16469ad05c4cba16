"""How ``config.json`` is read: Llama, Mistral, Qwen2, Qwen3, SmolLM and SmolLM3."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from jaxbo_models.transformer.config import LLAMA_FIELDS
from jaxbo_models.transformer.rotary import (
  DynamicScaling,
  LinearScaling,
  Llama3Scaling,
  RotaryScaling,
  YarnScaling,
)
from jaxbo_models.transformer.settings import Settings, activation, refuse, require_known


def _read(
  settings: Settings,
  *,
  max_length: int,
  num_kv_heads: int | None = None,
  head_width: int | None = None,
  rotary_base: float = 10_000.0,
  tied_head: bool = False,
) -> dict[str, Any]:
  """The fields that all have in common; the arguments are what transformers takes for granted."""
  refuse(settings, "rope_interleaved", "use_mrope")
  width, num_heads = settings["hidden_size"], settings["num_attention_heads"]
  head_width = settings.get("head_dim", head_width)
  max_length = settings.get("max_position_embeddings", max_length) or max_length
  base, scaling = _rotary(settings, rotary_base, max_length)
  return dict(LLAMA_FIELDS) | {
    "vocab_size": settings["vocab_size"],
    "max_length": max_length,
    "num_layers": settings["num_hidden_layers"],
    "width": width,
    "num_heads": num_heads,
    "num_kv_heads": settings.get("num_key_value_heads", num_kv_heads) or num_heads,
    "head_width": None if head_width and head_width * num_heads == width else head_width,
    "ffn_width": settings["intermediate_size"],
    "activation": activation(settings.get("hidden_act", "silu")),
    "rotary_base": base,
    "rotary_scaling": scaling,
    "epsilon": settings.get("rms_norm_eps", 1e-6),
    "tied_head": settings.get("tie_word_embeddings", tied_head),
  }


def _biases(settings: Settings) -> dict[str, Any]:
  of_attention = bool(settings.get("attention_bias", False))
  return {"qkv_bias": of_attention, "attention_out_bias": of_attention}


def read_llama(settings: Settings) -> dict[str, Any]:
  """Fields of Llama's and SmolLM's models."""
  fields = _read(settings, max_length=2048)
  return fields | _biases(settings) | {"ffn_bias": bool(settings.get("mlp_bias", False))}


def read_mistral(settings: Settings) -> dict[str, Any]:
  """Fields of Mistral's models."""
  fields = _read(settings, max_length=131_072, num_kv_heads=8)
  return fields | {"window": settings.get("sliding_window", 4096)}


def read_qwen2(settings: Settings) -> dict[str, Any]:
  """Fields of Qwen2's and Qwen2.5's models."""
  fields = _read(settings, max_length=32_768, num_kv_heads=32)
  return fields | {"qkv_bias": True} | _qwen_windows(settings)


def read_qwen3(settings: Settings) -> dict[str, Any]:
  """Fields of Qwen3's models."""
  fields = _read(settings, max_length=32_768, num_kv_heads=32, head_width=128)
  return fields | {"qk_norm": True} | _biases(settings) | _qwen_windows(settings)


def read_smollm3(settings: Settings) -> dict[str, Any]:
  """Fields of SmolLM3's models: every fourth layer does not rotate."""
  fields = _read(
    settings, max_length=32_768, num_kv_heads=4, rotary_base=2_000_000.0, tied_head=True
  )
  layers = range(settings["num_hidden_layers"])
  interval = settings.get("no_rope_layer_interval", 4)
  rotated = settings.get("no_rope_layers") or [(i + 1) % interval != 0 for i in layers]
  if len(rotated) < len(layers):
    raise ValueError(
      f"no_rope_layers in config.json must have an entry for each of {len(layers)} layers, got "
      f"{rotated}"
    )
  unrotated = tuple(i for i in layers if not rotated[i])
  kinds = [i in unrotated for i in layers]
  settings.get("max_window_layers")  # In the published file, and of no effect.
  return (
    fields
    | _biases(settings)
    | {"ffn_bias": bool(settings.get("mlp_bias", False)), "unrotated_layers": unrotated}
    | _windows(settings, kinds)
  )


def _qwen_windows(settings: Settings) -> dict[str, Any]:
  given = settings.get("max_window_layers")
  first = 28 if given is None else given
  return _windows(settings, [i >= first for i in range(settings["num_hidden_layers"])])


def _windows(settings: Settings, has_window: Sequence[bool]) -> dict[str, Any]:
  """The window, and the layers without it: ``layer_types`` says which, or ``has_window``."""
  used, window = settings.get("use_sliding_window", False), settings.get("sliding_window", 4096)
  types = settings.get("layer_types")
  if types is not None:
    kinds = {"full_attention": False, "sliding_attention": True}
    unknown = [kind for kind in types if kind not in kinds]
    if unknown or len(types) != len(has_window):
      raise ValueError(
        f"layer_types in config.json must be {list(kinds)} for each of {len(has_window)} layers, "
        f"got {types}"
      )
    has_window = [kinds[kind] for kind in types]
  if types is not None and any(has_window) and not (used and window):
    raise ValueError(
      f"layer_types in config.json must be full_attention without a window, got {types}"
    )
  if not used or window is None or not any(has_window):
    return {}
  full = tuple(i for i, windowed in enumerate(has_window) if not windowed)
  return {"window": window, "full_attention_layers": full}


def _rotary(settings: Settings, base: float, max_length: int) -> tuple[float, RotaryScaling | None]:
  """The base of rotary positions, and their scaling.

  Since transformers 5 both are in ``rope_parameters``; before, in ``rope_theta`` and
  ``rope_scaling``, which are still read, and first.
  """
  new, old = settings.get("rope_parameters"), settings.get("rope_scaling")
  default = settings.get("rope_theta", base)
  rope = dict(old or new or {})
  base = float(rope.pop("rope_theta", default))
  original = settings.get("original_max_position_embeddings")
  if original is not None:
    rope["original_max_position_embeddings"] = original
  also = rope.pop("type", None)
  kind = rope.pop("rope_type", also or "default")
  partial = rope.pop("partial_rotary_factor", settings.get("partial_rotary_factor"))
  if partial not in (None, 1):
    raise ValueError(f"partial_rotary_factor in config.json must be 1, got {partial}")
  if kind not in _SCALINGS:
    raise ValueError(f"rope_type in config.json must be one of {list(_SCALINGS)}, got {kind!r}")
  known, make = _SCALINGS[kind]
  require_known(rope, f"the rotary scaling {kind}", (*known, "original_max_position_embeddings"))
  try:
    return base, make(rope, max_length)
  except KeyError as error:
    raise ValueError(f"the rotary scaling {kind} must have {error.args[0]}, got {rope}") from error


def _linear(rope: Settings, max_length: int) -> LinearScaling:
  return LinearScaling(float(rope["factor"]))


def _llama3(rope: Settings, max_length: int) -> Llama3Scaling:
  low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
  if low >= high:
    raise ValueError(f"low_freq_factor must be less than high_freq_factor, got {low} and {high}")
  original = rope.get("original_max_position_embeddings", max_length)
  return Llama3Scaling(float(rope["factor"]), low, high, original)


def _yarn(rope: Settings, max_length: int) -> YarnScaling:
  original = rope.get("original_max_position_embeddings") or max_length
  factor = rope["factor"]
  factor = max_length / original if factor is None else factor

  def sharpness(scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

  attention_factor = rope.get("attention_factor")
  if attention_factor is None:
    over, under = rope.get("mscale"), rope.get("mscale_all_dim")
    attention_factor = sharpness(1.0)
    if over and under:
      attention_factor = sharpness(float(over)) / sharpness(float(under))
  return YarnScaling(
    factor=float(factor),
    length=original,
    attention_factor=float(attention_factor),
    beta_fast=float(rope.get("beta_fast") or 32),
    beta_slow=float(rope.get("beta_slow") or 1),
    truncate=rope.get("truncate", True),
  )


def _none(rope: Settings, max_length: int) -> None:
  return None


def _dynamic(rope: Settings, max_length: int) -> DynamicScaling:
  return DynamicScaling(float(rope["factor"]), max_length)


_SCALINGS: dict[str, tuple[Sequence[str], Callable[[Settings, int], RotaryScaling | None]]] = {
  "default": ((), _none),
  "linear": (("factor",), _linear),
  "dynamic": (("factor",), _dynamic),
  "llama3": (("factor", "low_freq_factor", "high_freq_factor"), _llama3),
  "yarn": (
    (
      *("factor", "attention_factor", "beta_fast", "beta_slow"),
      *("mscale", "mscale_all_dim", "truncate"),
    ),
    _yarn,
  ),
}
