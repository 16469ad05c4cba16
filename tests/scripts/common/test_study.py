"""The mechanism of all experiments, on the smallest one: what runs, resumes, and is refused."""

import contextlib
import functools
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from scripts.common import folder, pages, study
from scripts.common.checkpoints import Checkpoints
from scripts.common.folder import RunFolder
from scripts.common.study import Run
from scripts.common.task import Cell
from tests.scripts.common.stopped import environment, programs_kept
from tests.scripts.common.toy_study import METHODS, Config, Sum, Toy

ROOT = Path(__file__).parents[3]
SHARED = Run.shared


@pytest.fixture(scope="module", autouse=True)
def _programs():
  with programs_kept():
    yield


def play(path, **options):
  return study.run(Toy(), Config(output_dir=path, **options))


def files_of(path):
  """Rows and lines, without times."""
  lines, rows, _ = folder.read(path)
  for entry in [*lines, *rows]:
    del entry["seconds"]
  return rows, lines


def numbers(method, seed, scale=1.0):
  key = jax.random.key(seed)
  draws = [jax.random.normal(jax.random.fold_in(key, t)) for t in range(7)]
  return np.float32(METHODS[method] * scale) * np.array(draws, np.float32)


def test_a_run_has_a_line_for_each_evaluation_and_a_row_for_each_cell(tmp_path, capsys):
  assert play(tmp_path, scale=3.0) == 0
  rows, lines = files_of(tmp_path)
  assert [(row["method"], row["seed"]) for row in rows] == [
    ("start", -1), ("plain", 0), ("double", 0), ("plain", 1), ("double", 1)
  ]  # fmt: skip
  assert [line["step"] for line in lines] == 4 * [2, 4, 6, 7]
  for row in rows[1:]:
    mine = [line for line in lines if all(line[name] == row[name] for name in ("method", "seed"))]
    drawn = numbers(row["method"], row["seed"], 3.0)
    np.testing.assert_allclose(row["sum"], drawn.sum(), rtol=1e-4)
    sums = [line["sum"] for line in mine]
    np.testing.assert_allclose(sums, drawn.cumsum()[[1, 3, 5, 6]], rtol=1e-4)
    np.testing.assert_allclose([line["last"] for line in mine], drawn[[1, 3, 5, 6]], rtol=1e-5)
    assert row["evaluations"] == 4
  printed = capsys.readouterr().out
  sums = [row["sum"] for row in rows if row["method"] == "double"]
  assert f"{np.mean(sums):.2f} ± {np.std(sums, ddof=1):.2f}" in printed
  assert (tmp_path / "picture.txt").read_text().count("\n") == 5


def test_cells_of_one_program_are_compiled_once(tmp_path, monkeypatch):
  compiled = []
  lower = jax.stages.Lowered.compile
  monkeypatch.setattr(Run, "shared", SHARED)
  monkeypatch.setattr(jax.stages.Lowered, "compile", lambda *a: compiled.append(0) or lower(*a))
  assert play(tmp_path, seeds=3) == 0
  assert len(compiled) == 3  # The start and two methods.


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """The files of a run that nothing interrupted."""
  path = tmp_path_factory.mktemp("whole")
  assert play(path) == 0
  return files_of(path)


@pytest.fixture(scope="module")
def of_one_seed(tmp_path_factory):
  """The same of one seed."""
  path = tmp_path_factory.mktemp("of_one_seed")
  assert play(path, seeds=1) == 0
  return files_of(path)


WRITES = [
  (RunFolder, "add_lines", (2, 6)), (Checkpoints, "save", (2, 6)), (RunFolder, "add_rows", (2, 3))
]  # fmt: skip


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("place, name, numbers", WRITES)
def test_a_run_that_was_stopped_at_any_write_goes_on_to_the_same_files(
  tmp_path, monkeypatch, of_one_seed, place, name, numbers, after
):
  write = getattr(place, name)
  for number in numbers:
    path, calls = tmp_path / str(number), itertools.count(1)

    def stopped(self, *arguments, calls=calls, number=number):
      now = next(calls) == number
      if now and not after:
        raise KeyboardInterrupt
      write(self, *arguments)
      if now:
        raise KeyboardInterrupt

    monkeypatch.setattr(place, name, stopped)
    assert play(path, seeds=1) == 130
    monkeypatch.setattr(place, name, write)
    assert play(path, seeds=1, resume=True) == 0
    assert files_of(path) == of_one_seed


