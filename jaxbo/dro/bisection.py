"""Exact section search over the ordered bits of floating-point numbers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxbo import _tree


def smallest(
  holds: Callable[[jax.Array], jax.Array],
  low: jax.Array,
  high: jax.Array,
  *,
  bits_per_step: int = 3,
) -> jax.Array:
  """Returns the smallest number from ``low`` to ``high`` for which ``holds`` is true.

  Floats of one sign have the same order as their bits. Dividing an interval of bits therefore finds
  the number exactly, at any scale and without a tolerance. A step divides the interval by 8, at 7
  numbers that are tried at once: 11 steps for float32. A bisection takes 32 steps with a seventh of
  the work each, but on accelerators and between devices the number of steps sets the cost.

  Args:
    holds: a function of a scalar, false below some number and true from there on; ``high`` counts
      as true whatever it gives.
    low: a scalar of float32 or float64.
    high: a scalar of the same dtype.
    bits_per_step: 1 is a bisection.

  Returns:
    The scalar; it has no derivative.
  """
  low, high = jax.lax.stop_gradient((low, high))
  dtype = high.dtype
  bits = jnp.finfo(dtype).bits
  uint = jnp.dtype(f"uint{bits}")
  sign, ways = jnp.asarray(1 << (bits - 1), uint), 1 << bits_per_step

  def order(x):
    # Adding zero turns -0.0 into 0.0; the bits of negative numbers are ordered backwards.
    i = jax.lax.bitcast_convert_type(x + 0, uint)
    return jnp.where(i >= sign, ~i, i | sign)

  def number(i):
    return jax.lax.bitcast_convert_type(jnp.where(i >= sign, i ^ sign, ~i), dtype)

  def divide(_, bounds):
    low, high = bounds
    width, k = high - low, jnp.arange(1, ways, dtype=uint)
    tried = low + (width // ways) * k + (width % ways) * k // ways  # low + width k / ways
    first = jnp.argmax(jnp.append(jax.vmap(holds)(number(tried)), True))
    return jnp.append(low, tried + 1)[first], jnp.append(tried, high)[first]

  bounds = jnp.minimum(order(low), order(high)), order(high)
  bounds = _tree.vary_alike(bounds, low, high, holds(high))
  return number(jax.lax.fori_loop(0, -(-bits // bits_per_step), divide, bounds)[1])
