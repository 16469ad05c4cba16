"""What happens to runs: kills at any write, disks, two writers, signals, clocks, longer runs."""

import errno
import itertools
import json
import os
import re
import signal
import stat
import time
from pathlib import Path

import jax
import pytest

from scripts.common import folder, signals
from scripts.common.checkpoints import Checkpoints
from scripts.common.folder import RunFolder
from tests.scripts.common.sums import (
  Config,
  KilledError,
  Sum,
  bytes_of,
  checkpoint,
  files_of,
  go_on,
  interrupt,
  play,
)


@pytest.mark.parametrize("torn", [False, True])
def test_a_run_that_is_killed_at_any_write_goes_on_to_the_same_files(
  tmp_path, monkeypatch, whole, torn
):
  sync = os.fsync

  def killed(file):
    is_folder = stat.S_ISDIR(os.fstat(file).st_mode)
    if not is_folder and next(calls) == number:
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
