"""GMRES, for linear systems that are not symmetric."""

import jax
import jax.numpy as jnp

from jaxbo import _check, _tree
from jaxbo.bilevel.linear_system import LinearSolver, measure


def gmres(
  num_steps: int,
  tolerance: float | jax.Array = 0.0,
  damping: float | jax.Array = 0.0,
  *,
  warm_start: bool = False,
) -> LinearSolver:
  r"""GMRES for :math:`(A + \text{damping}\, I)\, x = b`; :math:`A` need not be symmetric.

  It minimizes :math:`\|b - A x\|` over the Krylov space of ``num_steps`` products, and is exact
  after as many steps as :math:`A` has distinct eigenvalues (if it is diagonalizable). It is
  ``jax.scipy.sparse.linalg.gmres`` without restarts.

  Cost: ``num_steps + 2`` products with :math:`A`. Memory: ``num_steps`` vectors.

  Args:
    num_steps: the largest number of steps, at least 1.
    tolerance: relative residual at which to stop, at least 0.
    damping: added to the diagonal, at least 0.
    warm_start: whether to start from the solution of the previous update. If so,
      :func:`jaxbo.add_implicit_response` needs ``inner_params``.

  Returns:
    A :class:`~jaxbo.bilevel.LinearSolver`. It does not report its number of steps.

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
    resolution = jnp.finfo(_tree.norm(b).dtype).eps
    x, _ = jax.scipy.sparse.linalg.gmres(
      product,
      b,
      start,
      tol=jnp.maximum(tolerance, resolution),  # pyright: ignore[reportArgumentType] (or an array)
      restart=num_steps,
      maxiter=1,
      solve_method="incremental",
    )
    finite = _tree.all_finite(x)
    x = _tree.where(finite, x, start)
    return x, measure(product, b, x, finite)

  return LinearSolver(solve, warm_start)
