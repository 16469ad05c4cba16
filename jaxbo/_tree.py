"""The few pytree operations that ``optax.tree`` lacks."""

import functools
import operator
from typing import Any, TypeVar

import jax
import jax.core
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding

from jaxbo._types import PyTree

T = TypeVar("T")


def vdot(a: PyTree, b: PyTree) -> jax.Array:
  """Inner product over all leaves, accumulated in float32 at least.

  Written as ``sum(x * y)``: ``jnp.vdot`` flattens, which fails under explicit sharding.
  """
  products = jax.tree.map(lambda x, y: jnp.sum(_at_least_float32(x) * _at_least_float32(y)), a, b)
  return functools.reduce(operator.add, jax.tree.leaves(products), jnp.zeros((), jnp.float32))


def norm(tree: PyTree) -> jax.Array:
  """Euclidean norm over all leaves, accumulated in float32 at least."""
  return jnp.sqrt(vdot(tree, tree))


def all_finite(tree: PyTree) -> jax.Array:
  """True if no leaf contains a NaN or an infinity."""
  floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]
  leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in floats]
  return functools.reduce(jnp.logical_and, leaves, jnp.bool_(True))


def at_least_float32(tree: PyTree) -> PyTree:
  """Casts float16 and bfloat16 leaves to float32 and leaves every other leaf as it is."""
  return jax.tree.map(_at_least_float32, tree)


def at_least_int32(ints: jax.typing.ArrayLike) -> jax.Array:
  """Casts narrower integers to int32, so that they compare with numbers that they cannot hold."""
  return jnp.asarray(ints).astype(jnp.result_type(ints, jnp.int32))


def zeros_at_least_float32(tree: PyTree) -> PyTree:
  """Zeros like ``tree`` (arrays or ``ShapeDtypeStruct``) and its sharding, in float32 at least."""
  return jax.tree.map(lambda x: zeros_like(x, _at_least_float32_dtype(x)), tree)


def has_low_precision(tree: PyTree) -> bool:
  """True if some leaf is a float narrower than float32."""
  leaves = jax.tree.leaves(tree)
  return any(_at_least_float32_dtype(leaf) != jnp.result_type(leaf) for leaf in leaves)


def copy(tree: PyTree) -> PyTree:
  """Copies every leaf into a new buffer, without weak types.

  A state must not share a buffer with the parameters, because both may be donated. It must not be
  weakly typed, because the first update would then change its types and JAX would trace again.
  """
  return jax.tree.map(lambda x: jnp.array(x, dtype=jnp.result_type(x), copy=True), tree)


def add_scaled(a: PyTree, scale: jax.typing.ArrayLike, b: PyTree) -> PyTree:
  """Returns ``a + scale * b`` in the dtypes of ``a``."""
  return jax.tree.map(lambda x, y: x + jnp.asarray(scale, x.dtype) * y, a, b)


def scaled(scale: jax.typing.ArrayLike, tree: PyTree) -> PyTree:
  """Returns ``scale * tree`` in the dtypes of ``tree``."""
  return jax.tree.map(lambda leaf: jnp.asarray(scale, leaf.dtype) * leaf, tree)


def where(condition: jax.Array, a: T, b: T) -> T:
  """Selects all of ``a`` or all of ``b`` by one boolean."""
  return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


def cast_like(tree: T, target: PyTree) -> T:
  """Casts every leaf to the dtype of the corresponding leaf of ``target``."""
  return jax.tree.map(lambda x, t: x.astype(t.dtype), tree, target)


def explicit_sharding(x: jax.typing.ArrayLike) -> NamedSharding | None:
  """Returns the sharding in the type of ``x``, if its mesh has explicit axes."""
  sharding = jax.typeof(x).sharding
  return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def varying_axes(x: jax.typing.ArrayLike | jax.ShapeDtypeStruct) -> frozenset[str]:
  """The axes of the ``shard_map`` around over which ``x`` is known to vary."""
  return frozenset(jax.typeof(x).manual_axis_type.varying)


def zeros_like(x: jax.typing.ArrayLike | jax.ShapeDtypeStruct, dtype: Any) -> jax.Array:
  """``jnp.zeros_like``, also where JAX 0.12 forgets the sharding: traced without ``set_mesh``."""
  zeros, sharding = jnp.zeros_like(x, dtype=dtype), jax.typeof(x).sharding
  lost = AxisType.Explicit in sharding.mesh.axis_types and jax.typeof(zeros).sharding != sharding
  return jax.sharding.reshard(zeros, sharding) if lost else zeros


def vary_alike(tree: T, *others: PyTree) -> T:
  """Marks ``tree`` as varying over every ``shard_map`` axis over which one of ``others`` varies.

  Inside ``shard_map``, the carry of a loop must not change its type.
  """
  axes = frozenset().union(*map(varying_axes, jax.tree.leaves(others)))

  def cast(x):
    missing = tuple(sorted(axes - varying_axes(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x

  return jax.tree.map(cast, tree)


def empty_slots(like: PyTree, size: int, dtype: jax.typing.DTypeLike | None = None) -> PyTree:
  """Zeros ``[size, ...]`` for values shaped and sharded like ``like``, arrays or their types."""

  def slots(leaf):
    zeros = zeros_like(leaf, dtype or jnp.result_type(leaf))
    return jnp.broadcast_to(zeros, (size, *zeros.shape))

  return jax.tree.map(slots, like)


def put_slot(slots: PyTree, value: PyTree, index: jax.Array) -> PyTree:
  """Writes ``value`` into one of the slots ``[size, ...]``, which stay divided as they are."""

  def put(slots, leaf):
    leaf, sharding = jnp.asarray(leaf, slots.dtype), explicit_sharding(slots)
    on_mesh = explicit_sharding(leaf)
    if sharding is None and on_mesh is not None:  # The slots are of parameters outside a mesh.
      sharding = on_mesh.update(spec=(None, *on_mesh.spec))
      slots = jax.sharding.reshard(slots, sharding)
    if sharding is not None:
      leaf = jax.sharding.reshard(leaf, sharding.update(spec=sharding.spec[1:]))
    return jax.lax.dynamic_update_index_in_dim(slots, leaf, index, axis=0)

  return jax.tree.map(put, slots, value)


def on_meshes_of(types: PyTree, arrays: PyTree) -> PyTree:
  """Gives ``jax.ShapeDtypeStruct`` the devices of ``arrays``, so that zeros can be like them.

  A trace knows the names and sizes of a mesh, and not its devices.
  """
  known = (x for x in jax.tree.leaves(arrays) if not isinstance(x, jax.core.Tracer))
  shardings = (getattr(x, "sharding", None) for x in known)
  of_names = (s.mesh for s in shardings if isinstance(s, NamedSharding))
  meshes: dict[Any, Any] = {mesh.abstract_mesh: mesh for mesh in of_names}

  def placed(leaf):
    sharding = leaf.sharding
    mesh = meshes.get(sharding.mesh) if isinstance(sharding, NamedSharding) else None
    return leaf if mesh is None else leaf.update(sharding=NamedSharding(mesh, sharding.spec))

  return jax.tree.map(placed, types)


def _at_least_float32(x: jax.typing.ArrayLike) -> jax.Array:
  x = jnp.asarray(x)
  return x.astype(_at_least_float32_dtype(x))


def _at_least_float32_dtype(x: jax.typing.ArrayLike | jax.ShapeDtypeStruct) -> jnp.dtype:
  dtype = jnp.result_type(x)
  return jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.floating) else dtype
