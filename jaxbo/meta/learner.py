"""The loop of an online meta-learner: predict, detect, adapt, meta-update."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check, _tree
from jaxbo.bilevel.inner import InnerSolution, InnerSolver
from jaxbo.bilevel.loop import checked_outer_loss, outer_gradients
from jaxbo.bilevel.response import check_solver
from jaxbo.meta.detection import Detection, Detector, Scores
from jaxbo.meta.gate import gate_is_open
from jaxbo.meta.ood_scores import mean_score
from jaxbo.meta.rounds import (
  OnlineMetaInfo,
  OnlineMetaState,
  Prediction,
  TaskModel,
  is_broken,
  make_run,
)
from jaxbo.online.rounds import as_batch
from jaxbo.tasks.task_streams import TaskStream


class OnlineMetaLearner(NamedTuple):
  """An online meta-learner, made by :func:`online_meta_learner`.

  Attributes:
    init: ``init(x, batch=None, *, stream=None, key=0) -> OnlineMetaState``. It is given a stream,
      or a batch (shapes are enough).
    step: ``step(state, batch, **extra_args) -> (OnlineMetaState, OnlineMetaInfo)``, one round;
      extra arguments go to the ``update`` of the transformation.
    run: ``run(state, stream, num_rounds) -> (OnlineMetaState, OnlineMetaInfo)``, one ``lax.scan``.
  """

  init: Callable[..., OnlineMetaState]
  step: Callable[..., tuple[OnlineMetaState, OnlineMetaInfo]]
  run: Callable[[OnlineMetaState, TaskStream, int], tuple[OnlineMetaState, OnlineMetaInfo]]


def online_meta_learner(
  outer_loss: Callable[..., Any],
  inner: InnerSolver,
  outer: optax.GradientTransformation | None,
  detector: Detector,
  *,
  start: Callable[[optax.Params], optax.Params] = optax.tree.zeros_like,
  restart: str = "switch",
  query: str = "given",
  switch_score: str = "loss",
  shift_score: str | Callable[[Any], jax.Array] = "energy",
  shift_model: str = "adapted",
  metric: Callable[[Any, Any], Any] | None = None,
) -> OnlineMetaLearner:
  r"""The loop of an online meta-learner that is not told when tasks change.

  Round :math:`t` brings labelled data :math:`S_t`, and :math:`Q_t` to be judged by. With
  :math:`U(\theta; S)` the inner run from the meta-model:

  1. **Predict**: the previous task's model :math:`\phi_{t-1}` on :math:`S_t`, before its labels are
     used.
  2. **Detect a switch** from the score :math:`s_t = L(\phi_{t-1}; S_t)`.
  3. **Adapt**: :math:`\phi_t = U(\theta_t; S_t)` after a switch, else the inner run continues from
     :math:`\phi_{t-1}`.
  4. **Detect a shift** from the score :math:`e_t`, the mean of :math:`-T \log \sum_c e^{m_c / T}`
     over the logits of :math:`\phi_t` on :math:`S_t`.
  5. **Meta-update** by ``outer``, along its response's estimate of :math:`\nabla_\theta
     L(U(\theta_t; S_t); Q_t)`. Where a gate in it is closed nothing of this is computed.

  The inner parameters ``y`` are an offset of ``x``, or of a part of it, or any others: the two
  losses say what a pair ``(x, y)`` predicts, and ``start`` where ``y`` begins. MAML is the loss of
  ``x + y`` from zero, ANIL the same for the head alone. Every response fits: unrolled (MAML),
  dropped (its first-order approximation), implicit (needs a proximal term in the inner loss),
  evolution strategies (ESJ).

  What is computed in a round: one forward pass to predict, the inner run, one or two passes for the
  shift score and the judgement; and where the gate is open, a gradient of the loss and the response
  (and one inner run more if the task goes on). Memory: the meta-model, the task's model, which is
  the pair ``(x, y)`` so that it stays what it was when ``x`` moves on, the states of the optimizer
  and of the detectors; no data.

  The text of the algorithm was not available to us. Fixed by its abstract are the two detectors,
  that the switch decides which model is adapted, that the shift decides how fast the meta-model
  learns, and that no old data are kept. The rest is our reading; each open question is an argument:

  =========================================  ================================================
  which score detects a switch               ``switch_score``
  which detects a shift, of which model      ``shift_score``, ``shift_model``
  how far the meta-model goes in each case   the scales of :func:`jaxbo.gate_by_detection`
  what judges the adapted model              ``query``, and ``num_queries`` of the stream
  first or second order                      the response in ``outer``
  learned inner rates                        a part of ``x`` that scales ``y`` in both losses
  thresholds                                 ``detector``, :func:`jaxbo.meta.calibrate`
  =========================================  ================================================

  A round whose loss or gradient is not finite moves nothing: the solver stays where it began, and
  the meta-update is skipped (``info.finite``). A task's model that overflows (its loss is not
  finite where that of the meta-model is) has an infinite switch score, so that it is given up.

  Args:
    outer_loss: :math:`L`, ``outer_loss(x, y, batch) -> (scalar, logits)``, the mean loss of a model
      on labelled data, as the stream gives them. Beside it may stand anything that ``shift_score``
      and ``metric`` understand, where these are functions.
    inner: the inner solver; its steps are those of a round. A task goes on with the state of the
      inner optimizer, and a new one begins with a fresh state.
    outer: an optax chain that begins with a response: :func:`jaxbo.leeds`. ``update`` is given
      ``detection=`` and ``value=``, the outer loss. ``None`` leaves the meta-model as it is.
    detector: :func:`jaxbo.meta.threshold_detector`, or :func:`jaxbo.meta.oracle_detector`, which
      sees the batch.
    start: ``start(x) -> y``, where an adaptation begins; zeros like ``x`` if not given. The
      responses take it as constant.
    restart: ``"switch"``: the adaptation restarts from the meta-model when a switch is detected.
      ``"always"``: in every round.
    query: what the meta-gradient judges. ``"given"``: the query set of the batch, ``batch.val``.
      ``"same"``: :math:`S_t` itself. ``"next"``: C-MAML's pairs of rounds,
      :math:`\nabla_\theta L(U(\theta_t; S_{t-1}); S_t)`, adapted again at the current meta-model;
      it keeps the last data.
    switch_score: ``"loss"``: :math:`L(\phi_{t-1}; S_t)`. ``"drop"``, C-MAML's: that minus
      :math:`L(U(\theta_t; S_t); S_t)`, which takes an inner run in every round.
    shift_score: ``"energy"``, ``"entropy"``, ``"max_softmax"`` (one minus it, so that high scores
      are unknown data), or a function of what stands beside the loss, ``[batch]``; the mean is
      the score.
    shift_model: which model the shift score looks at: ``"adapted"`` :math:`\phi_t`, ``"meta"``
      :math:`\theta_t`, or ``"initial"`` :math:`\theta_1`, which is kept.
    metric: ``metric(logits, batch)``, what to report beside the loss, say the accuracy.

  Returns:
    An :class:`OnlineMetaLearner`: ``init``, ``step`` and ``run``, all pure. Two runs of 500 rounds
    are one of 1,000, bit for bit.

  Raises:
    ValueError: for another ``restart``, ``query``, ``switch_score``, ``shift_score`` or
      ``shift_model``; if ``outer`` does not begin with a response.
    TypeError: if a function does not take its arguments; if ``outer_loss`` gives no pair.

  Example:
    >>> import jax, jax.numpy as jnp, jaxbo, optax
    >>> def loss(x, y, samples):                          # learn the mean of the samples
    ...   miss = x + y - samples.mean(axis=0)
    ...   return 0.5 * jnp.sum(miss**2), miss
    >>> inner = jaxbo.inner_solver(lambda *args: loss(*args)[0], optax.sgd(0.5), num_steps=1)
    >>> stream = jaxbo.tasks.moving_gaussian_stream(2, 5, stay_probability=0.9, domain_step=0.0)
    >>> learner = jaxbo.meta.online_meta_learner(
    ...   loss, inner, jaxbo.leeds(1.0, inner, in_distribution_scale=0.5),
    ...   jaxbo.meta.threshold_detector(switch=0.5, shift=1.0), shift_score=jnp.linalg.norm)
    >>> state = learner.init(jnp.zeros(2), stream=stream, key=0)
    >>> run = jax.jit(learner.run, static_argnums=2)
    >>> state, history = run(state, stream, 1000)
    >>> float(history.before.loss[-100:].mean()) < 0.5    # a switch costs about 2
    True
    >>> bool(jnp.all(abs(state.meta_params + 5) < 1))     # tasks are around -5
    True

  References:
    Sow, Lin, Liang and Zhang, `Algorithm Design for Online Meta-Learning with Task Boundary
    Detection <https://arxiv.org/abs/2302.00857>`_, 2024; Finn, Abbeel and Levine, `Model-Agnostic
    Meta-Learning <https://arxiv.org/abs/1703.03400>`_, 2017.
  """
  check_solver(inner)
  if outer is not None:
    _check.transformation("outer", outer)
  if not isinstance(detector, Detector):
    raise TypeError(f"detector must be a Detector, say threshold_detector(...), got {detector!r}")
  _check.takes_arguments("start", start, "x")
  _check.one_of("restart", restart, ("switch", "always"))
  _check.one_of("query", query, ("given", "same", "next"))
  _check.one_of("switch_score", switch_score, ("loss", "drop"))
  _check.one_of("shift_model", shift_model, ("adapted", "meta", "initial"))
  if metric is not None:
    _check.takes_arguments("metric", metric, "logits", "batch")
  score_of = mean_score("shift_score", shift_score)
  differentiate = None if outer is None else outer_gradients(outer_loss, outer, has_aux=True)
  loss_and_logits = checked_outer_loss(outer_loss, has_aux=True)

  def begin(x, data) -> InnerSolution:
    return inner.init(start(x), x, data)

  def predict(x, y, data):
    value, logits = loss_and_logits(x, y, data)
    return Prediction(value, metric(logits, data) if metric is not None else ())

  def init(x, batch=None, *, stream=None, key=0):
    _check.floating("x", x)
    if (batch is None) == (stream is None):
      raise ValueError("init must be given either a stream or a batch, whose shapes are enough")
    stream_state = ()
    if stream is not None:
      stream_state = stream.init(key)
      batch = jax.eval_shape(lambda state: stream.step(state)[1], stream_state)
    support = as_batch(batch).train
    solution = begin(x, support)
    zeros = lambda leaf: jnp.zeros(jnp.shape(leaf), jnp.result_type(leaf))
    state = OnlineMetaState(
      meta_params=x,
      task=TaskModel(x, solution.params, solution.opt_state),
      meta_state=() if outer is None else outer.init(x),
      detector_state=detector.init(),
      initial_params=x if shift_model == "initial" else (),
      last_support=jax.tree.map(zeros, support) if query == "next" else (),
      has_support=jnp.bool_(False),
      task_stream_state=stream_state,
    )
    return _tree.copy(state)

  def adapt(state, support, new_task):
    """The inner run of the round: both kinds are one program, from different starts."""
    meta, task = state.meta_params, state.task
    old = (task.y, task.opt_state)
    fresh = begin(meta, support)
    goes_on = fresh._replace(params=task.y, opt_state=task.opt_state, start=old)
    x, begins = _tree.where(new_task, (meta, fresh), (task.x, goes_on))
    solution = inner.solve(x, begins, support)
    return solution, TaskModel(x, solution.params, solution.opt_state)

  def meta_update(differentiate, state, solution, support, judged, **extra_args):
    """The new meta-model and its state, the loss, and whether all was finite."""
    meta, old_state = state.meta_params, state.meta_state
    updates, new_state, value, _ = differentiate(
      meta, solution.params, old_state, judged, solution=solution, batch=support, **extra_args
    )
    new = optax.apply_updates(meta, updates)
    finite = _tree.all_finite(new)
    return *_tree.where(finite, (new, new_state), (meta, old_state)), value, finite

  def step(state, batch, **extra_args):
    played = as_batch(batch)
    support, meta = played.train, state.meta_params
    judged = played.val if query == "given" else support
    before = predict(state.task.x, state.task.y, support)

    solve_anew = lambda data: inner.solve(meta, begin(meta, data), data)
    score, drop_run = before.loss, None
    if switch_score == "drop":
      drop_run = solve_anew(support)
      score = score - loss_and_logits(meta, drop_run.params, support)[0]
    broken = is_broken(before.loss, lambda: loss_and_logits(meta, start(meta), support)[0])
    score = jnp.where(broken, jnp.inf, score)
    switch, detector_state = detector.detect_switch(score, state.detector_state, batch)
    new_task = jnp.ones_like(switch) if restart == "always" else switch
    solution, task = adapt(state, support, new_task)

    seen = {"adapted": task.x, "meta": meta, "initial": state.initial_params}[shift_model]
    seen_y = task.y if shift_model == "adapted" else start(seen)
    shift_value = score_of(loss_and_logits(seen, seen_y, support)[1])
    shift, detector_state = detector.detect_shift(shift_value, detector_state, batch, switch=switch)
    detection = Detection(switch, shift, Scores(score, shift_value))

    def update():
      if query == "next":
        data, anew = (state.last_support, support), solve_anew(state.last_support)
      else:
        data, anew = (support, judged), drop_run
        if anew is None:
          anew = jax.lax.cond(new_task, lambda: solution, lambda: solve_anew(support))
      return meta_update(differentiate, state, anew, *data, detection=detection, **extra_args)

    is_open = jnp.bool_(outer is not None) & gate_is_open(state.meta_state, detection)
    if query == "next":
      is_open &= state.has_support
    result = (meta, state.meta_state, jnp.full_like(before.loss, jnp.nan), jnp.bool_(True))
    if outer is not None:
      result = jax.lax.cond(is_open, update, lambda: result)
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
      last_support=support if query == "next" else (),
      has_support=jnp.ones_like(state.has_support),
    )
    return state, info

  return OnlineMetaLearner(init, step, make_run(step))
