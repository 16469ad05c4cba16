"""What a mesh with explicit axes wants to be told; on any other mesh, nothing happens here."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding


def explicit_sharding(x: jax.Array) -> NamedSharding | None:
  """Returns the sharding in the type of ``x``, if its mesh has explicit axes."""
  sharding = jax.typeof(x).sharding
  return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def zeros_like(x: jax.Array, dtype: Any = None) -> jax.Array:
  """``jnp.zeros_like``, also where JAX 0.12 forgets the sharding: without ``jax.set_mesh``."""
  zeros, sharding = jnp.zeros_like(x, dtype), explicit_sharding(x)
  return jax.sharding.reshard(zeros, sharding) if sharding else zeros


def divided_as(tree: Any, x: jax.Array) -> jax.Array:
  """Returns ``x [batch, ...]``, divided as the leaves ``[batch, ...]`` of ``tree`` are.

  A loop must begin with rows that are divided as those that its body returns.
  """
  for sharding in map(explicit_sharding, jax.tree.leaves(tree)):
    if sharding and sharding.spec and sharding.spec[0] is not None:
      return jax.sharding.reshard(x, sharding.update(spec=sharding.spec[:1]))
  return x


def dot_general(x: jax.Array, kernel: jax.Array, dimensions: Any, **options: Any) -> jax.Array:
  """``jax.lax.dot_general`` of a layer whose kernel may be divided along its inputs.

  The devices then add up their parts of the product (row-wise tensor parallelism).
  """
  sharding = explicit_sharding(kernel)
  (of_x, of_kernel), _ = dimensions
  if sharding and any(axis < len(sharding.spec) and sharding.spec[axis] for axis in of_kernel):
    rest = lambda array, axes: tuple(
      name for axis, name in enumerate(_spec(array)) if axis not in [a % array.ndim for a in axes]
    )
    options["out_sharding"] = sharding.update(spec=(*rest(x, of_x), *rest(kernel, of_kernel)))
  return jax.lax.dot_general(x, kernel, dimensions, **options)


def _spec(x: jax.Array) -> tuple[Any, ...]:
  spec = tuple(jax.typeof(x).sharding.spec)
  return spec + (None,) * (x.ndim - len(spec))
