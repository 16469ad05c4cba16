"""A linear system and its solver: types, and the report of a solver that makes none."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbo import _tree
from jaxbo._types import PyTree, SolveLinear

MatVec = Callable[[PyTree], PyTree]


class LinearInfo(NamedTuple):
  r"""How a linear solve ended.

  Attributes:
    residual: :math:`\|b - A x\| / \|b\|` of the system that was solved (damping included); 1 if
      this ratio is not finite.
    num_steps: how many products with :math:`A` improved the solution, int32; -1 if unknown.
    breakdown: whether the solver met zero or negative curvature, a residual that grew, or a number
      that is not finite. The solution is then the last good iterate (for conjugate gradient, the
      iterate with the smallest residual).
  """

  residual: jax.Array
  num_steps: jax.Array
  breakdown: jax.Array


class LinearSolver(NamedTuple):
  """A linear solver, and whether it starts from the last solution.

  Attributes:
    solve: ``(matvec, b, x0) -> (x, info)``.
    warm_start: whether the solver starts from ``x0``. If so, the state of the response keeps the
      last solution, which is the next ``x0``.
    general: the solver to use instead where :math:`A` is not symmetric; ``None`` if this solver
      does not need symmetry.
  """

  solve: SolveLinear
  warm_start: bool = False
  general: "LinearSolver | None" = None

  def __call__(self, matvec, b, x0):
    """Returns ``solve(matvec, b, x0)``."""
    return self.solve(matvec, b, x0)


def measure(matvec: MatVec, b: optax.Params, x: optax.Params, finite: jax.Array) -> LinearInfo:
  """The info of a solver that does not return a :class:`LinearInfo`; costs one product."""
  residual = _tree.add_scaled(b, -1.0, matvec(x))
  norm = _tree.norm(residual)
  return LinearInfo(relative(norm, _tree.norm(b)), jnp.int32(-1), ~(finite & jnp.isfinite(norm)))


def differentiable(
  solver: LinearSolver, matvec: MatVec, b: PyTree, x0: PyTree, symmetric: bool
) -> tuple[PyTree, LinearInfo]:
  """``solver(matvec, b, x0)``, whose derivative solves the same system again.

  So a third level can be differentiated in reverse, through solvers with a ``while_loop`` too. Not
  inside ``shard_map``, whose replication check has no rule for it.
  """
  if jax.sharding.get_abstract_mesh().manual_axes:
    return solver(matvec, b, x0)

  def solve(matvec, b):
    return solver(matvec, b, x0)

  def solve_transposed(matvec, b):
    return solver(matvec, b, jax.tree.map(jnp.zeros_like, b))

  return jax.lax.custom_linear_solve(
    matvec, b, solve, solve_transposed, symmetric=symmetric, has_aux=True
  )


def relative(norm: jax.Array, to: jax.Array) -> jax.Array:
  """``norm / to``, ``norm`` itself if ``to`` is zero, and 1 if the ratio is not finite."""
  ratio = norm / jnp.where(to > 0, to, 1)
  return jnp.where(jnp.isfinite(ratio), ratio, 1)
