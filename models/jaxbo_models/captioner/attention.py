"""Additive attention with keys computed once and a mask for absent cells."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.typing


class AttentionWeights(NamedTuple):
  """The parameters of :func:`attend`, in the dtype of products.

  Attributes:
    query: kernel of the query, :math:`W_q`, ``[query_dim, attention_dim]``.
    bias: bias of the query, :math:`b`, ``[attention_dim]``.
    score: kernel of the scores, :math:`w`, ``[attention_dim]``.
    score_bias: bias of the scores, :math:`b_s`, ``[1]``. It does not change the softmax, but
      published models have it and count it.
  """

  query: jax.Array
  bias: jax.Array
  score: jax.Array
  score_bias: jax.Array


class AttentionParameters(nn.Module):
  """Declares the parameters of additive attention, for use inside a scan.

  Attributes:
    query_dim: width of queries.
    attention_dim: width of keys.
    dtype: dtype of products.
  """

  query_dim: int
  attention_dim: int
  dtype: jax.typing.DTypeLike

  @nn.compact
  def __call__(self) -> AttentionWeights:
    """Returns the parameters in ``dtype``."""
    shape = (self.query_dim, self.attention_dim)
    score_init = nn.initializers.normal(self.attention_dim**-0.5)
    weights = AttentionWeights(
      query=self.param("query", nn.initializers.lecun_normal(), shape, jnp.float32),
      bias=self.param("bias", nn.initializers.zeros, (self.attention_dim,), jnp.float32),
      score=self.param("score", score_init, (self.attention_dim,), jnp.float32),
      score_bias=self.param("score_bias", nn.initializers.zeros, (1,), jnp.float32),
    )
    return AttentionWeights(*(weight.astype(self.dtype) for weight in weights))


def attend(
  weights: AttentionWeights,
  query: jax.Array,
  cells: jax.Array,
  keys: jax.Array,
  mask: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  r"""Averages the cells, weighted by how well their keys match the query.

  .. math:: s_i = w^\top \tanh(k_i + W_q q + b) + b_s, \qquad \alpha = \mathrm{softmax}(s),
    \qquad z = \sum_i \alpha_i a_i

  >>> weights = AttentionWeights(jnp.zeros((3, 2)), jnp.zeros(2), jnp.ones(2), jnp.zeros(1))
  >>> cells = jnp.array([[[1.0], [2.0], [6.0]]])
  >>> mask = jnp.array([[True, True, False]])
  >>> attend(weights, jnp.ones((1, 3)), cells, jnp.zeros((1, 3, 2)), mask)
  (Array([[1.5]], dtype=float32), Array([[0.5, 0.5, 0. ]], dtype=float32))

  Source: Bahdanau, Cho and Bengio (https://arxiv.org/abs/1409.0473); Xu et al., *Show, attend and
  tell* (https://arxiv.org/abs/1502.03044).

  Args:
    weights: the parameters.
    query: ``[batch, ..., query_dim]``. Queries on the middle axes (for example, beams) share the
      cells of their image; the cells are not copied.
    cells: ``[batch, num_cells, dim]``.
    keys: ``[batch, num_cells, attention_dim]``, computed once for each image.
    mask: ``[batch, num_cells]``, bool: True for cells that are present; None if all are.

  Returns:
    The context ``z [batch, ..., dim]`` and the attention ``[batch, ..., num_cells]``, both in
    float32 at least. Absent cells get attention 0. If all cells are absent, ``z`` is 0.
  """
  high = jnp.promote_types(cells.dtype, jnp.float32)
  beams = (1,) * (query.ndim - 2)
  projected = matmul(query, weights.query).astype(keys.dtype)
  projected += weights.bias.reshape(1, *beams, -1)
  batch, num_cells, attention_dim = keys.shape
  hidden = jnp.tanh(keys.reshape(batch, *beams, num_cells, attention_dim) + projected[..., None, :])
  scores = matmul(hidden, weights.score)
  scores += weights.score_bias.astype(high).reshape((1,) * scores.ndim)
  if mask is None:
    attention = jax.nn.softmax(scores)
  else:
    mask = mask.reshape(batch, *beams, num_cells)
    attention = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(high).min))
    attention = jnp.where(mask, attention, 0)
  context = jnp.einsum(
    "b...c,bcd->b...d", attention.astype(cells.dtype), cells, preferred_element_type=high
  )
  return context, attention


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Multiplies in the dtype of ``x``; sums, and returns the result, in float32 at least."""
  high = jnp.promote_types(x.dtype, jnp.float32)
  return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=high)
