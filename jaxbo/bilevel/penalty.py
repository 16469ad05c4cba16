"""V-PBGD and F2SA: a penalty on what exceeds the lower value."""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check, _schedule, _tree
from jaxbo._optimizer import LearningRate, optimizer
from jaxbo.bilevel.parameters import Bilevel
from jaxbo.bilevel.projection import Projection, descend, project
from jaxbo.bilevel.value_function import Penalty, Updated, lower_value, penalize_excess


class ValuePenaltyInfo(NamedTuple):
  r"""Diagnostics of :func:`~jaxbo.add_value_function_penalty`; scalars of float32 at least.

  Attributes:
    excess: :math:`q = g(x, y) - g(x, \hat y)` before the update.
    dual: the multiplier :math:`\gamma` of this update.
    finite: whether the multiplier and all numbers from the inner loss were. If not, the update was
      the incoming gradient, the state was left alone, and the fields above are those of the last
      good update.
  """

  excess: jax.Array
  dual: jax.Array
  finite: jax.Array


class ValuePenaltyState(NamedTuple):
  r"""State of :func:`~jaxbo.add_value_function_penalty`.

  Attributes:
    penalty_params: the lower-value iterate :math:`\hat y`, float32 at least.
    penalty_opt_state: the state of its optimizer.
    penalty_count: the number of updates that were not skipped, int32; the schedule's argument.
    info: the :class:`ValuePenaltyInfo` of the last update.
  """

  penalty_params: optax.Params
  penalty_opt_state: optax.OptState
  penalty_count: jax.Array
  info: ValuePenaltyInfo


