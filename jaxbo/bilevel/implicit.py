"""AID: the response from the implicit function theorem."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check, _tree
from jaxbo._types import Data, SolveLinear
from jaxbo.bilevel import linear_solvers
from jaxbo.bilevel.condition import Residual, condition_for
from jaxbo.bilevel.inner import check_per_step
from jaxbo.bilevel.linear_system import LinearInfo, LinearSolver, differentiable, measure, relative
from jaxbo.bilevel.response import (
  MISSING,
  check_depends_on_x,
  check_solution,
  check_solver,
  response_transformation,
  zero_norm,
)
from jaxbo.bilevel.solution import InnerSolver


class ImplicitInfo(NamedTuple):
  """Diagnostics of :func:`~jaxbo.add_implicit_response`.

  Attributes:
    hypergradient_norm: norm of the hypergradient, float32 at least.
    response_norm: norm of the response alone.
    finite: whether the response was finite; if not, it was replaced by zero.
    linear_residual: residual of the linear system, relative to its right-hand side.
    linear_steps: number of steps of the linear solver, int32; -1 if the solver does not report it.
    linear_breakdown: whether the linear solver broke down: zero or negative curvature, a residual
      that grew, or numbers that are not finite.
    stationarity: the norm of the condition (for ``"gradient"``, the inner gradient) at the
      solution, relative to the norm of its derivative times ``y``. This is about the relative
      distance of ``y`` to a point where the condition holds, mostly along steep directions. A large
      value means that the solution does not meet what the response assumes. 1 if it is not finite,
      and for a solver of one step, which does not run to the minimum; otherwise it costs one
      product.
  """

  hypergradient_norm: jax.Array
  response_norm: jax.Array
  finite: jax.Array
  linear_residual: jax.Array
  linear_steps: jax.Array
  linear_breakdown: jax.Array
  stationarity: jax.Array


class ImplicitResponseState(NamedTuple):
  """State of :func:`~jaxbo.add_implicit_response`.

  Attributes:
    linear_solution: the last finite solution of the linear system, shaped like the inner
      parameters, in float32 at least; ``()`` unless the linear solver has ``warm_start``.
    info: the :class:`ImplicitInfo` of the last update.
  """

  linear_solution: optax.Params
  info: ImplicitInfo


def add_implicit_response(
  inner: InnerSolver,
  linear_solver: SolveLinear,
  *,
  condition: str | Residual | None = None,
  inner_params: optax.Params | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Adds the response of the inner minimum, by the implicit function theorem (AID).

  .. math::
    h = \nabla_x f - \nabla^2_{xy} g\, \lambda, \qquad \nabla^2_{yy} g\, \lambda = \nabla_y f

  at :math:`(x, y^N)`. :math:`h` is the exact hypergradient if :math:`y^N` is the minimum and the
  system is solved exactly. Otherwise the error grows with the distance to the minimum, so
  warm-start the inner solver. The inner loss must be twice differentiable, and locally strongly
  convex in ``y`` unless the linear solver is damped.

  These formulas hold for an inner optimizer that only descends. In general the solution meets a
  condition :math:`F(x, y) = 0`, and

  .. math::
    h = \nabla_x f - (\partial_x F)^\top \lambda, \qquad (\partial_y F)^\top \lambda = \nabla_y f .

  ``condition="gradient"`` is :math:`F = \nabla_y g`. ``condition="fixed_point"`` is :math:`F = y -
  T(x, y)` with :math:`T` one step of the solver's own optimizer, so the response differentiates
  projections, proximal steps and weight decay in the optimizer too. :math:`T` is taken in the
  middle of the optimizer's schedules, with its momentum at rest. Under both conditions, leaves of
  ``y`` that the optimizer never moves are constants.

  Products with the Hessian are forward-over-reverse; all iterations share one linearization of
  :math:`\nabla_y g`. Cost: one linearization, the products of the linear solver (about two
  gradients each), and one mixed product. Memory: two gradients of ``g``, independent of the number
  of inner steps.

  Args:
    inner: the inner solver that made the solution.
    linear_solver: :func:`jaxbo.conjugate_gradient`, :func:`jaxbo.neumann`,
      :func:`jaxbo.fixed_point`, or any callable ``(matvec, b, x0) -> (x, info)``, such as
      ``jax.scipy.sparse.linalg.cg``. A solver that does not return a
      :class:`~jaxbo.bilevel.LinearInfo` costs one more product, for the residual.
    condition: ``"gradient"``, ``"fixed_point"``, or a function ``F(x, y, batch)``, shaped like
      ``y``, with your own optimality conditions (KKT, a root). ``None`` chooses for each leaf. It
      takes ``"fixed_point"`` in two cases: if :func:`jaxbo.bilevel.project_params` or
      ``optax.keep_params_nonnegative`` ends the step, after any optimizer; or if the optimizer is
      SGD that also moves the leaf without a gradient (weight decay, a proximal step, a projection
      of your own). Otherwise it takes ``"gradient"``. It does not recognize Adam and L-BFGS with
      weight decay or a proximal step: look at ``info.stationarity``. The fixed point is divided by
      the optimizer's step length, so dampings and rates of linear solvers are those for the
      Hessian.
    inner_params: the inner parameters, as arrays or ``jax.ShapeDtypeStruct``. Required by a linear
      solver with ``warm_start``, because the state keeps its solution; unused otherwise.

  Returns:
    A transformation from the pair ``(df/dx, df/dy)`` to the hypergradient. Put it first in the
    chain: :func:`jaxbo.bilevel_loop` refuses a transformation before it, but ``update`` alone
    cannot see one. ``update`` must be given ``solution=`` and ``batch=``, the batch that
    ``inner.solve`` saw. With per-step batches the system uses the batch of the last step. Pass
    ``linear_batch=``, one batch without a step axis, to use that batch instead: an independent
    batch removes a bias of stochastic methods.

  Raises:
    ValueError: if the linear solver warm-starts and ``inner_params`` is missing; if ``condition``
      is none of the above; if ``inner`` is a :func:`jaxbo.black_box` and ``condition``
      is not a function; if the condition does not depend on ``x``.
    TypeError: if ``linear_solver`` does not take ``(matvec, b, x0)``; if the dtypes of
      ``inner_params`` are not those of the solution (float32 at least).

  Example:
    >>> import jax, jax.numpy as jnp, jaxbo, optax
    >>> inner = jaxbo.inner_solver(lambda x, y, batch: (y - x**2) ** 2, optax.sgd(0.25), 30)
    >>> tx = jaxbo.add_implicit_response(inner, jaxbo.conjugate_gradient(5))
    >>> x = jnp.float32(3.0)
    >>> y = inner.solve(x, inner.init(jnp.float32(0.0)), None)      # y = x ** 2
    >>> grads = jaxbo.outer_grad(lambda x, y: y)(x, y.params)       # f = y
    >>> hypergradient, state = tx.update(grads, tx.init(x), x, solution=y, batch=None)
    >>> bool(jnp.allclose(hypergradient, 6.0))                      # dF/dx = 2 x
    True
    >>> int(state.info.linear_steps)
    1

  References:
    Pedregosa, `Hyperparameter optimization with approximate gradient
    <https://arxiv.org/abs/1602.02355>`_, 2016; Grazzi et al., `On the Iteration Complexity of
    Hypergradient Computation <https://arxiv.org/abs/2006.16218>`_, 2020.
  """
  name = "add_implicit_response without a condition of your own"
  check_solver(inner, "" if callable(condition) else name)
  if callable(condition):
    _check.takes_arguments("condition", condition, "x", "y", "batch")
  elif condition is not None:
    _check.one_of("condition", condition, ("gradient", "fixed_point"))
  _check.takes_arguments("linear_solver", linear_solver, "matvec", "b", "x0")
  for make in (linear_solvers.conjugate_gradient, linear_solvers.fixed_point):
    if linear_solver is make:
      name = make.__name__
      raise TypeError(f"linear_solver must be a solver, such as {name}(10), got {name} itself")
  warm_start = getattr(linear_solver, "warm_start", False)
  if warm_start and inner_params is None:
    raise ValueError(
      "inner_params must be given when linear_solver has warm_start=True: its solution is kept in "
      "the state, which is shaped like the inner parameters"
    )

  def init(params):
    linear_solution = ()
    if warm_start:
      _check.floating("inner_params", inner_params)
      linear_solution = _tree.zeros_at_least_float32(inner_params)
    info = ImplicitInfo(  # A buffer for each zero, since all may be donated.
      hypergradient_norm=zero_norm(params),
      response_norm=zero_norm(params),
      finite=jnp.bool_(True),
      linear_residual=zero_norm(params),
      linear_steps=jnp.int32(0),
      linear_breakdown=jnp.bool_(False),
      stationarity=zero_norm(params),
    )
    return ImplicitResponseState(linear_solution, info)

  def respond(
    params, solution, inner_grad, batch, state, *, linear_batch: Data = MISSING, **extra_args
  ):
    del extra_args
    if linear_batch is MISSING:
      linear_batch = batch
      if inner.per_step_batches:
        check_per_step(batch, inner.num_steps)
        linear_batch = jax.tree.map(lambda leaf: leaf[-1], batch)
    if warm_start:
      _check.same_structure("inner_params", inner_params, "solution.params", solution.params)
    x, y, b = _tree.at_least_float32((params, solution.params, inner_grad))
    b = _tree.cast_like(b, y)
    if warm_start:
      kept, needed = (
        [str(v.dtype) for v in jax.tree.leaves(t)] for t in (state.linear_solution, b)
      )
      if kept != needed:
        raise TypeError(
          "inner_params must have the dtypes of solution.params (float32 at least), got "
          f"{', '.join(kept)} against {', '.join(needed)}"
        )

    check_solution("add_implicit_response", inner, solution)
    at = condition_for(inner, condition, x, solution._replace(params=y), linear_batch)
    check_depends_on_x(lambda x: at.residual(x, y), x)
    b, solve = at.of_moving(b), linear_solver
    if at.symmetric:
      reached, matvec = jax.linearize(lambda y: at.residual(x, y), y)
    else:
      reached, pull = jax.vjp(lambda y: at.residual(x, y), y)
      matvec = lambda v: pull(v)[0]
      solve = getattr(linear_solver, "general", None) or linear_solver
    x0 = state.linear_solution if warm_start else optax.tree.zeros_like(b)
    if isinstance(solve, LinearSolver):
      result = differentiable(solve, matvec, b, x0, at.symmetric)
    else:
      result = solve(matvec, b, x0)
    if not isinstance(result, tuple) or len(result) != 2:
      raise TypeError(f"linear_solver must return (x, info), got {result!r}")
    linear_solution, linear_info = result
    finite = _tree.all_finite((linear_solution, b))
    used = _tree.where(finite, linear_solution, jax.tree.map(lambda v: v * jnp.nan, x0))
    linear_solution = _tree.where(finite, linear_solution, x0)
    if not isinstance(linear_info, LinearInfo):
      linear_info = measure(matvec, b, linear_solution, finite)

    _, pull_back = jax.vjp(lambda x: at.residual(x, y), x)
    # F is about A (y - y*), so this is about the distance to the solution, relative to it.
    stationarity = jnp.float32(1)
    if inner.num_steps > 1:
      moved = matvec(y) if at.symmetric else jax.jvp(lambda y: at.residual(x, y), (y,), (y,))[1]
      scale = _tree.norm(at.of_moving(moved))
      stationarity = relative(_tree.norm(at.of_moving(reached)), scale)

    def new_state(hypergradient_norm, response_norm, finite):
      info = ImplicitInfo(
        hypergradient_norm=hypergradient_norm,
        response_norm=response_norm,
        finite=finite,
        linear_residual=linear_info.residual.astype(hypergradient_norm.dtype),
        linear_steps=linear_info.num_steps,
        linear_breakdown=linear_info.breakdown,
        stationarity=stationarity.astype(hypergradient_norm.dtype),
      )
      return ImplicitResponseState(linear_solution if warm_start else (), info)

    return optax.tree.scale(-1, pull_back(used)[0]), new_state

  return response_transformation("add_implicit_response", init, respond)
