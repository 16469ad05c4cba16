"""Weights for adversarial training: GAIRAT and MAIL weight examples, WAT weights classes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check, _schedule
from jaxbo.dro import temperature as temperatures
from jaxbo.dro.batch import Batch, at_least_tiny
from jaxbo.dro.weighting import Response, Weighting, make_weighting


class WatState(NamedTuple):
  """State of :func:`wat`.

  Attributes:
    class_costs: the robust loss of each class on validation data, summed over past evaluations,
      ``[num_classes]``.
  """

  class_costs: jax.Array


def gairat(
  num_steps: int,
  shift: optax.ScalarOrSchedule = -1.0,
  *,
  shape: str = "tanh",
) -> Weighting:
  r"""GAIRAT's weights: larger for examples that an attack pushes over the boundary in fewer steps.

  .. math:: w_i \propto \tfrac12 \big(1 + \tanh(\Lambda + 5 (1 - 2 \kappa_i / K))\big)

  :math:`\kappa_i` counts at how many of the attack's :math:`K` points the model still classifies
  the example correctly. It is ``info.num_correct`` of :func:`pgd`; pass it to the update of
  :func:`~jaxbo.reweight` as ``scores=info.num_correct.astype(float)``. Models trained with these
  weights withstand PGD better than they withstand other attacks, so evaluate them with
  :func:`evaluate_robustness`.

  Args:
    num_steps: :math:`K`, at least 1.
    shift: :math:`\Lambda`: a number, infinity for uniform weights, or a schedule of the number of
      batches so far (published runs use infinity for the first half). The default is published.
    shape: ``"tanh"``, the formula above; ``"sigmoid"``,
      :math:`w \propto \sigma(\Lambda + 5 (1 - 2 \kappa / K))`; or ``"discrete"``,
      :math:`w \propto 1 - \kappa / (K + 1)`, which ignores ``shift``.

  Returns:
    A :class:`~jaxbo.dro.Weighting` of float scores ``[batch]``.

  Raises:
    ValueError: if an argument is outside its range.

  Example:
    >>> import jax.numpy as jnp, jaxbo, numpy as np
    >>> weighting = jaxbo.adversarial.gairat(num_steps=10)
    >>> weights, _, _ = weighting.weigh(jnp.array([0.0, 5.0, 10.0]), weighting.init())
    >>> print(np.asarray(weights).round(3))
    [0.893 0.107 0.   ]

  References:
    Zhang et al., `Geometry-aware Instance-reweighted Adversarial Training
    <https://arxiv.org/abs/2010.01736>`_, 2021.
  """
  num_steps = _check.positive_int("num_steps", num_steps)
  _check.one_of("shape", shape, ("tanh", "sigmoid", "discrete"))
  _schedule.check("shift", shift, _check.not_nan)

  def respond(batch, state):
    if shape == "discrete":
      logs = jnp.log1p(-jnp.clip(batch.losses, 0, num_steps) / (num_steps + 1))
      return Response(_normalized(batch, logs), temperatures.advance(state))
    score = 5 * (1 - 2 * batch.losses / num_steps)
    score += temperatures.scheduled(shift, state, batch.losses.dtype)
    # (1 + tanh(x)) / 2 is the sigmoid of 2 x.
    logs = jax.nn.log_sigmoid(2 * score if shape == "tanh" else score)
    return Response(_normalized(batch, logs), temperatures.advance(state))

  return make_weighting(respond, temperatures.init_temperature)


def mail(slope: optax.ScalarOrSchedule = 10.0, bias: float | jax.Array = -0.5) -> Weighting:
  r"""MAIL's weights: larger for examples with a large probabilistic margin under attack.

  .. math:: w_i \propto \sigma\big(s\, (\mathrm{PM}_i + b)\big), \qquad
    \mathrm{PM}_i = \max_{j \ne y} p_j - p_y

  Pass the margins, :func:`probabilistic_margin` of the perturbed images, to the update of
  :func:`~jaxbo.reweight` as ``scores=``. The weights sum to 1 (our choice: see Departures from the
  papers). MAIL-TRADES weights only the second term of :func:`trades_loss`, through its
  ``weights=``.

  Args:
    slope: :math:`s \ge 0`, or a schedule of the number of batches so far; 0 gives uniform weights.
    bias: :math:`b`, finite. The published slope and bias are 10 and -0.5 for plain and MART
      training, 2 and 0 for TRADES.

  Returns:
    A :class:`~jaxbo.dro.Weighting` of float scores ``[batch]``.

  Raises:
    ValueError: if ``slope`` is negative, or ``bias`` is not finite.

  Example:
    >>> import jax.numpy as jnp, jaxbo, numpy as np
    >>> weighting = jaxbo.adversarial.mail(slope=2.0, bias=0.0)
    >>> weights, _, _ = weighting.weigh(jnp.array([-1.0, 0.0, 1.0]), weighting.init())
    >>> print(np.asarray(weights).round(3))
    [0.079 0.333 0.587]

  References:
    Wang et al., `Probabilistic Margins for Instance Reweighting in Adversarial Training
    <https://arxiv.org/abs/2106.07904>`_, 2021.
  """
  _schedule.check("slope", slope, _check.non_negative)
  _check.finite("bias", bias)

  def respond(batch, state):
    steepness = temperatures.scheduled(slope, state, batch.losses.dtype)
    logs = jax.nn.log_sigmoid(steepness * (batch.losses + bias))
    return Response(_normalized(batch, logs), temperatures.advance(state))

  return make_weighting(respond, temperatures.init_temperature)


def wat(num_classes: int, learning_rate: float | jax.Array = 0.1) -> Weighting:
  r"""WAT's class weights: the Hedge algorithm on the classes' robust validation losses.

  .. math:: (\pi_1, \dots, \pi_C, \pi_0) = \operatorname{softmax}(\eta\, (s_1, \dots, s_C, \bar s)),
    \qquad w_i \propto \pi_{y_i} + \pi_0 / C

  :math:`s_c` is the cost of class :math:`c`, summed over past evaluations. An extra expert,
  :math:`\pi_0`, stands for the average over classes. Add the new costs yourself, between epochs::

    state = optax.tree.set(state, class_costs=optax.tree.get(state, "class_costs") + new_costs)

  Args:
    num_classes: :math:`C`, at least 1.
    learning_rate: :math:`\eta > 0`; the default is the published one.

  Returns:
    A :class:`~jaxbo.dro.Weighting` that needs the labels as ``groups=``, integers ``[batch]``.

  Raises:
    ValueError: if an argument is outside its range.

  Example:
    >>> import jax.numpy as jnp, jaxbo, numpy as np
    >>> weighting = jaxbo.adversarial.wat(num_classes=2, learning_rate=1.0)
    >>> state = jaxbo.adversarial.WatState(class_costs=jnp.array([0.0, 2.0]))
    >>> losses, labels = jnp.array([1.0, 1.0]), jnp.array([0, 1])
    >>> print(np.asarray(weighting.weigh(losses, state, groups=labels)[0]).round(3))
    [0.212 0.788]

  References:
    Li and Liu, `WAT: Improve the Worst-class Robustness in Adversarial Training
    <https://arxiv.org/abs/2302.04025>`_, 2023.
  """
  num_classes = _check.positive_int("num_classes", num_classes)
  _check.positive("learning_rate", learning_rate)

  def init(dtype: jax.typing.DTypeLike = jnp.float32) -> WatState:
    return WatState(jnp.zeros(num_classes, dtype))

  def respond(batch, state):
    costs = state.class_costs.astype(batch.losses.dtype)
    experts = jnp.concatenate([costs, jnp.mean(costs)[None]])
    shares = jax.nn.softmax(jnp.asarray(learning_rate, costs.dtype) * experts)
    of_class = shares[:-1] + shares[-1] / num_classes
    ids = jnp.arange(num_classes, dtype=jnp.int32)
    member = batch.groups.astype(jnp.int32)[:, None] == ids[None]
    weights = batch.reference * jnp.sum(jnp.where(member, of_class[None], 0), axis=1)
    return Response(weights / at_least_tiny(batch.over.sum(weights)), state)

  return make_weighting(respond, init, num_groups=num_classes)


def _normalized(batch: Batch, logs: jax.Array) -> jax.Array:
  """Returns the weights ``p exp(logs)`` divided by their sum; small ``logs`` do not underflow."""
  largest = batch.over.max(jnp.where(batch.valid, logs, -jnp.inf))
  powers = batch.reference * jnp.exp(jnp.where(batch.valid, logs - largest, 0))
  return powers / at_least_tiny(batch.over.sum(powers))
