"""What stands behind a head in a whole method: a learning rate, or an optimizer in its place."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

LearningRate: TypeAlias = optax.ScalarOrSchedule | optax.GradientTransformation
"""A number, a schedule, or the optimizer itself, such as ``optax.adam(1e-3)``."""


def optimizer(
  learning_rate: Any,
  make: Callable[..., optax.GradientTransformation] = optax.scale_by_learning_rate,
  *,
  name: str = "learning_rate",
) -> optax.GradientTransformation:
  """``make(learning_rate)``, or the optimizer that was given in place of a learning rate."""
  if callable(getattr(learning_rate, "init", None)) and hasattr(learning_rate, "update"):
    return learning_rate
  if not _is_rate(learning_rate):
    raise TypeError(
      f"{name} must be a number, a schedule or an optimizer such as optax.adam(1e-3), got "
      f"{learning_rate!r}"
    )
  return make(learning_rate)


def _is_rate(value: object) -> bool:
  """Whether ``value`` is one number, or gives one at a count."""
  if callable(value):
    try:
      value = jax.eval_shape(value, jax.ShapeDtypeStruct((), jnp.int32))
    except jax.errors.ConcretizationTypeError:  # It branches on the count in Python: not under jit.
      return True
    except TypeError:
      return False
  return isinstance(value, (int, float)) or getattr(value, "shape", None) == ()
