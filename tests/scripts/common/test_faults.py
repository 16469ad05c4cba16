"""What happens to runs: kills at any write, disks, two writers, damage, signals, clocks."""

import errno
import itertools
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import pytest

from scripts.common import folder, signals, study
from scripts.common.checkpoints import Checkpoints
from scripts.common.config import FREE, GROWS, Count, StudyConfig
from scripts.common.folder import RunFolder
from scripts.common.study import Study
from scripts.common.table import Column, spread
from scripts.common.task import Cell, Task


class Config(StudyConfig):
  """Sums, in NumPy: nothing is compiled."""

  seeds: Count = 2
  """How many."""
  steps: Annotated[Count, GROWS] = 7
  """Steps."""
  factor: float = 1.0
  """Of the numbers."""
  every: Annotated[Count, FREE] = 2
  """Steps between evaluations."""
  checkpoint_every: Annotated[Count, FREE] = 3
  """Steps between checkpoints."""


class Sum(Task):
  """Adds up numbers; what it tells is of an array and of a number."""

  def __init__(self, config, seed):
    self.factor, self.seed, self.state = config.factor, seed, {"sum": np.zeros(20)}

  def step(self, state, t):
    number = self.factor * np.random.default_rng((self.seed, t)).normal(size=20)
    return {"sum": state["sum"] + number}, (number, float(t))

  def evaluate(self, state, told):
    numbers, steps = zip(*told, strict=True)
    return {"sum": state["sum"].sum(), "told": np.sum(numbers), "first": steps[0]}

  def result(self, state, spent):
    return {"sum": state["sum"].sum(), "evaluations": len(spent.lines)}


class Sums(Study[Config]):
  """The experiment."""

  config = Config
  program = "sums"

  def begin(self, run):
    run.note("noted", lambda: {"once": 1})

  def cells(self, run):
    config = run.config
    for seed in config.all_seeds():
      make = lambda seed=seed: Sum(config, seed)
      every = config.every, config.checkpoint_every
      yield Cell({"method": "sum", "seed": seed}, make, config.steps, f"seed {seed}", *every)

  def tables(self, results):
    yield spread("Sums", results.rows, "method", str, {"sum": Column("sum", 2)})

  def draw(self, run):
    for cell in run.finished():
      assert run.saved(cell)["sum"].shape == (20,)


def play(path, **options):
  return study.run(Sums(), Config(output_dir=path, **options))


def go_on(path, **options):
  """As users do: ``--resume`` where there is a run, else from the start."""
  return play(path, resume=(path / "config.json").exists(), **options)


def files_of(path):
  lines, rows, notes = folder.read(path)
  order = lambda line: (line["seed"], line["step"])
  return rows, sorted(({**line, "seconds": 0} for line in lines), key=order), notes


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """The files of a run that nothing disturbed."""
  path = tmp_path_factory.mktemp("whole")
  assert play(path) == 0
  return files_of(path)


def bytes_of(path):
  return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def checkpoint(path, number, seed=1):
  return path / "checkpoints" / f"method-sum_seed-{seed}" / f"{number}.ckpt"


class KilledError(BaseException):
  """Nothing more is written, as after ``kill -9``."""


@pytest.mark.parametrize("torn", [False, True])
def test_a_run_that_is_killed_at_any_write_goes_on_to_the_same_files(
  tmp_path, monkeypatch, whole, torn
):
  sync = os.fsync

  def killed(file):
    if next(calls) == number:
      if torn:
        os.ftruncate(file, max(0, os.fstat(file).st_size - 5))
      raise KilledError
    sync(file)

  for number in itertools.count():
    path, calls = tmp_path / str(number), itertools.count()
    monkeypatch.setattr(os, "fsync", killed)
    try:
      assert play(path) == 0
      break
    except KilledError:
      monkeypatch.setattr(os, "fsync", sync)
      assert go_on(path) == 0
      assert files_of(path) == whole
  assert number == 19  # Of the run, and eight of each seed.


