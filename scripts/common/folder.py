"""The folder of a run: whose it is, what was measured, and that nothing of it is lost.

``config.json`` has the settings and where they ran, ``metrics.jsonl`` a line for each evaluation,
``results.csv`` a row for each finished cell, ``notes.json`` what was measured once for all cells,
and ``checkpoints/`` the states.
"""

import contextlib
import csv
import datetime
import fcntl
import io
import json
import math
import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import pandas as pd

from scripts.common.config import StudyConfig
from scripts.common.devices import together
from scripts.common.files import UnusableError, read_json, write, writing
from scripts.common.task import Row

CONFIG, METRICS, RESULTS, NOTES, LOCK = (
  "config.json", "metrics.jsonl", "results.csv", "notes.json", "lock",
)  # fmt: skip
CHECKPOINTS, MODEL = "checkpoints", "pretrained"
OLDER = (
  "is of an older version of this program: go on with that version, or begin anew with --overwrite "
  "or in another folder"
)
CURE = "restore the file, or begin anew with --overwrite or in another folder"


class RunFolder:
  """The files of one run, with what they have in ``lines``, ``rows`` and ``notes``."""

  def __init__(self, config: StudyConfig, study: str, program: str, depends_on: Row | None = None):
    """Begins a run, or goes on with the one that is there.

    Raises:
      ValueError: if the folder cannot be written to, is in use, belongs to another run, or has one
        that neither ``resume`` nor ``overwrite`` speaks of.
    """
    self.path, self._config = config.output_dir, config
    self._writes = jax.process_index() == 0  # The others work along.
    try:
      with contextlib.ExitStack() as on_error:
        with together():  # No process may write what another is still to read.
          self.path.mkdir(parents=True, exist_ok=True)
          self._lock = on_error.enter_context(_lock(self.path) if self._writes else io.StringIO())
          if config.overwrite and self._writes:
            self._clear()
          self.identity, lengths = config.identity() | (depends_on or {}), config.lengths()
          saved = self._look(lengths)
          self.lines, self.rows, self.notes = read(self.path) if config.resume else ([], [], {})
          longer = saved.get("lengths", lengths) != lengths
          if longer:  # Rows are of the end; cells go on from there.
            self.rows = []
        if self._writes:
          if longer:
            (self.path / RESULTS).unlink(missing_ok=True)
          saved |= {"study": study, "identity": self.identity, "lengths": lengths}
          saved |= {"config": config.model_dump(mode="json")}
          saved["runs"].append(provenance(config, program))
          write(self.path / CONFIG, json.dumps(saved, indent=1) + "\n")
        self.keep_lines(self.lines)  # A kill may have left half of one.
        on_error.pop_all()
    except OSError as error:
      raise ValueError(
        f"output_dir must be a folder to write to, got {self.path} ({error.strerror})"
      ) from error

  def _look(self, lengths: Row) -> dict[str, Any]:
    """What ``config.json`` has of the run, after comparing."""
    path, config = self.path / CONFIG, self._config
    if not config.resume:
      there = [
        name for name in (CONFIG, METRICS, RESULTS, CHECKPOINTS) if (self.path / name).exists()
      ]
      if there and not config.overwrite:
        raise ValueError(
          f"output_dir {self.path} has an earlier run: continue it with --resume, delete it with "
          "--overwrite, or choose another folder"
        )
      return {"runs": []}
    if not path.exists():
      raise ValueError(f"resume needs an earlier run in output_dir, none in {self.path}")
    saved = read_json(path, CURE)
    if missing := {"identity", "lengths", "runs"} - saved.keys():
      raise UnusableError(f"{path} has no {', '.join(sorted(missing))}, and {OLDER}")
    if self.identity.keys() | lengths.keys() != saved["identity"].keys() | saved["lengths"].keys():
      raise UnusableError(f"{path} {OLDER}")
    for name, wanted in (self.identity | lengths).items():
      found = saved["lengths" if name in lengths else "identity"].get(name)
      if name in lengths and wanted < found:
        raise ValueError(f"{name} must be at least {found} to resume, got {wanted}")
      if name not in lengths and found != wanted:
        raise ValueError(f"{name} must be {found!r} to resume, got {wanted!r}")
    return saved

  def _clear(self) -> None:
    for name in (CONFIG, METRICS, RESULTS, NOTES):  # Without the first nobody resumes the rest.
      (self.path / name).unlink(missing_ok=True)
    for picture in self.path.glob("*.png"):
      picture.unlink()
    for name in (CHECKPOINTS, MODEL):
      shutil.rmtree(self.path / name, ignore_errors=True)

  def add_lines(self, lines: Sequence[Row]) -> None:
    """Appends lines, on disk when this returns; what is not finite is NaN, and ``null`` there."""
    new = list(map(_json_line, lines))
    self.lines += map(_line, new)
    if self._writes:
      with writing(self.path / METRICS), (self.path / METRICS).open("a") as file:
        file.writelines(new)
        file.flush()
        os.fsync(file.fileno())

  def keep_lines(self, lines: Sequence[Row]) -> None:
    """Replaces all lines by these: those that an interrupted run will not write again."""
    self.lines = list(lines)
    if self._writes:
      write(self.path / METRICS, "".join(map(_json_line, self.lines)))

  def add_rows(self, rows: Sequence[Row]) -> None:
    """Adds rows to the table."""
    self.rows += rows
    if self._writes:
      write(self.path / RESULTS, _table(self.rows))

  def note(self, name: str, compute: Callable[[], Any]) -> Any:
    """What ``compute`` gives, as JSON has it; computed once for a run and all that resume it."""
    if name not in self.notes:
      self.notes[name] = json.loads(json.dumps(compute()))
      if self._writes:
        write(self.path / NOTES, json.dumps(self.notes, indent=1) + "\n")
    return self.notes[name]

  def save_results(self, path: Path, mine: Callable[[list[Row]], list[Row]]) -> None:
    """Keeps what the tables of this run need, without what is only about this machine."""
    path.mkdir(parents=True, exist_ok=True)
    saved = read_json(self.path / CONFIG, CURE)
    del saved["config"], saved["lengths"]
    text = json.dumps(saved, indent=1) + "\n"
    for value in dict(self._config).values():
      if isinstance(value, Path) and value.is_absolute():
        text = text.replace(str(value), value.name)
    write(path / CONFIG, text)
    write(path / RESULTS, _table(mine(self.rows)))
    if self.notes:
      write(path / NOTES, (self.path / NOTES).read_bytes())
    lines = "".join(map(_json_line, mine(self.lines)))
    if len(lines) < 2**18:  # For curves; tables are of rows.
      write(path / METRICS, lines)

  def close(self) -> None:
    """Lets other runs in."""
    self._lock.close()


