"""What all online meta-learners do with a task: begin it, predict, adapt; and their first state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check, _tree
from jaxbo._types import Loss
from jaxbo.bilevel.inner import InnerSolution, InnerSolver
from jaxbo.bilevel.loop import checked_outer_loss
from jaxbo.bilevel.response import check_solver
from jaxbo.meta.detection import Detector
from jaxbo.meta.rounds import OnlineMetaState, Prediction, TaskModel
from jaxbo.online.rounds import first_round


class TaskLearner(NamedTuple):
  """A learner of tasks, made by :func:`task_learner`.

  Attributes:
    begin: ``begin(x, data) -> InnerSolution``, where an adaptation from the meta-model begins.
    predict: ``predict(x, y, data) -> (Prediction, logits)``.
    adapt: ``adapt(state, data, new_task) -> (InnerSolution, TaskModel)``, one inner run.
    init: ``init(x, stream, batch, key, of_support) -> OnlineMetaState``, where
      ``of_support(support)`` gives the fields that depend on the learner.
  """

  begin: Callable[[optax.Params, Any], InnerSolution]
  predict: Callable[[optax.Params, optax.Params, Any], tuple[Prediction, Any]]
  adapt: Callable[[OnlineMetaState, Any, jax.Array], tuple[InnerSolution, TaskModel]]
  init: Callable[..., OnlineMetaState]


def task_learner(
  outer_loss: Loss,
  inner: InnerSolver,
  detector: Detector,
  start: Callable[[optax.Params], optax.Params],
  metric: Callable[[Any, Any], Any] | None,
) -> TaskLearner:
  """The arguments are those of :func:`jaxbo.meta.online_meta_learner`, and checked here."""
  check_solver(inner)
  if not isinstance(detector, Detector):
    raise TypeError(f"detector must be a Detector, say threshold_detector(...), got {detector!r}")
  _check.takes_arguments("start", start, "x")
  if metric is not None:
    _check.takes_arguments("metric", metric, "logits", "batch")
  loss_and_logits = checked_outer_loss(outer_loss, has_aux=True)

  def begin(x, data):
    return inner.init(start(x), x, data)

  def predict(x, y, data):
    value, logits = loss_and_logits(x, y, data)
    return Prediction(value, metric(logits, data) if metric is not None else ()), logits

  def adapt(state, data, new_task):
    # New and continuing tasks share one program.
    meta, task = state.meta_params, state.task
    fresh = begin(meta, data)
    old = (task.y, task.opt_state)
    goes_on = fresh._replace(params=task.y, opt_state=task.opt_state, start=old)
    x, begins = _tree.where(new_task, (meta, fresh), (task.x, goes_on))
    solution = inner.solve(x, begins, data)
    return solution, TaskModel(x, solution.params, solution.opt_state)

  def init(x, stream, batch, key, of_support):
    _check.floating("x", x)
    stream_state, batch = first_round(stream, batch, key)
    support = batch.train
    solution = begin(x, support)
    state = OnlineMetaState(
      meta_params=x,
      task=TaskModel(x, solution.params, solution.opt_state),
      detector_state=detector.init(),
      has_support=jnp.bool_(False),
      stream_state=stream_state,
      **of_support(support),
    )
    return _tree.copy(state)

  return TaskLearner(begin, predict, adapt, init)
