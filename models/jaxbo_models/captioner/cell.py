"""Gated recurrent cells whose inputs come from several places, each with a kernel of its own."""

from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.typing

CANDIDATES = ("tanh", "maxout")
CONTEXT_GATES = ("all", "candidate")


class CellWeights(NamedTuple):
  """The parameters of a cell, in the dtype of products; ``blocks`` is 4, or 5 with maxout.

  Attributes:
    inputs: for each input ``[its width, blocks * hidden_dim]``, or fewer columns: the last ones.
    recurrent: ``[hidden_dim, blocks * hidden_dim]``.
    bias: ``[blocks * hidden_dim]``, in float32 at least.
  """

  inputs: Mapping[str, jax.Array]
  recurrent: jax.Array
  bias: jax.Array


class CellParameters(nn.Module):
  """The parameters of a cell, to be used inside of a scan.

  Kernels of inputs begin normal, with the variance 1 / (width of all inputs together), recurrent
  kernels orthogonal for each gate, and biases with 0: as in :class:`flax.linen.LSTMCell`.

  Attributes:
    inputs: the width of each input.
    hidden_dim: the units.
    candidate: ``"tanh"``, or ``"maxout"``: the larger of two, without tanh.
    partial: the inputs that go into the candidate alone and into no gate.
    dtype: the dtype of products.
  """

  inputs: Mapping[str, int]
  hidden_dim: int
  candidate: str
  partial: tuple[str, ...]
  dtype: jax.typing.DTypeLike

  @nn.compact
  def __call__(self) -> CellWeights:
    """Returns the parameters, cast."""
    candidates = 2 if self.candidate == "maxout" else 1
    blocks = 3 + candidates
    init = nn.initializers.normal(sum(self.inputs.values()) ** -0.5)
    inputs = {}
    for name, width in self.inputs.items():
      columns = (candidates if name in self.partial else blocks) * self.hidden_dim
      inputs[name] = self.param(name, init, (width, columns), jnp.float32).astype(self.dtype)

    def orthogonal(key, shape, dtype):
      square = (self.hidden_dim, self.hidden_dim)
      make = lambda part: nn.initializers.orthogonal()(part, square, dtype)
      parts = jax.vmap(make)(jax.random.split(key, blocks))  # one decomposition to compile
      return jnp.swapaxes(parts, 0, 1).reshape(shape)

    columns = blocks * self.hidden_dim
    recurrent = self.param("recurrent", orthogonal, (self.hidden_dim, columns), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (columns,), jnp.float32)
    high = jnp.promote_types(self.dtype, jnp.float32)
    return CellWeights(inputs, recurrent.astype(self.dtype), bias.astype(high))


def into_last(sums: jax.Array, part: jax.Array) -> jax.Array:
  """Adds ``part [..., k]`` to the last ``k`` entries of ``sums [..., n]``."""
  if part.shape[-1] == sums.shape[-1]:
    return sums + part
  start = sums.shape[-1] - part.shape[-1]
  return jnp.concatenate([sums[..., :start], sums[..., start:] + part], axis=-1)


def update(
  sums: jax.Array, cell: jax.Array, candidate: str, dtype: jax.typing.DTypeLike
) -> tuple[jax.Array, jax.Array]:
  r"""The new hidden state and cell from the sums of all inputs.

  .. math:: c_t = \sigma(f) c_{t-1} + \sigma(i) g, \qquad h_t = \sigma(o) \tanh(c_t)

  with the blocks :math:`i, f, o` and then :math:`g = \tanh(s_1)`, or :math:`g = \max(s_1, s_2)`.

  Args:
    sums: ``[..., blocks * hidden_dim]`` in float32 at least.
    cell: ``[..., hidden_dim]`` in float32 at least.
    candidate: ``"tanh"`` or ``"maxout"``.
    dtype: that of the hidden state returned; the cell keeps its own.
  """
  width = cell.shape[-1]
  gates = jax.nn.sigmoid(sums[..., : 3 * width])
  inner, forget, outer = jnp.split(gates, 3, axis=-1)
  if candidate == "maxout":
    new = jnp.maximum(sums[..., 3 * width : 4 * width], sums[..., 4 * width :])
  else:
    new = jnp.tanh(sums[..., 3 * width :])
  cell = forget * cell + inner * new
  return (outer * jnp.tanh(cell)).astype(dtype), cell
