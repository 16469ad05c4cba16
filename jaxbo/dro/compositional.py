"""A moving average of the normalizer, which makes small batches robust too."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check, _schedule
from jaxbo._types import PyTree
from jaxbo.dro.weighting import (
  Response,
  Weighting,
  check_weighting,
  make_weighting,
  weigh_within,
)


class CompositionalState(NamedTuple):
  r"""State of :func:`compositional`.

  Attributes:
    running_value: the running estimate :math:`v` of the robust value, in units of the loss.
    compositional_count: the number of batches so far, int32.
    compositional_inner: the state of the inner weighting.
  """

  running_value: jax.Array
  compositional_count: jax.Array
  compositional_inner: PyTree


def compositional(weighting: Weighting, rate: optax.ScalarOrSchedule) -> Weighting:
  r"""Divides exponential weights by a moving average of their normalizer over batches.

  .. math::
    u \leftarrow (1 - \gamma) u + \gamma \sum_i p_i e^{\ell_i / \lambda}, \qquad
    w_i = \frac{p_i e^{\ell_i / \lambda}}{u}

  The gradient of :math:`\lambda \log \mathbb E\, e^{\ell / \lambda}` is a ratio of expectations. On
  each batch, :func:`kl` takes the ratio of two sums over the batch. Its weights are too uniform on
  a small batch and exactly uniform on a batch of one. The moving average is the published remedy
  for compositional problems.

  The weights do not sum to 1: harder batches get more (``info.weight_sum``, at most
  :math:`1 / \gamma`). A smaller rate comes closer to the robust objective, but follows the
  parameters more slowly.

  The state holds :math:`v = \lambda \log u`, an estimate of the robust value (our choice: see
  Departures from the papers).

  Args:
    weighting: :func:`kl` with a number or a schedule as its temperature, or :func:`tilted`.
    rate: :math:`\gamma` in (0, 1], or a schedule of the number of batches so far, such as a cosine
      that starts at 1. A rate of 1 gives ``weighting`` itself.

  Returns:
    A :class:`Weighting`. ``info.objective`` is :math:`v`; ``info.surrogate`` is the weighted loss
    divided by the sum of the weights.

  Raises:
    ValueError: if ``rate`` is outside its range.
    TypeError: if ``weighting`` is not exponential, or finds its temperature from each batch.

  Example:
    >>> import jax.numpy as jnp, jaxbo, numpy as np
    >>> weighting = jaxbo.dro.compositional(jaxbo.dro.kl(1.0), rate=0.1)
    >>> _, state, _ = weighting.weigh(jnp.array([1.0]), weighting.init())     # a batch of one
    >>> weights, state, _ = weighting.weigh(jnp.array([3.0]), state)          # and a harder one
    >>> print(np.asarray(weights).round(2))                          # e^3 / (0.9 e + 0.1 e^3)
    [4.51]

  References:
    Wang, Fang and Liu, `Stochastic Compositional Gradient Descent
    <https://arxiv.org/abs/1411.3803>`_, 2017; Sow et al., `Doubly Robust Instance-Reweighted
    Adversarial Training <https://arxiv.org/abs/2308.00311>`_, 2024.
  """
  check_weighting("weighting", weighting)
  if weighting.log_ratio is None:
    raise TypeError(
      "weighting must be exponential at a given temperature: jaxbo.dro.kl with a number or a "
      "schedule, or jaxbo.dro.tilted"
    )
  log_ratio = weighting.log_ratio
  _schedule.check("rate", rate, lambda name, value: _check.within(name, value, 0, 1, ends="(]"))

  def init(dtype: jax.typing.DTypeLike = jnp.float32) -> CompositionalState:
    return CompositionalState(jnp.zeros((), dtype), jnp.zeros((), jnp.int32), weighting.init(dtype))

  def respond(batch, state):
    dtype = batch.losses.dtype
    weights, inner, info = weigh_within(weighting, batch.losses, batch, state.compositional_inner)
    count = state.compositional_count
    share = _schedule.value_at(rate, count, dtype)
    share = jnp.where(count == 0, 1, share)
    # A tilt of zero is an infinite temperature.
    temperature = jnp.where(info.temperature == 0, 1e20, info.temperature)
    batch_value = info.objective
    old = jnp.where(share < 1, state.running_value.astype(dtype), batch_value)

    # Relative to the larger of the two powers, the average neither overflows nor cancels.
    larger = jnp.where((old - batch_value) / temperature > 0, old, batch_value)
    power = lambda value: jnp.expm1((value - larger) / temperature)
    average = (1 - share) * power(old) + share * power(batch_value)
    value = larger + temperature * jnp.log1p(average)
    weights *= jnp.exp((batch_value - value) / temperature)
    count = jnp.minimum(count, jnp.iinfo(jnp.int32).max - 1) + 1
    return Response(weights, CompositionalState(value, count, inner), value, info.temperature)

  return make_weighting(
    respond,
    init,
    log_ratio=lambda losses, state: log_ratio(losses, state.compositional_inner),
  )
