r"""Linear solvers for :func:`jaxbo.add_implicit_response`: CG, Neumann series, fixed point.

A linear solver is any callable ``(matvec, b, x0) -> (x, info)`` on pytrees that solves
:math:`A x = b`. So ``jax.scipy.sparse.linalg.cg`` needs no wrapper. The solvers here stop before a
step that would ruin the solution (zero or negative curvature, a residual that grows or is not
finite), return a good iterate, and report the breakdown.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check, _tree
from jaxbo._types import PyTree
from jaxbo.bilevel.gmres import gmres
from jaxbo.bilevel.linear_system import LinearInfo, LinearSolver, relative


class _Iterate(NamedTuple):
  x: optax.Params
  residual: optax.Params
  direction: optax.Params  # Conjugate gradient only; () elsewhere.
  best: (
    PyTree  # Conjugate gradient only: the x of the smallest residual, and this residual squared.
  )
  residual_sq: jax.Array
  max_curvature: jax.Array
  num_steps: jax.Array
  breakdown: jax.Array


def conjugate_gradient(
  num_steps: int,
  tolerance: float | jax.Array = 0.0,
  damping: float | jax.Array = 0.0,
  *,
  warm_start: bool = False,
) -> LinearSolver:
  r"""Conjugate gradient for :math:`(A + \text{damping}\, I)\, x = b`.

  The solution is exact after as many steps as :math:`A` has distinct eigenvalues. The solver stops
  when the residual is at most ``tolerance`` (or the resolution of the dtype) times :math:`\|b\|`.
  It breaks down when the curvature :math:`p^\top A p / p^\top p` along a search direction is not
  positive, up to rounding relative to the largest curvature so far, and when the residual ends
  above ten times the residual of the start. The result is then the iterate with the smallest
  residual, and ``breakdown`` is true.

  An undamped system has no solution if :math:`A` is singular and :math:`b` is outside its range.
  The result is then finite but *not* a least-squares solution: use ``damping`` (start with 1e-3)
  or :func:`fixed_point`.

  :math:`A` must be symmetric. If the system is not symmetric, :func:`jaxbo.add_implicit_response`
  uses :func:`jaxbo.gmres` with the same arguments instead.

  Cost: ``num_steps`` products with :math:`A`, one more with a warm start. Memory: five vectors.

  Args:
    num_steps: the largest number of steps, at least 1.
    tolerance: relative residual at which to stop, at least 0. ``tolerance`` and ``damping`` may be
      arrays, such as the values of schedules from ``optax.inject_hyperparams`` around the response.
    damping: added to the diagonal, at least 0. It biases the solution by
      :math:`O(\text{damping} / \lambda_{\min})`.
    warm_start: whether to start from the solution of the previous update. If so,
      :func:`jaxbo.add_implicit_response` needs ``inner_params``.

  Returns:
    A :class:`~jaxbo.bilevel.LinearSolver`.

  Raises:
    ValueError: if an argument is outside its range.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> matrix = jnp.array([[3.0, 1.0], [1.0, 2.0]])
    >>> x, info = jaxbo.conjugate_gradient(2)(lambda v: matrix @ v, jnp.ones(2), jnp.zeros(2))
    >>> bool(jnp.allclose(x, jnp.array([0.2, 0.4]))), bool(info.breakdown)
    (True, False)

  References:
    Hestenes and Stiefel, `Methods of Conjugate Gradients for Solving Linear Systems
    <https://doi.org/10.6028/jres.049.044>`_, 1952.
  """
  num_steps = _check.positive_int("num_steps", num_steps)
  _check.non_negative("tolerance", tolerance)
  _check.non_negative("damping", damping)

  def solve(matvec, b, x0):
    product = lambda v: _tree.add_scaled(matvec(v), damping, v)

    def step(state):
      image = product(state.direction)
      curvature = _tree.vdot(state.direction, image)
      direction_sq = _tree.vdot(state.direction, state.direction)
      max_curvature = jnp.maximum(state.max_curvature, curvature / direction_sq)
      rounding = 10 * jnp.finfo(curvature.dtype).eps
      positive = curvature > rounding * max_curvature * direction_sq
      alpha = state.residual_sq / jnp.where(positive, curvature, 1)
      residual = _tree.add_scaled(state.residual, -alpha, image)
      residual_sq = _tree.vdot(residual, residual)
      direction = _tree.add_scaled(residual, residual_sq / state.residual_sq, state.direction)
      x = _tree.add_scaled(state.x, alpha, state.direction)
      good = positive & jnp.isfinite(residual_sq) & jnp.isfinite(alpha)
      best = _tree.where(good & (residual_sq < state.best[1]), (x, residual_sq), state.best)
      return good, state._replace(
        x=x,
        best=best,
        residual=residual,
        direction=direction,
        residual_sq=residual_sq,
        max_curvature=max_curvature,
      )

    first = _first_iterate(product, b, x0, warm_start)
    first = first._replace(direction=first.residual, best=(first.x, first.residual_sq))
    last, info = _iterate(step, first, b, num_steps, tolerance)
    # If no solution exists, x diverges along flat directions long before a curvature is zero.
    failed = last.breakdown | ~(last.residual_sq <= 10**2 * first.residual_sq)
    x, residual_sq = _tree.where(failed, last.best, (last.x, last.residual_sq))
    return x, LinearInfo(relative(jnp.sqrt(residual_sq), _tree.norm(b)), info.num_steps, failed)

  general = gmres(num_steps, tolerance, damping, warm_start=warm_start)
  return LinearSolver(solve, warm_start, general)


def fixed_point(
  num_steps: int, learning_rate: float | jax.Array, *, warm_start: bool = False
) -> LinearSolver:
  r"""Fixed-point (Richardson) iteration :math:`x \leftarrow x + \eta\,(b - A x)`.

  The iteration converges if the eigenvalues of :math:`A` are in :math:`(0, 2/\eta)`. If :math:`A`
  is singular, the part of the solution in its range still converges, which is enough for a bilevel
  problem with flat inner directions. A residual that grows proves an eigenvalue outside
  :math:`[0, 2/\eta]`: the iteration stops and reports ``breakdown``.

  Cost: ``num_steps`` products with :math:`A`, one more with a warm start. Memory: three vectors.

  Args:
    num_steps: the number of steps, at least 1.
    learning_rate: the step :math:`\eta > 0`, below :math:`2 / \lambda_{\max}(A)`.
    warm_start: whether to start from the solution of the previous update. If so,
      :func:`jaxbo.add_implicit_response` needs ``inner_params``.

  Returns:
    A :class:`~jaxbo.bilevel.LinearSolver`.

  Raises:
    ValueError: if an argument is outside its range.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> solver = jaxbo.fixed_point(50, learning_rate=0.5)
    >>> x, info = solver(lambda v: 2.0 * v, jnp.ones(2), jnp.zeros(2))
    >>> print(x)
    [0.5 0.5]

  References:
    Grazzi et al., `On the Iteration Complexity of Hypergradient Computation
    <https://arxiv.org/abs/2006.16218>`_, 2020.
  """
  num_steps = _check.positive_int("num_steps", num_steps)
  _check.positive("learning_rate", learning_rate)

  def solve(matvec, b, x0):
    first = _first_iterate(matvec, b, x0, warm_start)
    last, info = _iterate(_richardson(matvec, learning_rate), first, b, num_steps, 0.0)
    return last.x, info

  return LinearSolver(solve, warm_start)


def neumann(num_steps: int, learning_rate: float | jax.Array) -> LinearSolver:
  r"""The truncated Neumann series of stocBiO.

  .. math:: x = \eta \sum_{q=0}^{Q} (I - \eta A)^q\, b

  :math:`x` equals :func:`fixed_point` from zero with :math:`Q + 1` steps, the first without a
  product. The relative bias along an eigenvalue :math:`\lambda` is
  :math:`(1 - \eta \lambda)^{Q + 1}`. This is the series of the paper, not of its code: see
  Departures from the papers.

  Cost: ``num_steps`` products with :math:`A`. Memory: three vectors.

  Args:
    num_steps: the number of products :math:`Q`, at least 1.
    learning_rate: the step :math:`\eta > 0`, below :math:`2 / \lambda_{\max}(A)`.

  Returns:
    A :class:`~jaxbo.bilevel.LinearSolver`. Its ``residual`` belongs to the sum without the last
    term, because the residual of the full sum would cost one more product.

  Raises:
    ValueError: if an argument is outside its range.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> x, info = jaxbo.neumann(2, learning_rate=0.5)(lambda v: v, jnp.ones(2), jnp.zeros(2))
    >>> print(x)                                              # 1 - (1 - 0.5) ** 3
    [0.875 0.875]

  References:
    Ji, Yang and Liang, `Bilevel Optimization: Convergence Analysis and Enhanced Design
    <https://arxiv.org/abs/2010.07962>`_, 2021.
  """
  num_steps = _check.positive_int("num_steps", num_steps)
  _check.positive("learning_rate", learning_rate)

  def solve(matvec, b, x0):
    first = _first_iterate(matvec, b, x0, warm_start=False)
    last, info = _iterate(_richardson(matvec, learning_rate), first, b, num_steps, 0.0)
    x = _tree.add_scaled(last.x, learning_rate, last.residual)
    return _tree.where(info.breakdown, last.x, x), info

  return LinearSolver(solve)


def _richardson(matvec, learning_rate):
  def step(state):
    x = _tree.add_scaled(state.x, learning_rate, state.residual)
    residual = _tree.add_scaled(state.residual, -learning_rate, matvec(state.residual))
    residual_sq = _tree.vdot(residual, residual)
    rounding = 100 * jnp.finfo(residual_sq.dtype).eps
    shrinks = residual_sq <= (1 + rounding) * state.residual_sq  # False for a NaN.
    x = _tree.where(shrinks, x, state.x)
    return shrinks, state._replace(x=x, residual=residual, residual_sq=residual_sq)

  return step


def _first_iterate(matvec, b, x0, warm_start: bool) -> _Iterate:
  if warm_start:
    x, residual = x0, _tree.add_scaled(b, -1.0, matvec(x0))
  else:
    x, residual = optax.tree.zeros_like(b), b
  residual_sq = _tree.vdot(residual, residual)
  return _Iterate(
    x=x,
    residual=residual,
    direction=(),
    best=(),
    residual_sq=residual_sq,
    max_curvature=jnp.zeros_like(residual_sq),
    num_steps=jnp.zeros_like(residual_sq, jnp.int32),  # varies over devices like the rest
    breakdown=~jnp.isfinite(residual_sq),
  )


def _iterate(step, first: _Iterate, b, num_steps: int, tolerance) -> tuple[_Iterate, LinearInfo]:
  """Repeats ``step`` until the system is solved, the steps are used up, or a step is bad.

  A bad step must keep the fields that hold the solution; its other fields are not used.
  """
  b_sq = _tree.vdot(b, b)
  limits = jnp.finfo(b_sq.dtype)
  converged_sq = jnp.maximum(jnp.maximum(tolerance, limits.eps) ** 2 * b_sq, limits.tiny)

  def goes_on(state):
    left = (state.num_steps < num_steps) & ~state.breakdown
    return left & (state.residual_sq > converged_sq)

  def body(state):
    good, after = step(state)
    residual_sq = jnp.where(good, after.residual_sq, state.residual_sq)
    return after._replace(
      residual_sq=residual_sq, num_steps=state.num_steps + good, breakdown=~good
    )

  last = jax.lax.while_loop(goes_on, body, first)
  return last, LinearInfo(
    relative(jnp.sqrt(last.residual_sq), jnp.sqrt(b_sq)), last.num_steps, last.breakdown
  )
