"""V-PBGD and F2SA: a penalty on the excess over the lower value."""

from collections.abc import Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check, _schedule, _tree
from jaxbo._optimizer import LearningRate, optimizer
from jaxbo._types import Loss, PyTree
from jaxbo.bilevel.parameters import Bilevel
from jaxbo.bilevel.projection import Projection, descend, project
from jaxbo.bilevel.value_function import Penalty, Updated, lower_value, penalize_excess


class ValuePenaltyInfo(NamedTuple):
  r"""Diagnostics of :func:`~jaxbo.add_value_function_penalty`; scalars of float32 at least.

  Attributes:
    excess: :math:`q = g(x, y) - g(x, \hat y)` before the update.
    dual: the multiplier :math:`\gamma` of this update.
    finite: whether the multiplier and all numbers from the inner loss were finite. If not, the
      update returned the incoming gradient and kept the state; the fields above are from the last
      good update.
  """

  excess: jax.Array
  dual: jax.Array
  finite: jax.Array


class ValuePenaltyState(NamedTuple):
  r"""State of :func:`~jaxbo.add_value_function_penalty`.

  Attributes:
    penalty_params: the lower-value iterate :math:`\hat y`, float32 at least.
    penalty_opt_state: the state of the optimizer of :math:`\hat y`.
    penalty_count: the number of finite updates, int32; the argument of the schedule.
    info: the :class:`ValuePenaltyInfo` of the last update.
  """

  penalty_params: optax.Params
  penalty_opt_state: optax.OptState
  penalty_count: jax.Array
  info: ValuePenaltyInfo


