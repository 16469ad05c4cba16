"""The types of what users hand in: pytrees, keys, losses and linear solvers."""

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax

PyTree: TypeAlias = Any
"""Any pytree. A function of the user may ask for a narrower type, so it cannot be a union."""

Data: TypeAlias = Any
"""What a loss reads besides parameters: a pytree of arrays, or ``None``."""

Key: TypeAlias = jax.typing.ArrayLike
"""An int, a raw key array (JAX or NumPy), or a typed key."""


@runtime_checkable
class Loss(Protocol):
  """A loss of both levels, ``loss(x, y, batch) -> scalar``, or ``(scalar, aux)`` with ``has_aux``.

  Parameters and batches are pytrees; jaxbo passes them by position.
  """

  def __call__(self, x: PyTree, y: PyTree, batch: Data, /) -> jax.Array | tuple[jax.Array, PyTree]:
    """The loss."""
    ...


@runtime_checkable
class BatchLoss(Protocol):
  """``loss_fn(params, batch) -> losses``, ``[batch]``, or ``(losses, aux)`` with ``has_aux``."""

  def __call__(self, params: PyTree, batch: Data, /) -> jax.Array | tuple[jax.Array, PyTree]:
    """The losses of a batch."""
    ...


@runtime_checkable
class SolveLinear(Protocol):
  """Solves ``matvec(x) = b`` from ``x0``: ``(x, info)``.

  ``info`` is a :class:`jaxbo.bilevel.LinearInfo`, or anything else, which is ignored.
  """

  def __call__(
    self, matvec: Callable[[PyTree], PyTree], b: PyTree, x0: PyTree, /
  ) -> tuple[PyTree, Any]:
    """The solution and what the solver reports."""
    ...
