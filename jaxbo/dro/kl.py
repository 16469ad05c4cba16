"""Exponential weights: the KL-regularized and KL-ball robust losses, and the tilted loss."""

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check, _schedule
from jaxbo.dro import temperature as temperatures
from jaxbo.dro.batch import Batch, at_least_tiny
from jaxbo.dro.bisection import smallest
from jaxbo.dro.diagnostics import relative_entropy
from jaxbo.dro.temperature import TargetEss, Temperature
from jaxbo.dro.weighting import Response, Weighting, make_weighting


def uniform() -> Weighting:
  r"""The weights of ordinary training: the prior, or :math:`1/n` without a prior.

  Returns:
    A :class:`Weighting` without state. It is not the strategy called "uniform" in the published
    code of loss-based reweighting (see Departures from the papers).

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> jaxbo.dro.uniform().weigh(jnp.array([1.0, 3.0]), ())[0].tolist()
    [0.5, 0.5]
  """
  return make_weighting(
    lambda batch, state: Response(batch.reference),
    log_ratio=lambda losses, state: jnp.zeros_like(losses),
  )


def kl(temperature: Temperature) -> Weighting:
  r"""Exponential weights: the worst case under a penalty on the relative entropy (IR-DRO).

  .. math::
    \max_{w \in \Delta} \sum_i w_i \ell_i - \lambda \operatorname{KL}(w \| p)
      = \lambda \log \sum_i p_i e^{\ell_i / \lambda}, \qquad
    w_i = \frac{p_i e^{\ell_i / \lambda}}{\sum_j p_j e^{\ell_j / \lambda}}

  A high temperature gives the mean; a low temperature gives the maximum, and tied maxima share the
  weight. On a small batch the weights are closer to uniform than they would be over the whole data,
  and on a batch of one they are exactly uniform; :func:`compositional` corrects this.

  Args:
    temperature: :math:`\lambda > 0`, in units of the loss (the papers' :math:`r`). A number; or a
      schedule of the number of batches so far, such as
      ``optax.piecewise_constant_schedule(100.0, {1000: 0.01})``, which burns in at 100 and drops to
      1; or :func:`target_ess`. If a schedule returns zero or less, the weights are the limit, all
      on the maximum. If it returns NaN, the weights are the prior.

  Returns:
    A :class:`Weighting`. Its ``info.objective`` neither overflows nor cancels, for temperatures
    from 0 to infinity. With a number or a schedule, :func:`~jaxbo.streaming_grad` needs one pass.

  Raises:
    ValueError: if ``temperature`` is not positive and finite.

  Example:
    >>> import jax.numpy as jnp, jaxbo, numpy as np
    >>> weighting = jaxbo.dro.kl(temperature=1.0)
    >>> weights, _, info = weighting.weigh(jnp.array([1.0, 2.0, 3.0, 4.0]), weighting.init())
    >>> print(np.asarray(weights).round(3))
    [0.032 0.087 0.237 0.644]
    >>> print(info.objective.round(4))                          # log mean exp of the losses
    3.0539

  References:
    Chen et al., `Take the Bull by the Horns: Hard Sample-Reweighted Continual Training Improves LLM
    Generalization <https://arxiv.org/abs/2402.14270>`_, 2024.
  """
  temperatures.check_temperature("temperature", temperature)

  def respond(batch, state):
    value = temperatures.find_temperature(
      temperature, batch, state, lambda value: exponential(batch, 1 / value)[0]
    )
    weights, objective = exponential(batch, 1 / value)
    return Response(weights, temperatures.advance(state), objective, value)

  def log_ratio(losses, state):
    return losses / at_least_tiny(temperatures.scheduled(temperature, state, losses.dtype))

  return make_weighting(
    respond,
    temperatures.init_temperature,
    log_ratio=None if isinstance(temperature, TargetEss) else log_ratio,
  )


def tilted(tilt: optax.ScalarOrSchedule) -> Weighting:
  r"""The tilted loss, which leans toward the maximum or the minimum (TERM).

  .. math::
    \frac{1}{t} \log \sum_i p_i e^{t \ell_i}, \qquad
    w_i = \frac{p_i e^{t \ell_i}}{\sum_j p_j e^{t \ell_j}}

  For :math:`t > 0` this is :func:`kl` at the temperature :math:`1 / t`. For :math:`t < 0` large
  losses get small weights, which suits outliers and wrong labels: it is the *best* case under the
  penalty. For :math:`t = 0` it is the mean.

  Args:
    tilt: :math:`t`, in units of 1 / loss: any finite number, or a schedule of the number of batches
      so far.

  Returns:
    A :class:`Weighting`; ``info.temperature`` is :math:`1 / t`, or 0 for :math:`t = 0`.

  Raises:
    ValueError: if ``tilt`` is not finite.

  Example:
    >>> import jax.numpy as jnp, jaxbo, numpy as np
    >>> weighting = jaxbo.dro.tilted(-1.0)
    >>> weights, _, info = weighting.weigh(jnp.array([1.0, 2.0, 3.0, 4.0]), weighting.init())
    >>> print(np.asarray(weights).round(3), info.objective.round(4))
    [0.644 0.237 0.087 0.032] 1.9461

  References:
    Li et al., `Tilted Empirical Risk Minimization <https://arxiv.org/abs/2007.01162>`_, 2021.
  """
  _schedule.check("tilt", tilt, _check.finite)

  def respond(batch, state):
    value = temperatures.scheduled(tilt, state, batch.losses.dtype)
    weights, objective = exponential(batch, value)
    flat = jnp.abs(value) < jnp.finfo(value.dtype).tiny
    inverse = jnp.where(flat, 0, 1 / jnp.where(flat, 1, value))
    return Response(weights, temperatures.advance(state), objective, inverse)

  return make_weighting(
    respond,
    temperatures.init_temperature,
    log_ratio=lambda losses, state: losses * temperatures.scheduled(tilt, state, losses.dtype),
  )


