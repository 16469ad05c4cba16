"""Where each parameter of a transformer lies in a folder of tensors, and in which order."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxbo_models.transformer.config import TransformerConfig
from jaxbo_models.transformer.families import Family


class Place(NamedTuple):
  """Where a parameter of ours, of one layer, lies.

  Attributes:
    path: the names of our parameter in the tree.
    names: of the tensors; more than one if the first of our axes of outputs is divided.
    inputs: the sizes of our axes of inputs, () for biases and scales.
    outputs: the sizes of our axes of outputs.
    transposed: whether a tensor is ``[outputs, inputs]``.
    per_head: whether the outputs ``[parts, heads, head_dim]`` are ``[heads, parts, head_dim]``.
  """

  path: tuple[str, ...]
  names: Sequence[str]
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  transposed: bool
  per_head: bool = False

  @property
  def tensor_shape(self) -> tuple[int, ...]:
    """The shape of each tensor."""
    outputs = (math.prod(self.outputs) // len(self.names),)
    inputs = (math.prod(self.inputs),) if self.inputs else ()
    return outputs + inputs if self.transposed else inputs + outputs

  def ours(self, tensors: Sequence[np.ndarray]) -> np.ndarray:
    """Returns our parameter, of the shape ``inputs + outputs``."""
    parts = [tensor.T if self.transposed else tensor for tensor in tensors]
    whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
    if self.per_head:
      num_parts, heads, head_dim = self.outputs
      whole = whole.reshape(*whole.shape[:-1], heads, num_parts, head_dim).swapaxes(-3, -2)
    return whole.reshape(self.inputs + self.outputs)

  def theirs(self, ours: np.ndarray) -> list[np.ndarray]:
    """Returns the tensors: the inverse of :meth:`ours`."""
    inputs = (math.prod(self.inputs),) if self.inputs else ()
    whole = ours.reshape(inputs + self.outputs)
    if self.per_head:
      whole = whole.swapaxes(-3, -2)
    parts = np.split(whole.reshape(*inputs, -1), len(self.names), axis=-1)
    return [np.ascontiguousarray(part.T if self.transposed else part) for part in parts]


def outer_places(family: Family, config: TransformerConfig) -> Iterator[Place]:
  """The places of the parameters that are not in a block."""
  width, rows = (config.width,), (config.vocab_size,)
  embedding = f"{family.token_embedding}.weight"
  yield Place(("token_embedding",), [embedding], rows, width, transposed=False)
  yield from _norm(config, "final_norm", family.final_norm, config.width)
  if not config.rotary_fraction:
    rows = (config.position_offset + config.max_length,)
    name = f"{family.position_embedding}.weight"
    yield Place(("position_embedding",), [name], rows, width, transposed=False)
  if not config.tied_head:
    # The head is a Linear in every family, so its kernel is [outputs, inputs].
    name = f"{family.head}.weight"
    yield Place(("head", "kernel"), [name], width, (config.vocab_size,), transposed=True)


def block_places(family: Family, config: TransformerConfig) -> Iterator[Place]:
  """The places of a block's parameters; names are without those of the layer."""
  width, ffn_width = (config.width,), (config.ffn_width or 4 * config.width,)
  heads = (config.num_heads, config.head_dim)
  yield from _norm(config, "attention_norm", family.attention_norm, config.width)
  yield from _norm(config, "ffn_norm", family.ffn_norm, config.width)
  if config.qk_norm:
    yield from _norm(config, "query_norm", family.query_norm, config.head_dim)
    yield from _norm(config, "key_norm", family.key_norm, config.head_dim)

  def dense(
    ours: str,
    names: Sequence[str],
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    use_bias: bool,
    per_head: bool = False,
  ) -> Iterator[Place]:
    weights = [f"{name}.weight" for name in names]
    yield Place((ours, "kernel"), weights, inputs, outputs, family.transposed, per_head)
    if use_bias:
      biases = [f"{name}.bias" for name in names]
      yield Place((ours, "bias"), biases, (), outputs, family.transposed, per_head)

  if config.kv_heads == config.num_heads:
    yield from dense("qkv", family.qkv, width, (3, *heads), config.qkv_bias, family.per_head)
  else:
    kv_heads = (2, config.kv_heads, config.head_dim)
    yield from dense("query", family.qkv[:1], width, heads, config.qkv_bias)
    yield from dense("key_value", family.qkv[1:], width, kv_heads, config.qkv_bias)
  yield from dense("attention_out", [family.attention_out], heads, width, config.attention_out_bias)
  yield from dense("ffn_in", [family.ffn_in], width, ffn_width, config.ffn_bias)
  if config.gated:
    yield from dense("ffn_gate", [family.ffn_gate], width, ffn_width, config.ffn_bias)
  yield from dense("ffn_out", [family.ffn_out], ffn_width, width, config.ffn_bias)


def _norm(config: TransformerConfig, ours: str, name: str, size: int) -> Iterator[Place]:
  yield Place((ours, "scale"), [f"{name}.weight"], (), (size,), transposed=False)
  if config.norm == "layer":
    yield Place((ours, "bias"), [f"{name}.bias"], (), (size,), transposed=False)


def insert(tree: dict[str, Any], path: Sequence[str], leaf: Any) -> None:
  """Puts a leaf into a tree of dictionaries."""
  for name in path[:-1]:
    tree = tree.setdefault(name, {})
  tree[path[-1]] = leaf
