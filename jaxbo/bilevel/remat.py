"""A scan without outputs that stores less for reverse mode."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax

from jaxbo._types import PyTree


def final_carry(
  body: Callable[..., Any], carry: PyTree, slices: PyTree, length: int, *, remat: bool | int
) -> PyTree:
  """``lax.scan`` without outputs; with ``remat``, it stores only the start of each segment."""

  def steps(length, carry, slices):
    return jax.lax.scan(lambda c, s: (body(c, s)[0], None), carry, slices, length=length)[0]

  def segments(count, length, carry, slices):
    segment = jax.checkpoint(functools.partial(steps, length), prevent_cse=False)
    slices = jax.tree.map(lambda leaf: leaf.reshape(count, length, *leaf.shape[1:]), slices)
    return jax.lax.scan(lambda c, s: (segment(c, s), None), carry, slices, length=count)[0]

  if not remat:
    return steps(length, carry, slices)
  segment = min(length, math.isqrt(length) if remat is True else remat)
  count, rest = divmod(length, segment)
  carry = segments(count, segment, carry, jax.tree.map(lambda leaf: leaf[: length - rest], slices))
  if rest:
    carry = segments(1, rest, carry, jax.tree.map(lambda leaf: leaf[length - rest :], slices))
  return carry
