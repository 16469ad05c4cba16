"""SRBA: a single loop on a finite sum, with recursive differences and no table."""

import optax

from jaxbo._optimizer import LearningRate
from jaxbo._types import Loss
from jaxbo.bilevel.projection import Projection
from jaxbo.online.sogd import sogd


def srba(
  outer_learning_rate: LearningRate,
  inner_learning_rate: LearningRate,
  inner_loss: Loss,
  outer_loss: Loss,
  *,
  linear_learning_rate: optax.ScalarOrSchedule,
  radius: float | None = None,
  project_outer: Projection | None = None,
  project_inner: Projection | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""SRBA: variance reduction by recursive differences, on a finite sum, without a table.

  .. math::
    d^u_t = D^u_t(z_t) - D^u_t(z_{t-1}) + d^u_{t-1}, \quad u \in \{x, y, v\}, \qquad
    d^u_t = D^u(z_t) \text{ over all samples at a restart}

  with :math:`z = (x, y, v)` and the directions :math:`D_t` on a minibatch of
  :func:`jaxbo.add_corrected_response`, whose correction is zero. So the difference of two
  directions on one batch is all that brings noise, and it goes to zero as the iterates come to
  rest: constant rates reach the solution.

  SRBA moves both levels itself, so use ``jaxbo.online_loop(outer_loss, None, srba(...))``. A
  restart is a round of its own, on all samples: ``loop.step(state, (train, val), restart=True)``.
  Between two of them, play minibatches with ``loop.run`` or ``loop.step``; in the paper these have
  about as many samples as a restart. Without restarts the directions drift away. The losses must be
  means over the examples of a batch, of any size.

  Cost: as :func:`jaxbo.sogd`, twice the gradients and products of SOBA; of a restart, once those of
  all samples. Memory: two copies of ``x`` and ``y`` and three of ``v``. Where a table fits,
  :func:`jaxbo.saba` takes half the work for a round.

  Args:
    outer_learning_rate: :math:`\gamma`, a float or a schedule for :math:`x`, or an optimizer.
    inner_learning_rate: :math:`\rho`, a float or a schedule for :math:`y`, or an optimizer.
    inner_loss: the inner loss :math:`g`, ``inner_loss(x, y, batch) -> scalar``.
    outer_loss: the outer loss :math:`f`, ``outer_loss(x, y, batch) -> scalar``.
    linear_learning_rate: the step :math:`\eta > 0` for :math:`v`, a float or a schedule; the paper
      uses :math:`\rho`.
    radius: :math:`R > 0`, a bound on :math:`\|v\|`, or ``None``.
    project_outer: the projection on :math:`X`, or ``None``.
    project_inner: the projection on :math:`Y`, or ``None``.

  Returns:
    ``sogd(..., correction=0.0)``, on :class:`jaxbo.Bilevel` parameters.

  Example:
    >>> import jax, jax.numpy as jnp, jaxbo
    >>> inner_loss = lambda x, y, batch: 0.5 * jnp.mean((y - batch * x) ** 2)
    >>> outer_loss = lambda x, y, batch: 0.5 * jnp.mean((y - batch) ** 2)
    >>> train, val = jnp.array([0.0, 1.0, 2.0, 5.0]), jnp.array([1.0, 3.0])    # y*(x) = 2 x
    >>> outer = jaxbo.srba(0.02, 0.2, inner_loss, outer_loss, linear_learning_rate=0.2)
    >>> loop = jaxbo.online_loop(outer_loss, None, outer)
    >>> stream = jaxbo.tasks.finite_sum_stream(train, val, batch_size=1)
    >>> state = loop.init(jnp.float32(0.0), jnp.float32(0.0), stream)
    >>> @jax.jit
    ... def epoch(state):
    ...   state, _ = loop.step(state, (train, val), restart=True)
    ...   return loop.run(state, stream, 5)
    >>> for _ in range(200):
    ...   state, info = epoch(state)
    >>> print(state.x.round(4), state.y.round(4))                  # no noise is left
    1.0 2.0

  References:
    Dagréou, Moreau, Vaiter and Ablin, `A Lower Bound and a Near-Optimal Algorithm for Bilevel
    Empirical Risk Minimization <https://arxiv.org/abs/2302.08766>`_, 2024, algorithm 1; Nguyen et
    al., `SARAH <https://arxiv.org/abs/1703.00102>`_, 2017.
  """
  return sogd(
    outer_learning_rate,
    inner_learning_rate,
    inner_loss,
    outer_loss,
    linear_learning_rate=linear_learning_rate,
    correction=0.0,
    radius=radius,
    project_outer=project_outer,
    project_inner=project_inner,
  )
