"""Proximal-PDBO: proximal terms around a moving center."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check, _schedule, _tree
from jaxbo._optimizer import LearningRate
from jaxbo._types import Data, Loss, PyTree
from jaxbo.bilevel.parameters import Bilevel, check_params, scalar_dtype
from jaxbo.bilevel.primal_dual import add_primal_dual_penalty
from jaxbo.bilevel.projection import Projection, descend
from jaxbo.bilevel.response import MISSING
from jaxbo.bilevel.value_function import ConstraintTerm, check_update


class ProximalInfo(NamedTuple):
  r"""Diagnostics of :func:`~jaxbo.add_proximal_terms`.

  Attributes:
    centre_distance: :math:`\|z - \bar z\|` before this update, float32 at least. In the last update
      of a period, this is how far the parameters have moved since the center was set.
  """

  centre_distance: jax.Array


class ProximalState(NamedTuple):
  r"""State of :func:`~jaxbo.add_proximal_terms`.

  Attributes:
    proximal_head: the state of the head.
    proximal_centre: the center :math:`\bar z`, shaped like the parameters.
    proximal_count: the number of updates so far, int32.
    info: the :class:`ProximalInfo` of the last update.
  """

  proximal_head: optax.OptState
  proximal_centre: Bilevel
  proximal_count: jax.Array
  info: ProximalInfo


def add_proximal_terms(
  head: optax.GradientTransformation,
  *,
  outer_weight: float | jax.Array,
  constraint_weight: float | jax.Array,
  period: int,
) -> optax.GradientTransformationExtraArgs:
  r"""Makes the problem of a head strongly convex around a moving center (Proximal-PDBO).

  .. math::
    f_k(z) = f(z) + \rho_f \|z - \bar z_k\|^2, \qquad
    h_k(z) = h(z) + \rho_h \|z - \bar z_k\|^2, \qquad z = (x, y)

  With weights above the constants of weak convexity, :math:`f_k` and :math:`h_k` are strongly
  convex, and the head solves a convex problem for ``period`` updates. Then the center moves to the
  current parameters. A fixed point of the moves is a KKT point of the problem without the terms.
  The first center is the parameters in the first update. The multiplier and the lower-value iterate
  continue when the center moves (our choice: see Departures from the papers).

  Cost: no gradients. Memory: one copy of the parameters.

  Args:
    head: :func:`add_primal_dual_penalty`, or :func:`add_dynamic_barrier` or
      :func:`add_value_function_penalty`, whose :math:`q` takes the place of :math:`h`.
    outer_weight: :math:`\rho_f \ge 0`.
    constraint_weight: :math:`\rho_h \ge 0`. The term is zero at the center, so a feasible center
      stays feasible.
    period: updates between moves of the center, at least 1.

  Returns:
    A transformation like ``head``; put it first in the chain, instead of ``head``.

  Raises:
    ValueError: if a weight is negative or ``period < 1``.
    TypeError: if ``head`` is not a transformation, or parameters are not :class:`jaxbo.Bilevel`.

  Example:
    >>> import jax, jax.numpy as jnp, jaxbo, optax
    >>> head = jaxbo.add_value_function_penalty(lambda x, y, batch: (y - x) ** 2, multiplier=1.0,
    ...                                         num_steps=1, inner_optimizer=optax.sgd(0.5))
    >>> tx = jaxbo.add_proximal_terms(head, outer_weight=0.5, constraint_weight=0.0, period=10)
    >>> params = jaxbo.Bilevel(outer=jnp.float32(0.0), inner=jnp.float32(0.0))
    >>> grads = jaxbo.Bilevel(outer=jnp.float32(1.0), inner=jnp.float32(1.0))
    >>> updates, state = tx.update(grads, tx.init(params), params, batch=None)
    >>> params = jaxbo.Bilevel(outer=jnp.float32(3.0), inner=jnp.float32(3.0))
    >>> updates, state = tx.update(grads, state, params, batch=None)
    >>> float(updates.outer)                                 # 1 + 2 * 0.5 * (3 - 0)
    4.0

  References:
    Sow, Ji, Guan and Liang, `A Primal-Dual Approach to Bilevel Optimization with Multiple Inner
    Minima <https://arxiv.org/abs/2203.01123>`_, 2022; Boob, Deng and Lan, `Stochastic First-order
    Methods for Convex and Nonconvex Functional Constrained Optimization
    <https://arxiv.org/abs/1908.02734>`_, 2019.
  """
  _check.transformation("head", head)
  _check.non_negative("outer_weight", outer_weight)
  _check.non_negative("constraint_weight", constraint_weight)
  period = _check.positive_int("period", period)
  head = optax.with_extra_args_support(head)

  def init(params):
    check_params("add_proximal_terms", params)
    info = ProximalInfo(jnp.zeros((), scalar_dtype(params)))
    return ProximalState(head.init(params), _tree.copy(params), jnp.int32(0), info)

  def update(updates, state, params: PyTree = None, *, batch: Data = MISSING, **extra_args):
    grads = check_update("add_proximal_terms", updates, params, batch)
    dtype = state.info.centre_distance.dtype
    move = (state.proximal_count % period == 0) & _tree.all_finite(params)
    centre = _tree.where(move, params, state.proximal_centre)
    offset = optax.tree.sub(_tree.at_least_float32(params), _tree.at_least_float32(centre))
    distance_sq = _tree.vdot(offset, offset).astype(dtype)
    weight = jnp.asarray(constraint_weight, dtype)
    term = ConstraintTerm(weight * distance_sq, _tree.scaled(2 * weight, offset))
    grads = jax.tree.map(
      lambda g, o: (_tree.at_least_float32(g) + o).astype(jnp.result_type(g)),
      grads,
      _tree.scaled(2 * jnp.asarray(outer_weight, dtype), offset),
    )
    result, head_state = head.update(
      grads, state.proximal_head, params, batch=batch, constraint_term=term, **extra_args
    )
    distance = jnp.sqrt(distance_sq)
    distance = jnp.where(jnp.isfinite(distance), distance, state.info.centre_distance)
    count = _schedule.after(state.proximal_count)
    return result, ProximalState(head_state, centre, count, ProximalInfo(distance))

  return optax.GradientTransformationExtraArgs(init, update)


def proximal_pdbo(
  learning_rate: LearningRate | Bilevel,
  inner_loss: Loss,
  *,
  outer_weight: float | jax.Array,
  constraint_weight: float | jax.Array,
  period: int,
  slack: float | jax.Array,
  dual_learning_rate: optax.ScalarOrSchedule,
  num_steps: int,
  inner_optimizer: optax.GradientTransformation,
  value_regularizer: float | jax.Array = 0.0,
  dual_bound: float | jax.Array = 100.0,
  extrapolation: optax.ScalarOrSchedule = 0.0,
  project_outer: Projection | None = None,
  project_inner: Projection | None = None,
  gap_steps: int = 0,
) -> optax.GradientTransformationExtraArgs:
  r"""Proximal-PDBO: PDBO on a strongly convex problem around a moving center.

  Args:
    learning_rate: for both levels, a float, a schedule, or an optax optimizer to use instead; or
      :class:`jaxbo.Bilevel` of two of these.
    inner_loss: the inner loss :math:`g`, ``inner_loss(x, y, batch) -> scalar``.
    outer_weight: the weight :math:`\rho_f \ge 0` of the proximal term of the outer loss.
    constraint_weight: the weight :math:`\rho_h \ge 0` of the proximal term of the constraint.
    period: updates between moves of the center, at least 1.
    slack: the slack :math:`\delta > 0` of the constraint.
    dual_learning_rate: the step :math:`\tau_t > 0` of the multiplier, a float or a schedule.
    num_steps: the number :math:`N \ge 1` of steps for the lower value.
    inner_optimizer: any optax optimizer for the lower value.
    value_regularizer: the weight :math:`a \ge 0` of the regularizer of the lower value.
    dual_bound: the largest multiplier, :math:`B > 0`.
    extrapolation: the weight :math:`\theta_t \ge 0` in dual ascent, a float or a schedule.
    project_outer: the projection on :math:`X`, or ``None``.
    project_inner: the projection on :math:`Y`, for ``y`` and the lower value; or ``None``.
    gap_steps: how many steps measure the diagnostic gap; 0 for no gap.

  Returns:
    ``optax.chain(add_proximal_terms(add_primal_dual_penalty(...), ...),
    optax.scale_by_learning_rate(learning_rate), project(project_outer, project_inner))``.
    Without projections the chain has no ``project``.

  Example:
    >>> import jax, jax.numpy as jnp, jaxbo, optax
    >>> tx = jaxbo.proximal_pdbo(0.02, lambda x, y, batch: (y - x) ** 2, slack=1e-4,
    ...                          dual_learning_rate=10.0, dual_bound=20.0, num_steps=1,
    ...                          inner_optimizer=optax.sgd(0.5), outer_weight=1.0,
    ...                          constraint_weight=0.1, period=20)
    >>> params = jaxbo.Bilevel(outer=jnp.float32(0.0), inner=jnp.float32(0.0))
    >>> outer_loss = lambda p: p.outer * p.inner - 2 * p.outer + 1            # minimal at x = 1
    >>> def step(carry, _):
    ...   params, state = carry
    ...   updates, state = tx.update(jax.grad(outer_loss)(params), state, params, batch=None)
    ...   return (optax.apply_updates(params, updates), state), None
    >>> (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=4000)
    >>> print(params.outer.round(1))
    1.0
  """
  head = add_primal_dual_penalty(
    inner_loss,
    slack=slack,
    dual_learning_rate=dual_learning_rate,
    num_steps=num_steps,
    inner_optimizer=inner_optimizer,
    value_regularizer=value_regularizer,
    dual_bound=dual_bound,
    extrapolation=extrapolation,
    project_outer=project_outer,
    project_inner=project_inner,
    gap_steps=gap_steps,
  )
  head = add_proximal_terms(
    head, outer_weight=outer_weight, constraint_weight=constraint_weight, period=period
  )
  return optax.chain(head, *descend(learning_rate, project_outer, project_inner))
