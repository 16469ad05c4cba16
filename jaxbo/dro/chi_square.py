r"""The chi-square robust losses: with a penalty, and over a ball.

The divergence is :math:`D(w, p) = \frac{1}{2} \sum_i p_i (w_i / p_i - 1)^2`, so
:math:`\frac{1}{2n} \sum_i (n w_i - 1)^2` for a uniform reference.
"""

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check, _schedule
from jaxbo.dro import temperature as temperatures
from jaxbo.dro.batch import at_least_tiny
from jaxbo.dro.bisection import smallest
from jaxbo.dro.weighting import Response, Weighting, make_weighting


def chi_square(temperature: float | jax.Array | optax.Schedule) -> Weighting:
  r"""The worst case under a penalty on the chi-square divergence.

  .. math::
    \max_{w \in \Delta} \sum_i w_i \ell_i - \lambda D(w, p), \qquad
    w_i = p_i \frac{(\ell_i - \eta)_+}{\lambda}, \qquad
    D(w, p) = \frac{1}{2} \sum_i p_i \Big(\frac{w_i}{p_i} - 1\Big)^2

  While all weights are positive, the value is :math:`\text{mean} + \text{variance} / 2 \lambda`. A
  low temperature gives the maximum.

  Cost: a search with one sum over the batch at 7 numbers in each of 11 steps (22 in float64).

  Args:
    temperature: :math:`\lambda > 0`, in units of the loss: a number, or a schedule of the number of
      batches so far.

  Returns:
    A :class:`Weighting`; ``info.temperature`` is :math:`\lambda`.

  Raises:
    ValueError: if ``temperature`` is not positive and finite.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> weighting = jaxbo.dro.chi_square(2.0)
    >>> weights, _, info = weighting.weigh(jnp.array([1.0, 2.0, 3.0, 4.0]), weighting.init())
    >>> print(weights, info.objective)
    [0.0625 0.1875 0.3125 0.4375] 2.8125

  References:
    Levy et al., `Large-Scale Methods for Distributionally Robust Optimization
    <https://arxiv.org/abs/2010.05893>`_, 2020.
  """
  _schedule.check("temperature", temperature, _check.positive)

  def respond(batch, state):
    value = at_least_tiny(temperatures.scheduled(temperature, state, batch.losses.dtype))
    largest = batch.max
    scores = jnp.maximum((batch.losses - largest) / value, jnp.finfo(value.dtype).min)
    # Weights are p (scores + shift)_+; the shift is 1 if all scores are 0, and larger otherwise.
    enough = lambda shift: batch.expectation(jax.nn.relu(scores + shift)) >= 1
    high = 1 - batch.expectation(scores)
    shift = smallest(enough, jnp.ones_like(high), high)

    # Once the positive weights are known, the shift has a closed form.
    positive = batch.valid & (scores + shift > 0)
    mass = at_least_tiny(batch.expectation(positive))
    shift = (1 - batch.expectation(jnp.where(positive, scores, 0))) / mass
    density = jnp.where(positive, scores + shift, 0)
    weights = batch.reference * density
    divergence = 0.5 * batch.expectation((density - 1) ** 2)
    objective = batch.over.sum(weights * batch.losses) - value * divergence
    return Response(weights, temperatures.advance(state), objective, value)

  return make_weighting(respond, temperatures.init_temperature)


def chi_square_ball(radius: float | jax.Array) -> Weighting:
  r"""The worst case over all weights within a radius in chi-square divergence.

  .. math::
    \max_{D(w, p) \le \rho} \sum_i w_i \ell_i
      = \min_\eta \eta + \sqrt{1 + 2 \rho} \Big(\sum_i p_i (\ell_i - \eta)_+^2\Big)^{1/2}

  While all weights are positive, the value is
  :math:`\text{mean} + \sqrt{2 \rho \cdot \text{variance}}`. For :math:`\rho \ge (n - 1) / 2` and a
  single maximum, all weight is on the largest loss.

  Cost: a search with two sums over the batch at 7 numbers in each of 11 steps (22 in float64).

  Args:
    radius: :math:`\rho > 0`.

  Returns:
    A :class:`Weighting` without state.

  Raises:
    ValueError: if ``radius`` is not positive and finite.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> weights, _, info = jaxbo.dro.chi_square_ball(0.1).weigh(jnp.array([1.0, 2.0, 3.0, 4.0]), ())
    >>> print((100 * weights).round(), info.objective.round(4))
    [10. 20. 30. 40.] 3.0

  References:
    Namkoong and Duchi, `Variance-based Regularization with Convex Objectives
    <https://arxiv.org/abs/1610.02581>`_, 2017; Levy et al., `Large-Scale Methods for
    Distributionally Robust Optimization <https://arxiv.org/abs/2010.05893>`_, 2020.
  """
  _check.positive("radius", radius)

  def respond(batch, state):
    rho = jnp.asarray(radius, batch.losses.dtype)
    # Weights do not depend on the scale of the losses; squares of unscaled losses could overflow.
    spread = jax.lax.stop_gradient(batch.max - batch.min)
    below = (batch.losses - batch.max) / jnp.where(spread > 0, spread, 1)

    def within(depth):  # Weights are proportional to p (losses - max + depth)_+.
      hinges = jax.nn.relu(below + depth)
      return 0.5 * batch.expectation((hinges / batch.expectation(hinges) - 1) ** 2) <= rho

    mean = batch.expectation(below)
    variance = batch.expectation((below - mean) ** 2)
    # At this depth all weights are positive.
    high = (1 + jnp.sqrt(variance / (2 * rho))) * 1.01
    depth = smallest(within, jnp.asarray(jnp.finfo(high.dtype).tiny, high.dtype), high)

    # Once the positive weights are known, the constraint is a quadratic equation.
    positive = batch.valid & (below + depth > 0)
    mass = at_least_tiny(batch.expectation(positive))
    mean = batch.expectation(jnp.where(positive, below, 0)) / mass
    variance = batch.expectation(jnp.where(positive, (below - mean) ** 2, 0)) / mass
    excess = (1 + 2 * rho) * mass - 1
    attained = (excess > 0) & (variance > 0)  # Otherwise the slope is free, or zero.
    slope = jnp.sqrt(jnp.where(attained, excess, 1) / jnp.where(attained, variance, 1))
    slope = jnp.where(attained, slope, 0)
    density = jnp.where(positive, jax.nn.relu(1 + (below - mean) * slope) / mass, 0)
    weights = batch.reference * density
    return Response(weights / at_least_tiny(batch.over.sum(weights)), state)

  return make_weighting(respond)
