"""Loads language models from local folders in the Hugging Face hub's format."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax.numpy as jnp
import jax.typing
import numpy as np

from jaxbo_models.transformer.config import TransformerConfig
from jaxbo_models.transformer.families import FAMILIES, Family
from jaxbo_models.transformer.layout import block_places, insert, outer_places
from jaxbo_models.transformer.model import Transformer
from jaxbo_models.transformer.settings import ReadSettings, Settings, refuse


def from_safetensors(
  path: str | pathlib.Path,
  *,
  param_dtype: jax.typing.DTypeLike = jnp.float32,
  ignore: Collection[str] = (),
  **overrides: Any,
) -> tuple[Transformer, dict[str, Any]]:
  """Loads a language model from a local folder.

  The model is of the family GPT-2, OPT, GPT-NeoX (Pythia), Llama, Mistral, Qwen2, Qwen3, SmolLM or
  SmolLM3. The folder has the layout of the Hugging Face hub: ``config.json`` and either
  ``model.safetensors`` (which is read if both are there), or shards and
  ``model.safetensors.index.json``. Nothing is downloaded. Install ``jaxbo-models[huggingface]``
  for the package safetensors.

  >>> model, params = from_safetensors("pythia-70m", dtype=jnp.bfloat16)  # doctest: +SKIP

  By default weights of any dtype become float32. Loading needs memory for one copy of the model and
  a second copy of one stack of layers. If ``config.json`` ties the head to the embedding but the
  folder has another head, the model uses that head, as in transformers.

  Args:
    path: the folder.
    param_dtype: dtype of the parameters, such as bfloat16 for weights that are not trained.
    ignore: settings of ``config.json`` that you know to have no effect. The function refuses other
      settings that it does not know.
    **overrides: fields of :class:`TransformerConfig` that change how the model computes: ``dtype``,
      ``remat``, ``unroll``, ``attention``; and ``max_length``, which crops learned positions.

  Returns:
    The model and its parameters, for ``model.apply({"params": params}, tokens, mask)``.

  Raises:
    FileNotFoundError: the folder has no configuration or no safetensors.
    ValueError: :class:`Transformer` does not support the model (for example OPT-350M) or one of its
      settings, a file is broken, or a tensor is missing, is unknown, or does not have the shape
      that the configuration implies.
  """
  path = pathlib.Path(path)
  settings = _read_json(path / "config.json")
  model_type = settings.get("model_type")
  if model_type not in FAMILIES:
    raise ValueError(f"model_type must be one of {list(FAMILIES)}, got {model_type!r} in {path}")
  family = FAMILIES[model_type]
  try:
    fields = read_fields(family, settings, ignore)
  except KeyError as error:
    raise ValueError(f"config.json must have {error.args[0]}, got none in {path}") from error
  for name, value in fields.items():
    if value is None and name not in _OPTIONAL:
      raise ValueError(f"config.json must give a value for {name}, got null in {path}")
  stored = TransformerConfig(**(fields | overrides | {"max_length": fields["max_length"]}))
  tensors = _Tensors(path, family)
  if stored.tied_head and tensors.has_another_head():
    stored = dataclasses.replace(stored, tied_head=False)
  config = dataclasses.replace(stored, max_length=overrides.get("max_length", stored.max_length))
  params = _params(tensors, family, stored, param_dtype)
  _crop_positions(params, stored, config)
  tensors.check_all_read()
  return Transformer(config), params


def read_fields(family: Family, settings: Settings, ignore: Collection[str] = ()) -> dict[str, Any]:
  """The fields of :class:`TransformerConfig` in ``config.json``; refuses settings not known."""
  noted = ReadSettings(settings)
  refuse(noted, "is_encoder_decoder", "add_cross_attention", "pruned_heads")
  fields = family.configure(noted)
  noted.check_all_read(ignore)
  return fields


_OPTIONAL = ("num_kv_heads", "head_width", "ffn_width", "rotary_scaling", "window")
# Constants that some versions of transformers saved with the weights.
_BUFFERS = (
  ".attn.bias",
  ".attn.masked_bias",
  ".attention.bias",
  ".attention.masked_bias",
  ".rotary_emb.inv_freq",
)


class _Tensors:
  """The tensors in a folder by their names without prefix; each can be read once."""

  def __init__(self, path: pathlib.Path, family: Family):
    from safetensors import SafetensorError, safe_open

    index = path / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists() and not (path / files[0]).exists():  # A single file comes first.
      files = sorted(set(_read_json(index)["weight_map"].values()))
    self._path = path
    self._embedding, self._head = f"{family.token_embedding}.weight", f"{family.head}.weight"
    self._unread: dict[str, Callable[[], Any]] = {}
    for file in files:
      # Read JAX arrays, because NumPy has no bfloat16.
      try:
        opened = safe_open(_existing(path / file), framework="flax")
      except SafetensorError as error:  # A partial download, or a Git LFS pointer.
        raise ValueError(f"{path / file} is not a whole file of safetensors: {error}") from error
      names = opened.keys()
      for name in names:
        short = functools.reduce(str.removeprefix, family.prefixes, name)
        self._unread[short] = functools.partial(opened.get_tensor, name)

  def read(self, name: str, shape: Sequence[int]) -> np.ndarray:
    """Returns the tensor; raises ``ValueError`` if it does not have this shape."""
    if name not in self._unread:
      raise ValueError(f"{self._path} has no tensor {name}")
    tensor = np.asarray(self._unread.pop(name)())
    if tensor.shape != shape:
      raise ValueError(
        f"{name} must have the shape {shape} by config.json, got {tensor.shape} in {self._path}"
      )
    return tensor

  def has_another_head(self) -> bool:
    """Whether there is a head that is not the embedding; one that is need not be read."""
    if self._head not in self._unread:
      return False
    head = self._unread[self._head]
    if self._embedding not in self._unread:  # Either may be saved in the name of both.
      self._unread[self._embedding] = self._unread.pop(self._head)
      return False
    if np.array_equal(head(), self._unread[self._embedding]()):
      del self._unread[self._head]
      return False
    return True

  def check_all_read(self) -> None:
    """Raises ``ValueError`` if tensors are unread, except constants."""
    for name in self._unread:
      if not name.endswith(_BUFFERS):
        raise ValueError(f"{self._path} has an unknown tensor {name}")


def _params(
  tensors: _Tensors,
  family: Family,
  config: TransformerConfig,
  dtype: jax.typing.DTypeLike,
) -> dict[str, Any]:
  params: dict[str, Any] = {}
  for place in outer_places(family, config):
    read = [tensors.read(name, place.tensor_shape) for name in place.names]
    insert(params, place.path, jnp.asarray(place.ours(read), dtype))
  for place in block_places(family, config):
    layers = [
      place.ours(
        [
          tensors.read(family.layer.format(layer) + name, place.tensor_shape)
          for name in place.names
        ]
      )
      for layer in range(config.num_layers)
    ]
    insert(params, ("blocks", *place.path), jnp.asarray(np.stack(layers), dtype))
  return params


def _crop_positions(
  params: dict[str, Any], stored: TransformerConfig, config: TransformerConfig
) -> None:
  """Leaves out the learned positions from ``max_length`` on."""
  if stored.rotary_fraction:
    return
  if config.max_length > stored.max_length:
    raise ValueError(
      f"max_length must be at most {stored.max_length}, the learned positions; got "
      f"{config.max_length}"
    )
  num_rows = config.position_offset + config.max_length
  params["position_embedding"] = params["position_embedding"][:num_rows]


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    return json.loads(_existing(path).read_text())
  except json.JSONDecodeError as error:
    raise ValueError(f"{path} is not JSON: {error}") from error


def _existing(path: pathlib.Path) -> pathlib.Path:
  if not path.exists():
    raise FileNotFoundError(
      f"{path} does not exist: a model is a folder with config.json and model.safetensors, as "
      "transformers' save_pretrained writes it"
    )
  return path
