"""Whole methods along the implicit response: AID, stocBiO, SOBA and AmIGO."""

import jax
import optax

from jaxbo._optimizer import LearningRate, optimizer
from jaxbo._types import SolveLinear
from jaxbo.bilevel import linear_solvers
from jaxbo.bilevel.condition import Residual
from jaxbo.bilevel.implicit import add_implicit_response
from jaxbo.bilevel.linear_solvers import fixed_point
from jaxbo.bilevel.solution import InnerSolver


def aid(
  learning_rate: LearningRate,
  inner: InnerSolver,
  linear_solver: SolveLinear | None = None,
  *,
  condition: str | Residual | None = None,
  inner_params: optax.Params | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Approximate implicit differentiation: gradient descent along :func:`add_implicit_response`.

  Args:
    learning_rate: a float, a schedule, or an optax optimizer to use instead.
    inner: the inner solver.
    linear_solver: a linear solver, or any callable ``(matvec, b, x0) -> (x, info)``. The default is
      ten steps of :func:`jaxbo.conjugate_gradient` from zero (our choice: see Departures from the
      papers).
    condition: what the inner solution meets: ``"gradient"``, ``"fixed_point"``, a function ``F(x,
      y, batch)``, or ``None`` to choose by the optimizer.
    inner_params: the inner parameters, as arrays or ``jax.ShapeDtypeStruct``; required by a linear
      solver with ``warm_start``.

  Returns:
    ``optax.chain(add_implicit_response(...), optax.scale_by_learning_rate(learning_rate))``.

  Example:
    >>> import jax, jax.numpy as jnp, jaxbo, optax
    >>> inner = jaxbo.inner_solver(lambda x, y, batch: (y - x**2) ** 2, optax.sgd(0.25), 30)
    >>> outer_loss = lambda x, y, batch: (y - 4.0) ** 2              # minimal at x = 2
    >>> init, step = jaxbo.bilevel_loop(outer_loss, inner, jaxbo.aid(0.02, inner))
    >>> state = init(jnp.float32(1.0), jnp.float32(0.0))
    >>> for _ in range(20):
    ...   state, info = jax.jit(step)(state, None, None)
    >>> print(state.x.round(3))
    2.0
  """
  if linear_solver is None:
    linear_solver = linear_solvers.conjugate_gradient(num_steps=10)
  return optax.chain(
    add_implicit_response(inner, linear_solver, condition=condition, inner_params=inner_params),
    optimizer(learning_rate),
  )


def stocbio(
  learning_rate: LearningRate,
  inner: InnerSolver,
  num_steps: int,
  linear_learning_rate: float | jax.Array,
) -> optax.GradientTransformationExtraArgs:
  r"""stocBiO: gradient descent along the implicit response with a truncated Neumann series.

  Use it for a stochastic inner problem (``per_step_batches=True``). The published method uses an
  independent batch for the linear system: pass that batch to ``update`` as ``linear_batch=``.

  Args:
    learning_rate: a float, a schedule, or an optax optimizer to use instead.
    inner: the inner solver.
    num_steps: the number :math:`Q \ge 1` of Hessian products in the series.
    linear_learning_rate: the step :math:`\eta` of the series, below
      :math:`2 / \lambda_{\max}(\nabla^2_{yy} g)`.

  Returns:
    ``optax.chain(add_implicit_response(inner, neumann(...)), scale_by_learning_rate(...))``.

  Example:
    >>> import jax, jax.numpy as jnp, jaxbo, optax
    >>> inner = jaxbo.inner_solver(lambda x, y, batch: (y - x**2) ** 2, optax.sgd(0.25), 30)
    >>> outer_loss = lambda x, y, batch: (y - 4.0) ** 2              # minimal at x = 2
    >>> outer = jaxbo.stocbio(0.02, inner, num_steps=10, linear_learning_rate=0.25)
    >>> init, step = jaxbo.bilevel_loop(outer_loss, inner, outer)
    >>> state = init(jnp.float32(1.0), jnp.float32(0.0))
    >>> for _ in range(20):
    ...   state, info = jax.jit(step)(state, None, None)
    >>> print(state.x.round(3))
    2.0

  References:
    Ji, Yang and Liang, `Bilevel Optimization: Convergence Analysis and Enhanced Design
    <https://arxiv.org/abs/2010.07962>`_, 2021.
  """
  return aid(learning_rate, inner, linear_solvers.neumann(num_steps, linear_learning_rate))


def soba(
  learning_rate: LearningRate,
  inner: InnerSolver,
  linear_learning_rate: float | jax.Array,
  *,
  inner_params: optax.Params,
) -> optax.GradientTransformationExtraArgs:
  r"""SOBA: a single loop with one step each for the inner problem, the linear system and ``x``.

  .. math::
    y_{t+1} &= y_t - \rho\, \nabla_y g(x_t, y_t) \\
    v_{t+1} &= v_t - \eta\, (\nabla^2_{yy} g\, v_t - \nabla_y f)
      \qquad \text{at } (x_t, y_{t+1}) \\
    x_{t+1} &= x_t - \gamma\, (\nabla_x f - \nabla^2_{xy} g\, v_{t+1})
      \qquad \text{at } (x_t, y_{t+1})

  The solver takes the first step, so give it ``optax.sgd(rho)``, ``num_steps=1`` and a warm start
  (the default of one step). The three lines use what the lines before have found, in
  :func:`jaxbo.bilevel_loop`; in the paper all three are at :math:`(x_t, y_t, v_t)`, and its
  :math:`v` has the other sign: see Departures from the papers. For :math:`T` steps instead of one
  see :func:`jaxbo.amigo`.

  Cost of a step: one gradient of ``g``, one of ``f``, two products with the Hessian of ``g`` in
  ``y`` (one for the residual of the warm start) and one mixed product. Memory: ``v``.

  Args:
    learning_rate: :math:`\gamma`, a float or a schedule, or an optax optimizer to use instead.
    inner: the inner solver.
    linear_learning_rate: the step :math:`\eta > 0`, below
      :math:`2 / \lambda_{\max}(\nabla^2_{yy} g)`; the paper uses :math:`\rho`. A step that makes
      the residual of the system grow is not taken.
    inner_params: the inner parameters, as arrays or ``jax.ShapeDtypeStruct``.

  Returns:
    ``optax.chain(add_implicit_response(inner, fixed_point(1, linear_learning_rate,
    warm_start=True), inner_params=inner_params), scale_by_learning_rate(learning_rate))``.

  Example:
    >>> import jax, jax.numpy as jnp, jaxbo, optax
    >>> inner = jaxbo.inner_solver(lambda x, y, batch: (y - x**2) ** 2, optax.sgd(0.25), 1)
    >>> outer_loss = lambda x, y, batch: (y - 4.0) ** 2              # minimal at x = 2
    >>> outer = jaxbo.soba(0.01, inner, 0.25, inner_params=jnp.float32(0.0))
    >>> init, step = jaxbo.bilevel_loop(outer_loss, inner, outer)
    >>> state = init(jnp.float32(1.0), jnp.float32(0.0))
    >>> for _ in range(100):
    ...   state, info = jax.jit(step)(state, None, None)
    >>> print(state.x.round(3))
    2.0

  References:
    Dagréou, Ablin, Vaiter and Moreau, `A Framework for Bilevel Optimization that Enables Stochastic
    and Global Variance Reduction Algorithms <https://arxiv.org/abs/2201.13409>`_, 2022.
  """
  return amigo(learning_rate, inner, 1, linear_learning_rate, inner_params=inner_params)


def amigo(
  learning_rate: LearningRate,
  inner: InnerSolver,
  num_steps: int,
  linear_learning_rate: float | jax.Array,
  *,
  inner_params: optax.Params,
) -> optax.GradientTransformationExtraArgs:
  r"""AmIGO: warm inner steps, then warm gradient steps for the linear system, then one of ``x``.

  .. math::
    v \leftarrow v - \eta\, (\nabla^2_{yy} g\, v - \nabla_y f), \quad M \text{ times, at }
    (x_t, y_{t+1}), \qquad x_{t+1} = x_t - \gamma\, (\nabla_x f - \nabla^2_{xy} g\, v)

  The solver takes the inner steps: give it the default warm start. The order is that of the paper.
  For the paper's variant with conjugate gradient, use :func:`jaxbo.aid` with
  ``conjugate_gradient(M, warm_start=True)``.

  Cost of a step: the inner run, one gradient of ``f``, :math:`M + 1` products with the Hessian of
  ``g`` in ``y`` and one mixed product. Memory: ``v``.

  Args:
    learning_rate: :math:`\gamma`, a float or a schedule, or an optax optimizer to use instead.
    inner: the inner solver.
    num_steps: the number :math:`M \ge 1` of steps for the linear system. All use the same batch;
      in the paper each draws its own.
    linear_learning_rate: the step :math:`\eta > 0`, below
      :math:`2 / \lambda_{\max}(\nabla^2_{yy} g)`.
    inner_params: the inner parameters, as arrays or ``jax.ShapeDtypeStruct``.

  Returns:
    ``optax.chain(add_implicit_response(inner, fixed_point(num_steps, linear_learning_rate,
    warm_start=True), inner_params=inner_params), scale_by_learning_rate(learning_rate))``.

  Example:
    >>> import jax, jax.numpy as jnp, jaxbo, optax
    >>> inner = jaxbo.inner_solver(lambda x, y, batch: (y - x**2) ** 2, optax.sgd(0.25), 5)
    >>> outer_loss = lambda x, y, batch: (y - 4.0) ** 2              # minimal at x = 2
    >>> outer = jaxbo.amigo(0.02, inner, 5, 0.25, inner_params=jnp.float32(0.0))
    >>> init, step = jaxbo.bilevel_loop(outer_loss, inner, outer)
    >>> state = init(jnp.float32(1.0), jnp.float32(0.0))
    >>> for _ in range(30):
    ...   state, info = jax.jit(step)(state, None, None)
    >>> print(state.x.round(3))
    2.0

  References:
    Arbel and Mairal, `Amortized Implicit Differentiation for Stochastic Bilevel Optimization
    <https://arxiv.org/abs/2111.14580>`_, 2022.
  """
  linear_solver = fixed_point(num_steps, linear_learning_rate, warm_start=True)
  return aid(learning_rate, inner, linear_solver, inner_params=inner_params)
