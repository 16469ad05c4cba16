"""Few-shot data: what is read, how it is split and grouped, and characters that are drawn."""

import functools
import os
from pathlib import Path

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbo.tasks import sample_episode
from scripts.common import data, fewshot_data

pytestmark = pytest.mark.slow  # All together, not each.


def needs(name):
  there = list(Path(os.environ.get("TFDS_DATA_DIR", "/nowhere")).glob(f"{name}/*"))
  return pytest.mark.skipif(not there, reason=f"TFDS_DATA_DIR has no {name}")


def accuracy(classes, num_episodes=300):
  """Share of 5-way 1-shot queries that nearest neighbours on raw pixels get right."""

  def of_episode(key, images):
    episode = sample_episode(key, images, num_ways=5, num_shots=1, num_queries=5)
    support, query = (
      x.reshape(len(x), -1).astype(jnp.float32)
      for x in (episode.support_images, episode.query_images)
    )
    distances = jnp.sum((query[:, None] - support[None]) ** 2, axis=-1)
    return jnp.mean(episode.support_labels[jnp.argmin(distances, axis=1)] == episode.query_labels)

  keys = jax.random.split(jax.random.key(0), num_episodes)
  return float(jnp.mean(jax.jit(jax.vmap(of_episode, (0, None)))(keys, classes.images)))


def assert_disjoint(parts, num_classes):
  labels = np.concatenate([part.labels for part in parts])
  np.testing.assert_array_equal(np.sort(labels), np.arange(num_classes))


@needs("omniglot")
def test_omniglot_has_1623_characters_of_20_drawings_white_on_black():
  parts = fewshot_data.omniglot()
  assert [len(part.images) for part in parts] == [1100, 100, 423]
  assert_disjoint(parts, 1623)
  for part in parts:
    assert part.images.shape[1:] == (20, 28, 28, 1)
    assert part.images.dtype == np.uint8
    assert np.all(part.counts == 20)
    assert np.all(part.images.max(axis=(2, 3, 4)) > 100)  # No drawing is empty,
    assert np.all(part.images.mean(axis=(2, 3, 4)) < 100)  # and paper is black.


@pytest.fixture(scope="module")
def some_omniglot():
  """The first five percent of the drawings."""
  return fewshot_data.omniglot(percent=5)


@needs("omniglot")
def test_the_split_of_omniglot_is_the_same_everywhere(some_omniglot):
  """NumPy does not promise that its shuffles stay; this test says when they change."""
  np.testing.assert_array_equal(some_omniglot.train.labels[:5], [1229, 854, 493, 864, 898])
  np.testing.assert_array_equal(some_omniglot.test.labels[:5], [0, 1595, 65, 1336, 1618])
  assert_disjoint(some_omniglot, 1623)


@needs("omniglot")
def test_each_drawing_of_omniglot_is_with_its_character(some_omniglot):
  """Every drawing is where its label says, and behind the last there is nothing."""
  expected = {}
  for part in ("train[:5%]", "test[:5%]"):
    source = data.tfds_source("omniglot", part)
    for example in source.__getitems__(range(len(source))):
      inverted = 255 - example["image"][..., 0]  # The decoder here is OpenCV's.
      small = cv2.resize(inverted, (28, 28), interpolation=cv2.INTER_AREA)
      expected.setdefault(example["label"], []).append(small)
  assert sum(part.counts.sum() for part in some_omniglot) == sum(map(len, expected.values()))
  for part in some_omniglot:
    for images, count, label in zip(*part, strict=True):
      assert count == len(expected.get(label, []))
      for image, small in zip(images, expected.get(label, []), strict=False):
        np.testing.assert_array_equal(image[..., 0], small)
      assert not images[count:].any()


@needs("omniglot")
def test_episodes_of_ragged_omniglot_have_no_empty_drawing(some_omniglot):
  images, counts, _ = some_omniglot.train
  sample = functools.partial(
    sample_episode, num_ways=5, num_shots=1, num_queries=1, num_rotations=4, counts=counts
  )
  keys = jax.random.split(jax.random.key(0), 50)
  episodes = jax.jit(jax.vmap(sample, (0, None)))(keys, images)
  assert np.all(np.asarray(episodes.query_images).max(axis=(2, 3, 4)) > 0)


