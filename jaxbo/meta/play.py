"""A round of every online meta-learner: predict, detect, adapt, meta-update."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check, _tree
from jaxbo._types import Data, Loss, PyTree
from jaxbo.bilevel.loop import checked_outer_loss
from jaxbo.bilevel.response import check_solver
from jaxbo.bilevel.solution import InnerSolution, InnerSolver
from jaxbo.meta.detection import Detection, Detector, Scores
from jaxbo.meta.ood_scores import mean_score
from jaxbo.meta.rounds import (
  OnlineMetaInfo,
  OnlineMetaLearner,
  OnlineMetaState,
  Prediction,
  TaskModel,
)
from jaxbo.online.rounds import as_batch, first_round, make_run


class Played(NamedTuple):
  """What a :class:`Policy` sees of a round.

  Attributes:
    support: the data that the task's model adapted to.
    judged: the data that judge it.
    new_task: whether the adaptation began at the meta-model, bool.
    solution: the :class:`~jaxbo.InnerSolution` of the adaptation.
    anew: that of an adaptation to ``support`` from the meta-model, or ``None`` if it was not run.
    detection: the :class:`~jaxbo.meta.Detection`.
  """

  support: Data
  judged: Data
  new_task: jax.Array
  solution: InnerSolution
  anew: InnerSolution | None
  detection: Detection


class Policy(NamedTuple):
  """What an online meta-learner keeps of the rounds, and what its meta-update descends.

  Attributes:
    init: ``init(x, support) -> (meta_state, memory)``; ``memory`` is the state's ``last_support``.
    restarts: ``restarts(state) -> bool``, whether this round begins at the meta-model; ``None`` if
      the switch that is detected in the round itself decides.
    is_open: ``is_open(state, detection) -> bool``, whether there is a meta-update.
    update: ``update(state, played, **extra_args) -> (x, meta_state, loss)``; ``None`` never moves.
    keep: ``keep(state, played, is_open) -> memory``.
  """

  init: Callable[[optax.Params, Data], tuple[PyTree, PyTree]]
  restarts: Callable[[OnlineMetaState], jax.Array] | None
  is_open: Callable[[OnlineMetaState, Detection], jax.Array]
  update: Callable[..., tuple[optax.Params, PyTree, jax.Array]] | None
  keep: Callable[[OnlineMetaState, Played, jax.Array], PyTree]


def from_meta_model(
  inner: InnerSolver, start: Callable[[optax.Params], optax.Params]
) -> Callable[[optax.Params, Data], InnerSolution]:
  """Returns ``solve(x, data)``, the adaptation to ``data`` from the meta-model."""

  def solve(x, data):
    first = inner.init(start(x), x, data)
    return inner.run(x, (first.params, first.opt_state), data)

  return solve


def play(
  outer_loss: Loss,
  inner: InnerSolver,
  detector: Detector,
  policy: Policy,
  *,
  start: Callable[[optax.Params], optax.Params],
  judge_by_query: bool,
  switch_score: str,
  shift_score: str | Callable[[PyTree], jax.Array],
  shift_model: str,
  metric: Callable[[PyTree, Data], PyTree] | None,
) -> OnlineMetaLearner:
  """The arguments are those of :func:`jaxbo.meta.online_meta_learner`; some are checked here."""
  check_solver(inner)
  if not isinstance(detector, Detector):
    raise TypeError(f"detector must be a Detector, say threshold_detector(...), got {detector!r}")
  _check.takes_arguments("start", start, "x")
  if metric is not None:
    _check.takes_arguments("metric", metric, "logits", "batch")
  score_of = mean_score("shift_score", shift_score)
  loss_and_logits = checked_outer_loss(outer_loss, has_aux=True)
  solve_anew = from_meta_model(inner, start)

  def predict(x, y, data):
    value, logits = loss_and_logits(x, y, data)
    return Prediction(value, metric(logits, data) if metric is not None else ())

  def adapt(state, data, new_task):
    # New and continuing tasks share one program.
    meta, task = state.meta_params, state.task
    first = inner.init(start(meta), meta, data)
    fresh = (first.params, first.opt_state)
    goes_on = (task.y, task.opt_state)
    x, begins = _tree.where(new_task, (meta, fresh), (task.x, goes_on))
    solution = inner.run(x, begins, data)
    return solution, TaskModel(x, solution.params, solution.opt_state)

  def init(x, stream=None, *, batch=None, key=0):
    _check.floating("x", x)
    stream_state, batch = first_round(stream, batch, key, x)
    solution = inner.init(start(x), x, batch.train)
    meta_state, memory = policy.init(x, batch.train)
    state = OnlineMetaState(
      meta_params=x,
      task=TaskModel(x, solution.params, solution.opt_state),
      meta_state=meta_state,
      detector_state=detector.init(),
      initial_params=x if shift_model == "initial" else (),
      last_support=memory,
      has_support=jnp.bool_(False),
      stream_state=stream_state,
    )
    return _tree.copy(state)

  def detect_and_adapt(state, support, batch, before):
    """Returns what a round is played with, the score, the switch, and the detector's state."""
    meta, score, anew = state.meta_params, before.loss, None
    loss_of = lambda x, y: loss_and_logits(x, y, support)[0]
    # The model is at fault, not the data, if it has no finite loss while the meta-model has one.
    broken = jax.lax.cond(
      jnp.isfinite(score),
      lambda: jnp.bool_(False),
      lambda: jnp.isfinite(loss_of(meta, start(meta))),
    )

    def detect(score):
      score = jnp.where(broken, jnp.inf, score)
      return score, *detector.detect_switch(score, state.detector_state, batch)

    if policy.restarts is None:
      if switch_score == "drop":
        anew = solve_anew(meta, support)
        score = score - loss_of(meta, anew.params)
      score, switch, detector_state = detect(score)
      new_task = switch
      solution, task = adapt(state, support, new_task)
    else:
      new_task = policy.restarts(state)
      solution, task = adapt(state, support, new_task)
      if switch_score == "drop":
        score = score - loss_of(task.x, task.y)
      score, switch, detector_state = detect(score)
    return new_task, solution, task, anew, score, switch, detector_state

  def step(state, batch, **extra_args):
    played = as_batch(batch)
    support, meta = played.train, state.meta_params
    judged = played.val if judge_by_query else support
    before = predict(state.task.x, state.task.y, support)
    new_task, solution, task, anew, score, switch, detector_state = detect_and_adapt(
      state, support, batch, before
    )
    seen = {"adapted": task.x, "meta": meta, "initial": state.initial_params}[shift_model]
    seen_y = task.y if shift_model == "adapted" else start(seen)
    shift_value = score_of(loss_and_logits(seen, seen_y, support)[1])
    shift, detector_state = detector.detect_shift(shift_value, detector_state, batch, switch=switch)
    detection = Detection(switch, shift, Scores(score, shift_value))
    round = Played(support, judged, new_task, solution, anew, detection)

    def moved(update):
      new, meta_state, value = update(state, round, **extra_args)
      finite = _tree.all_finite(new)
      kept = _tree.where(finite, (new, meta_state), (meta, state.meta_state))
      return *kept, value, finite

    is_open = policy.is_open(state, detection)
    result = (meta, state.meta_state, jnp.full_like(before.loss, jnp.nan), jnp.bool_(True))
    if policy.update is not None:
      move = functools.partial(moved, policy.update)
      result = jax.lax.cond(is_open, move, lambda: result)
    new, meta_state, value, finite = result
    info = OnlineMetaInfo(
      before,
      predict(task.x, task.y, judged),
      detection,
      outer_loss=value,
      meta_updated=is_open,
      finite=finite,
      extra=played.extra,
    )
    state = state._replace(
      meta_params=new,
      task=task,
      meta_state=meta_state,
      detector_state=detector_state,
      last_support=policy.keep(state, round, is_open),
      has_support=jnp.ones_like(state.has_support),
    )
    return state, info

  return OnlineMetaLearner(init, step, make_run(step))
