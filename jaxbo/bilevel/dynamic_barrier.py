"""BOME: descent on the outer loss under a dynamic barrier for the inner loss."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check, _tree
from jaxbo._optimizer import LearningRate
from jaxbo._types import Loss
from jaxbo.bilevel.parameters import Bilevel
from jaxbo.bilevel.projection import Projection, descend
from jaxbo.bilevel.value_function import Penalty, lower_value, penalize_excess


class DynamicBarrierInfo(NamedTuple):
  r"""Diagnostics of :func:`~jaxbo.add_dynamic_barrier`; scalars of float32 at least.

  Attributes:
    excess: :math:`q = g(x, y) - g(x, \hat y)` before the update.
    excess_gradient_norm: :math:`\|\nabla q\|`.
    dual: the multiplier :math:`\lambda` of this update.
    finite: whether the multiplier and all numbers from the inner loss were finite. If not, the
      update returned the incoming gradient; the fields above are from the last good update.
  """

  excess: jax.Array
  excess_gradient_norm: jax.Array
  dual: jax.Array
  finite: jax.Array


class DynamicBarrierState(NamedTuple):
  """State of :func:`~jaxbo.add_dynamic_barrier`, which holds only diagnostics.

  Attributes:
    info: the :class:`DynamicBarrierInfo` of the last update.
  """

  info: DynamicBarrierInfo


def add_dynamic_barrier(
  inner_loss: Loss,
  *,
  barrier_rate: float | jax.Array,
  num_steps: int,
  inner_optimizer: optax.GradientTransformation,
  phi: str = "gradient",
  epsilon: float | jax.Array = 1e-8,
  project_inner: Projection | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Adds just enough of the gradient of the inner problem to make its excess fall (BOME).

  .. math::
    q(x, y) &= g(x, y) - g(x, \hat y), \qquad
    \nabla q = \big(\nabla_x g(x, y) - \nabla_x g(x, \hat y),\ \nabla_y g(x, y)\big) \\
    d &= \nabla f + \lambda \nabla q, \qquad
    \lambda = \max\Big(0, \frac{\phi - \langle \nabla f, \nabla q \rangle}
      {\|\nabla q\|^2 + \epsilon}\Big), \qquad
    \phi = \eta \|\nabla q\|^2 \text{ or } \eta q

  :math:`d` is the direction closest to :math:`\nabla f` along which :math:`q` falls at least at the
  rate :math:`\phi`: :math:`\langle \nabla q, d \rangle \ge \phi`, up to :math:`\epsilon`. In every
  update, :math:`\hat y` starts at the current :math:`y` with a fresh optimizer; gradients do not
  flow through :math:`\hat y`. The method keeps no state, so there is no multiplier to tune. The
  multiplier grows without bound as :math:`q` goes to zero. If there are many inner minima,
  :math:`q` is measured against the minimum whose basin holds :math:`y`.

  Stochastic use: the caller chooses the batch of :math:`f`; ``batch=`` is the batch of :math:`g`.
  The multiplier is a ratio of inner products of both gradients, so the noise of either batch biases
  the update, even if :math:`\hat y` is exact.

  Cost: ``num_steps + 2`` gradients of the inner loss (``num_steps + 3`` gradients with the caller's
  gradient of :math:`f`) and no second-order product. Memory: one run of :math:`\hat y`; no state.

  Args:
    inner_loss: the inner loss :math:`g`, ``inner_loss(x, y, batch) -> scalar``.
    barrier_rate: :math:`\eta > 0`; the published experiments use 0.1 to 0.9.
    num_steps: the number :math:`N \ge 1` of steps for :math:`\hat y`.
    inner_optimizer: any optax optimizer for :math:`\hat y`.
    phi: ``"gradient"``, :math:`\phi = \eta \|\nabla q\|^2` (the toy problems of the published
      code), or ``"value"``, :math:`\phi = \eta q` (its hyperparameter experiments).
    epsilon: :math:`\epsilon > 0`.
    project_inner: the projection on :math:`Y`, applied after each step of :math:`\hat y`. To
      project :math:`y` itself, put :func:`jaxbo.project` last in the chain.

  Returns:
    A transformation of :class:`jaxbo.Bilevel` gradients of :math:`f` at :math:`(x, y)`; put it
    first in the chain. ``update`` must be given ``params`` (:class:`jaxbo.Bilevel`) and
    ``batch=``. It also takes ``value_batch=``, the batch of the steps of :math:`\hat y`, and
    ``constraint_term=``, a record that is added to :math:`q`: its ``value`` is a scalar and its
    ``gradient`` is :class:`jaxbo.Bilevel`. If a number is not finite (a bad batch), the
    update is the incoming gradient, and ``info.finite`` is false. Parameters narrower than float32
    are run in float32.

  Raises:
    ValueError: if ``barrier_rate`` or ``epsilon`` is not positive, ``num_steps < 1``, or ``phi`` is
      unknown; if the inner loss is not a scalar.
    TypeError: if ``inner_loss`` does not take ``(x, y, batch)``; if parameters or gradients are
      not :class:`jaxbo.Bilevel`; if ``batch=`` is missing.

  Example:
    >>> import jax.numpy as jnp, jaxbo, optax
    >>> inner_loss = lambda x, y, batch: 0.5 * (y - x) ** 2
    >>> tx = jaxbo.add_dynamic_barrier(inner_loss, barrier_rate=0.5, num_steps=1,
    ...                                inner_optimizer=optax.sgd(1.0))
    >>> params = jaxbo.Bilevel(outer=jnp.float32(0.0), inner=jnp.float32(2.0))
    >>> grads = jaxbo.Bilevel(outer=jnp.float32(1.0), inner=jnp.float32(0.0))
    >>> direction, state = tx.update(grads, tx.init(params), params, batch=None)
    >>> float(state.info.excess), float(state.info.dual)     # grad q = (-2, 2): (4 + 2) / 8
    (2.0, 0.75)
    >>> [float(d) for d in direction]
    [-0.5, 1.5]

  References:
    Liu et al., `BOME! Bilevel Optimization Made Easy: A Simple First-Order Approach
    <https://arxiv.org/abs/2209.08709>`_, 2022.
  """
  _check.positive("barrier_rate", barrier_rate)
  _check.positive("epsilon", epsilon)
  _check.one_of("phi", phi, ("gradient", "value"))
  lower = lower_value(inner_loss, inner_optimizer, num_steps, project_inner=project_inner)

  def init(params, zero):
    del params
    return DynamicBarrierState(DynamicBarrierInfo(zero(), zero(), zero(), jnp.bool_(True)))

  def rule(excess, grads, state):
    dtype = state.info.dual.dtype
    norm_sq = _tree.vdot(excess.gradient, excess.gradient).astype(dtype)
    rate = jnp.asarray(barrier_rate, dtype)
    barrier = rate * (norm_sq if phi == "gradient" else excess.value)
    slope = _tree.vdot(grads, excess.gradient).astype(dtype)
    dual = jnp.maximum((barrier - slope) / (norm_sq + jnp.asarray(epsilon, dtype)), 0)
    info = lambda now: DynamicBarrierInfo(excess.value, jnp.sqrt(norm_sq), dual, now.finite)
    return Penalty(dual, (excess.value, norm_sq), lambda now: DynamicBarrierState(info(now)))

  start = lambda params, state: lower.init(params.inner)
  return penalize_excess("add_dynamic_barrier", lower, init, rule, start=start)


