"""Loads GPT-2, OPT and GPT-NeoX weights from local folders in the Hugging Face hub's format."""

import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbo_models.transformer.config import TransformerConfig
from jaxbo_models.transformer.families import FAMILIES, Family
from jaxbo_models.transformer.model import Transformer


def from_safetensors(
  path: str | pathlib.Path, **overrides: Any
) -> tuple[Transformer, dict[str, Any]]:
  """Loads a GPT-2, OPT or GPT-NeoX (Pythia) language model from a local folder.

  The folder has the layout of the Hugging Face hub: ``config.json`` and either
  ``model.safetensors``, or shards and ``model.safetensors.index.json``. Nothing is downloaded.
  Install ``jaxbo-models[huggingface]`` for the package safetensors.

  >>> model, params = from_safetensors("pythia-70m", dtype=jnp.bfloat16)  # doctest: +SKIP

  Weights of any dtype become float32. Loading needs memory for one copy of the model and a second
  copy of one stack of layers.

  Args:
    path: the folder.
    **overrides: fields of :class:`TransformerConfig` that change how the model computes: ``dtype``,
      ``remat``, ``unroll``, ``attention``.

  Returns:
    The model and its parameters, for ``model.apply({"params": params}, tokens, mask)``.

  Raises:
    FileNotFoundError: the folder has no configuration or no safetensors.
    ValueError: :class:`Transformer` does not support the model (for example OPT-350M), a file is
      broken, or a tensor is missing, is unknown, or does not have the shape that the configuration
      implies.
  """
  path = pathlib.Path(path)
  settings = _read_json(path / "config.json")
  model_type = settings.get("model_type")
  if model_type not in FAMILIES:
    raise ValueError(f"model_type must be one of {list(FAMILIES)}, got {model_type!r} in {path}")
  family = FAMILIES[model_type]
  try:
    fields = family.configure(settings)
  except KeyError as error:
    raise ValueError(f"config.json must have {error.args[0]}, got none in {path}") from error
  config = TransformerConfig(**(fields | overrides))
  tensors = _Tensors(path, family.prefixes)
  params = _params(tensors, family, config)
  tensors.check_all_read(config.tied_head, family.head)
  return Transformer(config), params


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

  def __init__(self, path: pathlib.Path, prefixes: Sequence[str]):
    from safetensors import SafetensorError, safe_open

    index = path / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
      files = sorted(set(_read_json(index)["weight_map"].values()))
    self._path = path
    self._unread: dict[str, Callable[[], Any]] = {}
    for file in files:
      # Read JAX arrays, because NumPy has no bfloat16.
      try:
        opened = safe_open(_existing(path / file), framework="flax")
      except SafetensorError as error:  # A partial download, or a Git LFS pointer.
        raise ValueError(f"{path / file} is not a whole file of safetensors: {error}") from error
      names = opened.keys()
      for name in names:
        short = functools.reduce(str.removeprefix, prefixes, name)
        self._unread[short] = functools.partial(opened.get_tensor, name)

  def read(self, name: str, *shape: int) -> np.ndarray:
    """Returns the tensor in float32; raises ``ValueError`` if it does not have this shape."""
    if name not in self._unread:
      raise ValueError(f"{self._path} has no tensor {name}")
    tensor = np.asarray(self._unread.pop(name)(), np.float32)
    if tensor.shape != shape:
      raise ValueError(
        f"{name} must have the shape {shape} by config.json, got {tensor.shape} in {self._path}"
      )
    return tensor

  def check_all_read(self, tied_head: bool, head: str) -> None:
    """Raises ``ValueError`` if tensors are unread, except constants and a tied head."""
    for name in self._unread:
      if not (name.endswith(_BUFFERS) or (tied_head and name == f"{head}.weight")):
        raise ValueError(f"{self._path} has an unknown tensor {name}")


def _params(tensors: _Tensors, family: Family, config: TransformerConfig) -> dict[str, Any]:
  width, ffn_width = config.width, config.ffn_width or 4 * config.width

  def kernel(name: str, inputs: int, outputs: int) -> np.ndarray:
    if family.transposed:
      return tensors.read(f"{name}.weight", outputs, inputs).T
    return tensors.read(f"{name}.weight", inputs, outputs)

  def norm(name: str) -> dict[str, np.ndarray]:
    return {
      "scale": tensors.read(f"{name}.weight", width),
      "bias": tensors.read(f"{name}.bias", width),
    }

  def dense(name: str, inputs: int, outputs: int) -> dict[str, np.ndarray]:
    return {
      "kernel": kernel(name, inputs, outputs),
      "bias": tensors.read(f"{name}.bias", outputs),
    }

  def split(x: np.ndarray) -> np.ndarray:
    """Splits outputs into queries, keys and values, and each of these into heads."""
    if family.per_head:
      return x.reshape(*x.shape[:-1], config.num_heads, 3, config.head_dim).swapaxes(-3, -2)
    return x.reshape(*x.shape[:-1], 3, config.num_heads, config.head_dim)

  def qkv(layer: str) -> dict[str, np.ndarray]:
    outputs = 3 * width // len(family.qkv)
    parts = [dense(layer + name, width, outputs) for name in family.qkv]
    return jax.tree.map(lambda *leaves: split(np.concatenate(leaves, axis=-1)), *parts)

  def attention_out(layer: str) -> dict[str, np.ndarray]:
    out = dense(layer + family.attention_out, width, width)
    return out | {"kernel": out["kernel"].reshape(config.num_heads, config.head_dim, width)}

  def stack(read: Callable[[str], dict[str, np.ndarray]]) -> dict[str, jax.Array]:
    layers = [read(family.layer.format(i)) for i in range(config.num_layers)]
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *layers)

  params: dict[str, Any] = {
    "token_embedding": tensors.read(f"{family.token_embedding}.weight", config.vocab_size, width),
    "blocks": {
      "attention_norm": stack(lambda layer: norm(layer + family.attention_norm)),
      "qkv": stack(qkv),
      "attention_out": stack(attention_out),
      "ffn_norm": stack(lambda layer: norm(layer + family.ffn_norm)),
      "ffn_in": stack(lambda layer: dense(layer + family.ffn_in, width, ffn_width)),
      "ffn_out": stack(lambda layer: dense(layer + family.ffn_out, ffn_width, width)),
    },
    "final_norm": norm(family.final_norm),
  }
  if not config.rotary_fraction:
    num_rows = config.position_offset + config.max_length
    name = f"{family.position_embedding}.weight"
    params["position_embedding"] = tensors.read(name, num_rows, width)
  if not config.tied_head:
    # The head is a Linear in every family, so its kernel is [outputs, inputs].
    params["head"] = {"kernel": tensors.read(f"{family.head}.weight", config.vocab_size, width).T}
  return jax.tree.map(jnp.asarray, params)


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
