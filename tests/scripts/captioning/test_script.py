"""The captioning script: from data to tables and pictures, stopped, resumed, on files of a user."""

import csv
import dataclasses
import functools
import json
import math

import chex
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jaxbo_models.vocabulary import Vocabulary
from PIL import Image

import jaxbo
from scripts.captioning import __main__ as script
from scripts.captioning import files as caption_files
from scripts.captioning import model as caption_model
from scripts.captioning import noise as caption_noise
from scripts.captioning import run as caption_run
from scripts.captioning import shapes as caption_shapes
from scripts.captioning.config import Config, Settings
from scripts.captioning.noise import NoiseSettings
from scripts.captioning.scenes import ShapesCaptions
from scripts.common.checkpoints import latest_step

pytestmark = pytest.mark.slow  # All together, not each.

TINY = {"hidden_dim": 8, "embed_dim": 8, "attention_dim": 8, "batch_size": 8, "test_examples": 40}
SMALL = TINY | {"steps": 4, "canonical_steps": 1, "eval_every": 2, "checkpoint_every": 2}
SMALL |= {"orders": ("either",)}


@pytest.fixture(scope="module")
def drawn():
  """What was drawn from which scenes: ``(data, number, part)``."""
  found, sample = set(), ShapesCaptions.sample

  def spy(self, key, num, part="train"):
    found.add((self, num, part))
    return sample(self, key, num, part)

  caption_shapes.held_out.cache_clear()  # Other files draw, too.
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(ShapesCaptions, "sample", spy)
    yield found


@pytest.fixture(scope="module", autouse=True)
def compiled_once(drawn):
  """One captioner of shapes for all runs: compilation is most of the time of the tests."""
  make = caption_run.make_program
  of_shapes = functools.cache(lambda order, model: make(Config(**SMALL), order, model, None))

  def make_program(config, order, model, files):
    if config.dataset == "shapes" and config.hidden_dim == TINY["hidden_dim"]:
      return of_shapes(order, model)
    return make(config, order, model, files)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(caption_run, "make_program", make_program)
    yield


def metrics(folder):
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) | {"seconds": 0} for line in lines]


