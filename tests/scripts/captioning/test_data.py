"""Images with captions: what is read from which files, and batches by length."""

import functools
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from jaxbo_models.vocabulary import Vocabulary
from PIL import Image

from scripts.captioning import batches as caption_batches
from scripts.captioning import data as caption_data
from scripts.captioning.config import Config

pytestmark = pytest.mark.slow  # All together, not each.

SIZE = (6, 8)


def needs(name):
  there = list(Path(os.environ.get("TFDS_DATA_DIR", "/nowhere")).glob(f"{name}/*"))
  return pytest.mark.skipif(not there, reason=f"TFDS_DATA_DIR has no {name}")


def grey(value):
  return np.full((12, 16, 3), value, np.uint8)


def png(value):
  file = io.BytesIO()
  Image.fromarray(grey(value)).save(file, "png")
  return file.getvalue()


@pytest.fixture
def coco(tmp_path):
  """A small data set with the name, the splits and the features of COCO captions."""
  import tensorflow_datasets as tfds
  from array_record.python.array_record_module import ArrayRecordWriter
  from tensorflow_datasets.proto import tf_example_pb2

  folder = tmp_path / "coco_captions" / "1.1.0"
  folder.mkdir(parents=True)
  image = tfds.features.Image(shape=(None, None, 3), encoding_format="png")
  captions = tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()})
  features = tfds.features.FeaturesDict(
    {"image": image, "image/filename": tfds.features.Text(), "captions": captions}
  )
  features.save_config(str(folder))
  numbers = {"train": [10, 20], "restval": [30], "val": [40], "test": [50, 60, 70]}
  splits = []
  for split, values in numbers.items():
    name = f"coco_captions-{split}.array_record-00000-of-00001"
    writer = ArrayRecordWriter(str(folder / name), "group_size:1")
    for value in values:
      example = tf_example_pb2.Example()
      feature = example.features.feature
      feature["image"].bytes_list.value.append(png(value))
      feature["image/filename"].bytes_list.value.append(b"%d.jpg" % value)
      for i in range(value // 10):
        feature["captions/id"].int64_list.value.append(i)
        feature["captions/text"].bytes_list.value.append(b"A dog, number %d." % i)
      writer.write(example.SerializeToString())
    writer.close()
    splits.append(
      {
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        "name": split,
        "numBytes": "1",
        "shardLengths": [str(len(values))],
      }
    )
  info = {"name": "coco_captions", "version": "1.1.0", "fileFormat": "array_record"}
  (folder / "dataset_info.json").write_text(json.dumps(info | {"splits": splits}))
  return tmp_path


def test_coco_is_read_in_karpathys_splits_of_which_restval_is_trained_on(coco):
  data = caption_data.read_tfds("coco_captions", SIZE, coco)
  assert [part.names for part in data] == [
    ["10.jpg", "20.jpg", "30.jpg"],
    ["40.jpg"],
    ["50.jpg", "60.jpg", "70.jpg"],
  ]
  assert data.train.images.shape == (3, *SIZE, 3)
  assert data.train.images[:, 0, 0, 0].tolist() == [10, 20, 30]
  assert [len(of_image) for of_image in data.test.captions] == [5, 6, 7]
  assert data.train.captions[1] == [["a", "dog", "number", "0"], ["a", "dog", "number", "1"]]
  few = caption_data.read_tfds("coco_captions", SIZE, coco, max_images=1)
  assert [part.names for part in few] == [["10.jpg"], ["40.jpg"], ["50.jpg"]]


@needs("coco_captions_open")
def test_open_photographs_have_five_captions_each():
  data = caption_data.read_tfds("coco_captions_open", (32, 32))
  assert [len(part.names) for part in data] == [20, 6, 25]
  for part in data:
    assert all(len(of_image) >= 5 for of_image in part.captions)
    assert part.images.std() > 30
  assert not set(data.train.names) & set(data.validation.names)


@needs("nlvr_captions")
def test_drawings_have_sentences_of_people_and_no_sentence_for_validation_is_trained_on():
  data = caption_data.read_tfds("nlvr_captions", (10, 40))
  assert len(data.test.names) == 546
  assert len(data.train.names) + len(data.validation.names) == 1103
  assert 60 < len(data.validation.names) < 160
  sentences = [{" ".join(of_image[0]) for of_image in part.captions} for part in data]
  assert not sentences[0] & sentences[1]
  assert all(len(of_image) == 1 for of_image in data.test.captions)
  with pytest.raises(ValueError, match="max_images must leave images for train, got 1"):
    caption_data.read(Config(dataset="nlvr_captions", max_images=1), (10, 40))


def test_a_missing_data_set_says_how_to_get_it(tmp_path):
  for name, words in (
    ("coco_captions", "download_and_prepare"),
    ("coco_captions_open", "open licences"),
    ("nlvr_captions", "lil-lab/nlvr"),
  ):
    with pytest.raises(FileNotFoundError, match=words):
      caption_data.read_tfds(name, SIZE, tmp_path)


@pytest.fixture
def folder(tmp_path):
  """Four images and a file of their captions."""
  for name, value in (("a.png", 1), ("b.png", 2), ("c.png", 3), ("d.png", 4)):
    Image.fromarray(grey(value)).save(tmp_path / name)
  return tmp_path


CONTENT = {
  "images": ["a.png", "b.png", "c.png", "d.png"],
  "captions": [["A dog.", "The dog!"], ["a cat"], ["one bird"], ["two fish"]],
  "split": ["train", "restval", "val", "test"],
}


def write(folder, content):
  path = folder / "captions.json"
  path.write_text(json.dumps(content))
  return path


def test_a_users_own_images_are_read_with_their_captions(folder):
  data = caption_data.read_json(write(folder, CONTENT), SIZE)
  assert [part.names for part in data] == [["a.png", "b.png"], ["c.png"], ["d.png"]]
  assert data.train.captions == [[["a", "dog"], ["the", "dog"]], [["a", "cat"]]]
  assert data.train.images[:, 0, 0, 0].tolist() == [1, 2]
  other = folder / "elsewhere"
  other.mkdir()
  data = caption_data.read_json(write(other, CONTENT), SIZE, image_dir=folder, max_images=1)
  assert data.train.names == ["a.png"]
  assert data.train.captions == [[["a", "dog"], ["the", "dog"]]]


def test_karpathys_files_are_read(folder):
  images = [
    {"filename": name, "split": split, "sentences": [{"raw": text} for text in texts]}
    for name, texts, split in zip(*CONTENT.values(), strict=True)
  ]
  (folder / "sub").mkdir()
  (folder / "a.png").rename(folder / "sub" / "a.png")
  images[0]["filepath"] = "sub"
  data = caption_data.read_json(write(folder, {"images": images}), SIZE)
  assert data.train.captions == [[["a", "dog"], ["the", "dog"]], [["a", "cat"]]]
  assert data.train.names == ["sub/a.png", "b.png"]


@pytest.mark.parametrize(
  "wrong, message",
  [
    ({"split": ["train", "dev", "val", "test"]}, "split should be among train, restval"),
    ({"split": ["train", "train", "train", "test"]}, "images in the split validation, got none"),
    ({"split": [["train"], "train", "val", "test"]}, r"split should be .* got \['train'\]"),
    ({"images": [7, "b.png", "c.png", "d.png"]}, "images should be a valid string, got 7"),
    ({"split": ["train"]}, "lists images, captions and split of the same length"),
    ({"captions": [[], ["a"], ["a"], ["a"]]}, r"captions .* at least 1 item .* got \[\].*'a.png'"),
    ({"captions": ["cat", ["a"], ["a"], ["a"]]}, "captions should be a valid list, got 'cat'"),
    ({"captions": [[7], ["a"], ["a"], ["a"]]}, "captions should be a valid string, got 7"),
    ({"captions": [["a"], ["a"], ["?"], ["a"]]}, "captions must have at least one word .* c.png"),
    ({"images": None}, "lists images, captions and split"),
  ],
)
def test_a_wrong_file_says_what_is_wrong(folder, wrong, message):
  with pytest.raises(ValueError, match=message):
    caption_data.read_json(write(folder, CONTENT | wrong), SIZE)


def test_files_that_are_not_there_or_no_images_are_named(folder, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match=r"a\.png must be an image, .* exceeds limit"):
      caption_data.read_json(write(folder, CONTENT), SIZE)
  with pytest.raises(FileNotFoundError, match=r"there is no file .*nowhere\.json"):
    caption_data.read_json(folder / "nowhere.json", SIZE)
  (folder / "b.png").write_text("no image")
  with pytest.raises(ValueError, match=r"b\.png must be an image"):
    caption_data.read_json(write(folder, CONTENT), SIZE)
  (folder / "b.png").unlink()
  with pytest.raises(FileNotFoundError, match=r"there is no image .*b\.png"):
    caption_data.read_json(write(folder, CONTENT), SIZE)


def test_captions_without_words_and_images_without_others_are_left_out_and_counted(folder, capsys):
  captions = [["A dog.", " ?", ""], ["..."], ["a"], ["a"]]
  data = caption_data.read_json(write(folder, CONTENT | {"captions": captions}), SIZE)
  assert (data.train.names, data.train.captions) == (["a.png"], [[["a", "dog"]]])
  assert len(data.train.images) == 1
  said = "Left out: 3 captions without words, and 1 images without others.\n"
  assert capsys.readouterr().err == said


def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path):
  values = np.linspace(0, 65535, 256).astype(np.uint16)
  Image.fromarray(np.tile(values, (256, 1))).save(tmp_path / "ramp.png")
  for image in (
    caption_data.read_image(tmp_path / "ramp.png", (256, 256)),
    caption_data.resize(np.tile(values.astype(np.int32), (256, 1)), (256, 256)),
  ):
    np.testing.assert_array_equal(image[0, :, 0], values >> 8)


