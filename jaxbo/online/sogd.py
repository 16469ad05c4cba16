"""SOGD: both levels and the linear system advance together, with momentum corrections."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check, _schedule, _tree
from jaxbo._optimizer import LearningRate
from jaxbo._types import Loss, PyTree
from jaxbo.bilevel.loop import checked_loss
from jaxbo.bilevel.parameters import Bilevel, check_params, scalar_dtype
from jaxbo.bilevel.projection import Projection, descend
from jaxbo.bilevel.response import MISSING
from jaxbo.bilevel.single_loop import inner_terms
from jaxbo.bilevel.value_function import check_update


class SogdVariables(NamedTuple):
  """One value for each of the three variables of SOGD.

  Attributes:
    outer: for :math:`x`.
    inner: for :math:`y`.
    linear: for :math:`v`, shaped like the inner parameters.
  """

  outer: PyTree
  inner: PyTree
  linear: PyTree


class CorrectedResponseInfo(NamedTuple):
  """Diagnostics of :func:`~jaxbo.add_corrected_response`.

  Attributes:
    direction_norm: norm of the output for both levels, float32 at least.
    finite: whether every result of the round was finite. If not, the round does not count: the
      output is zero and the rest of the state stays unchanged.
  """

  direction_norm: jax.Array
  finite: jax.Array


class CorrectedResponseState(NamedTuple):
  """State of :func:`~jaxbo.add_corrected_response`.

  Attributes:
    linear_iterate: the iterate :math:`v` of the linear system, float32 at least.
    last_iterates: the :class:`SogdVariables` :math:`(x, y, v)` at which the last round was played.
    last_directions: the corrected directions of the last round, a :class:`SogdVariables`.
    correction_count: the number of rounds that counted, int32.
    info: the :class:`CorrectedResponseInfo` of the last update.
  """

  linear_iterate: optax.Params
  last_iterates: SogdVariables
  last_directions: SogdVariables
  correction_count: jax.Array
  info: CorrectedResponseInfo


def add_corrected_response(
  inner_loss: Loss,
  outer_loss: Loss,
  *,
  linear_learning_rate: optax.ScalarOrSchedule,
  correction: optax.ScalarOrSchedule,
  radius: float | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Adds the response from one step of the linear system, with momentum corrections (SOGD).

  .. math::
    D^y = \nabla_y g_t, \qquad D^v = \nabla^2_{yy} g_t\, v - \nabla_y f_t, \qquad
    D^x = \nabla_x f_t - \nabla^2_{xy} g_t\, v

  .. math::
    d^u_t = D^u_t(z_t) + (1 - c_t) \big(d^u_{t-1} - D^u_t(z_{t-1})\big), \quad u \in \{x, y, v\},
    \qquad v_{t+1} = P_{\|v\| \le p}(v_t - \delta_t d^v_t)

  with :math:`z = (x, y, v)`. Both terms of a correction use the batch of this round, so the noise
  of a direction shrinks without a window and without old batches. :math:`c = 1` switches the
  correction off. The paper writes :math:`-v` for our :math:`v`.

  Cost: two gradients of the outer loss, including the caller's, and two gradients of the inner
  loss. Each inner gradient comes with one product with its Jacobian, which gives
  :math:`\nabla^2_{xy} g\, v` and :math:`\nabla^2_{yy} g\, v` at once. Memory: two copies of ``x``
  and ``y`` and three of ``v``.

  Args:
    inner_loss: the inner loss :math:`g`, ``inner_loss(x, y, batch) -> scalar``.
    outer_loss: the outer loss :math:`f`, ``outer_loss(x, y, batch) -> scalar``.
    linear_learning_rate: :math:`\delta_t > 0`, a float or a schedule.
    correction: :math:`c_t` in [0, 1], a float or a schedule. One value serves all three variables
      (the paper has three: see Departures from the papers).
    radius: :math:`p > 0`, a bound on :math:`\|v\|`, such as the gradient bound of ``f`` divided by
      the strong convexity of ``g``; ``None`` for no bound.

  Returns:
    A transformation from :class:`jaxbo.Bilevel` gradients of :math:`f` at :math:`(x, y)` to the
    directions :math:`(d^x, d^y)`, the first in the chain. Its ``update`` requires ``params``,
    ``batch=`` and ``outer_batch=``; :func:`jaxbo.online_loop` without an inner solver passes all
    three. With ``restart=True`` the round has nothing to correct, as the first one; a Python bool
    also saves the gradients at the last iterates.

  Raises:
    ValueError: if a number is outside its range.
    TypeError: if a loss does not take ``(x, y, batch)``; if parameters or gradients are not
      :class:`jaxbo.Bilevel`; if a batch is missing.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> tx = jaxbo.add_corrected_response(
    ...   lambda x, y, batch: 0.5 * (y - x) ** 2, lambda x, y, batch: 0.5 * (y - batch) ** 2,
    ...   linear_learning_rate=0.5, correction=0.1)
    >>> params = jaxbo.Bilevel(outer=jnp.float32(1.0), inner=jnp.float32(0.0))
    >>> grads = jaxbo.Bilevel(outer=jnp.float32(0.0), inner=jnp.float32(-3.0))
    >>> direction, state = tx.update(grads, tx.init(params), params, batch=None, outer_batch=3.0)
    >>> float(direction.inner), float(state.linear_iterate)        # y - x, and 0.5 df/dy
    (-1.0, -1.5)

  References:
    SOGD, `2511.01126 <https://arxiv.org/abs/2511.01126>`_, 2025; Cutkosky and Orabona,
    `Momentum-Based Variance Reduction in Non-Convex SGD <https://arxiv.org/abs/1905.10018>`_, 2019.
  """
  inner_loss = checked_loss("inner_loss", inner_loss)
  outer_loss = checked_loss("outer_loss", outer_loss)
  _schedule.check("linear_learning_rate", linear_learning_rate, _check.positive)
  _schedule.check("correction", correction, lambda name, value: _check.within(name, value, 0, 1))
  if radius is not None:
    _check.positive("radius", radius)

  def init(params):
    check_params("add_corrected_response", params)
    zeros = lambda: _tree.zeros_at_least_float32(params.inner)
    triple = lambda: _variables(_tree.zeros_at_least_float32(params), zeros())
    info = CorrectedResponseInfo(jnp.zeros((), scalar_dtype(params)), jnp.bool_(True))
    return CorrectedResponseState(zeros(), triple(), triple(), jnp.int32(0), info)

  def update(
    updates,
    state,
    params=None,
    *,
    batch: Any = MISSING,
    outer_batch: Any = MISSING,
    restart: bool | jax.Array = False,
    **extra_args,
  ):
    del extra_args
    grads = check_update("add_corrected_response", updates, params, batch)
    if outer_batch is MISSING:
      raise TypeError(
        "add_corrected_response: update must be given outer_batch=, the batch of outer_loss"
      )
    here = _variables(_tree.at_least_float32(params), state.linear_iterate)
    outer_grad = jax.grad(lambda p: outer_loss(p.outer, p.inner, outer_batch))

    def directions(z, grads):
      terms = inner_terms(inner_loss, z.outer, z.inner, z.linear, batch)
      grads = _tree.cast_like(grads, Bilevel(z.outer, z.inner))
      return SogdVariables(
        optax.tree.sub(grads.outer, terms.cross),
        terms.gradient,
        optax.tree.sub(terms.hessian, grads.inner),
      )

    dtype, count = state.info.direction_norm.dtype, state.correction_count
    last = state.last_iterates
    now = corrected = directions(here, grads)
    if restart is not True:
      keep = 1 - _schedule.value_at(correction, count, dtype)
      keep = jnp.where((count > 0) & ~jnp.asarray(restart, bool), keep, 0)
      then = directions(last, outer_grad(Bilevel(last.outer, last.inner)))
      # The first round has nothing to correct; the losses at zero must not matter, even if NaN.
      offset = optax.tree.sub(state.last_directions, then)
      corrected = _tree.where(keep > 0, _tree.add_scaled(now, keep, offset), now)
    step = _schedule.value_at(linear_learning_rate, count, dtype)
    linear = _tree.add_scaled(here.linear, -step, corrected.linear)
    if radius is not None:
      scale = radius / jnp.maximum(_tree.norm(linear), radius)
      linear = _tree.scaled(scale, linear)

    finite = _tree.all_finite((corrected, linear))
    norm = _tree.norm((corrected.outer, corrected.inner)).astype(dtype)
    new = CorrectedResponseState(
      linear,
      here,
      corrected,
      _schedule.after(count),
      CorrectedResponseInfo(norm, finite),
    )
    old = state._replace(info=state.info._replace(finite=finite))
    direction = Bilevel(corrected.outer, corrected.inner)
    direction = _tree.where(finite, direction, optax.tree.zeros_like(direction))
    return _tree.cast_like(direction, params), _tree.where(finite, new, old)

  return optax.GradientTransformationExtraArgs(init, update)


