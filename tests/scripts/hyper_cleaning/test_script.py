"""The main job from end to end, small: files, table, errors, interruption."""

import csv
import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from scripts.common import cleaning, data, plots, report
from scripts.hyper_cleaning import __main__ as hyper_cleaning
from scripts.hyper_cleaning import report as cleaning_report
from scripts.hyper_cleaning import run as cleaning_run
from scripts.hyper_cleaning.__main__ import Config
from scripts.hyper_cleaning.report import Result
from scripts.hyper_cleaning.run import Run

pytestmark = pytest.mark.slow  # All together, not each.

NAN = float("nan")


def config(path, **kwargs):
  small = {"methods": ("everything", "oracle", "itd"), "seeds": 2, "outer_steps": 6}
  return Config(output_dir=path, **(small | kwargs))


def rows_of(path):
  with (path / "results.csv").open() as file:
    return list(csv.DictReader(file))


def test_a_run_prints_the_table_and_writes_its_files(tmp_path, capsys):
  assert hyper_cleaning.main(config(tmp_path)) == 0
  table = " ".join(capsys.readouterr().out.split())  # The title's lines are as long as the rows.
  for word in ("everything", "clean subset (oracle)", "ITD", "50% of labels", "seeds"):
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
    assert row["outer_steps"] == "6"
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


def interrupt_at(monkeypatch, evaluation):
  """Ctrl-C while evaluation number ``evaluation`` is logged."""
  write, calls = report.MetricsLog.write, itertools.count(1)

  def interrupted_write(self, **values):
    write(self, **values)
    if next(calls) == evaluation:
      raise KeyboardInterrupt

  monkeypatch.setattr(report.MetricsLog, "write", interrupted_write)


def test_an_interruption_keeps_the_unfinished_run_out_of_the_means_only(
  tmp_path, capsys, monkeypatch
):
  drawn, plot = {}, Axes.plot

  def recorded_plot(self, x, y, *, label, **kwargs):
    drawn[label] = list(y)
    return plot(self, x, y, label=label, **kwargs)

  monkeypatch.setattr(Axes, "plot", recorded_plot)
  interrupt_at(monkeypatch, 4 * 6 + 2)  # everything, oracle, itd; everything, two of oracle
  assert hyper_cleaning.main(config(tmp_path)) == 130
  output = capsys.readouterr().out
  assert "Interrupted" in output
  rows = rows_of(tmp_path)
  assert [(row["method"], row["seed"], row["outer_steps"]) for row in rows] == [
    ("everything", "0", "6"),
    ("oracle", "0", "6"),
    ("itd", "0", "6"),
    ("everything", "1", "6"),
    ("oracle", "1", "2"),
  ]
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert len(lines) == 4 * 6 + 2
  assert float(rows[-1]["test_accuracy"]) == lines[-1]["accuracy"]
  table = {cells[0]: cells for line in output.splitlines() if len(cells := cells_of(line)) == 8}
  assert [table[name][1] for name in ("everything", "clean subset (oracle)", "ITD")] == list("211")
  assert table["clean subset (oracle)"][2] == f"{float(rows[1]['test_accuracy']):.3f}"
  assert "unfinished" not in output
  assert drawn.keys() == {
    "everything", "clean subset (oracle)", "ITD", "clean subset (oracle), unfinished"
  }  # fmt: skip
  assert drawn["clean subset (oracle), unfinished"] == [line["accuracy"] for line in lines[-2:]]
  assert (tmp_path / "hyper_cleaning.png").exists()


def cells_of(line):
  return [cell.strip() for cell in line.split("│")[1:-1]]


def test_a_method_with_an_unfinished_run_alone_is_marked(tmp_path, capsys, monkeypatch):
  interrupt_at(monkeypatch, 4)
  assert hyper_cleaning.main(config(tmp_path, methods=("itd", "oracle"))) == 130
  [row] = rows_of(tmp_path)
  assert (row["method"], row["outer_steps"]) == ("itd", "4")
  assert 0 < float(row["auc"]) < 1  # of the weights at the last evaluation
  [cells] = [cells_of(line) for line in capsys.readouterr().out.splitlines() if "ITD" in line][-1:]
  assert cells[:2] == ["ITD, unfinished (4 of 6 steps)", "0"]
  assert (tmp_path / "hyper_cleaning.png").exists()


