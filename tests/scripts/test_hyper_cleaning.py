"""The main job from end to end, small: files, table, errors, interruption."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts import hyper_cleaning
from scripts.common import data, report
from scripts.hyper_cleaning import Config, Result, Run

NAN = float("nan")


def config(path, **kwargs):
  small = {"methods": ("everything", "oracle", "itd"), "seeds": 2, "outer_steps": 6}
  return Config(output_dir=path, **(small | kwargs))


def rows_of(path):
  with (path / "results.csv").open() as file:
    return list(csv.DictReader(file))


def test_a_run_prints_the_table_and_writes_its_files(tmp_path, capsys):
  assert hyper_cleaning.main(config(tmp_path)) == 0
  table = capsys.readouterr().out
  for word in ("everything", "clean subset (oracle)", "ITD", "50% of labels", "2 seeds"):
    assert word in table

  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert len(lines) == 2 * 3 * 6
  for line in lines:
    assert line.keys() == {"method", "seed", "seconds", "outer_loss", "accuracy"}
  rows = rows_of(tmp_path)
  assert [(row["method"], row["seed"]) for row in rows] == [
    (method, seed) for seed in "01" for method in ("everything", "oracle", "itd")
  ]
  last = {(line["method"], str(line["seed"])): line for line in lines}
  for row in rows:
    assert float(row["test_accuracy"]) == last[row["method"], row["seed"]]["accuracy"] > 0.5
    assert (row["auc"] == "nan") == (row["method"] != "itd")
    assert int(row["temporary_bytes"]) > 0
  with Image.open(tmp_path / "hyper_cleaning.png") as picture:
    assert picture.width > 1000


def test_the_same_seed_gives_the_same_numbers(tmp_path):
  results = []
  for name in ("a", "b"):
    assert hyper_cleaning.main(config(tmp_path / name, seeds=1, methods=("esj",))) == 0
    results.append([(row["test_accuracy"], row["auc"]) for row in rows_of(tmp_path / name)])
  assert results[0] == results[1]


def test_an_interruption_keeps_what_was_finished(tmp_path, capsys, monkeypatch):
  fit, calls = hyper_cleaning.fit, []

  def interrupted_fit(*args):
    calls.append(args)
    if len(calls) == 4:
      raise KeyboardInterrupt
    return fit(*args)

  monkeypatch.setattr(hyper_cleaning, "fit", interrupted_fit)
  assert hyper_cleaning.main(config(tmp_path)) == 130
  assert "Interrupted" in capsys.readouterr().out
  assert len(rows_of(tmp_path)) == 3
  assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3 * 6
  assert (tmp_path / "hyper_cleaning.png").exists()


@pytest.mark.parametrize(
  "wrong, message",
  [
    ({"dataset": "cifar"}, "dataset must be one of digits, mnist, fashion_mnist; got 'cifar'"),
    ({"methods": ("itd", "magic")}, "methods must be among everything, validation, oracle, "),
    ({"methods": ()}, "methods must be among"),
    ({"corruption": 1.0}, "corruption must be in [0, 1), got 1.0"),
    ({"seeds": 0}, "seeds must be at least 1, got 0"),
    ({"first_seed": -1}, "first_seed must not be negative, got -1"),
    ({"outer_learning_rate": 0.0}, "outer_learning_rate must be positive, got 0.0"),
    ({"dataset": "mnist", "data_dir": Path("/nowhere")}, "Expected: mnist/<version>/ with"),
    ({"dataset": "mnist", "data_dir": Path("/nowhere")}, "download_and_prepare()"),
  ],
)
def test_bad_input_says_what_is_allowed_and_touches_no_file(tmp_path, capsys, wrong, message):
  assert hyper_cleaning.main(config(tmp_path, **wrong)) == 2
  assert message in capsys.readouterr().err
  assert not list(tmp_path.iterdir())


def test_detection_scores_are_dashes_where_they_mean_nothing():
  run = lambda weights, corrupted: Run([], [], np.array(weights), np.array(corrupted))
  scores = hyper_cleaning.detection_scores
  assert scores("itd", run([0.1, 0.2, 0.6, 0.9], [True, True, False, False])) == (1.0, 1.0)
  assert scores("itd", run([0.6, 0.2, 0.4, 0.9], [True, True, False, False])) == (0.75, 0.5)
  assert np.isnan(scores("oracle", run([0.0, 1.0], [True, False]))).all()
  assert np.isnan(scores("itd", run([0.1, 0.9], [False, False]))).all()
  assert np.isnan(scores("itd", run([NAN, 0.9], [True, False]))).all()


def test_the_gain_share_is_zero_for_everything_and_one_for_the_oracle():
  result = lambda method, seed, accuracy: Result(method, seed, accuracy, NAN, NAN, 0.0, 0, 0.0)
  results = [result("everything", 0, 0.8), result("oracle", 0, 0.9), result("itd", 0, 0.875)]
  results += [result("everything", 1, 0.9), result("oracle", 1, 0.9), result("itd", 1, 0.9)]
  shares = {m: hyper_cleaning.gain_shares(results, m) for m in ("everything", "oracle", "itd")}
  assert [shares[m][0] for m in shares] == pytest.approx([0.0, 1.0, 0.75])
  assert all(np.isnan(shares[m][1]) for m in shares)  # There is no gain to share.


def test_the_spread_is_the_sample_standard_deviation():
  assert report.mean_and_spread([1.0, 3.0]) == "2.000 ± 1.414"
  assert report.mean_and_spread([1.0, NAN], digits=1) == "1.0"
  assert report.mean_and_spread([NAN]) == "-"


def test_digits_are_scaled_to_the_unit_interval():
  images, labels = data.digits()
  assert images.shape == (1797, 64)
  assert (images.min(), images.max()) == (0.0, 1.0)
  assert (images.dtype, labels.dtype) == (np.float32, np.int32)
  assert set(labels.tolist()) == set(range(10))


@pytest.mark.skipif(
  not list(Path(os.environ.get("TFDS_DATA_DIR", "/nowhere")).glob("mnist/*")),
  reason="TFDS_DATA_DIR has no mnist",
)
def test_mnist_is_read_without_tensorflow():
  images, labels = data.tfds_images("mnist", "test[:50]")
  assert images.shape == (50, 784)
  assert (images.min(), images.max()) == (0.0, 1.0)
  assert len(set(labels.tolist())) > 5
  import sys

  assert "tensorflow" not in sys.modules
