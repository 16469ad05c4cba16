"""The inner solution as a function that ``jax.grad`` differentiates by a response."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check
from jaxbo._types import Data, PyTree
from jaxbo.bilevel.response import check_solver
from jaxbo.bilevel.solution import InnerSolver


def differentiable_solve(
  inner: InnerSolver, response: optax.GradientTransformation
) -> Callable[[PyTree, PyTree, Data], PyTree]:
  r"""Makes the inner solution a function of ``x`` that ``jax.grad`` differentiates by a response.

  Use it where the hypergradient is part of a larger program: several inner problems in one loss, an
  outer loss inside another library's training step, a third level. :func:`jaxbo.bilevel_loop` needs
  no such function. Derivatives are in reverse mode; the second ones, ``jax.jacrev(jax.grad(F))``,
  are right with an implicit response.

  Cost: one solve, and the response in the backward pass.

  Args:
    inner: the inner solver.
    response: a response for ``inner``, such as :func:`jaxbo.add_implicit_response`. Each backward
      pass starts with a fresh state of the response: a linear solver does not warm-start, and ES
      draws the same samples each time.

  Returns:
    ``solve(x, y0, batch) -> y``, the inner parameters after a run from ``y0``, or ``y0`` if the
    run is not finite. Reverse mode gives the response to ``x``. ``y0`` and ``batch`` are constants.

  Raises:
    TypeError: if ``response`` is not a transformation.
    ValueError: in the backward pass, if ``response`` is not a response alone, or if ``y0`` or
      ``batch`` is differentiated.

  Example:
    >>> import jax, jax.numpy as jnp, jaxbo, optax
    >>> inner = jaxbo.inner_solver(lambda x, y, batch: (y - x**2) ** 2, optax.sgd(0.25), 30)
    >>> response = jaxbo.add_implicit_response(inner, jaxbo.conjugate_gradient(5))
    >>> solve = jaxbo.bilevel.differentiable_solve(inner, response)
    >>> F = lambda x: jnp.sin(solve(x, jnp.float32(0.0), None))        # sin(x ** 2)
    >>> print(jax.grad(F)(jnp.float32(1.0)), 2 * jnp.cos(1.0))
    1.0806046 1.0806046
  """
  check_solver(inner)
  _check.transformation("response", response)
  update = optax.with_extra_args_support(response).update

  @jax.custom_vjp
  def attach(x, y0, batch, solution):
    """The solution, whose derivative in ``x`` is the response and nothing else."""
    del x, y0, batch
    return solution.params

  def forward(x, y0, batch, solution):
    for name, argument in (("y0", y0), ("batch", batch)):
      if any(leaf.perturbed for leaf in jax.tree.leaves(argument, is_leaf=_is_primal)):
        raise ValueError(
          f"{name} must not be differentiated: only x has a response, so make {name} a part of x"
        )
    of = lambda tree: jax.tree.map(lambda leaf: leaf.value, tree, is_leaf=_is_primal)
    x, y0, batch, solution = map(of, (x, y0, batch, solution))
    # For a third level: here, too, the solution depends on x by its response.
    solution = solution._replace(params=attach(x, y0, batch, solution))
    return solution.params, (x, batch, solution)

  def backward(kept, inner_grad):
    x, batch, solution = kept
    inner_grad = jax.tree.map(
      lambda grad, y: jnp.zeros_like(y) if _is_zero(grad) else grad,
      inner_grad,
      solution.params,
      is_leaf=_is_zero,
    )
    state = response.init(x)
    if not hasattr(getattr(state, "info", None), "hypergradient_norm"):
      raise ValueError(
        "response must be a response alone, such as jaxbo.add_implicit_response(inner, ...), got "
        f"one with the state {type(state).__name__}"
      )
    grads = (optax.tree.zeros_like(x), inner_grad)
    return update(grads, state, x, solution=solution, batch=batch)[0], None, None, None

  attach.defvjp(forward, backward, symbolic_zeros=True)

  def solve(x, y0, batch):
    held = jax.lax.stop_gradient(x)  # A run on the host, or by while_loop, has no derivative.
    solution = inner.solve(held, inner.init(y0, held, batch), batch)
    return attach(x, y0, batch, jax.lax.stop_gradient(solution))

  return solve


def _is_primal(node: PyTree) -> bool:
  return hasattr(node, "perturbed")


def _is_zero(node: PyTree) -> bool:
  return isinstance(node, jax.custom_derivatives.SymbolicZero)
