"""What a single loop asks of the inner loss: its gradient, and products with a vector."""

from typing import NamedTuple

import jax
import optax

from jaxbo._types import Data, Loss, PyTree


class InnerTerms(NamedTuple):
  r"""What one batch of the inner loss gives at :math:`(x, y, v)`.

  Attributes:
    gradient: :math:`\nabla_y g`, shaped like ``y``.
    hessian: :math:`\nabla^2_{yy} g\, v`, shaped like ``y``.
    cross: :math:`\nabla^2_{xy} g\, v`, shaped like ``x``.
  """

  gradient: optax.Params
  hessian: optax.Params
  cross: optax.Params


def inner_terms(inner_loss: Loss, x: PyTree, y: PyTree, v: PyTree, batch: Data) -> InnerTerms:
  """One gradient of the inner loss, and one product with its Jacobian for both products."""
  gradient, pull_back = jax.vjp(lambda x, y: jax.grad(inner_loss, argnums=1)(x, y, batch), x, y)
  cross, hessian = pull_back(v)  # The Hessian is symmetric.
  return InnerTerms(gradient, hessian, cross)
