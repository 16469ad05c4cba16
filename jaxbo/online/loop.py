"""The loop of an online bilevel method: a stream of rounds as one scan."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check, _schedule
from jaxbo._types import Loss, PyTree
from jaxbo.bilevel.loop import BilevelInfo, BilevelState, bilevel_loop, outer_step
from jaxbo.bilevel.solution import InnerSolver
from jaxbo.online.joint import joint
from jaxbo.online.oagd import replay as solve_on_window
from jaxbo.online.rounds import OnlineMetric, OnlineRound, as_batch, first_round, make_run
from jaxbo.online.window import empty_window
from jaxbo.tasks.finite_sum import BatchIndex
from jaxbo.tasks.streams import StreamLike


class OnlineState(NamedTuple):
  """State of the loop that :func:`~jaxbo.online_loop` makes: all that the next round needs.

  Attributes:
    loop: the :class:`~jaxbo.bilevel.BilevelState`: ``x``, the inner solution, the state of the
      transformation.
    round_count: the number of rounds played, int32.
    stream_state: the state of the stream; ``()`` without one.
    window: the :class:`Window` of the last batches; ``()`` if the loop keeps none.
    metric_states: the states of the metrics, by name.
  """

  loop: BilevelState
  round_count: jax.Array
  stream_state: PyTree
  window: PyTree
  metric_states: dict[str, PyTree]

  @property
  def x(self) -> optax.Params:
    """The outer parameters."""
    return self.loop.x

  @property
  def y(self) -> optax.Params:
    """The inner parameters."""
    return self.loop.solution.params


class OnlineInfo(NamedTuple):
  """Diagnostics of one round of :func:`~jaxbo.online_loop`.

  ``run`` returns those of all rounds, stacked along a leading axis.

  Attributes:
    loop: the :class:`~jaxbo.bilevel.BilevelInfo`.
    metrics: the values of the metrics, by name.
  """

  loop: BilevelInfo
  metrics: dict[str, PyTree]


class Online(NamedTuple):
  """An online loop, made by :func:`~jaxbo.online_loop`.

  Attributes:
    init: ``init(x, y0, stream=None, *, batch=None, key=0) -> OnlineState``. Pass either a stream or
      a batch; the batch may hold shapes only.
    step: ``step(state, batch, **extra_args) -> (OnlineState, OnlineInfo)``, one round. Extra
      arguments go to ``outer.update``, and so do the fields of ``batch.extra`` if it is a
      :class:`jaxbo.tasks.BatchIndex`.
    run: ``run(state, stream, num_rounds) -> (OnlineState, OnlineInfo)``, one ``lax.scan``. The
      state must come from ``init`` with a stream.
  """

  init: Callable[..., OnlineState]
  step: Callable[..., tuple[OnlineState, OnlineInfo]]
  run: Callable[[OnlineState, StreamLike, int], tuple[OnlineState, OnlineInfo]]


def online_loop(
  outer_loss: Loss,
  inner: InnerSolver | None,
  outer: optax.GradientTransformation,
  *,
  hyper_at: str = "after",
  window: int | None = None,
  replay: bool = False,
  metrics: Mapping[str, OnlineMetric | Callable[[OnlineRound], PyTree]] | None = None,
  has_aux: bool = False,
) -> Online:
  """Builds the loop of an online bilevel method: play, see the losses, take a step of each level.

  In round :math:`t` the method plays :math:`(x_t, y_t)`. Then the round's batch reveals the losses
  :math:`f_t` and :math:`g_t`.

  A *stream* gives the batches, ``(train, val)`` or an :class:`~jaxbo.online.OnlineBatch`. It is a
  :class:`jaxbo.tasks.Stream`, or a pure function ``stream(key, t)`` of a constant key and the
  number of the round, int32 from 0 (see :func:`jaxbo.tasks.function_stream`).
  :func:`jaxbo.tasks.iterator_stream` makes a stream of a Python iterator. Pass a stream to a jitted
  function as an argument; a closure would copy its data into the program. Wrap a plain function in
  ``jax.tree_util.Partial`` to pass it.

  A run of any number of rounds is one compiled scan and continues from any state. Two runs of 500
  rounds equal one run of 1,000, bit for bit, even with a save and restore in between.

  Args:
    outer_loss: the outer loss :math:`f`, ``outer_loss(x, y, batch) -> scalar``.
    inner: the inner solver. ``num_steps=1`` with a warm start gives the single loop. With ``None``
      the transformation moves both levels.
    outer: an optax chain that begins with a response, or an alias: :func:`jaxbo.sobow`,
      :func:`jaxbo.oagd`, :func:`jaxbo.ogd`, :func:`jaxbo.aid`. Without an inner solver, use a
      method on :class:`jaxbo.Bilevel` parameters: :func:`jaxbo.sogd`, :func:`jaxbo.saba`,
      :func:`jaxbo.srba`, or a value-function method such as :func:`jaxbo.f2sa`, which needs no
      second derivative.
    hyper_at: where to take the hypergradient. ``"after"``: at :math:`(x_t, y_{t+1})`, after this
      round's inner solve. ``"before"``: at :math:`(x_t, y_t)`, so both levels step at once; this
      works only with responses that depend on nothing but the inner parameters (implicit or
      dropped).
    window: how many of the last batches to keep in the state, for
      :func:`jaxbo.average_over_batches` and ``replay``; at least 1. Memory: ``window`` copies of a
      batch.
    replay: whether the inner solver runs on every batch in the window, from the oldest to the
      newest, instead of the newest alone. The solution's ``start`` and ``info`` describe the run on
      the newest.
    metrics: what to compute in every round, by name: a function of the
      :class:`~jaxbo.online.OnlineRound`, or an :class:`~jaxbo.online.OnlineMetric` such as
      :func:`jaxbo.online.local_regret`.
    has_aux: whether the outer loss returns ``(scalar, aux)``.

  Returns:
    An :class:`~jaxbo.online.Online`: ``init``, ``step`` and ``run``, all pure. ``init`` only asks
    the stream for shapes. Wrap ``run`` in ``jax.jit`` with ``num_rounds`` static.

  Raises:
    ValueError: if ``hyper_at`` is neither value; if ``window < 1``; if ``replay`` is set without
      ``window``; if ``replay`` or ``hyper_at="before"`` is set without an inner solver; if
      ``hyper_at="before"`` meets a response that differentiates the inner run; if the stream
      returns neither a pair nor an :class:`~jaxbo.online.OnlineBatch`; if the outer loss is not a
      scalar, or ``outer`` does not begin with a response.
    TypeError: if a function does not take its arguments; if a parameter is not a float; if a metric
      is not a function.

  Example:
    >>> import jax, jax.numpy as jnp, jaxbo, optax
    >>> inner = jaxbo.inner_solver(lambda x, y, batch: 0.5 * (y - x) ** 2, optax.sgd(0.5), 1)
    >>> outer = jaxbo.sobow(0.1, inner, window=5, inner_params=jnp.float32(0.0))
    >>> loss = lambda x, y, batch: 0.5 * (y - batch) ** 2
    >>> loop = jaxbo.online_loop(loss, inner, outer, metrics={
    ...   "loss": lambda round: loss(round.x, round.y, round.batch.val)})
    >>> def noisy(target, key, t):
    ...   return None, target + 0.1 * jax.random.normal(jax.random.fold_in(key, t))
    >>> stream = jax.tree_util.Partial(noisy, jnp.float32(2.0))
    >>> state = loop.init(jnp.float32(0.0), jnp.float32(0.0), stream, key=0)
    >>> run = jax.jit(loop.run, static_argnums=2)
    >>> state, history = run(state, stream, 200)
    >>> history.metrics["loss"].shape, bool(abs(state.x - 2.0) < 0.1)
    ((200,), True)
  """
  _check.one_of("hyper_at", hyper_at, ("after", "before"))
  if window is not None:
    window = _check.positive_int("window", window)
  elif replay:
    raise ValueError("window must be set with replay=True: how many of the last batches to keep")
  if inner is None and (replay or hyper_at == "before"):
    raise ValueError("inner must be an inner solver with replay=True or hyper_at='before'")
  metrics = dict(metrics or {})
  for name, metric in metrics.items():
    if not isinstance(metric, OnlineMetric):
      _check.takes_arguments(f"metrics[{name!r}]", metric, "round")
  if inner is None:
    loop_init, joint_step = joint(outer_loss, outer, has_aux=has_aux)
    play = lambda loop, batch, **extra_args: joint_step(loop, batch.train, batch.val, **extra_args)
  else:
    loop_init, play = _one_after_the_other(outer_loss, inner, outer, hyper_at, replay, has_aux)

  def init(x, y0, stream=None, *, batch=None, key=0):
    stream_state, batch = first_round(stream, batch, key, x)
    loop = loop_init(x, y0, batch.train)
    init_metric = lambda metric: metric.init(loop.x, loop.solution.params, batch)
    return OnlineState(
      loop=loop,
      round_count=jnp.int32(0),
      stream_state=stream_state,
      window=() if window is None else empty_window(batch._replace(extra=None), window),
      metric_states={
        name: init_metric(metric) if isinstance(metric, OnlineMetric) else ()
        for name, metric in metrics.items()
      },
    )

  def step(state, batch, **extra_args):
    batch = as_batch(batch)
    if isinstance(batch.extra, BatchIndex):
      extra_args = {**vars(batch.extra), **extra_args}
    before, batches = state.loop, ()
    if window is not None:
      batches = state.window.push(batch._replace(extra=None))
      extra_args["window"] = batches
    after, info = play(before, batch, **extra_args)
    played = OnlineRound(
      t=state.round_count,
      batch=batch,
      before=before,
      after=after,
      info=info,
    )
    metric_states, values = {}, {}
    for name, metric in metrics.items():
      if isinstance(metric, OnlineMetric):
        metric_states[name], values[name] = metric.update(state.metric_states[name], played)
      else:
        metric_states[name], values[name] = (), metric(played)
    count = _schedule.after(state.round_count)
    state = OnlineState(after, count, state.stream_state, batches, metric_states)
    return state, OnlineInfo(info, values)

  return Online(init, step, make_run(step))


def _one_after_the_other(outer_loss, inner, outer, hyper_at, replay, has_aux):
  """Returns ``(init, play)``: an inner solve and an outer step, in the order of ``hyper_at``."""
  init, _ = bilevel_loop(outer_loss, inner, outer, has_aux=has_aux)
  respond = outer_step(outer_loss, outer, has_aux=has_aux)

  def play(before, batch, **extra_args):
    def solve():
      if replay:
        return solve_on_window(inner, before.x, before.solution, extra_args["window"])
      return inner.solve(before.x, before.solution, batch.train)

    if hyper_at == "after":
      solved = before._replace(solution=solve())
      return respond(solved, batch.train, batch.val, **extra_args)
    at = before._replace(solution=before.solution._replace(start=None))  # No run has ended there.
    after, info = respond(at, batch.train, batch.val, **extra_args)
    solution = solve()
    run = {"inner_losses": solution.info.losses, "inner_finite": solution.info.finite}
    return after._replace(solution=solution), info._replace(**run)

  return init, play
