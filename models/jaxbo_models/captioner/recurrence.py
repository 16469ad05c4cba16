"""One step of the captioner (guide, attention and decoder), as pure functions of arrays."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbo_models.captioner import cell
from jaxbo_models.captioner.attention import AttentionWeights, attend, matmul


class Weights(NamedTuple):
  """The parameters of a step.

  Attributes:
    guide: parameters of the guiding LSTM; None without one.
    attention: parameters of the attention.
    decoder: parameters of the decoder.
  """

  guide: cell.CellWeights | None
  attention: AttentionWeights
  decoder: cell.CellWeights


class Encoded(NamedTuple):
  """What the model computes once for each image.

  Attributes:
    cells: embedded cells, ``[batch, num_cells, hidden_dim]``; attention averages them.
    keys: keys of the cells, ``[batch, num_cells, attention_dim]``.
    mask: ``[batch, num_cells]``, bool: True for cells that are present; None if all are.
    pooled: a layer on the mean of the cells' features, ``[batch, hidden_dim]``; None if nothing
      reads it.
    guide_vector: the static guide, ``[batch, hidden_dim]``; None for other guides.
  """

  cells: jax.Array
  keys: jax.Array
  mask: jax.Array | None
  pooled: jax.Array | None
  guide_vector: jax.Array | None


class DecoderState(NamedTuple):
  """The state between steps; every array is ``[batch, ..., hidden_dim]``.

  Attributes:
    hidden: hidden state of the decoder, in the dtype of products.
    cell: cell of the decoder, in float32 at least.
    guide_hidden: hidden state of the guiding LSTM, in the dtype of products; None without one.
    guide_cell: cell of the guiding LSTM, in float32 at least; None without one.
  """

  hidden: jax.Array
  cell: jax.Array
  guide_hidden: jax.Array | None
  guide_cell: jax.Array | None


class Inputs(NamedTuple):
  """What words and images contribute to the steps, computed before the scan.

  Attributes:
    embedded: the words, ``[batch, ..., embed_dim]``; None unless the attention's query reads them.
    guide: inputs of the guide plus its bias, ``[batch, ..., 4 hidden_dim]``; None without a guiding
      LSTM.
    decoder: inputs of the decoder plus its bias, ``[batch, ..., blocks * hidden_dim]``.
  """

  embedded: jax.Array | None
  guide: jax.Array | None
  decoder: jax.Array


class StepOutput(NamedTuple):
  """The output of a step.

  Attributes:
    hidden: hidden state of the decoder, ``[batch, ..., hidden_dim]``; it gives the logits.
    attention: weights of the cells, ``[batch, ..., num_cells]``.
    guide: the guiding vector, ``[batch, ..., hidden_dim]``; None without a guide.
  """

  hidden: jax.Array
  attention: jax.Array
  guide: jax.Array | None


class CaptionerOutput(NamedTuple):
  """The output of a :class:`GuidedCaptioner`.

  Attributes:
    logits: logits of the next tokens, ``[batch, length, vocab_size]``, in float32 at least.
    attention: where the model looks as it predicts each of the next tokens,
      ``[batch, length, num_cells]``.
    guide: the guiding vectors, ``[batch, length, hidden_dim]``; None without a guide.
    attribute_scores: scores of the attribute words, ``[batch, num_attributes]``, in float32 at
      least; None without attributes.
  """

  logits: jax.Array
  attention: jax.Array
  guide: jax.Array | None
  attribute_scores: jax.Array | None


def inputs(model: Any, weights: Weights, encoded: Encoded, embedded: jax.Array) -> Inputs:
  """Computes all products that do not depend on the state.

  Args:
    model: the :class:`GuidedCaptioner`, for its attributes.
    weights: the model's parameters.
    encoded: the encoded images.
    embedded: the words, ``[batch, ..., embed_dim]``.
  """
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
  """Reads one word of each caption; returns the new state and the output of the step.

  Args:
    model: the :class:`GuidedCaptioner`, for its attributes.
    weights: the model's parameters.
    encoded: the encoded images.
    words: the result of :func:`inputs` for the words.
    state: the state after the previous step.
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
  """Inserts axes of size 1 after the first axis of ``x`` until it has the rank of ``other``."""
  return x.reshape(x.shape[0], *(1,) * (other.ndim - x.ndim), *x.shape[1:])
