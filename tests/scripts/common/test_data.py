"""Data sets on disk: the last complete version is read, nothing is downloaded, damage is said."""

import json
import os

import numpy as np
import pytest
import requests

from scripts.common import data


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
  def refuse(*_, **__):
    raise AssertionError("a download was tried")

  monkeypatch.setattr(requests.Session, "request", refuse)


def write_set(folder, first, name="mnist", kind="array_record"):
  """Labels from ``first`` on, in two files of three examples each."""
  import tensorflow_datasets as tfds
  from array_record.python.array_record_module import ArrayRecordWriter
  from tensorflow_datasets.proto import tf_example_pb2

  folder.mkdir(parents=True)
  features = tfds.features.FeaturesDict({"label": np.int64})
  features.save_config(str(folder))
  for shard in range(2):
    writer = ArrayRecordWriter(str(folder / f"{name}-train.{kind}-0000{shard}-of-00002"), "")
    for i in range(3):
      example = tf_example_pb2.Example()
      example.features.feature["label"].int64_list.value.append(first + 3 * shard + i)
      writer.write(example.SerializeToString())
    writer.close()
  split = {
    "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    "name": "train", "numBytes": "1", "shardLengths": ["3", "3"],
  }  # fmt: skip
  info = {"name": name, "version": folder.name, "fileFormat": kind, "splits": [split]}
  (folder / "dataset_info.json").write_text(json.dumps(info))
  return folder


def labels(root, split="train"):
  source = data.tfds_source("mnist", split, root)
  assert source[len(source) - 1] == source.__getitems__(range(len(source)))[-1]
  return [int(example["label"]) for example in source]


def test_the_last_complete_version_is_read_whichever_the_catalogue_has(tmp_path):
  for version, first in (("9.2.0", 20), ("10.0.0", 30), ("3.0.0", 10)):
    write_set(tmp_path / "mnist" / version, first)
  write_set(tmp_path / "mnist" / "11.0.0.incompleteXYZ", 40)
  (tmp_path / "mnist" / "12.0.0").mkdir()
  assert labels(tmp_path) == [30, 31, 32, 33, 34, 35]
  assert labels(tmp_path, "train[1:5]") == [31, 32, 33, 34]


def test_what_is_there_instead_is_said_with_a_command_that_works(tmp_path):
  write_set(tmp_path / "mnist" / "11.0.0.incompleteXYZ", 40)
  with pytest.raises(FileNotFoundError, match=r"but 11\.0\.0\.incompleteXYZ without") as error:
    labels(tmp_path)
  assert f"data_dir='{tmp_path}')" in str(error.value)
  with pytest.raises(FileNotFoundError, match="writes with file_format='array_record'"):
    data.newsgroups(tmp_path)
  write_set(tmp_path / "mnist" / "3.0.1", 40, kind="tfrecord")
  with pytest.raises(
    FileNotFoundError, match=r"but 11\.0\.0\.incompleteXYZ, 3\.0\.1 without"
  ) as error:
    labels(tmp_path)
  message, target = str(error.value), tmp_path / "array_record"
  assert f"Then give --data-dir {target}" in message
  command = message.split('python -c "')[1].split('"\n')[0]
  with pytest.raises(AssertionError, match="a download was tried"):  # As far as it gets here.
    exec(command)


@pytest.mark.parametrize("kind", ["cut", "empty", "flipped", "gone"])
def test_a_damaged_file_is_named_when_it_is_read(tmp_path, kind):
  file = write_set(tmp_path / "mnist" / "1.0.0", 5) / "mnist-train.array_record-00001-of-00002"
  size = file.stat().st_size
  if kind == "flipped":
    content = bytearray(file.read_bytes())
    content[70] ^= 1
    file.write_bytes(content)
  elif kind == "gone":
    file.unlink()
  else:
    os.truncate(file, size // 2 if kind == "cut" else 0)
  assert labels(tmp_path, "train[:3]") == [5, 6, 7]
  with pytest.raises(ValueError, match=r"/1\.0\.0/mnist-train\.array_record-00001-of") as error:
    labels(tmp_path)
  assert "00000-of" not in str(error.value)
  assert "prepare the data set anew" in str(error.value)


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_a_description_that_is_cut_or_gone_is_named(tmp_path, name):
  file = write_set(tmp_path / "mnist" / "1.0.0", 5) / name
  os.truncate(file, 20)
  with pytest.raises(ValueError, match=rf"1\.0\.0/{name} is damaged .*: delete the folder"):
    labels(tmp_path)
  file.unlink()
  with pytest.raises(FileNotFoundError, match=r"but 1\.0\.0 without them"):
    labels(tmp_path)
  write_set(tmp_path / "mnist" / "0.9.0", 7)
  assert labels(tmp_path)[0] == 7
