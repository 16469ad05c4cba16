r"""The base of the value-function methods: parameters, the lower value, and the excess over it.

These methods rewrite the bilevel problem with the *value function* :math:`g^*(x) = \min_y g(x, y)`:

.. math:: \min_{x, y} f(x, y) \quad \text{s.t.} \quad q(x, y) := g(x, y) - g^*(x) \le 0

So they need no second derivatives, and the inner problem may have many minima. By Danskin's theorem
:math:`\nabla g^*(x) = \nabla_x g(x, \hat y)` at a minimum :math:`\hat y`; gradients do *not* flow
through :math:`\hat y`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check, _tree
from jaxbo._types import Data, Loss, PyTree
from jaxbo.bilevel.inner import inner_solver
from jaxbo.bilevel.parameters import Bilevel, check_params, scalar_dtype
from jaxbo.bilevel.projection import Projection, project_tree
from jaxbo.bilevel.response import MISSING
from jaxbo.bilevel.solution import Start


class ConstraintTerm(NamedTuple):
  """A term to add to the constraint: the ``constraint_term=`` of ``update``.

  Attributes:
    value: the term, a scalar.
    gradient: the gradient of the term, :class:`~jaxbo.Bilevel`.
  """

  value: jax.Array
  gradient: Bilevel


class Excess(NamedTuple):
  r"""The excess :math:`q(x, y)` of the inner loss over the lower value.

  Attributes:
    value: :math:`q`, a scalar.
    gradient: :math:`(\nabla_x q, \nabla_y q)`, at least float32.
    inner_loss: :math:`g(x, y)`.
  """

  value: jax.Array
  gradient: Bilevel
  inner_loss: jax.Array


class LowerValue(NamedTuple):
  """The lower-value problem, made by :func:`lower_value`.

  Attributes:
    init: ``init(y) -> (y_hat, opt_state)``, copies in float32 at least.
    solve: ``solve(x, (y_hat, opt_state), batch) -> ((y_hat, opt_state), finite)``; a run that is
      not finite returns its start.
    excess: ``excess(params, y_hat, batch, term) -> Excess``, two gradients of the inner loss.
    loss: the inner loss, with checks of its output.
  """

  init: Callable[[optax.Params], Start]
  solve: Callable[[optax.Params, Start, Data], tuple[Start, jax.Array]]
  excess: Callable[[Bilevel, optax.Params, Data, ConstraintTerm | None], Excess]
  loss: Callable[[optax.Params, optax.Params, Data], jax.Array]


def lower_value(
  inner_loss: Loss,
  optimizer: optax.GradientTransformation,
  num_steps: int,
  *,
  regularizer: float | jax.Array = 0.0,
  project_inner: Projection | None = None,
) -> LowerValue:
  r"""The problem :math:`\min_{y \in Y} g(x, y) + \frac a2 \|y\|^2`, solved by a few steps.

  The regularizer is in the lower value alone. In :math:`g(x, y)` too, it would exclude minima of
  large norm from the feasible set.
  """
  _check.takes_arguments("inner_loss", inner_loss, "x", "y", "batch")
  _check.transformation("inner_optimizer", optimizer)
  if project_inner is not None:
    _check.takes_arguments("project_inner", project_inner, "y")
    project = lambda y: project_tree("project_inner", project_inner, y)
    optimizer = optax.chain(optimizer, _project_all(project))

  def loss(x, y, batch):
    value = inner_loss(x, y, batch)
    if isinstance(value, tuple):
      raise TypeError(
        "inner_loss must return a scalar, got a tuple; auxiliary outputs are not taken"
      )
    _check.scalar_loss("inner_loss", value, {"x": x, "y": y})
    return jnp.asarray(value, scalar_dtype((x, y)))

  def half_square(y):
    return 0.5 * jnp.asarray(regularizer, scalar_dtype(y)) * _tree.vdot(y, y)

  regularized = isinstance(regularizer, jax.Array) or regularizer != 0
  solver = inner_solver(
    (lambda x, y, batch: loss(x, y, batch) + half_square(y)) if regularized else loss,
    optimizer,
    num_steps,
  )

  def init(y):
    solution = solver.init(_tree.at_least_float32(y))
    return solution.params, solution.opt_state

  def excess(params, y_hat, batch, term):
    x, y = params.outer, params.inner
    value, gradient = jax.value_and_grad(loss, argnums=(0, 1))(x, y, batch)
    lower, lower_gradient = jax.value_and_grad(loss)(x, y_hat, batch)
    if regularized:
      lower = lower + half_square(y_hat)
    excess_value = value - lower.astype(value.dtype)
    slope = Bilevel(optax.tree.sub(gradient[0], lower_gradient), gradient[1])
    if term is not None:
      excess_value = excess_value + jnp.asarray(term.value, value.dtype)
      slope = jax.tree.map(jnp.add, slope, term.gradient)
    return Excess(excess_value, slope, value)

  def solve(x, start, batch):
    if num_steps > 1:  # A schedule or L-BFGS would go on from another problem.
      start = (start[0], solver.init(start[0]).opt_state)
    solution = solver.run(x, start, batch)
    return (solution.params, solution.opt_state), solution.info.finite

  return LowerValue(init, solve, excess, loss)


def _project_all(project: Projection) -> optax.GradientTransformation:
  """Projects ``params + updates``, as the last link of the inner optimizer."""

  def update(updates, state, params: PyTree = None):
    target = project(optax.apply_updates(params, updates))
    return optax.tree.sub(target, params), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def penalize_excess(
  name: str,
  lower: LowerValue,
  init: Callable[[Bilevel, Callable[[], jax.Array]], PyTree],
  rule: Callable[[Excess, Bilevel, PyTree], "Penalty"],
  *,
  start: Callable[[Bilevel, PyTree], Start],
) -> optax.GradientTransformationExtraArgs:
  """Builds a value-function method, which adds a multiplier times the gradient of the excess.

  If a number is not finite, the update returns the incoming gradient and changes only
  ``info.finite`` in the state.

  Args:
    name: the name of the transformation, for error messages.
    lower: the lower-value problem.
    init: ``init(params, zero) -> state``, where each call of ``zero()`` makes a new buffer.
    rule: ``rule(excess, grads, state) -> Penalty``, which chooses the multiplier.
    start: ``start(params, state) -> (y_hat, opt_state)``, where the lower run begins.
  """

  def checked_init(params):
    check_params(name, params)
    return init(params, lambda: jnp.zeros((), scalar_dtype(params)))

  def update(
    updates,
    state,
    params=None,
    *,
    batch: Data = MISSING,
    value_batch: Data = MISSING,
    constraint_term: ConstraintTerm | None = None,
    **extra_args,
  ):
    del extra_args
    grads = check_update(name, updates, params, batch)
    params = _tree.at_least_float32(params)
    value_batch = batch if value_batch is MISSING else value_batch
    value, solved = lower.solve(params.outer, start(params, state), value_batch)
    excess = lower.excess(params, value[0], batch, constraint_term)
    dual, numbers, new_state = rule(excess, grads, state)
    penalty = _tree.scaled(dual, excess.gradient)
    finite = solved & _tree.all_finite((*numbers, dual, penalty))
    direction = add_penalty(grads, penalty, finite)
    new = new_state(Updated(params, batch, value, direction, finite))
    old = state._replace(info=state.info._replace(finite=finite))
    return direction, _tree.where(finite, new, old)

  return optax.GradientTransformationExtraArgs(checked_init, update)


class Updated(NamedTuple):
  """What an update computed, from which ``new_state`` makes the next state."""

  params: Bilevel  # in float32 at least
  batch: Data
  value: Start  # the lower-value iterate and the state of its optimizer
  direction: Bilevel
  finite: jax.Array


class Penalty(NamedTuple):
  """The decision of a rule."""

  dual: jax.Array  # the multiplier
  numbers: tuple[jax.Array, ...]  # numbers that must be finite too
  new_state: Callable[[Updated], PyTree]


def check_update(name: str, grads: PyTree, params: PyTree, batch: Data) -> Bilevel:
  """Returns ``grads`` after checking the arguments of an ``update``."""
  check_params(name, params)
  if batch is MISSING:
    raise TypeError(
      f"{name}: update must be given batch=, the data of the inner loss (None if it has none)"
    )
  if not isinstance(grads, Bilevel):
    raise TypeError(
      f"{name} must be given the gradient of the outer loss as jaxbo.Bilevel(outer=df/dx, "
      f"inner=df/dy), say from jax.grad in Bilevel parameters, got {type(grads).__name__}"
    )
  _check.same_structure("grads", grads, "params", params)
  return grads


def add_penalty(grads: Bilevel, penalty: Bilevel, finite: jax.Array) -> Bilevel:
  """``grads + penalty``, summed in float32 at least, or ``grads``; in the dtypes of ``grads``."""

  def add(g, p):
    total = (_tree.at_least_float32(g) + p).astype(jnp.result_type(g))
    return jnp.where(finite, total, g)

  return jax.tree.map(add, grads, penalty)
