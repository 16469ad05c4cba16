"""The main job from end to end, small: rows, table, picture, and its bars at full size."""

import contextlib
import dataclasses
import io
import itertools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from scripts.common import cleaning, data, folder, plots, study
from scripts.common.data import Examples
from scripts.common.study import Results
from scripts.hyper_cleaning import selection
from scripts.hyper_cleaning.__main__ import LABELS, Config, HyperCleaning
from scripts.hyper_cleaning.plots import draw
from tests.scripts.common.stopped import programs_kept, stopped_after

ROOT = Path(__file__).parents[3]
METHODS = ("clean_only", "small_loss_clean", "itd", "oracle")


def config(path, **more):
  given = {"methods": METHODS, "seeds": 2, "outer_steps": 6, "num_clean": (20, 60)}
  return Config(output_dir=path, **given | more)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
  """The folder of a small run, its programs, and what it has printed."""
  path, programs = tmp_path_factory.mktemp("small"), {}
  with programs_kept(programs), contextlib.redirect_stdout(io.StringIO()) as output:
    assert study.run(HyperCleaning(), config(path)) == 0
  return path, programs, output.getvalue()


@pytest.mark.slow
def test_rows_tell_what_was_kept_and_what_came_of_it(small):
  path, _, output = small
  lines, rows, _ = folder.read(path)
  assert [line["call"] for line in lines] == 4 * [6]  # Of ITD alone, at the end.
  keys = ("noise", "clean", "seed", "method")
  assert [tuple(row[name] for name in keys) for row in rows] == [
    ("systematic", clean, seed, method)
    for clean in (20, 60)
    for seed in (0, 1)
    for method in METHODS
  ]
  of = {(row["clean"], row["seed"], row["method"]): row for row in rows}
  for clean, seed in itertools.product((20, 60), (0, 1)):
    only, choice, itd, oracle = (of[clean, seed, method] for method in METHODS)
    assert only["test_accuracy"] < choice["test_accuracy"] < oracle["test_accuracy"]
    assert oracle["test_accuracy"] > 0.9
    assert oracle["auc"] == oracle["f1"] == 1
    assert 0.5 < itd["auc"] < 1
    assert itd["outer_steps"] == 6
    assert itd["temporary_bytes"] > 0
  assert of[20, 0, "clean_only"]["test_accuracy"] < of[60, 0, "clean_only"]["test_accuracy"]
  for words in ("by clean examples", "by clean examples, in pairs", "who finds them"):
    assert words in " ".join(output.split())
  with Image.open(path / "hyper_cleaning.png") as picture:
    assert picture.width > 500


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit_also_with_more_clean_examples(
  small, tmp_path, monkeypatch
):
  monkeypatch.setattr(HyperCleaning, "draw", lambda *_: None)  # It takes seconds.
  path, programs, _ = small
  with programs_kept(programs):
    with stopped_after(2):
      study.run(HyperCleaning(), config(tmp_path, num_clean=(20,)))
    lines, rows, _ = folder.read(tmp_path)
    assert (len(lines), len(rows)) == (2, 6)
    assert study.run(HyperCleaning(), config(tmp_path, resume=True)) == 0
  whole, resumed = (folder.read(of_run)[:2] for of_run in (path, tmp_path))
  for entry in itertools.chain(*whole, *resumed):
    for name in ("seconds", "seconds_per_step", "compile_seconds"):
      entry.pop(name, None)
  assert str(resumed) == str(whole)


@pytest.mark.slow
def test_scores_are_those_of_the_loop_written_out(small):
  settings = config(Path()).settings()
  split = cleaning.split(cleaning.read("digits"), settings, 0.5, 1, "systematic")
  labels = np.where(np.arange(500) < 20, split.val.labels, -1)
  val = Examples(split.val.images, labels)
  state, run = cleaning.make_program("itd", split._replace(val=val), settings, 1, 1)
  one_step = jax.jit(run)
  for i in range(6):
    key = jax.random.fold_in(jax.random.key(1), i)
    state, losses = one_step(state, key, split.train, val)
  given = {"clean": 20, "method": "itd", "seed": 1}
  [row] = [r for r in folder.read(small[0])[1] if given.items() <= r.items()]
  [line] = [r for r in folder.read(small[0])[0] if given.items() <= r.items()]
  accuracy = float(cleaning.accuracy(settings, state.solution.params, split.test))
  assert line["accuracy"] == pytest.approx(accuracy, abs=0.005)
  assert line["outer_loss"] == pytest.approx(float(losses[-1]), rel=1e-4)
  weights = np.asarray(jax.nn.sigmoid(state.x))
  scores = cleaning.detection_scores(weights, split.corrupted)
  assert (row["auc"], row["f1"]) == pytest.approx(scores, abs=1e-3)
  kept = np.concatenate([weights >= 0.5, labels >= 0])
  pool = Examples(*map(np.concatenate, zip(split.train, val, strict=True))).take(kept)
  everything = jnp.ones(kept.sum())
  y = cleaning.init_params(settings, 64, jax.random.key(0))
  y = jax.jit(lambda y: selection.retrain(settings, y, pool, everything, jax.random.key(0)))(y)
  assert row["test_accuracy"] == pytest.approx(
    float(cleaning.accuracy(settings, y, split.test)), abs=0.005
  )