def check_the_disk_is_said(captured, path):
  assert re.fullmatch(r"error: .* cannot be written \(.*\)\. What was .*\n", captured.err), captured
  assert str(path) in captured.err
  assert "Traceback" not in captured.out


def test_a_run_on_a_full_disk_says_so_and_goes_on_once_there_is_room(
  tmp_path, monkeypatch, whole, capsys
):
  sync = os.fsync

  def fill(file):  # What does not fit is not there.
    used = sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
    if used > room:
      os.ftruncate(file, max(0, os.fstat(file).st_size - used + room))
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    sync(file)

  statuses = []
  for room in itertools.count(200, 700):
    path = tmp_path / str(room)
    monkeypatch.setattr(os, "fsync", fill)
    status = play(path)
    if not status:
      break
    statuses.append(status)
    check_the_disk_is_said(capsys.readouterr(), path)
    rows = (path / "results.csv").read_text() if (path / "results.csv").exists() else ""
    again = go_on(path)  # There is no more room than before.
    assert again in (1, 2)
    check_the_disk_is_said(capsys.readouterr(), path)
    assert not rows or (path / "results.csv").read_text().startswith(rows)
    monkeypatch.setattr(os, "fsync", sync)
    assert go_on(path) == 0
    assert files_of(path) == whole
    capsys.readouterr()
  assert set(statuses) == {1, 2}


def test_a_read_only_folder_is_refused_and_left_as_it_is(tmp_path, monkeypatch, capsys):
  open_, status = Path.open, play(tmp_path, seeds=1)

  def read_only(self, mode="r", *arguments, **options):
    if set(mode) & set("wa+x") and tmp_path in self.parents:
      raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    return open_(self, mode, *arguments, **options)

  before = bytes_of(tmp_path)
  monkeypatch.setattr(Path, "open", read_only)
  for options in ({"resume": True}, {"overwrite": True}, {}):
    assert (status, play(tmp_path, **options)) == (0, 2)
    assert "output_dir must be a folder to write to" in capsys.readouterr().err
  assert bytes_of(tmp_path) == before


def test_a_folder_in_use_is_refused_from_the_first_moment_to_the_last(
  tmp_path, monkeypatch, whole, capsys
):
  step, tried = Sum.step, []

  def another(self, state, t):
    if self.seed == 0 and t in (0, 6):
      before = bytes_of(tmp_path)
      for options in ({}, {"resume": True}, {"overwrite": True}):
        tried.append(play(tmp_path, factor=2.0, **options))
      assert bytes_of(tmp_path) == before
    return step(self, state, t)

  monkeypatch.setattr(Sum, "step", another)
  assert play(tmp_path) == 0
  assert tried == 6 * [2]
  assert capsys.readouterr().err.count(f"is in use by process {os.getpid()} on") == 6
  assert files_of(tmp_path) == whole
  assert play(tmp_path, overwrite=True) == 0  # It is released at the end.


