"""GMRES, for linear systems that are not symmetric."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxbo import _check, _tree
from jaxbo._types import PyTree
from jaxbo.bilevel.linear_system import LinearSolver, measure


def gmres(
  num_steps: int,
  tolerance: float | jax.Array = 0.0,
  damping: float | jax.Array = 0.0,
  *,
  warm_start: bool = False,
) -> LinearSolver:
  r"""GMRES for :math:`(A + \text{damping}\, I)\, x = b`; :math:`A` need not be symmetric.

  GMRES minimizes :math:`\|b - A x\|` over the Krylov space of ``num_steps`` products. It is exact
  after as many steps as :math:`A` has distinct eigenvalues, if :math:`A` is diagonalizable. It does
  not restart. (``jax.scipy.sparse.linalg.gmres`` runs neither on explicit mesh axes nor inside
  ``shard_map`` with the replication check.)

  Cost: ``num_steps + 1`` products with :math:`A`, one more with a warm start. Memory: ``num_steps +
  1`` vectors.

  Args:
    num_steps: the largest number of steps, at least 1.
    tolerance: relative residual at which to stop, at least 0.
    damping: added to the diagonal, at least 0.
    warm_start: whether to start from the solution of the previous update. If so,
      :func:`jaxbo.add_implicit_response` needs ``inner_params``.

  Returns:
    A :class:`~jaxbo.bilevel.LinearSolver`.

  Raises:
    ValueError: if an argument is outside its range.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> matrix = jnp.array([[3.0, 1.0], [0.0, 2.0]])
    >>> x, info = jaxbo.gmres(2)(lambda v: matrix @ v, jnp.ones(2), jnp.zeros(2))
    >>> bool(jnp.allclose(x, jnp.array([1 / 6, 0.5]))), bool(info.breakdown)
    (True, False)

  References:
    Saad and Schultz, `GMRES: A Generalized Minimal Residual Algorithm
    <https://doi.org/10.1137/0907058>`_, 1986.
  """
  num_steps = _check.positive_int("num_steps", num_steps)
  _check.non_negative("tolerance", tolerance)
  _check.non_negative("damping", damping)

  def solve(matvec, b, x0):
    product = lambda v: _tree.add_scaled(matvec(v), damping, v)
    start = x0 if warm_start else jax.tree.map(jnp.zeros_like, b)
    residual = _tree.add_scaled(b, -1.0, product(start)) if warm_start else b
    length = _tree.norm(residual)
    rounding = jnp.finfo(length.dtype).eps
    enough = jnp.maximum(jnp.asarray(tolerance, length.dtype), rounding) * _tree.norm(b)
    slots = _tree.empty_slots(b, num_steps + 1)
    first = _Arnoldi(
      basis=_tree.put_slot(slots, _tree.scaled(_inverse(length), residual), jnp.int32(0)),
      rotations=jnp.eye(num_steps + 1, dtype=length.dtype),
      triangle=jnp.zeros((num_steps + 1, num_steps), length.dtype),
      residual=length,
      num_steps=jnp.int32(0),
    )

    def goes_on(state):
      return (state.num_steps < num_steps) & (state.residual > enough)

    def step(state):
      k = state.num_steps
      image = product(jax.tree.map(lambda leaf: leaf[k], state.basis))
      size, column = _tree.norm(image), jnp.zeros(num_steps + 1, length.dtype)
      for _ in range(2):  # Once leaves rounding errors along the basis.
        along = _coordinates(state.basis, image)
        column += along
        image = _tree.add_scaled(image, -1.0, _combination(along, state.basis))
      rest = _tree.norm(image)
      rest = jnp.where(rest > 10 * rounding * size, rest, 0)
      # A Givens rotation makes the new column of the Hessenberg matrix one of a triangle.
      column = state.rotations @ column.at[k + 1].set(rest)
      radius = jnp.hypot(column[k], column[k + 1])
      cos, sin = column[k] * _inverse(radius), column[k + 1] * _inverse(radius)
      cos = jnp.where(radius > 0, cos, 1)
      upper, lower = state.rotations[k], state.rotations[k + 1]
      rotations = state.rotations.at[k].set(cos * upper + sin * lower)
      rotations = rotations.at[k + 1].set(cos * lower - sin * upper)
      return _Arnoldi(
        basis=_tree.put_slot(state.basis, _tree.scaled(_inverse(rest), image), k + 1),
        rotations=rotations,
        triangle=state.triangle.at[:, k].set(column.at[k].set(radius).at[k + 1].set(0)),
        residual=length * jnp.abs(rotations[k + 1, 0]),
        num_steps=k + 1,
      )

    first = _tree.vary_alike(first, b, start)
    last = jax.lax.while_loop(goes_on, step, first)
    diagonal = jnp.diagonal(last.triangle)
    there = diagonal > 10 * rounding * jnp.max(diagonal)
    triangle = last.triangle[:-1] + jnp.diag(jnp.where(there, 0, 1).astype(length.dtype))
    right = jnp.where(there, length * last.rotations[:-1, 0], 0)
    along = jax.scipy.linalg.solve_triangular(triangle, right)
    x = _tree.add_scaled(start, 1.0, _combination(jnp.append(along, 0), last.basis))
    finite = _tree.all_finite(x)
    x = _tree.where(finite, x, start)
    info = measure(product, b, x, finite)
    singular = jnp.any(~there & (jnp.arange(num_steps) < last.num_steps))
    return x, info._replace(num_steps=last.num_steps, breakdown=info.breakdown | singular)

  return LinearSolver(solve, warm_start)


class _Arnoldi(NamedTuple):
  """An orthonormal basis of the Krylov space, and the least-squares problem in it.

  Attributes:
    basis: ``num_steps + 1`` vectors; those that are not there yet are zero.
    rotations: an orthogonal matrix that makes the Hessenberg matrix of the basis a triangle.
    triangle: that triangle, ``[num_steps + 1, num_steps]``.
    residual: the norm of the residual of the best combination.
    num_steps: how many columns there are.
  """

  basis: PyTree
  rotations: jax.Array
  triangle: jax.Array
  residual: jax.Array
  num_steps: jax.Array


def _coordinates(basis: PyTree, vector: PyTree) -> jax.Array:
  """The inner products of the vectors of the basis with one, ``[num_steps + 1]``."""
  return jax.vmap(_tree.vdot, in_axes=(0, None))(basis, vector)


def _combination(weights: jax.Array, basis: PyTree) -> PyTree:
  """The weighted sum of the vectors of the basis."""
  return jax.tree.map(lambda leaf: jnp.tensordot(weights.astype(leaf.dtype), leaf, axes=1), basis)


def _inverse(number: jax.Array) -> jax.Array:
  """``1 / number``, and 0 of 0."""
  return jnp.where(number > 0, 1 / jnp.where(number > 0, number, 1), 0)