def test_tables_have_a_column_for_each_number_of_clean_examples():
  row = lambda method, clean, accuracy: {
    "noise": "uniform", "clean": clean, "method": method, "seed": 0, "test_accuracy": accuracy,
    "auc": 0.75, "f1": 0.5, "seconds_per_step": 1e-3, "temporary_bytes": 2.0**20,
  }  # fmt: skip
  rows = [row("small_loss_clean", 20, 0.5), row("small_loss_clean", 100, 0.75)]
  rows += [row("itd", 20, 0.625), row("itd", 100, 0.5)]
  accuracy, minus, found = HyperCleaning().tables(Results(Config(), [], rows, {}))
  assert "as any other class" in accuracy.title
  assert accuracy.columns == ["method", "seeds", "20", "100"]
  assert accuracy.rows[1] == ["ITD", "1", "0.625", "0.500"]
  assert minus.rows == [["ITD", "1", "0.125", "-0.250"]]
  assert "with 20 clean examples" in found.title
  assert found.rows[1] == ["ITD", "1", "0.750", "0.500", "1.0", "1.0"]


def test_the_picture_has_a_curve_for_each_method_and_tells_clean_from_wrong(tmp_path, monkeypatch):
  figures = []
  monkeypatch.setattr(plots, "save", lambda fig, path, **_: figures.append(fig))
  found = [
    (noise, clean, method, seed, 0.5 + clean / 1000 + seed / 100)
    for noise in ("systematic", "uniform")
    for clean in (20, 100)
    for method in ("oracle", "itd", "soba")
    for seed in (0, 2)
  ]
  columns = ["noise", "clean", "method", "seed", "test_accuracy"]
  weights = [(np.array([0.1, 0.9]), np.array([True, False])) for _ in range(3)]
  draw(pd.DataFrame(found, columns=columns), {"itd": weights}, LABELS, 20, tmp_path / "x.png")
  systematic, uniform, histogram = figures[0].axes
  assert [axes.get_title("left") for axes in (systematic, uniform)] == [
    "systematic noise",
    "uniform noise",
  ]
  curves = {bar.get_label(): bar[0].get_xydata() for bar in systematic.containers}
  assert [*curves] == ["oracle", "ITD"]  # SOBA is in the table.
  np.testing.assert_allclose(curves["ITD"], [[20, 0.53], [100, 0.61]])
  counts = [[patch.get_height() for patch in group] for group in histogram.containers]
  assert [sum(heights) for heights in counts] == [3, 3]
  assert counts[1][4] == 3  # The wrong ones, at 0.1.


@pytest.mark.slow
def test_a_run_does_not_go_on_with_other_defaults(small, monkeypatch, capsys):
  """They are not given, so the command line is the same."""
  changed = dataclasses.replace(cleaning.DATASETS["digits"], ridge=1.0)
  monkeypatch.setitem(cleaning.DATASETS, "digits", changed)
  assert study.run(HyperCleaning(), config(small[0], resume=True)) == 2
  assert "settings.ridge must be 0.001 to resume, got 1.0" in capsys.readouterr().err


def test_a_model_that_diverged_has_no_accuracy():
  y = {"w": jnp.full((10, 2), jnp.nan), "b": jnp.zeros(10)}
  examples = Examples(jnp.ones((3, 2)), jnp.zeros(3, int))
  assert np.isnan(cleaning.accuracy(Config().settings(), y, examples))


def test_more_clean_examples_than_there_are_are_refused():
  with pytest.raises(ValueError, match="num_clean should be at most 500, got 501"):
    Config(num_clean=(20, 501))


def test_a_data_set_that_is_not_there_is_said_before_anything_is_written(tmp_path, capsys):
  nowhere = Config(dataset="mnist", data_dir=Path("/nowhere"), output_dir=tmp_path)
  assert study.run(HyperCleaning(), nowhere) == 2
  error = capsys.readouterr().err
  assert "Expected: mnist/<version>/ with" in error
  assert "download_and_prepare()" in error
  assert not list(tmp_path.iterdir())


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
def test_a_run_on_digits_meets_its_bars_on_seed_0(tmp_path):
  """In a process of its own, with optimized code."""
  methods = ["clean_only", "itd", "aid", "esj"]
  command = [sys.executable, "-m", "scripts.hyper_cleaning", "--seeds", "1", "--methods", *methods]
  as_users = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  command += ["--num-clean", "100", "--num-samples", "16", "--output-dir", str(tmp_path)]
  subprocess.run(command, check=True, cwd=ROOT, env=as_users)
  rows = {row["method"]: row for row in folder.read(tmp_path)[1]}
  assert list(rows) == methods
  for method, bar in {"itd": 0.95, "aid": 0.85, "esj": 0.75}.items():
    assert rows[method]["auc"] >= bar
  assert rows["itd"]["test_accuracy"] > rows["clean_only"]["test_accuracy"] + 0.01