def add_value_function_penalty(
  inner_loss: Callable[..., Any],
  *,
  multiplier: optax.ScalarOrSchedule,
  num_steps: int,
  inner_optimizer: optax.GradientTransformation,
  normalize: bool = False,
  project_inner: Projection | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Adds a multiple of the gradient of what exceeds the lower value (V-PBGD, F2SA).

  .. math::
    d_x = \nabla_x f + \gamma_t \big(\nabla_x g(x, y) - \nabla_x g(x, \hat y)\big), \qquad
    d_y = \nabla_y f + \gamma_t \nabla_y g(x, y)

  :math:`\hat y` follows :math:`\min_y g(x, y)` by ``num_steps`` warm-started steps before each
  update and is not differentiated through. A finite multiplier moves the solution: for an inner
  loss of curvature :math:`\mu` by a distance of order :math:`1 / (\gamma \mu)`. With
  :math:`\gamma` constant or rising to its value along a linear schedule this is V-PBGD.

  F2SA has a second inner sequence that follows :math:`\min_y f(x, y) + \gamma g(x, y)`. It is
  :math:`y`, the inner part of the parameters: :math:`d_y` is the gradient of that very function.
  With learning rates of their own for the levels (``optax.partition``) the single loop of F2SA is
  complete; for the double loop the tail moves :math:`y` in some updates and :math:`x` in others,
  so that each step of either sequence sees a fresh gradient of :math:`f` on a batch of its own: see
  ``alternate`` of :func:`f2sa`.

  The primal step must shrink as the multiplier grows, :math:`\eta \le 1 / (L_f + \gamma L_q)`: use
  ``normalize``, a schedule, or :func:`scale_by_lagrangian_smoothness`.

  Stochastic use: the batch of :math:`f` is the caller's, ``batch=`` is for :math:`g`. Both
  evaluations of :math:`g` share it, so their noise cancels where :math:`y` is near
  :math:`\hat y`. The update is linear in both losses: given :math:`\hat y` it is unbiased. Against
  the exact lower value it is not: :math:`\hat y` is not converged, and was fitted to the batch
  unless its steps get a batch of their own, ``value_batch=``.

  Cost: ``num_steps + 2`` gradients of the inner loss, so ``num_steps + 3`` with the caller's
  gradient of :math:`f`, and no second-order product. Memory: :math:`\hat y` and the state of its
  optimizer.

  Args:
    inner_loss: the inner loss :math:`g`, ``inner_loss(x, y, batch) -> scalar``.
    multiplier: :math:`\gamma_t \ge 0`, a float or a schedule, say
      ``optax.linear_schedule(0.0, 10.0, 1000)``.
    num_steps: the number :math:`N \ge 1` of steps for :math:`\hat y`.
    inner_optimizer: any optax optimizer for :math:`\hat y`.
    normalize: whether to multiply the result by :math:`\min(1 / \gamma_t, 1)`, as the published
      code of V-PBGD does. An incoming gradient that passes alone is scaled too.
    project_inner: the projection on :math:`Y`, applied after each step for :math:`\hat y`;
      :math:`y` itself is projected by :func:`jaxbo.project` behind.

  Returns:
    A transformation of :class:`jaxbo.Bilevel` gradients of :math:`f` at :math:`(x, y)`; it stands
    first in the chain. ``update`` must be given ``params`` (:class:`jaxbo.Bilevel`) and
    ``batch=``; ``value_batch=`` and ``constraint_term=`` are as in
    :func:`add_primal_dual_penalty`. Numbers that are not finite (a bad batch) leave
    :math:`\hat y` where it was and the incoming gradient as it is; ``info.finite`` says so.
    Parameters narrower than float32 are run in float32.

  Raises:
    ValueError: if ``multiplier`` is negative or ``num_steps < 1``; if the inner loss is no scalar.
    TypeError: if ``inner_loss`` does not take ``(x, y, batch)``; if parameters or gradients are
      not :class:`jaxbo.Bilevel`; if ``batch=`` is missing.

  Example:
    >>> import jax.numpy as jnp, jaxbo, optax
    >>> inner_loss = lambda x, y, batch: 0.5 * (y - x) ** 2
    >>> tx = jaxbo.add_value_function_penalty(inner_loss, multiplier=10.0, num_steps=1,
    ...                                       inner_optimizer=optax.sgd(1.0))
    >>> params = jaxbo.Bilevel(outer=jnp.float32(0.0), inner=jnp.float32(2.0))
    >>> grads = jaxbo.Bilevel(outer=jnp.float32(1.0), inner=jnp.float32(0.0))
    >>> direction, state = tx.update(grads, tx.init(params), params, batch=None)
    >>> [float(d) for d in direction]                        # grads + 10 * (-2, 2)
    [-19.0, 20.0]
    >>> float(state.info.excess)
    2.0

  References:
    Shen and Chen, `On Penalty-based Bilevel Gradient Descent Method
    <https://arxiv.org/abs/2302.05185>`_, 2023; Kwon et al., `A Fully First-Order Method for
    Stochastic Bilevel Optimization <https://arxiv.org/abs/2301.10945>`_, 2023.
  """
  _schedule.check("multiplier", multiplier, _check.non_negative)
  lower = lower_value(inner_loss, inner_optimizer, num_steps, project_inner=project_inner)

  def init(params, zero):
    info = ValuePenaltyInfo(zero(), zero(), jnp.bool_(True))
    return ValuePenaltyState(*lower.init(params.inner), jnp.int32(0), info)

  def rule(excess, grads, state):
    del grads
    gamma = _schedule.value_at(multiplier, state.penalty_count, state.info.dual.dtype)
    count = _schedule.after(state.penalty_count)

    def new_state(now: Updated):
      return ValuePenaltyState(*now.value, count, ValuePenaltyInfo(excess.value, gamma, now.finite))

    return Penalty(gamma, (excess.value,), new_state)

  start = lambda params, state: (state.penalty_params, state.penalty_opt_state)
  head = penalize_excess("add_value_function_penalty", lower, init, rule, start=start)
  if not normalize:
    return head

  def update(updates, state, params=None, **extra_args):
    new: Any
    direction, new = head.update(updates, state, params, **extra_args)
    return _tree.scaled(1 / jnp.maximum(new.info.dual, 1), direction), new

  return optax.GradientTransformationExtraArgs(head.init, update)


def v_pbgd(
  learning_rate: LearningRate | Bilevel,
  inner_loss: Callable[..., Any],
  *,
  multiplier: optax.ScalarOrSchedule,
  num_steps: int = 1,
  inner_optimizer: optax.GradientTransformation,
  project_outer: Projection | None = None,
  project_inner: Projection | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""V-PBGD: gradient descent along a normalized :func:`add_value_function_penalty`.

  Args:
    learning_rate: a float or a schedule for both levels, or an optimizer in its place; or
      :class:`jaxbo.Bilevel` of two. It
      multiplies :math:`\min(1 / \gamma, 1)`.
    inner_loss: as in :func:`add_value_function_penalty`.
    multiplier: as there.
    num_steps: as there; the default is that of the published experiments.
    inner_optimizer: as there.
    project_outer: the projection on :math:`X`, or ``None``.
    project_inner: the projection on :math:`Y`, for ``y`` as for the lower value; or ``None``.

  Returns:
    ``optax.chain(add_value_function_penalty(..., normalize=True),
    optax.scale_by_learning_rate(learning_rate), project(project_outer, project_inner))``.

  Example:
    >>> import jax, jax.numpy as jnp, jaxbo, optax
    >>> inner_loss = lambda x, y, batch: (y - x) ** 2
    >>> tx = jaxbo.v_pbgd(0.1, inner_loss, multiplier=50.0, inner_optimizer=optax.sgd(0.5))
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
  head = add_value_function_penalty(
    inner_loss,
    multiplier=multiplier,
    num_steps=num_steps,
    inner_optimizer=inner_optimizer,
    normalize=True,
    project_inner=project_inner,
  )
  return optax.chain(head, *descend(learning_rate, project_outer, project_inner))


def f2sa(
  outer_learning_rate: LearningRate,
  inner_learning_rate: LearningRate,
  inner_loss: Callable[..., Any],
  *,
  multiplier: optax.ScalarOrSchedule,
  num_steps: int = 1,
  inner_optimizer: optax.GradientTransformation,
  alternate: int | None = None,
  project_outer: Projection | None = None,
  project_inner: Projection | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""F2SA: :func:`add_value_function_penalty` with a rising multiplier and two inner sequences.

  :math:`\hat y` follows the minimum of :math:`g`, and :math:`y` that of :math:`f + \gamma g`.

  Args:
    outer_learning_rate: a float or a schedule for :math:`x`, or an optimizer. A schedule counts the
      updates in which :math:`x` moves.
    inner_learning_rate: the same for :math:`y`, at most :math:`1 / (L_f + \gamma L_g)`.
    inner_loss: as in :func:`add_value_function_penalty`.
    multiplier: as there; the published one rises. It counts all updates.
    num_steps: steps for :math:`\hat y` in each update.
    inner_optimizer: the optimizer of :math:`\hat y`.
    alternate: ``None``: both levels move in every update. An int :math:`T \ge 1`: :math:`T`
      updates move :math:`y` and one moves :math:`x`, in turn. With ``num_steps=1`` that is the
      published double loop, but that :math:`\hat y` takes a step in the update of :math:`x` too.
    project_outer: the projection on :math:`X`, or ``None``.
    project_inner: the projection on :math:`Y`, for ``y`` as for the lower value; or ``None``.

  Returns:
    ``optax.chain(add_value_function_penalty(...), optax.partition(levels, Bilevel("outer",
    "inner")), project(project_outer, project_inner))``, where ``levels`` are two
    ``optax.scale_by_learning_rate``, under ``optax.conditionally_mask`` with ``alternate``.

  Raises:
    ValueError: if ``alternate < 1``.

  Example:
    >>> import jax, jax.numpy as jnp, jaxbo, optax
    >>> inner_loss = lambda x, y, batch: (y - x) ** 2
    >>> tx = jaxbo.f2sa(0.02, 0.005, inner_loss, inner_optimizer=optax.sgd(0.5), alternate=4,
    ...                 multiplier=optax.linear_schedule(1.0, 50.0, 1000))
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
  levels: dict[Hashable, optax.GradientTransformation] = {
    "outer": optimizer(outer_learning_rate),
    "inner": optimizer(inner_learning_rate),
  }
  if alternate is not None:
    period = _check.positive_int("alternate", alternate) + 1
    outer_moves = lambda step, **_: jnp.asarray(step) % period == period - 1
    inner_moves = lambda step, **_: jnp.asarray(step) % period != period - 1
    levels = {
      "outer": optax.conditionally_mask(levels["outer"], outer_moves),
      "inner": optax.conditionally_mask(levels["inner"], inner_moves),
    }
  head = add_value_function_penalty(
    inner_loss,
    multiplier=multiplier,
    num_steps=num_steps,
    inner_optimizer=inner_optimizer,
    project_inner=project_inner,
  )
  tail = optax.partition(levels, Bilevel("outer", "inner"))
  return optax.chain(head, tail, project(project_outer, project_inner))