def checkpoints(folder: Path, key: Mapping[str, Any]) -> Path:
  """Where the checkpoints of the cell of that key are."""
  name = "_".join(f"{column}-{value}" for column, value in key.items() if value != "")
  return folder / CHECKPOINTS / name.replace("/", "-")


def read(folder: Path) -> tuple[list[Row], list[Row], dict[str, Any]]:
  """``(lines, rows, notes)`` of the files in a folder, as far as there are any.

  Lines have NaN for ``null``, as they had when they were written. Half a line at the end, which an
  interruption has left, is not read.

  Raises:
    UnusableError: if a file is damaged.
  """
  lines, rows, notes = list[Row](), list[Row](), dict[str, Any]()
  if (folder / METRICS).exists():
    *whole, last = (folder / METRICS).read_bytes().split(b"\n")
    for number, text in enumerate([*whole, last] if last.endswith(b"}") else whole, 1):
      try:
        lines.append(_line(text))
      except (ValueError, AttributeError) as error:
        raise UnusableError(
          f"{folder / METRICS}, line {number}, is damaged ({error}): delete the line; --resume "
          "measures it again, or says which checkpoints to delete for that"
        ) from error
  if (folder / RESULTS).exists():
    with (folder / RESULTS).open(newline="", errors="replace") as file:
      table = csv.DictReader(file)
      rows = [{k: v if v is None else _value(v) for k, v in row.items()} for row in table]
    for number, row in enumerate(rows, 2):
      if None in row or None in row.values():
        raise UnusableError(
          f"{folder / RESULTS}, line {number}, has other columns than line 1: delete the line; "
          "--resume measures it again"
        )
  if (folder / NOTES).exists():
    notes = read_json(folder / NOTES, "delete it; --resume measures it again")
  return lines, rows, notes


def _value(text: str) -> Any:
  """What a field of ``results.csv`` was; pandas has no empty texts and may round numbers."""
  for kind in ({"True": True, "False": False}.__getitem__, int, float):
    with contextlib.suppress(KeyError, ValueError):
      return kind(text)
  return text


def provenance(config: StudyConfig, program: str) -> dict[str, Any]:
  """What ran where: commit, versions, devices, date and command."""
  devices = jax.devices()
  return {
    "command": f"python -m {program} {config.flags()}".strip(),
    "seeds": {"seeds": config.seeds, "first_seed": config.first_seed},
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "commit": _git("rev-parse", "HEAD"),
    "clean": _git("status", "--porcelain", "--untracked-files=no") == "",
    "python": platform.python_version(),
    **{name: metadata.version(name) for name in ("jax", "jaxlib", "optax")},
    "device": devices[0].device_kind,
    "num_devices": len(devices),
    "num_processes": jax.process_count(),
    # That this process may use; not every system can say, and then all of the machine.
    "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
  }


def _git(*arguments: str) -> str | None:
  command = ["git", "-C", str(Path(__file__).parent), *arguments]
  try:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
  except (OSError, subprocess.CalledProcessError):  # Not a clone.
    return None


def _lock(folder: Path) -> Any:
  """Holds the folder until the file is closed or the process is gone."""
  file = (folder / LOCK).open("a+")
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    file.seek(0)
    owner = file.read().strip() or "another process"
    file.close()
    raise ValueError(f"output_dir {folder} is in use by {owner}") from None
  file.truncate(0)
  file.write(f"process {os.getpid()} on {socket.gethostname()}")
  file.flush()
  return file


def _table(rows: Sequence[Row]) -> str:
  # As objects: a column that some rows do not have keeps its integers.
  return pd.DataFrame(rows, dtype=object).to_csv(index=False, na_rep="nan")


def _json_line(line: Mapping[str, Any]) -> str:
  null = lambda value: isinstance(value, float) and not math.isfinite(value)
  return json.dumps({k: None if null(value) else value for k, value in line.items()}) + "\n"


def _line(text: str | bytes) -> Row:
  return {k: math.nan if value is None else value for k, value in json.loads(text).items()}
