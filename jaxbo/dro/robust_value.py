"""Robust values as losses to differentiate."""

import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxbo._types import PyTree
from jaxbo.dro.batch import AxisName
from jaxbo.dro.weighting import Weighting, check_weighting


def robust_value(
  losses: jax.typing.ArrayLike,
  weighting: Weighting,
  *,
  mask: jax.typing.ArrayLike | None = None,
  prior: jax.typing.ArrayLike | None = None,
  groups: jax.typing.ArrayLike | None = None,
  state: PyTree = None,
  axis_name: AxisName = None,
) -> jax.Array:
  r"""The objective that a weighting maximizes, as a differentiable function of the losses.

  For :func:`kl` the value is :math:`\lambda \log \sum_i p_i e^{\ell_i / \lambda}`; for :func:`cvar`
  it is the mean over the worst losses; in general it is ``info.objective``. Its gradient is the
  vector of weights, by Danskin's theorem. Its second derivatives are the derivatives of the
  weights, so it can serve as an inner loss. Use it to monitor training, or with ``jax.grad`` if you
  do not need per-example gradients.

  First derivatives with respect to a parameter of the weighting (a temperature, a radius, a level)
  are those of the objective. The exception is the fraction of :func:`target_ess`.

  Args:
    losses: real floats ``[batch]``.
    weighting: a :class:`Weighting`, such as :func:`kl`. If it does not maximize an objective
      (:func:`mid_rank`, :func:`doro`, :func:`shaped`, ...), the value is the weighted loss, and the
      gradient is still the weights.
    mask: booleans ``[batch]``, true for examples that count. Losses that are not finite do not
      count.
    prior: the reference distribution, ``[batch]``, non-negative, of any sum; uniform by default.
    groups: integer group ids, ``[batch]``.
    state: the state of the weighting; its initial state by default.
    axis_name: the axis, or axes, of the enclosing ``shard_map`` over which the batch is divided;
      the value is then that of the global batch. Without ``axis_name``, the value is that of the
      part on each device. To differentiate inside ``shard_map``, use :func:`~jaxbo.reweight`
      instead: the derivative of a sum over devices depends on the replication check
      (``check_vma``).

  Returns:
    A scalar, at least float32.

  Raises:
    ValueError: if ``losses`` are not one-dimensional and non-empty, another ``[batch]`` argument
      does not have their shape, a prior is negative, or a group id is out of range.
    TypeError: if ``weighting`` is not a :class:`Weighting`, losses are not floats, ``mask`` is not
      boolean, or ``groups`` are missing or not integers.

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
  # Makes traced parameters of the weighting arguments, so that callers can differentiate by them.
  weigh, parameters = jax.closure_convert(weigh_all, losses, arguments)

  @jax.custom_jvp
  def value(losses, arguments, parameters):
    return weigh(losses, arguments, *parameters)[2].objective

  @functools.partial(value.defjvp, symbolic_zeros=True)
  def value_jvp(primals, tangents):
    losses, arguments, parameters = primals
    weights, _, info = weigh(losses, arguments, *parameters)
    # Examples of weight zero are excluded; their tangents may be anything.
    tangent = jnp.where(weights != 0, _instantiate(losses, tangents[0]), 0).astype(weights.dtype)
    change = jnp.sum(weights * tangent)
    if not all(isinstance(t, SymbolicZero) for t in tangents[2]):
      moved = [_instantiate(p, t) for p, t in zip(parameters, tangents[2], strict=True)]
      objective = lambda *parameters: weigh(losses, arguments, *parameters)[2].objective
      change += jax.jvp(objective, parameters, moved)[1]
    return info.objective, change

  return value(losses, arguments, parameters)


def _instantiate(primal: jax.Array, tangent: jax.Array | SymbolicZero) -> jax.Array:
  return jnp.zeros_like(primal) if isinstance(tangent, SymbolicZero) else tangent
