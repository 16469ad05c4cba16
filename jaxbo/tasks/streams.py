"""Streams of batches for :func:`jaxbo.online_loop`: pure functions of a key and a round number."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxbo import _check

Stream = Callable[[jax.Array, jax.Array], Any]


def minibatch_stream(train: Any, val: Any, batch_size: int) -> Stream:
  """A stream of pairs of minibatches, drawn uniformly and with replacement.

  Args:
    train: a pytree of arrays that share the leading axis ``[num_examples, ...]``, for the inner
      loss.
    val: a pytree of arrays for the outer loss; its leading axis may have another length.
    batch_size: the number of rows of a minibatch, at least 1.

  Returns:
    ``stream(key, t) -> (train, val)`` with leaves ``[batch_size, ...]``, a function of
    ``fold_in(key, t)``. The stream is a ``jax.tree_util.Partial``, so a jitted function takes it as
    an argument, with its data.

  Raises:
    ValueError: if ``batch_size < 1``, or the leading axes within ``train`` or ``val`` differ or are
      empty.

  Example:
    >>> import jax, jax.numpy as jnp, jaxbo
    >>> train = {"a": jnp.arange(10), "b": jnp.arange(10) ** 2}
    >>> stream = jaxbo.tasks.minibatch_stream(train, jnp.ones((5, 2)), batch_size=4)
    >>> batch, val = jax.jit(stream)(jax.random.key(0), 0)
    >>> val.shape, bool((batch["a"] ** 2 == batch["b"]).all())
    ((4, 2), True)
  """
  batch_size = _check.positive_int("batch_size", batch_size)
  for name, data in (("train", train), ("val", val)):
    sizes = {jnp.shape(leaf)[0] if jnp.ndim(leaf) else 0 for leaf in jax.tree.leaves(data)}
    if len(sizes) != 1 or 0 in sizes:
      shapes = jax.tree.map(jnp.shape, data)
      raise ValueError(f"{name} must have leaves with one axis [num_examples, ...], got {shapes}")
  # A traced index cannot take rows of a NumPy array.
  train, val = jax.tree.map(jnp.asarray, (train, val))
  draw = functools.partial(_minibatches, batch_size=batch_size)
  return jax.tree_util.Partial(draw, train, val)


def _minibatches(train, val, key, t, *, batch_size):
  def draw(key, data):
    num_examples = jax.tree.leaves(data)[0].shape[0]
    rows = jax.random.randint(key, batch_size, 0, num_examples)
    return jax.tree.map(lambda leaf: leaf[rows], data)

  train_key, val_key = jax.random.split(jax.random.fold_in(key, t))
  return draw(train_key, train), draw(val_key, val)


def phase_stream(
  streams: Sequence[Stream], lengths: Sequence[int], *, repeat: bool = False
) -> Stream:
  """A stream that goes through phases; each phase plays one stream.

  For staged and gradual changes, give each phase some length. For a zigzag, use ``lengths=[1, 1]``
  with ``repeat``.

  Args:
    streams: one stream for each phase, all with the same structure, shapes and dtypes. Each sees
      the number of the round since the beginning, not since its phase began.
    lengths: the number of rounds of each phase, each at least 1.
    repeat: whether the first phase follows the last. Otherwise the last phase never ends.

  Returns:
    ``stream(key, t)``, a ``jax.tree_util.Partial`` that carries the data of those streams that are
    themselves a ``Partial``.

  Raises:
    ValueError: if there are no phases, ``lengths`` does not have one number for each stream, or a
      length is below 1.

  Example:
    >>> import jax, jaxbo
    >>> phases = [lambda key, t: (t, 0), lambda key, t: (t, 1)]
    >>> stream = jaxbo.tasks.phase_stream(phases, [2, 1], repeat=True)
    >>> [int(stream(jax.random.key(0), t)[1]) for t in range(6)]
    [0, 0, 1, 0, 0, 1]
  """
  lengths = tuple(_check.positive_int("lengths", length) for length in lengths)
  if not lengths or len(lengths) != len(streams):
    raise ValueError(
      f"lengths must have one number for each of the streams, got {len(lengths)} for {len(streams)}"
    )
  partial = jax.tree_util.Partial
  streams = tuple(s if isinstance(s, partial) else partial(s) for s in streams)
  return partial(functools.partial(_phase, lengths=lengths, repeat=repeat), streams)


def _phase(streams, key, t, *, lengths, repeat):
  ends = tuple(itertools.accumulate(lengths))
  t = jnp.asarray(t, jnp.int32)
  in_cycle = t % ends[-1] if repeat else t
  phase = jnp.sum(in_cycle >= jnp.asarray(ends[:-1], jnp.int32), dtype=jnp.int32)
  return jax.lax.switch(phase, streams, key, t)
