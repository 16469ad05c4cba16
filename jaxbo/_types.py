"""The types of what users hand in: losses and linear solvers."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax


@runtime_checkable
class Loss(Protocol):
  """A loss of both levels, ``loss(x, y, batch) -> scalar``, or ``(scalar, aux)`` with ``has_aux``.

  Parameters and batches are pytrees; jaxbo passes them by position.
  """

  def __call__(self, x: Any, y: Any, batch: Any, /) -> jax.Array | tuple[jax.Array, Any]:
    """The loss."""
    ...


@runtime_checkable
class BatchLoss(Protocol):
  """``loss_fn(params, batch) -> losses``, ``[batch]``, or ``(losses, aux)`` with ``has_aux``."""

  def __call__(self, params: Any, batch: Any, /) -> jax.Array | tuple[jax.Array, Any]:
    """The losses of a batch."""
    ...


@runtime_checkable
class SolveLinear(Protocol):
  """Solves ``matvec(x) = b`` from ``x0``: ``(x, info)``.

  ``info`` is a :class:`jaxbo.bilevel.LinearInfo`, or anything else, which is ignored.
  """

  def __call__(self, matvec: Callable[[Any], Any], b: Any, x0: Any, /) -> tuple[Any, Any]:
    """The solution and what the solver reports."""
    ...
