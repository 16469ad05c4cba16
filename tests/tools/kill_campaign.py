"""Kills real scripts at random moments, lets them go on, and compares what comes out.

  python -m tests.tools.kill_campaign --scripts few_shot hyper_cleaning --kills 10

Every script runs with ``--smoke``: twice undisturbed, and then killed with ``kill -9`` and resumed,
several times before it may end. Half of the kills come at any time, the others while a file of the
folder is being written. Rows and lines must be those of the undisturbed run, without times. A
process is a fork of one that has imported the script, and finds compiled programs in a cache; the
first run of each script is of the plain command line. Counts are printed, and kept in
``--output-dir``.
"""

import dataclasses
import hashlib
import importlib
import json
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import tyro

ROOMS = (
  "hyper_cleaning", "few_shot", "captioning", "continual_lm", "adversarial_training",
  "multiple_minima", "online_hyperopt", "online_meta", "es_regime",
)  # fmt: skip
TIMED = re.compile("second|ms_per|temporary_bytes")  # Columns that two runs do not share.
CELL = (
  "method", "seed", "toy", "stream", "window", "order", "model", "set", "corruption", "group",
  "stay_probability", "run", "sources",
)  # fmt: skip
POINTS = 5
LIMIT = 600.0  # Seconds of a run.


@dataclasses.dataclass
class Campaign:
  """Kills scripts and compares; the last line of a script's output says why it failed."""

  scripts: tuple[str, ...] = ROOMS
  """Which."""
  kills: int = 10
  """Of each, at least."""
  kills_of_a_run: int = 4
  """One after the other, before it may end."""
  seed: int = 0
  """Of the moments."""
  seconds: float = 1e9
  """No run of a script begins later than this."""
  output_dir: Path = Path("runs/kills")
  """Where runs are; those that differ stay there."""


def hashes(folder: Path) -> list[str]:
  """Of the rows, and of the lines of each cell one after the other, without times."""
  from scripts.common.folder import read

  def text(entry):
    return json.dumps({k: v for k, v in entry.items() if not TIMED.search(k)})

  lines, rows, _ = read(folder)
  cells: dict[str, list[str]] = {}
  for line in lines:
    cell = json.dumps([line.get(name) for name in CELL])
    cells.setdefault(cell, []).append(text(line))
  # How many points fit into a budget of seconds was measured anew: those that all runs have.
  if any("point" in line for line in lines):
    cells = {cell: of_cell[:POINTS] for cell, of_cell in cells.items()}
  parts = [[*map(text, rows)], *(value for _, value in sorted(cells.items()))]
  return [hashlib.sha256("\n".join(part).encode()).hexdigest() for part in parts]


