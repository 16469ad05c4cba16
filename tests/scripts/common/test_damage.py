"""Damaged checkpoints, lines and files: what is lost is said, and the rest is gone on with."""

import json
import os
import re
import shutil

import numpy as np
import pytest

from scripts.common.checkpoints import Checkpoints
from tests.scripts.common.sums import (
  bytes_of,
  checkpoint,
  files_of,
  interrupt,
  play,
)


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
  assert "config.json has no lengths, and is of an older version" in capsys.readouterr().err


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
