"""A round of an online problem: what a stream returns, and what metrics see."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check, _tree
from jaxbo._types import Data, Key, PyTree
from jaxbo.bilevel.loop import BilevelInfo, BilevelState
from jaxbo.tasks.streams import StreamLike, as_stream


class OnlineBatch(NamedTuple):
  """What a stream returns in one round.

  Attributes:
    train: the batch of the inner loss.
    val: the batch of the outer loss.
    extra: any other data, for metrics; the loop does not keep it in the window.
  """

  train: Data
  val: Data
  extra: PyTree = None


class OnlineMetric(NamedTuple):
  """A metric with a state.

  Attributes:
    init: ``init(x, y, batch) -> state``, where ``batch`` is an :class:`OnlineBatch` of shapes.
    update: ``update(state, round) -> (state, value)``, with the :class:`OnlineRound`.
  """

  init: Callable[[optax.Params, optax.Params, Data], PyTree]
  update: Callable[[PyTree, Any], tuple[PyTree, PyTree]]


class OnlineRound(NamedTuple):
  """A round after it was played, as metrics see it.

  Attributes:
    t: the number of the round, int32 from 0.
    batch: the :class:`OnlineBatch`.
    before: the :class:`~jaxbo.bilevel.BilevelState` that was played, before the losses were known.
    after: the :class:`~jaxbo.bilevel.BilevelState` after the round.
    info: the :class:`~jaxbo.bilevel.BilevelInfo`.
  """

  t: jax.Array
  batch: OnlineBatch
  before: BilevelState
  after: BilevelState
  info: BilevelInfo

  @property
  def x(self) -> optax.Params:
    """The outer parameters that were played."""
    return self.before.x

  @property
  def y(self) -> optax.Params:
    """The inner parameters that were played."""
    return self.before.solution.params


def as_batch(batch: Data) -> OnlineBatch:
  """Makes an :class:`OnlineBatch` of a stream's output: a pair, or any object with the fields."""
  if isinstance(batch, OnlineBatch):
    return batch
  if all(hasattr(batch, name) for name in OnlineBatch._fields):
    return OnlineBatch(batch.train, batch.val, batch.extra)
  if isinstance(batch, tuple) and len(batch) == 2:
    return OnlineBatch(*batch)
  raise ValueError(
    "a stream must return the pair (train, val) or an OnlineBatch, got "
    f"{jax.tree.map(jnp.shape, batch)}"
  )


def first_round(
  stream: StreamLike | None, batch: Data, key: Key, x: PyTree
) -> tuple[PyTree, OnlineBatch]:
  """Returns the first state of the stream, ``()`` without one, and the types of its batches.

  The devices of their mesh are those of the stream's arrays or of the parameters ``x``.
  """
  if (batch is None) == (stream is None):
    raise ValueError("init must be given either a stream or a batch, whose shapes are enough")
  if stream is None:
    return (), as_batch(batch)
  stream = as_stream(stream)
  state = stream.init(key)
  batch = jax.eval_shape(lambda state: as_batch(stream.step(state)[1]), state)
  return state, _tree.on_meshes_of(batch, (stream, x))


def make_run(
  step: Callable[..., tuple[PyTree, PyTree]],
) -> Callable[[PyTree, StreamLike, int], tuple[PyTree, PyTree]]:
  """Returns ``run(state, stream, num_rounds)`` of a ``step(state, batch)``: one scan."""

  def run(state, stream: StreamLike, num_rounds):
    num_rounds = _check.positive_int("num_rounds", num_rounds)
    if type(state.stream_state) is tuple and not state.stream_state:
      raise ValueError("run needs a state from init(..., stream), got one without a stream")
    stream = as_stream(stream)

    def body(state, _):
      stream_state, batch = stream.step(state.stream_state)
      return step(state._replace(stream_state=stream_state), batch)

    return jax.lax.scan(body, state, length=num_rounds)

  return run
