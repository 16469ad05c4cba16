"""Which tokens a token sees, and at which position each stands."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sight(NamedTuple):
  """Which tokens a token sees, beside the causal order without a cache.

  Attributes:
    full: ``[batch or 1, 1, queries or 1, keys]``, bool; None if all are seen.
    window: ``full`` without the tokens that lie behind the sliding window; None without a window.
  """

  full: jax.Array | None
  window: jax.Array | None


def find_positions(
  tokens: jax.Array, mask: jax.Array | None, segment_ids: jax.Array | None
) -> jax.Array:
  """Returns positions ``[batch or 1, length]``: each token counts the real tokens before it.

  In a packed row, a token counts those of its own segment only.
  """
  length = tokens.shape[1]
  if segment_ids is not None:
    earlier = jnp.tril(jnp.ones((length, length), bool))[None]
    seen = earlier & _same_segment(mask, segment_ids)
    return jnp.maximum(jnp.sum(seen, axis=2, dtype=jnp.int32) - 1, 0)
  if mask is None:
    return jnp.arange(length)[None]
  return jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)


def find_sight(
  length: int, window: int | None, mask: jax.Array | None, segment_ids: jax.Array | None
) -> Sight:
  """What the tokens of a row see; the causal order is not in it."""
  if segment_ids is not None:
    full = _same_segment(mask, segment_ids)[:, None]
  else:
    full = None if mask is None else mask[:, None, None, :]
  if window is None or window >= length:
    return Sight(full, None)
  near = _near(jnp.arange(length), length, window)
  return Sight(full, near if full is None else full & near)


def find_cached_sight(
  start: jax.Array, num_queries: int, window: int | None, real: jax.Array
) -> Sight:
  """What tokens in the places ``start, start + 1, ...`` of a cache see; the order is in it.

  ``real`` is ``[batch, places]``: which places of the cache hold a real token.
  """
  places = start + jnp.arange(num_queries)
  full = (places[:, None] >= jnp.arange(real.shape[1])[None])[None, None] & real[:, None, None, :]
  if window is None or window >= real.shape[1]:
    return Sight(full, None)
  return Sight(full, full & _near(places, real.shape[1], window))


def _near(places: jax.Array, num_keys: int, window: int) -> jax.Array:
  """Which keys lie less than ``window`` places behind, ``[1, 1, queries, keys]``."""
  return (places[:, None] - jnp.arange(num_keys)[None] < window)[None, None]


def _same_segment(mask: jax.Array | None, segment_ids: jax.Array) -> jax.Array:
  same = segment_ids[:, :, None] == segment_ids[:, None, :]
  return same if mask is None else same & mask[:, None, :]
