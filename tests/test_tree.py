"""Pytree operations: precision, dtypes, copies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxbo import _check, _random, _tree
from jaxbo.bilevel import response


def test_inner_products_are_accumulated_in_float32():
  """In bfloat16 a sum of ones stops at 256; in float16 a square overflows at 256."""
  ones = jnp.ones(4096, jnp.bfloat16)
  assert _tree.vdot(ones, ones) == 4096
  big = jnp.full(4, 1000.0, jnp.float16)
  assert _tree.norm(big) == 2000
  assert _tree.vdot(ones, ones).dtype == jnp.float32


def test_inner_products_cover_all_leaves_in_their_widest_dtype(x64):
  a = {"a": jnp.float32(2.0), "b": jnp.arange(3.0), "c": jnp.ones(2, jnp.bfloat16)}
  assert _tree.vdot(a, a) == 4 + 5 + 2
  assert _tree.vdot(a, a).dtype == jnp.float64
  assert _tree.vdot((), ()) == 0


def test_all_finite_looks_at_floats_alone():
  assert _tree.all_finite({"count": jnp.int32(3), "x": jnp.ones(2), "key": jax.random.key(0)})
  assert not _tree.all_finite((jnp.ones(2), jnp.array([1.0, jnp.inf])))
  assert not _tree.all_finite(jnp.float16(jnp.nan))
  assert _tree.all_finite(())


def test_copies_have_buffers_of_their_own_and_no_weak_type():
  x = jnp.asarray(1.0)
  copy = _tree.copy({"x": x, "y": 2.0})
  assert not any(leaf.weak_type for leaf in jax.tree.leaves(copy))
  assert copy["x"].unsafe_buffer_pointer() != x.unsafe_buffer_pointer()


def test_key_data_is_a_copy():
  """The state may be donated; the key of the user must survive it."""
  for key in (jax.random.key(3), jax.random.PRNGKey(3)):
    data = _random.key_data(key)
    raw = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    assert data.unsafe_buffer_pointer() != raw.unsafe_buffer_pointer()
    np.testing.assert_array_equal(data, raw)


def test_the_response_is_added_in_float32():
  """256 + 1 in bfloat16 is 256; in float32 the sum 256 + 1.75 rounds to 258."""
  total = response.add(jnp.full(1, 256.0, jnp.bfloat16), jnp.full(1, 1.75, jnp.float32))
  assert total.dtype == jnp.bfloat16
  assert total[0] == 258


def test_a_response_that_is_not_finite_counts_as_zero():
  result, finite = response.guard({"a": jnp.ones(2), "b": jnp.array([1.0, jnp.nan])})
  assert not finite
  np.testing.assert_array_equal(result["a"], 0)
  np.testing.assert_array_equal(result["b"], 0)


@jax.tree_util.register_pytree_node_class
class Pair:
  """A node of a class that does not know what is equal to it."""

  def __init__(self, *leaves):
    self.leaves = leaves

  def tree_flatten(self):
    return self.leaves, None

  @classmethod
  def tree_unflatten(cls, _, leaves):
    return cls(*leaves)


def test_structures_are_compared_leaf_by_leaf():
  _check.same_structure("grads", Pair(jnp.ones(2), 1.0), "x", Pair(jnp.zeros(2), 2.0))
  for other in (Pair(jnp.ones(3), 1.0), Pair(jnp.ones(2)), (jnp.ones(2), 1.0)):
    with pytest.raises(ValueError, match="grads must have the structure and shapes of x"):
      _check.same_structure("grads", Pair(jnp.ones(2), 1.0), "x", other)


def test_zeros_are_divided_as_what_they_are_like_without_set_mesh():
  mesh = jax.make_mesh((8,), ("d",))
  x = jax.device_put(jnp.ones((8, 2), jnp.bfloat16), NamedSharding(mesh, PartitionSpec("d")))

  @jax.jit
  def zeros(x):
    types = jax.eval_shape(lambda: x)
    return _tree.zeros_at_least_float32(x), _tree.empty_slots(types, 3)

  like, slots = zeros.trace(x).out_info
  assert like.sharding.spec == PartitionSpec("d", None)
  assert slots.sharding.spec == PartitionSpec(None, "d", None)