def interrupted(*args, **kwargs):
  raise KeyboardInterrupt


@pytest.mark.parametrize(
  "module, stage, left",
  [(cleaning_run, "compile_program", []), (cleaning_report, "draw", ["results.csv"])],
)
def test_an_interruption_leaves_no_files_of_an_earlier_run(
  tmp_path, monkeypatch, module, stage, left
):
  for name in ("results.csv", "hyper_cleaning.png", "metrics.jsonl"):
    (tmp_path / name).write_text("an earlier run")
  monkeypatch.setattr(module, stage, interrupted)
  assert hyper_cleaning.main(config(tmp_path, methods=("everything",), seeds=1)) == 130
  assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", *left]
  assert not any("earlier" in path.read_text() for path in tmp_path.iterdir())


def test_accuracy_is_of_the_test_set_and_weights_are_the_last():
  settings = dataclasses.replace(
    cleaning.DATASETS["digits"], num_train=60, num_val=40, inner_steps=3
  )
  split = cleaning.split(*cleaning.read("digits"), settings, 0.5, seed=1)
  program = cleaning.make_program("itd", split, settings, 1, 2)
  executable = cleaning_run.compile_program(program, split.val)
  accuracy = lambda y, examples: cleaning.accuracy(settings, y, examples)
  runs = list(cleaning_run.fit(program, executable, split, 3, 1, accuracy))

  program = cleaning.make_program("itd", split, settings, 1, 2)
  state, run_steps = program.state, jax.jit(program.run)
  for i, run in enumerate(runs):
    state, losses = run_steps(
      state, jax.random.fold_in(jax.random.key(1), i), program.train, split.val
    )
    of_test, of_val = (accuracy(state.solution.params, part) for part in (split.test, split.val))
    assert len(run.accuracy) == len(run.seconds) == i + 1
    assert run.outer_steps == 2 * (i + 1)
    assert run.accuracy[-1] == pytest.approx(float(of_test)) != pytest.approx(float(of_val))
    assert run.outer_loss[-1] == pytest.approx(float(losses[-1]), rel=1e-5)
    np.testing.assert_allclose(run.weights, jax.nn.sigmoid(state.x), rtol=1e-4)


def make_run(outer_steps, accuracy, weights):
  executable = cleaning_run.Executable(cast(Any, None), 0.0)
  seconds = [1.0 + i for i in range(len(accuracy))]
  corrupted = np.array([True, False, False])
  return Run(executable, outer_steps, seconds, accuracy, accuracy, np.array(weights), corrupted)


def test_the_picture_has_a_curve_for_each_method_and_tells_clean_from_wrong(tmp_path, monkeypatch):
  axes, histograms, save, hist = [], [], plots.save, Axes.hist

  def recorded_save(fig, path):
    axes.extend(sorted(fig.axes, key=lambda axes: "seconds" not in axes.get_xlabel()))
    save(fig, path)

  def recorded_hist(self, x, bins, *, label, **kwargs):
    histograms.append((label, x.tolist()))
    return hist(self, x, bins, label=label, **kwargs)

  monkeypatch.setattr(plots, "save", recorded_save)
  monkeypatch.setattr(Axes, "hist", recorded_hist)
  runs = {
    ("oracle", 0): make_run(2, [0.8, 0.9], [0.0, 1.0, 1.0]),
    ("first_order", 0): make_run(2, [0.5, 0.6], [0.5, 0.5, 0.5]),
    ("itd", 0): make_run(2, [0.6, 0.8], [0.1, 0.9, 0.8]),
    ("itd", 1): make_run(2, [0.8, 0.8], [0.2, 0.6, 0.7]),
    ("itd", 2): make_run(1, [0.3], [0.3, 0.4, 0.4]),
    ("esj", 0): make_run(1, [0.4], [0.4, 0.7, 0.6]),
  }
  cleaning_report.draw(runs, 2, tmp_path / "picture.png")
  lines = {line.get_label(): line for line in axes[0].get_lines()}
  curves = {label: line.get_xydata().tolist() for label, line in lines.items()}
  assert curves == {
    "clean subset (oracle)": [[1, 0.8], [2, 0.9]],
    "first order": [[1, 0.5], [2, 0.6]],
    "ITD": [[1, pytest.approx(0.7)], [2, 0.8]],
    "ITD, unfinished": [[1, 0.3]],
    "ESJ, unfinished": [[1, 0.4]],
  }
  styles = [line.get_linestyle() for line in lines.values()]
  assert styles == ["--", "--", ":", "-", ":"]
  assert len(axes[0].collections) == 1  # ITD's band
  assert histograms == [
    ("clean", [0.9, 0.8, 0.6, 0.7]),
    ("wrong label", [0.1, 0.2]),
    ("clean", [0.7, 0.6]),
    ("wrong label", [0.4]),
  ]
  assert [panel.get_title() for panel in axes[1:]] == ["ITD", "ESJ, unfinished"]


