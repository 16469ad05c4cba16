"""Exact bisection over the ordered bits of floating-point numbers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxbo import _tree


def smallest(holds: Callable[[jax.Array], jax.Array], low: jax.Array, high: jax.Array) -> jax.Array:
  """Returns the smallest number from ``low`` to ``high`` for which ``holds`` is true.

  Floats of one sign have the same order as their bits. Halving an interval of bits therefore finds
  the number exactly, at any scale and without a tolerance, in as many steps as a float has bits.

  Args:
    holds: a function of a scalar, false below some number and true from there on; ``high`` counts
      as true whatever it gives.
    low: a scalar of float32 or float64.
    high: a scalar of the same dtype.

  Returns:
    The scalar; it has no derivative.
  """
  low, high = jax.lax.stop_gradient((low, high))
  dtype = high.dtype
  bits = jnp.finfo(dtype).bits
  int_dtype = jnp.dtype(f"int{bits}")
  flip = jnp.asarray(jnp.iinfo(int_dtype).max, int_dtype)

  def order(x):
    # Adding zero turns -0.0 into 0.0; the bits of negative numbers are ordered backwards.
    i = jax.lax.bitcast_convert_type(x + 0, int_dtype)
    return jnp.where(i < 0, i ^ flip, i)

  def number(i):
    return jax.lax.bitcast_convert_type(jnp.where(i < 0, i ^ flip, i), dtype)

  def halve(_, bounds):
    low, high = bounds
    middle = (low & high) + ((low ^ high) >> 1)  # the mean, rounded down, without overflow
    true = holds(number(middle))
    return jnp.where(true, low, middle + 1), jnp.where(true, middle, high)

  ends = _tree.vary_alike((order(low), order(high)), low, high, holds(high))
  return number(jax.lax.fori_loop(0, bits, halve, ends)[1])
