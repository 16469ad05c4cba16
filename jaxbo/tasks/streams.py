"""Streams of rounds: the protocol, streams of a function, of minibatches and of phases."""

import functools
import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbo import _check, _random, _schedule, _tree
from jaxbo._types import Data, Key, PyTree


class Stream(NamedTuple):
  """A stream of rounds, for :func:`jaxbo.online_loop` and :func:`jaxbo.meta.online_meta_learner`.

  The next round may depend on the rounds before it. Both functions are pure, and each is a
  ``jax.tree_util.Partial``. Pass the stream to a jitted function as an argument; a closure would
  copy its data into the program. A batch is a pair ``(train, val)``, a
  :class:`jaxbo.online.OnlineBatch`, or any pytree with the attributes ``train``, ``val`` and
  ``extra``, such as :class:`StreamBatch`.

  :func:`function_stream` makes a stream of a function of the round, and :func:`iterator_stream` of
  a Python iterator.

  Attributes:
    init: ``init(key=0) -> state``; the key is an int, a raw key array or a typed key.
    step: ``step(state) -> (state, batch)``, the next round.

  Example:
    >>> import jax, jax.numpy as jnp, jaxbo
    >>> from jax.tree_util import Partial
    >>> def init(key=0):
    ...   return jax.random.key(key), jnp.float32(0.0)
    >>> def step(state):                                          # a target that walks at random
    ...   key, target = state
    ...   key, new = jax.random.split(key)
    ...   target += jax.random.normal(new)
    ...   return (key, target), jaxbo.online.OnlineBatch(None, target)
    >>> stream = jaxbo.tasks.Stream(Partial(init), Partial(step))
    >>> state, batch = stream.step(stream.init(0))
    >>> batch.val.shape
    ()
  """

  init: Callable[..., PyTree]
  step: Callable[[PyTree], tuple[PyTree, Data]]


class RoundState(NamedTuple):
  """State of a :func:`function_stream`: all that the next round depends on.

  Attributes:
    base_key: the key of the stream, as raw key data.
    num_rounds: the number of rounds so far, int32; also the ``t`` of the next round.
  """

  base_key: jax.Array
  num_rounds: jax.Array


def function_stream(function: Callable[[Any, Any], Data]) -> Stream:
  """Makes a stream of a pure function of a constant key and the number of the round.

  The loops call this themselves if you pass a function as the stream.

  Args:
    function: ``function(key, t) -> batch``, where ``key`` is the typed key of the stream and ``t``
      the number of the round, int32 from 0. Random streams use ``jax.random.fold_in(key, t)``. A
      function with its own data should be a ``jax.tree_util.Partial(function, data)``.

  Returns:
    A :class:`Stream` with a :class:`RoundState`. To repeat a round, call ``stream.step`` on the
    state before it.

  Raises:
    TypeError: if ``function`` does not take a key and a round.

  Example:
    >>> import jax, jax.numpy as jnp, jaxbo
    >>> stream = jaxbo.tasks.function_stream(lambda key, t: (None, jnp.sin(0.1 * t)))
    >>> state, first = stream.step(stream.init(0))
    >>> state, second = stream.step(state)
    >>> print(first[1], second[1])
    0.0 0.09983342
  """
  _check.takes_arguments("stream", function, "key", "t")
  partial = jax.tree_util.Partial
  function = function if isinstance(function, partial) else partial(function)
  return Stream(partial(_first_round), partial(_next_round, function))


def _first_round(key: Key = 0) -> RoundState:
  return RoundState(_random.default_key_data(key), jnp.int32(0))


def _next_round(function, state):
  batch = function(jax.random.wrap_key_data(state.base_key), state.num_rounds)
  return state._replace(num_rounds=_schedule.after(state.num_rounds)), batch


@functools.cache
def bound(function: Callable[..., Any], **settings: Hashable) -> Callable[..., Any]:
  """The function with these settings, the same object for the same ones.

  jit compares functions by identity, so streams with equal settings share one program.
  """
  return functools.partial(function, **settings)


StreamLike = Stream | Callable[[Any, Any], Data]


def as_stream(stream: StreamLike) -> Stream:
  """Returns a stream as it is, and of a function its :func:`function_stream`."""
  if isinstance(stream, Stream):
    return stream
  if not callable(stream):
    raise TypeError(
      f"stream must be a jaxbo.tasks.Stream or a function stream(key, t), got {stream!r}"
    )
  return function_stream(stream)


