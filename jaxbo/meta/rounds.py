"""An online meta-learner from outside: its functions, its state and its report."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import optax

from jaxbo._types import PyTree
from jaxbo.meta.detection import Detection
from jaxbo.tasks.streams import StreamLike


class TaskModel(NamedTuple):
  """The model of the current task: the pair ``(x, y)`` that predicts.

  Attributes:
    x: the meta-parameters from which the model was adapted.
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
    last_support: the data of the last round with ``query="next"``; the
      :class:`jaxbo.meta.SupportBuffer` of :func:`jaxbo.meta.c_maml_pap`; ``()`` otherwise.
    has_support: whether a round was played before, bool.
    stream_state: the state of the stream; ``()`` without one.
  """

  meta_params: optax.Params
  task: TaskModel
  meta_state: optax.OptState
  detector_state: PyTree
  initial_params: PyTree
  last_support: PyTree
  has_support: jax.Array
  stream_state: PyTree


class Prediction(NamedTuple):
  """The quality of a model on labeled data.

  Attributes:
    loss: the loss, a scalar.
    metric: the value of ``metric``; ``()`` without one.
  """

  loss: jax.Array
  metric: PyTree


class OnlineMetaInfo(NamedTuple):
  r"""Diagnostics of one round. ``run`` stacks those of all rounds along a leading axis.

  Attributes:
    before: the :class:`Prediction` of the previous task's model :math:`\phi_{t-1}` on the new data,
      before it learns from their labels; in the first round, that of the meta-model.
    after: the :class:`Prediction` of the adapted model :math:`\phi_t`: on the query set with
      ``query="given"``, otherwise on the data of its adaptation.
    detection: the :class:`jaxbo.meta.Detection`, with its scores.
    outer_loss: the loss that the meta-update descends; NaN without a meta-update.
    meta_updated: whether the learner computed a meta-update, bool.
    finite: whether the meta-update was finite; if not, it was skipped.
    extra: ``batch.extra``, the truth about the round.
  """

  before: Prediction
  after: Prediction
  detection: Detection
  outer_loss: jax.Array
  meta_updated: jax.Array
  finite: jax.Array
  extra: PyTree


class OnlineMetaLearner(NamedTuple):
  """An online meta-learner, made by :func:`~jaxbo.meta.online_meta_learner`.

  Attributes:
    init: ``init(x, stream=None, *, batch=None, key=0) -> OnlineMetaState``. Pass either a stream or
      a batch; the batch may hold shapes only.
    step: ``step(state, batch, **extra_args) -> (OnlineMetaState, OnlineMetaInfo)``, one round.
      Extra arguments go to ``outer.update``.
    run: ``run(state, stream, num_rounds) -> (OnlineMetaState, OnlineMetaInfo)``, one ``lax.scan``.
      The state must come from ``init`` with a stream. A stream is a :class:`jaxbo.tasks.Stream`, or
      a function for :func:`jaxbo.tasks.function_stream`.
  """

  init: Callable[..., OnlineMetaState]
  step: Callable[..., tuple[OnlineMetaState, OnlineMetaInfo]]
  run: Callable[[OnlineMetaState, StreamLike, int], tuple[OnlineMetaState, OnlineMetaInfo]]
