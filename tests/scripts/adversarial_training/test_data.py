"""Data of adversarial training: sizes of sets, what is in which, orders of epochs."""

import os
from pathlib import Path

import numpy as np
import pytest

from scripts.adversarial_training import data as adv_data

pytestmark = pytest.mark.slow  # All together, not each.

RNG = np.random.default_rng(0)


def images(number, num_classes=4):
  labels = np.arange(number, dtype=np.int32) % num_classes
  return adv_data.Images(RNG.integers(0, 256, (number, 2, 2, 1), np.uint8), labels)


NAMES = ("a", "b", "c", "d")


def test_all_training_sets_have_about_as_many_images():
  of = lambda kind: adv_data.counts_of(kind, 10, 1200, 20.0)
  long_tailed, balanced, step = of("long_tailed"), of("balanced"), of("step")
  assert (long_tailed[0], long_tailed[-1]) == (1200, 60)
  assert long_tailed.sum() == 4082
  assert balanced.tolist() == [408] * 10
  assert abs(step.sum() - long_tailed.sum()) < 10
  assert step[0] // step[-1] == 20
  assert [len(set(counts[:5])) for counts in (balanced, step)] == [1, 1]


def test_validation_and_training_images_are_of_the_train_split_and_not_the_same():
  train, test = images(400), images(80)
  data = adv_data.split_up(train, test, NAMES, 5, 10)
  assert np.bincount(data.validation.labels).tolist() == [5] * 4
  assert np.bincount(data.test.labels).tolist() == [10] * 4
  assert len(data.pool.labels) == 380
  key = lambda part: {image.tobytes() for image in part.images}
  assert not key(data.pool) & key(data.validation)
  assert key(data.pool) | key(data.validation) == key(train)
  assert key(data.test) < key(test)


def test_sets_of_a_seed_share_images_and_those_of_two_seeds_do_not():
  data = adv_data.split_up(images(400), images(80), NAMES, 5, 10)
  rows = lambda kind, seed: set(adv_data.training_rows(data, kind, 60, 6.0, seed).tolist())
  counts = np.bincount(data.pool.labels[list(rows("long_tailed", 0))])
  assert counts.tolist() == adv_data.counts_of("long_tailed", 4, 60, 6.0).tolist()
  smaller = np.minimum(counts, adv_data.counts_of("balanced", 4, 60, 6.0)).sum()
  assert len(rows("long_tailed", 0) & rows("balanced", 0)) == smaller
  assert rows("balanced", 0) != rows("balanced", 1)
  with pytest.raises(ValueError, match="largest must leave enough images of every class: counts"):
    adv_data.training_rows(data, "long_tailed", 96, 6.0, 0)


def test_an_epoch_has_every_image_at_most_once_in_an_order_of_its_own():
  rows = RNG.permutation(1000)[:35]
  orders = [adv_data.order_of_epoch(rows, 8, (0, 1), epoch) for epoch in range(2)]
  for order in orders:
    assert order.shape == (4, 8)
    assert len(set(order.ravel())) == 32
    assert set(order.ravel()) < set(rows)
  assert (orders[0] != orders[1]).any()
  assert (orders[0] != adv_data.order_of_epoch(rows, 8, (1, 1), 0)).any()
  np.testing.assert_array_equal(orders[1], adv_data.order_of_epoch(rows, 8, (0, 1), 1))


def test_data_sets_of_tfds_are_read_with_the_names_of_their_classes():
  name = "cifar10_subset"
  if not list(Path(os.environ.get("TFDS_DATA_DIR", "/nowhere")).glob(f"{name}/*")):
    pytest.skip(f"TFDS_DATA_DIR has no {name}")
  data = adv_data.read(name, None, 20, 50)
  assert data.names[:3] == ("airplane", "automobile", "bird")
  assert data.pool.images.shape == (2800, 32, 32, 3)
  assert data.pool.images.dtype == np.uint8
  assert np.bincount(data.test.labels).tolist() == [50] * 10


def test_a_missing_data_set_says_how_to_get_it(tmp_path):
  for name, message in (("cifar10", "download_and_prepare"), ("cifar10_subset", "first 4,000")):
    with pytest.raises(FileNotFoundError, match=f"no {name} in .*") as error:
      adv_data.read(name, tmp_path, 1, 1)
    assert message in str(error.value)
