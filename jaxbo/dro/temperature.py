"""Temperatures: a number, a schedule, or a target for the effective sample size."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check, _schedule
from jaxbo.dro.batch import Batch, at_least_tiny
from jaxbo.dro.bisection import smallest


class TargetEss(NamedTuple):
  """A target for the effective sample size, which sets a temperature; see :func:`target_ess`.

  Attributes:
    fraction: the effective sample size as a fraction of the batch.
  """

  fraction: float | jax.Array


Temperature: TypeAlias = optax.ScalarOrSchedule | TargetEss


class TemperatureState(NamedTuple):
  """State of a weighting with a temperature.

  Attributes:
    temperature_count: the number of batches so far, int32, for schedules. Batches in which no
      example counts are not counted.
  """

  temperature_count: jax.Array


def target_ess(fraction: float | jax.Array) -> TargetEss:
  r"""Lowers the temperature of each batch until the effective sample size reaches the target.

  The temperature is the smallest at which

  .. math:: \Big(n \sum_i w_i^2\Big)^{-1} \ge \text{fraction}

  (:math:`\big(\sum_i w_i^2 / p_i\big)^{-1}` under a prior :math:`p`). The left-hand side grows with
  the temperature: from the fraction of examples that attain the maximum, up to 1. With this target,
  the weights do not depend on the scale of the losses.

  Cost: a search that computes 7 sets of weights in each of 11 steps (22 in double precision).

  Args:
    fraction: the effective sample size as a fraction of the batch, in (0, 1]; 1 gives uniform
      weights.

  Returns:
    A value for ``temperature=`` of :func:`kl`, :func:`kl_cvar`, :func:`lin_upper`,
    :func:`quadratic` and :func:`extremes`.

  Raises:
    ValueError: if ``fraction`` is outside its range.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> weighting = jaxbo.dro.kl(jaxbo.dro.target_ess(0.5))
    >>> _, _, info = weighting.weigh(jnp.array([1.0, 2.0, 3.0, 4.0]), weighting.init())
    >>> print(f"{info.effective_sample_size:.1f} {info.temperature:.2f}")
    2.0 0.94
  """
  return TargetEss(_check.within("fraction", fraction, 0, 1, ends="(]"))


def check_temperature(name: str, value: Temperature) -> None:
  """Raises unless ``value`` is a positive number, a schedule or a target."""
  if not isinstance(value, TargetEss):
    _schedule.check(name, value, _check.positive)


def init_temperature(dtype: jax.typing.DTypeLike = jnp.float32) -> TemperatureState:
  """The state before the first batch."""
  del dtype
  return TemperatureState(jnp.zeros((), jnp.int32))


def advance(state: TemperatureState) -> TemperatureState:
  """The state after one more batch."""
  return TemperatureState(_schedule.after(state.temperature_count))


def scheduled(value: Any, state: TemperatureState, dtype: jax.typing.DTypeLike) -> jax.Array:
  """Returns the number ``value``, or the value of the schedule at this batch."""
  return _schedule.value_at(value, state.temperature_count, dtype)


def find_temperature(
  temperature: Temperature,
  batch: Batch,
  state: TemperatureState,
  weights_at: Callable[[jax.Array], jax.Array],
  **search: int,
) -> jax.Array:
  """Returns the temperature of this batch, at least the smallest normal number.

  ``weights_at(temperature)`` returns the weights that a :class:`TargetEss` looks at; ``search`` is
  for :func:`~jaxbo.dro.bisection.smallest`.
  """
  if not isinstance(temperature, TargetEss):
    return at_least_tiny(scheduled(temperature, state, batch.losses.dtype))

  def is_even(value):
    density = weights_at(value) / jnp.where(batch.valid, batch.reference, 1)
    return jnp.asarray(temperature.fraction, value.dtype) * batch.expectation(density**2) <= 1

  # At a temperature of 1e8 times the spread of the losses, weights are uniform up to rounding.
  high = at_least_tiny(batch.max - batch.min) * 1e8
  tiny = jnp.asarray(jnp.finfo(high.dtype).tiny, high.dtype)
  return smallest(is_even, tiny, high, **search)
