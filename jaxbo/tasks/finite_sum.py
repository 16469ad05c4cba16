"""A stream of the fixed batches of a finite sum, which says which batch a round has."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxbo import _check, _random, _schedule, _tree
from jaxbo._types import Data, Key, PyTree
from jaxbo.tasks.streams import Stream, bound, num_examples


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["index", "outer_index"],
  meta_fields=["num_batches", "num_outer_batches"],
)
@dataclasses.dataclass(frozen=True)
class BatchIndex:
  """Which batches of a finite sum a round has; the ``extra`` of :func:`finite_sum_stream`.

  :func:`jaxbo.online_loop` hands the fields to the ``update`` of its transformation.

  Attributes:
    index: the number of the inner batch, int32 from 0.
    outer_index: the number of the outer batch, int32 from 0.
    num_batches: how many inner batches there are, a Python int.
    num_outer_batches: how many outer batches there are, a Python int.
  """

  index: PyTree  # A tree of shapes and one of specs have other leaves.
  outer_index: PyTree
  num_batches: int
  num_outer_batches: int


class FiniteSumBatch(NamedTuple):
  """A round of :func:`finite_sum_stream`.

  Attributes:
    train: the batch of the inner loss, leaves ``[batch_size, ...]``.
    val: the batch of the outer loss, leaves ``[val_batch_size, ...]``.
    extra: the :class:`BatchIndex`.
  """

  train: Data
  val: Data
  extra: BatchIndex


class FiniteSumState(NamedTuple):
  """State of a :func:`finite_sum_stream`.

  Attributes:
    base_key: the key of the stream, as raw key data.
    num_rounds: the number of rounds so far, int32.
    order: the order of the inner batches in this epoch, ``[num_batches]`` int32.
    outer_order: the order of the outer batches, ``[num_outer_batches]`` int32.
  """

  base_key: jax.Array
  num_rounds: jax.Array
  order: jax.Array
  outer_order: jax.Array


def finite_sum_stream(
  train: Data, val: Data, batch_size: int, *, val_batch_size: int | None = None
) -> Stream:
  """A stream of the fixed batches of two data sets, for methods that remember batches.

  The first ``batch_size`` rows are batch 0, the next ones batch 1, and so on: shuffle the rows
  before, if their order means something. In each epoch every batch comes once, in a new random
  order; the two data sets have epochs of their own. So a table with a row for each batch
  (:func:`jaxbo.saba`) is full after one epoch.

  Args:
    train: a pytree of arrays that share the leading axis ``[num_examples, ...]``, for the inner
      loss.
    val: a pytree of arrays for the outer loss; its leading axis may have another length.
    batch_size: the number of rows of an inner batch, at least 1; it must divide the rows of
      ``train``.
    val_batch_size: the same for the outer batches; ``None`` for ``batch_size``.

  Returns:
    A :class:`Stream` of :class:`FiniteSumBatch`. The order of an epoch depends on the key and the
    number of the epoch alone.

  Raises:
    ValueError: if a size is below 1 or does not divide the rows, or the leading axes within
      ``train`` or ``val`` differ or are empty.

  Example:
    >>> import jax, jax.numpy as jnp, jaxbo
    >>> stream = jaxbo.tasks.finite_sum_stream(jnp.arange(6), jnp.arange(2), 2, val_batch_size=1)
    >>> _, batches = jax.lax.scan(lambda s, _: stream.step(s), stream.init(0), length=6)
    >>> bool((batches.train[:, 0] == 2 * batches.extra.index).all())
    True
    >>> print(jnp.bincount(batches.extra.index), jnp.bincount(batches.extra.outer_index))
    [2 2 2] [3 3]
  """
  sizes = []
  for name, data, size_name, size in (
    ("train", train, "batch_size", batch_size),
    ("val", val, "val_batch_size", batch_size if val_batch_size is None else val_batch_size),
  ):
    size, rows = _check.positive_int(size_name, size), num_examples(name, data)
    if rows % size:
      raise ValueError(
        f"{size_name} must divide the {rows} rows of {name}, got {size}: leave out {rows % size} "
        "rows, or choose another size"
      )
    sizes.append((rows // size, size))
  train, val = jax.tree.map(jnp.asarray, (train, val))
  init, step = (bound(function, sizes=tuple(sizes)) for function in (_first_round, _next_round))
  return Stream(jax.tree_util.Partial(init), jax.tree_util.Partial(step, (train, val)))


def _first_round(key: Key = 0, *, sizes):
  orders = (jnp.arange(num_batches, dtype=jnp.int32) for num_batches, _ in sizes)
  return FiniteSumState(_random.default_key_data(key), jnp.int32(0), *orders)


def _next_round(data, state, *, sizes):
  key, t = jax.random.wrap_key_data(state.base_key), state.num_rounds

  def draw(side, order):
    num_batches, size = sizes[side]
    epoch, position = jnp.divmod(t, num_batches)
    epoch_key = jax.random.fold_in(jax.random.fold_in(key, side), epoch)
    shuffle = lambda _: jax.random.permutation(epoch_key, jnp.arange(num_batches, dtype=jnp.int32))
    order = jax.lax.cond(position == 0, shuffle, lambda order: order, order)
    index = order[position]
    return order, index, jax.tree.map(lambda leaf: _rows(leaf, index, size), data[side])

  order, index, train = draw(0, state.order)
  outer_order, outer_index, val = draw(1, state.outer_order)
  which = BatchIndex(index, outer_index, sizes[0][0], sizes[1][0])
  state = FiniteSumState(state.base_key, _schedule.after(t), order, outer_order)
  return state, FiniteSumBatch(train, val, which)


def _rows(leaf, index, size):
  sharding = _tree.explicit_sharding(leaf)
  if sharding is None:
    return jax.lax.dynamic_slice_in_dim(leaf, index * size, size)
  # On an explicit mesh, the batch is divided as the data are.
  return leaf.at[index * size + jnp.arange(size)].get(out_sharding=sharding)