def test_images_of_any_kind_become_colours_of_one_size():
  for mode in ("L", "RGBA", "P", "1"):
    image = caption_data.resize(Image.new(mode, (30, 20)), SIZE)
    assert image.shape == (*SIZE, 3)
    assert image.dtype == np.uint8


def test_captions_become_rows_of_ids_with_their_image():
  captions = [[["a", "dog"], ["the", "dog"]], [["a", "very", "big", "cat"]]]
  vocabulary = Vocabulary.build([words for of_image in captions for words in of_image])
  rows = caption_batches.encode(captions, vocabulary, max_words=3)
  assert rows.image.tolist() == [0, 0, 1]
  assert rows.num_tokens.tolist() == [4, 4, 5]
  assert [vocabulary.decode(tokens) for tokens in rows.tokens] == [
    ["a", "dog"],
    ["the", "dog"],
    ["a", "very", "big"],
  ]


NUM_TOKENS = np.random.default_rng(0).integers(4, 20, 103)
BATCHES = functools.partial(caption_batches.LengthBatches, NUM_TOKENS, 10, 3)


def test_an_epoch_sees_every_row_and_lengths_are_alike():
  batches = BATCHES(0)
  assert batches.per_epoch == 12
  epoch = [batches(step) for step in range(12)]
  assert {row for rows, _ in epoch for row in rows} == set(range(103))
  assert {length for _, length in epoch} == set(batches.lengths)
  assert len(batches.lengths) == 3
  for rows, length in epoch:
    assert len(rows) == 10
    assert NUM_TOKENS[rows].max() <= length
  padding = sum((length - NUM_TOKENS[rows]).sum() for rows, length in epoch)
  assert padding < 0.5 * (20 - NUM_TOKENS).sum()


