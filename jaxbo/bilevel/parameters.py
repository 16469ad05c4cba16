"""The parameters of both levels side by side."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbo import _check


class Bilevel(NamedTuple):
  """Parameters of both levels, or gradients, updates, labels and projections for them.

  ``jax.grad`` of a loss on ``Bilevel`` parameters is ``Bilevel(outer=df/dx, inner=df/dy)``; with
  ``optax.partition`` and the labels ``Bilevel("outer", "inner")`` each level gets an optimizer of
  its own.

  Attributes:
    outer: what belongs to :math:`x`, any pytree.
    inner: what belongs to :math:`y`, any pytree.
  """

  outer: Any
  inner: Any


def check_params(name: str, params: Any) -> Bilevel:
  """Returns ``params``; raises unless they are :class:`~jaxbo.Bilevel` floats."""
  if params is None:
    raise ValueError(f"{name}: update must be given params, jaxbo.Bilevel(outer=x, inner=y)")
  if not isinstance(params, Bilevel):
    raise TypeError(
      f"{name}: params must be jaxbo.Bilevel(outer=x, inner=y), got {type(params).__name__}"
    )
  _check.floating("params", params)
  return params


def scalar_dtype(tree: Any):
  """The dtype of losses and multipliers: float32, or wider if a leaf is."""
  return jnp.result_type(jnp.float32, *jax.tree.leaves(tree))