class Script:
  """An experiment at its smallest."""

  def __init__(self, name: str, folder: Path):
    importlib.import_module(f"scripts.{name}.__main__")
    self.name, self.folder = name, folder

  def start(self, path: Path, *flags: str, forked: bool = True) -> int:
    """Starts a run in ``path``; returns the process."""
    arguments = ["--smoke", "--output-dir", str(path), *flags]
    log = os.open(path.with_suffix(".log"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    if not forked:
      command = [sys.executable, "-m", f"scripts.{self.name}", *arguments]
      return subprocess.Popen(command, stdout=log, stderr=log).pid
    if pid := os.fork():
      os.close(log)
      return pid
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = [self.name, *arguments]
    status = 70
    try:
      runpy.run_module(f"scripts.{self.name}", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
      status = ended.code if isinstance(ended.code, int) else 71
    finally:
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(status)

  def finish(self, pid: int) -> int:
    """The exit status of a run."""
    end = time.monotonic() + LIMIT
    while not (status := ended(pid)):
      if time.monotonic() > end:
        os.kill(pid, signal.SIGKILL)
      time.sleep(0.02)
    return os.waitstatus_to_exitcode(status[1])


def ended(pid: int) -> tuple[int, int] | None:
  """The status of a process, if it has ended."""
  found = os.waitpid(pid, os.WNOHANG)
  return found if found[0] else None


def state(path: Path) -> dict[str, int]:
  """The files in a folder and when they were written."""
  files = {}
  for where, _, names in os.walk(path):
    for name in names:
      try:
        files[f"{where}/{name}"] = os.stat(f"{where}/{name}").st_mtime_ns
      except FileNotFoundError:  # Between the two looks.
        files[f"{where}/{name}"] = 0
  return files


def wait(pid: int, path: Path, seconds: float, changes: int) -> tuple[str, int]:
  """Until a time, or a file is being written after so many changes of the folder.

  Returns where the run is, and how many changes there were.
  """
  begun, seen, number = time.monotonic(), state(path), 0
  while time.monotonic() - begun < seconds:
    if number >= changes and any(name.endswith(".new") for name in seen):
      return "in a write", number
    time.sleep(0.0002 if number >= changes else 0.004)
    if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
      return "ended", number
    if (now := state(path)) != seen:
      seen, number = now, number + 1
  if not (path / "config.json").exists():
    return "start-up", number
  return ("in a write" if any(path.rglob("*.new")) else "running"), number


def campaign_of(name: str, told: Campaign) -> dict[str, int | float | str]:
  """Kills one script; returns the counts."""
  folder = told.output_dir / name
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  script, draw = Script(name, folder), random.Random(f"{told.seed} {name}")
  for attempt in ("compiles", "whole"):  # The second one has the times of those that follow.
    begun = time.monotonic()
    pid = script.start(folder / attempt)
    _, changes = wait(pid, folder / attempt, LIMIT, 10**9)
    if (status := script.finish(pid)) != 0:
      return {"script": name, "failed": f"undisturbed run ended with {status}"}
  duration, expected = time.monotonic() - begun, hashes(folder / "whole")
  counts: dict[str, int | float | str] = {
    "script": name, "kills": 0, "start-up": 0, "in a write": 0, "running": 0, "runs": 0, "equal": 0,
    "different": 0, "failed": 0, "seconds": round(duration, 1),
  }  # fmt: skip
  if hashes(folder / "compiles") != expected:
    return counts | {"failed": "two undisturbed runs differ"}

  def count(*names: str) -> None:
    for one in names:
      counts[one] = int(counts[one]) + 1

  campaign_begun = time.monotonic()
  while int(counts["kills"]) < told.kills and time.monotonic() - campaign_begun < told.seconds:
    path = folder / f"run_{counts['runs']}"
    # The first run is of the plain command line.
    count("runs")
    forked, status = counts["runs"] != 1, 0
    for kill in range(told.kills_of_a_run + 1):
      flags = ["--resume"] if (path / "config.json").exists() else []
      pid = script.start(path, *flags, forked=forked)
      if kill == told.kills_of_a_run:
        status = script.finish(pid)
        break
      if draw.random() < 0.5:
        place = wait(pid, path, LIMIT, draw.randint(1, 1 + changes // told.kills_of_a_run))[0]
      else:
        place = wait(pid, path, draw.uniform(0, duration if forked else 2 * duration), 10**9)[0]
      if place == "ended":
        status = script.finish(pid)
        break
      os.kill(pid, signal.SIGKILL)
      script.finish(pid)
      count("kills", place)
    outcome = "failed" if status else "equal" if hashes(path) == expected else "different"
    count(outcome)
    if outcome == "equal":
      shutil.rmtree(path)
    print(json.dumps(counts), flush=True)
    (told.output_dir / f"{name}.json").write_text(json.dumps(counts) + "\n")
  return counts


def main(told: Campaign) -> int:
  """Runs the campaign; 1 if a run differed or failed."""
  told.output_dir.mkdir(parents=True, exist_ok=True)
  cache = told.output_dir.absolute() / "programs"
  os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache)
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
  os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
  found = [campaign_of(name, told) for name in told.scripts]
  import pandas as pd

  print(pd.DataFrame(found).to_string(index=False))
  return int(any(counts.get("different") or counts.get("failed") for counts in found))


if __name__ == "__main__":
  sys.exit(main(tyro.cli(Campaign, description=__doc__)))
