"""Which leaves :func:`jaxbo.add_es_response` perturbs, and directions for them alone."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp

from jaxbo._types import PyTree
from jaxbo.bilevel.directions import Draw, Family

Perturb: TypeAlias = PyTree | Callable[[PyTree], PyTree]
"""Python bools in the shape of ``x`` or of its upper levels, or a function ``x -> bools``."""


def chosen_leaves(perturb: Perturb, x: PyTree) -> list[bool]:
  """For each leaf of ``x``, whether ``perturb`` chooses it."""
  mask = perturb(x) if callable(perturb) else perturb
  try:
    chosen: list[PyTree] = jax.tree.leaves(jax.tree.broadcast(mask, x))
    fits = all(isinstance(choice, bool) for choice in chosen)
  except ValueError:
    chosen, fits = [], False
  if not fits:
    raise ValueError(
      "perturb must be Python bools in the structure of x or of its upper levels, got "
      f"{mask!r} for {jax.tree.structure(x)}"
    )
  return chosen


def part_of(
  tree: PyTree, chosen: Sequence[bool]
) -> tuple[list[PyTree], Callable[[list[PyTree]], PyTree]]:
  """The chosen leaves of ``tree``, and ``merge(leaves) -> tree``, which puts others in."""
  leaves, structure = jax.tree.flatten(tree)

  def merge(part):
    part = iter(part)
    return structure.unflatten(
      [next(part) if choice else leaf for choice, leaf in zip(chosen, leaves, strict=True)]
    )

  return [leaf for choice, leaf in zip(chosen, leaves, strict=True) if choice], merge


def directions_for(family: Family, chosen: Sequence[bool]) -> Family:
  """Directions of ``family`` in the chosen leaves together, and zero in the others."""
  if all(chosen):
    return family

  def of_chosen(key: jax.Array, like: PyTree, num_samples: int) -> Draw:
    part, _ = part_of(like, chosen)
    _, merge = part_of(jax.tree.map(jnp.zeros_like, like), chosen)
    draw = family(key, part, num_samples)
    return lambda sample: merge(draw(sample))

  return of_chosen
