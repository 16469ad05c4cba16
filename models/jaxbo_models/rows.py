"""Rows of an embedding, on any mesh."""

import jax
import jax.numpy as jnp

from jaxbo_models.mesh import explicit_sharding


def rows(table: jax.Array, ids: jax.Array) -> jax.Array:
  """Returns rows of a table, in the table's dtype; NaN for negative ids and ids past the end.

  The table's dtype, because gradients of equal ids must not be summed in bfloat16. On a mesh with
  explicit axes, the rows are divided as the ids are.
  """
  sharding = explicit_sharding(ids)
  return table.at[ids].get(
    mode="fill",
    fill_value=jnp.nan,
    wrap_negative_indices=False,
    out_sharding=sharding.update(spec=(*sharding.spec, None)) if sharding else None,
  )
