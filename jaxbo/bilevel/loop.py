"""The loop of a bilevel method as a jittable pair ``(init, step)``."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check, _tree
from jaxbo._types import Data, Loss, PyTree
from jaxbo.bilevel.outer_grad import loss_and_aux, outer_grad
from jaxbo.bilevel.parameters import Bilevel
from jaxbo.bilevel.response import response_info, update_with_grad
from jaxbo.bilevel.solution import InnerInfo, InnerSolution, InnerSolver


class BilevelState(NamedTuple):
  """State of the loop of :func:`~jaxbo.bilevel_loop`.

  Attributes:
    x: the outer parameters.
    solution: the inner solution.
    outer_state: the state of the outer transformation.
  """

  x: optax.Params
  solution: InnerSolution
  outer_state: optax.OptState


class BilevelInfo(NamedTuple):
  """Diagnostics of one step of :func:`~jaxbo.bilevel_loop`.

  Attributes:
    outer_loss: the outer loss before the update of ``x``.
    hypergradient_norm: norm of the hypergradient; NaN if ``outer`` does not report one.
    inner_losses: the inner loss before each inner step, ``[num_steps]``; ``None`` without an inner
      loss.
    inner_finite: whether the inner run was finite; if not, it returned to its start.
    response_finite: whether the response was finite (with samples: whether one of them was); if
      not, it was left out. True if ``outer`` does not report it.
    linear_residual: relative residual of the linear system of :func:`jaxbo.add_implicit_response`;
      NaN for other responses.
    stationarity: how far the inner solution is from what :func:`jaxbo.add_implicit_response`
      assumes, see :class:`ImplicitInfo`; NaN for other responses.
    aux: the auxiliary output of the outer loss; ``None`` without ``has_aux``.
  """

  outer_loss: jax.Array
  hypergradient_norm: jax.Array
  inner_losses: jax.Array | None
  inner_finite: jax.Array
  response_finite: jax.Array
  linear_residual: jax.Array
  stationarity: jax.Array
  aux: PyTree = None


def bilevel_loop(
  outer_loss: Loss,
  inner: InnerSolver,
  outer: optax.GradientTransformation,
  *,
  has_aux: bool = False,
) -> tuple[Callable[..., BilevelState], Callable[..., tuple[BilevelState, BilevelInfo]]]:
  r"""Builds the loop of a bilevel method: solve, differentiate the outer loss, respond, update.

  .. math:: \min_x F(x) = f(x, y^*(x)), \qquad y^*(x) \in \arg\min_y g(x, y)

  Args:
    outer_loss: the outer loss :math:`f`, ``outer_loss(x, y, batch) -> scalar``.
    inner: the inner solver.
    outer: an optax chain that begins with a response (:func:`jaxbo.add_es_response`,
      :func:`jaxbo.add_unrolled_response`, :func:`jaxbo.add_implicit_response`,
      :func:`jaxbo.drop_response`), or an alias such as :func:`jaxbo.aid`.
    has_aux: whether the outer loss returns ``(scalar, aux)``.

  Returns:
    ``(init, step)``, both pure. ``init(x, y0) -> BilevelState`` copies its arguments, so that the
    state may be donated, and strips weak types. An inner loss with auxiliary outputs needs
    ``init(x, y0, train)``. ``step(state, train, val, **extra_args) -> (BilevelState,
    BilevelInfo)``: wrap it in ``jax.jit`` or scan over it. The inner loss sees the batch ``train``
    and the outer loss sees ``val``. Extra arguments, such as ``linear_batch=``, go to the
    ``update`` of ``outer``. That ``update`` also gets ``value=``, the outer loss. For line searches
    it gets ``value_fn=``, the outer loss at the end of the inner run from the same start, and
    ``grad=``, the hypergradient; so ``optax.lbfgs`` may follow a response.

  Raises:
    TypeError: if ``outer_loss`` does not take ``(x, y, batch)``, or a parameter is not a float.
    ValueError: if the outer loss is not a scalar, or ``outer`` does not begin with a response; if
      the loss varies over an axis of ``shard_map`` over which ``x`` or ``y`` does not (with the
      replication check on); then return the mean of the loss over that axis.

  Example:
    >>> import jax, jax.numpy as jnp, jaxbo, optax
    >>> inner = jaxbo.inner_solver(lambda x, y, batch: (y - x) ** 2, optax.sgd(0.25), 20)
    >>> outer = optax.chain(jaxbo.add_unrolled_response(inner), optax.adam(0.1))
    >>> init, step = jaxbo.bilevel_loop(lambda x, y, batch: x * y - 2 * x + 1, inner, outer)
    >>> state = init(jnp.float32(0.0), jnp.float32(0.0))
    >>> for _ in range(200):
    ...   state, info = jax.jit(step)(state, None, None)
    >>> print(state.x.round(2))                                     # F(x) = (x - 1) ** 2
    1.0
  """
  respond = outer_step(outer_loss, outer, has_aux=has_aux)
  loss_and_aux = checked_outer_loss(outer_loss, has_aux)

  def init(x, y0, train=None):
    _check.floating("x", x)
    x = _tree.copy(x)
    return BilevelState(x, inner.init(y0, x, train), _tree.copy(outer.init(x)))

  def step(state, train, val, **extra_args):
    solution = inner.solve(state.x, state.solution, train)
    start: PyTree = solution.start

    def value_fn(x, batch=None, solution=None, linear_batch=None):
      """Line searches of optax pass on the extra arguments that it names."""
      del batch, solution, linear_batch
      return loss_and_aux(x, inner.path(x, start, train), val)[0]

    extra_args.setdefault("value_fn", value_fn)
    return respond(state._replace(solution=solution), train, val, **extra_args)

  return init, step


def outer_step(
  outer_loss: Loss, outer: optax.GradientTransformation, *, has_aux: bool = False
) -> Callable[..., tuple[BilevelState, BilevelInfo]]:
  """The outer step of every loop: ``respond(state, train, val, **extra_args) -> (state, info)``.

  ``respond`` differentiates the outer loss at the inner solution of ``state``, passes the gradients
  to ``outer``, and adds the resulting updates to ``x``. Loops differ in when they solve the inner
  problem.
  """
  differentiate = outer_gradients(outer_loss, outer, has_aux=has_aux)

  def respond(state, train, val, **extra_args):
    x, solution, outer_state = state
    given = {"solution": solution, "batch": train, **extra_args}
    updates, outer_state, loss, aux = differentiate(x, solution.params, outer_state, val, **given)
    info = report(loss, aux, solution.info, response_info(outer_state))
    return BilevelState(optax.apply_updates(x, updates), solution, outer_state), info

  return respond


def report(loss: jax.Array, aux: PyTree, run: InnerInfo, response: PyTree) -> BilevelInfo:
  """The report of a step, with what the info of a response has; ``None`` has nothing."""
  unknown = jnp.float32(jnp.nan)
  num_finite = getattr(response, "num_finite", jnp.int32(1))
  return BilevelInfo(
    outer_loss=loss,
    hypergradient_norm=getattr(response, "hypergradient_norm", unknown),
    inner_losses=run.losses,
    inner_finite=run.finite,
    response_finite=getattr(response, "finite", num_finite > 0),
    linear_residual=getattr(response, "linear_residual", unknown),
    stationarity=getattr(response, "stationarity", unknown),
    aux=aux,
  )


def outer_gradients(
  outer_loss: Loss,
  outer: optax.GradientTransformation,
  *,
  has_aux: bool = False,
  moves_both: bool = False,
) -> Callable[..., tuple[optax.Updates, optax.OptState, jax.Array, PyTree]]:
  """``differentiate(x, y, state, val, **extra_args) -> (updates, state, loss, aux)``.

  ``differentiate`` passes the gradients of the outer loss in both levels to ``outer``, which begins
  with a response. With ``moves_both``, ``outer`` is instead a method that moves both levels, on
  :class:`jaxbo.Bilevel` parameters. ``outer`` also gets the loss, as ``value=``.
  """
  tx = optax.with_extra_args_support(outer)
  _check.takes_arguments("outer_loss", outer_loss, "x", "y", "batch")
  gradients = outer_grad(outer_loss, has_aux=has_aux)

  def differentiate(x, y, state, val, **extra_args):
    grads = pair = gradients(x, y, val)
    extra_args.setdefault("value", pair.loss)
    name, params = "x", x
    if moves_both:
      name, params, grads = "Bilevel(x, y)", Bilevel(x, y), Bilevel(*pair)
    try:
      updates, new_state = update_with_grad(tx, grads, state, params, extra_args)
      _check.same_structure("what outer returns", updates, name, params)
    except TypeError as error:
      if "OuterGrads are not gradients yet" not in str(error):
        raise
      raise ValueError(f"outer must begin with a response: {error}") from error
    return updates, new_state, pair.loss, pair.aux

  return differentiate


def checked_outer_loss(
  outer_loss: Loss, has_aux: bool, name: str = "outer_loss"
) -> Callable[[PyTree, PyTree, Data], tuple[jax.Array, PyTree]]:
  """Wraps the outer loss of a loop to check its arguments and its output."""
  _check.takes_arguments(name, outer_loss, "x", "y", "batch")
  return loss_and_aux(name, outer_loss, has_aux)


def checked_loss(name: str, loss: Loss) -> Loss:
  """Wraps a loss without auxiliary outputs to check its output."""
  loss_and_aux = checked_outer_loss(loss, False, name)
  return lambda x, y, batch: loss_and_aux(x, y, batch)[0]
