"""Square in l2: hills of the published shape, moved from one square to another."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbo
from jaxbo.adversarial import Box
from jaxbo.adversarial.square import _hill, _hills, _move_hill
from tests.adversarial import problem
from tests.adversarial.problem import model

pytestmark = pytest.mark.slow

PARAMS, (IMAGES, LABELS) = problem.params(), problem.batch()


def rectangle(height, width):
  """As in the published code: 1 / k^2 added to growing rectangles around the center."""
  delta = np.zeros((height, width))
  row, column = height // 2, width // 2
  for k in range(1, max(row, column) + 2):
    delta[max(row, 0) : row + 2 * k - 1, max(column, 0) : column + 2 * k - 1][
      : max(0, min(row, 0) + 2 * k - 1), : max(0, min(column, 0) + 2 * k - 1)
    ] += 1 / k**2
    row, column = row - 1, column - 1
  return delta / np.linalg.norm(delta)


def hill(side):
  upper, lower = rectangle(side // 2, side), rectangle(side - side // 2, side)
  return np.concatenate([upper, -lower]) / np.sqrt(2)


@pytest.mark.parametrize("side", [2, 3, 5, 6, 9, 29])
def test_hills_are_those_of_the_published_code(side):
  position = np.arange(side)
  rows, columns = np.broadcast_to(position[:, None], (2, side, side)), position[None, None]
  columns = np.broadcast_to(columns, (2, side, side))
  turned = jnp.array([False, True])[:, None, None]
  ours = jax.jit(_hill)(rows, columns, side, jnp.ones((2, side, side), bool), turned)
  np.testing.assert_allclose(ours[0], hill(side), atol=1e-6)
  np.testing.assert_allclose(ours[1], hill(side).T, atol=1e-6)


def test_the_attack_starts_at_a_grid_of_hills():
  """On images of 11 by 13: of side 2, five by six of them, from row 0 and column 0 on."""
  start = np.asarray(jax.jit(_hills)(jax.random.key(0), jnp.zeros((4, 11, 13, 2)), 0.5))
  np.testing.assert_allclose(np.sum(start**2, axis=(1, 2, 3)), 0.25, rtol=1e-5)
  cells = start[:, :10, :12].reshape(4, 5, 2, 6, 2, 2).transpose(0, 1, 3, 5, 2, 4)
  assert np.all(start[:, 10:] == 0)
  assert np.all(start[:, :, 12:] == 0)
  shapes = [s * h for s in (1, -1) for h in (hill(2), hill(2).T)]
  scale = 0.5 / np.sqrt(5 * 6 * 2)
  kinds = [np.all(np.abs(cells - scale * shape) < 1e-6, axis=(4, 5)) for shape in shapes]
  assert np.all(np.sum(kinds, axis=0) == 1)
  # All of them occur about as often; a hill is turned for all channels alike.
  shares = np.mean(kinds, axis=(1, 2, 3, 4))
  np.testing.assert_allclose(shares, 0.25, atol=4 * np.sqrt(0.25 * 0.75 / 120))
  upright = kinds[0] | kinds[2]
  np.testing.assert_array_equal(upright[..., 0], upright[..., 1])


def find_square(rows, columns):
  """The side and the corner of a square by whichever of its pixels are given."""
  return rows.max() - rows.min() + 1, rows.min(), columns.min()


def test_a_query_moves_a_hill():
  """By hand, where the two squares can be seen: on one that is 1 everywhere."""
  before = np.ones((30, 12, 12, 2), "f") / np.sqrt(288)
  epsilon = 1.2
  after = np.asarray(jax.jit(_move_hill)(jax.random.key(0), before, 25 / 144, epsilon), np.float64)
  np.testing.assert_allclose(np.sum(after**2, axis=(1, 2, 3)), epsilon**2, rtol=1e-5)
  places, apart = set(), 0
  for x in after:
    empty = np.all(x == 0, axis=2)
    rest = np.median(x)
    filled = np.any(np.abs(x - rest) > 1e-6, axis=2) & ~empty
    place = [*find_square(*np.nonzero(filled)), *find_square(*np.nonzero(empty))]
    if filled.sum() != 25 or empty.sum() != 25:
      continue  # They overlap.
    apart += 1
    places.add(tuple(place[1:3]))
    places.add(tuple(place[4:]))
    assert place[0] == place[3] == 5
    row, column = place[1:3]
    window = x[row : row + 5, column : column + 5]
    # Its squared norm: those of both squares, and half of the lack; then all are scaled.
    size = np.sqrt(2 * 25 * 2 / 288 + (epsilon**2 - 1) / 2)
    flat = np.full((5, 5), 1 / 5)
    found = []
    for sign in (1, -1):
      for of_side in (hill(5), hill(5).T):
        shape = sign * of_side + flat
        found.append(size * shape / np.linalg.norm(shape))
    whole = np.sqrt(2 * size**2 + (288 - 100) / 288)
    for channel in range(2):
      errors = [np.abs(window[..., channel] - epsilon * f / whole).max() for f in found]
      assert min(errors) < 1e-5
    assert rest == pytest.approx(epsilon / whole / np.sqrt(288), rel=1e-4)
  assert apart > 8
  assert len(places) > 12


@functools.cache
def run(num_queries):
  flat = lambda params, images: jax.lax.stop_gradient(model(params, images))
  attack = jaxbo.adversarial.square(flat, Box(0.5, norm="l2"), num_queries=num_queries)
  return jax.device_get(attack.run(PARAMS, (IMAGES, LABELS), 0))


def test_square_in_l2_improves_with_its_queries_and_fills_the_ball():
  margin = lambda images: np.asarray(jaxbo.adversarial.margin_loss(model(PARAMS, images), LABELS))
  few, many = margin(run(1)[0]), margin(run(300)[0])
  assert np.all(many >= few)
  assert np.mean(many) > np.mean(few) + 0.1
  sizes = np.linalg.norm((run(300)[0] - IMAGES).reshape(len(IMAGES), -1), axis=1)
  assert np.all(sizes <= 0.5 + 1e-6)
  assert np.median(sizes) > 0.3  # Pixels at 0 and 1 are in the way.


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 1), (4, 4, 3), (7, 5, 2)])
def test_small_images_have_small_squares(shape):
  images = jnp.full((5, *shape), 0.5)
  linear = lambda params, x: jnp.stack([x.sum(axis=(1, 2, 3)) - 9, 9 - x.sum(axis=(1, 2, 3))], 1)
  attack = jaxbo.adversarial.square(linear, Box(0.1, norm="l2"), num_queries=20)
  perturbed, info = attack.run((), (images, jnp.ones(5, jnp.int32)), 0)
  assert np.isfinite(perturbed).all()
  assert not info.not_finite.any()
  sizes = np.linalg.norm((perturbed - images).reshape(5, -1), axis=1)
  assert np.all((sizes <= 0.1 + 1e-6) & (sizes > 0.05))
