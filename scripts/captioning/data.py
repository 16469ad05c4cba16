"""Reads images with captions: COCO, NLVR's drawings, or a user's own files."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxbo_models.caption_metrics import tokenize
from PIL import Image

from scripts.common.data import tfds_source

# How splits are called in the files that there are.
SPLITS = {
  "train": "train",
  "restval": "train",  # Karpathy's name of what most work on COCO trains on besides.
  "validation": "validation",
  "val": "validation",
  "test": "test",
}


class CaptionedImages(NamedTuple):
  """Images and what people wrote of them.

  Attributes:
    images: ``[n, height, width, 3]`` uint8.
    captions: the tokens of one or more captions of each.
    names: of the images.
  """

  images: np.ndarray
  captions: list[list[list[str]]]
  names: list[str]

  def take(self, rows: Sequence[int] | np.ndarray) -> "CaptionedImages":
    """The images of these rows."""
    rows = [int(row) for row in rows]
    return CaptionedImages(
      self.images[rows], [self.captions[row] for row in rows], [self.names[row] for row in rows]
    )


class CaptionData(NamedTuple):
  """Three sets of images: to learn from, to choose by, and to report."""

  train: CaptionedImages
  validation: CaptionedImages
  test: CaptionedImages


def resize(image: np.ndarray | Image.Image, size: tuple[int, int]) -> np.ndarray:
  """An image of any kind as ``[height, width, 3]`` uint8; its aspect ratio is not kept."""
  picture = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
  height, width = size
  return np.asarray(picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))


def read_image(path: Path, size: tuple[int, int]) -> np.ndarray:
  """Reads an image file, ``[height, width, 3]`` uint8.

  Raises:
    FileNotFoundError: if there is none.
    ValueError: if it is no image, or so large that Pillow takes it for an attack.
  """
  if not path.is_file():
    raise FileNotFoundError(f"there is no image {path}")
  try:
    with Image.open(path) as image:
      return resize(image, size)
  except (OSError, SyntaxError, Image.DecompressionBombError) as error:
    raise ValueError(f"{path} must be an image, {error}") from error


def coco_captions(
  size: tuple[int, int], data_dir: str | os.PathLike | None = None, max_images: int | None = None
) -> CaptionData:
  """COCO captions in Karpathy's splits, of which ``train`` and ``restval`` are trained on.

  The usual sets of 113,287, 5,000 and 5,000 images with mostly five captions each. They are read as
  tensorflow-datasets has prepared them, without TensorFlow.

  Args:
    size: height and width that images are resized to.
    data_dir: as in :func:`scripts.common.data.tfds_images`.
    max_images: reads only so many of each set.

  Raises:
    FileNotFoundError: if the data set is not there; the message says how to prepare it.
  """
  texts = lambda example: [text.decode() for text in _texts(example["captions"])]
  read = lambda split: _read(
    tfds_source("coco_captions", split, data_dir), size, texts, "image/filename", max_images
  )
  return CaptionData(read("train+restval"), read("val"), read("test"))


def coco_captions_open(
  size: tuple[int, int], data_dir: str | os.PathLike | None = None, max_images: int | None = None
) -> CaptionData:
  """51 photographs of COCO that may be passed on: 20 to train, 6 to validate and 25 to test on.

  Far too few to learn to caption: they show that everything runs.
  """
  preparation = (
    "It is not in the catalogue of tensorflow-datasets: images of COCO 2017 with open licences, in "
    "the splits train and val,\nwith the features of coco_captions."
  )
  texts = lambda example: [text.decode() for text in _texts(example["captions"])]
  train, test = (
    _read(
      tfds_source("coco_captions_open", split, data_dir, preparation),
      size,
      texts,
      "image/filename",
      max_images,
    )
    for split in ("train", "val")
  )
  num = max(1, round(0.23 * len(train.names)))
  return CaptionData(
    train.take(range(len(train.names) - num)), train.take(range(len(train.names))[-num:]), test
  )


def nlvr_captions(
  size: tuple[int, int], data_dir: str | os.PathLike | None = None, max_images: int | None = None
) -> CaptionData:
  """Drawings of shapes in three boxes, each with a sentence that a person wrote of it.

  The formerly hidden part of NLVR is the test set. A tenth of the sentences of the other part is
  for validation, with all their images.

  References:
    Suhr et al., `A Corpus of Natural Language for Visual Reasoning
    <https://aclanthology.org/P17-2034>`_
  """
  preparation = (
    "It is not in the catalogue of tensorflow-datasets: the true pairs of "
    "https://github.com/lil-lab/nlvr with the features\nimage (100 x 400 x 3), caption and "
    "image/id, in the splits train and test."
  )
  texts = lambda example: [example["caption"].decode()]
  given, test = (
    _read(
      tfds_source("nlvr_captions", split, data_dir, preparation),
      size,
      texts,
      "image/id",
      max_images,
    )
    for split in ("train", "test")
  )
  sentences = sorted({" ".join(of_image[0]) for of_image in given.captions})
  order = np.random.default_rng(0).permutation(len(sentences))
  held_out = {sentences[i] for i in order[: max(1, len(sentences) // 10)]}
  is_held_out = np.array([" ".join(of_image[0]) in held_out for of_image in given.captions])
  return CaptionData(
    given.take(np.flatnonzero(~is_held_out)), given.take(np.flatnonzero(is_held_out)), test
  )


def read_json(
  path: Path, size: tuple[int, int], image_dir: Path | None = None, max_images: int | None = None
) -> CaptionData:
  """A user's own images: a JSON file, and the image files that it names.

  The file has three lists of the same length: ``{"images": ["a.jpg", ...], "captions": [["a dog on
  a beach", ...], ...], "split": ["train", "validation", "test", ...]}``. Karpathy's files of
  Flickr8k, Flickr30k and COCO (``dataset_flickr30k.json``), which have a list of images with
  ``filename``, ``split`` and ``sentences``, are read too.

  Args:
    path: of the file.
    size: height and width that images are resized to.
    image_dir: where the images are; beside the file by default.
    max_images: reads only so many of each set.

  Raises:
    FileNotFoundError: if the file or an image is not there.
    ValueError: if the file is none of these, or a set is empty.
  """
  if not path.is_file():
    raise FileNotFoundError(f"there is no file {path}")
  found: dict[str, list[tuple[str, list[str]]]] = {"train": [], "validation": [], "test": []}
  for name, texts, split in _entries(path):
    if not isinstance(name, str):
      raise ValueError(f"images must be names of files, got {name!r}")
    if split not in list(SPLITS):
      raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r} of {name}")
    if not texts:
      raise ValueError(f"captions must hold a text for each image, got none of {name}")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
      raise ValueError(f"captions must be lists of texts, got {texts!r} of {name}")
    found[SPLITS[split]].append((name, texts))
  sets = []
  for split, entries in found.items():
    if not entries:
      raise ValueError(f"{path} must have images in the split {split}, got none")
    names = [name for name, _ in entries[:max_images]]
    images = [read_image((image_dir or path.parent) / name, size) for name in names]
    captions = [_tokens(name, texts) for name, texts in entries[:max_images]]
    sets.append(CaptionedImages(np.stack(images), captions, names))
  return CaptionData(*sets)


def _entries(path: Path) -> list[tuple[str, list[str], str]]:
  """``(name, captions, split)`` of each image of a JSON file."""
  try:
    content = json.loads(path.read_text())
    images = content["images"]
    if images and all(isinstance(image, dict) for image in images):
      name = lambda image: str(Path(image.get("filepath", "")) / image["filename"])
      texts = lambda image: [sentence["raw"] for sentence in image["sentences"]]
      return [(name(image), texts(image), image["split"]) for image in images]
    return list(zip(images, content["captions"], content["split"], strict=True))
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f"{path} must have lists images, captions and split of the same length, {error!r}"
    ) from error


def _read(
  source: Any,
  size: tuple[int, int],
  texts: Callable[[Any], list[str]],
  name: str,
  max_images: int | None,
) -> CaptionedImages:
  """The images of a source, resized one by one: as they are they would not fit into memory."""
  num = len(source) if max_images is None else min(max_images, len(source))
  images = np.empty((num, *size, 3), np.uint8)
  captions, names = [], []
  for i in range(num):
    example = source[i]
    images[i] = resize(example["image"], size)
    names.append(example[name].decode())
    captions.append(_tokens(names[-1], texts(example)))
  return CaptionedImages(images, captions, names)


def _texts(captions: Any) -> list[bytes]:
  """The texts of a sequence feature: a dictionary of lists, or a list of dictionaries."""
  if isinstance(captions, dict):
    return list(captions["text"])
  return [caption["text"] for caption in captions]


def _tokens(name: str, texts: Sequence[str]) -> list[list[str]]:
  tokens = [tokenize(text) for text in texts]
  if not all(tokens):
    raise ValueError(f"captions must have a word at least, got an empty one of {name}")
  return tokens
