"""Saves language models in the Hugging Face hub's format, which transformers reads."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import jax.typing
import numpy as np

from jaxbo_models.transformer.config import TransformerConfig
from jaxbo_models.transformer.families import FAMILIES, Family
from jaxbo_models.transformer.layout import Place, block_places, outer_places
from jaxbo_models.transformer.model import Transformer
from jaxbo_models.transformer.settings import HARMLESS


def save_safetensors(
  path: str | pathlib.Path,
  model: Transformer,
  params: Mapping[str, Any],
  *,
  model_type: str | None = None,
  settings: Mapping[str, Any] | None = None,
  dtype: jax.typing.DTypeLike | None = None,
) -> None:
  """Writes ``config.json`` and ``model.safetensors``, the inverse of :func:`from_safetensors`.

  The transformers library reads the folder, too. Install ``jaxbo-models[huggingface]`` for the
  package safetensors. Saving needs memory for two copies of the model on the host. It does not save
  tokenizers: copy their files.

  >>> save_safetensors("tuned", model, params)  # doctest: +SKIP

  Args:
    path: the folder; it is created if needed, and a model in it is overwritten.
    model: the model.
    params: its parameters; merge adapters first.
    model_type: the family: ``"gpt2"``, ``"opt"``, ``"gpt_neox"``, ``"llama"``, ``"mistral"``,
      ``"qwen2"``, ``"qwen3"`` or ``"smollm3"``. None takes the family of ``settings``, or else the
      first of these families that can represent the model.
    settings: settings of another ``config.json`` to keep, such as that of the model that was tuned,
      or ``{"eos_token_id": 2}``. Settings that say what the model computes come from ``model``.
    dtype: dtype of the file; None for the dtypes of the parameters.

  Raises:
    ValueError: no family, or not the requested one, can represent the model; or ``params`` are not
      the parameters of the model.
  """
  family_name, written = _describe(model.config, model_type, settings or {})
  tensors = _tensors(FAMILIES[family_name], model.config, params, dtype)
  dtypes = {tensor.dtype.name for tensor in tensors.values()}
  written["torch_dtype"] = dtypes.pop() if len(dtypes) == 1 else "float32"

  from safetensors.flax import save_file

  path = pathlib.Path(path)
  path.mkdir(parents=True, exist_ok=True)
  save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
  (path / "config.json").write_text(json.dumps(written, indent=2) + "\n")


def _describe(
  config: TransformerConfig, model_type: str | None, settings: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
  """The family that can be the model, and its settings, which were read again to be sure."""
  model_type = model_type or settings.get("model_type")
  able = {name: family for name, family in FAMILIES.items() if family.architecture}
  model_type = "llama" if model_type == "smollm" else model_type  # As in transformers.
  if model_type is not None and model_type not in able:
    raise ValueError(f"model_type must be one of {list(able)}, got {model_type!r}")
  wanted = _architecture(config)
  for name in able if model_type is None else [model_type]:
    family = able[name]
    described = family.describe(config)
    if _architecture(TransformerConfig(**family.configure(described))) == wanted:
      kept = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
      kept |= {name: value for name, value in settings.items() if name in HARMLESS - {"dtype"}}
      return name, kept | described | {
        "model_type": name,
        "architectures": [family.architecture],
      }
  raise ValueError(
    f"model must be one that transformers' {model_type or list(able)} can represent, got {config}"
  )


def _architecture(config: TransformerConfig) -> TransformerConfig:
  """The configuration without what says how, but not what, the model computes."""
  learned = config.rotary_fraction == 0
  default = TransformerConfig(1, 1, 1, 1, 1)
  same = ("dtype", "remat", "unroll", "attention")
  same += ("rotary_base", "rotary_scaling", "unrotated_layers") if learned else ("position_offset",)
  return dataclasses.replace(
    config,
    head_width=config.head_dim,
    num_kv_heads=config.kv_heads,
    ffn_width=config.ffn_width or 4 * config.width,
    full_attention_layers=() if config.window is None else config.full_attention_layers,
    **{name: getattr(default, name) for name in same},
  )


def _tensors(
  family: Family,
  config: TransformerConfig,
  params: Mapping[str, Any],
  dtype: jax.typing.DTypeLike | None,
) -> dict[str, Any]:
  leaves = {
    tuple(key.key for key in path): leaf for path, leaf in jax.tree.leaves_with_path(params)
  }
  prefix = "".join(family.prefixes)
  tensors: dict[str, Any] = {}

  def take(path: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
    if path not in leaves or leaves[path].shape != shape:
      found = leaves[path].shape if path in leaves else "none"
      raise ValueError(f"params must have {'/'.join(path)} of the shape {shape}, got {found}")
    leaf = np.asarray(jax.device_get(leaves.pop(path)))
    return leaf if dtype is None else leaf.astype(dtype)

  def put(place: Place, begin: str, ours: np.ndarray) -> None:
    for name, tensor in zip(place.names, place.theirs(ours), strict=True):
      tensors[begin + name] = jnp.asarray(tensor)

  for place in outer_places(family, config):
    begin = "" if place.path[0] == "head" else prefix
    put(place, begin, take(place.path, place.inputs + place.outputs))
  for place in block_places(family, config):
    shape = (config.num_layers, *place.inputs, *place.outputs)
    for layer, ours in enumerate(take(("blocks", *place.path), shape)):
      put(place, prefix + family.layer.format(layer), ours)
  if leaves:
    raise ValueError(
      f"params must be those of the model, got {['/'.join(path) for path in leaves]}"
    )
  return tensors