def minibatch_stream(train: Data, val: Data, batch_size: int) -> Stream:
  """A stream of pairs of minibatches, drawn uniformly and with replacement.

  Args:
    train: a pytree of arrays that share the leading axis ``[num_examples, ...]``, for the inner
      loss.
    val: a pytree of arrays for the outer loss; its leading axis may have another length.
    batch_size: the number of rows of a minibatch, at least 1.

  Returns:
    A :class:`Stream` of pairs ``(train, val)`` with leaves ``[batch_size, ...]``. The rows of round
    ``t`` depend on ``fold_in(key, t)`` alone.

  Raises:
    ValueError: if ``batch_size < 1``, or the leading axes within ``train`` or ``val`` differ or are
      empty.

  Example:
    >>> import jax, jax.numpy as jnp, jaxbo
    >>> train = {"a": jnp.arange(10), "b": jnp.arange(10) ** 2}
    >>> stream = jaxbo.tasks.minibatch_stream(train, jnp.ones((5, 2)), batch_size=4)
    >>> state, (batch, val) = jax.jit(lambda stream: stream.step(stream.init(0)))(stream)
    >>> val.shape, bool((batch["a"] ** 2 == batch["b"]).all())
    ((4, 2), True)
  """
  batch_size = _check.positive_int("batch_size", batch_size)
  for name, data in (("train", train), ("val", val)):
    num_examples(name, data)
  # A traced index cannot take rows of a NumPy array.
  train, val = jax.tree.map(jnp.asarray, (train, val))
  draw = bound(_minibatches, batch_size=batch_size)
  return function_stream(jax.tree_util.Partial(draw, train, val))


def num_examples(name: str, data: Data) -> int:
  """The length of the leading axis that all leaves share; raises ``ValueError`` without one."""
  sizes = {jnp.shape(leaf)[0] if jnp.ndim(leaf) else 0 for leaf in jax.tree.leaves(data)}
  if len(sizes) != 1 or 0 in sizes:
    shapes = jax.tree.map(jnp.shape, data)
    raise ValueError(f"{name} must have leaves with one axis [num_examples, ...], got {shapes}")
  return sizes.pop()


def _minibatches(train, val, key, t, *, batch_size):
  def draw(key, data):
    rows = jax.random.randint(key, batch_size, 0, num_examples("data", data))
    # On an explicit mesh, the batch is divided as the data are.
    take = lambda leaf: leaf.at[rows].get(out_sharding=_tree.explicit_sharding(leaf))
    return jax.tree.map(take, data)

  train_key, val_key = jax.random.split(jax.random.fold_in(key, t))
  return draw(train_key, train), draw(val_key, val)


class PhaseState(NamedTuple):
  """State of a :func:`phase_stream`.

  Attributes:
    num_rounds: the number of rounds so far, int32.
    states: the states of the streams of the phases.
  """

  num_rounds: jax.Array
  states: tuple[PyTree, ...]


def phase_stream(
  streams: Sequence[StreamLike],
  lengths: Sequence[int],
  *,
  repeat: bool = False,
) -> Stream:
  """A stream that goes through phases; each phase plays one stream.

  For staged changes, give each phase some rounds. For a zigzag, use ``lengths=[1, 1]`` with
  ``repeat``. A stream pauses while other phases play, and continues after them.

  Args:
    streams: for each phase, a stream or a function for :func:`function_stream`. All batches have
      the same structure, shapes and dtypes. Each stream gets its own key.
    lengths: the number of rounds of each phase, each at least 1.
    repeat: whether the first phase follows the last. Otherwise the last phase never ends.

  Returns:
    A :class:`Stream` with a :class:`PhaseState`.

  Raises:
    ValueError: if there are no phases, ``lengths`` does not have one number for each stream, or a
      length is below 1.
    TypeError: if one of ``streams`` is neither a stream nor a function of a key and a round.

  Example:
    >>> import jax, jaxbo
    >>> phases = [lambda key, t: (t, 0), lambda key, t: (t, 1)]
    >>> stream = jaxbo.tasks.phase_stream(phases, [2, 1], repeat=True)
    >>> _, (rounds, phase) = jax.lax.scan(lambda s, _: stream.step(s), stream.init(0), length=6)
    >>> print(rounds, phase)
    [0 1 0 2 3 1] [0 0 1 0 0 1]
  """
  lengths = tuple(_check.positive_int("lengths", length) for length in lengths)
  if not lengths or len(lengths) != len(streams):
    raise ValueError(
      f"lengths must have one number for each of the streams, got {len(lengths)} for {len(streams)}"
    )
  streams = tuple(as_stream(stream) for stream in streams)
  step = bound(_next_phase, lengths=lengths, repeat=repeat)
  return Stream(jax.tree_util.Partial(_first_phase, streams), jax.tree_util.Partial(step, streams))


def _first_phase(streams, key: Key = 0) -> PhaseState:
  key = jax.random.wrap_key_data(_random.default_key_data(key))
  states = (s.init(jax.random.fold_in(key, i)) for i, s in enumerate(streams))
  return PhaseState(jnp.int32(0), tuple(states))


def _next_phase(streams, state, *, lengths, repeat):
  ends = tuple(itertools.accumulate(lengths))
  in_cycle = state.num_rounds % ends[-1] if repeat else state.num_rounds
  phase = jnp.sum(in_cycle >= jnp.asarray(ends[:-1], jnp.int32), dtype=jnp.int32)

  def play(i, states):
    new, batch = streams[i].step(states[i])
    return (*states[:i], new, *states[i + 1 :]), batch

  branches = [functools.partial(play, i) for i in range(len(streams))]
  states, batch = jax.lax.switch(phase, branches, state.states)
  return PhaseState(_schedule.after(state.num_rounds), states), batch
