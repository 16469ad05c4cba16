"""How scripts report: numbers with their spread, tables, and files that survive an interruption."""

import contextlib
import csv
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  ProgressColumn,
  Task,
  TextColumn,
  TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

Config = TypeVar("Config")


class BadInputError(Exception):
  """What the user asked for cannot be done; the message says why and what can."""


@contextlib.contextmanager
def bad_input() -> Iterator[None]:
  """Errors of what stands inside, before anything is measured, are for the user to correct."""
  try:
    yield
  except (ValueError, FileNotFoundError) as error:
    raise BadInputError(str(error)) from error


def exit_status(run: Callable[[Config], int], config: Config) -> int:
  """``run(config)``, which is its exit status, or 2 after bad input and 130 after Ctrl-C."""
  try:
    return run(config)
  except BadInputError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:  # Not in training: while reading data, printing or drawing.
    print("Interrupted.", file=sys.stderr)
    return 130


def mean_and_spread(values: Iterable[float], digits: int = 3) -> str:
  """``mean ± sample standard deviation`` of the finite values; a dash if there is none."""
  finite = [value for value in values if math.isfinite(value)]
  if not finite:
    return "-"
  mean = f"{np.mean(finite):.{digits}f}"
  return mean if len(finite) == 1 else f"{mean} ± {np.std(finite, ddof=1):.{digits}f}"


def print_table(
  console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]
) -> None:
  """Prints a table whose first column is text and whose others are numbers."""
  table = Table(title=title, title_justify="left")
  for i, column in enumerate(columns):
    table.add_column(column, justify="left" if i == 0 else "right")
  for row in rows:
    table.add_row(*row)
  console.print(table)


def console() -> Console:
  """A console that does not break tables when the output goes to a file."""
  plain = Console()
  return plain if plain.is_terminal else Console(width=160)


class RateColumn(ProgressColumn):
  """Steps a second."""

  def render(self, task: Task) -> Text:
    """The rate of the last half minute, or nothing before there is one."""
    rate = task.finished_speed or task.speed
    return Text(f"{rate:.3g} steps/s" if rate else "")


def progress_bar(console: Console) -> Progress:
  """A progress bar; its tasks have a field ``loss``, a text that stands behind the bar."""
  return Progress(
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    RateColumn(),
    TimeRemainingColumn(),
    TextColumn("{task.fields[loss]}"),
    console=console,
  )


def jsonable(values: Mapping[str, Any]) -> dict[str, Any]:
  """The same, with ``None`` for numbers that are not finite."""
  return {
    name: None if isinstance(value, float) and not math.isfinite(value) else value
    for name, value in values.items()
  }


class MetricsLog:
  """A file of JSON lines, each on disk as soon as it is written.

  It begins with the lines ``kept`` of an earlier run, which are never lost on the way.
  """

  def __init__(self, path: Path, kept: Iterable[Mapping[str, Any]] = ()):
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_text("".join(json.dumps(line) + "\n" for line in kept))
    new.replace(path)
    self._file = path.open("a")

  def write(self, **values: Any) -> None:
    """Writes one line; numbers that are not finite become ``null``."""
    self._file.write(json.dumps(jsonable(values), allow_nan=False) + "\n")
    self._file.flush()

  def __enter__(self) -> "MetricsLog":
    return self

  def __exit__(self, *exc_info: Any) -> None:
    self._file.close()


def start_output(output_dir: Path, metrics: str, stale: Iterable[str]) -> MetricsLog:
  """Opens a log in a folder, made if there is none, without the ``stale`` files of earlier runs.

  Raises:
    ValueError: if nothing can be written there.
  """
  try:
    for name in stale:
      (output_dir / name).unlink(missing_ok=True)
    return MetricsLog(output_dir / metrics)
  except OSError as error:
    raise not_writable(output_dir, error) from error


def start_run(output_dir: Path, identity: Mapping[str, Any]) -> None:
  """Makes a folder for a run that can be resumed, with its identity in ``config.json``.

  Raises:
    ValueError: if it has checkpoints of an earlier run, ``checkpoints/<run>/<step>``, or nothing
      can be written there.
  """
  try:
    if any(path.name.isdigit() for path in (output_dir / "checkpoints").glob("*/*")):
      raise ValueError(
        f"output_dir {output_dir} has checkpoints of an earlier run: continue it with resume, or "
        "choose another folder"
      )
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "config.json").write_text(json.dumps(identity, indent=1) + "\n")
  except OSError as error:
    raise not_writable(output_dir, error) from error


def not_writable(output_dir: Path, error: OSError) -> ValueError:
  """What to raise where a folder cannot be written to."""
  return ValueError(f"output_dir must be a folder to write to, got {output_dir} ({error.strerror})")


def read_run(output_dir: Path, identity: Mapping[str, Any], metrics: str) -> list[dict[str, Any]]:
  """The metrics of an earlier run that is to go on.

  Args:
    output_dir: its folder, with its identity in ``config.json``.
    identity: what both runs must have in common, as JSON gives it back.
    metrics: the name of its file of JSON lines.

  Raises:
    ValueError: if there is none, or it is not the same run.
  """
  path = output_dir / "config.json"
  if not path.exists():
    raise ValueError(f"resume needs an earlier run in output_dir, none in {output_dir}")
  found = json.loads(path.read_text())
  for name, wanted in identity.items():
    if wanted != found.get(name):
      raise ValueError(f"{name} must be {found.get(name)!r} to resume, got {wanted!r}")
  path = output_dir / metrics
  lines = path.read_text().splitlines() if path.exists() else []
  return [json.loads(line) for line in lines if line.endswith("}")]


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], kept_by: Sequence[str] = ()) -> None:
  """Writes rows; a column that a row does not have is empty.

  Args:
    path: of the file.
    rows: columns and values of each.
    kept_by: the columns by which rows are told apart. If there are any, rows of the earlier file
      that are not among ``rows`` stay, as those of methods that a resumed run leaves out.
  """
  name_of = lambda row: tuple(str(row.get(column)) for column in kept_by)
  earlier: list[Mapping[str, Any]] = []
  if kept_by and path.exists():
    with path.open(newline="") as file:
      earlier = list(csv.DictReader(file))
  found = {name_of(row) for row in rows}
  everything = [row for row in earlier if name_of(row) not in found] + list(rows)
  new = path.with_name(path.name + ".new")
  with new.open("w", newline="") as file:
    writer = csv.DictWriter(file, list(dict.fromkeys(name for row in everything for name in row)))
    writer.writeheader()
    writer.writerows(everything)
  new.replace(path)  # What was there is never lost on the way.
