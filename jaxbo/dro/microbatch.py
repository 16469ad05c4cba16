"""Losses and weighted gradients of a batch, one microbatch at a time."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from jaxbo import _tree
from jaxbo._types import Data, PyTree
from jaxbo.dro.batch import Over


class Microbatches(NamedTuple):
  """A batch, cut into microbatches with a stride.

  Microbatch ``j`` of ``num_steps`` holds the examples ``j, j + num_steps, ...``. If the batch is
  divided among devices, every microbatch is too, and no example moves.

  Attributes:
    num_examples: examples in the batch.
    size: examples in a microbatch.
  """

  num_examples: int
  size: int

  @property
  def num_steps(self) -> int:
    """The number of microbatches."""
    return self.num_examples // self.size

  def split(self, leaf: jax.typing.ArrayLike) -> jax.Array:
    """Reshapes ``[num_examples, ...]`` to ``[size, num_steps, ...]``."""
    leaf = jnp.asarray(leaf)
    shape = (self.size, self.num_steps, *leaf.shape[1:])
    # An explicit mesh cannot divide fewer rows than it has devices: all of them get these rows.
    divides = self.size % num_shards(leaf) == 0
    return _reshape(leaf, shape, lambda spec: (spec[0] if divides else None, None, *spec[1:]))

  def merge(self, stacked: jax.Array) -> jax.Array:
    """Reshapes the output of a scan, ``[num_steps, size, ...]``, to ``[num_examples, ...]``."""
    leaf = jnp.swapaxes(stacked, 0, 1)
    shape = (self.num_examples, *leaf.shape[2:])
    return _reshape(leaf, shape, lambda spec: (spec[0], *spec[2:]))

  def each(self, rows: PyTree) -> Callable[[jax.Array], PyTree]:
    """Returns a function from ``j`` to microbatch ``j`` of ``rows``, leaves ``[batch, ...]``."""
    cut = jax.tree.map(self.split, rows)
    take_leaf = lambda leaf, j: jax.lax.dynamic_index_in_dim(leaf, j, 1, keepdims=False)
    return lambda j: jax.tree.map(lambda leaf: take_leaf(leaf, j), cut)


def make_microbatches(num_examples: int, size: int) -> Microbatches:
  """Returns the microbatches; raises ``ValueError`` unless ``size`` divides ``num_examples``."""
  if num_examples % size:
    raise ValueError(
      f"microbatch_size must divide the number of examples, {num_examples}, got {size}; fill the "
      "batch up and mask what is not wanted"
    )
  return Microbatches(num_examples, size)


def split_batch(
  batch: Data, batch_axes: PyTree, num_examples: int
) -> tuple[list[jax.Array], Callable[[list[jax.Array]], Data]]:
  """Takes a batch apart into what is per example and what all examples share.

  Args:
    batch: a pytree of arrays.
    batch_axes: a prefix of ``batch``: the axis of the examples, or ``None`` for shared leaves.
    num_examples: the length of that axis.

  Returns:
    The leaves that are per example, ``[num_examples, ...]``, and a function that takes some rows of
    each and returns the batch of these rows.
  """
  leaves, structure = jax.tree.flatten(batch)
  axes: list[int | None] = []
  add = lambda axis, part: axes.extend([axis] * len(jax.tree.leaves(part)))
  try:
    jax.tree.map(add, batch_axes, batch, is_leaf=lambda node: node is None)
  except ValueError as error:
    raise ValueError(
      f"batch_axes must be a prefix of the batch, as in_axes of jax.vmap, got {batch_axes!r}: "
      f"{error}"
    ) from None
  for (path, leaf), axis in zip(jax.tree_util.tree_leaves_with_path(batch), axes, strict=True):
    if axis is not None and not isinstance(axis, int):
      raise TypeError(f"batch_axes must hold integers and None, got {axis!r}")
    shape = jnp.shape(leaf)
    there = axis is None or -len(shape) <= axis < len(shape)
    if not there or (axis is not None and shape[axis] != num_examples):
      raise ValueError(
        f"batch{jax.tree_util.keystr(path)} must have {num_examples} rows along axis {axis}, one "
        f"for each loss, got shape {shape}: batch_axes, here {batch_axes!r}, must be None for a "
        "leaf that all examples share"
      )

  def join(rows: list[jax.Array]) -> Data:
    taken = iter(rows)
    parts = [
      leaf if axis is None else jnp.moveaxis(next(taken), 0, axis)
      for leaf, axis in zip(leaves, axes, strict=True)
    ]
    # Each microbatch draws the same numbers on purpose.
    parts = [jax.random.clone(part) if _is_key(part) else part for part in parts]
    return structure.unflatten(parts)

  per_example = ((leaf, axis) for leaf, axis in zip(leaves, axes, strict=True) if axis is not None)
  return [jnp.moveaxis(jnp.asarray(leaf), axis, 0) for leaf, axis in per_example], join


def weighted_gradient(
  loss_fn: Callable[..., jax.Array],
  params: optax.Params,
  take: Callable[[jax.Array], PyTree],
  weights: jax.Array,
  microbatches: Microbatches,
) -> optax.Updates:
  """Returns the gradient of ``sum(weights * losses)``, added up in at least float32."""
  weights_of = microbatches.each(weights)

  def add(total, j):
    losses, pullback = jax.vjp(lambda params: loss_fn(params, take(j)), params)
    if losses.shape != (microbatches.size,):
      raise ValueError(
        f"loss_fn must give one loss for each row of a batch of {microbatches.size}, which repair "
        f"and microbatch_size give it, got shape {losses.shape}: a loss that closes over an "
        "array of the whole batch must be given that array in its batch"
      )
    (gradient,) = pullback(weights_of(j).astype(losses.dtype))
    return optax.tree.add(total, _tree.at_least_float32(gradient)), None

  zeros = _tree.zeros_at_least_float32(params)
  total, _ = jax.lax.scan(add, zeros, jnp.arange(microbatches.num_steps))
  return _tree.cast_like(total, params)


def take_repaired(
  microbatches: Microbatches, rows: list[jax.Array], keep: jax.Array, over: Over
) -> Callable[[jax.Array], list[jax.Array]]:
  """Returns a function from ``j`` to microbatch ``j`` with bad rows replaced.

  The first row that is kept, on any device, replaces every row that is not. Keys stay as they are.
  """
  chosen = over.first(keep)
  along = lambda of_rows, leaf: jnp.expand_dims(of_rows, tuple(range(1, leaf.ndim)))

  def good_row(leaf):
    if _is_key(leaf):
      return None
    summable = leaf.astype(jnp.int32) if leaf.dtype == bool else leaf
    return over.sum(jnp.where(along(chosen, leaf), summable, 0), axis=0).astype(leaf.dtype)[None]

  good_rows = [good_row(leaf) for leaf in rows]
  take_all = microbatches.each((rows, keep))

  def take(j):
    taken, kept = take_all(j)
    return [
      leaf if good is None else jnp.where(along(kept, leaf), leaf, good)
      for leaf, good in zip(taken, good_rows, strict=True)
    ]

  return take


def _is_key(leaf: jax.typing.ArrayLike) -> bool:
  return jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)


def num_shards(x: jax.Array) -> int:
  """Returns over how many devices the type of ``x`` divides its leading axis."""
  sharding = jax.typeof(x).sharding
  names = sharding.spec[0] if len(sharding.spec) else None
  names = (names,) if isinstance(names, str) else names or ()
  return math.prod(sharding.mesh.shape[name] for name in names)


def _reshape(
  leaf: jax.Array, shape: tuple[int, ...], spec: Callable[[tuple[object, ...]], tuple[object, ...]]
) -> jax.Array:
  """Reshapes ``leaf``; an explicit mesh also needs the sharding of the result."""
  sharding = _tree.explicit_sharding(leaf)
  if sharding is None:
    return jnp.reshape(leaf, shape)
  axes = tuple(sharding.spec) + (None,) * (leaf.ndim - len(sharding.spec))
  return jnp.reshape(leaf, shape, out_sharding=sharding.update(spec=PartitionSpec(*spec(axes))))
