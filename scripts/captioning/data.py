"""Reads images with captions: COCO, NLVR's drawings, or a user's own files."""

import itertools
import json
import sys
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
from jaxbo_models.caption_metrics import tokenize
from PIL import Image
from pydantic import Field

from scripts.captioning.config import Config
from scripts.common.config import Among, Checked
from scripts.common.data import tfds_source

Size = tuple[int, int]  # Height and width that images are resized to.

# How splits are called in the files that there are.
SPLITS = {
  "train": "train",
  "restval": "train",  # Karpathy's name of what most work on COCO trains on besides.
  "validation": "validation",
  "val": "validation",
  "test": "test",
}
# Which splits are trained on, validated on (if there is one) and tested on; how to get them.
SETS = {
  # Karpathy's splits: 113,287, 5,000 and 5,000 photographs with mostly five captions each.
  "coco_captions": (("train+restval", "val", "test"), ""),
  # 51 photographs that may be passed on: far too few to learn to caption, everything runs on them.
  "coco_captions_open": (
    ("train", "val"),
    "It is not in the catalogue of tensorflow-datasets: images of COCO 2017 with open licences, in "
    "the splits train and val,\nwith the features of coco_captions.",
  ),
  # Drawings of shapes in three boxes, each with a sentence that a person wrote of it, of Suhr et
  # al., 2017, https://aclanthology.org/P17-2034; tested on the part that used to be hidden.
  "nlvr_captions": (
    ("train", "test"),
    "It is not in the catalogue of tensorflow-datasets: the true pairs of "
    "https://github.com/lil-lab/nlvr with the features\nimage (100 x 400 x 3), caption and "
    "image/id, in the splits train and test.",
  ),
}


class CaptionedImages(NamedTuple):
  """Images ``[n, height, width, 3]`` uint8, the words of the captions of each, and their names."""

  images: np.ndarray
  captions: list[list[list[str]]]
  names: list[str]

  @classmethod
  def of(
    cls, images: np.ndarray, captions: list[list[list[str]]], names: list[str]
  ) -> "CaptionedImages":
    """Leaves out captions without words, and images that have no others, and says how many."""
    worded = [[words for words in of_image if words] for of_image in captions]
    wordless, kept = sum(map(len, captions)) - sum(map(len, worded)), [*map(bool, worded)]
    if not any(kept) and wordless:
      raise ValueError(
        f"captions must have at least one word in each set, got none, for example for {names[0]}"
      )
    if not wordless:
      return cls(images, captions, names)
    if not jax.process_index():
      without = f"{wordless} captions without words, and {kept.count(False)} images without others"
      print(f"Left out: {without}.", file=sys.stderr)
    return cls(images, worded, names).take(np.array(kept))

  def take(self, chosen: np.ndarray) -> "CaptionedImages":
    """The images that are ``chosen``, ``[n]`` bool."""
    of_chosen = lambda values: list(itertools.compress(values, chosen))
    return CaptionedImages(self.images[chosen], of_chosen(self.captions), of_chosen(self.names))


class CaptionData(NamedTuple):
  """Three sets of images: to learn from, to choose by, and to report."""

  train: CaptionedImages
  validation: CaptionedImages
  test: CaptionedImages


