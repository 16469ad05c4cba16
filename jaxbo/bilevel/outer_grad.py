"""The gradients of the outer loss in both levels: the input of a response."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import ClassVar

import jax
import optax

from jaxbo import _check
from jaxbo._not_gradients import NotGradients
from jaxbo._types import PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class OuterGrads(NotGradients):
  r"""The pair :math:`(\nabla_x f, \nabla_y f)` at the inner solution: the input of a response.

  Make it and give it to the ``update`` of a response in the same function, inside one ``jax.jit``.
  Whatever treats it as a tree of gradients raises ``TypeError``: a transformation in front of the
  response, a wrapper around it, or a ``jit``, ``scan`` or branch that it would enter or leave. The
  gradients themselves come from ``outer_grad, inner_grad = grads``.

  Attributes:
    x: :math:`\nabla_x f`, of the structure of ``x``.
    y: :math:`\nabla_y f`, of the structure of ``y``.
    loss: the outer loss, a scalar.
    aux: what the loss returned besides; ``None`` without ``has_aux``.

  Example:
    >>> import jaxbo, optax
    >>> grads = jaxbo.outer_grad(lambda x, y: x * y)(2.0, 3.0)
    >>> optax.clip(1.0).update(grads, optax.EmptyState())
    Traceback (most recent call last):
    TypeError: OuterGrads are not gradients yet: put a response, such as jaxbo.add_implicit_...
  """

  _cure: ClassVar[str] = "a response, such as jaxbo.add_implicit_response(inner),"

  x: optax.Updates
  y: optax.Updates
  loss: jax.Array
  aux: PyTree = None

  def __iter__(self) -> Iterator[optax.Updates]:
    """The two gradients."""
    return iter((self.x, self.y))


def loss_and_aux(
  name: str, loss: Callable[..., PyTree], has_aux: bool
) -> Callable[..., tuple[jax.Array, PyTree]]:
  """``loss(x, y, *args)`` with its output checked: ``(loss, aux)``; aux may be ``None``."""

  def checked(x, y, *args):
    value, aux = loss(x, y, *args), None
    if has_aux:
      if not isinstance(value, tuple) or len(value) != 2:
        raise TypeError(f"{name} must return (scalar, aux) with has_aux=True, got {value!r}")
      value, aux = value
    _check.scalar_loss(name, value, {"x": x, "y": y})
    return value, aux

  return checked


def outer_grad(
  outer_loss: Callable[..., PyTree], *, has_aux: bool = False
) -> Callable[..., OuterGrads]:
  r"""Gradients of the outer loss in both levels: the input of a response.

  These are the gradients of ``jax.value_and_grad(outer_loss, (0, 1))``. A response also takes the
  plain tuple, but then a transformation in front of the response acts on both gradients without an
  error.

  Args:
    outer_loss: the outer loss :math:`f`, ``outer_loss(x, y, *args) -> scalar``.
    has_aux: whether ``outer_loss`` returns ``(scalar, aux)``.

  Returns:
    ``grads(x, y, *args) -> OuterGrads``, with ``grads.loss`` and ``grads.aux``. One forward and one
    backward pass.

  Raises:
    ValueError: if the outer loss is not a scalar, or varies over an axis of ``shard_map`` over
      which ``x`` or ``y`` does not (with the replication check on).
    TypeError: if the outer loss does not return a pair with ``has_aux``, or returns one without
      it, or is not a real float.

  Example:
    >>> import jax.numpy as jnp, jaxbo, optax
    >>> inner = jaxbo.inner_solver(lambda x, y, batch: (y - x) ** 2, optax.sgd(0.25), 40)
    >>> outer = optax.chain(jaxbo.add_unrolled_response(inner), optax.clip(1.0), optax.sgd(0.1))
    >>> x = jnp.float32(2.0)
    >>> y = inner.solve(x, inner.init(jnp.float32(0.0)), None)
    >>> grads = jaxbo.outer_grad(lambda x, y: y**2)(x, y.params)
    >>> update, _ = outer.update(grads, outer.init(x), x, solution=y, batch=None)
    >>> print(grads.loss.round(3), update)            # dF/dx = 2 y dy/dx = 4, clipped to 1
    4.0 -0.1
  """
  gradients = jax.value_and_grad(
    loss_and_aux("outer_loss", outer_loss, has_aux), (0, 1), has_aux=True
  )

  def grads(x, y, *args):
    (loss, aux), (of_x, of_y) = gradients(x, y, *args)
    return OuterGrads(of_x, of_y, loss, aux)

  return grads
