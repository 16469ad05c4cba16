"""One step of the captioner: the guide, the attention, the decoder. Pure functions of arrays."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbo_models.captioner import cell
from jaxbo_models.captioner.attention import AttentionWeights, attend, matmul


class Weights(NamedTuple):
  """What a step multiplies by.

  Attributes:
    guide: the guiding LSTM; None without one.
    attention: the attention.
    decoder: the decoder.
  """

  guide: cell.CellWeights | None
  attention: AttentionWeights
  decoder: cell.CellWeights


class Encoded(NamedTuple):
  """What is computed once for each image.

  Attributes:
    cells: ``[batch, num_cells, hidden_dim]``, what attention averages.
    keys: ``[batch, num_cells, attention_dim]``.
    mask: ``[batch, num_cells]``, bool: which cells are there; None for all.
    pooled: ``[batch, hidden_dim]``; None where nothing reads it.
    guide_vector: ``[batch, hidden_dim]``, the static guide; None for another.
  """

  cells: jax.Array
  keys: jax.Array
  mask: jax.Array | None
  pooled: jax.Array | None
  guide_vector: jax.Array | None


class DecoderState(NamedTuple):
  """What a step hands to the next; ``[batch, ..., hidden_dim]``.

  Attributes:
    hidden: the decoder's, in the dtype of products.
    cell: the decoder's, in float32 at least.
    guide_hidden: the guiding LSTM's; None without one.
    guide_cell: the guiding LSTM's; None without one.
  """

  hidden: jax.Array
  cell: jax.Array
  guide_hidden: jax.Array | None
  guide_cell: jax.Array | None


class Inputs(NamedTuple):
  """What a word and an image bring into the cells, multiplied before the scan; None if nothing.

  Attributes:
    embedded: ``[batch, ..., embed_dim]``, for the query that has the word in it.
    guide: ``[batch, ..., 4 hidden_dim]``, with the bias.
    decoder: ``[batch, ..., blocks * hidden_dim]``, with the bias.
  """

  embedded: jax.Array | None
  guide: jax.Array | None
  decoder: jax.Array


class StepOutput(NamedTuple):
  """What a step shows.

  Attributes:
    hidden: ``[batch, ..., hidden_dim]``, what logits are made of.
    attention: ``[batch, ..., num_cells]``.
    guide: ``[batch, ..., hidden_dim]``, the guiding vector; None without one.
  """

  hidden: jax.Array
  attention: jax.Array
  guide: jax.Array | None


class CaptionerOutput(NamedTuple):
  """What a :class:`GuidedCaptioner` returns.

  Attributes:
    logits: ``[batch, length, vocab_size]`` of the tokens that follow, in float32 at least.
    attention: ``[batch, length, num_cells]``, where the model looks when it predicts them.
    guide: ``[batch, length, hidden_dim]``, the guiding vectors; None without a guide.
    attribute_scores: ``[batch, num_attributes]``; None without attributes.
  """

  logits: jax.Array
  attention: jax.Array
  guide: jax.Array | None
  attribute_scores: jax.Array | None


def inputs(model: Any, weights: Weights, encoded: Encoded, embedded: jax.Array) -> Inputs:
  """Everything that does not depend on the state, for ``embedded [batch, ..., embed_dim]``."""
  guide = None
  if weights.guide is not None:
    guide = matmul(embedded, weights.guide.inputs["word"])
    guide += _like(weights.guide.bias[None], guide)
    if model.guide_pooled:
      assert encoded.pooled is not None
      guide += _like(matmul(encoded.pooled, weights.guide.inputs["pooled"]), guide)
  shape = (*embedded.shape[:-1], weights.decoder.bias.size)
  decoder = jnp.broadcast_to(_like(weights.decoder.bias[None], embedded), shape)
  if model.decoder_word:
    decoder += matmul(embedded, weights.decoder.inputs["word"])
  if encoded.guide_vector is not None:
    vector = model.guide_scale * encoded.guide_vector
    decoder += _like(matmul(vector, weights.decoder.inputs["guide"]), decoder)
  return Inputs(embedded if model.attention_query == "hidden_word" else None, guide, decoder)


def advance(
  model: Any, weights: Weights, encoded: Encoded, words: Inputs, state: DecoderState
) -> tuple[DecoderState, StepOutput]:
  """Reads one word of each caption.

  Args:
    model: the :class:`GuidedCaptioner`, for its flags.
    weights: its parameters.
    encoded: what it made of the images.
    words: what :func:`inputs` made of the words.
    state: what the step before handed over.
  """
  guide_hidden, guide_cell, vector = None, None, encoded.guide_vector
  if weights.guide is not None:
    assert state.guide_hidden is not None
    assert state.guide_cell is not None
    assert words.guide is not None
    sums = words.guide + matmul(state.hidden, weights.guide.inputs["hidden"])
    sums += matmul(state.guide_hidden, weights.guide.recurrent)
    guide_hidden, guide_cell = cell.update(sums, state.guide_cell, "tanh", model.dtype)
    vector = guide_hidden
  if vector is not None:
    vector = jnp.broadcast_to(_like(model.guide_scale * vector, state.hidden), state.hidden.shape)

  if model.attention_query == "guide":
    query = vector
  elif model.attention_query == "hidden":
    query = state.hidden
  else:
    assert words.embedded is not None
    query = jnp.concatenate([state.hidden, words.embedded], axis=-1)
  assert query is not None
  context, attention = attend(weights.attention, query, encoded.cells, encoded.keys, encoded.mask)

  sums = words.decoder + matmul(state.hidden, weights.decoder.recurrent)
  if weights.guide is not None:
    assert vector is not None
    sums += matmul(vector, weights.decoder.inputs["guide"])
  sums = cell.into_last(
    sums, matmul(context.astype(model.dtype), weights.decoder.inputs["context"])
  )
  hidden, new_cell = cell.update(sums, state.cell, model.candidate, model.dtype)
  return (
    DecoderState(hidden, new_cell, guide_hidden, guide_cell),
    StepOutput(hidden, attention, vector),
  )


def _like(x: jax.Array, other: jax.Array) -> jax.Array:
  """``x [batch, dim]`` with axes of size 1 between its two, as many as ``other`` has."""
  return x.reshape(x.shape[0], *(1,) * (other.ndim - x.ndim), *x.shape[1:])
