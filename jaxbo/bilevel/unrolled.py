"""ITD: the response by differentiating through the inner run."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check, _tree
from jaxbo._optimizer import LearningRate, optimizer
from jaxbo.bilevel.response import (
  check_differentiable,
  check_run,
  check_solver,
  response_transformation,
  zero_norm,
)
from jaxbo.bilevel.solution import InnerSolver


class UnrolledInfo(NamedTuple):
  """Diagnostics of :func:`~jaxbo.add_unrolled_response`.

  Attributes:
    hypergradient_norm: norm of the hypergradient, float32 at least.
    response_norm: norm of the response alone.
    finite: whether the response was finite; if not, it was replaced by zero.
  """

  hypergradient_norm: jax.Array
  response_norm: jax.Array
  finite: jax.Array


class UnrolledResponseState(NamedTuple):
  """State of :func:`~jaxbo.add_unrolled_response`."""

  info: UnrolledInfo


def add_unrolled_response(
  inner: InnerSolver, num_steps: int | None = None
) -> optax.GradientTransformationExtraArgs:
  r"""Adds the response by reverse-mode differentiation through the inner run (ITD).

  .. math:: h = \nabla_x f + J_N^\top \nabla_y f, \qquad J_N = \frac{\partial y^N(x)}{\partial x}

  :math:`h` is the exact gradient of :math:`f(x, y^N(x))` for the run from ``solution.start``,
  however far :math:`y^N` is from the minimum. With ``num_steps=k`` only the last ``k`` steps are
  differentiated, and :math:`x` is a constant before them (truncated back-propagation).

  Cost: a forward and a backward run of the inner problem. Memory: all ``N`` steps, or
  :math:`O(\sqrt N)` steps for a solver built with ``remat=True``.

  Args:
    inner: the inner solver that made the solution.
    num_steps: how many of the last inner steps to differentiate, from 1 to ``inner.num_steps``;
      ``None`` for all.

  Returns:
    A transformation from the pair ``(df/dx, df/dy)`` to the hypergradient. ``update`` must be
    given ``solution=`` and ``batch=``, the batch that ``inner.solve`` saw.

  Raises:
    ValueError: if ``num_steps`` is outside its range; if the inner run does not depend on ``x``,
      uses L-BFGS, a line search or ``tolerance``, or is a black box.

  Example:
    >>> import jax, jax.numpy as jnp, jaxbo, optax
    >>> inner = jaxbo.inner_solver(lambda x, y, batch: (y - x**2) ** 2, optax.sgd(0.25), 30)
    >>> tx = jaxbo.add_unrolled_response(inner)
    >>> x = jnp.float32(3.0)
    >>> y = inner.solve(x, inner.init(jnp.float32(0.0)), None)      # y = x ** 2
    >>> grads = jaxbo.outer_grad(lambda x, y: y)(x, y.params)       # f = y
    >>> hypergradient, _ = tx.update(grads, tx.init(x), x, solution=y, batch=None)
    >>> bool(jnp.allclose(hypergradient, 6.0))                      # dF/dx = 2 x
    True

  References:
    Franceschi et al., `Forward and Reverse Gradient-Based Hyperparameter Optimization
    <https://arxiv.org/abs/1703.01785>`_, 2017; Shaban et al., `Truncated Back-propagation for
    Bilevel Optimization <https://arxiv.org/abs/1810.10667>`_, 2019.
  """
  check_solver(inner, "add_unrolled_response")
  if num_steps is not None:
    num_steps = _check.positive_int("num_steps", num_steps)
    if num_steps > inner.num_steps:
      raise ValueError(
        f"num_steps must be at most the solver's num_steps={inner.num_steps}, got {num_steps}"
      )

  def init(params):
    info = UnrolledInfo(zero_norm(params), zero_norm(params), jnp.bool_(True))
    return UnrolledResponseState(info)

  def respond(x, solution, inner_grad, batch, state, **extra_args):
    del state, extra_args
    if inner.stops_early:
      raise ValueError(
        "inner must not have a tolerance with add_unrolled_response: no reverse mode"
      )
    check_differentiable("add_unrolled_response", solution.opt_state)
    check_run("add_unrolled_response", inner, x, solution, batch, by_derivative=True)
    y, pull_back = jax.vjp(lambda x: inner.path(x, solution.start, batch, last=num_steps), x)
    response = pull_back(_tree.cast_like(inner_grad, y))[0]
    return response, lambda *measured: UnrolledResponseState(UnrolledInfo(*measured))

  return response_transformation("add_unrolled_response", init, respond)


def itd(
  learning_rate: LearningRate, inner: InnerSolver, num_steps: int | None = None
) -> optax.GradientTransformationExtraArgs:
  """Iterative differentiation: gradient descent along :func:`add_unrolled_response`.

  Args:
    learning_rate: a float, a schedule, or an optax optimizer to use instead.
    inner: the inner solver.
    num_steps: how many of the last inner steps to differentiate; ``None`` for all.

  Returns:
    ``optax.chain(add_unrolled_response(...), optax.scale_by_learning_rate(learning_rate))``.

  Example:
    >>> import jax, jax.numpy as jnp, jaxbo, optax
    >>> inner = jaxbo.inner_solver(lambda x, y, batch: (y - x**2) ** 2, optax.sgd(0.25), 30)
    >>> outer_loss = lambda x, y, batch: (y - 4.0) ** 2              # minimal at x = 2
    >>> init, step = jaxbo.bilevel_loop(outer_loss, inner, jaxbo.itd(0.02, inner))
    >>> state = init(jnp.float32(1.0), jnp.float32(0.0))
    >>> for _ in range(20):
    ...   state, info = jax.jit(step)(state, None, None)
    >>> print(state.x.round(3))
    2.0
  """
  return optax.chain(add_unrolled_response(inner, num_steps), optimizer(learning_rate))
