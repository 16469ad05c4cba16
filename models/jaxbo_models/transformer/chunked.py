"""Cross-entropies of a large vocabulary without the logits of all tokens at once."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxbo_models.mesh import explicit_sharding, zeros_like


def chunked_cross_entropy(
  hidden: jax.Array, head: jax.Array, targets: jax.Array, chunk_length: int
) -> jax.Array:
  r"""The cross-entropies of the logits ``hidden @ head``, a few positions at a time.

  .. math:: -\log \mathrm{softmax}(h_t W)_{u_t}

  Only the logits of ``chunk_length`` positions of all sequences exist at a time, in the forward
  pass and in the backward pass, which computes them again. This costs one more product with the
  head, and saves the memory of ``batch (length - chunk_length) vocab_size`` numbers. All sequences
  are in each chunk, so a batch may be divided among devices. Sums are in float32 at least. The
  vocabulary is padded to a multiple of 128, which suits matrix units.

  >>> hidden, head = jnp.ones((2, 5, 4)), jnp.zeros((4, 8))
  >>> chunked_cross_entropy(hidden, head, jnp.zeros((2, 5), int), 2)[0].round(4)  # log 8
  Array([2.0794, 2.0794, 2.0794, 2.0794, 2.0794], dtype=float32)

  Args:
    hidden: ``[batch, length, width]``, floats.
    head: ``[width, vocab_size]``, of the same dtype.
    targets: ``[batch, length]``, integers; a target outside the vocabulary makes its loss NaN.
    chunk_length: how many positions at a time, at least 1.

  Returns:
    The losses, ``[batch, length]``, in float32 at least. They have derivatives in reverse mode
    only, in ``hidden`` and ``head``.
  """
  losses: jax.Array = _cross_entropy(hidden, head, targets, chunk_length)
  return losses


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _cross_entropy(hidden: Any, head: Any, targets: Any, chunk_length: int) -> Any:
  return _forward(hidden, head, targets, chunk_length)[0]


def _forward(hidden, head, targets, chunk_length):
  padded = _padded(head)

  def losses_of_chunk(_, chunk):
    h, u = chunk
    logits = _logits(h, padded, head.shape[1])
    log_sum = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, jnp.clip(u, 0, head.shape[1] - 1)[..., None], axis=-1)
    known = (u >= 0) & (u < head.shape[1])
    return (), (jnp.where(known, log_sum - target[..., 0], jnp.nan), log_sum)

  chunks = _chunks(hidden, chunk_length), _chunks(targets, chunk_length)
  _, parts = jax.lax.scan(losses_of_chunk, (), chunks)
  losses, log_sums = (_joined(part, targets.shape[1]) for part in parts)
  return losses, (hidden, head, targets, log_sums)


def _backward(chunk_length, residuals, cotangents):
  hidden, head, targets, log_sums = residuals
  padded = _padded(head)

  def gradients_of_chunk(total, chunk):
    h, u, log_sum, cotangent = chunk
    probabilities = jnp.exp(_logits(h, padded, head.shape[1]) - log_sum[..., None])
    known = (u >= 0) & (u < head.shape[1])
    excess = probabilities - jax.nn.one_hot(u, padded.shape[1], dtype=probabilities.dtype)
    excess *= jnp.where(known | (cotangent == 0), cotangent, jnp.nan)[..., None]
    excess = excess.astype(h.dtype)
    more = jnp.einsum(
      "btd,btv->dv",
      h,
      excess,
      preferred_element_type=total.dtype,
      out_sharding=explicit_sharding(total),  # The devices add up their parts of the batch.
    )
    return total + more, jnp.einsum("btv,dv->btd", excess, padded)

  start = zeros_like(padded, log_sums.dtype)
  chunks = [_chunks(array, chunk_length) for array in (hidden, targets, log_sums, cotangents)]
  total, by_hidden = jax.lax.scan(gradients_of_chunk, start, tuple(chunks))
  by_head = total[:, : head.shape[1]].astype(head.dtype)
  return _joined(by_hidden, hidden.shape[1]), by_head, None


_cross_entropy.defvjp(_forward, _backward)


def _logits(hidden: jax.Array, padded: jax.Array, vocab_size: int) -> jax.Array:
  wide = jnp.promote_types(hidden.dtype, jnp.float32)
  logits = jnp.einsum("btd,dv->btv", hidden, padded, preferred_element_type=wide)
  real = jnp.arange(padded.shape[1]) < vocab_size
  return jnp.where(real[None, None], logits, -jnp.inf)


def _padded(head: jax.Array) -> jax.Array:
  """The head with columns of zeros, up to a multiple of 128."""
  return jnp.pad(head, ((0, 0), (0, -head.shape[1] % 128)))


def _chunks(array: jax.Array, chunk_length: int) -> jax.Array:
  """``[batch, length, ...]`` as ``[chunks, batch, chunk_length, ...]``, with zeros at the end."""
  end = -array.shape[1] % chunk_length
  array = jnp.pad(array, ((0, 0), (0, end), *((0, 0) for _ in array.shape[2:])))
  parts = array.reshape(array.shape[0], -1, chunk_length, *array.shape[2:])
  return jnp.moveaxis(parts, 1, 0)


def _joined(chunks: jax.Array, length: int) -> jax.Array:
  """The inverse of :func:`_chunks`."""
  array = jnp.moveaxis(chunks, 0, 1)
  return array.reshape(array.shape[0], -1, *array.shape[3:])[:, :length]
