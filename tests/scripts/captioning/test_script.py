"""The captioning script: from data to tables and pictures, killed, resumed, on files of a user."""

import json
import math
import types
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest
from jaxbo_models.vocabulary import Vocabulary
from PIL import Image

import jaxbo
from scripts.captioning import __main__ as script
from scripts.captioning import files as caption_files
from scripts.captioning import noise as caption_noise
from scripts.captioning import plots as caption_plots
from scripts.captioning import shapes as caption_shapes
from scripts.captioning import tuning
from scripts.captioning.config import Config
from scripts.captioning.scenes import ShapesCaptions
from scripts.common import folder
from scripts.common.checkpoints import Checkpoints
from tests.scripts.captioning import small
from tests.scripts.captioning.small import SMALL, TINY
from tests.scripts.captioning.test_data import needs
from tests.scripts.common.processes import check_two_do_what_one_does, some_devices
from tests.scripts.common.stopped import stopped_after

pytestmark = pytest.mark.slow  # All together, not each.


@pytest.fixture(scope="module", autouse=True)
def cheap():
  """One device, and two images a picture."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(caption_plots, "NUM_EXAMPLES", 2)
    patch.setattr(script.devices, "all_devices", lambda: some_devices(1))
    yield


@pytest.fixture(scope="module")
def drawn():
  """What was drawn from which scenes: ``(data, number, part)``."""
  found, sample = set(), ShapesCaptions.sample

  def spy(self, key, num, part="train"):
    found.add((self, num, part))
    return sample(self, key, num, part)

  caption_shapes.held_out.cache_clear()  # Other files draw, too,
  jax.clear_caches()  # and what is traced already is not seen.
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(ShapesCaptions, "sample", spy)
    yield found


def metrics(path):
  return [line | {"seconds": 0} for line in folder.read(path)[0]]


def results(path):
  return [row | {"ms_per_step": 0} for row in folder.read(path)[1]]


@pytest.fixture(scope="module")
def whole(drawn, tmp_path_factory):
  """A run from its beginning to its end, what was drawn for it, and its captioners, compiled."""
  config = Config(output_dir=tmp_path_factory.mktemp("whole"), **SMALL)
  captioners = script.Captioning().prepare(config)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(script.Captioning, "prepare", lambda *_: captioners)
    assert script.run(config) == 0
  return config.output_dir, set(drawn), captioners


def test_a_run_is_trained_validated_and_tested_on_different_scenes(whole):
  parts = {num: part for data, num, part in whole[1] if data == ShapesCaptions(order="either")}
  assert parts == {8: "train", 20: "validation", 40: "test"}


def test_a_captioner_says_only_words(whole):
  captioner = whole[2]["either", "sequential"]
  key = {"order": "either", "model": "sequential", "seed": 0}
  at = folder.checkpoints(whole[0], key)
  params = Checkpoints(at).raw()["params"]
  params["output_bias"] = np.where(np.arange(19) < 2, 100.0, 0.0)  # Padding and the beginning.
  images = captioner.source.shown()
  for said in captioner.ask.greedy(params, images), captioner.ask.beam(params, images).tokens:
    assert np.min(said) > 1


def test_a_run_leaves_metrics_results_and_pictures(whole):
  path = whole[0]
  lines = metrics(path)
  assert [(line["step"], line["order"]) for line in lines] == [(3, "either"), (4, "either")]
  assert all(0 < line["grad_norm"] < 100 for line in lines)
  [row] = results(path)
  assert row["model"] == "sequential"
  assert row["entropy"] == pytest.approx(math.log(2))
  assert row["nll"] > 5  # Nothing was learnt yet.
  assert 0 <= row["exact_match"] <= 1
  for name in ("curves.png", "attention_either_sequential.png"):
    with Image.open(path / name) as picture:
      assert picture.width > 300


def test_a_stopped_run_goes_on_bit_for_bit(whole, tmp_path, monkeypatch):
  monkeypatch.setattr(script.Captioning, "prepare", lambda *_: whole[2])
  monkeypatch.setattr(script.Captioning, "draw", lambda *_: None)  # It takes seconds.
  config = Config(output_dir=tmp_path, **SMALL)
  with stopped_after(1):
    script.run(config)
  assert script.run(config.but(resume=True)) == 0
  assert metrics(config.output_dir) == metrics(whole[0])
  assert results(config.output_dir) == results(whole[0])


def test_rates_are_chosen_on_the_validation_set_and_reported_with(whole, tmp_path, monkeypatch):
  made = []

  def captioner(name, source, settings, where):
    made.append(settings.learning_rate)
    return whole[2]["either", "sequential"]

  monkeypatch.setattr(tuning, "Captioner", captioner)
  monkeypatch.setattr(tuning, "FACTORS", {0.5: (100,), 1.0: (100,)})
  monkeypatch.setattr(tuning.Trial, "result", lambda self, *_: {"validation_nll": 3.0 - made[-1]})
  config = Config(output_dir=tmp_path, **SMALL, tune=True)
  assert script.run(config) == 0
  assert made == [0.002, 0.004]
  tables = json.loads((tmp_path / "rates.json").read_text())
  assert tables == {"shapes": {"either": {"sequential": {"learning_rate": 0.004}}}}
  chosen = Config(rates_file=tmp_path / "rates.json")
  assert chosen.settings_of("either", "sequential").learning_rate == 0.004
  tables["shapes"]["either"]["sequential"]["learning_rate"] = 0.5
  (tmp_path / "rates.json").write_text(json.dumps(tables))
  assert chosen.settings_of("either", "sequential").learning_rate == 0.5
  assert chosen.settings_of("canonical", "sequential") == chosen.settings("canonical")
  given = chosen.but(learning_rate=0.1)
  assert given.settings_of("either", "sequential").learning_rate == 0.1


def test_a_candidate_is_judged_by_the_validation_set_alone():
  """The source has no other."""
  trial = object.__new__(tuning.Trial)
  trial._source = types.SimpleNamespace(validation=lambda ask, params: (ask, params))
  trial._captioner = types.SimpleNamespace(ask="asked")
  assert trial.result(types.SimpleNamespace(params="params"), None) == {
    "validation_nll": ("asked", "params")
  }


def test_a_rate_at_which_one_seed_diverges_is_not_chosen():
  """Its mean counts, although its other seeds are the best; a loss may also not be finite."""
  losses = {0.1: (1.5, 1.5), 0.3: (1.2, 3.6), 1.0: (1.1, math.nan)}
  row = {"order": "", "model": "none_word"}
  rows = [
    row | {"learning_rate": rate, "seed": seed, "validation_nll": loss}
    for rate, of_rate in losses.items()
    for seed, loss in enumerate(of_rate)
  ]
  [choice] = tuning.Tuning().choices(pd.DataFrame(rows))
  assert choice.entry == ("-", "none_word")
  assert choice.rates == {"learning_rate": 0.1}
  assert choice.score == 1.5


def test_two_processes_do_what_one_does_and_go_on_where_they_were_stopped(whole, tmp_path):
  config = Config(output_dir=whole[0], **SMALL)
  check_two_do_what_one_does(small, config, tmp_path)
  mine = config.but(output_dir=tmp_path, predict=(tmp_path / "red.png",))  # On one device.
  Image.new("RGB", (50, 70), "red").save(mine.predict[0])
  assert script.run(mine) == 0


def test_a_checkpoint_captions_a_users_own_files(whole, tmp_path, capsys):
  paths = (tmp_path / "mine.png", tmp_path / "other.jpg")
  for path, color in zip(paths, ("red", "blue"), strict=True):
    Image.new("RGB", (50, 70), color).save(path)
  config = Config(output_dir=whole[0], orders=("either",), predict=paths)
  assert script.run(config) == 0
  printed = capsys.readouterr().out
  assert all(path.name in printed for path in paths)
  with Image.open(whole[0] / "predictions.png") as picture:
    assert picture.width > 100
  other = tmp_path / "other"
  other.mkdir()
  (other / "config.json").write_text("{}")
  for wrong, message in (
    ({"predict": (tmp_path / "nowhere.png",)}, "there is no image"),
    ({"predict": (other / "config.json",)}, "must be an image"),
    ({"predict": (paths[0],), "beam_size": 1000}, "beam_size must be in [1, vocab_size"),
    ({"output_dir": tmp_path}, "predict needs a run in output_dir"),
    ({"output_dir": other}, "output_dir must have a run of captioning, got another one"),
    ({"first_seed": 7}, "but order-either_model-sequential_seed-0"),
  ):
    assert script.run(config.but(**wrong)) == 2
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
  sizes = SMALL | {"steps": 2, "methods": ("no_attention",), "beam_size": 2}
  files = {"json_file": tmp_path / "captions.json", "output_dir": tmp_path / "out"}
  config = Config(dataset="json", **files, **sizes)
  assert script.run(config.but(batch_size=17)) == 2
  assert "batch_size must be in [1, 16], the captions to train on" in capsys.readouterr().err
  assert script.run(config) == 0
  printed = capsys.readouterr().out
  assert "BLEU-4" in printed
  assert "SPICE was skipped" in printed
  [row] = results(tmp_path / "out")
  assert row["token_nll"] > 1
  words = Vocabulary.load(tmp_path / "out" / "vocabulary.json").words
  assert words[:4] == Vocabulary.SPECIAL
  # Four colours are twice in the training set, each in two captions; the others are in eight.
  assert set(words[4:8]) == {"a", "image", "all", "is"}
  assert set(words[8:]) == {"red", "green", "blue", "yellow"}
  assert script.run(config.but(resume=True)) == 0
  assert len(results(tmp_path / "out")) == 1  # The finished run was found.
  content["captions"][0] = ["a cat"]
  (tmp_path / "captions.json").write_text(json.dumps(content))
  assert script.run(config.but(resume=True)) == 2
  assert "captions must be those of the run to resume" in capsys.readouterr().err


@needs("coco_captions_open")
def test_photographs_are_captioned_from_end_to_end(tmp_path, monkeypatch):
  monkeypatch.setattr(caption_files, "NUM_LENGTHS", 1)
  sizes = SMALL | {"steps": 2, "methods": ("sequential",), "beam_size": 2}
  config = Config(dataset="coco_captions_open", output_dir=tmp_path, max_images=20, **sizes)
  assert script.run(config) == 0
  [row] = results(tmp_path)
  assert 1 <= row["distinct"] <= 20
  assert row["token_nll"] > 1
  for name in ("curves.png", "attention_sequential.png", "scores.png"):
    assert (tmp_path / name).exists()


def test_captioners_are_the_loss_of_reweighting_and_of_hyper_cleaning(
  drawn, tmp_path, monkeypatch, capsys
):
  """With the methods whose answers are known: IR-DRO prefers great losses, first order nothing."""
  sizes = TINY | {"num_train": 40, "num_val": 10, "steps": 2, "outer_steps": 2}
  config = Config(noise=True, methods=("ir_dro", "first_order"), output_dir=tmp_path, **sizes)
  caption_shapes.held_out.cache_clear()
  drawn.clear()
  monkeypatch.setattr(caption_noise, "NUM_NOISY", 256)
  monkeypatch.setattr(caption_noise, "NUM_TEST", 50)
  trained_with, reweight = [], jaxbo.reweight
  monkeypatch.setattr(jaxbo, "reweight", lambda w: trained_with.append(w) or reweight(w))
  assert script.run(config) == 0
  # IR-DRO where colours are flipped, and uniform weights before hyper-cleaning.
  weights = [w.weigh(np.array([0.0, 4.0]), w.init())[0][1] for w in trained_with[:2]]
  np.testing.assert_allclose(weights, [math.e / (1 + math.e), 0.5], rtol=1e-5)
  clean, flipped = ShapesCaptions(), ShapesCaptions(color_flips=0.2)
  swapped = ShapesCaptions(swaps=0.3)
  assert drawn == {
    *((flipped, 8, "train"), (flipped, 256, "train"), (clean, 50, "test")),
    *((swapped, 8, "train"), (swapped, 40, "train"), (clean, 10, "train")),
  }
  printed = capsys.readouterr().out
  assert "IR-DRO" in printed
  assert "first order" in printed
  reweighted, cleaned = results(tmp_path / "noise")
  assert cleaned["auc"] == 0.5
  assert cleaned["outer_loss"] > 1
  assert reweighted["auc"] + reweighted["loss_auc"] == pytest.approx(1, abs=0.1)
  assert reweighted["wrong_weight"] == pytest.approx(1, abs=0.1)


def test_a_batch_that_does_not_divide_is_refused(tmp_path, capsys):
  for noise in (False, True):
    config = Config(output_dir=tmp_path, noise=noise, **SMALL | {"batch_size": 4})
    assert script.run(config) == 2
    message = "batch_size must be a multiple of the number of devices, 8, got 4"
    assert message in capsys.readouterr().err


def test_a_loss_below_the_optimum_is_remarked():
  rows = [{"nll": nll, "entropy": 0.7, "standard_error": 0.01} for nll in (0.68, 0.66)]
  results = script.Results(Config(), [], rows, {})
  [remark] = script.Captioning().remarks(results)
  assert "Below the optimum" in remark
  assert "0.66" in remark


@pytest.mark.parametrize(
  "wrong, message",
  [
    ({"dataset": "json"}, "json_file must be given for the dataset json"),
    ({"dataset": "nlvr_captions", "noise": True}, "ablation and noise are for the dataset shapes"),
    ({"noise": True, "methods": ("sequential",)}, "methods with noise should be among uniform"),
    ({"predict": (Path("a.png"),), "distributed": True}, "predict is for one process"),
    ({"methods": ("uniform",)}, "methods without noise should be among sequential"),
  ],
)
def test_what_does_not_go_together_is_refused(wrong, message):
  with pytest.raises(ValueError, match=message):
    Config(**wrong)


def test_captioners_for_either_order_have_steps_of_their_own():
  given = Config(steps=2000, canonical_steps=0)
  assert given.settings("canonical") == Config().settings("canonical")
  assert given.settings("either") != Config().settings("either")
  assert list(Config(ablation=True).all_seeds()) == [0, 1, 2]
  assert Config(ablation=True).all_orders() == ("either",)


def test_what_defaults_stand_for_is_in_the_identity():
  """The data set's; the number of steps may grow, so it is not in it."""
  identity = Config().identity()
  assert identity["either.learning_rate"] == identity["canonical.learning_rate"] == 4e-3
  assert identity["cleaning.damping"] == 10
  assert "either.steps" not in identity
  assert Config(learning_rate=0.5).identity()["either.learning_rate"] == 0.5
