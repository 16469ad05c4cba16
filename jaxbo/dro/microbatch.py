"""Losses and weighted gradients of a batch, one microbatch at a time."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, PartitionSpec

from jaxbo import _tree
from jaxbo._types import Data, PyTree
from jaxbo.dro.batch import Over


class Microbatches(NamedTuple):
  """A batch, cut into microbatches with a stride.

  Microbatch ``j`` of ``num_steps`` holds the examples ``j, j + num_steps, ...``. If the batch is
  divided among devices, every microbatch is too, and no example moves. Leaves of the batch whose
  leading axis is not the number of examples (a key, a scalar) go whole to every microbatch.

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
    return _reshape(leaf, shape, lambda spec: (spec[0], None, *spec[1:]))

  def merge(self, stacked: jax.Array) -> jax.Array:
    """Reshapes the output of a scan, ``[num_steps, size, ...]``, to ``[num_examples, ...]``."""
    leaf = jnp.swapaxes(stacked, 0, 1)
    shape = (self.num_examples, *leaf.shape[2:])
    return _reshape(leaf, shape, lambda spec: (spec[0], *spec[2:]))

  def each(self, batch: Data) -> Callable[[jax.Array], PyTree]:
    """Returns a function from ``j`` to microbatch ``j``."""
    cut = jax.tree.map(lambda leaf: self.split(leaf) if self.holds(leaf) else leaf, batch)

    def take_leaf(leaf, of_cut, j):
      if self.holds(leaf):
        of_cut = jax.lax.dynamic_index_in_dim(of_cut, j, 1, keepdims=False)
      # Each microbatch draws the same numbers on purpose.
      return jax.random.clone(of_cut) if _is_key(of_cut) else of_cut

    return lambda j: jax.tree.map(lambda leaf, of_cut: take_leaf(leaf, of_cut, j), batch, cut)

  def holds(self, leaf: jax.typing.ArrayLike) -> bool:
    """Whether ``leaf`` has a row for each example."""
    return jnp.ndim(leaf) > 0 and jnp.shape(leaf)[0] == self.num_examples


def make_microbatches(num_examples: int, size: int) -> Microbatches:
  """Returns the microbatches; raises ``ValueError`` unless ``size`` divides ``num_examples``."""
  if num_examples % size:
    raise ValueError(
      f"microbatch_size must divide the number of examples, {num_examples}, got {size}; fill the "
      "batch up and mask what is not wanted"
    )
  return Microbatches(num_examples, size)


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
  microbatches: Microbatches, batch: Data, keep: jax.Array, over: Over
) -> Callable[[jax.Array], PyTree]:
  """Returns a function from ``j`` to microbatch ``j`` with bad rows replaced.

  The first row that is kept, on any device, replaces every row that is not. Keys stay as they are.
  """
  chosen = over.first(keep)
  along = lambda rows, leaf: jnp.expand_dims(rows, tuple(range(1, leaf.ndim)))
  replaceable = lambda leaf: microbatches.holds(leaf) and not _is_key(leaf)

  def good_row(leaf):
    if not replaceable(leaf):
      return None
    summable = jnp.asarray(leaf, jnp.int32 if leaf.dtype == bool else leaf.dtype)
    return over.sum(jnp.where(along(chosen, leaf), summable, 0), axis=0).astype(leaf.dtype)[None]

  leaves, structure = jax.tree.flatten(batch)
  rows = [good_row(leaf) for leaf in leaves]
  take_all = microbatches.each((leaves, keep))

  def take(j):
    taken, kept = take_all(j)
    repaired = [
      leaf if row is None else jnp.where(along(kept, leaf), leaf, row)
      for leaf, row in zip(taken, rows, strict=True)
    ]
    return structure.unflatten(repaired)

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
  sharding = jax.typeof(leaf).sharding
  if AxisType.Explicit not in sharding.mesh.axis_types:
    return jnp.reshape(leaf, shape)
  axes = tuple(sharding.spec) + (None,) * (leaf.ndim - len(sharding.spec))
  return jnp.reshape(leaf, shape, out_sharding=PartitionSpec(*spec(axes)))
