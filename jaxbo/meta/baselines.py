"""What LEEDS is compared with, from the same parts, each an ``online_meta_learner``."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from jaxbo.bilevel.inner import InnerSolver
from jaxbo.meta.detection import Detector, threshold_detector
from jaxbo.meta.learner import OnlineMetaLearner, online_meta_learner

INFINITY = float("inf")


def fine_tuning(
  outer_loss: Callable[..., Any],
  inner: InnerSolver,
  *,
  start: Callable[[optax.Params], optax.Params] = optax.tree.zeros_like,
  query: str = "given",
  shift_score: str | Callable[[Any], jax.Array] = "energy",
  metric: Callable[[Any, Any], Any] | None = None,
) -> OnlineMetaLearner:
  """One model that goes on learning, whatever the task: online descent.

  It begins at the meta-model and never restarts; with a pre-trained ``x`` it is fine-tuning, with a
  random one online SGD. With :func:`jaxbo.meta.bayesian_gradient_descent` as the inner optimizer it
  is BGD.

  Args:
    outer_loss: as in :func:`jaxbo.meta.online_meta_learner`.
    inner: the inner solver; its steps are those of a round.
    start: as in :func:`jaxbo.meta.online_meta_learner`, like all that follow.
    query: what the adapted model is judged on.
    shift_score: it is logged; nothing depends on it.
    metric: what to report beside the loss.

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
  never = threshold_detector(INFINITY, INFINITY)
  return online_meta_learner(
    outer_loss, inner, None, never, start=start, query=query, shift_score=shift_score, metric=metric
  )


def frozen_maml(
  outer_loss: Callable[..., Any],
  inner: InnerSolver,
  *,
  start: Callable[[optax.Params], optax.Params] = optax.tree.zeros_like,
  query: str = "given",
  shift_score: str | Callable[[Any], jax.Array] = "energy",
  metric: Callable[[Any, Any], Any] | None = None,
) -> OnlineMetaLearner:
  """A meta-model that was learnt before the stream and stays: every round is adapted to anew.

  With inner parameters for the whole model it is the baseline MAML of OSAKA, for the head alone
  ANIL.

  Args:
    outer_loss: as in :func:`jaxbo.meta.online_meta_learner`.
    inner: the inner solver.
    start: as in :func:`jaxbo.meta.online_meta_learner`, like all that follow.
    query: what the adapted model is judged on.
    shift_score: it is logged; nothing depends on it.
    metric: what to report beside the loss.

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
  return online_meta_learner(
    outer_loss,
    inner,
    None,
    never,
    restart="always",
    start=start,
    query=query,
    shift_score=shift_score,
    metric=metric,
  )


def train_from_scratch(
  outer_loss: Callable[..., Any],
  inner: InnerSolver,
  detector: Detector,
  *,
  start: Callable[[optax.Params], optax.Params] = optax.tree.zeros_like,
  query: str = "given",
  switch_score: str = "loss",
  shift_score: str | Callable[[Any], jax.Array] = "energy",
  metric: Callable[[Any, Any], Any] | None = None,
) -> OnlineMetaLearner:
  """Every task begins at the same, untrained parameters and learns as long as it lasts.

  Args:
    outer_loss: as in :func:`jaxbo.meta.online_meta_learner`.
    inner: the inner solver.
    detector: says where a task begins: :func:`jaxbo.meta.oracle_detector`, or one with thresholds.
    start: as in :func:`jaxbo.meta.online_meta_learner`, like all that follow.
    query: what the adapted model is judged on.
    switch_score: which score the detector sees.
    shift_score: it is logged; nothing depends on it.
    metric: what to report beside the loss.

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
  return online_meta_learner(
    outer_loss,
    inner,
    None,
    detector,
    switch_score=switch_score,
    start=start,
    query=query,
    shift_score=shift_score,
    metric=metric,
  )


def meta_ogd(
  outer_loss: Callable[..., Any],
  inner: InnerSolver,
  outer: optax.GradientTransformation,
  *,
  start: Callable[[optax.Params], optax.Params] = optax.tree.zeros_like,
  query: str = "given",
  shift_score: str | Callable[[Any], jax.Array] = "energy",
  metric: Callable[[Any, Any], Any] | None = None,
) -> OnlineMetaLearner:
  r"""Online gradient descent of the meta-model: every round is a task, and all count alike.

  .. math::
    \phi_t = U(\theta_t; S_t), \qquad
    \theta_{t+1} = \theta_t - \beta \nabla_\theta L\big(U(\theta_t; S_t); Q_t\big)

  Args:
    outer_loss: as in :func:`jaxbo.meta.online_meta_learner`.
    inner: the inner solver.
    outer: a response and an optimizer without a gate: :func:`jaxbo.itd`.
    start: as in :func:`jaxbo.meta.online_meta_learner`, like all that follow.
    query: what the meta-gradient judges.
    shift_score: it is logged; nothing depends on it.
    metric: what to report beside the loss.

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
  return online_meta_learner(
    outer_loss,
    inner,
    outer,
    never,
    restart="always",
    query=query,
    start=start,
    shift_score=shift_score,
    metric=metric,
  )