SETTINGS = {"steps": 300, "checkpoint_every": 25, "seeds": 1}


def start(path):
  """Starts the program, and holds it when it has written some lines."""
  flags = [*Config(**SETTINGS).flags().split(), "--output-dir", str(path)]
  command = [sys.executable, "-m", "tests.scripts.common.toy_study", *flags]
  process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=-3, stderr=-3)
  log = path / "metrics.jsonl"
  for _ in range(600):
    if log.exists() and log.read_text().count("\n") >= 20:
      process.send_signal(signal.SIGSTOP)  # However long others look at its folder.
      return process
    time.sleep(0.05)
  raise AssertionError("no lines within 30 s")


@pytest.mark.slow
def test_a_killed_program_goes_on_bit_for_bit_and_an_interrupted_one_says_130(tmp_path, capsys):
  assert play(tmp_path / "whole", **SETTINGS) == 0
  for number, status in ((signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)):
    name = str(status)
    process = start(tmp_path / name)
    assert play(tmp_path / name, resume=True) == 2
    assert f"is in use by process {process.pid}" in capsys.readouterr().err
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    assert process.wait(60) == status
    assert play(tmp_path / name, resume=True, **SETTINGS) == 0
    assert files_of(tmp_path / name) == files_of(tmp_path / "whole")