def test_a_batch_depends_on_the_seed_and_the_step_alone():
  batches, rows = BATCHES(0), lambda seed, step: BATCHES(seed)(step)[0]
  order = [batches(step)[0] for step in (30, 2, 17, 30)]
  np.testing.assert_array_equal(order, [rows(0, step) for step in (30, 2, 17, 30)])
  assert any((rows(0, t) != rows(1, t)).any() for t in range(3))
  assert any((rows(0, t) != rows(0, t + 12)).any() for t in range(3))
  assert any((rows(1, t) != rows(0, t + 12)).any() for t in range(3))


def test_rows_are_shuffled_among_batches_and_batches_among_steps():
  batches = BATCHES(0)
  epochs = [[batches(step) for step in range(12 * i, 12 * i + 12)] for i in range(2)]
  together = [{frozenset(rows) for rows, _ in epoch} for epoch in epochs]
  assert not together[0] & together[1]
  lengths = [[length for _, length in epoch] for epoch in epochs]
  assert sorted(lengths[0]) not in lengths


def test_more_rows_than_there_are_are_refused():
  with pytest.raises(ValueError, match=r"batch_size must be in \[1, 103\]"):
    caption_batches.LengthBatches(NUM_TOKENS, 104, 3, 0)
  assert caption_batches.LengthBatches(NUM_TOKENS, 103, 3, 0).per_epoch == 1
