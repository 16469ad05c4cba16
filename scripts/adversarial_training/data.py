"""Images for adversarial training: balanced or imbalanced, in a fixed order of batches."""

import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scripts.adversarial_training import imbalance
from scripts.common.data import tfds_source

DATASETS = ("mnist", "fashion_mnist", "cifar10", "cifar10_subset")
BALANCED, LONG_TAILED, STEP = "balanced", "long_tailed", "step"
SETS = {BALANCED: "balanced", LONG_TAILED: "long-tailed", STEP: "step-imbalanced"}
_SUBSET = (
  "It is not in the catalogue of tensorflow-datasets: the first 4,000 images of CIFAR-10's "
  "training set, 3,000 in the\nsplit train and 1,000 in test, with the features image and label. "
  "tfds.dataset_builders.store_as_tfds_dataset writes\nsuch a folder. The whole set is "
  "--dataset cifar10."
)


class Images(NamedTuple):
  """Labelled images."""

  images: Any  # [n, height, width, channels], uint8.
  labels: Any  # [n], int32.

  def take(self, rows: Any) -> "Images":
    """The images in these rows."""
    return Images(self.images[rows], self.labels[rows])


class AdversarialData(NamedTuple):
  """What to train on, to choose settings by, and to report; no image is in two of them."""

  pool: Images  # What training sets are drawn from.
  validation: Images  # The same number of each class.
  test: Images  # The same number of each class.
  names: tuple[str, ...]  # Of the classes.


def read(
  name: str, data_dir: str | os.PathLike[str] | None, num_validation: int, num_test: int
) -> AdversarialData:
  """Reads one of ``DATASETS``; so many images of each class of its splits are to judge by.

  Raises:
    FileNotFoundError: if it is not there; the message says how to prepare it.
    ValueError: if a class has fewer images.
  """
  preparation = _SUBSET if name == "cifar10_subset" else None
  sources = [tfds_source(name, split, data_dir, preparation) for split in ("train", "test")]
  names = tuple(sources[0].dataset_info.features["label"].names)
  train, test = map(_read_all, sources)
  return split_up(train, test, names, num_validation, num_test)


def _read_all(source: Any) -> Images:
  examples = source.__getitems__(range(len(source)))
  images = np.stack([example["image"] for example in examples])
  return Images(images, np.array([example["label"] for example in examples], np.int32))


def split_up(
  train: Images, test: Images, names: tuple[str, ...], num_validation: int, num_test: int
) -> AdversarialData:
  """Takes so many images of each class for validation out of ``train``, by a fixed key."""
  per_class = lambda number: [number] * len(names)
  subset = imbalance.imbalanced_subset
  rows = subset(0, train.labels, per_class(num_validation), "validation_per_class")
  rest = np.setdiff1d(np.arange(len(train.labels)), rows)
  test_rows = subset(0, test.labels, per_class(num_test), "test_per_class")
  return AdversarialData(train.take(rest), train.take(rows), test.take(test_rows), names)


def counts_of(kind: str, num_classes: int, largest: int, ratio: float) -> np.ndarray:
  """How many images each class of a training set has.

  All sets have about as many images as the long-tailed one, whose first class has ``largest``: what
  differs is how they are divided.
  """
  long_tailed = imbalance.long_tailed_counts(num_classes, largest, ratio)
  total = int(long_tailed.sum())
  if kind == LONG_TAILED:
    return long_tailed
  if kind == BALANCED:
    return np.full(num_classes, total // num_classes)
  # Half of the classes have `ratio` times as many as the others.
  num_rare = num_classes // 2
  common = total / (num_classes - num_rare + num_rare / ratio)
  return imbalance.step_imbalanced_counts(num_classes, int(max(common, np.ceil(ratio))), ratio)


def training_rows(
  data: AdversarialData, kind: str, largest: int, ratio: float, seed: int
) -> np.ndarray:
  """Which rows of the pool a training set has; those of one seed overlap as much as they can."""
  counts = counts_of(kind, len(data.names), largest, ratio)
  return imbalance.imbalanced_subset(seed, data.pool.labels, counts.tolist(), "largest")


def order_of_epoch(
  rows: np.ndarray, batch_size: int, stream: tuple[int, ...], epoch: int
) -> np.ndarray:
  """The rows in random order, ``[batches, batch_size]``; those that fill no batch are left out."""
  shuffled = np.random.default_rng([*stream, epoch]).permutation(rows)
  num_batches = len(rows) // batch_size
  return shuffled[: num_batches * batch_size].reshape(num_batches, batch_size)


def as_floats(images: Any) -> jax.Array:
  """Pixels in [0, 1]."""
  return images.astype(jnp.float32) / 255
