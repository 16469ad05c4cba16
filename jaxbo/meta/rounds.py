"""Rounds of an online meta-learner: what it keeps between them, what it reports, and their scan."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check
from jaxbo.meta.detection import Detection


class TaskModel(NamedTuple):
  """The model of the current task: the pair that predicts.

  Attributes:
    x: the meta-parameters that it was adapted from.
    y: the inner parameters.
    opt_state: the state of the inner optimizer.
  """

  x: optax.Params
  y: optax.Params
  opt_state: optax.OptState


class OnlineMetaState(NamedTuple):
  r"""State of :func:`jaxbo.meta.online_meta_learner`: all that the next round needs.

  Attributes:
    meta_params: the meta-model, :math:`\theta_t`.
    task: the :class:`TaskModel`, :math:`\phi_{t-1}`.
    meta_state: the state of the outer transformation; ``()`` without one.
    detector_state: the state of the detector.
    initial_params: the meta-model at the start; ``()`` unless ``shift_model="initial"``.
    last_support: the last data; ``()`` unless ``query="next"``; for :func:`jaxbo.meta.c_maml_pap`
      the :class:`jaxbo.meta.SupportBuffer`.
    has_support: whether there was a round before, bool.
    task_stream_state: the state of the stream; ``()`` without one.
  """

  meta_params: optax.Params
  task: TaskModel
  meta_state: optax.OptState
  detector_state: Any
  initial_params: Any
  last_support: Any
  has_support: jax.Array
  task_stream_state: Any


class Prediction(NamedTuple):
  """How a model does on labelled data.

  Attributes:
    loss: the loss, a scalar.
    metric: what ``metric`` gave; ``()`` without one.
  """

  loss: jax.Array
  metric: Any


class OnlineMetaInfo(NamedTuple):
  r"""Diagnostics of one round; of all rounds, with a leading axis, after a run.

  Attributes:
    before: the :class:`Prediction` of the previous task's model :math:`\phi_{t-1}` on the new data,
      before their labels are used; in the first round that of the meta-model.
    after: that of the adapted model :math:`\phi_t`, on the query set for ``query="given"``, else on
      the data that it was adapted to.
    detection: the :class:`jaxbo.meta.Detection`, with its scores.
    outer_loss: the loss that the meta-update descends; NaN without one.
    meta_updated: whether there was a meta-update, bool.
    finite: whether it was finite; if not, it was left out.
    extra: ``batch.extra``, the truth about the round.
  """

  before: Prediction
  after: Prediction
  detection: Detection
  outer_loss: jax.Array
  meta_updated: jax.Array
  finite: jax.Array
  extra: Any


def is_broken(loss: jax.Array, meta_loss: Callable[[], jax.Array]) -> jax.Array:
  """Whether a task's model has no finite loss where the meta-model has: it is not the data then."""
  return jax.lax.cond(
    jnp.isfinite(loss), lambda: jnp.bool_(False), lambda: jnp.isfinite(meta_loss())
  )


def make_run(step: Callable[..., Any]) -> Callable[..., Any]:
  """The function ``run(state, stream, num_rounds)`` of a learner's ``step``: one scan."""

  def run(state, stream, num_rounds):
    num_rounds = _check.positive_int("num_rounds", num_rounds)
    if type(state.task_stream_state) is tuple and not state.task_stream_state:
      raise ValueError("run needs a state from init(x, stream=stream), got one without a stream")

    def body(state, _):
      stream_state, batch = stream.step(state.task_stream_state)
      return step(state._replace(task_stream_state=stream_state), batch)

    return jax.lax.scan(body, state, length=num_rounds)

  return run
