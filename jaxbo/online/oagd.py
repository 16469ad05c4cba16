"""OAGD: old losses at the current iterate, from a window of data."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check, _tree
from jaxbo._optimizer import LearningRate
from jaxbo._types import Loss, SolveLinear
from jaxbo.bilevel import linear_solvers
from jaxbo.bilevel.implicit import add_implicit_response
from jaxbo.bilevel.loop import checked_loss
from jaxbo.bilevel.outer_grad import outer_grad
from jaxbo.bilevel.projection import Projection
from jaxbo.bilevel.response import MISSING, response_info
from jaxbo.bilevel.solution import InnerSolution, InnerSolver
from jaxbo.online.sobow import online_tail
from jaxbo.online.window import Window, check_window


class BatchAverageInfo(NamedTuple):
  """Diagnostics of :func:`~jaxbo.average_over_batches`.

  Attributes:
    average_norm: norm of the output, float32 at least.
    num_finite: how many batches in the window had a finite hypergradient, int32; the average leaves
      out the others.
  """

  average_norm: jax.Array
  num_finite: jax.Array


class BatchAverageState(NamedTuple):
  """State of :func:`~jaxbo.average_over_batches`.

  Attributes:
    response_state: the state of the head, after the newest batch.
    info: the :class:`BatchAverageInfo` of the last update.
  """

  response_state: optax.OptState
  info: BatchAverageInfo


def average_over_batches(
  head: optax.GradientTransformation,
  outer_loss: Loss,
  decay: jax.typing.ArrayLike = 1.0,
  *,
  normalization: str = "present",
) -> optax.GradientTransformationExtraArgs:
  r"""Averages the hypergradients of the last batches, all at the current iterate (OAGD).

  .. math::
    d_t = \frac1W \sum_{i=0}^{K-1} \eta^i h_{t-i}(x_t, y_{t+1}), \qquad
    h_s(x, y) = \nabla_x f_s - \nabla^2_{xy} g_s (\nabla^2_{yy} g_s)^{-1} \nabla_y f_s

  :func:`jaxbo.window_average` keeps old gradients. This transformation keeps old *batches* and
  evaluates their hypergradients again: old iterates cause no delay, at ``K`` times the work.
  :func:`jaxbo.online_loop` stores the batches and passes them to ``update``.

  Cost: one run of the head for each batch in the window, and one gradient of the outer loss for
  each batch except the newest, whose gradient the caller passes. Empty slots cost nothing. A linear
  solver with a warm start starts each batch from the solution for the batch before it, from the
  oldest to the newest, and then the next round from the newest.

  Args:
    head: a response, such as :func:`jaxbo.add_implicit_response`.
    outer_loss: the outer loss :math:`f`, ``outer_loss(x, y, batch) -> scalar``.
    decay: :math:`\eta` in (0, 1].
    normalization: ``"present"``: :math:`W` sums over the batches in the window, as in the published
      code. ``"full"``: :math:`W` sums over the whole window, full or not.

  Returns:
    A transformation that takes the place of ``head`` as the first in the chain. Its ``update``
    requires the arguments of the head and ``window=``, a :class:`jaxbo.online.Window` of
    :class:`jaxbo.online.OnlineBatch` whose newest entry is the current batch. A batch whose
    hypergradient or response is not finite is left out.

  Raises:
    ValueError: if ``decay`` is outside (0, 1], or ``normalization`` is neither value.
    TypeError: if ``head`` is not a transformation, ``outer_loss`` does not take ``(x, y, batch)``,
      or ``window=`` is missing.

  Example:
    >>> import jax, jax.numpy as jnp, jaxbo, optax
    >>> inner = jaxbo.inner_solver(lambda x, y, batch: (y - x) ** 2, optax.sgd(0.5), 1)
    >>> outer_loss = lambda x, y, batch: y * batch                  # h_s is the batch of round s
    >>> head = jaxbo.add_implicit_response(inner, jaxbo.conjugate_gradient(1))
    >>> outer = optax.chain(jaxbo.average_over_batches(head, outer_loss, decay=0.5), optax.sgd(1.0))
    >>> loop = jaxbo.online_loop(outer_loss, inner, outer, window=2)
    >>> stream = lambda key, t: (None, jnp.float32(3.0) * (t + 1))
    >>> state = loop.init(jnp.float32(0.0), jnp.float32(0.0), stream)
    >>> state, _ = loop.run(state, stream, 2)
    >>> print(-state.loop.x)                                        # 3, and (6 + 0.5 * 3) / 1.5
    8.0

  References:
    Tarzanagh, Nazari, Hou, Shen and Balzano, `Online Bilevel Optimization: Regret Analysis of
    Online Alternating Gradient Methods <https://arxiv.org/abs/2207.02829>`_, 2024.
  """
  _check.transformation("head", head)
  outer_loss = checked_loss("outer_loss", outer_loss)
  check_window(1, decay, normalization)
  response = optax.with_extra_args_support(head)

  def init(params):
    norm = jnp.zeros((), jnp.result_type(jnp.float32, *jax.tree.leaves(params)))
    return BatchAverageState(response.init(params), BatchAverageInfo(norm, jnp.int32(0)))

  def update(
    updates,
    state,
    params=None,
    *,
    solution: Any = MISSING,
    window: Any = MISSING,
    **extra_args,
  ):
    if not isinstance(window, Window):
      raise TypeError(
        "average_over_batches: update must be given window=, the Window of the last batches; "
        "jaxbo.online_loop gives it with window= set"
      )
    dtype = state.info.average_norm.dtype
    weights = decay ** jnp.arange(window.size, dtype=dtype)  # by age

    def add(carry, age, grads, batch):
      total, weight, count, head_state = carry
      extra = extra_args | {"batch": batch}
      gradient, head_state = response.update(grads, head_state, params, solution=solution, **extra)
      told = response_info(head_state)  # A response that is not finite was dropped.
      finite = _tree.all_finite(gradient) & getattr(told, "finite", True)
      added = _tree.add_scaled(total, weights[age], _tree.cast_like(gradient, total))
      total = _tree.where(finite, added, total)
      return total, weight + jnp.where(finite, weights[age], 0), count + finite, head_state

    def add_old(carry, age):
      batch, present = window.get(age)

      def add_present(carry):
        grads = outer_grad(outer_loss)(params, solution.params, batch.val)
        return add(carry, age, grads, batch.train)

      return jax.lax.cond(present, add_present, lambda carry: carry, carry), None

    zeros = _tree.zeros_at_least_float32(params)
    carry = (zeros, jnp.zeros((), dtype), jnp.int32(0), state.response_state)
    if window.size > 1:
      carry, _ = jax.lax.scan(add_old, carry, jnp.arange(window.size - 1, 0, -1))
    newest, _ = window.get(0)
    total, weight, count, head_state = add(carry, 0, updates, newest.train)
    if normalization == "full":
      weight = jnp.sum(weights)
    scale = 1 / jnp.where(weight > 0, weight, 1)
    average = jax.tree.map(lambda leaf: leaf * scale.astype(leaf.dtype), total)
    info = BatchAverageInfo(_tree.norm(average).astype(dtype), count)
    return _tree.cast_like(average, params), BatchAverageState(head_state, info)

  return optax.GradientTransformationExtraArgs(init, update)


def oagd(
  learning_rate: LearningRate,
  inner: InnerSolver,
  outer_loss: Loss,
  *,
  decay: jax.typing.ArrayLike = 1.0,
  linear_solver: SolveLinear | None = None,
  inner_params: optax.Params | None = None,
  normalization: str = "present",
  project: Projection | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""OAGD: descent along the hypergradient of the window-smoothed loss at the current iterate.

  OAGD needs the last batches, which ``jaxbo.online_loop(..., window=window)`` keeps. With
  ``replay=True`` the inner solver runs once on each batch in the window, from the oldest to the
  newest. The published code for loss tuning uses these settings (but its window does not reach back
  past the start of an epoch):

  .. code-block:: python

    inner = jaxbo.inner_solver(
      inner_loss, optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1, momentum=0.9)), 1
    )
    response = jaxbo.add_implicit_response(inner, jaxbo.neumann(5, 0.5))
    steps = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(1e-3, momentum=0.9))
    outer = optax.chain(
      jaxbo.average_over_batches(response, outer_loss, decay=0.9),
      optax.conditionally_mask(steps, lambda step, **_: step >= 80),  # x waits for 80 rounds
    )
    loop = jaxbo.online_loop(outer_loss, inner, outer, window=5, replay=True)

  Args:
    learning_rate: a float or a schedule; or an optimizer in its place.
    inner: the inner solver.
    outer_loss: the outer loss :math:`f`, ``outer_loss(x, y, batch) -> scalar``.
    decay: :math:`\eta` in (0, 1].
    linear_solver: solves the inner Hessian system: a solver such as :func:`jaxbo.neumann`, or any
      callable ``(matvec, b, x0) -> (x, info)``. The default is ``conjugate_gradient(5)``, which
      starts at zero (our choice: see Departures from the papers).
    inner_params: the inner parameters, as arrays or ``jax.ShapeDtypeStruct``; only a linear solver
      with a warm start needs them.
    normalization: ``"present"``: :math:`W` sums over the batches in the window. ``"full"``:
      :math:`W` sums over the whole window, full or not.
    project: the projection on :math:`X`, or ``None``.

  Returns:
    ``optax.chain(average_over_batches(add_implicit_response(...), ...),
    optax.scale_by_learning_rate(learning_rate))``, followed by :func:`jaxbo.bilevel.project_params`
    if ``project`` is given.

  Example:
    >>> import jax, jax.numpy as jnp, jaxbo, optax
    >>> inner = jaxbo.inner_solver(lambda x, y, batch: 0.5 * (y - x) ** 2, optax.sgd(0.5), 1)
    >>> outer_loss = lambda x, y, batch: 0.5 * (y - batch) ** 2      # follow what drifts
    >>> stream = lambda key, t: (None, 1.0 + 0.001 * t)
    >>> outer = jaxbo.oagd(0.1, inner, outer_loss, decay=0.9)
    >>> loop = jaxbo.online_loop(outer_loss, inner, outer, window=5)
    >>> state = loop.init(jnp.float32(0.0), jnp.float32(0.0), stream)
    >>> state, history = jax.jit(lambda state: loop.run(state, stream, 500))(state)
    >>> print(state.loop.x.round(2))                                 # 1 + 0.5, and a delay
    1.49

  References:
    Tarzanagh, Nazari, Hou, Shen and Balzano, `Online Bilevel Optimization: Regret Analysis of
    Online Alternating Gradient Methods <https://arxiv.org/abs/2207.02829>`_, 2024; code:
    https://github.com/BojianHou/OAGD.
  """
  if linear_solver is None:
    linear_solver = linear_solvers.conjugate_gradient(5)
  response = add_implicit_response(inner, linear_solver, inner_params=inner_params)
  return optax.chain(
    average_over_batches(response, outer_loss, decay, normalization=normalization),
    *online_tail(learning_rate, project),
  )


def replay(
  inner: InnerSolver, x: optax.Params, solution: InnerSolution, window: Window
) -> InnerSolution:
  """Solves once on each batch in the window, from the oldest to the newest."""

  def solve_old(solution, age):
    batch, present = window.get(age)
    solve = lambda solution: inner.solve(x, solution, batch.train)
    return jax.lax.cond(present, solve, lambda solution: solution, solution), None

  if window.size > 1:
    solution, _ = jax.lax.scan(solve_old, solution, jnp.arange(window.size - 1, 0, -1))
  return inner.solve(x, solution, window.get(0)[0].train)
