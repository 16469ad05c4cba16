"""Reads data for few-shot learning, or draws it: images as ``[classes, per_class, h, w, c]``.

This is what :func:`jaxbo.tasks.sample_episode` takes. All pixels are uint8 in [0, 255].
"""

import os
from typing import Any, NamedTuple

import numpy as np

from benchmarks.glyphs import draw_glyphs
from scripts.common.data import in_chunks, tfds_source


class ImageClasses(NamedTuple):
  """Images by class."""

  images: Any  # [classes, per_class, h, w, c], uint8; zero behind the last image of a class.
  counts: Any  # [classes], int32: how many images each class has.
  labels: Any  # [classes], int32: the number of each class in the data set that it is from.


class FewShotData(NamedTuple):
  """To learn from, to choose settings by, and to report; no class is in two of them."""

  train: ImageClasses
  validation: ImageClasses
  test: ImageClasses


def omniglot(
  data_dir: str | os.PathLike[str] | None = None, *, size: int = 28, percent: int = 100
) -> FewShotData:
  """Omniglot: 1,623 characters of 50 alphabets, drawn once by each of 20 people.

  All characters of the original two sets are put together, shuffled with a fixed seed and split
  into 1,100 for training, 100 for validation and 423 for testing: the split by characters of MAML
  and learn2learn, though not the same characters (theirs depend on the run). Alphabets are shared
  between the parts, which is easier than the original split by alphabets. Rotations are
  made by ``sample_episode(..., num_rotations=4)``.

  The 105 x 105 drawings are reduced to ``size`` by exact averages over areas and inverted: strokes
  are 255, paper is 0. Reading takes 7 seconds on one core, so nothing is cached. ``percent`` reads
  only the first so many percent of the drawings; characters then have few drawings, some none.

  Reference: Lake, Salakhutdinov, Tenenbaum, `Human-level concept learning through probabilistic
  program induction <https://doi.org/10.1126/science.aab3050>`_
  """
  images, labels = [], []
  for part in ("train", "test"):
    source = tfds_source("omniglot", f"{part}[:{percent}%]", data_dir)
    for drawings, numbers in in_chunks(source):
      images.append(shrink(white_on_black(drawings[..., 0]), size))
      labels.append(numbers)
  images, labels = np.concatenate(images)[..., None], np.concatenate(labels)
  parts = np.split(np.random.default_rng(0).permutation(1623), [1100, 1200])
  return FewShotData(*(_by_class(images, labels, part, 20) for part in parts))


def caltech101_fewshot(
  data_dir: str | os.PathLike[str] | None = None, *, size: int = 84
) -> FewShotData:
  """Caltech-101 for few-shot learning: 64, 16 and 20 classes of 30 natural images, 84 x 84 x 3.

  They are reduced to ``size`` by exact averages over areas.

  Stands in for miniImageNet, whose images may not be passed on. Pixels depend a little on who
  decodes the JPEG files (OpenCV, or Pillow where there is no OpenCV).
  """
  preparation = (
    "It is not in the catalogue of tensorflow-datasets: 100 classes of Caltech-101 (all but "
    "BACKGROUND_Google and Faces_easy;\nhttps://doi.org/10.22002/D1.20086), 30 images of each, "
    "84 x 84, with the features image and label, 64, 16 and 20\nclasses in the splits train, "
    "validation and test. tfds.dataset_builders.store_as_tfds_dataset writes such a folder."
  )

  def read(split):
    source = tfds_source("caltech101_fewshot", split, data_dir, preparation)
    images, labels = map(np.concatenate, zip(*in_chunks(source), strict=True))
    if size != images.shape[1]:
      images = np.moveaxis(shrink(np.moveaxis(images, -1, 1), size), 1, -1)
    return _by_class(images, labels, np.unique(labels), 30)

  return FewShotData(read("train"), read("validation"), read("test"))


def synthetic_glyphs(
  num_classes: int, per_class: int, size: int = 28, seed: int = 0
) -> ImageClasses:
  """Full classes of what :func:`benchmarks.glyphs.draw_glyphs` draws, with the same arguments."""
  images = draw_glyphs(num_classes, per_class, size, seed)
  labels = np.arange(num_classes, dtype=np.int32)
  return ImageClasses(images, np.full(num_classes, per_class, np.int32), labels)


def white_on_black(images: np.ndarray) -> np.ndarray:
  """Inverts black drawings on white paper, ``[n, ...]`` with values 0 and 255, or 0 and 1.

  Omniglot's files have one bit a pixel. OpenCV and TensorFlow decode white as 255, Pillow alone as
  1; the paper of each drawing shows which it was.
  """
  white = 1 if images.max(initial=0) <= 1 else 255
  return (255 // white * (white - images)).astype(np.uint8)


def shrink(images: np.ndarray, size: int) -> np.ndarray:
  """Reduces square uint8 images ``[..., old, old]`` to ``[..., size, size]``, averaging over areas.

  The same as OpenCV's ``INTER_AREA``, which is not always there; Pillow's ``BOX`` takes whole
  pixels only, and 105 is no multiple of 28.
  """
  edges = np.linspace(0, images.shape[-1], size + 1)
  pixels = np.arange(images.shape[-1])
  ends = np.minimum(edges[1:, None], pixels + 1)
  overlap = np.maximum(ends - np.maximum(edges[:-1, None], pixels), 0)
  weights = (overlap / overlap.sum(axis=1, keepdims=True)).astype(np.float32)
  return np.rint(weights @ images.astype(np.float32) @ weights.T).astype(np.uint8)


def _by_class(images: np.ndarray, labels: np.ndarray, classes: Any, per_class: int) -> ImageClasses:
  """The images whose labels are in ``classes``, in their order, padded to ``per_class``."""
  grouped = np.zeros((len(classes), per_class, *images.shape[1:]), np.uint8)
  counts = np.zeros(len(classes), np.int32)
  for row, label in enumerate(classes):
    members = np.flatnonzero(labels == label)
    counts[row] = len(members)
    grouped[row, : len(members)] = images[members]
  return ImageClasses(grouped, counts, np.asarray(classes, np.int32))
