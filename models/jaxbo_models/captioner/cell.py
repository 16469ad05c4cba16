"""Gated recurrent cells with several inputs and a separate kernel for each."""

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
    inputs: the kernel of each input, ``[input width, blocks * hidden_dim]``; an input that goes
      into the candidate alone has only the last columns.
    recurrent: the recurrent kernel, ``[hidden_dim, blocks * hidden_dim]``.
    bias: ``[blocks * hidden_dim]``, in float32 at least.
  """

  inputs: Mapping[str, jax.Array]
  recurrent: jax.Array
  bias: jax.Array


class CellParameters(nn.Module):
  """Declares the parameters of a cell, for use inside a scan.

  Initial values follow :class:`flax.linen.LSTMCell`: input kernels are normal with variance
  1 / (total width of all inputs), recurrent kernels are orthogonal for each gate, and biases are 0.

  Attributes:
    inputs: width of each input.
    hidden_dim: number of units.
    candidate: ``"tanh"``, or ``"maxout"`` for the larger of two candidates, without tanh.
    partial: names of the inputs that go into the candidate but not into the gates.
    dtype: dtype of products.
  """

  inputs: Mapping[str, int]
  hidden_dim: int
  candidate: str
  partial: tuple[str, ...]
  dtype: jax.typing.DTypeLike

  @nn.compact
  def __call__(self) -> CellWeights:
    """Returns the kernels in ``dtype`` and the bias in float32 at least."""
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
  r"""Returns the new hidden state and cell, given the sums of all inputs.

  .. math:: c_t = \sigma(f) c_{t-1} + \sigma(i) g, \qquad h_t = \sigma(o) \tanh(c_t)

  The blocks are :math:`i, f, o` and the candidates: :math:`g = \tanh(s_1)` for ``"tanh"``, and
  :math:`g = \max(s_1, s_2)` for ``"maxout"``.

  Args:
    sums: ``[..., blocks * hidden_dim]`` in float32 at least.
    cell: ``[..., hidden_dim]`` in float32 at least.
    candidate: ``"tanh"`` or ``"maxout"``.
    dtype: dtype of the returned hidden state; the cell keeps its dtype.
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
