"""Three domains for online meta-learning: characters, digits and clothes, in one size."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from scripts.common import fewshot_data
from scripts.common.data import tfds_source
from scripts.common.fewshot_data import ImageClasses

NUM_CLASSES = 10
NAMES = {  # of the three domains; the first is that of the pre-training
  "omniglot": ("Omniglot", "MNIST", "Fashion-MNIST"),
  "glyphs": ("glyphs", "negatives", "stripes"),
}


class Domains(NamedTuple):
  """What an experiment is played on; images are ``[classes, per_class, size, size, 1]`` uint8.

  No character is in two of the parts. The digits and clothes of test are other images of the same
  classes as those of validation.
  """

  train: ImageClasses  # the characters to pre-train on
  early: ImageClasses  # the characters that say when to stop
  validation: tuple[np.ndarray, ...]  # the domains of streams that rates are chosen on
  test: tuple[np.ndarray, ...]  # those of the streams that are reported


def omniglot_mnist_fashion(data_dir: Path | None, size: int, per_class: int) -> Domains:
  """Omniglot's characters, then MNIST and Fashion-MNIST; white on black all of them.

  Digits and clothes are the first ``per_class`` of each class.

  Raises:
    FileNotFoundError: if a data set is not there; the message says how to prepare it.
    ValueError: if there are not so many images.
  """
  sources = [
    by_label(name, split, data_dir, size, per_class)
    for split in ("test", "train")
    for name in ("mnist", "fashion_mnist")
  ]
  characters = fewshot_data.omniglot(data_dir, size=size)
  early, chosen = halves(characters.validation)
  return Domains(
    characters.train,
    early,
    (chosen.images, *sources[:2]),
    (characters.test.images, *sources[2:]),
  )


def halves(classes: ImageClasses) -> tuple[ImageClasses, ImageClasses]:
  """The first half of the classes, and the second."""
  half = len(classes.images) // 2
  return ImageClasses(*(x[:half] for x in classes)), ImageClasses(*(x[half:] for x in classes))


def by_label(name: str, split: str, data_dir: Path | None, size: int, per_class: int) -> np.ndarray:
  """The first ``per_class`` images of each of ten classes, ``[10, per_class, size, size, 1]``."""
  source = tfds_source(name, split, data_dir)
  count = min(len(source), 13 * per_class + 200)  # A class has 9 % of MNIST at least.
  rows = source.__getitems__(range(count))
  pixels = np.stack([row["image"][..., 0] for row in rows])
  labels = np.array([row["label"] for row in rows])
  members = [np.flatnonzero(labels == label)[:per_class] for label in range(NUM_CLASSES)]
  fewest = min(map(len, members))
  if fewest < per_class:
    raise ValueError(
      f"images_per_class must be at most {fewest}, what {name} has in {split}, got {per_class}"
    )
  return fewshot_data.shrink(pixels, size)[np.stack(members)][..., None]


def glyphs(size: int, per_class: int) -> Domains:
  """Characters drawn on the spot, for a quick look.

  The second domain are ten in black on white, the third ten that are smeared to stripes.
  """
  draw = lambda classes, images, seed: fewshot_data.synthetic_glyphs(classes, images, size, seed)
  others = [draw(NUM_CLASSES, per_class, seed).images for seed in (3, 4, 5, 6)]
  negative = lambda x: 255 - x
  smeared = lambda x: np.repeat(x[:, :, ::4], 4, axis=2)[:, :, :size]
  (early, validation), test = halves(draw(24, 20, 1)), draw(40, 20, 2)
  return Domains(
    draw(60, 20, 0),
    early,
    (validation.images, negative(others[0]), smeared(others[1])),
    (test.images, negative(others[2]), smeared(others[3])),
  )


READERS = {"omniglot": omniglot_mnist_fashion, "glyphs": lambda _, *sizes: glyphs(*sizes)}