@needs("caltech101_fewshot")
def test_caltech101_has_100_classes_of_30_images():
  parts = fewshot_data.caltech101_fewshot()
  assert [len(part.images) for part in parts] == [64, 16, 20]
  assert_disjoint(parts, 100)
  for part in parts:
    assert part.images.shape[1:] == (30, 84, 84, 3)
    assert part.images.dtype == np.uint8
    assert np.all(part.counts == 30)
    assert np.all(part.images.std(axis=(2, 3, 4)) > 0)
  assert accuracy(parts.test, 100) > 0.25


@pytest.mark.parametrize(
  "read, words",
  [
    (
      fewshot_data.omniglot,
      ["no omniglot in", "omniglot-*.array_record-*", "download_and_prepare"],
    ),
    (
      fewshot_data.caltech101_fewshot,
      ["no caltech101_fewshot in", "<version>/", "not in the catalogue", "10.22002/D1.20086"],
    ),
    (functools.partial(data.tfds_images, "mnist", "test"), ["no mnist in", "builder('mnist'"]),
  ],
)
def test_missing_data_says_what_is_expected_where_and_how_to_get_it(read, words, tmp_path):
  with pytest.raises(FileNotFoundError) as error:
    read(data_dir=tmp_path)
  for word in [*words, str(tmp_path), "TFDS_DATA_DIR", "dataset_info.json"]:
    assert word in str(error.value)


def test_both_decoders_give_the_same_white_strokes():
  """OpenCV decodes one-bit files as 0 and 255, Pillow as 0 and 1."""
  opencv = np.where(np.arange(24).reshape(2, 3, 4) % 5 == 0, 0, 255).astype(np.uint8)
  for decoded in (opencv, opencv // 255):
    drawn = fewshot_data.white_on_black(decoded)
    assert drawn.dtype == np.uint8
    np.testing.assert_array_equal(drawn, 255 - opencv)


@pytest.mark.parametrize("size", [1, 28, 30, 105])
def test_shrinking_averages_over_areas_as_opencv_does(size):
  images = 255 * np.random.default_rng(0).integers(0, 2, (3, 105, 105), np.uint8)
  expected = [cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA) for image in images]
  assert np.abs(fewshot_data.shrink(images, size).astype(int) - np.stack(expected)).max() <= 1


def test_glyphs_are_white_on_black_and_of_the_shape_that_episodes_want():
  images, counts, labels = fewshot_data.synthetic_glyphs(12, 3, size=20)
  assert images.shape == (12, 3, 20, 20, 1)
  assert images.dtype == np.uint8
  np.testing.assert_array_equal(counts, np.full(12, 3))
  np.testing.assert_array_equal(labels, np.arange(12))
  ink = np.mean(images > 127, axis=(2, 3, 4))
  assert np.all((ink > 0.01) & (ink < 0.5))
  assert len(np.unique(images.reshape(36, -1), axis=0)) == 36


def test_glyphs_depend_on_the_seed_and_on_nothing_else():
  many = fewshot_data.synthetic_glyphs(5, 4, seed=3).images
  np.testing.assert_array_equal(fewshot_data.synthetic_glyphs(5, 4, seed=3).images, many)
  np.testing.assert_array_equal(fewshot_data.synthetic_glyphs(2, 3, seed=3).images, many[:2, :3])
  assert np.any(fewshot_data.synthetic_glyphs(5, 4, seed=4).images != many)


def test_raw_pixels_name_glyphs_above_chance_and_leave_something_to_learn():
  assert 0.45 < accuracy(fewshot_data.synthetic_glyphs(60, 10, seed=2)) < 0.8


@pytest.mark.parametrize("name", ["num_classes", "per_class", "size"])
def test_glyphs_refuse_numbers_below_one(name):
  with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
    fewshot_data.synthetic_glyphs(**({"num_classes": 2, "per_class": 2, "size": 9} | {name: 0}))
