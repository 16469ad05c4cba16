"""Numbers that may be schedules, and the counts that schedules take."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check


def check(
  name: str,
  value: optax.ScalarOrSchedule,
  check_number: Callable[[str, float | jax.Array], object],
) -> None:
  """Raises unless ``value`` is a schedule or a number that passes ``check_number``."""
  if callable(value):
    _check.takes_arguments(name, value, "count")
  else:
    check_number(name, value)


def value_at(
  value: optax.ScalarOrSchedule, count: jax.Array, dtype: jax.typing.DTypeLike
) -> jax.Array:
  """A number, or a schedule at ``count``, as an array of ``dtype``."""
  return jnp.asarray(value(count) if callable(value) else value, dtype)


def after(count: jax.Array) -> jax.Array:
  """The next count; the largest count of its dtype stays."""
  return jnp.asarray(optax.safe_increment(count))