def resize(image: np.ndarray | Image.Image, size: Size) -> np.ndarray:
  """An image of any kind as ``[height, width, 3]`` uint8; its aspect ratio is not kept."""
  picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
  if picture.mode.startswith("I"):  # Pillow would cut 16 bits off at 255.
    picture = Image.fromarray((np.asarray(picture).clip(0, 2**16 - 1) // 256).astype(np.uint8))
  height, width = size
  return np.asarray(picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))


def read_image(path: Path, size: Size) -> np.ndarray:
  """Reads an image file, ``[height, width, 3]`` uint8.

  Raises:
    FileNotFoundError: if there is none.
    ValueError: if it is not an image, or so large that Pillow refuses it.
  """
  if not path.is_file():
    raise FileNotFoundError(f"there is no image {path}")
  try:
    with Image.open(path) as image:
      return resize(image, size)
  except (OSError, SyntaxError, Image.DecompressionBombError) as error:
    raise ValueError(f"{path} must be an image, {error}") from error


def read(config: Config, size: Size) -> CaptionData:
  """The images of a data set and their captions; see :data:`SETS`.

  Raises:
    FileNotFoundError: if they are not there; the message says how to get them.
    ValueError: if a set is empty, or the data are not as they have to be.
  """
  if config.dataset == "json" and config.json_file is not None:
    data = read_json(config.json_file, size, config.image_dir, config.max_images)
  else:
    data = read_tfds(config.dataset, size, config.data_dir, config.max_images)
  for part, images in data._asdict().items():
    if not images.names:
      raise ValueError(f"max_images must leave images for {part}, got {config.max_images}")
  return data


def read_tfds(
  dataset: str, size: Size, data_dir: Path | None = None, max_images: int | None = None
) -> CaptionData:
  """What tensorflow-datasets has prepared, read without TensorFlow."""
  splits, preparation = SETS[dataset]
  sources = [tfds_source(dataset, split, data_dir, preparation) for split in splits]
  train, *others = (_read(source, size, max_images) for source in sources)
  if len(others) == 2:
    return CaptionData(train, *others)
  held_out = _held_out(dataset, train.captions)
  return CaptionData(train.take(~held_out), train.take(held_out), *others)


def _held_out(dataset: str, captions: list[list[list[str]]]) -> np.ndarray:
  """Which images are for validation: of drawings those of a tenth of the sentences, else 23 %."""
  if dataset == "nlvr_captions":
    sentences = [" ".join(of_image[0]) for of_image in captions]
    each, sentence = np.unique(sentences, return_inverse=True)
    order = np.random.default_rng(0).permutation(len(each))
    return np.isin(sentence, order[: max(1, len(each) // 10)])
  num = max(1, round(0.23 * len(captions)))
  return np.arange(len(captions)) >= len(captions) - num


class Entry(Checked):
  """An image of a JSON file: the name of its file, what was written of it, and its set."""

  images: str
  captions: Annotated[list[str], Field(min_length=1)]
  split: Annotated[str, Among(SPLITS)]


def read_json(
  path: Path, size: Size, image_dir: Path | None = None, max_images: int | None = None
) -> CaptionData:
  """A user's own images: a JSON file, and the image files that it names.

  The file has three lists of the same length: ``{"images": ["a.jpg", ...], "captions": [["a dog on
  a beach", ...], ...], "split": ["train", "validation", "test", ...]}``. Karpathy's files of
  Flickr8k, Flickr30k and COCO (``dataset_flickr30k.json``), which have a list of images with
  ``filename``, ``split`` and ``sentences``, are read too.

  Raises:
    FileNotFoundError: if the file or an image is not there.
    ValueError: if the file is none of these, or a set is empty.
  """
  if not path.is_file():
    raise FileNotFoundError(f"there is no file {path}")
  entries, sets = _entries(path), []
  for split in CaptionData._fields:
    mine = [entry for entry in entries if SPLITS[entry.split] == split][:max_images]
    if not mine:
      raise ValueError(f"{path} must have images in the split {split}, got none")
    images = [read_image((image_dir or path.parent) / entry.images, size) for entry in mine]
    captions = [[*map(tokenize, entry.captions)] for entry in mine]
    names = [entry.images for entry in mine]
    sets.append(CaptionedImages.of(np.stack(images), captions, names))
  return CaptionData(*sets)


def _entries(path: Path) -> list[Entry]:
  """The images of a JSON file."""
  try:
    content = json.loads(path.read_text())
    if all(isinstance(image, dict) for image in content["images"]):
      name = lambda image: str(Path(image.get("filepath", "")) / image["filename"])
      texts = lambda image: [sentence["raw"] for sentence in image["sentences"]]
      rows = [(name(image), texts(image), image["split"]) for image in content["images"]]
    else:
      rows = list(zip(*(content[name] for name in Entry.model_fields), strict=True))
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f"{path} must have lists images, captions and split of the same length, {error!r}"
    ) from error
  entries = list[Entry]()
  for name, texts, split in rows:
    try:
      entries.append(Entry(images=name, captions=texts, split=split))
    except ValueError as error:
      raise ValueError(f"{path}: {error}, of the image {name!r}") from error
  return entries


def _read(source: Any, size: Size, max_images: int | None) -> CaptionedImages:
  """The images of a source, resized one by one: as they are they would not fit into memory."""
  num = min(len(source), max_images or len(source))
  images, captions, names = np.empty((num, *size, 3), np.uint8), [], []
  for i in range(num):
    example = source[i]
    images[i] = resize(example["image"], size)
    names.append((example.get("image/filename") or example["image/id"]).decode())
    texts = example["captions"] if "captions" in example else [{"text": example["caption"]}]
    # A sequence is a dictionary of lists, or a list of dictionaries.
    texts = texts["text"] if isinstance(texts, dict) else [text["text"] for text in texts]
    captions.append([tokenize(text.decode()) for text in texts])
  return CaptionedImages.of(images, captions, names)
