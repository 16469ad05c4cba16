"""What LEEDS is compared with, from the same parts, each an ``online_meta_learner``."""

from collections.abc import Callable
from typing import Any

import optax

from jaxbo.bilevel.inner import InnerSolver
from jaxbo.meta.detection import Detector, threshold_detector
from jaxbo.meta.learner import OnlineMetaLearner, online_meta_learner

INFINITY = float("inf")


def fine_tuning(
  outer_loss: Callable[..., Any], inner: InnerSolver, **options: Any
) -> OnlineMetaLearner:
  """One model that goes on learning, whatever the task: online descent.

  It begins at the meta-model and never restarts; with a pre-trained ``x`` it is fine-tuning, with a
  random one online SGD. With :func:`jaxbo.meta.bayesian_gradient_descent` as the inner optimizer it
  is BGD.

  Args:
    outer_loss: as in :func:`jaxbo.meta.online_meta_learner`.
    inner: the inner solver; its steps are those of a round.
    **options: ``start``, ``shift_score`` and ``metric`` of :func:`jaxbo.meta.online_meta_learner`.

  Returns:
    An :class:`jaxbo.meta.OnlineMetaLearner`.

  Example:
    >>> import jax.numpy as jnp, jaxbo, optax
    >>> loss = lambda x, y, u: (0.5 * jnp.sum((x + y - u) ** 2), x + y)
    >>> inner = jaxbo.inner_solver(lambda *args: loss(*args)[0], optax.sgd(0.5), 1)
    >>> learner = jaxbo.meta.fine_tuning(loss, inner)
    >>> state = learner.init(jnp.zeros(1), batch=(jnp.ones(1), jnp.ones(1)))
    >>> for _ in range(3):
    ...   state, info = learner.step(state, (jnp.ones(1), jnp.ones(1)))
    >>> print(state.meta_params, state.task.y)
    [0.] [0.875]
  """
  return online_meta_learner(
    outer_loss, inner, None, threshold_detector(INFINITY, INFINITY), **options
  )


def frozen_maml(
  outer_loss: Callable[..., Any], inner: InnerSolver, **options: Any
) -> OnlineMetaLearner:
  """A meta-model that was learnt before the stream and stays: every round is adapted to anew.

  With inner parameters for the whole model it is the baseline MAML of OSAKA, for the head alone
  ANIL.

  Args:
    outer_loss: as in :func:`jaxbo.meta.online_meta_learner`.
    inner: the inner solver.
    **options: ``start``, ``shift_score`` and ``metric`` of :func:`jaxbo.meta.online_meta_learner`.

  Returns:
    An :class:`jaxbo.meta.OnlineMetaLearner`.

  Example:
    >>> import jax.numpy as jnp, jaxbo, optax
    >>> loss = lambda x, y, u: (0.5 * jnp.sum((x + y - u) ** 2), x + y)
    >>> inner = jaxbo.inner_solver(lambda *args: loss(*args)[0], optax.sgd(0.5), 1)
    >>> learner = jaxbo.meta.frozen_maml(loss, inner)
    >>> state = learner.init(jnp.zeros(1), batch=(jnp.ones(1), jnp.ones(1)))
    >>> for _ in range(3):
    ...   state, info = learner.step(state, (jnp.ones(1), jnp.ones(1)))
    >>> print(state.meta_params, state.task.y)
    [0.] [0.5]
  """
  never = threshold_detector(INFINITY, INFINITY)
  return online_meta_learner(outer_loss, inner, None, never, restart="always", **options)


def train_from_scratch(
  outer_loss: Callable[..., Any], inner: InnerSolver, detector: Detector, **options: Any
) -> OnlineMetaLearner:
  """Every task begins at the same, untrained parameters and learns as long as it lasts.

  Args:
    outer_loss: as in :func:`jaxbo.meta.online_meta_learner`.
    inner: the inner solver.
    detector: says where a task begins: :func:`jaxbo.meta.oracle_detector`, or one with thresholds.
    **options: those of :func:`jaxbo.meta.online_meta_learner`.

  Returns:
    An :class:`jaxbo.meta.OnlineMetaLearner`; give ``init`` parameters that were not trained.

  Example:
    >>> import jax.numpy as jnp, jaxbo, optax
    >>> loss = lambda x, y, u: (0.5 * jnp.sum((x + y - u) ** 2), x + y)
    >>> inner = jaxbo.inner_solver(lambda *args: loss(*args)[0], optax.sgd(0.5), 1)
    >>> detector = jaxbo.meta.threshold_detector(3.0, 0.0)
    >>> learner = jaxbo.meta.train_from_scratch(loss, inner, detector)
    >>> state = learner.init(jnp.zeros(1), batch=(jnp.ones(1), jnp.ones(1)))
    >>> for u in (1.0, 1.0, -4.0):
    ...   state, info = learner.step(state, (jnp.full(1, u), jnp.ones(1)))
    ...   print(state.task.y)
    [0.5]
    [0.75]
    [-2.]
  """
  return online_meta_learner(outer_loss, inner, None, detector, **options)


def meta_ogd(
  outer_loss: Callable[..., Any],
  inner: InnerSolver,
  outer: optax.GradientTransformation,
  **options: Any,
) -> OnlineMetaLearner:
  r"""Online gradient descent of the meta-model: every round is a task, and all count alike.

  .. math::
    \phi_t = U(\theta_t; S_t), \qquad
    \theta_{t+1} = \theta_t - \beta \nabla_\theta L\big(U(\theta_t; S_t); Q_t\big)

  Args:
    outer_loss: as in :func:`jaxbo.meta.online_meta_learner`.
    inner: the inner solver.
    outer: a response and an optimizer without a gate: :func:`jaxbo.itd`.
    **options: ``start``, ``query``, ``shift_score`` and ``metric`` of
      :func:`jaxbo.meta.online_meta_learner`.

  Returns:
    An :class:`jaxbo.meta.OnlineMetaLearner`.

  Example:
    >>> import jax.numpy as jnp, jaxbo, optax
    >>> loss = lambda x, y, u: (0.5 * jnp.sum((x + y - u) ** 2), x + y)
    >>> inner = jaxbo.inner_solver(lambda *args: loss(*args)[0], optax.sgd(0.5), 1)
    >>> learner = jaxbo.meta.meta_ogd(loss, inner, jaxbo.itd(1.0, inner))
    >>> state = learner.init(jnp.zeros(1), batch=(jnp.ones(1), jnp.ones(1)))
    >>> for _ in range(2):
    ...   state, info = learner.step(state, (jnp.ones(1), jnp.ones(1)))
    ...   print(state.meta_params)
    [0.25]
    [0.4375]
  """
  never = threshold_detector(INFINITY, INFINITY)
  return online_meta_learner(outer_loss, inner, outer, never, restart="always", **options)
