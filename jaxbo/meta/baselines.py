"""Baselines for LEEDS, built from the same parts; each is an ``online_meta_learner``."""

from collections.abc import Callable

import jax
import optax

from jaxbo._types import Data, Loss, PyTree
from jaxbo.bilevel.solution import InnerSolver
from jaxbo.meta.detection import Detector, threshold_detector
from jaxbo.meta.learner import online_meta_learner
from jaxbo.meta.rounds import OnlineMetaLearner

INFINITY = float("inf")


def fine_tuning(
  outer_loss: Loss,
  inner: InnerSolver,
  *,
  start: Callable[[optax.Params], optax.Params] = optax.tree.zeros_like,
  query: str = "given",
  shift_score: str | Callable[[PyTree], jax.Array] = "energy",
  metric: Callable[[PyTree, Data], PyTree] | None = None,
) -> OnlineMetaLearner:
  """A baseline: one model that keeps learning across all tasks, by online descent.

  The model starts at the meta-model and never restarts. A pre-trained ``x`` makes it fine-tuning, a
  random ``x`` online SGD. With :func:`jaxbo.meta.bayesian_gradient_descent` as the inner optimizer
  it is BGD.

  Args:
    outer_loss: :math:`L`, ``outer_loss(x, y, batch) -> (scalar, logits)``, the mean loss of a model
      on labeled data.
    inner: the inner solver; each round runs its ``num_steps`` steps.
    start: ``start(x) -> y``, where an adaptation begins; by default zeros shaped like ``x``.
    query: the data that the adapted model is judged on: ``"given"`` for the query set,
      ``batch.val``; ``"same"`` for the data that it learned from.
    shift_score: ``"energy"``, ``"entropy"``, ``"max_softmax"``, or a function from the logits to
      scores ``[batch]``. The learner logs the mean; nothing depends on it.
    metric: ``metric(logits, batch)``, a quantity to report with the loss.

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
  outer_loss: Loss,
  inner: InnerSolver,
  *,
  start: Callable[[optax.Params], optax.Params] = optax.tree.zeros_like,
  query: str = "given",
  shift_score: str | Callable[[PyTree], jax.Array] = "energy",
  metric: Callable[[PyTree, Data], PyTree] | None = None,
) -> OnlineMetaLearner:
  """A baseline: each round adapts a meta-model that was trained before the stream and stays fixed.

  If the inner parameters cover the whole model, this is the baseline MAML of OSAKA; for the head
  alone, it is ANIL.

  Args:
    outer_loss: :math:`L`, ``outer_loss(x, y, batch) -> (scalar, logits)``, the mean loss of a model
      on labeled data.
    inner: the inner solver.
    start: ``start(x) -> y``, where an adaptation begins; by default zeros shaped like ``x``.
    query: the data that the adapted model is judged on: ``"given"`` for the query set,
      ``batch.val``; ``"same"`` for the data that it learned from.
    shift_score: ``"energy"``, ``"entropy"``, ``"max_softmax"``, or a function from the logits to
      scores ``[batch]``. The learner logs the mean; nothing depends on it.
    metric: ``metric(logits, batch)``, a quantity to report with the loss.

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
  outer_loss: Loss,
  inner: InnerSolver,
  detector: Detector,
  *,
  start: Callable[[optax.Params], optax.Params] = optax.tree.zeros_like,
  query: str = "given",
  switch_score: str = "loss",
  shift_score: str | Callable[[PyTree], jax.Array] = "energy",
  metric: Callable[[PyTree, Data], PyTree] | None = None,
) -> OnlineMetaLearner:
  """A baseline without meta-learning: each task learns from the same untrained parameters.

  Args:
    outer_loss: :math:`L`, ``outer_loss(x, y, batch) -> (scalar, logits)``, the mean loss of a model
      on labeled data.
    inner: the inner solver.
    detector: decides where a task begins: :func:`jaxbo.meta.oracle_detector`, or
      :func:`jaxbo.meta.threshold_detector`.
    start: ``start(x) -> y``, where an adaptation begins; by default zeros shaped like ``x``.
    query: the data that the adapted model is judged on: ``"given"`` for the query set,
      ``batch.val``; ``"same"`` for the data that it learned from.
    switch_score: the score that the detector sees: ``"loss"``, the loss of the last model on the
      new data; or ``"drop"``, that loss minus the loss of a model adapted to the data from scratch.
    shift_score: ``"energy"``, ``"entropy"``, ``"max_softmax"``, or a function from the logits to
      scores ``[batch]``. The learner logs the mean; no model depends on it.
    metric: ``metric(logits, batch)``, a quantity to report with the loss.

  Returns:
    An :class:`jaxbo.meta.OnlineMetaLearner`. Pass untrained parameters to its ``init``.

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
  outer_loss: Loss,
  inner: InnerSolver,
  outer: optax.GradientTransformation,
  *,
  start: Callable[[optax.Params], optax.Params] = optax.tree.zeros_like,
  query: str = "given",
  shift_score: str | Callable[[PyTree], jax.Array] = "energy",
  metric: Callable[[PyTree, Data], PyTree] | None = None,
) -> OnlineMetaLearner:
  r"""Online gradient descent of the meta-model: every round is a task, and all count alike.

  .. math::
    \phi_t = U(\theta_t; S_t), \qquad
    \theta_{t+1} = \theta_t - \beta \nabla_\theta L\big(U(\theta_t; S_t); Q_t\big)

  Args:
    outer_loss: :math:`L`, ``outer_loss(x, y, batch) -> (scalar, logits)``, the mean loss of a model
      on labeled data.
    inner: the inner solver.
    outer: a response and an optimizer without a gate, such as :func:`jaxbo.itd`.
    start: ``start(x) -> y``, where an adaptation begins; by default zeros shaped like ``x``.
    query: the data whose loss the meta-update descends. ``"given"``: the query set, ``batch.val``.
      ``"same"``: :math:`S_t` itself. ``"next"``: :math:`S_t`, after an adaptation to
      :math:`S_{t-1}`.
    shift_score: ``"energy"``, ``"entropy"``, ``"max_softmax"``, or a function from the logits to
      scores ``[batch]``. The learner logs the mean; nothing depends on it.
    metric: ``metric(logits, batch)``, a quantity to report with the loss.

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
