"""Batched beam search, compiled once."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbo_models.captioner.decoding import StepFn, allow, check_search, fill, over_beams, put


class _Beams(NamedTuple):
  """Live and finished hypotheses, both ``[batch, beam]``, the best first."""

  position: jax.Array
  live_tokens: jax.Array
  live: jax.Array
  last: jax.Array
  state: Any
  tokens: jax.Array
  scores: jax.Array
  finished: jax.Array


def beam_search(
  step_fn: StepFn,
  init_state: Any,
  *,
  batch_size: int,
  beam_size: int,
  max_length: int,
  bos_id: int,
  eos_id: int,
  length_penalty: float = 0.0,
  forced: jax.Array | None = None,
  forbidden: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  r"""Finds probable captions by beam search.

  The token ``eos_id`` finishes a hypothesis. Finished hypotheses are ranked by the score

  .. math:: \log p(u_1, \dots, u_n) \Big/ \Big(\frac{5 + n}{6}\Big)^{\alpha}

  where n counts the end token. Each step considers the best ``2 beam_size`` continuations of the
  live hypotheses, so ``beam_size`` hypotheses stay live even if ``beam_size`` others finish. The
  search ends when no live hypothesis can overtake a finished one that would be returned. Hypotheses
  that are unfinished after ``max_length`` tokens rank below all finished ones.

  >>> table = jnp.log(jnp.array([0.0, 0.5, 0.3, 0.2]))                # p of ids 0, 1, 2, 3, always
  >>> step_fn = lambda tokens, state: (jnp.broadcast_to(table, (*tokens.shape, 4)), state)
  >>> tokens, log_probabilities = beam_search(
  ...   step_fn, (), batch_size=1, beam_size=2, max_length=3, bos_id=0, eos_id=1)
  >>> tokens[0]                                                         # 1 is the end
  Array([[1, 1, 1],
         [2, 1, 1]], dtype=int32)
  >>> jnp.exp(log_probabilities[0]).round(3)
  Array([0.5 , 0.15], dtype=float32)

  Every array has a fixed shape, so each set of sizes compiles once. One step costs ``step_fn`` on
  ``batch_size * beam_size`` words and a top-k over the ``vocab_size`` continuations of each word.
  With ``beam_size=1`` and ``length_penalty=0`` the search is not greedy: it continues after a
  hypothesis finishes as long as the live one is more probable.

  Source: the design follows Flax's ``examples/wmt/decode.py`` and T5X (which return the best last).
  By convention captioning has no length penalty, and translation has 0.6.

  Args:
    step_fn: ``step_fn(tokens, state) -> (log_probabilities, state)`` reads ``tokens [batch, beam]``
      and returns the log-probabilities of the next tokens, ``[batch, beam, vocab_size]``.
    init_state: the state for the first call of ``step_fn``, a pytree with leaves ``[batch, ...]``;
      inside the search the leaves are ``[batch, beam, ...]``. :func:`make_step` returns it.
    batch_size: number of images.
    beam_size: number of hypotheses kept, at least 1 and at most ``vocab_size ** max_length``.
    max_length: maximum number of tokens in a caption, including the end token; at least 1.
    bos_id: the token that the first step reads.
    eos_id: the token that ends a caption.
    length_penalty: :math:`\alpha`, at least 0; 0 ranks by log-probability, 1 roughly by the mean
      log-probability of a token.
    forced: ``[batch, max_length]``, integers: the token required at each position, or -1 to leave
      the position free. Log-probabilities of forced tokens count like any others.
    forbidden: ``[vocab_size]``, bool: True for tokens that may appear only where they are forced.
      The remaining probabilities are not renormalized.

  Returns:
    Tokens ``[batch, beam, max_length]``, without ``bos_id`` and padded with ``eos_id``, and their
    log-probabilities ``[batch, beam]`` without the length penalty; the best caption first. If there
    are fewer hypotheses than ``beam_size``, the last entries have log-probability -inf.

  Raises:
    ValueError: an argument is out of its range or has another shape.
  """
  if beam_size < 1:
    raise ValueError(f"beam_size must be at least 1, got {beam_size}")
  if not length_penalty >= 0:
    raise ValueError(f"length_penalty must be non-negative, got {length_penalty}")
  shape = (batch_size, beam_size)
  state = over_beams(init_state, shape)
  vocab_size, dtype = check_search(
    step_fn, state, shape, max_length, bos_id, eos_id, forced, forbidden
  )
  if vocab_size**max_length < beam_size:
    raise ValueError(
      f"beam_size must be at most the number of sequences, vocab_size ** max_length = "
      f"{vocab_size**max_length}, got {beam_size}"
    )
  penalty = lambda length: ((5 + length) / 6) ** length_penalty

  def is_open(beams: _Beams) -> jax.Array:
    # Log-probabilities only fall, and the longest caption has the largest divisor.
    best = beams.live[:, 0] / penalty(max_length)
    return (beams.position < max_length) & jnp.any(beams.scores[:, -1] < best)

  def step(beams: _Beams) -> _Beams:
    log_probabilities, state = step_fn(beams.last, beams.state)
    log_probabilities = allow(log_probabilities.astype(dtype), beams.position, forced, forbidden)
    sums = (beams.live[:, :, None] + log_probabilities).reshape(batch_size, -1)
    best, index = jax.lax.top_k(sums, min(2 * beam_size, sums.shape[1]))
    parent, token = index // vocab_size, (index % vocab_size).astype(jnp.int32)
    tokens = put(_take(beams.live_tokens, parent), beams.position, token)
    ends = token == eos_id

    live, order = jax.lax.top_k(jnp.where(ends, -jnp.inf, best), beam_size)
    state = jax.tree.map(lambda x: _take(x, _take(parent, order)), state)

    length = (beams.position + 1).astype(dtype)
    scores = jnp.where(ends, best / penalty(length), -jnp.inf)
    scores, winners = jax.lax.top_k(jnp.concatenate([beams.scores, scores], axis=1), beam_size)
    return _Beams(
      position=beams.position + 1,
      live_tokens=_take(tokens, order),
      live=live,
      last=_take(token, order),
      state=state,
      tokens=_take(jnp.concatenate([beams.tokens, tokens], axis=1), winners),
      scores=scores,
      finished=_take(jnp.concatenate([beams.finished, best], axis=1), winners),
    )

  full = functools.partial(fill, state)
  nothing = full(shape, -jnp.inf, dtype)
  empty = full((*shape, max_length), eos_id, jnp.int32)
  first = _Beams(
    position=jnp.int32(0),
    live_tokens=empty,
    live=jnp.where(jnp.arange(beam_size)[None] == 0, 0, nothing),
    last=full(shape, bos_id, jnp.int32),
    state=state,
    tokens=empty,
    scores=nothing,
    finished=nothing,
  )
  beams = jax.lax.while_loop(is_open, step, first)
  # Finished hypotheses come first, then live ones, each sorted; empty places come last.
  found = jnp.concatenate([beams.scores, beams.live], axis=1) > -jnp.inf
  order = jnp.argsort(~found, axis=1, stable=True)[:, :beam_size]
  sums = jnp.concatenate([jnp.where(found[:, :beam_size], beams.finished, -jnp.inf), beams.live], 1)
  tokens = jnp.concatenate([beams.tokens, beams.live_tokens], axis=1)
  return _take(tokens, order), _take(sums, order)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
  """Takes the entries ``index [batch, k]`` of the second axis of ``x``."""
  return jax.vmap(lambda row, i: row[i])(x, index)
