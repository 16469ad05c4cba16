"""DARTS: the response of one inner step, with differences for its second derivatives."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check, _tree
from jaxbo._optimizer import LearningRate, optimizer
from jaxbo.bilevel.inner import check_per_step
from jaxbo.bilevel.response import (
  check_depends_on_x,
  check_differentiable,
  check_solver,
  response_transformation,
  zero_norm,
)
from jaxbo.bilevel.solution import InnerSolver


class FiniteDifferenceInfo(NamedTuple):
  """Diagnostics of :func:`~jaxbo.add_finite_difference_response`.

  Attributes:
    hypergradient_norm: norm of the hypergradient, float32 at least.
    response_norm: norm of the response alone.
    finite: whether the response was finite; if not, it was replaced by zero.
  """

  hypergradient_norm: jax.Array
  response_norm: jax.Array
  finite: jax.Array


class FiniteDifferenceResponseState(NamedTuple):
  """State of :func:`~jaxbo.add_finite_difference_response`."""

  info: FiniteDifferenceInfo


def add_finite_difference_response(
  inner: InnerSolver, radius: float | jax.Array = 1e-2
) -> optax.GradientTransformationExtraArgs:
  r"""Adds the response of one inner step, with two gradients instead of a product (DARTS).

  .. math::
    h = \nabla_x f - \xi\, \frac{\nabla_x g(x, y + \epsilon v) - \nabla_x g(x, y - \epsilon v)}
    {2 \epsilon}, \qquad v = \nabla_y f, \qquad \epsilon = \frac{\text{radius}}{\|v\|}

  This is :func:`jaxbo.add_unrolled_response` of one step of the inner optimizer, without second
  derivatives of ``g``: the two agree up to :math:`O(\text{radius}^2)`, and up to rounding if
  :math:`\nabla_x g` is affine in ``y``. The step size :math:`\xi` is that of the solver. For any
  optimizer, :math:`-\xi v` is the product of :math:`v` with the derivative of its update in the
  gradient, at its present state; an optimizer that depends on ``x`` adds its own derivative.

  With ``num_steps=1`` the step is the one that the solver took, from :math:`y` =
  ``solution.start``. A solver of more steps does not store where its last step began, so the
  response is that of one more step from the solution. It lacks the responses of earlier steps,
  which matter unless :math:`\xi \nabla^2_{yy} g` is near the identity.

  Cost: two gradients of ``g``, and one more if the update is not linear in the gradient (Adam).
  Memory: one gradient of ``g``.

  Args:
    inner: the inner solver that made the solution.
    radius: the distance, above 0, that :math:`y` moves in either direction. In float32, rounding
      causes an error of about :math:`10^{-7} \|\nabla_x g\| \cdot \xi \|v\| / \text{radius}`.

  Returns:
    A transformation from the pair ``(df/dx, df/dy)`` to the hypergradient. ``update`` must be
    given ``solution=`` and ``batch=``, the batch that ``inner.solve`` saw; with per-step batches
    the last one counts. If ``df/dy`` is zero, so is the response.

  Raises:
    ValueError: if ``radius <= 0``; if ``inner`` has ``start=``, whose derivative would be missing;
      if the inner step does not depend on ``x``, or uses L-BFGS or a line search; if ``inner`` is a
      black box.

  Example:
    >>> import jax, jax.numpy as jnp, jaxbo, optax
    >>> inner = jaxbo.inner_solver(lambda x, y, batch: (y - x**2) ** 2, optax.sgd(0.5), 1)
    >>> tx = jaxbo.add_finite_difference_response(inner)
    >>> x = jnp.float32(3.0)
    >>> y = inner.solve(x, inner.init(jnp.float32(0.0)), None)      # y = x ** 2
    >>> grads = jaxbo.outer_grad(lambda x, y: y)(x, y.params)       # f = y
    >>> hypergradient, _ = tx.update(grads, tx.init(x), x, solution=y, batch=None)
    >>> bool(jnp.allclose(hypergradient, 6.0, rtol=1e-3))           # dF/dx = 2 x
    True

  References:
    Liu, Simonyan and Yang, `DARTS: Differentiable Architecture Search
    <https://arxiv.org/abs/1806.09055>`_, 2019, equations 7 and 8.
  """
  check_solver(inner, "add_finite_difference_response")
  _check.positive("radius", radius)
  if inner.start is not None:
    raise ValueError(
      "inner must not have start= for add_finite_difference_response, which leaves its derivative "
      "out; use jaxbo.add_unrolled_response"
    )

  def init(params):
    info = FiniteDifferenceInfo(zero_norm(params), zero_norm(params), jnp.bool_(True))
    return FiniteDifferenceResponseState(info)

  def respond(x, solution, inner_grad, batch, state, **extra_args):
    del state, extra_args
    check_differentiable("add_finite_difference_response", solution.opt_state)
    begin = solution.start if inner.num_steps == 1 else None
    y, opt_state = begin or (solution.params, solution.opt_state)
    x, y, b = _tree.at_least_float32((x, y, inner_grad))
    if inner.per_step_batches:
      check_per_step(batch, inner.num_steps)
      batch = jax.tree.map(lambda leaf: leaf[-1], batch)
    in_x, in_y = (jax.grad(inner.loss, argnums=i) for i in (0, 1))
    step = lambda x, grads: inner.descend(x, y, grads, batch, opt_state=opt_state)
    check_depends_on_x(lambda x: step(x, in_y(x, y, batch)), x)

    update, pull_back = jax.vjp(step, x, in_y(x, y, batch))
    by_optimizer, direction = pull_back(_tree.cast_like(b, update))
    norm = _tree.norm(direction)
    scale = jnp.where(norm > 0, radius / jnp.where(norm > 0, norm, 1), 1)
    ahead, behind = (in_x(x, _tree.add_scaled(y, s, direction), batch) for s in (scale, -scale))
    by_gradient = _tree.scaled(1 / (2 * scale), optax.tree.sub(ahead, behind))
    response = optax.tree.add(by_optimizer, by_gradient)
    new_state = lambda *measured: FiniteDifferenceResponseState(FiniteDifferenceInfo(*measured))
    return response, new_state

  return response_transformation("add_finite_difference_response", init, respond)


def darts(
  learning_rate: LearningRate, inner: InnerSolver, radius: float | jax.Array = 1e-2
) -> optax.GradientTransformationExtraArgs:
  """DARTS: gradient descent along :func:`add_finite_difference_response`.

  Use it with a solver of one step, ``inner_solver(inner_loss, optimizer, num_steps=1)``. The paper
  takes the step of ``y`` again after that of ``x``: see Departures from the papers.

  Args:
    learning_rate: a float, a schedule, or an optax optimizer to use instead.
    inner: the inner solver.
    radius: the distance, above 0, that ``y`` moves for the difference.

  Returns:
    ``optax.chain(add_finite_difference_response(...), scale_by_learning_rate(learning_rate))``.

  Example:
    >>> import jax, jax.numpy as jnp, jaxbo, optax
    >>> inner = jaxbo.inner_solver(lambda x, y, batch: (y - x**2) ** 2, optax.sgd(0.4), 1)
    >>> outer_loss = lambda x, y, batch: (y - 4.0) ** 2              # minimal at x = 2
    >>> init, step = jaxbo.bilevel_loop(outer_loss, inner, jaxbo.darts(0.02, inner))
    >>> state = init(jnp.float32(1.0), jnp.float32(0.0))
    >>> for _ in range(40):
    ...   state, info = jax.jit(step)(state, None, None)
    >>> print(state.x.round(3))
    2.0

  References:
    Liu, Simonyan and Yang, `DARTS: Differentiable Architecture Search
    <https://arxiv.org/abs/1806.09055>`_, 2019.
  """
  return optax.chain(add_finite_difference_response(inner, radius), optimizer(learning_rate))