def bome(
  learning_rate: LearningRate | Bilevel,
  inner_loss: Loss,
  *,
  barrier_rate: float | jax.Array = 0.5,
  num_steps: int = 10,
  inner_optimizer: optax.GradientTransformation,
  phi: str = "gradient",
  epsilon: float | jax.Array = 1e-8,
  project_outer: Projection | None = None,
  project_inner: Projection | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""BOME: gradient descent along :func:`add_dynamic_barrier`, with projections.

  Args:
    learning_rate: for both levels, a float, a schedule, or an optax optimizer to use instead; or
      :class:`jaxbo.Bilevel` of two of these.
    inner_loss: the inner loss :math:`g`, ``inner_loss(x, y, batch) -> scalar``.
    barrier_rate: the rate :math:`\eta > 0`; the default is the value of the published toy problems.
    num_steps: the number :math:`N \ge 1` of steps for the lower value; the default is the value of
      the published toy problems.
    inner_optimizer: any optax optimizer for the lower value.
    phi: ``"gradient"`` for :math:`\phi = \eta \|\nabla q\|^2`, ``"value"`` for
      :math:`\phi = \eta q`.
    epsilon: :math:`\epsilon > 0`, added to :math:`\|\nabla q\|^2`.
    project_outer: the projection on :math:`X`, or ``None``.
    project_inner: the projection on :math:`Y`, for ``y`` and the lower value; or ``None``.

  Returns:
    ``optax.chain(add_dynamic_barrier(...), optax.scale_by_learning_rate(learning_rate),
    project(project_outer, project_inner))``.
    Without projections the chain has no ``project``.

  Example:
    >>> import jax, jax.numpy as jnp, jaxbo, optax
    >>> inner_loss = lambda x, y, batch: (y - x) ** 2
    >>> tx = jaxbo.bome(0.01, inner_loss, num_steps=1, inner_optimizer=optax.sgd(0.5))
    >>> params = jaxbo.Bilevel(outer=jnp.float32(0.0), inner=jnp.float32(0.5))
    >>> outer_loss = lambda p: p.outer * p.inner - 2 * p.outer + 1            # minimal at x = 1
    >>> def step(carry, _):
    ...   params, state = carry
    ...   updates, state = tx.update(jax.grad(outer_loss)(params), state, params, batch=None)
    ...   return (optax.apply_updates(params, updates), state), None
    >>> (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=2000)
    >>> print(params.outer.round(1))
    1.0
  """
  head = add_dynamic_barrier(
    inner_loss,
    barrier_rate=barrier_rate,
    num_steps=num_steps,
    inner_optimizer=inner_optimizer,
    phi=phi,
    epsilon=epsilon,
    project_inner=project_inner,
  )
  return optax.chain(head, *descend(learning_rate, project_outer, project_inner))
