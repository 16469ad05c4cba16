"""Weights from shaped scores: normalize the losses, shape them, then weight the examples."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxbo import _check
from jaxbo._types import PyTree
from jaxbo.dro.batch import Batch
from jaxbo.dro.kl import kl
from jaxbo.dro.ranking import threshold
from jaxbo.dro.temperature import Temperature
from jaxbo.dro.weighting import (
  Response,
  Weighting,
  check_weighting,
  make_weighting,
  no_state,
  weigh_within,
)


class Normalizer(NamedTuple):
  """A map of a batch's losses to [-1, 1]: :func:`min_max` and the other normalizers return one.

  Attributes:
    init: ``init(dtype=float32) -> state``.
    normalize: ``normalize(batch, state) -> (scores, state)``.
  """

  init: Callable[..., PyTree]
  normalize: Callable[[Batch, PyTree], tuple[jax.Array, PyTree]]


class RunningRangeState(NamedTuple):
  """State of :func:`running_range`.

  Attributes:
    range_low: the moving average of a batch's smallest loss.
    range_high: the moving average of a batch's largest loss.
    range_count: the number of batches so far, int32.
  """

  range_low: jax.Array
  range_high: jax.Array
  range_count: jax.Array


def min_max(floor: float = 1e-6) -> Normalizer:
  r"""Maps the smallest loss of the batch to -1 and the largest to 1, as published.

  .. math::
    h_i = \frac{2 \ell_i - (\max \ell + \min \ell)}{\max(\max \ell - \min \ell, \text{floor})}

  The scores, and so the weights, are the same for :math:`a \ell + b`, :math:`a > 0`. One outlier
  sets the scale for all other losses, and losses that are nearly equal spread over the full range.

  Args:
    floor: the smallest range to divide by, positive, in units of the loss: smaller differences
      count as noise.

  Returns:
    A :class:`Normalizer` without state.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> weighting = jaxbo.dro.lin_upper(1.0, jaxbo.dro.min_max(floor=1.0))
    >>> print((10000 * weighting.weigh(jnp.array([2.0, 2.001]), weighting.init())[0]).round())
    [4998. 5002.]
  """
  _check.positive("floor", floor)
  return Normalizer(
    no_state, lambda batch, state: (_scale(batch.losses, batch.min, batch.max, floor), state)
  )


def quantile_range(low: float = 0.05, high: float = 0.95, floor: float = 1e-6) -> Normalizer:
  """Maps two quantiles of the batch to -1 and 1, and clips losses outside them.

  Unlike with :func:`min_max`, an outlier beyond the quantiles does not set the scale. The quantile
  ``q`` is the largest loss with at least ``1 - q`` of the reference mass at or above it.

  Args:
    low: the lower quantile, in [0, 1).
    high: the upper quantile, above ``low`` and at most 1.
    floor: the smallest range to divide by, positive, in units of the loss.

  Returns:
    A :class:`Normalizer` without state.

  Raises:
    ValueError: if the quantiles are not ordered and within [0, 1], or ``floor`` is not positive.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> losses = jnp.array([1.0, 2.0, 3.0, 4.0, 1000.0])
    >>> for normalizer in (jaxbo.dro.min_max(), jaxbo.dro.quantile_range(0.0, 0.75)):
    ...   weighting = jaxbo.dro.lin_upper(1.0, normalizer)
    ...   print((100 * weighting.weigh(losses, weighting.init())[0]).round())
    [15. 15. 15. 15. 40.]
    [ 9. 18. 24. 24. 24.]
  """
  _check.within("low", low, 0, 1, ends="[)")
  _check.within("high", high, low, 1, ends="(]")
  _check.positive("floor", floor)

  def normalize(batch, state):
    quantile = lambda q: threshold(batch, jnp.asarray(1 - q, batch.losses.dtype))
    return _scale(batch.losses, quantile(low), quantile(high), floor), state

  return Normalizer(no_state, normalize)


def running_range(rate: float | jax.Array = 0.1, floor: float = 1e-6) -> Normalizer:
  """Maps moving averages of the smallest and the largest loss to -1 and 1, and clips.

  A score then compares an example with all recent examples, which matters for small batches.

  Args:
    rate: the share of the new batch in the averages, in (0, 1]; the first batch sets them.
    floor: the smallest range to divide by, positive, in units of the loss.

  Returns:
    A :class:`Normalizer`.

  Raises:
    ValueError: if ``rate`` is outside its range, or ``floor`` is not positive.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> weighting = jaxbo.dro.lin_upper(1.0, jaxbo.dro.running_range(0.1))
    >>> _, state, _ = weighting.weigh(jnp.array([0.0, 4.0]), weighting.init())
    >>> print(weighting.weigh(jnp.array([3.0, 4.0]), state)[0])        # both in the upper half
    [0.5 0.5]
  """
  _check.within("rate", rate, 0, 1, ends="(]")
  _check.positive("floor", floor)

  def init(dtype: jax.typing.DTypeLike = jnp.float32) -> RunningRangeState:
    return RunningRangeState(jnp.zeros((), dtype), jnp.zeros((), dtype), jnp.zeros((), jnp.int32))

  def normalize(batch, state):
    dtype = batch.losses.dtype
    share = jnp.where(state.range_count == 0, 1, jnp.asarray(rate, dtype))
    low = state.range_low.astype(dtype) * (1 - share) + share * batch.min
    high = state.range_high.astype(dtype) * (1 - share) + share * batch.max
    count = jnp.minimum(state.range_count, jnp.iinfo(jnp.int32).max - 1) + 1
    return _scale(batch.losses, low, high, floor), RunningRangeState(low, high, count)

  return Normalizer(init, normalize)


def _scale(losses: jax.Array, low: jax.Array, high: jax.Array, floor: float) -> jax.Array:
  """Maps ``low`` to -1 and ``high`` to 1; subtracts first, which is exact for close losses."""
  return jnp.clip(((losses - low) - (high - losses)) / jnp.maximum(high - low, floor), -1, 1)


def shaped(
  weighting: Weighting,
  shape: Callable[[jax.Array], jax.Array],
  normalizer: Normalizer | None = None,
) -> Weighting:
  r"""Weights examples by a function of their normalized losses.

  .. math:: w = \text{weighting}(f(h_1), \dots, f(h_n)), \qquad h = \text{normalizer}(\ell)

  Args:
    weighting: the :class:`Weighting` that takes the scores as losses, such as :func:`kl`.
    shape: :math:`f`, a function of the vector of normalized losses, which are in [-1, 1].
    normalizer: :func:`min_max` (default), :func:`quantile_range` or :func:`running_range`.

  Returns:
    A :class:`Weighting`. Its state is the pair of the states of ``weighting`` and ``normalizer``.

  Raises:
    TypeError: if ``weighting`` is not a :class:`Weighting`, ``normalizer`` is not a
      :class:`Normalizer`, or ``shape`` does not take one argument.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> hardest_half = jaxbo.dro.shaped(jaxbo.dro.kl(1.0), lambda h: (h > 0) * 1.0)
    >>> weights, _, _ = hardest_half.weigh(jnp.array([1.0, 2.0, 5.0]), hardest_half.init())
    >>> print((100 * weights).round())
    [21. 21. 58.]
  """
  check_weighting("weighting", weighting)
  _check.takes_arguments("shape", shape, "scores")
  normalizer = min_max() if normalizer is None else normalizer
  if not isinstance(normalizer, Normalizer):
    raise TypeError(
      f"normalizer must be a jaxbo.dro.Normalizer, say jaxbo.dro.min_max(), got {normalizer}"
    )

  def init(dtype: jax.typing.DTypeLike = jnp.float32):
    return weighting.init(dtype), normalizer.init(dtype)

  def respond(batch: Batch, state):
    inner_state, range_state = state
    scores, range_state = normalizer.normalize(batch, range_state)
    weights, inner_state, info = weigh_within(weighting, shape(scores), batch, inner_state)
    return Response(weights, (inner_state, range_state), temperature=info.temperature)

  return make_weighting(respond, init)


def lin_upper(temperature: Temperature = 1.0, normalizer: Normalizer | None = None) -> Weighting:
  r"""Gives easy examples less weight, and the upper half of the range equal weight (LinUpper).

  The weights are exponential in the scores :math:`\min(h_i + 1, 1)`. No weight is more than
  :math:`e^{1 / r}` times another; for :math:`r \ge 1 / \log 2`, no weight exceeds :math:`2 / n`.

  Args:
    temperature: :math:`r > 0`, in units of the scores, which are in [0, 1]: a number, a schedule of
      the number of batches so far, or :func:`target_ess`. The published experiments use 1 and 0.4,
      after a burn-in at 100.
    normalizer: the map from the losses to :math:`h`; :func:`min_max` by default.

  Returns:
    A :class:`Weighting`.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> weighting = jaxbo.dro.lin_upper(temperature=1.0)
    >>> weights, _, _ = weighting.weigh(jnp.array([1.0, 2.0, 3.0, 5.0]), weighting.init())
    >>> print((100 * weights).round())                   # proportional to exp([0, 0.5, 1, 1])
    [12. 20. 34. 34.]

  References:
    Sow et al., `Dynamic Loss-Based Sample Reweighting for Improved Large Language Model Pretraining
    <https://arxiv.org/abs/2502.06733>`_, 2025.
  """
  return shaped(kl(temperature), lambda h: jnp.minimum(h + 1, 1), normalizer)


def quadratic(temperature: Temperature = 1.0, normalizer: Normalizer | None = None) -> Weighting:
  r"""Favors losses in the middle of the range (Quadratic).

  The weights are exponential in the scores :math:`1 - h_i^2`.

  Args:
    temperature: positive, in units of the scores, which are in [0, 1]: a number, a schedule of the
      number of batches so far, or :func:`target_ess`.
    normalizer: the map from the losses to :math:`h`; :func:`min_max` by default.

  Returns:
    A :class:`Weighting`.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> weighting = jaxbo.dro.quadratic(temperature=1.0)
    >>> weights, _, _ = weighting.weigh(jnp.array([1.0, 2.0, 3.0]), weighting.init())
    >>> print((100 * weights).round())
    [21. 58. 21.]

  References:
    Sow et al., `Dynamic Loss-Based Sample Reweighting for Improved Large Language Model Pretraining
    <https://arxiv.org/abs/2502.06733>`_, 2025.
  """
  return shaped(kl(temperature), lambda h: 1 - h * h, normalizer)


def extremes(temperature: Temperature = 1.0, normalizer: Normalizer | None = None) -> Weighting:
  r"""Favors losses at both ends of the range (Extremes).

  The weights are exponential in the scores :math:`|h_i|`.

  Args:
    temperature: positive, in units of the scores, which are in [0, 1]: a number, a schedule of the
      number of batches so far, or :func:`target_ess`.
    normalizer: the map from the losses to :math:`h`; :func:`min_max` by default.

  Returns:
    A :class:`Weighting`.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> weighting = jaxbo.dro.extremes(temperature=1.0)
    >>> weights, _, _ = weighting.weigh(jnp.array([1.0, 2.0, 3.0]), weighting.init())
    >>> print((100 * weights).round())
    [42. 16. 42.]

  References:
    Sow et al., `Dynamic Loss-Based Sample Reweighting for Improved Large Language Model Pretraining
    <https://arxiv.org/abs/2502.06733>`_, 2025.
  """
  return shaped(kl(temperature), jnp.abs, normalizer)
