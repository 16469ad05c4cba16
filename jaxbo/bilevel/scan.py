"""Scans over inner steps: one that stores less for reverse mode, and one that stops early."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxbo import _tree
from jaxbo._types import PyTree


def final_carry(
  body: Callable[..., Any],
  carry: PyTree,
  slices: PyTree,
  length: int,
  *,
  remat: bool | int,
  scan: Callable[..., Any] = jax.lax.scan,
) -> PyTree:
  """A scan without outputs; with ``remat``, it stores only the start of each segment."""

  def steps(length, carry, slices):
    return scan(lambda c, s: (body(c, s)[0], None), carry, slices, length)[0]

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


def scan_until(
  body: Callable[..., Any],
  carry: tuple[PyTree, PyTree],
  slices: PyTree,
  length: int,
  *,
  tolerance: float | jax.Array,
) -> tuple[PyTree, PyTree]:
  """``lax.scan`` over ``(y, opt_state)`` that stops once a step changes ``y`` by little.

  The outputs of the steps that are left out are those of the last one.
  """
  of_step = lambda n: jax.tree.map(lambda leaf: leaf[n], slices)
  shapes = jax.eval_shape(body, carry, of_step(0))[1]
  outputs = _tree.empty_slots(_tree.on_meshes_of(shapes, carry), length)

  def goes_on(state):
    n, _, _, changed = state
    return (n < length) & changed

  def step(state):
    n, carry, outputs, _ = state
    after, output = body(carry, of_step(n))
    # All later rows, so that no row is left empty.
    later = lambda rows, row: jnp.where(
      jnp.reshape(jnp.arange(length) >= n, (-1,) + (1,) * row.ndim), row[None], rows
    )
    change = _tree.norm(optax.tree.sub(after[0], carry[0]))
    # A step of no length is one of a warm-up, or of gradients that are accumulated.
    changed = ~((change <= tolerance * _tree.norm(after[0])) & (change > 0))
    return n + 1, after, jax.tree.map(later, outputs, output), changed

  start = (jnp.int32(0), carry, outputs, jnp.bool_(True))
  _, carry, outputs, _ = jax.lax.while_loop(goes_on, step, start)
  return carry, outputs
