"""Causal attention with grouped queries, rotary positions and a cache of keys and values."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbo_models.transformer.config import TransformerConfig
from jaxbo_models.transformer.layers import dense, norm
from jaxbo_models.transformer.rotary import Rotation, rotate


class Cache(NamedTuple):
  """The keys and values of the tokens so far; ``Transformer.apply(..., cache=)`` fills it.

  Attributes:
    key: ``[num_layers, batch, places, num_kv_heads, head_dim]`` in the dtype of the model.
    value: as ``key``.
    real: ``[batch, places]``, bool: which places hold a real token.
    length: number of places in use, an int32.
  """

  key: jax.Array
  value: jax.Array
  real: jax.Array
  length: jax.Array


def empty_cache(config: TransformerConfig, batch_size: int, num_places: int) -> Cache:
  """A cache with room for ``num_places`` tokens in each row."""
  shape = (config.num_layers, batch_size, num_places, config.kv_heads, config.head_dim)
  return Cache(
    key=jnp.zeros(shape, config.dtype),
    value=jnp.zeros(shape, config.dtype),
    real=jnp.zeros((batch_size, num_places), bool),
    length=jnp.int32(0),
  )


def extend(cache: Cache, tokens: jax.Array, mask: jax.Array | None) -> Cache:
  """The cache with places for ``tokens [batch, length]``, before their keys are known."""
  real = jnp.ones(tokens.shape, bool) if mask is None else mask
  return cache._replace(
    real=put(cache.real, cache.length, real), length=cache.length + tokens.shape[1]
  )


def put(places: jax.Array, start: jax.Array, new: jax.Array) -> jax.Array:
  """Writes ``new [batch, length, ...]`` into ``places [batch, num_places, ...]``.

  One token goes to ``start``; more than one begin an empty cache. No scatter: for any mesh.
  """
  num_places, length = places.shape[1], new.shape[1]
  if length > 1:
    return jnp.pad(new, [(0, 0), (0, num_places - length), *[(0, 0)] * (new.ndim - 2)])
  here = jnp.arange(num_places) == start
  return jnp.where(here.reshape(1, -1, *[1] * (new.ndim - 2)), new, places)


def attention(
  config: TransformerConfig,
  x: jax.Array,
  visible: jax.Array | None,
  rotation: Rotation | None,
  cache: tuple[jax.Array, jax.Array, jax.Array] | None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array] | None]:
  """Returns what each token of ``x [batch, length, width]`` attends to, and the layer's cache.

  Without a cache ``visible`` is seen in the causal order; with one, the order is in ``visible``.
  A layer's cache is its keys, its values and the number of places in use.
  """
  query, key, value = _project(config, x)
  if config.qk_norm:
    query, key = norm(config, "query_norm")(query), norm(config, "key_norm")(key)
  if rotation is not None:
    query, key = rotate(query, rotation), rotate(key, rotation)
  if cache is not None:
    keys, values, start = cache
    key, value = put(keys, start, key), put(values, start, value)
    cache = key, value, start
  implementation: Any = config.attention
  attended = jax.nn.dot_product_attention(
    query,
    key,
    value,
    mask=visible,
    is_causal=cache is None,
    implementation=implementation,
  )
  out = dense(
    config,
    "attention_out",
    config.width,
    config.attention_out_bias,
    num_inputs=2,
    num_terms=2 * config.num_layers,
  )
  return out(attended), cache


def _project(config: TransformerConfig, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Queries ``[batch, length, heads, head_dim]``; keys and values with ``kv_heads``."""
  if config.kv_heads == config.num_heads:
    qkv = dense(config, "qkv", (3, config.num_heads, config.head_dim), config.qkv_bias)(x)
    query, key, value = (qkv[:, :, i] for i in range(3))
    return query, key, value
  query = dense(config, "query", (config.num_heads, config.head_dim), config.qkv_bias)(x)
  key_value = dense(config, "key_value", (2, config.kv_heads, config.head_dim), config.qkv_bias)(x)
  return query, key_value[:, :, 0], key_value[:, :, 1]