def kl_ball(radius: float | jax.Array) -> Weighting:
  r"""The worst case over all weights within a radius in relative entropy.

  .. math::
    \max_{\operatorname{KL}(w \| p) \le \rho} \sum_i w_i \ell_i
      = \inf_{\lambda > 0} \lambda \rho + \lambda \log \sum_i p_i e^{\ell_i / \lambda}

  The weights are those of :func:`kl` at the temperature that makes the constraint tight. For
  :math:`\rho \ge \log (n / \#\text{maxima})`, all weight is on the largest losses.

  Cost: a search with two sums over the batch at 7 numbers in each of 11 steps (22 in float64).

  Args:
    radius: :math:`\rho > 0`, in nats.

  Returns:
    A :class:`Weighting` without state; ``info.temperature`` is the temperature of the weights.

  Raises:
    ValueError: if ``radius`` is not positive and finite.

  Example:
    >>> import jax.numpy as jnp, jaxbo, numpy as np
    >>> weights, _, info = jaxbo.dro.kl_ball(0.1).weigh(jnp.array([1.0, 2.0, 3.0, 4.0]), ())
    >>> print(np.asarray(weights).round(3), f"{info.objective:.3f}")
    [0.121 0.183 0.277 0.419] 2.994
    >>> print(f"{info.kl:.3f} {info.temperature:.3f}")
    0.100 2.414
  """
  _check.positive("radius", radius)

  def respond(batch, state):
    rho = jnp.asarray(radius, batch.losses.dtype)
    entropy_at = lambda beta: relative_entropy(batch, exponential(batch, beta)[0])
    # Hoeffding's lemma: KL <= (spread / temperature)^2 / 8.
    high = at_least_tiny((batch.max - batch.min) / jnp.sqrt(8 * rho)) * 1.01
    tiny = jnp.asarray(jnp.finfo(high.dtype).tiny, high.dtype)
    temperature = smallest(lambda value: entropy_at(1 / value) <= rho, tiny, high)
    weights = jax.lax.stop_gradient(exponential(batch, 1 / temperature)[0])
    losses = jax.lax.stop_gradient(batch.losses)
    mean = batch.over.sum(weights * losses)
    slope = batch.over.sum(weights * (losses - mean) ** 2) / temperature
    # If the slope is zero, all weight is on the largest losses and stays there.
    attained = slope > 0
    # A Newton step that has the value zero and the derivative of the root.
    beta = jnp.where(attained, 1 / temperature, 0)
    excess = entropy_at(beta) - rho
    step = (excess - jax.lax.stop_gradient(excess)) / jnp.where(attained, slope, 1)
    weights = jnp.where(attained, exponential(batch, beta - step)[0], weights)
    return Response(weights, state, temperature=temperature)

  return make_weighting(respond)


def exponential(batch: Batch, beta: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Weights proportional to ``p exp(beta losses)``, and ``log(mean exp(beta losses)) / beta``.

  ``beta`` may have either sign or be zero.
  """
  extreme = jnp.where(beta >= 0, batch.max, batch.min)
  powers = batch.reference * jnp.exp(beta * (batch.losses - extreme))
  total = at_least_tiny(batch.over.sum(powers))

  # If all losses are within a temperature of their mean, log(mean exp) cancels; log1p does not.
  mean = batch.expectation(batch.losses)
  deviations = beta * (batch.losses - mean)
  near = batch.over.max(jnp.abs(deviations)) < 1
  small = batch.expectation(jnp.expm1(jnp.clip(deviations, -1, 1)))
  # Hardware may or may not treat a subnormal number as zero.
  nonzero = jnp.where(jnp.abs(beta) < jnp.finfo(beta.dtype).tiny, 1, beta)
  objective = jnp.where(near, mean + jnp.log1p(small) / nonzero, extreme + jnp.log(total) / nonzero)
  return powers / total, objective