def cut(path):
  os.truncate(path, path.stat().st_size // 2)


def flipped(place):
  def damage(path):
    content = bytearray(path.read_bytes())
    content[place if place >= 0 else len(content) + place] ^= 1
    path.write_bytes(content)

  return damage


def half_deleted(path):
  path.unlink()
  path.with_name("7.ckpt.new").write_bytes(b"jax")


DAMAGE = {
  "cut": (cut, "header is damaged|sum is damaged"),
  "empty": (lambda path: os.truncate(path, 0), "its first line is damaged"),
  "no text": (lambda path: path.write_bytes(b"\xff" * 300), "its first line is damaged"),
  "first line": (flipped(3), "its first line is damaged"),
  "length": (flipped(19), "header is damaged"),
  "header": (flipped(60), "its header is damaged"),
  "array": (flipped(-9), "its array state.sum is damaged"),
}  # fmt: skip


def interrupt(path, monkeypatch, at, **options):
  """A run that a kill ends in step ``at`` of the second seed."""
  step = Sum.step

  def killed(self, state, t):
    if (self.seed, t) == (1, at):
      raise KilledError
    return step(self, state, t)

  with monkeypatch.context() as patch:
    patch.setattr(Sum, "step", killed)
    with pytest.raises(KilledError):
      play(path, **options)


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_said_and_the_one_before_taken(
  tmp_path, monkeypatch, whole, capsys, kind
):
  damage, reason = DAMAGE[kind]
  interrupt(tmp_path, monkeypatch, 6)
  assert checkpoint(tmp_path, 3).exists()
  damage(checkpoint(tmp_path, 6))
  capsys.readouterr()
  assert play(tmp_path, resume=True) == 0
  said = " ".join(capsys.readouterr().out.split())
  assert re.search(f"seed-1/6.ckpt cannot be used: .*({reason}); seed 1 goes on from step 3", said)
  assert files_of(tmp_path) == whole


def test_where_no_checkpoint_is_good_the_folder_and_the_cure_are_said(
  tmp_path, monkeypatch, whole, capsys
):
  interrupt(tmp_path, monkeypatch, 6)
  for number in (3, 6):
    cut(checkpoint(tmp_path, number))
  capsys.readouterr()
  assert play(tmp_path, resume=True) == 2
  captured = capsys.readouterr()
  assert f"delete {checkpoint(tmp_path, 3).parent} to begin this part anew" in captured.err
  assert "Sums" in captured.out  # What was finished.
  shutil.rmtree(checkpoint(tmp_path, 3).parent)
  assert play(tmp_path, resume=True) == 0
  assert "seed 1 has no checkpoint: it starts anew" in capsys.readouterr().out
  assert files_of(tmp_path) == whole


def test_a_missing_or_half_deleted_checkpoint_leaves_the_one_before(tmp_path, monkeypatch, whole):
  interrupt(tmp_path, monkeypatch, 6)
  half_deleted(checkpoint(tmp_path, 6))
  assert play(tmp_path, resume=True) == 0
  assert files_of(tmp_path) == whole


def test_a_checkpoint_of_another_run_is_refused(tmp_path, monkeypatch, capsys):
  interrupt(tmp_path / "mine", monkeypatch, 6)
  interrupt(tmp_path / "other", monkeypatch, 6, factor=2.0)
  for other, difference in (
    (checkpoint(tmp_path / "mine", 6, seed=0).with_name("7.ckpt"), "seed is 0 there and 1 here"),
    (checkpoint(tmp_path / "other", 6), "factor is 2.0 there and 1.0 here"),
  ):
    shutil.copy(other, checkpoint(tmp_path / "mine", 6))
    assert play(tmp_path / "mine", resume=True) == 2
    assert f"6.ckpt is of another run: {difference}" in capsys.readouterr().err


def test_what_an_older_version_has_left_is_refused(tmp_path, monkeypatch, capsys):
  interrupt(tmp_path, monkeypatch, 6)
  (checkpoint(tmp_path, 6).parent / "6").mkdir()
  assert play(tmp_path, resume=True) == 2
  assert "has checkpoints of an older version of this program" in capsys.readouterr().err
  saved = json.loads((tmp_path / "config.json").read_text())
  del saved["lengths"]
  (tmp_path / "config.json").write_text(json.dumps(saved))
  assert play(tmp_path, resume=True) == 2
  assert "config.json has no lengths: of an older version" in capsys.readouterr().err


def test_checkpoints_of_other_arrays_are_refused(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(3, {"a": np.zeros(2)}, 0.0, 3, 0)
  for other in ({"a": np.zeros(3)}, {"b": np.zeros(2)}, {"a": np.zeros(2, np.float32)}):
    with pytest.raises(ValueError, match="of another version of this program: the array state"):
      checkpoints.restore(other)


def test_a_line_that_was_lost_is_measured_again(tmp_path, monkeypatch, whole, capsys):
  interrupt(tmp_path, monkeypatch, 6)
  lines = tmp_path / "metrics.jsonl"
  os.truncate(lines, lines.stat().st_size - 9)  # Of step 6, which has a checkpoint.
  capsys.readouterr()
  assert play(tmp_path, resume=True) == 0
  said = " ".join(capsys.readouterr().out.split())
  assert "metrics.jsonl has 2 of the 3 lines that the part had then; seed 1 goes on from" in said
  assert files_of(tmp_path) == whole


def test_lines_of_a_finished_part_are_missed_too(tmp_path, whole, capsys):
  assert play(tmp_path) == 0
  lines = tmp_path / "metrics.jsonl"
  text = lines.read_text().splitlines(keepends=True)
  lines.write_text("".join(text[:3] + text[4:]))  # Without the last one of the first seed.
  assert play(tmp_path, resume=True) == 0
  assert files_of(tmp_path) == whole
  lines.write_text("".join(text[1:]))
  assert play(tmp_path, resume=True) == 2
  assert f"delete {checkpoint(tmp_path, 7, 0).parent} to begin" in capsys.readouterr().err
  shutil.rmtree(checkpoint(tmp_path, 7, 0).parent)
  assert play(tmp_path, resume=True) == 0
  assert files_of(tmp_path)[0] == whole[0]


DAMAGED_FILES = {
  "config.json": (b"", "config.json is damaged .*: restore the file, or begin anew"),
  "config.json ": (b"[]", "config.json must have a dictionary, got list: restore the file"),
  "config.json  ": (b"\xff", "config.json is damaged .*: restore the file"),
  "metrics.jsonl": (b'{"a": 1}\n{"a": 1{"a": 2}\n', "metrics.jsonl, line 2, is damaged .*: delete"),
  "metrics.jsonl ": (b"\xff\n", "metrics.jsonl, line 1, is damaged .*: delete the line"),
  "metrics.jsonl  ": (b"[1]\n", "metrics.jsonl, line 1, is damaged .*: delete the line"),
  "results.csv": (b"method,seed,sum\nsum,0", "results.csv, line 2, has other columns .*: delete"),
  "notes.json": (b'{"no', "notes.json is damaged .*: delete it; --resume measures it again"),
}


@pytest.mark.parametrize("name", DAMAGED_FILES)
def test_a_damaged_file_is_said_with_the_place_and_the_cure(tmp_path, capsys, name):
  content, message = DAMAGED_FILES[name]
  assert play(tmp_path, seeds=1) == 0
  (tmp_path / name.strip()).write_bytes(content)
  before = bytes_of(tmp_path)
  assert play(tmp_path, seeds=1, resume=True) == 2
  assert re.search(f"error: {tmp_path}/{message}", capsys.readouterr().err)
  assert bytes_of(tmp_path) == before
  assert play(tmp_path, seeds=1, overwrite=True) == 0


@pytest.fixture
def listening():
  """Signals are heard as in a program."""
  before = {number: signal.getsignal(number) for number in (*signals.SECONDS, signal.SIGALRM)}
  signals.listen()
  yield
  for number, handler in before.items():
    signal.signal(number, handler)
  signals.forget()


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_asked_to_stop_writes_a_checkpoint_at_the_step_and_goes_on_from_there(
  tmp_path, monkeypatch, whole, listening, number, status
):
  step, begun = Sum.step, []
  for at in range(7):  # Between a stop and the next one, and at one.
    path = tmp_path / str(at)

    def asked(self, state, t, at=at, path=path):
      begun.append((self.seed, t))
      if (self.seed, t) == (1, at) and not (path / "asked").exists():
        (path / "asked").touch()
        signal.raise_signal(number)
      return step(self, state, t)

    monkeypatch.setattr(Sum, "step", asked)
    assert play(path) == status
    assert checkpoint(path, at + 1).exists()
    assert Checkpoints(checkpoint(path, 0).parent).raw().keys() == {"sum"}
    begun.clear()
    assert play(path, resume=True) == 0
    assert begun == [(1, t) for t in range(at + 1, 7)]
    assert files_of(path) == whole


def test_a_step_that_takes_too_long_and_a_second_signal_stop_at_once(
  tmp_path, monkeypatch, listening
):
  monkeypatch.setitem(signals.SECONDS, signal.SIGINT, 0.05)
  for number, times in ((signal.SIGINT, 1), (signal.SIGTERM, 2)):

    def slow(self, state, t, number=number, times=times):
      for _ in range(times):
        signal.raise_signal(number)
      time.sleep(20)

    monkeypatch.setattr(Sum, "step", slow)
    begun = time.monotonic()
    assert play(tmp_path / str(times)) == 128 + number
    assert time.monotonic() - begun < 5


def test_a_clock_that_goes_back_changes_nothing(tmp_path, monkeypatch, whole):
  interrupt(tmp_path, monkeypatch, 6)
  for file in tmp_path.rglob("*"):
    future = 2e9 - (0 if file.name == "3.ckpt" else 1e6)  # The older checkpoint has the later time.
    os.utime(file, (future, future))
  clock = itertools.count(1e9, -1e5)
  monkeypatch.setattr(time, "time", lambda: next(clock))
  assert play(tmp_path, resume=True) == 0
  assert files_of(tmp_path) == whole
  assert len(json.loads((tmp_path / "config.json").read_text())["runs"]) == 2


@pytest.mark.parametrize("first", [6, 7])
def test_more_steps_than_before_are_those_of_a_run_that_had_them_from_the_start(
  tmp_path, capsys, first
):
  assert play(tmp_path / "whole", steps=12) == 0
  assert play(tmp_path / "longer", steps=first) == 0
  assert play(tmp_path / "longer", steps=12, resume=True) == 0
  assert files_of(tmp_path / "longer") == files_of(tmp_path / "whole")
  said = " ".join(capsys.readouterr().out.split())
  assert ("end of a shorter run, between two evaluations; seed 0 goes on" in said) == (first == 7)
  assert play(tmp_path / "longer", steps=11, resume=True) == 2
  assert "steps must be at least 12 to resume, got 11" in capsys.readouterr().err


def test_a_run_that_becomes_longer_may_be_killed_where_it_begins(tmp_path, monkeypatch):
  assert play(tmp_path / "whole", steps=12) == 0
  assert play(tmp_path / "killed", steps=6) == 0
  write = folder.write

  def killed(*arguments):
    raise KilledError

  monkeypatch.setattr(folder, "write", killed)
  with pytest.raises(KilledError):
    play(tmp_path / "killed", steps=12, resume=True)
  monkeypatch.setattr(folder, "write", write)
  assert play(tmp_path / "killed", steps=6, resume=True) == 0
  assert len(folder.read(tmp_path / "killed")[1]) == 2
  assert play(tmp_path / "killed", steps=12, resume=True) == 0
  assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


def test_a_process_that_does_not_write_leaves_all_to_the_one_that_does(tmp_path, monkeypatch):
  assert play(tmp_path) == 0
  before = bytes_of(tmp_path)
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  for options in ({"overwrite": True}, {"resume": True, "steps": 9}):
    RunFolder(Config(output_dir=tmp_path, **options), "Sums", "sums").close()
    assert bytes_of(tmp_path) == before


def test_what_is_left_of_a_deleted_run_is_not_gone_on_with(tmp_path, capsys):
  assert play(tmp_path) == 0
  (tmp_path / "config.json").unlink()  # As when a kill meets --overwrite.
  assert play(tmp_path, factor=2.0) == 2
  assert "has an earlier run" in capsys.readouterr().err
  assert play(tmp_path, factor=2.0, overwrite=True) == 0
