"""The loop of an online meta-learner: predict, detect, adapt, meta-update."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check
from jaxbo._types import Data, Loss, PyTree
from jaxbo.bilevel.loop import outer_gradients
from jaxbo.bilevel.solution import InnerSolver
from jaxbo.meta.detection import Detector
from jaxbo.meta.gate import gate_is_open
from jaxbo.meta.play import Policy, from_meta_model, play
from jaxbo.meta.rounds import OnlineMetaLearner


def online_meta_learner(
  outer_loss: Loss,
  inner: InnerSolver,
  outer: optax.GradientTransformation | None,
  detector: Detector,
  *,
  start: Callable[[optax.Params], optax.Params] = optax.tree.zeros_like,
  restart: str = "switch",
  query: str = "given",
  switch_score: str = "loss",
  shift_score: str | Callable[[PyTree], jax.Array] = "energy",
  shift_model: str = "adapted",
  metric: Callable[[PyTree, Data], PyTree] | None = None,
) -> OnlineMetaLearner:
  r"""Builds the loop of an online meta-learner that is not told when tasks change.

  Round :math:`t` brings labeled data :math:`S_t` and query data :math:`Q_t`. With the meta-model
  :math:`\theta_t`, the task's model :math:`\phi_t` and the inner run :math:`U(\theta; S)` on
  :math:`S` from :math:`\theta`, it has five steps:

  1. **Predict**: :math:`\phi_{t-1}` predicts on :math:`S_t` before it learns from the labels.
  2. **Detect a switch** of the task from the score :math:`s_t = L(\phi_{t-1}; S_t)`.
  3. **Adapt**: after a switch, :math:`\phi_t = U(\theta_t; S_t)`. Otherwise the inner run continues
     from :math:`\phi_{t-1}`.
  4. **Detect a shift** of the distribution from the score :math:`e_t`: the mean energy :math:`-T
     \log \sum_c e^{m_c / T}`, at :math:`T = 1`, of the logits :math:`m` of :math:`\phi_t` on
     :math:`S_t`.
  5. **Meta-update**: ``outer`` moves :math:`\theta_t` along its estimate of :math:`\nabla_\theta
     L(U(\theta_t; S_t); Q_t)`. A closed gate in ``outer`` skips the whole computation.

  The losses define what a pair ``(x, y)`` predicts: MAML uses ``x + y`` with ``y`` from zero, ANIL
  the same for the head alone. Every response works: unrolled (MAML), dropped (first-order MAML),
  implicit (with a proximal term in the inner loss) and evolution strategies (ESJ). The defaults are
  our reading of LEEDS: see Departures from the papers.

  Cost of a round: one forward pass to predict, the inner run, and one or two forward passes for the
  shift score and ``info.after``. An open gate adds a gradient of the outer loss, the response, and
  one more inner run if the task continues. Memory: the meta-model, the task's pair ``(x, y)``, the
  states of the optimizers and detectors; data only with ``query="next"``. The task keeps its own
  ``x``, so a meta-update does not change its predictions.

  An inner run that is not finite returns to where it began, and the learner skips a meta-update
  that is not finite (``info.finite``). If the task's model has a loss that is not finite while the
  meta-model's is, the switch score is infinite, so any finite threshold restarts the task.

  Args:
    outer_loss: :math:`L`, ``outer_loss(x, y, batch) -> (scalar, logits)``, the mean loss of a model
      on labeled data from the stream. If ``shift_score`` is a function, any pytree that
      ``shift_score`` and ``metric`` accept may replace the logits.
    inner: the inner solver; each round runs its ``num_steps`` steps. A continuing task keeps the
      inner optimizer's state, whatever the solver's ``warm_start`` is, since its rounds
      are one run; a new task starts with a fresh one.
    outer: an optax chain that begins with a response, such as :func:`jaxbo.leeds`. Its ``update``
      receives ``detection=`` and ``value=``, the outer loss. ``None`` never moves the meta-model.
    detector: :func:`jaxbo.meta.threshold_detector`, or :func:`jaxbo.meta.oracle_detector`, which
      reads the truth from the batch.
    start: ``start(x) -> y``, where an adaptation begins; by default zeros shaped like ``x``.
      Responses treat it as a constant.
    restart: ``"switch"``: restart from the meta-model at a switch; ``"always"``: in every round.
    query: the data whose loss the meta-update descends. ``"given"``: the query set, ``batch.val``.
      ``"same"``: :math:`S_t` itself. ``"next"``: C-MAML's pairs of rounds, :math:`\nabla_\theta
      L(U(\theta_t; S_{t-1}); S_t)`, adapted again from :math:`\theta_t`.
    switch_score: ``"loss"``: :math:`L(\phi_{t-1}; S_t)`. ``"drop"``, C-MAML's: that loss minus
      :math:`L(U(\theta_t; S_t); S_t)`, at the cost of an inner run in every round.
    shift_score: ``"energy"``, ``"entropy"``, ``"max_softmax"`` (one minus the largest probability,
      so that high scores mean unknown data), or a function from the logits to scores ``[batch]``.
      The learner uses the mean score.
    shift_model: the model behind the shift score: ``"adapted"`` :math:`\phi_t`, ``"meta"``
      :math:`\theta_t`, or ``"initial"`` :math:`\theta_1`, of which the state keeps a copy.
    metric: ``metric(logits, batch)``, a quantity to report with the loss, such as the accuracy.

  Returns:
    An :class:`OnlineMetaLearner`: ``init``, ``step`` and ``run``, all pure. Two runs of 500 rounds
    equal one run of 1,000, bit for bit.

  Raises:
    ValueError: if ``restart``, ``query``, ``switch_score``, ``shift_score`` or ``shift_model`` is
      not one of the values above; if ``outer`` does not begin with a response.
    TypeError: if a function does not take its arguments; if ``outer_loss`` does not return a pair.

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
  if outer is not None:
    _check.transformation("outer", outer)
  _check.one_of("restart", restart, ("switch", "always"))
  _check.one_of("query", query, ("given", "same", "next"))
  _check.one_of("switch_score", switch_score, ("loss", "drop"))
  _check.one_of("shift_model", shift_model, ("adapted", "meta", "initial"))
  return play(
    outer_loss,
    inner,
    detector,
    _one_pair(outer_loss, inner, outer, start, always=restart == "always", next=query == "next"),
    start=start,
    judge_by_query=query == "given",
    switch_score=switch_score,
    shift_score=shift_score,
    shift_model=shift_model,
    metric=metric,
  )


def _one_pair(outer_loss, inner, outer, start, *, always: bool, next: bool) -> Policy:
  """Descends one pair of a round, or with ``next`` that of the last round and this one."""
  restarts = (lambda state: jnp.ones_like(state.has_support)) if always else None
  keep = lambda state, played, is_open: played.support if next else ()
  memory = lambda support: jax.tree.map(jnp.zeros_like, support) if next else ()
  if outer is None:
    init, never = (lambda x, support: ((), memory(support))), lambda *_: jnp.bool_(False)
    return Policy(init, restarts, never, None, keep)
  solve_anew = from_meta_model(inner, start)
  differentiate = outer_gradients(outer_loss, outer, has_aux=True)

  def is_open(state, detection):
    opened = gate_is_open(state.meta_state, detection)
    return opened & state.has_support if next else opened

  def update(state, played, **extra_args):
    meta, support, judged, solution = state.meta_params, played.support, played.judged, played.anew
    if next:
      support, judged = state.last_support, support
      solution = solve_anew(meta, support)
    elif solution is None:
      anew = lambda: solve_anew(meta, support)
      solution = jax.lax.cond(played.new_task, lambda: played.solution, anew)
    given = {"solution": solution, "batch": support, "detection": played.detection, **extra_args}
    updates, meta_state, value, _ = differentiate(
      meta, solution.params, state.meta_state, judged, **given
    )
    return optax.apply_updates(meta, updates), meta_state, value

  init = lambda x, support: (outer.init(x), memory(support))
  return Policy(init, restarts, is_open, update, keep)
