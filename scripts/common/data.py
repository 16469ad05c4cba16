"""Reads data sets into NumPy arrays, without TensorFlow.

A ``data_dir`` holds ``name/version/`` as tensorflow-datasets prepares them in ``array_record``
files; by default it is ``TFDS_DATA_DIR``, or ``~/tensorflow_datasets``. A data set that is not
there raises ``FileNotFoundError``, whose message says how to prepare it. Nothing is downloaded.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scripts.common.files import UnusableError, read_json

FILES = ("dataset_info.json", "features.json", "*.array_record*")  # Of a version.
CURE = "delete the folder of this version and prepare the data set anew"


class Examples(NamedTuple):
  """Labelled images."""

  images: Any  # [n, features], float32 in [0, 1].
  labels: Any  # [n], int32.

  def take(self, indices) -> "Examples":
    """The examples at ``indices``."""
    return Examples(self.images[indices], self.labels[indices])


def digits() -> Examples:
  """All 1,797 handwritten digits of scikit-learn's wheel, 8 x 8 pixels, 10 classes."""
  from sklearn.datasets import load_digits

  images, labels = load_digits(return_X_y=True)
  return Examples((images / 16).astype(np.float32), labels.astype(np.int32))


def tfds_images(name: str, split: str, data_dir: str | os.PathLike[str] | None = None) -> Examples:
  """The images of a split, such as ``"train"`` or ``"test[:100]"``."""
  chunks = in_chunks(tfds_source(name, split, data_dir))
  images, labels = map(np.concatenate, zip(*chunks, strict=True))
  return Examples(images.reshape(len(images), -1).astype(np.float32) / 255, labels)


def in_chunks(source: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """The images and labels of ``source``, a thousand at a time: decoded Omniglot is 1 GB."""
  for begin in range(0, len(source), 1000):
    examples = source.__getitems__(range(begin, min(begin + 1000, len(source))))
    images = np.stack([example["image"] for example in examples])
    yield images, np.array([example["label"] for example in examples], np.int32)


def tfds_source(
  name: str,
  split: str,
  data_dir: str | os.PathLike[str] | None = None,
  preparation: str | None = None,
) -> "Source":
  """A sequence of dictionaries, of the last version that is there; nothing is downloaded.

  ``preparation`` says how to get a data set that the catalogue of tensorflow-datasets lacks.

  Raises:
    FileNotFoundError: if it is not there.
    UnusableError: if a file is damaged, when it is opened or when it is read.
  """
  root = Path(
    data_dir or os.environ.get("TFDS_DATA_DIR") or Path.home() / "tensorflow_datasets"
  ).expanduser()
  of_version = lambda path: tuple(map(int, path.name.split(".")))
  there = [path for path in root.glob(f"{name}/*") if path.is_dir()]
  versions = [path for path in there if re.fullmatch(r"\d+\.\d+\.\d+", path.name)]
  complete = [path for path in versions if all(any(path.glob(file)) for file in FILES)]
  if not complete:
    # TFDS writes nothing into the folder of a version that is there.
    target = root.absolute() / "array_record" if versions else root.absolute()
    preparation = preparation or (
      "To prepare them, where there is a network: python -m pip install tensorflow "
      "tensorflow-datasets, then\n"
      f"  python -c \"import tensorflow_datasets as tfds; tfds.builder('{name}', "
      f"file_format='array_record', data_dir='{target}').download_and_prepare()\""
    )
    found = f" but {', '.join(sorted(path.name for path in there))} without them" if there else ""
    elsewhere = f"\nThen give --data-dir {target}, or delete what is there." if versions else ""
    raise FileNotFoundError(
      f"no {name} in {root.absolute()} (--data-dir or TFDS_DATA_DIR names another folder){found}.\n"
      f"Expected: {name}/<version>/ with dataset_info.json, features.json and {name}-*.array_record"
      f"-*, as TFDS writes with file_format='array_record'.\n{preparation}{elsewhere}"
    )
  folder = max(complete, key=of_version)
  for file in FILES[:2]:
    read_json(folder / file, CURE)
  import tensorflow_datasets as tfds

  return Source(tfds.builder_from_directory(folder), split)


class Source:
  """A split on disk; ``__getitems__(range(a, b))`` reads many examples at once.

  Attributes:
    dataset_info: what tensorflow-datasets knows of it.
  """

  def __init__(self, builder: Any, split: str):
    self._source, self.dataset_info = builder.as_data_source(split=split), builder.info
    self._files = self.dataset_info.splits[split].file_instructions
    for file in self._files:  # A reader takes one that was cut for an empty one.
      if (number := _num_records(file.filename)) != file.examples_in_shard:
        raise UnusableError(
          f"{file.filename} is damaged ({number} of {file.examples_in_shard} examples): {CURE}"
        )

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict[str, Any]:
    [example] = self.__getitems__(range(index, index + 1))
    return example

  def __iter__(self) -> Iterator[dict[str, Any]]:
    return map(self.__getitem__, range(len(self)))

  def __getitems__(self, indices: range) -> list[dict[str, Any]]:
    try:
      return self._source.__getitems__(indices)
    except RuntimeError as error:  # Of a checksum, above all.
      if len(indices) > 1:  # One of them says which file it is in.
        return [self[index] for index in indices]
      ends = np.cumsum([file.take for file in self._files])
      file = self._files[int(np.searchsorted(ends, indices[0], side="right"))]
      raise UnusableError(f"{file.filename} is damaged ({error}): {CURE}") from error


def _num_records(file: str) -> int:
  from array_record.python.array_record_module import ArrayRecordReader

  try:
    return ArrayRecordReader(file).num_records()
  except RuntimeError:
    return 0


def newsgroups(
  data_dir: str | os.PathLike[str] | None = None, *, num_words: int = 1000
) -> tuple[Examples, int]:
  """20 Newsgroups as TF-IDF rows of Euclidean norm 1: ``(examples, num_train)``.

  Training documents are first. Of them alone are the vocabulary, the ``num_words`` most frequent
  words without English stop words, and its weights.
  """
  from sklearn.feature_extraction.text import TfidfVectorizer

  preparation = (
    "It is not in the catalogue of tensorflow-datasets: 300 posts of each of the 20 groups, the "
    "earlier 225 in the split train\nand the others in test, with the features subject, text and "
    "label (https://doi.org/10.24432/C5C323).\ntfds.dataset_builders.store_as_tfds_dataset writes "
    "such a folder."
  )
  texts, labels, num_train = [], [], 0
  for split in ("train", "test"):
    source = tfds_source("newsgroups20", split, data_dir, preparation)
    posts = source.__getitems__(range(len(source)))
    texts += [f"{post['subject'].decode()}\n{post['text'].decode()}" for post in posts]
    labels += [post["label"] for post in posts]
    num_train = num_train or len(posts)
  words = TfidfVectorizer(max_features=num_words, stop_words="english", sublinear_tf=True)
  words.fit(texts[:num_train])
  rows = np.asarray(words.transform(texts).todense(), np.float32)
  return Examples(rows, np.asarray(labels, np.int32)), num_train
