"""The tail of a whole method: a learning rate, or an optimizer to use instead."""

from collections.abc import Callable
from typing import TypeAlias

import optax

LearningRate: TypeAlias = optax.ScalarOrSchedule | optax.GradientTransformation
"""A float, a schedule, or an optimizer such as ``optax.adam(1e-3)``."""


def optimizer(
  learning_rate: LearningRate,
  make: Callable[..., optax.GradientTransformation] = optax.scale_by_learning_rate,
) -> optax.GradientTransformation:
  """``make(learning_rate)``, or ``learning_rate`` itself if it is an optimizer."""
  if isinstance(learning_rate, optax.GradientTransformation):
    return learning_rate
  return make(learning_rate)