def state_of(folder, name, step):
  with ocp.CheckpointManager(folder / "checkpoints" / name) as manager:
    assert manager.latest_step() == step
    return manager.restore(step, args=ocp.args.StandardRestore())["state"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A run from its beginning to its end."""
  folder = tmp_path_factory.mktemp("whole")
  assert script.main(Config(output_dir=folder, **SMALL)) == 0
  return folder


def test_a_run_is_trained_validated_and_tested_on_different_scenes(whole, drawn):
  parts = {num: part for data, num, part in drawn if data == ShapesCaptions(order="either")}
  assert parts == {8: "train", 20: "validation", 40: "test"}


def test_a_captioner_says_only_words(whole):
  params = state_of(whole, "either_sequential_seed0", 4)["params"]
  bias = params["output_bias"]
  params["output_bias"] = bias.at[:2].set(100.0)  # Padding and the beginning.
  program = caption_run.make_program(Config(**SMALL), "either", "sequential", None)
  images = caption_shapes.held_out(program.data, "test", 40).images
  for said in program.ask.greedy(params, images), program.ask.beam(params, images).tokens:
    assert np.min(said) > 1
  assert caption_model.never_said(Vocabulary(program.data.vocabulary)) == (0, 1)
  assert caption_model.never_said(Vocabulary.build([["cat"]])) == (0, 1, 3)


def test_a_run_leaves_metrics_results_pictures_and_checkpoints(whole):
  assert [(line["step"], line["order"]) for line in metrics(whole)] == [
    (2, "either"),
    (4, "either"),
  ]
  [row] = csv.DictReader((whole / "results.csv").read_text().splitlines())
  assert row["model"] == "sequential"
  assert float(row["entropy"]) == pytest.approx(math.log(2))
  assert float(row["nll"]) > 5  # Nothing was learnt yet.
  assert 0 <= float(row["exact_match"]) <= 1
  for name in ("curves.png", "attention_either_sequential.png"):
    with Image.open(whole / name) as picture:
      assert picture.width > 300
  assert state_of(whole, "either_sequential_seed0", 4)


def test_a_stopped_run_goes_on_bit_for_bit(whole, tmp_path, monkeypatch, capsys):
  kind, closed = caption_shapes.ShapesTrainer, []
  advance, close = kind.advance, kind.close

  def stopped(self, t):
    if t == 3:
      raise KeyboardInterrupt
    return advance(self, t)

  def closing(self):
    close(self)
    closed.append(latest_step(tmp_path / "checkpoints" / "either_sequential_seed0"))

  config = Config(output_dir=tmp_path, **SMALL)
  with monkeypatch.context() as patch:
    patch.setattr(kind, "advance", stopped)
    patch.setattr(kind, "close", closing)
    assert script.main(config) == 130
  assert closed == [2]  # What was written in the background is there.
  assert "Interrupted; --resume goes on" in capsys.readouterr().out
  assert len(metrics(tmp_path)) == 1
  for wrong, message in (
    ({}, "has checkpoints of an earlier run"),
    ({"resume": True, "learning_rate": 1.0}, "learning_rate must be"),
  ):
    assert script.main(dataclasses.replace(config, **wrong)) == 2
    assert message in capsys.readouterr().err
  assert script.main(dataclasses.replace(config, resume=True)) == 0
  assert metrics(tmp_path) == metrics(whole)
  name = "either_sequential_seed0"
  chex.assert_trees_all_equal(state_of(tmp_path, name, 4), state_of(whole, name, 4))
  rows = [
    (folder / "results.csv").read_text().splitlines()[1].rsplit(",", 1)[0]  # Without the time.
    for folder in (tmp_path, whole)
  ]
  assert rows[0] == rows[1]
  assert script.main(dataclasses.replace(config, resume=True, first_seed=1)) == 0
  found = csv.DictReader((tmp_path / "results.csv").read_text().splitlines())
  assert [row["seed"] for row in found] == ["0", "1"]  # Nothing is lost.


def test_a_checkpoint_captions_a_users_own_files(whole, tmp_path, capsys):
  paths = (tmp_path / "mine.png", tmp_path / "other.jpg")
  for path, color in zip(paths, ("red", "blue"), strict=True):
    Image.new("RGB", (50, 70), color).save(path)
  config = Config(output_dir=whole, orders=("either",), predict=paths)
  assert script.main(config) == 0
  printed = capsys.readouterr().out
  assert all(path.name in printed for path in paths)
  with Image.open(whole / "predictions.png") as picture:
    assert picture.width > 100
  other = tmp_path / "other"
  other.mkdir()
  (other / "config.json").write_text("{}")
  broken = tmp_path / "broken.png"
  broken.write_text("no image")
  for wrong, message in (
    ({"predict": (tmp_path / "nowhere.png",)}, "there is no image"),
    ({"predict": (broken,)}, "must be an image"),
    ({"predict": (paths[0],), "beam_size": 1000}, "beam_size must be in [1, vocab_size"),
    ({"output_dir": tmp_path}, "predict needs a run in output_dir"),
    ({"output_dir": other}, "output_dir must have a run of captioning, got another one"),
    ({"first_seed": 7}, "no checkpoint of either_sequential_seed7"),
  ):
    assert script.main(dataclasses.replace(config, **wrong)) == 2
    assert message in capsys.readouterr().err


def test_a_users_own_images_are_trained_on_and_scored(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(caption_files, "NUM_LENGTHS", 1)
  colors = ["red", "green", "blue", "yellow"] * 3
  for i, color in enumerate(colors):
    Image.new("RGB", (40, 40), color).save(tmp_path / f"{i}.png")
  content = {
    "images": [f"{i}.png" for i in range(12)],
    "captions": [[f"A {color} image.", f"all is {color}"] for color in colors],
    "split": ["train"] * 8 + ["val"] * 2 + ["test"] * 2,
  }
  (tmp_path / "captions.json").write_text(json.dumps(content))
  config = Config(
    dataset="json",
    json_file=tmp_path / "captions.json",
    output_dir=tmp_path / "out",
    **SMALL | {"steps": 2, "models": ("no_attention",), "beam_size": 2},
  )
  assert script.main(config) == 0
  printed = capsys.readouterr().out
  assert "BLEU-4" in printed
  assert "SPICE was skipped" in printed
  [row] = csv.DictReader((tmp_path / "out" / "results.csv").read_text().splitlines())
  assert float(row["token_nll"]) > 1
  words = Vocabulary.load(tmp_path / "out" / "vocabulary.json").words
  assert words[:4] == Vocabulary.SPECIAL
  # Four colours are twice in the training set, each in two captions; the others are in eight.
  assert set(words[4:8]) == {"a", "image", "all", "is"}
  assert set(words[8:]) == {"red", "green", "blue", "yellow"}
  content["captions"][0] = ["a cat"]
  (tmp_path / "captions.json").write_text(json.dumps(content))
  assert script.main(dataclasses.replace(config, resume=True)) == 2
  assert "captions must be those of the run to resume" in capsys.readouterr().err


TINY_NOISE = NoiseSettings(
  reweighting=Settings(embed_dim=8, hidden_dim=8, attention_dim=8, batch_size=64, steps=2),
  num_train=40,
  num_val=8,
  batch_size=8,
  inner_steps=2,
  outer_steps=2,
  captioner=Settings(embed_dim=8, hidden_dim=8, attention_dim=8, batch_size=8, steps=2),
)


def test_captioners_are_the_loss_of_reweighting_and_of_hyper_cleaning(
  drawn, tmp_path, monkeypatch, capsys
):
  """With the methods whose answers are known: IR-DRO prefers great losses, first order nothing."""
  monkeypatch.setattr(script, "WEIGHTINGS", {"ir_dro": caption_noise.WEIGHTINGS["ir_dro"]})
  monkeypatch.setattr(script, "RESPONSES", ("first_order",))
  config = Config(noise=True, output_dir=tmp_path)
  (tmp_path / "metrics.jsonl").write_text("a training run's")
  before, trained_with, reweight = set(drawn), [], jaxbo.reweight
  monkeypatch.setattr(jaxbo, "reweight", lambda w: trained_with.append(w) or reweight(w))
  assert script.run_noise(config, TINY_NOISE) == 0
  # IR-DRO where colours are flipped, and uniform weights before hyper-cleaning.
  weights = [w.weigh(np.array([0.0, 4.0]), w.init())[0][1] for w in trained_with]
  np.testing.assert_allclose(weights, [math.e / (1 + math.e), 0.5], rtol=1e-5)
  clean, flipped = ShapesCaptions(), ShapesCaptions(color_flips=0.2)
  swapped = ShapesCaptions(swaps=0.3)
  assert drawn - before == {
    *((flipped, 64, "train"), (flipped, 2048, "train"), (clean, 1000, "test")),
    *((swapped, 8, "train"), (swapped, 40, "train"), (clean, 8, "train")),
  }
  assert (tmp_path / "metrics.jsonl").read_text() == "a training run's"
  assert len((tmp_path / "noise.jsonl").read_text().splitlines()) == 2
  printed = capsys.readouterr().out
  assert "IR-DRO" in printed
  assert "first order" in printed
  [row] = csv.DictReader((tmp_path / "cleaning.csv").read_text().splitlines())
  assert float(row["auc"]) == 0.5
  assert float(row["outer_loss"]) > 1
  [row] = csv.DictReader((tmp_path / "reweighting.csv").read_text().splitlines())
  assert float(row["auc"]) + float(row["loss_auc"]) == pytest.approx(1, abs=0.1)
  assert float(row["wrong_weight"]) == pytest.approx(1, abs=0.1)
  assert script.main(dataclasses.replace(config, resume=True)) == 2
  assert "resume must not be given with noise" in capsys.readouterr().err


@pytest.mark.parametrize(
  "wrong, message",
  [
    ({"dataset": "flickr"}, "dataset must be one of shapes, nlvr_captions"),
    ({"orders": ()}, "orders must be different ones of canonical, either; got none"),
    ({"models": ("magic",)}, "models must be different ones of sequential"),
    ({"models": ("none_word", "none_word")}, "got none_word none_word"),
    ({"dataset": "json"}, "json_file must be given for the dataset json"),
    ({"dataset": "nlvr_captions", "noise": True}, "ablation and noise are for the dataset shapes"),
    ({"noise": True}, "embed_dim must not be given with noise, which has settings of its own"),
    ({"steps": 0}, "steps must be positive, got 0"),
    ({"dropout": 1.0}, "dropout must be in [0, 1), got 1.0"),
    ({"first_seed": -1}, "first_seed must not be negative, got -1"),
    ({"canonical_steps": -2}, "canonical_steps must not be negative, got -2"),
    ({"resume": True}, "resume needs an earlier run in output_dir"),
  ],
)
def test_bad_input_says_what_is_allowed(tmp_path, capsys, wrong, message):
  assert script.main(Config(**({"output_dir": tmp_path / "out"} | SMALL | wrong))) == 2
  assert message in capsys.readouterr().err
