"""The projection as a tail."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbo


def box(tree):
  return jax.tree.map(lambda leaf: jnp.clip(leaf, 0, 1), tree)


def test_projected_descent_ends_at_the_nearest_point_of_box_and_simplex(x64):
  """Of a quadratic; the simplex' answer is by hand: (0.9, 0.1, 0)."""
  target = jaxbo.Bilevel(jnp.array([2.0, 0.3, -1.0]), jnp.array([1.0, 0.2, -3.0]))
  loss = lambda p: sum(jnp.sum((a - b) ** 2) for a, b in zip(p, target, strict=True))
  tx = optax.chain(
    optax.sgd(0.2), jaxbo.project(box, lambda y: optax.projections.projection_simplex(y))
  )
  params = jaxbo.Bilevel(jnp.zeros(3), jnp.ones(3) / 3)
  state = tx.init(params)
  update = jax.jit(lambda s, p: tx.update(jax.grad(loss)(p), s, p))
  for _ in range(100):
    updates, state = update(state, params)
    params = optax.apply_updates(params, updates)
    assert jnp.all((params.outer >= 0) & (params.outer <= 1))
    np.testing.assert_allclose(jnp.sum(params.inner), 1, rtol=1e-12)
  np.testing.assert_allclose(params.outer, [1, 0.3, 0], atol=1e-12)
  np.testing.assert_allclose(params.inner, [0.9, 0.1, 0], atol=1e-12)


def test_what_needs_no_projection_is_left_alone_bit_for_bit():
  params = jaxbo.Bilevel({"a": jnp.float32(0.3), "b": jnp.full((2, 3), 0.7)}, jnp.ones(2))
  updates = jaxbo.Bilevel({"a": jnp.float32(1e-9), "b": jnp.full((2, 3), 0.1)}, jnp.ones(2))
  result, _ = jaxbo.project(outer=box).update(updates, optax.EmptyState(), params)
  chex.assert_trees_all_equal(result, updates)


def test_low_precision_is_projected_in_float32():
  params = jaxbo.Bilevel(jnp.bfloat16(0.75), jnp.bfloat16(0.0))
  updates = jaxbo.Bilevel(jnp.bfloat16(4.0), jnp.bfloat16(4.0))
  result, _ = jaxbo.project(box, box).update(updates, optax.EmptyState(), params)
  chex.assert_trees_all_equal_shapes_and_dtypes(result, params)
  assert optax.apply_updates(params, result) == (1, 1)
  # The sum of these is 1 in bfloat16, inside of the box.
  params = jaxbo.Bilevel(jnp.bfloat16(1.0), jnp.bfloat16(1.0))
  updates = jaxbo.Bilevel(jnp.bfloat16(1e-3), jnp.bfloat16(1e-3))
  result, _ = jaxbo.project(box).update(updates, optax.EmptyState(), params)
  assert result == (0, updates.inner)


def test_bad_input_is_refused(as_users_run):
  params = jaxbo.Bilevel(jnp.ones(2), jnp.ones(3))
  state = optax.EmptyState()
  with pytest.raises(TypeError, match=r"outer must be a function outer\(params\), got 1\.0"):
    jaxbo.project(1.0)
  with pytest.raises(TypeError, match=r"inner must be a function inner\(params\)"):
    jaxbo.project(inner=lambda: 0)
  with pytest.raises(ValueError, match="project: update must be given params"):
    jaxbo.project(box).update(params, state)
  with pytest.raises(TypeError, match=r"project: params must be jaxbo\.Bilevel"):
    jaxbo.project(box).update(params, state, tuple(params))
  with pytest.raises(TypeError, match=r"project: updates must be jaxbo\.Bilevel, got tuple"):
    jaxbo.project(box).update(tuple(params), state, params)
  with pytest.raises(ValueError, match="what outer returns must have the structure and shapes"):
    jaxbo.project(lambda x: x[:1]).update(params, state, params)
