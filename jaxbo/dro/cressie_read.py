"""The robust loss over a ball in a Cressie-Read divergence."""

import jax
import jax.numpy as jnp

from jaxbo import _check
from jaxbo.dro.batch import at_least_tiny
from jaxbo.dro.bisection import smallest
from jaxbo.dro.weighting import Response, Weighting, make_weighting


def cressie_read_ball(radius: float | jax.Array, power: float | jax.Array) -> Weighting:
  r"""The worst case over all weights within a radius in a Cressie-Read divergence.

  .. math::
    \max_{D_k(w, p) \le \rho} \sum_i w_i \ell_i
      = \min_\eta \eta + (1 + k (k - 1) \rho)^{1/k}
        \Big(\sum_i p_i (\ell_i - \eta)_+^{k_*}\Big)^{1/k_*},
    \qquad k_* = \frac{k}{k - 1},

  with :math:`D_k(w, p) = \sum_i p_i \phi_k(w_i / p_i)` and
  :math:`\phi_k(t) = (t^k - k t + k - 1) / (k (k - 1))`. The weights are proportional to
  :math:`p_i (\ell_i - \eta)_+^{1 / (k - 1)}`. The power 2 gives
  :func:`chi_square_ball`, and a power near 1 gives :func:`kl_ball`. The higher the power, the less
  the weights of the hard examples differ.

  Cost: a search with two sums over the batch at 7 numbers in each of 11 steps (22 in float64).

  Args:
    radius: :math:`\rho > 0`.
    power: :math:`k` in [1.01, 3]. Above, single precision does not resolve the weight of the
      example at the edge; :func:`cvar` is near.

  Returns:
    A :class:`Weighting` without state.

  Raises:
    ValueError: if ``radius`` is not positive and finite, or ``power`` is outside its range.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> weighting = jaxbo.dro.cressie_read_ball(0.1, power=1.5)
    >>> weights, _, info = weighting.weigh(jnp.array([1.0, 2.0, 3.0, 4.0]), ())
    >>> print((100 * weights).round(), info.objective.round(4))
    [11. 19. 29. 41.] 2.9968

  References:
    Duchi and Namkoong, `Learning Models with Uniform Performance via Distributionally Robust
    Optimization <https://arxiv.org/abs/1810.08750>`_, 2021.
  """
  _check.positive("radius", radius)
  _check.within("power", power, 1.01, 3)

  def respond(batch, state):
    rho, k = (jnp.asarray(value, batch.losses.dtype) for value in (radius, power))
    # Weights do not depend on the scale of the losses.
    spread = jax.lax.stop_gradient(batch.max - batch.min)
    below = (batch.losses - batch.max) / jnp.where(spread > 0, spread, 1)

    def log_density(slope):  # Of p (1 + slope below)_+^(1 / (k - 1)), and where it is positive.
      positive = batch.valid & (slope * below > -1)
      logs = jnp.log1p(jnp.where(positive, slope * below, 0)) / (k - 1)
      total = batch.expectation(jnp.where(positive, jnp.exp(logs), 0))
      return logs - jnp.log(at_least_tiny(total)), positive

    def density(slope):
      logs, positive = log_density(slope)
      return jnp.where(positive, jnp.exp(logs), 0)

    def divergence(slope):
      logs, positive = log_density(slope)
      values = jnp.exp(logs) * jnp.expm1((k - 1) * logs) / (k - 1) - jnp.expm1(logs)
      # Both terms nearly cancel where a density is near 1, and nothing is left of their digits.
      series = logs**2 * k / 2 * (1 + (k + 1) * logs / 3 + (k * k + k + 1) * logs**2 / 12)
      near = k * jnp.abs(logs) < 1e-2
      values = jnp.where(near, series, values)
      return batch.expectation(jnp.where(positive, values, 1)) / k

    # At this slope all densities are between exp(-step) and exp(step).
    step = jnp.minimum(1 / k, jnp.sqrt(rho) / 2.1)
    high = 1 + 1 / ((k - 1) * step)
    tiny = jnp.asarray(jnp.finfo(high.dtype).tiny, high.dtype)
    slope = 1 / smallest(lambda depth: divergence(1 / depth) <= rho, tiny, high)
    excess, per_slope = jax.jvp(divergence, (slope,), (jnp.ones_like(slope),))
    excess, per_slope = excess - rho, jax.lax.stop_gradient(per_slope)
    # Otherwise all weight is on the largest losses and stays there, or all losses are equal.
    attained = per_slope > 0
    # A Newton step that has the value zero and the derivative of the root.
    change = (excess - jax.lax.stop_gradient(excess)) / jnp.where(attained, per_slope, 1)
    moved, fixed = density(jnp.where(attained, slope - change, 1)), density(slope)
    weights = batch.reference * jnp.where(attained, moved, jax.lax.stop_gradient(fixed))
    return Response(weights / at_least_tiny(batch.over.sum(weights)), state)

  return make_weighting(respond)
