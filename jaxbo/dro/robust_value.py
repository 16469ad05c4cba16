"""Robust values as losses to differentiate."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxbo.dro.batch import AxisName
from jaxbo.dro.weighting import Weighting, check_weighting


def robust_value(
  losses: jax.typing.ArrayLike,
  weighting: Weighting,
  *,
  mask: Any = None,
  prior: Any = None,
  groups: Any = None,
  state: Any = None,
  axis_name: AxisName = None,
) -> jax.Array:
  r"""The objective that a weighting maximises, as a differentiable function of the losses.

  For :func:`kl` it is :math:`\lambda \log \sum_i p_i e^{\ell_i / \lambda}`, for :func:`cvar` the
  mean over the worst losses, and so on (``info.objective``). Its gradient is the vector of
  weights, by Danskin's theorem; second derivatives are those of the weights, so that it can be an
  inner loss too. Use it to monitor, or with ``jax.grad`` where gradients need not be per example.
  The first derivative by a parameter of the weighting (a temperature, a radius, a level) is that of
  the objective too, but by what weights are found from by other means (:func:`target_ess`).

  Args:
    losses: ``[batch]`` real floats.
    weighting: such as :func:`kl`. For one that maximises nothing (:func:`mid_rank`, :func:`doro`,
      :func:`shaped`, ...) the value is the weighted loss, and the gradient still its weights.
    mask: boolean, ``[batch]``, true for what counts. Losses that are not finite do not.
    prior: the reference distribution, ``[batch]``.
    groups: ids of groups, ``[batch]``.
    state: of the weighting; its initial one by default.
    axis_name: an axis of the ``shard_map`` around; the value is then global. Differentiate inside
      with :func:`~jaxbo.reweight` instead: what a sum over devices differentiates to depends on the
      replication check.

  Returns:
    A scalar, float32 at least.

  Raises:
    ValueError: as in :class:`Weighting`.
    TypeError: if ``weighting`` is none.

  Example:
    >>> import jax, jax.numpy as jnp, jaxbo
    >>> losses = jnp.array([1.0, 2.0, 3.0, 4.0])
    >>> value, gradient = jax.value_and_grad(jaxbo.dro.robust_value)(losses, jaxbo.dro.cvar(0.5))
    >>> print(value, gradient)
    3.5 [0.  0.  0.5 0.5]
  """
  check_weighting("weighting", weighting)
  losses = jnp.asarray(losses)
  state = weighting.init() if state is None else state

  def weigh_all(losses, arguments):
    return weighting.weigh(losses, axis_name=axis_name, stop_gradient=False, **arguments)

  arguments = {"state": state, "mask": mask, "prior": prior, "groups": groups}
  # Traced parameters of the weighting are made arguments: a derivative by them may be wanted.
  weigh, parameters = jax.closure_convert(weigh_all, losses, arguments)

  @jax.custom_jvp
  def value(losses, arguments, parameters):
    return weigh(losses, arguments, *parameters)[2].objective

  @functools.partial(value.defjvp, symbolic_zeros=True)
  def value_jvp(primals, tangents):
    losses, arguments, parameters = primals
    weights, _, info = weigh(losses, arguments, *parameters)
    # Weights at zero are excluded, whose tangents may be anything.
    tangent = jnp.where(weights != 0, _instantiate(losses, tangents[0]), 0).astype(weights.dtype)
    change = jnp.sum(weights * tangent)
    if not all(isinstance(t, SymbolicZero) for t in tangents[2]):
      moved = [_instantiate(p, t) for p, t in zip(parameters, tangents[2], strict=True)]
      objective = lambda *parameters: weigh(losses, arguments, *parameters)[2].objective
      change += jax.jvp(objective, parameters, moved)[1]
    return info.objective, change

  return value(losses, arguments, parameters)


def _instantiate(primal: jax.Array, tangent: Any) -> jax.Array:
  return jnp.zeros_like(primal) if isinstance(tangent, SymbolicZero) else tangent
