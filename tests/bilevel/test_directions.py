"""Every family of directions: mean, covariance, norms, orthogonality, keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxbo.bilevel import directions
from tests import problems

pytestmark = pytest.mark.slow  # All together, not each.

SHAPES = {"a": (), "b": [(3, 4), (2, 3, 5)]}
P = problems.count(SHAPES)
UNBIASED = [name for name in directions.FAMILIES if name != "official"]


def like(shapes=SHAPES, dtype=jnp.float32):
  return problems.tree_of(shapes, dtype)[0]


def rows(trees, count):
  return np.concatenate(
    [np.asarray(leaf, np.float64).reshape(count, -1) for leaf in jax.tree.leaves(trees)], axis=1
  )


def many(name, num_keys, num_samples=1, shapes=SHAPES):
  """Directions ``[num_keys, num_samples, p]``."""
  shaped_like = like(shapes)

  def draw_all(seed):
    draw = directions.FAMILIES[name](jax.random.key(seed), shaped_like, num_samples)
    return jax.vmap(draw)(jnp.arange(num_samples))

  trees = jax.jit(jax.vmap(draw_all))(jnp.arange(num_keys))
  trees = jax.tree.map(lambda leaf: leaf.reshape(num_keys * num_samples, -1), trees)
  return rows(trees, num_keys * num_samples).reshape(num_keys, num_samples, -1)


@pytest.mark.parametrize("name", UNBIASED)
def test_mean_is_zero_and_covariance_the_identity(name):
  """Within 4.5 standard errors, the worst of p (p + 1) / 2 = 946 entries."""
  u = many(name, 4000)[:, 0]
  assert np.abs(u.mean(axis=0)).max() < 4.5 / np.sqrt(len(u))
  products = u[:, :, None] * u[:, None, :]
  error = np.maximum(products.std(axis=0) / np.sqrt(len(u)), 1e-7)
  assert np.max(np.abs(products.mean(axis=0) - np.eye(P)) / error) < 4.5


def test_signs_of_orthogonal_directions_do_not_depend_on_the_row():
  """Of one key, rows (the last bits of a word for p = 16) would be signs of the second leaf."""
  u = many("orthogonal", 4000, shapes=[(8,), (8,)])[:, 0]
  products = (u[:, :, None] * u[:, None, :]).mean(axis=0) - np.eye(16)
  assert np.abs(products).max() < 4.5 * 1.5 / np.sqrt(len(u))  # |u_n u_m| <= 2


@pytest.mark.parametrize("name", ["sphere", "rademacher", "orthogonal"])
def test_norm_is_the_root_of_p(name):
  np.testing.assert_allclose(np.sum(many(name, 5, 3) ** 2, axis=2), P, rtol=1e-5)


def test_official_directions_have_leaves_of_norm_one():
  u = many("official", 5)[:, 0]
  for leaf in (u[:, :1], u[:, 1:13], u[:, 13:]):
    np.testing.assert_allclose(np.sum(leaf**2, axis=1), 1, rtol=1e-5)


def test_rademacher_directions_are_signs_and_no_bit_is_used_twice():
  u = many("rademacher", 2000, shapes=(70,))[:, 0]
  assert set(np.unique(u)) == {-1.0, 1.0}
  correlation = np.abs(u.T @ u / len(u) - np.eye(70)).max()
  assert correlation < 4.5 / np.sqrt(len(u))


@pytest.mark.parametrize("p", [1, 2, 3, 16, 43, 97])
def test_orthogonal_directions_are_orthogonal_for_every_p(p):
  u = many("orthogonal", 3, p, shapes=(p,))
  for block in u:
    np.testing.assert_allclose(block @ block.T, p * np.eye(p), atol=1e-5 * p)


@pytest.mark.parametrize("row", [0, 1, 7_777_777, 12_424_319])
@pytest.mark.parametrize("begin", [0, 3, 12_424_320 - 50])
def test_rows_of_twelve_million_entries_are_those_of_the_cosine_transform(row, begin):
  """In float32, against exact integers and float64 cosines."""
  p, size = 12_424_320, 50
  cosines = directions._cosines(jnp.uint32(row), begin, size, p, jnp.float32)
  turns = [(2 * n + 1) * row % (4 * p) for n in range(begin, begin + size)]
  expected = np.cos(2 * np.pi * np.array(turns) / (4 * p)) * (1 if row == 0 else np.sqrt(2))
  np.testing.assert_allclose(cosines, expected, atol=2e-6)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data(), p=st.sampled_from([1, 3, 1000, 12_424_320, 2**28 - 1]))
def test_products_modulo_four_p_are_exact(data, p):
  """Against Python's integers, up to the largest p that is allowed."""
  factors = np.array([data.draw(st.integers(0, 4 * p - 1)) for _ in range(4)], np.uint32)
  row = data.draw(st.integers(0, p - 1))
  expected = [int(factor) * row % (4 * p) for factor in factors]
  result = directions._product_modulo(factors, jnp.uint32(row), 4 * p)
  np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("name", directions.FAMILIES)
def test_equal_leaves_and_different_samples_get_different_directions(name):
  u = many(name, 1, 4, shapes=[(5,), (5,)])[0]
  equal = [np.allclose(row[:5], row[5:]) for row in u]
  assert sum(equal) <= 1  # Five signs are equal now and then.
  for first in range(4):
    for second in range(first):
      assert not np.allclose(u[first], u[second])


@pytest.mark.parametrize("name", directions.FAMILIES)
def test_the_same_key_gives_the_same_direction_again_and_another_key_another(name):
  family, shaped_like = directions.FAMILIES[name], like()
  draw = jax.jit(lambda seed: family(jax.random.key(seed), shaped_like, 3)(jnp.int32(2)))
  again, other = problems.flat(draw(0)), problems.flat(draw(1))
  np.testing.assert_array_equal(problems.flat(draw(0)), again)
  assert not np.allclose(again, other)


def test_more_orthogonal_directions_than_parameters_are_refused():
  with pytest.raises(ValueError, match=f"at most the number of perturbed parameters, {P}"):
    directions.orthogonal(jax.random.key(0), like(), P + 1)


def test_orthogonal_directions_in_too_many_dimensions_are_refused():
  huge = jax.ShapeDtypeStruct((2**28,), jnp.float32)
  with pytest.raises(ValueError, match="fewer than 2\\*\\*28 parameters"):
    directions.orthogonal(jax.random.key(0), huge, 4)
