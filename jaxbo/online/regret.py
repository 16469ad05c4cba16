"""Regret and path lengths, as metrics of :func:`jaxbo.online_loop`."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check, _tree
from jaxbo.bilevel.projection import Projection, project_tree
from jaxbo.online.rounds import OnlineBatch, OnlineMetric, OnlineRound
from jaxbo.online.window import check_window, empty_window


class Accumulated(NamedTuple):
  """The value of a metric that is summed over rounds.

  Attributes:
    term: the amount of this round; it may be NaN or infinite.
    total: the sum of the finite terms of all rounds so far.
    left_out: how many rounds had a term that is not finite, int32: they are not in ``total``.
  """

  term: jax.Array
  total: jax.Array
  left_out: jax.Array


def local_regret(
  hypergradient: Callable[[optax.Params, OnlineBatch], optax.Params],
  *,
  window: int = 1,
  decay: jax.typing.ArrayLike = 1.0,
  at: str = "own",
  normalization: str = "full",
  project: Projection | None = None,
  learning_rate: float | None = None,
) -> OnlineMetric:
  r"""The bilevel local regret, for problems whose exact hypergradient is known.

  .. math::
    R_{\text{own}} = \sum_t \Big\| \frac1W \sum_{i=0}^{K-1} \eta^i \nabla F_{t-i}(x_{t-i}) \Big\|^2,
    \qquad
    R_{\text{current}} = \sum_t \Big\| \frac1W \sum_{i=0}^{K-1} \eta^i \nabla F_{t-i}(x_t) \Big\|^2

  with :math:`\nabla F_s = 0` for :math:`s \le 0`. SOBOW uses the first form (our reading: see
  Departures from the papers). OAGD and Hazan et al. use the second. For ``window=1`` the two are
  equal. :math:`\nabla F_t` is the *true* hypergradient, at :math:`y_t^*(x)`: the norm of a method's
  own estimate is not a regret.

  With constraints, the projected gradient mapping :math:`(x_t - P_X(x_t - a d)) / a` at the current
  iterate replaces the average :math:`d`.

  Cost of a round: one hypergradient for ``"own"``, ``window`` hypergradients for ``"current"``.
  Memory: ``window`` copies of ``x`` for ``"own"``, of a batch for ``"current"``.

  Args:
    hypergradient: ``hypergradient(x, batch) -> dF/dx``, for a :class:`jaxbo.online.OnlineBatch`.
    window: :math:`K \ge 1`, the window of the regret; the method may use another.
    decay: :math:`\eta` in (0, 1].
    at: ``"own"`` or ``"current"``.
    normalization: ``"full"``: :math:`W` is constant. ``"present"``: :math:`W` sums over the rounds
      in the window.
    project: the projection :math:`P_X`, or ``None``.
    learning_rate: :math:`a > 0`; required with ``project``.

  Returns:
    An :class:`OnlineMetric` whose values are :class:`Accumulated`: ``term`` is the squared norm,
    ``total`` the regret. A hypergradient that is not finite spoils the terms of the ``window``
    rounds that average it; ``total`` leaves them out and ``left_out`` counts them.

  Raises:
    ValueError: if an argument is outside its range, or only one of ``project`` and
      ``learning_rate`` is given.
    TypeError: if ``hypergradient`` does not take ``(x, batch)``.

  Example:
    >>> import jax.numpy as jnp, jaxbo, optax
    >>> inner = jaxbo.inner_solver(lambda x, y, batch: 0.5 * (y - x) ** 2, optax.sgd(1.0), 1)
    >>> loss = lambda x, y, batch: 0.5 * (y - batch) ** 2             # dF/dx = x - batch
    >>> regret = jaxbo.online.local_regret(lambda x, batch: x - batch.val)
    >>> loop = jaxbo.online_loop(loss, inner, jaxbo.aid(0.5, inner), metrics={"regret": regret})
    >>> stream = lambda key, t: (None, jnp.float32(4.0))
    >>> state = loop.init(jnp.float32(0.0), jnp.float32(0.0), stream)
    >>> state, history = loop.run(state, stream, 4)
    >>> history.metrics["regret"].term.tolist()                       # 4, 2, 1 and 1/2, squared
    [16.0, 4.0, 1.0, 0.25]

  References:
    Lin, Sow, Ji, Liang and Shroff, `Non-Convex Bilevel Optimization with Time-Varying Objective
    Functions <https://arxiv.org/abs/2308.03811>`_, 2023; Hazan, Singh and Zhang, `Efficient Regret
    Minimization in Non-Convex Games <https://arxiv.org/abs/1708.00075>`_, 2017.
  """
  _check.takes_arguments("hypergradient", hypergradient, "x", "batch")
  window = check_window(window, decay, normalization)
  _check.one_of("at", at, ("own", "current"))
  if (project is None) != (learning_rate is None):
    raise ValueError(
      f"project and learning_rate must be given together, got {project!r} and {learning_rate!r}"
    )
  if learning_rate is not None:
    _check.positive("learning_rate", learning_rate)

  def init(x, y, batch):
    del y
    shape = jax.eval_shape(hypergradient, x, batch)
    _check.same_structure("what hypergradient returns", shape, "x", x)
    kept = shape if at == "own" else batch._replace(extra=None)
    return empty_window(kept, window), _nothing(x)

  def average_own(kept, round):
    kept = kept.push(hypergradient(round.x, round.batch))
    return kept, kept.average(decay, normalization)

  def average_current(kept, round):
    kept = kept.push(round.batch._replace(extra=None))
    gradients = jax.vmap(lambda batch: hypergradient(round.x, batch))(kept.values)
    # An empty slot holds no batch: its gradient is meaningless and must not count.
    missing = lambda leaf: kept.present.reshape(-1, *[1] * (leaf.ndim - 1))
    gradients = jax.tree.map(lambda leaf: jnp.where(missing(leaf), leaf, 0), gradients)
    return kept, kept._replace(values=gradients).average(decay, normalization)

  def update(state, round: OnlineRound):
    kept, sums = state
    kept, average = (average_own if at == "own" else average_current)(kept, round)
    if learning_rate is not None:
      point = _tree.at_least_float32(round.x)
      projected = project_tree("project", project, _tree.add_scaled(point, -learning_rate, average))
      average = optax.tree.scale(1 / learning_rate, optax.tree.sub(point, projected))
    sums = _add(sums, _tree.vdot(average, average))
    return (kept, sums), sums

  return OnlineMetric(init, update)


def path_length(
  change: Callable[[OnlineBatch, OnlineBatch], jax.Array], power: float | int = 1
) -> OnlineMetric:
  r"""The path length: the total change of a problem whose change in each round is known.

  .. math:: \sum_{t=2}^T \text{change}(\xi_t, \xi_{t-1})^p

  The regret bounds of online bilevel optimization contain two such sums:

  .. math::
    H_{p,T} = \sum_{t=2}^T \sup_x \|y_t^*(x) - y_{t-1}^*(x)\|^p, \qquad
    V_T = \sum_{t=2}^T \sup_x |F_t(x) - F_{t-1}(x)|

  so ``change`` is the distance between the inner minima, or between the outer values, of two
  batches.

  Args:
    change: ``change(batch, last_batch) -> scalar``; each batch is a
      :class:`jaxbo.online.OnlineBatch` without ``extra``.
    power: :math:`p > 0`; 2 in :math:`H_{2,T}`.

  Returns:
    An :class:`OnlineMetric` whose values are :class:`Accumulated`; the first round adds zero. A
    change that is not finite is left out of ``total`` and counted in ``left_out``.

  Raises:
    ValueError: if ``power`` is not positive.
    TypeError: if ``change`` does not take two batches.

  Example:
    >>> import jax.numpy as jnp, jaxbo, optax
    >>> inner = jaxbo.inner_solver(lambda x, y, b: 0.5 * (y - x - b) ** 2, optax.sgd(1.0), 1)
    >>> drift = jaxbo.online.path_length(lambda batch, last: abs(batch.train - last.train), power=2)
    >>> loop = jaxbo.online_loop(lambda x, y, batch: y**2, inner, jaxbo.aid(0.1, inner),
    ...                     metrics={"H": drift})                     # y* = x + b_t
    >>> stream = lambda key, t: (0.5 * t, None)
    >>> state = loop.init(jnp.float32(0.0), jnp.float32(0.0), stream)
    >>> state, history = loop.run(state, stream, 4)
    >>> history.metrics["H"].total.tolist()
    [0.0, 0.25, 0.5, 0.75]
  """
  _check.takes_arguments("change", change, "batch", "last_batch")
  _check.positive("power", power)

  def init(x, y, batch):
    del y
    return empty_window(batch._replace(extra=None), 1), _nothing(x)

  def update(state, round: OnlineRound):
    kept, sums = state
    last, present = kept.get(0)
    batch = round.batch._replace(extra=None)
    value = jnp.asarray(change(batch, last), sums.total.dtype) ** power
    sums = _add(sums, jnp.where(present, value, 0))
    return (kept.push(batch), sums), sums

  return OnlineMetric(init, update)


def _nothing(x: optax.Params) -> Accumulated:
  zero = lambda: jnp.zeros((), jnp.result_type(jnp.float32, *jax.tree.leaves(x)))
  return Accumulated(zero(), zero(), jnp.zeros((), jnp.int32))


def _add(sums: Accumulated, term: jax.Array) -> Accumulated:
  term = term.astype(sums.total.dtype)
  finite = jnp.isfinite(term)
  total, left_out = sums.total + jnp.where(finite, term, 0), sums.left_out + ~finite
  return Accumulated(term, total, left_out)