@pytest.mark.parametrize(
  "wrong, message",
  [
    ({"dataset": "cifar"}, "dataset must be one of digits, mnist, fashion_mnist; got 'cifar'"),
    ({"methods": ("itd", "magic")}, "methods must be among everything, validation, oracle, "),
    ({"methods": ()}, "methods must be among everything, validation, oracle, first_order, itd, "),
    ({"methods": ()}, "got none\n"),
    ({"methods": ("itd", "itd")}, "methods must name each method once, got itd itd"),
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


@pytest.mark.parametrize("is_file", [True, False])
def test_an_output_dir_that_cannot_be_written_to_is_refused(tmp_path, capsys, is_file):
  path = tmp_path / "file"
  path.touch()
  path = path if is_file else path / "x"
  assert hyper_cleaning.main(config(path)) == 2
  error = capsys.readouterr().err
  assert f"output_dir must be a folder to write to, got {path} (" in error


def test_the_gain_share_is_zero_for_everything_and_one_for_the_oracle():
  result = lambda method, seed, accuracy: Result(method, seed, 6, accuracy, NAN, NAN, 0.0, 0, 0.0)
  results = [result("everything", 0, 0.8), result("oracle", 0, 0.9), result("itd", 0, 0.875)]
  results += [result("everything", 1, 0.9), result("oracle", 1, 0.9), result("itd", 1, 0.9)]
  shares = [cleaning_report.gain_share(row, results) for row in results]
  assert shares[:3] == pytest.approx([0.0, 1.0, 0.75])
  assert np.isnan(shares[3:]).all()  # There is no gain to share.
  unfinished = [results[0], results[1]._replace(outer_steps=5), results[2]]
  rows = cleaning_report.table_rows(unfinished, outer_steps=6)
  assert [row[:4] for row in rows] == [
    ["everything", "1", "0.800", "-"],
    ["clean subset (oracle), unfinished (5 of 6 steps)", "0", "0.900", "-"],
    ["ITD", "1", "0.875", "-"],
  ]


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
  assert "tensorflow" not in sys.modules


@pytest.mark.slow
def test_the_default_run_on_digits_meets_its_bars_on_seed_0(tmp_path):
  """In a process of its own, since the tests switch the optimization of compiled code off."""
  methods = ["itd", "aid", "esj", "oracle"]
  command = [sys.executable, "-m", "scripts.hyper_cleaning", "--seeds", "1", "--methods", *methods]
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  root = Path(__file__).parents[2]
  subprocess.run(
    [*command, "--output-dir", str(tmp_path)], check=True, cwd=root, env=environment, timeout=300
  )
  rows = {row["method"]: row for row in rows_of(tmp_path)}
  assert list(rows) == methods
  for method, bar in {"itd": 0.95, "aid": 0.95, "esj": 0.90}.items():
    assert float(rows[method]["auc"]) >= bar
  accuracy = {method: float(row["test_accuracy"]) for method, row in rows.items()}
  # One point is the claim for the mean of five seeds.
  assert accuracy["itd"] > accuracy["oracle"] - 0.025
  assert accuracy["aid"] > accuracy["oracle"] - 0.025
