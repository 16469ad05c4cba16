"""The conditional value at risk, plain and smoothed by entropy."""

import jax
import jax.numpy as jnp

from jaxbo import _check
from jaxbo.dro import temperature as temperatures
from jaxbo.dro.batch import Batch, at_least_tiny
from jaxbo.dro.bisection import smallest
from jaxbo.dro.diagnostics import relative_entropy
from jaxbo.dro.ranking import cvar_weights
from jaxbo.dro.temperature import Temperature
from jaxbo.dro.weighting import Response, Weighting, make_weighting


def cvar(level: float | jax.Array) -> Weighting:
  r"""The mean over the worst fraction of the batch: the conditional value at risk.

  .. math::
    \max_{w \in \Delta,\ w_i \le p_i / \alpha} \sum_i w_i \ell_i
      = \min_\eta \eta + \frac{1}{\alpha} \sum_i p_i (\ell_i - \eta)_+

  The largest losses get :math:`p_i / \alpha` each, and ties at the edge share the rest. If
  :math:`\alpha` is below the mass of the largest losses, all weight is on them.

  Cost: a search with one sum over the batch at 7 numbers in each of 11 steps (22 in float64). It
  does not sort the losses or gather them on one device.

  Args:
    level: :math:`\alpha` in (0, 1], the fraction of the batch; 1 gives the mean.

  Returns:
    A :class:`Weighting` without state.

  Raises:
    ValueError: if ``level`` is outside its range.

  Example:
    >>> import jax.numpy as jnp, jaxbo, numpy as np
    >>> weights, _, info = jaxbo.dro.cvar(0.6).weigh(jnp.array([1.0, 2.0, 3.0, 4.0]), ())
    >>> print(np.asarray(weights).round(4), info.objective.round(4))
    [0.     0.1667 0.4167 0.4167] 3.25

  References:
    Rockafellar and Uryasev, Optimization of Conditional Value-at-Risk, 2000; Levy et al.,
    `Large-Scale Methods for Distributionally Robust Optimization
    <https://arxiv.org/abs/2010.05893>`_, 2020.
  """
  _check.within("level", level, 0, 1, ends="(]")
  return make_weighting(
    lambda batch, state: Response(cvar_weights(batch, jnp.asarray(level, batch.losses.dtype)))
  )


def kl_cvar(level: float | jax.Array, temperature: Temperature) -> Weighting:
  r"""Exponential weights with a cap: the KL-regularized conditional value at risk.

  .. math::
    \max_{w \in \Delta,\ w_i \le p_i / \alpha} \sum_i w_i \ell_i
      - \lambda \operatorname{KL}(w \| p), \qquad
    w_i = p_i \min\big(e^{(\ell_i - \eta) / \lambda},\ 1 / \alpha\big)

  No example gets more than :math:`1 / \alpha` times its prior. A low temperature gives
  :func:`cvar`; a high temperature, or :math:`\alpha = 1`, gives the mean. While the cap does not
  bind, the weights are those of :func:`kl`.

  Cost: a search with one sum over the batch at 7 numbers in each of 11 steps (22 in float64). A
  target for the effective sample size nests it in a bisection.

  Args:
    level: :math:`\alpha` in (0, 1].
    temperature: :math:`\lambda > 0`, in units of the loss: a number, a schedule of the number of
      batches so far, or :func:`target_ess`, whose target the capped weights reach.

  Returns:
    A :class:`Weighting`.

  Raises:
    ValueError: if ``level`` is outside its range, or ``temperature`` is not positive and finite.

  Example:
    >>> import jax.numpy as jnp, jaxbo, numpy as np
    >>> weighting = jaxbo.dro.kl_cvar(0.5, temperature=1.0)
    >>> weights, _, info = weighting.weigh(jnp.array([1.0, 2.0, 3.0, 4.0]), weighting.init())
    >>> print(np.asarray(weights).round(3), info.objective.round(4))
    [0.045 0.122 0.333 0.5  ] 3.0107

  References:
    Levy et al., `Large-Scale Methods for Distributionally Robust Optimization
    <https://arxiv.org/abs/2010.05893>`_, 2020.
  """
  _check.within("level", level, 0, 1, ends="(]")
  temperatures.check_temperature("temperature", temperature)

  def respond(batch, state):
    cap = 1 / jnp.asarray(level, batch.losses.dtype)
    weights_at = lambda value: _capped_exponential(batch, value, cap)
    value = temperatures.find_temperature(temperature, batch, state, weights_at, bits_per_step=1)
    weights = weights_at(value)
    objective = batch.over.sum(weights * batch.losses) - value * relative_entropy(batch, weights)
    # The reference is feasible, so a value below the mean is rounding times a high temperature.
    objective = jnp.maximum(objective, batch.expectation(batch.losses))
    return Response(weights, temperatures.advance(state), objective, value)

  return make_weighting(respond, temperatures.init_temperature)


def _capped_exponential(batch: Batch, temperature: jax.Array, cap: jax.Array) -> jax.Array:
  least = jnp.finfo(cap.dtype).min / 4  # so that no difference overflows
  scores = jnp.maximum((batch.losses - batch.max) / temperature, least)
  total = lambda log_scale: batch.expectation(jnp.minimum(jnp.exp(scores - log_scale), cap))
  uncapped_scale = jnp.log(at_least_tiny(batch.expectation(jnp.exp(scores))))
  lowest = batch.over.min(jnp.where(batch.valid, scores, 0)) - jnp.log(cap)
  log_scale = smallest(lambda x: total(x) <= 1, lowest, uncapped_scale)

  # Once the capped examples are known, the other weights have a closed form.
  capped = scores - log_scale > jnp.log(cap)
  at_cap = jnp.where(capped, batch.reference * cap, 0)
  free = batch.valid & ~capped
  highest = batch.over.max(jnp.where(free, scores, least))
  powers = jnp.where(free, batch.reference * jnp.exp(jnp.minimum(scores - highest, 0)), 0)
  left = jnp.maximum(1 - batch.over.sum(at_cap), 0)
  weights = at_cap + left * powers / at_least_tiny(batch.over.sum(powers))
  return weights / at_least_tiny(batch.over.sum(weights))
