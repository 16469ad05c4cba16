r"""The base of all response transformations, and the simplest: :func:`~jaxbo.drop_response`.

A response transformation takes the pair :math:`(\nabla_x f, \nabla_y f)` at the inner solution and
returns the hypergradient :math:`\nabla_x f + (\partial y / \partial x)^\top \nabla_y f`.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check, _tree
from jaxbo._types import Data, PyTree
from jaxbo.bilevel.inner import check_per_step
from jaxbo.bilevel.outer_grad import OuterGrads
from jaxbo.bilevel.solution import InnerSolution, InnerSolver

MISSING: Any = object()
"""Marks a missing argument where ``None`` is a valid value (``batch=None``)."""


def check_solver(inner: object, needs_steps: str = "") -> None:
  """Raises unless ``inner`` is an inner solver, with steps if ``needs_steps`` says who asks."""
  if not isinstance(inner, InnerSolver):
    raise TypeError(f"inner must be an InnerSolver, made by jaxbo.inner_solver, got {inner!r}")
  if needs_steps and inner.num_steps == 0:
    refuse_black_box(needs_steps)


def refuse_black_box(name: str) -> NoReturn:
  """Raises ``ValueError`` for what needs the loss or the steps of the inner problem."""
  raise ValueError(
    f"inner must not be a black_box for {name}: it has no loss and no steps; use "
    "jaxbo.add_es_response with difference='forward' or 'central'"
  )


def check_update(
  name: str, grads: PyTree, x: PyTree, solution: Any = None, batch: Data = None
) -> tuple[optax.Params, optax.Params]:
  """Returns ``(outer_grad, inner_grad)`` after checking the arguments of an ``update``."""
  if x is None:
    raise ValueError(f"{name}: update must be given params, the outer parameters x")
  if solution is MISSING:
    raise TypeError(f"{name}: update must be given solution=, the InnerSolution of inner.solve")
  if batch is MISSING:
    raise TypeError(
      f"{name}: update must be given batch=, the one that inner.solve saw (None if it saw None)"
    )
  _check.floating("x", x)
  if isinstance(grads, OuterGrads):
    grads = tuple(grads)
  if not isinstance(grads, tuple) or len(grads) != 2:
    raise ValueError(
      f"{name} must be given the pair (df/dx, df/dy), say from jaxbo.outer_grad(outer_loss), and "
      f"stand first in the chain; got {jax.tree.map(jnp.shape, grads)}"
    )
  _check.same_structure("df/dx", grads[0], "x", x)
  if solution is not None:
    if not isinstance(solution, InnerSolution):
      raise TypeError(f"{name}: solution must be an InnerSolution, got {type(solution).__name__}")
    _check.same_structure("df/dy", grads[1], "solution.params", solution.params)
  return grads


def response_transformation(
  name: str,
  init: Callable[..., PyTree],
  respond: Callable[..., tuple[optax.Updates, Callable[..., PyTree]]],
) -> optax.GradientTransformationExtraArgs:
  """Builds a response: checks its inputs, guards and measures what it adds to df/dx.

  Args:
    name: the name of the transformation, for error messages.
    init: ``init(params) -> state``.
    respond: ``respond(x, solution, inner_grad, batch, state, **extra_args) -> (response,
      new_state)`` with ``new_state(hypergradient_norm, response_norm, finite) -> state``.
  """

  def update(
    updates, state, params=None, *, solution: Any = MISSING, batch: Data = MISSING, **extra_args
  ):
    results = _RESULTS.get()
    if results and "grad" in extra_args:
      return results[0]
    outer_grad, inner_grad = check_update(name, updates, params, solution, batch)
    token = _RESULTS.set(None)  # A response may be inside the losses, too.
    try:
      response, new_state = respond(params, solution, inner_grad, batch, state, **extra_args)
    finally:
      _RESULTS.reset(token)
    response, finite = guard(response)
    hypergradient = add(outer_grad, response)
    state = new_state(_tree.norm(hypergradient), _tree.norm(response), finite)
    if results is not None:
      results.append((hypergradient, state))
    return hypergradient, state

  return optax.GradientTransformationExtraArgs(init, update)


def check_depends_on_x(
  function: Callable[[PyTree], PyTree],
  x: PyTree,
  name: str = "inner_loss",
  *,
  by_derivative: bool = True,
) -> None:
  """Raises ``ValueError`` if ``x`` does not reach ``function(x)``: its response is always zero.

  With ``by_derivative`` no derivative must be lost on the way, by ``stop_gradient`` or rounding.
  """
  reached = _check.depends(function, x)
  if reached and by_derivative:
    pull_back = lambda cotangent: jax.vjp(function, x)[1](cotangent)
    reached = _check.depends(pull_back, jax.eval_shape(function, x))
  if not reached:
    raise ValueError(
      f"{name} must use its argument x, which has no influence on the inner solution (does it "
      "close over x instead, or lose the derivative, by stop_gradient, rounding or a sign? without "
      "a response, use jaxbo.drop_response())"
    )


def check_solution(name: str, inner: InnerSolver, solution: InnerSolution) -> None:
  """Raises ``ValueError`` if a run of another length made the solution."""
  losses = solution.info.losses  # None where no solver made the solution.
  if losses is not None and losses.shape[-1] != inner.num_steps:
    raise ValueError(
      f"solution must come from the inner solver of {name}, of {inner.num_steps} steps, got one of "
      f"{losses.shape[-1]} steps"
    )


def check_run(
  name: str,
  inner: InnerSolver,
  x: PyTree,
  solution: InnerSolution,
  batch: Data,
  *,
  by_derivative: bool,
) -> None:
  """Raises ``ValueError`` unless a response can run the inner problem again and learn from it."""
  start = solution.start
  if start is None:
    raise ValueError(
      f"hyper_at must be 'after' for a response that runs the inner problem again ({name}), and "
      "solution.start must say where the run began"
    )
  check_solution(name, inner, solution)
  if inner.num_steps == 0:
    path = lambda x: inner.path(x, start, batch)
    check_depends_on_x(path, x, "path", by_derivative=by_derivative)
  elif inner.start is None or not _check.depends(inner.start, x):
    if inner.per_step_batches:
      check_per_step(batch, inner.num_steps)
      batch = jax.tree.map(lambda leaf: leaf[0], batch)
    y, gradient = solution.params, jax.grad(inner.loss, argnums=1)
    step = lambda x: inner.descend(x, y, gradient(x, y, batch), batch)
    check_depends_on_x(step, x, by_derivative=by_derivative)


_RESULTS: ContextVar[list[tuple[PyTree, PyTree]] | None] = ContextVar("results", default=None)


def update_with_grad(
  tx: optax.GradientTransformationExtraArgs,
  grads: PyTree,
  state: optax.OptState,
  params: optax.Params,
  extra_args: dict[str, PyTree],
) -> tuple[optax.Updates, optax.OptState]:
  """``tx.update``, where a line search behind a response gets the hypergradient as ``grad=``.

  A chain hands the same extra arguments to all of its parts, and only the response knows the
  hypergradient. So a first attempt stops at the line search, and the second one goes on from there.
  """
  results = []
  token = _RESULTS.set(results)
  try:
    return tx.update(grads, state, params, **extra_args)
  except TypeError as error:
    if "'grad'" not in str(error) or len(results) != 1:
      raise
    return tx.update(grads, state, params, grad=results[0][0], **extra_args)
  finally:
    _RESULTS.reset(token)


def check_differentiable(name: str, opt_state: optax.OptState) -> None:
  """Raises ``ValueError`` for an inner optimizer whose run has no useful derivative."""
  kinds = (
    optax.ScaleByLBFGSState,
    optax.ScaleByZoomLinesearchState,
    optax.ScaleByBacktrackingLinesearchState,
  )
  is_kind = lambda node: isinstance(node, kinds)
  if any(map(is_kind, jax.tree.leaves(opt_state, is_leaf=is_kind))):
    raise ValueError(
      f"{name}: inner must not use L-BFGS or a line search, whose steps have no useful derivative; "
      "use jaxbo.add_implicit_response, or jaxbo.add_es_response with difference='central'"
    )


def response_info(state: optax.OptState, field: str = "hypergradient_norm") -> PyTree:
  """The info of the first response in the state of a chain, known by ``field``; or ``None``."""
  is_info = lambda node: hasattr(node, field)
  return next(filter(is_info, jax.tree.leaves(state, is_leaf=is_info)), None)


def guard(response: optax.Params) -> tuple[optax.Params, jax.Array]:
  """Returns the response, or zeros if it is not finite, and whether the response is finite."""
  finite = _tree.all_finite(response)
  return _tree.where(finite, response, optax.tree.zeros_like(response)), finite


def add(outer_grad: optax.Params, response: optax.Params) -> optax.Params:
  """Adds the response to df/dx in float32 at least, and returns the dtype of df/dx."""
  return jax.tree.map(
    lambda g, r: (_tree.at_least_float32(g) + _tree.at_least_float32(r)).astype(g.dtype),
    outer_grad,
    response,
  )


class DropInfo(NamedTuple):
  """Diagnostics of :func:`~jaxbo.drop_response`.

  Attributes:
    hypergradient_norm: norm of the hypergradient, float32 at least.
  """

  hypergradient_norm: jax.Array


class DropResponseState(NamedTuple):
  """State of :func:`~jaxbo.drop_response`."""

  info: DropInfo


def drop_response() -> optax.GradientTransformationExtraArgs:
  r"""Keeps :math:`\nabla_x f` and drops the response: the first-order approximation.

  .. math:: h = \nabla_x f(x, y^N)

  This costs nothing and is wrong wherever the response matters: if ``f`` does not depend on ``x``
  directly, as in hyperparameter optimization, the result is zero. Every estimator of the response
  has to beat this baseline.

  Returns:
    A transformation from the pair ``(df/dx, df/dy)`` to ``df/dx``.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> tx = jaxbo.drop_response()
    >>> x = jnp.float32(1.0)
    >>> hypergradient, state = tx.update((jnp.float32(0.5), jnp.ones(3)), tx.init(x), x)
    >>> float(hypergradient)
    0.5
  """

  def init(params):
    return DropResponseState(DropInfo(zero_norm(params)))

  def update(updates, state, params=None, **extra_args):
    del state, extra_args
    outer_grad, _ = check_update("drop_response", updates, params)
    return outer_grad, DropResponseState(DropInfo(_tree.norm(outer_grad)))

  return optax.GradientTransformationExtraArgs(init, update)


def zero_norm(params: optax.Params) -> jax.Array:
  """A zero in the dtype of ``jaxbo._tree.norm(params)``."""
  return jnp.zeros((), jnp.result_type(jnp.float32, *jax.tree.leaves(params)))
