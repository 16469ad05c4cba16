"""The parameters of both levels side by side."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxbo import _check
from jaxbo._types import PyTree


class Bilevel(NamedTuple):
  """Parameters of both levels, or gradients, updates, labels and projections for them.

  ``jax.grad`` of a loss on ``Bilevel`` parameters is ``Bilevel(outer=df/dx, inner=df/dy)``. To give
  each level its own optimizer, use ``optax.partition`` with the labels
  ``Bilevel("outer", "inner")``.

  Attributes:
    outer: the part for the outer parameters :math:`x`, any pytree.
    inner: the part for the inner parameters :math:`y`, any pytree.
  """

  outer: PyTree
  inner: PyTree


def check_params(name: str, params: object) -> Bilevel:
  """Returns ``params``; raises unless ``params`` are :class:`~jaxbo.Bilevel` floats."""
  if params is None:
    raise ValueError(f"{name}: update must be given params, jaxbo.Bilevel(outer=x, inner=y)")
  if not isinstance(params, Bilevel):
    raise TypeError(
      f"{name}: params must be jaxbo.Bilevel(outer=x, inner=y), got {type(params).__name__}"
    )
  _check.floating("params", params)
  return params


def scalar_dtype(tree: PyTree) -> jnp.dtype:
  """The dtype of losses and multipliers: float32, or wider if a leaf is wider."""
  return jnp.result_type(jnp.float32, *jax.tree.leaves(tree))