def _variables(params: PyTree, linear: optax.Params) -> SogdVariables:
  return SogdVariables(params.outer, params.inner, linear)


def sogd(
  outer_learning_rate: LearningRate,
  inner_learning_rate: LearningRate,
  inner_loss: Loss,
  outer_loss: Loss,
  *,
  linear_learning_rate: optax.ScalarOrSchedule,
  correction: optax.ScalarOrSchedule,
  radius: float | None = None,
  project_outer: Projection | None = None,
  project_inner: Projection | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""SOGD: descent of both levels along :func:`add_corrected_response`.

  SOGD is a single loop without a window, and does the least work in a round of all the online
  methods here. It moves both levels itself, so use ``jaxbo.online_loop(outer_loss, None,
  sogd(...))``. In the theory the learning rates fall like :math:`t^{-1/3}`, and the correction like
  their square.

  Args:
    outer_learning_rate: a float or a schedule for :math:`x`, or an optimizer.
    inner_learning_rate: a float or a schedule for :math:`y`, or an optimizer.
    inner_loss: the inner loss :math:`g`, ``inner_loss(x, y, batch) -> scalar``.
    outer_loss: the outer loss :math:`f`, ``outer_loss(x, y, batch) -> scalar``.
    linear_learning_rate: the step :math:`\delta_t > 0` for :math:`v`, a float or a schedule.
    correction: :math:`c_t` in [0, 1], a float or a schedule; 1 switches the correction off.
    radius: :math:`p > 0`, a bound on :math:`\|v\|`, or ``None``.
    project_outer: the projection on :math:`X`, or ``None``.
    project_inner: the projection on :math:`Y`, or ``None``.

  Returns:
    ``optax.chain(add_corrected_response(...), optax.partition(...), project(project_outer,
    project_inner))``, on :class:`jaxbo.Bilevel` parameters.

  Example:
    >>> import jax, jax.numpy as jnp, jaxbo
    >>> inner_loss = lambda x, y, batch: 0.5 * (y - x) ** 2
    >>> outer_loss = lambda x, y, batch: 0.5 * (y - batch) ** 2      # follow what drifts
    >>> outer = jaxbo.sogd(0.1, 0.5, inner_loss, outer_loss, linear_learning_rate=0.5,
    ...                    correction=0.5)
    >>> loop = jaxbo.online_loop(outer_loss, None, outer)
    >>> stream = lambda key, t: (None, 1.0 + 0.001 * t)
    >>> state = loop.init(jnp.float32(0.0), jnp.float32(0.0), stream)
    >>> state, history = jax.jit(lambda state: loop.run(state, stream, 500))(state)
    >>> print(state.x.round(2))                                      # 1 + 0.5, and a delay
    1.49

  References:
    SOGD, `2511.01126 <https://arxiv.org/abs/2511.01126>`_, 2025; Cutkosky and Orabona,
    `Momentum-Based Variance Reduction in Non-Convex SGD <https://arxiv.org/abs/1905.10018>`_, 2019.
  """
  head = add_corrected_response(
    inner_loss,
    outer_loss,
    linear_learning_rate=linear_learning_rate,
    correction=correction,
    radius=radius,
  )
  rates = Bilevel(outer_learning_rate, inner_learning_rate)
  return optax.chain(head, *descend(rates, project_outer, project_inner))
