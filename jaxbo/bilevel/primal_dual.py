"""PDBO: a primal-dual method on the value-function form of a bilevel problem."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check, _schedule, _tree
from jaxbo._optimizer import LearningRate
from jaxbo._types import Loss
from jaxbo.bilevel.parameters import Bilevel
from jaxbo.bilevel.projection import Projection, descend, project_tree
from jaxbo.bilevel.value_function import Penalty, Updated, lower_value, penalize_excess


class PrimalDualInfo(NamedTuple):
  r"""Diagnostics of :func:`~jaxbo.add_primal_dual_penalty`; scalars of float32 at least.

  Attributes:
    constraint: :math:`h = g(x, y) - \tilde g(x, \hat y) - \delta` before the update. It is too
      small if :math:`\hat y` has not converged: see ``gap``.
    dual: the multiplier :math:`\lambda` of this update.
    dual_at_bound: whether the multiplier is at ``dual_bound``. If so, the bound or the slack is too
      small, or the primal steps are too large, and the constraint may stay violated.
    kkt_residual: :math:`\|z - P(z - \nabla_z L)\| + \max(h, 0) + |\lambda h|` with
      :math:`z = (x, y)`: zero at a KKT point.
    gap: :math:`g(x, y)` minus the inner loss after ``gap_steps`` further steps without the
      regularizer; ``None`` without ``gap_steps``.
    finite: whether all numbers from the inner loss were finite. If not, the update returned the
      incoming gradient and kept the state; the fields above are from the last good update.
  """

  constraint: jax.Array
  dual: jax.Array
  dual_at_bound: jax.Array
  kkt_residual: jax.Array
  gap: jax.Array | None
  finite: jax.Array


class PrimalDualState(NamedTuple):
  r"""State of :func:`~jaxbo.add_primal_dual_penalty`.

  Attributes:
    value_params: the lower-value iterate :math:`\hat y`, float32 at least.
    value_opt_state: the state of the optimizer of :math:`\hat y`.
    dual_variable: the multiplier :math:`\lambda`, a scalar.
    previous_constraint: the constraint of the last update, a scalar.
    primal_dual_count: the number of finite updates, int32.
    info: the :class:`PrimalDualInfo` of the last update.
  """

  value_params: optax.Params
  value_opt_state: optax.OptState
  dual_variable: jax.Array
  previous_constraint: jax.Array
  primal_dual_count: jax.Array
  info: PrimalDualInfo


def add_primal_dual_penalty(
  inner_loss: Loss,
  *,
  slack: float | jax.Array,
  dual_learning_rate: optax.ScalarOrSchedule,
  num_steps: int,
  inner_optimizer: optax.GradientTransformation,
  value_regularizer: float | jax.Array = 0.0,
  dual_bound: float | jax.Array = 100.0,
  extrapolation: optax.ScalarOrSchedule = 0.0,
  project_inner: Projection | None = None,
  project_outer: Projection | None = None,
  gap_steps: int = 0,
) -> optax.GradientTransformationExtraArgs:
  r"""Adds the multiplier times the gradient of the constraint "y is nearly minimal" (PDBO).

  .. math::
    h(x, y) &= g(x, y) - \tilde g^*(x) - \delta \le 0, \qquad
    \tilde g^*(x) = \min_{y \in Y} g(x, y) + \tfrac a2 \|y\|^2 \\
    \lambda_{t+1} &= \mathrm{clip}\big(\lambda_t
      + \tau_t [(1 + \theta_t) h_t - \theta_t h_{t-1}],\ 0,\ B\big) \\
    L_x &= \nabla_x f + \lambda_{t+1} \big(\nabla_x g(x, y) - \nabla_x g(x, \hat y)\big), \qquad
    L_y = \nabla_y f + \lambda_{t+1} \nabla_y g(x, y)

  The inner problem may have many minima; the method looks for the minimum that is best for
  :math:`f` (the optimistic choice). Each update first moves :math:`\hat y` by ``num_steps``
  warm-started steps towards the minimum of the lower problem. Gradients never flow through
  :math:`\hat y` (Danskin). The regularizer is in the lower value only: in :math:`g(x, y)` too it
  would exclude minima of large norm. It makes :math:`\tilde g^*` smooth and adds
  :math:`\frac a2 \|y\|^2` at the minimum to the slack. Without slack no finite multiplier exists.

  The primal step must shrink as the multiplier grows, :math:`\eta \le 1 / (L_f + \lambda L_h)`:
  choose the step for ``dual_bound``, or use :func:`scale_by_lagrangian_smoothness`. If :math:`f` or
  :math:`h` is not convex, see :func:`add_proximal_terms`.

  Stochastic use: the caller chooses the batch of :math:`f`; ``batch=`` is the batch of :math:`g`.
  Both evaluations of :math:`g` share this batch, so their noise cancels where :math:`y` is near
  :math:`\hat y`. The update is unbiased if :math:`\hat y` and the multiplier do not depend on the
  batch. Four things bias it:

  * the multiplier depends on the batch: a bias of :math:`\tau\, \mathrm{Cov}(h, \nabla h)`;
  * the clip of the multiplier;
  * :math:`\hat y` is fitted to the batch, so the constraint is too large; pass ``value_batch=``, a
    separate batch for the steps of :math:`\hat y`, to avoid this;
  * an unconverged :math:`\hat y`, with or without noise.

  Cost: ``num_steps + 2`` gradients of the inner loss (``num_steps + 3`` gradients with the caller's
  gradient of :math:`f`) and no second-order product; ``gap_steps`` adds as many gradients and one
  value. Memory: :math:`\hat y` and the state of its optimizer, independent of ``num_steps``.

  Args:
    inner_loss: the inner loss :math:`g`, ``inner_loss(x, y, batch) -> scalar``, without the
      regularizer.
    slack: :math:`\delta > 0`. A point is feasible if its inner loss is within :math:`\delta` of the
      lower value. For an inner loss of curvature :math:`\mu`, feasible points are within
      :math:`\sqrt{2 \delta / \mu}` of the minimum. Multipliers grow like :math:`1 / \sqrt{\delta}`.
    dual_learning_rate: :math:`\tau_t > 0`, a float or a schedule.
    num_steps: the number :math:`N \ge 1` of steps for :math:`\hat y`.
    inner_optimizer: any optax optimizer for :math:`\hat y`, such as
      :math:`\mathrm{sgd}(1 / (L_g + a))`.
    value_regularizer: :math:`a \ge 0`.
    dual_bound: :math:`B > 0`, the largest multiplier (default: our choice, see Departures from the
      papers).
    extrapolation: :math:`\theta_t \ge 0`, a float or a schedule. 0 is plain dual ascent; 1 damps
      the oscillation of multiplier and constraint. In the first update :math:`h_{t-1} = h_t` (our
      choice).
    project_inner: the projection on :math:`Y`, applied after each step of :math:`\hat y` and in the
      KKT residual. To project :math:`y` itself, put :func:`jaxbo.project` last in the chain.
    project_outer: the projection on :math:`X`, for the KKT residual alone.
    gap_steps: how many further steps measure the ``gap`` in ``info``; 0 for no gap. Later updates
      do not use these steps.

  Returns:
    A transformation of :class:`jaxbo.Bilevel` gradients of :math:`f` at :math:`(x, y)`; put it
    first in the chain. ``update`` must be given ``params`` (:class:`jaxbo.Bilevel`) and
    ``batch=``. It also takes ``value_batch=``, the batch of the steps of :math:`\hat y`, and
    ``constraint_term=``, a :class:`~jaxbo.bilevel.ConstraintTerm`, which is added to the
    constraint: its ``value`` is a scalar and its ``gradient`` is :class:`jaxbo.Bilevel`. If a
    number is not finite (a bad batch), :math:`\hat y` and the multiplier keep their values, the
    update is the incoming gradient, and ``info.finite`` is false. Parameters narrower than float32
    are run in float32, because the constraint is a small difference of losses.

  Raises:
    ValueError: if ``slack``, ``dual_bound`` or ``dual_learning_rate`` is not positive,
      ``value_regularizer`` or ``extrapolation`` is negative, ``num_steps < 1`` or
      ``gap_steps < 0``; if the inner loss is not a scalar.
    TypeError: if ``inner_loss`` does not take ``(x, y, batch)``; if parameters or gradients are
      not :class:`jaxbo.Bilevel`; if ``batch=`` is missing.

  Example:
    >>> import jax, jax.numpy as jnp, jaxbo, optax
    >>> inner_loss = lambda x, y, batch: 0.5 * y[0] ** 2 - x * y[0]           # y[1] is free
    >>> outer_loss = lambda p: 0.5 * (p.outer - p.inner[1]) ** 2 + 0.5 * (p.inner[0] - 1) ** 2
    >>> tx = optax.chain(
    ...   jaxbo.add_primal_dual_penalty(inner_loss, slack=1e-3, dual_learning_rate=0.1,
    ...                                 num_steps=1, inner_optimizer=optax.sgd(1.0)),
    ...   optax.sgd(0.1))
    >>> params = jaxbo.Bilevel(outer=jnp.float32(3.0), inner=jnp.zeros(2))
    >>> def step(carry, _):
    ...   params, state = carry
    ...   updates, state = tx.update(jax.grad(outer_loss)(params), state, params, batch=None)
    ...   return (optax.apply_updates(params, updates), state), None
    >>> (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), length=600)
    >>> print(params.outer.round(2), params.inner.round(2))                   # x = 1, y = (1, 1)
    1.0 [1. 1.]
    >>> bool(optax.tree.get(state, "PrimalDualInfo").dual_at_bound)
    False

  References:
    Sow, Ji, Guan and Liang, `A Primal-Dual Approach to Bilevel Optimization with Multiple Inner
    Minima <https://arxiv.org/abs/2203.01123>`_, 2022. For its schedules and its average of the
    iterates, see Departures from the papers.
  """
  _check.positive("slack", slack)
  _check.positive("dual_bound", dual_bound)
  _check.non_negative("value_regularizer", value_regularizer)
  _schedule.check("dual_learning_rate", dual_learning_rate, _check.positive)
  _schedule.check("extrapolation", extrapolation, _check.non_negative)
  if project_outer is not None:
    _check.takes_arguments("project_outer", project_outer, "x")
  make = lambda steps, regularizer: lower_value(
    inner_loss, inner_optimizer, steps, regularizer=regularizer, project_inner=project_inner
  )
  lower = make(num_steps, value_regularizer)
  if gap_steps != 0:
    gap_steps = _check.positive_int("gap_steps, unless 0,", gap_steps)
  converged = make(gap_steps, 0.0) if gap_steps else None

  def kkt_residual(params, lagrangian, constraint, dual):
    moved = optax.tree.sub(params, lagrangian)
    moved = Bilevel(
      project_tree("project_outer", project_outer, moved.outer),
      project_tree("project_inner", project_inner, moved.inner),
    )
    stationarity = _tree.norm(optax.tree.sub(params, moved)).astype(dual.dtype)
    return stationarity + jnp.maximum(constraint, 0) + jnp.abs(dual * constraint)

  def init(params, zero):
    gap = zero() if gap_steps else None
    info = PrimalDualInfo(zero(), zero(), jnp.bool_(False), zero(), gap, jnp.bool_(True))
    return PrimalDualState(*lower.init(params.inner), zero(), zero(), jnp.int32(0), info)

  def rule(excess, grads, state):
    del grads
    count, dtype = state.primal_dual_count, state.dual_variable.dtype
    constraint = excess.value - jnp.asarray(slack, dtype)
    rate = _schedule.value_at(dual_learning_rate, count, dtype)
    theta = _schedule.value_at(extrapolation, count, dtype)
    previous = jnp.where(count == 0, constraint, state.previous_constraint)
    ascent = (1 + theta) * constraint - theta * previous
    bound = jnp.asarray(dual_bound, dtype)
    dual = jnp.clip(state.dual_variable + rate * ascent, 0, bound)

    def new_state(now: Updated):
      lagrangian = _tree.at_least_float32(now.direction)
      residual = kkt_residual(now.params, lagrangian, constraint, dual)
      # The caller handles a gradient of f that is not finite, but it must not stay in the state.
      residual = jnp.where(jnp.isfinite(residual), residual, state.info.kkt_residual)
      gap = None
      if converged is not None:
        (y_star, _), gap_finite = converged.solve(now.params.outer, now.value, now.batch)
        gap = excess.inner_loss - converged.loss(now.params.outer, y_star, now.batch)
        gap = jnp.where(gap_finite & jnp.isfinite(gap), gap, state.info.gap)
      next_count = _schedule.after(count)
      info = PrimalDualInfo(constraint, dual, dual >= bound, residual, gap, now.finite)
      return PrimalDualState(*now.value, dual, constraint, next_count, info)

    return Penalty(dual, (constraint,), new_state)

  start = lambda params, state: (state.value_params, state.value_opt_state)
  return penalize_excess("add_primal_dual_penalty", lower, init, rule, start=start)


def pdbo(
  learning_rate: LearningRate | Bilevel,
  inner_loss: Loss,
  *,
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
  r"""PDBO: gradient descent along :func:`add_primal_dual_penalty`, with projections.

  Args:
    learning_rate: for both levels, a float or a schedule of at most :math:`1 / (L_f + B L_h)`, or
      an optax optimizer to use instead; or :class:`jaxbo.Bilevel` of two of these.
    inner_loss: the inner loss :math:`g`, ``inner_loss(x, y, batch) -> scalar``.
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
    ``optax.chain(add_primal_dual_penalty(...), optax.scale_by_learning_rate(learning_rate),
    project(project_outer, project_inner))``.
    Without projections the chain has no ``project``.

  Example:
    >>> import jax, jax.numpy as jnp, jaxbo, optax
    >>> inner_loss = lambda x, y, batch: (y - x) ** 2
    >>> tx = jaxbo.pdbo(0.02, inner_loss, slack=1e-4, dual_learning_rate=10.0, dual_bound=20.0,
    ...                 num_steps=1, inner_optimizer=optax.sgd(0.5))
    >>> params = jaxbo.Bilevel(outer=jnp.float32(0.0), inner=jnp.float32(0.0))
    >>> outer_loss = lambda p: p.outer * p.inner - 2 * p.outer + 1            # minimal at x = 1
    >>> def step(carry, _):
    ...   params, state = carry
    ...   updates, state = tx.update(jax.grad(outer_loss)(params), state, params, batch=None)
    ...   return (optax.apply_updates(params, updates), state), None
    >>> (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=2000)
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
  return optax.chain(head, *descend(learning_rate, project_outer, project_inner))