def add_value_function_penalty(
  inner_loss: Loss,
  *,
  multiplier: optax.ScalarOrSchedule,
  num_steps: int,
  inner_optimizer: optax.GradientTransformation,
  normalize: bool = False,
  project_inner: Projection | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Adds a multiple of the gradient of the excess over the lower value (V-PBGD, F2SA).

  .. math::
    d_x = \nabla_x f + \gamma_t \big(\nabla_x g(x, y) - \nabla_x g(x, \hat y)\big), \qquad
    d_y = \nabla_y f + \gamma_t \nabla_y g(x, y)

  Each update first moves :math:`\hat y` by ``num_steps`` warm-started steps towards the minimum of
  :math:`g(x, \cdot)`. Gradients do not flow through :math:`\hat y`. A finite multiplier moves the
  solution: for an inner loss of curvature :math:`\mu`, by a distance of order
  :math:`1 / (\gamma \mu)`. With :math:`\gamma` constant, or rising along a linear schedule to a
  constant, this is V-PBGD.

  F2SA has a second inner sequence, which follows the minimum of :math:`f(x, y) + \gamma g(x, y)`.
  That sequence is :math:`y`, the inner part of the parameters: :math:`d_y` is the gradient of
  exactly this function. A separate learning rate for each level (``optax.partition``) completes
  the single loop of F2SA. For the double loop, the tail of the chain moves :math:`y` in some
  updates and :math:`x` in others, so that each step of either level uses a fresh gradient of
  :math:`f` on a new batch: see ``alternate`` of :func:`f2sa`.

  The primal step must shrink as the multiplier grows, :math:`\eta \le 1 / (L_f + \gamma L_q)`: use
  ``normalize``, a schedule, or :func:`scale_by_lagrangian_smoothness`.

  Stochastic use: the caller chooses the batch of :math:`f`; ``batch=`` is the batch of :math:`g`.
  Both evaluations of :math:`g` share this batch, so their noise cancels where :math:`y` is near
  :math:`\hat y`. The update is linear in both losses, so it is unbiased for a given
  :math:`\hat y`. It is biased against the exact lower value: :math:`\hat y` has not converged, and
  it is fitted to the batch unless you pass ``value_batch=``, a separate batch for its steps.

  Cost: ``num_steps + 2`` gradients of the inner loss (``num_steps + 3`` gradients with the caller's
  gradient of :math:`f`) and no second-order product. Memory: :math:`\hat y` and the state of its
  optimizer.

  Args:
    inner_loss: the inner loss :math:`g`, ``inner_loss(x, y, batch) -> scalar``.
    multiplier: :math:`\gamma_t \ge 0`, a float or a schedule, such as
      ``optax.linear_schedule(0.0, 10.0, 1000)``.
    num_steps: the number :math:`N \ge 1` of steps for :math:`\hat y`.
    inner_optimizer: any optax optimizer for :math:`\hat y`.
    normalize: whether to multiply the result by :math:`\min(1 / \gamma_t, 1)`, as in the published
      code of V-PBGD. In an update that is not finite, this scales the incoming gradient, by the
      multiplier of the last good update.
    project_inner: the projection on :math:`Y`, applied after each step of :math:`\hat y`. To
      project :math:`y` itself, put :func:`jaxbo.project` last in the chain.

  Returns:
    A transformation of :class:`jaxbo.Bilevel` gradients of :math:`f` at :math:`(x, y)`; put it
    first in the chain. ``update`` must be given ``params`` (:class:`jaxbo.Bilevel`) and
    ``batch=``. It also takes ``value_batch=``, the batch of the steps of :math:`\hat y`, and
    ``constraint_term=``, a record that is added to :math:`q`: its ``value`` is a scalar and its
    ``gradient`` is :class:`jaxbo.Bilevel`. If a number is not finite (a bad batch),
    :math:`\hat y` keeps its value, the update is the incoming gradient, and ``info.finite`` is
    false. Parameters narrower than float32 are run in float32.

  Raises:
    ValueError: if ``multiplier`` is negative or ``num_steps < 1``; if the inner loss is not a
      scalar.
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
    new: PyTree
    direction, new = head.update(updates, state, params, **extra_args)
    return _tree.scaled(1 / jnp.maximum(new.info.dual, 1), direction), new

  return optax.GradientTransformationExtraArgs(head.init, update)


def v_pbgd(
  learning_rate: LearningRate | Bilevel,
  inner_loss: Loss,
  *,
  multiplier: optax.ScalarOrSchedule,
  num_steps: int = 1,
  inner_optimizer: optax.GradientTransformation,
  project_outer: Projection | None = None,
  project_inner: Projection | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""V-PBGD: gradient descent along a normalized :func:`add_value_function_penalty`.

  Args:
    learning_rate: for both levels, a float, a schedule, or an optax optimizer to use instead; or
      :class:`jaxbo.Bilevel` of two of these. A float or schedule multiplies
      :math:`\min(1 / \gamma, 1)`.
    inner_loss: the inner loss :math:`g`, ``inner_loss(x, y, batch) -> scalar``.
    multiplier: the multiplier :math:`\gamma_t \ge 0` of the penalty, a float or a schedule.
    num_steps: the number :math:`N \ge 1` of steps for the lower value; the default is the value of
      the published experiments.
    inner_optimizer: any optax optimizer for the lower value.
    project_outer: the projection on :math:`X`, or ``None``.
    project_inner: the projection on :math:`Y`, for ``y`` and the lower value; or ``None``.

  Returns:
    ``optax.chain(add_value_function_penalty(..., normalize=True),
    optax.scale_by_learning_rate(learning_rate), project(project_outer, project_inner))``.
    Without projections the chain has no ``project``.

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
  inner_loss: Loss,
  *,
  multiplier: optax.ScalarOrSchedule,
  num_steps: int = 1,
  inner_optimizer: optax.GradientTransformation,
  alternate: int | None = None,
  project_outer: Projection | None = None,
  project_inner: Projection | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""F2SA: :func:`add_value_function_penalty` with a rising multiplier and two inner sequences.

  :math:`\hat y` follows the minimum of :math:`g`; :math:`y` follows the minimum of
  :math:`f + \gamma g`.

  Args:
    outer_learning_rate: for :math:`x`, a float, a schedule, or an optax optimizer to use instead. A
      schedule counts the updates in which :math:`x` moves.
    inner_learning_rate: the same for :math:`y`, at most :math:`1 / (L_f + \gamma L_g)`.
    inner_loss: the inner loss :math:`g`, ``inner_loss(x, y, batch) -> scalar``.
    multiplier: the multiplier :math:`\gamma_t \ge 0`, a float or a schedule, which counts the
      finite updates of either level. The multiplier of the paper rises.
    num_steps: the number :math:`N \ge 1` of steps of :math:`\hat y` in each update.
    inner_optimizer: any optax optimizer for :math:`\hat y`.
    alternate: ``None``: both levels move in every update. An int :math:`T \ge 1`: by turns,
      :math:`T` updates move :math:`y` and one moves :math:`x`. With ``num_steps=1`` this is nearly
      the published double loop: see Departures from the papers.
    project_outer: the projection on :math:`X`, or ``None``.
    project_inner: the projection on :math:`Y`, for ``y`` and the lower value; or ``None``.

  Returns:
    ``optax.chain(add_value_function_penalty(...), optax.partition(levels, Bilevel("outer",
    "inner")), project(project_outer, project_inner))``, where ``levels`` are two
    ``optax.scale_by_learning_rate``; ``alternate`` wraps each in ``optax.conditionally_mask``.

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
    "outer": optimizer(outer_learning_rate, name="outer_learning_rate"),
    "inner": optimizer(inner_learning_rate, name="inner_learning_rate"),
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
