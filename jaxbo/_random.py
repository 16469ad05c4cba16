"""Base keys for a state: a copy of the raw key data, and the name of the generator."""

import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbo._types import Key


def key_impl(name: str, key: object) -> Any:
  """Returns the generator of ``key``, ``None`` for the default one; ``TypeError`` if not a key.

  A key is an int (it may be traced), a raw key array (JAX or NumPy), or a typed key.
  """
  if isinstance(key, numbers.Integral) and not isinstance(key, bool):
    return None
  if isinstance(key, (jax.Array, np.ndarray)):
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 0:
      return jax.random.key_impl(key)
    if jnp.issubdtype(key.dtype, jnp.integer) and key.ndim == 0:
      return None
    if key.dtype == jnp.uint32 and key.ndim == 1:
      return None
  raise TypeError(f"{name} must be an int, a raw key array or a typed key (one key), got {key!r}")


def key_data(key: Key) -> jax.Array:
  """The raw data, in a new buffer, of a key that :func:`key_impl` accepts."""
  if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
    key = jax.random.key_data(key)
  elif jnp.ndim(key) == 0:
    key = jax.random.key_data(jax.random.key(key))
  return jnp.array(key, copy=True)


def typed_key(key: Any) -> jax.Array:
  """Turns an int, a raw key array or a typed key into a typed key."""
  impl = key_impl("key", key)
  if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
    return key
  return jax.random.wrap_key_data(key_data(key), impl=impl)


def default_key_data(key: Key) -> jax.Array:
  """:func:`key_data` of ``key``; raises ``ValueError`` if its generator is not the default."""
  impl, default = key_impl("key", key), jax.random.key_impl(jax.random.key(0))
  if impl not in (None, default):
    raise ValueError(f"key must have the default generator {default}, got {impl}")
  return key_data(key)
