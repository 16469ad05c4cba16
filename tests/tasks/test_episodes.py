"""Episodes: what is drawn, how often, with which labels, and what is refused."""

import functools
import itertools
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbo.tasks
from jaxbo.tasks import sample_episode
from tests.cases import cases

pytestmark = pytest.mark.slow  # All together, not each.

CLASSES, PER_CLASS = 7, 6
# An image is the one number 10 * class + index: what was drawn can be read off the episode.
NUMBERS = (10 * np.arange(CLASSES)[:, None] + np.arange(PER_CLASS)).astype(np.uint8)
WAYS = {"num_ways": 3, "num_shots": 1, "num_queries": 2}
# Class 3 has two images, too few for one shot and two queries; padding is 255.
COUNTS = np.array([6, 3, 5, 2, 4, 6, 3], np.int32)
RAGGED = np.where(np.arange(PER_CLASS) < COUNTS[:, None], NUMBERS, 255).astype(np.uint8)


def square_images(size=5):
  """Images whose corner ``[0, 0]`` is a number above 100 and whose other pixels are all below."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 100, (CLASSES, PER_CLASS, size, size, 2), np.uint8)
  images[:, :, 0, 0, 0] = 100 + NUMBERS
  return images


def episodes(num, images, seed=0, **kwargs):
  """Many episodes of one jitted program, as NumPy arrays ``[num, ...]``."""
  keys = jax.random.split(jax.random.key(seed), num)
  sample = jax.vmap(functools.partial(sample_episode, **(WAYS | kwargs)), in_axes=(0, None))
  return jax.tree.map(np.asarray, jax.jit(sample)(keys, images))


def episode_of(key, images, **kwargs):
  """One episode, jitted: operation by operation the compiler takes seconds."""
  return jax.jit(functools.partial(sample_episode, **(WAYS | kwargs)))(key, images)


def by_class(many):
  """The images of ``episodes``, support first, as ``[num, num_ways, num_images]``."""
  num, num_ways = len(many.support_images), int(many.query_labels.max()) + 1
  parts = (many.support_images, many.query_images)
  return np.concatenate([part.reshape(num, num_ways, -1) for part in parts], axis=2)


def assert_frequencies(values, probabilities):
  """Each value comes as often as its probability says, within four standard errors."""
  observed = np.bincount(values.ravel(), minlength=len(probabilities)) / values.size
  probabilities = np.asarray(probabilities)
  error = np.sqrt(probabilities * (1 - probabilities) / values.size)
  assert np.all(np.abs(observed - probabilities) <= 4 * error), observed


def test_shapes_dtypes_and_labels():
  kwargs = {"num_ways": 4, "num_shots": 2, "num_queries": 3, "num_rotations": 2}
  episode = episode_of(jax.random.key(0), square_images(), **kwargs)
  chex.assert_shape(episode.support_images, (8, 5, 5, 2))
  chex.assert_shape(episode.query_images, (12, 5, 5, 2))
  chex.assert_type([episode.support_images, episode.query_images], jnp.uint8)
  chex.assert_type([episode.support_labels, episode.query_labels], jnp.int32)
  np.testing.assert_array_equal(episode.support_labels, np.repeat(np.arange(4), 2))
  np.testing.assert_array_equal(episode.query_labels, np.repeat(np.arange(4), 3))


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.bfloat16, jnp.float32])
def test_pixels_pass_through_untouched(dtype):
  images = jnp.asarray(square_images(), dtype)
  episode = episode_of(jax.random.key(0), images, num_rotations=4)
  assert episode.query_images.dtype == dtype
  known = np.sort(np.asarray(images, np.float32).reshape(CLASSES * PER_CLASS, -1), axis=1)
  for image in np.asarray(episode.query_images, np.float32):
    assert np.any(np.all(np.sort(image.ravel()) == known, axis=1))


def test_labels_stay_int32_in_double_precision(x64):
  episode = episode_of(jax.random.key(0), NUMBERS)
  assert episode.support_labels.dtype == episode.query_labels.dtype == jnp.int32


def test_rows_of_one_label_are_of_one_class_and_labels_differ_in_class():
  many = episodes(200, NUMBERS)
  assert np.all(many.query_labels == np.repeat(np.arange(3), 2))
  classes = by_class(many) // 10
  assert np.all(classes == classes[:, :, :1])
  assert all(len(set(row)) == 3 for row in classes[:, :, 0].tolist())


def test_support_and_query_are_disjoint_and_no_image_comes_twice():
  drawn = by_class(episodes(200, NUMBERS)).reshape(200, 9)
  assert all(len(set(row)) == 9 for row in drawn.tolist())


def test_an_episode_of_everything_has_every_image_once():
  kwargs = {"num_ways": CLASSES, "num_shots": 2, "num_queries": PER_CLASS - 2}
  drawn = by_class(episodes(1, NUMBERS, **kwargs))
  np.testing.assert_array_equal(np.sort(drawn.ravel()), NUMBERS.ravel())


def test_classes_are_uniform_for_each_label():
  """A label says nothing about the class, and pairs of classes are as likely as any other."""
  classes = by_class(episodes(8000, NUMBERS))[:, :, 0] // 10
  for label in range(3):
    assert_frequencies(classes[:, label], np.full(CLASSES, 1 / CLASSES))
  pairs = CLASSES * classes[:, 0] + classes[:, 1]
  different = ~np.eye(CLASSES, dtype=bool)
  assert_frequencies(pairs, different.ravel() / different.sum())


def test_images_are_uniform_in_each_place_of_the_episode():
  indices = by_class(episodes(8000, NUMBERS)) % 10
  for label, place in itertools.product(range(3), range(3)):
    assert_frequencies(indices[:, label, place], np.full(PER_CLASS, 1 / PER_CLASS))


def test_images_of_different_classes_are_drawn_independently():
  indices = by_class(episodes(8000, NUMBERS))[:, :, 0] % 10
  pairs = PER_CLASS * indices[:, 0] + indices[:, 1]
  assert_frequencies(pairs, np.full(PER_CLASS**2, 1 / PER_CLASS**2))


def test_ragged_classes_never_show_padding_or_a_class_with_too_few_images():
  drawn = by_class(episodes(2000, RAGGED, counts=COUNTS))
  assert not np.any(drawn == 255)
  assert not np.any(drawn // 10 == 3)


def test_ragged_classes_are_uniform_and_so_are_their_images():
  drawn = by_class(episodes(8000, RAGGED, counts=COUNTS))[:, 0, 0]
  eligible = COUNTS >= 3
  assert_frequencies(drawn // 10, eligible / eligible.sum())
  for label in np.flatnonzero(eligible):
    indices = drawn[drawn // 10 == label] % 10
    assert_frequencies(indices, (np.arange(PER_CLASS) < COUNTS[label]) / COUNTS[label])


def test_full_counts_change_nothing():
  full = np.full(CLASSES, PER_CLASS)
  chex.assert_trees_all_equal(
    episodes(5, square_images(), num_rotations=4),
    episodes(5, square_images(), num_rotations=4, counts=full),
  )


def test_counts_may_be_traced():
  sample = lambda counts: sample_episode(jax.random.key(0), RAGGED, **WAYS, counts=counts)
  traced = jax.jit(sample)(COUNTS)
  known = jax.jit(lambda: sample(COUNTS))()
  chex.assert_trees_all_equal(traced, known)


def turns_and_numbers(images):
  """How often the images ``[..., size, size, 2]`` are turned, and which they are."""
  corners = np.stack([np.rot90(images, -k, axes=(-3, -2))[..., 0, 0, 0] for k in range(4)], -1)
  assert np.all(np.sum(corners >= 100, axis=-1) == 1)
  return np.argmax(corners, axis=-1), np.max(corners, axis=-1) - 100


@pytest.mark.parametrize("num_rotations", [1, 2, 3, 4])
def test_each_class_and_turn_is_a_class_of_its_own(num_rotations):
  many = episodes(2000, square_images(), num_rotations=num_rotations)
  turns, numbers = turns_and_numbers(many.query_images.reshape(2000, 3, 2, 5, 5, 2))
  support_turns, support_numbers = turns_and_numbers(many.support_images)
  # All images of an episode class have one turn.
  assert np.all(turns == support_turns[:, :, None])
  assert np.all(numbers // 10 == support_numbers[:, :, None] // 10)
  versions = num_rotations * (support_numbers // 10) + support_turns
  num_versions = num_rotations * CLASSES
  assert_frequencies(versions[:, 0], np.full(num_versions, 1 / num_versions))
  assert all(len(set(row)) == 3 for row in versions.tolist())
  # The same character at two turns is as likely as any other pair of versions.
  pairs = versions[:, 0] // num_rotations == versions[:, 1] // num_rotations
  same = (num_rotations - 1) / (num_versions - 1)
  assert_frequencies(pairs.astype(int), [1 - same, same])


def test_a_turned_image_is_the_image_turned():
  images = square_images()
  episode = episode_of(jax.random.key(3), images, num_ways=20, num_rotations=4)
  query = np.asarray(episode.query_images)
  turns, numbers = turns_and_numbers(query)
  assert set(turns) == {0, 1, 2, 3}
  for image, turn, number in zip(query, turns, numbers, strict=True):
    np.testing.assert_array_equal(image, np.rot90(images[number // 10, number % 10], turn))


def test_with_rotations_there_may_be_more_ways_than_classes():
  many = episodes(3, square_images(), num_ways=4 * CLASSES, num_rotations=4)
  turns, numbers = turns_and_numbers(many.support_images)
  for row in (4 * (numbers // 10) + turns).tolist():
    assert sorted(row) == list(range(4 * CLASSES))


def test_ragged_and_rotated_together():
  images = np.where((RAGGED == 255)[:, :, None, None, None], 255, square_images()).astype(np.uint8)
  many = episodes(500, images, num_rotations=4, counts=COUNTS, num_ways=6 * 4)
  assert not np.any(np.all(many.query_images == 255, axis=(-3, -2, -1)))
  _, numbers = turns_and_numbers(many.query_images)
  assert not np.any(numbers // 10 == 3)


def test_the_key_says_everything():
  one, same, other = (episode_of(jax.random.key(seed), NUMBERS) for seed in (0, 0, 1))
  chex.assert_trees_all_equal(one, same)
  assert np.any(one.query_images != other.query_images)


@pytest.mark.parametrize(
  "key", [lambda: 5, lambda: jax.random.key_data(jax.random.key(5)), lambda: jnp.int32(5)]
)
def test_a_key_is_an_int_or_raw_data_too(key):
  chex.assert_trees_all_equal(episode_of(key(), NUMBERS), episode_of(jax.random.key(5), NUMBERS))


def test_vmap_and_jit_equal_a_loop():
  images, kwargs = square_images(), WAYS | {"num_rotations": 4, "counts": COUNTS}
  many = episodes(4, images, **kwargs)
  for i in range(4):
    alone = sample_episode(jax.random.split(jax.random.key(0), 4)[i], images, **kwargs)
    chex.assert_trees_all_equal(alone, jax.tree.map(lambda leaf, i=i: leaf[i], many))


def test_another_key_does_not_trace_again():
  chex.clear_trace_counter()

  @jax.jit
  @chex.assert_max_traces(1)
  def sample(key, images):
    return sample_episode(key, images, **WAYS)

  images = jnp.asarray(NUMBERS)
  for seed in range(3):
    sample(jax.random.key(seed), images)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers_for_accelerators(platform):
  def meta_batch(keys, images, counts):
    sample = functools.partial(sample_episode, **WAYS, num_rotations=4, counts=counts)
    return jax.vmap(lambda key: sample(key, images))(keys)

  keys = jax.random.split(jax.random.key(0), 4)
  traced = jax.jit(meta_batch).trace(keys, square_images(), COUNTS)
  assert "stablehlo" in traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("num_rotations", [1, 4])
def test_memory_does_not_grow_with_the_data(num_rotations):
  sample = functools.partial(sample_episode, **WAYS, num_rotations=num_rotations)

  def temporary_bytes(num_classes):
    images = jax.ShapeDtypeStruct((num_classes, 20, 28, 28, 1), jnp.uint8)
    compiled = jax.jit(sample).lower(jax.random.key(0), images).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  episode_bytes = 9 * 28 * 28
  few, many = temporary_bytes(100), temporary_bytes(1000)
  assert few < 100 * 20 * 28 * 28 / 10
  assert few < 8 * num_rotations * episode_bytes
  assert (many - few) / 900 <= 40 * num_rotations  # A few numbers for each class, and no images.


@cases(
  "wrong, message",
  [
    ({"num_ways": 0}, "num_ways must be at least 1, got 0"),
    ({"num_shots": -1}, "num_shots must be at least 1, got -1"),
    ({"num_queries": 0}, "num_queries must be at least 1, got 0"),
    ({"num_rotations": 0}, "num_rotations must be at least 1, got 0"),
    ({"num_rotations": 5}, "num_rotations must be at most 4, the quarter turns, got 5"),
    ({"num_ways": 8}, "num_ways must be at most 7, the number of classes, got 8"),
    (
      {"num_ways": 29, "num_rotations": 4},
      "num_ways must be at most 28, the number of classes, times num_rotations = 4, got 29",
    ),
    (
      {"num_shots": 3, "num_queries": 4},
      r"num_shots \+ num_queries must be at most 6, the images of a class, got 7",
    ),
    (
      {"images": np.zeros(3)},
      r"images must have shape \[classes, per_class, \.\.\.\], got shape \(3,\)",
    ),
    (
      {"images": np.zeros((7, 6, 5, 4)), "num_rotations": 2},
      r"images must be square, .* for num_rotations=2, got shape \(7, 6, 5, 4\)",
    ),
    ({"images": NUMBERS, "num_rotations": 4}, r"images must be square, .* got shape \(7, 6\)"),
    (
      {"counts": COUNTS[:3]},
      r"counts must have shape \(7,\), one number a class, got shape \(3,\)",
    ),
    ({"counts": COUNTS + 1}, r"counts must be in \[0, 6\], got 7"),
    ({"counts": COUNTS - 3}, r"counts must be in \[0, 6\], got -1"),
    (
      {"counts": COUNTS, "num_ways": 5, "num_queries": 3},
      r"num_ways must be at most 4, the number of classes with num_shots \+ num_queries = 4 images "
      "or more, got 5",
    ),
  ],
)
@cases("under_jit", [False, True])
def test_a_wrong_value_is_named(wrong, message, under_jit):
  arguments = WAYS | wrong
  images = arguments.pop("images", square_images())
  sample = functools.partial(sample_episode, images=images, **arguments)
  with pytest.raises(ValueError, match=f"^{message}"):
    (jax.jit(sample) if under_jit else sample)(jax.random.key(0))


@cases(
  "wrong, message",
  [
    ({"num_ways": 2.0}, "num_ways must be a positive Python int, got 2.0"),
    ({"num_queries": True}, "num_queries must be a positive Python int, got True"),
    ({"counts": np.full(CLASSES, 6.0)}, "counts must be integers, got dtype float32"),
    ({"key": 0.5}, "key must be an int, a raw key array or a typed key"),
  ],
)
def test_a_wrong_type_is_named(wrong, message, as_users_run):
  arguments = {"key": jax.random.key(0), "images": NUMBERS} | WAYS | wrong
  with pytest.raises(TypeError, match=message):
    sample_episode(**arguments)


def test_the_shape_of_traced_counts_is_checked():
  sample = lambda counts: sample_episode(jax.random.key(0), NUMBERS, **WAYS, counts=counts)
  with pytest.raises(ValueError, match=r"counts must have shape \(7,\)"):
    jax.jit(sample)(COUNTS[:3])


def test_the_reference_has_a_page_with_every_public_name():
  page = pathlib.Path(__file__).parents[2] / "docs" / "api" / "tasks.md"
  for name in jaxbo.tasks.__all__:
    assert f":: jaxbo.tasks.{name}\n" in page.read_text()
