"""Captions images and returns an attention map for each word."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbo_models.captioner.beam import beam_search
from jaxbo_models.captioner.decoding import make_step
from jaxbo_models.captioner.model import GuidedCaptioner


class Captions(NamedTuple):
  """The captions that :func:`caption_images` returns.

  Attributes:
    tokens: ``[batch, beam, max_length]``, the best caption first, padded with ``eos_id``.
    log_probabilities: ``[batch, beam]``, without the length penalty.
    attention: ``[batch, max_length, num_cells]``: where the model looks as it writes each token of
      the best caption.
  """

  tokens: jax.Array
  log_probabilities: jax.Array
  attention: jax.Array


def caption_images(
  model: GuidedCaptioner,
  params: Any,
  features: jax.Array,
  *,
  bos_id: int,
  eos_id: int,
  beam_size: int = 5,
  max_length: int = 20,
  cell_mask: jax.Array | None = None,
  **options: Any,
) -> Captions:
  """Captions images by beam search and returns the attention of the best captions; jit it.

  >>> from jaxbo_models import captioner
  >>> model = captioner.GuidedCaptioner(19, embed_dim=8, hidden_dim=16, attention_dim=8)
  >>> @jax.jit
  ... def describe(params, features):
  ...   return caption_images(model, params, features, bos_id=1, eos_id=2, max_length=7)
  >>> features, tokens = jnp.ones((2, 4, 6)), jnp.ones((2, 5), int)
  >>> params = jax.eval_shape(model.init, jax.random.key(0), features, tokens)["params"]
  >>> captions = jax.eval_shape(describe, params, features)
  >>> captions.tokens.shape, captions.attention.shape
  ((2, 5, 7), (2, 7, 4))

  Args:
    model: the captioner.
    params: the model's parameters.
    features: ``[batch, num_cells, dim]`` floats, or images if the model has an encoder.
    bos_id: the token that begins a caption.
    eos_id: the token that ends a caption.
    beam_size: number of hypotheses kept, in [1, vocab_size]: the first step cannot fill more.
    max_length: maximum number of tokens in a caption, including the end token; at least 1.
    cell_mask: ``[batch, num_cells]``, bool: True for cells that are present; None if all are.
    **options: the arguments ``length_penalty``, ``forced`` and ``forbidden`` of
      :func:`beam_search`.

  Raises:
    ValueError: an argument is out of its range or has another shape.
  """
  if not 1 <= beam_size <= model.vocab_size:
    raise ValueError(f"beam_size must be in [1, vocab_size = {model.vocab_size}], got {beam_size}")
  step_fn, state = make_step(model, params, features, cell_mask)
  tokens, log_probabilities = beam_search(
    step_fn,
    state,
    batch_size=len(features),
    beam_size=beam_size,
    max_length=max_length,
    bos_id=bos_id,
    eos_id=eos_id,
    **options,
  )
  best = tokens[:, 0]
  read = jnp.concatenate([jnp.full_like(best[:, :1], bos_id), best[:, :-1]], axis=1)
  output: Any = model.apply({"params": params}, features, read, cell_mask=cell_mask)
  return Captions(tokens, log_probabilities, output.attention)