@pytest.mark.parametrize(
  "options, message",
  [
    ({}, "has an earlier run: continue it with --resume, delete it with --overwrite"),
    ({"resume": True, "steps": 6}, "steps must be at least 7 to resume, got 6"),
    ({"resume": True, "scale": 2.0}, "scale must be 1.0 to resume, got 2.0"),
  ],
)
def test_a_folder_of_another_run_is_refused_and_left_as_it_is(tmp_path, capsys, options, message):
  assert play(tmp_path, seeds=1, methods=("plain",)) == 0
  files = lambda: [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock"]
  before = {path: path.read_bytes() for path in files()}
  assert play(tmp_path, **options) == 2
  assert message in capsys.readouterr().err
  assert {path: path.read_bytes() for path in files()} == before


def test_what_the_numbers_depend_on_beside_the_flags_must_be_as_it_was(
  tmp_path, capsys, monkeypatch
):
  monkeypatch.setattr(Toy, "depends_on", lambda self, config: {"rates": {"plain": 0.1}})
  assert play(tmp_path, seeds=1) == 0
  assert play(tmp_path, resume=True) == 0
  monkeypatch.setattr(Toy, "depends_on", lambda self, config: {"rates": {"plain": 0.2}})
  assert play(tmp_path, resume=True, seeds=3) == 2
  assert "rates must be {'plain': 0.1} to resume, got {'plain': 0.2}" in capsys.readouterr().err


def test_without_its_checkpoints_a_finished_run_has_tables_and_no_pictures(tmp_path, capsys):
  assert play(tmp_path) == 0
  shutil.rmtree(tmp_path / "checkpoints")
  assert play(tmp_path, resume=True) == 0
  printed = " ".join(capsys.readouterr().out.split())
  assert printed.count("Sums") == 2
  assert "Left out, since" in printed
  assert "has no checkpoint" in printed


def test_resume_may_add_methods_and_seeds_and_overwrite_begins_anew(tmp_path, whole, capsys):
  assert play(tmp_path, resume=True) == 2
  assert "resume needs an earlier run in output_dir" in capsys.readouterr().err
  assert play(tmp_path, seeds=1, methods=("double",)) == 0
  assert play(tmp_path, resume=True) == 0
  order = lambda row: (row["method"], row["seed"])
  assert sorted(files_of(tmp_path)[0], key=order) == sorted(whole[0], key=order)
  assert play(tmp_path, overwrite=True, scale=2.0) == 0
  assert len(files_of(tmp_path)[0]) == 5
  assert json.loads((tmp_path / "config.json").read_text())["identity"]["scale"] == 2.0


@pytest.mark.parametrize("is_file", [True, False])
def test_an_output_dir_that_cannot_be_written_to_is_refused(tmp_path, capsys, is_file):
  path = tmp_path / "file"
  path.touch()
  path = path if is_file else path / "x"
  assert play(path) == 2
  assert f"output_dir must be a folder to write to, got {path} (" in capsys.readouterr().err


def test_config_json_says_what_ran_where_and_every_run_of_the_folder(tmp_path):
  play(tmp_path, seeds=1, scale=0.5)
  play(tmp_path, seeds=2, scale=0.5, resume=True)
  saved = json.loads((tmp_path / "config.json").read_text())
  assert saved["identity"] == {"steps": 7, "scale": 0.5, "numbers": None}
  assert saved["study"] == "Toy"
  first, second = saved["runs"]
  assert first["command"] == "python -m scripts.common --seeds 1 --scale 0.5"
  assert second["command"] == "python -m scripts.common --scale 0.5"
  assert (first["jax"], first["device"]) == (jax.__version__, jax.devices()[0].device_kind)
  assert len(first["commit"]) == 40
  assert isinstance(first["clean"], bool)


def test_smoke_cuts_what_was_not_given(tmp_path):
  assert play(tmp_path, smoke=True, seeds=3) == 0
  rows, lines = files_of(tmp_path)
  assert len(rows) == 1 + 3 * 2
  assert {line["step"] for line in lines} == {2}


def test_kept_results_are_read_back_and_hold_nothing_of_this_machine_or_of_other_seeds(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(Toy, "room", lambda self: tmp_path / "room")
  told = {"scale": 2.0, "first_seed": 3, "numbers": tmp_path / "numbers.txt"}
  assert play(tmp_path / "run", **told, seeds=3) == 0
  assert play(tmp_path / "run", **told, resume=True, save_results="digits") == 0
  kept = pages.load(Toy(), "digits")
  expected = Config(scale=2.0, numbers=Path("numbers.txt"))
  assert kept.config.identity() == expected.identity()
  assert list(kept.config.all_seeds()) == [3, 4]
  rows = pd.DataFrame(folder.read(tmp_path / "run")[1])
  assert kept.rows.equals(rows[rows["seed"] < 5].reset_index(drop=True))
  assert set(kept.lines["seed"]) == {3, 4}
  assert not any(str(tmp_path) in path.read_text() for path in (tmp_path / "room").rglob("*.*"))


def test_kept_results_are_whole_where_a_path_is_a_dot(tmp_path, monkeypatch):
  monkeypatch.setattr(Toy, "room", lambda self: tmp_path / "room")
  assert play(tmp_path / "run", scale=0.5, numbers=Path(), save_results="digits", steps=1) == 0
  assert pages.load(Toy(), "digits").config.scale == 0.5


def test_what_is_measured_once_is_kept_for_resumed_runs(tmp_path):
  config, calls = Config(output_dir=tmp_path), []
  for resume in (False, True):
    files = RunFolder(config.but(resume=resume), "Toy", "toy")
    run = Run(Toy(), config, None, files)
    assert run.note("cost", lambda: calls.append(0) or {"plain": 0.1, "n": (1, 2)}) == {
      "plain": 0.1,
      "n": [1, 2],
    }
    files.close()
  assert len(calls) == 1


def test_numbers_that_are_not_finite_are_null_in_lines_and_stay_in_rows(tmp_path, monkeypatch):
  monkeypatch.setattr(Sum, "evaluate", lambda self, state, told: {"sum": float("nan")})
  monkeypatch.setattr(Sum, "result", lambda self, state, spent: {"sum": float("inf"), "seconds": 0})
  assert play(tmp_path, seeds=1) == 0
  rows, lines = files_of(tmp_path)
  assert (tmp_path / "metrics.jsonl").read_text().count('"sum": null') == len(lines) == 8
  assert all(np.isnan(line["sum"]) for line in lines)
  assert all(np.isinf(row["sum"]) for row in rows)


def test_lines_are_the_same_before_and_after_they_were_read(tmp_path):
  config = Config(output_dir=tmp_path)
  files = RunFolder(config, "Toy", "toy")
  files.add_lines([{"step": 1, "a": float("inf"), "b": -0.5, "c": "x"}])
  files.close()
  read = RunFolder(config.but(resume=True), "Toy", "toy")
  read.close()
  assert read.lines == files.lines == [{"step": 1, "a": math.nan, "b": -0.5, "c": "x"}]


def test_half_a_line_that_a_kill_has_left_is_gone_before_others_follow(tmp_path, whole):
  assert play(tmp_path, seeds=1) == 0
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"method": "plain", "se')
  assert play(tmp_path, resume=True) == 0
  assert files_of(tmp_path) == whole


def test_seconds_are_of_steps_alone(tmp_path, monkeypatch):
  clock = itertools.count()  # Each look takes a second.
  monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
  assert play(tmp_path, seeds=1, methods=("plain",), checkpoint_every=100) == 0
  rows = pd.read_csv(tmp_path / "results.csv")
  assert rows["seconds"].tolist() == [0.0, 4.0]  # Four stretches, two looks each.


def test_a_state_may_be_donated_although_others_begin_there(tmp_path):
  class Shared(Toy):
    def cells(self, run):
      first = Cell({"method": "plain", "seed": 0}, lambda: Sum(run, "plain", 0), 3, "a")
      yield first
      for seed in (1, 2):
        make = lambda start, seed=seed: Sum(run, "plain", seed, start)
        yield Cell({"method": "plain", "seed": seed}, make, 2, "b", needs=(first,))

  assert study.run(Shared(), Config(output_dir=tmp_path)) == 0
  rows, _ = files_of(tmp_path)
  begun = numbers("plain", 0)[:3].sum()
  expected = [begun, *(begun + numbers("plain", seed)[:2].sum() for seed in (1, 2))]
  np.testing.assert_allclose([row["sum"] for row in rows], expected, rtol=1e-4)


def test_a_ctrl_c_that_python_dropped_is_seen_at_the_next_step(tmp_path, monkeypatch):
  ended, steps, step = [], [], Sum.step

  def asked(self, state, t):
    steps.append(t)
    if len(steps) == 3:
      with contextlib.suppress(KeyboardInterrupt):  # As where it meets a callback.
        signal.raise_signal(signal.SIGINT)
    return step(self, state, t)

  monkeypatch.setattr(Sum, "step", asked)
  monkeypatch.setattr(os, "_exit", lambda status: ended.append(status))
  monkeypatch.setattr(sys, "argv", ["toy", "--output-dir", str(tmp_path), "--seeds", "1"])
  before = signal.getsignal(signal.SIGINT)
  try:
    with pytest.raises(SystemExit):
      study.main(Config, functools.partial(study.run, Toy()), None)
  finally:
    signal.signal(signal.SIGINT, before)
  assert ended == [130]
  assert len(steps) == 3
  assert play(tmp_path, seeds=1, resume=True) == 0


def test_ctrl_c_while_tables_are_made_ends_the_program_with_130(tmp_path, monkeypatch):
  def interrupted(self, results):
    raise KeyboardInterrupt

  ended = []
  monkeypatch.setattr(Toy, "tables", interrupted)
  monkeypatch.setattr(os, "_exit", lambda status: ended.append(status))
  monkeypatch.setattr(sys, "argv", ["toy", "--output-dir", str(tmp_path), "--seeds", "1"])
  with pytest.raises(SystemExit):
    study.main(Config, functools.partial(study.run, Toy()), None)
  assert ended == [130]


def test_ctrl_c_before_anything_ran_is_130(tmp_path, monkeypatch, capsys):
  def interrupted(self, config):
    raise KeyboardInterrupt

  monkeypatch.setattr(Toy, "prepare", interrupted)
  assert play(tmp_path) == 130
  assert capsys.readouterr().err == "Interrupted.\n"
  assert not os.listdir(tmp_path)


def test_checkpoints_come_back_as_they_were(tmp_path):
  state = {"a": jnp.arange(3, dtype=jnp.int8), "b": (jnp.float32(0.1), jnp.zeros((2, 1)))}
  state |= {"key": jax.random.key(0), "step": 3, "rows": [np.arange(2)], "none": None}
  state |= {"bfloat16": jnp.ones((2, 2), jnp.bfloat16)}
  checkpoints = Checkpoints(tmp_path)
  assert checkpoints.restore(state) is None
  for number in (4, 8, 12):
    checkpoints.save(number, state | {"step": number}, 0.5 * number, 12, 3)
  saved = Checkpoints(tmp_path).restore(state | {"key": jax.random.key(1)})
  assert saved.header == ({}, 12, 12, 3, 6.0, 0)
  assert jax.tree.structure(saved.state) == jax.tree.structure(state)
  assert saved.state["step"] == 12
  for a, b in zip(jax.tree.leaves(saved.state), jax.tree.leaves(state | {"step": 12}), strict=True):
    assert type(a) is type(b)
    assert jnp.asarray(a == b).all()
    if isinstance(a, jax.Array):
      assert (a.dtype, a.sharding) == (b.dtype, b.sharding)
  raw = checkpoints.raw()
  np.testing.assert_array_equal(raw["b"][1], np.zeros((2, 1)))
  np.testing.assert_array_equal(raw["rows"][0], [0, 1])
  assert sorted(path.name for path in tmp_path.iterdir()) == ["12.ckpt", "8.ckpt"]
