"""Experiments as sets of cells: one mechanism trains, measures, resumes and reports all of them.

A *cell* is a method with a seed and a setting. It makes a *task*: a state (all that a checkpoint
holds), a step, an evaluation (a line of ``metrics.jsonl``) and a result (a row of ``results.csv``).
A *study* says which cells there are, and which tables and pictures come of them.
"""

import contextlib
import inspect
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import jax
import pandas as pd
import tyro
from rich.console import Console

from scripts.common import folder
from scripts.common.checkpoints import Checkpoints
from scripts.common.config import StudyConfig
from scripts.common.devices import connect, together
from scripts.common.folder import RunFolder
from scripts.common.progress import Bar, console
from scripts.common.table import Table
from scripts.common.task import Cell, Row, Rows, Spent

Config = TypeVar("Config", bound=StudyConfig)
ASKED_TO_STOP = threading.Event()  # By Ctrl-C; Python drops an exception that meets a callback.


class Results(Generic[Config]):
  """What tables are made of: lines have NaN where a number was not finite."""

  def __init__(self, config: Config, lines: list[Row], rows: list[Row], notes: dict[str, Any]):
    self.config, self.notes = config, notes
    self.rows, self.lines = pd.DataFrame(rows), pd.DataFrame(lines)


class Study(Generic[Config]):
  """An experiment. A room gives its cells, tables and pictures; the rest is here."""

  config: type[Config]
  step_name: ClassVar[str] = "step"  # The column of lines that counts steps.
  program: ClassVar[str | None] = None  # What ``python -m`` runs, if it is not the room.

  def depends_on(self, config: Config) -> Row:
    """What the numbers depend on beside ``config``, by name: chosen rates, say.

    A run that goes on must have it in common with the one that began.
    """
    return {}

  def prepare(self, config: Config) -> Any:
    """Reads the data; raises ``ValueError`` or ``FileNotFoundError`` for what cannot be run."""

  def begin(self, run: "Run[Config]") -> None:
    """What is measured once, before the first cell, through ``run.note``."""

  def cells(self, run: "Run[Config]") -> Iterable[Cell]:
    """All cells, in the order in which they run."""
    raise NotImplementedError

  def finish(self, run: "Run[Config]") -> None:
    """What is measured after the last cell, beside its rows."""

  def tables(self, results: Results[Config]) -> Iterable[Table]:
    """The tables of the rows that there are."""
    raise NotImplementedError

  def remarks(self, results: Results[Config]) -> Iterable[str]:
    """What is to be said under the tables."""
    return ()

  def draw(self, run: "Run[Config]") -> None:
    """Draws pictures into ``run.path``: in all processes, since it may compute; 0 alone writes."""

  def room(self) -> Path:
    """The folder of the experiment's files."""
    return Path(inspect.getfile(type(self))).parent


class Run(Generic[Config]):
  """A study at work in the folder ``path``, on the ``data`` that ``prepare`` read."""

  def __init__(self, study: Study[Config], config: Config, data: Any, files: RunFolder):
    self.study, self.config, self.data = study, config, data
    self.path, self.notes, self.note, self._files = files.path, files.notes, files.note, files
    self._memory: dict[Hashable, Any] = {}
    self._last: tuple[Any, Any] = (None, None)  # The final state of one cell.

  def mine(self, rows: list[Row]) -> list[Row]:
    """The rows or lines of the methods and seeds of this run; its folder may have others."""
    cells = list(self.study.cells(self))
    return [row for row in rows if any(cell.owns(row) for cell in cells)]

  def results(self) -> Results[Config]:
    """What there is so far, for the methods and seeds of this run."""
    lines, rows = self.mine(self._files.lines), self.mine(self._files.rows)
    return Results(self.config, lines, rows, self.notes)

  def shared(self, name: Hashable, make: Callable[[], Any]) -> Any:
    """What ``make`` gives, made once in this process: a program that several cells share, say."""
    if name not in self._memory:
      self._memory[name] = make()
    return self._memory[name]

  def play(self, bar: Bar) -> None:
    """Finishes all cells; rows of finished ones are there already."""
    bar.show(description="measuring")
    self.study.begin(self)
    cells = list(self.study.cells(self))
    bar.show(total=sum(cell.steps for cell in cells))
    for cell in cells:
      if self._finished(cell):
        bar.show(advance=cell.steps)
      else:
        self._train(cell, bar)

  def finished(self) -> list[Cell]:
    """The cells that have a row."""
    return [cell for cell in self.study.cells(self) if self._finished(cell)]

  def saved(self, cell: Cell) -> Any:
    """The final state of a finished cell as NumPy arrays in dictionaries and lists.

    Raises:
      FileNotFoundError: if its checkpoint was deleted.
    """
    with self._checkpoints(cell) as checkpoints:
      return checkpoints.raw()

  def state(self, cell: Cell) -> Any:
    """The final state of a finished cell; it may be given to several, which must not reuse it."""
    if self._last[0] != cell.key:
      self._train(cell, None)
    return self._last[1]

  def _checkpoints(self, cell: Cell) -> contextlib.closing[Checkpoints]:
    return contextlib.closing(Checkpoints(folder.checkpoints(self.path, cell.key)))

  def _finished(self, cell: Cell) -> bool:
    return any(map(cell.owns, self._files.rows))

  def _train(self, cell: Cell, bar: Bar | None) -> None:
    bar = bar or Bar(Console(quiet=True))
    bar.show(description=cell.label, told="compiling")
    task = cell.make(*map(self.state, cell.needs))
    name = self.study.step_name
    with self._checkpoints(cell) as checkpoints:
      state, seconds, done = checkpoints.restore(task.state)
      bar.show(advance=done)
      late = [line for line in self._files.lines if cell.owns(line) and line[name] > done]
      if late:  # An interrupted run wrote them after its last checkpoint.
        self._files.keep_lines([line for line in self._files.lines if line not in late])
      if not cell.steps:  # Others may need its state all the same.
        checkpoints.save(0, state, seconds)
      for stop in cell.stops(done):
        told, start = list[Any](), time.perf_counter()
        for t in range(done, stop):
          if ASKED_TO_STOP.is_set():
            raise KeyboardInterrupt
          state, one = task.step(state, t)
          jax.block_until_ready(told[-1:])  # One step waits while another runs.
          told.append(one)
          bar.show(advance=1)
        jax.block_until_ready((state, told))
        done, seconds = stop, seconds + time.perf_counter() - start
        if cell.due(cell.every, done):
          line = {**cell.key, name: done, "seconds": seconds}
          values = _as_list(task.evaluate(state, told))
          self._files.add_lines([line | one for one in values])
          bar.tell(values)
        if cell.due(cell.checkpoint_every, done):
          checkpoints.save(done, state, seconds)
    if not self._finished(cell):
      spent = Spent(seconds, list(filter(cell.owns, self._files.lines)))
      if rows := _as_list(task.result(state, spent)):  # What only others need has none.
        self._files.add_rows([{**cell.key, **row} for row in rows])
    self._last = (cell.key, state)


def _as_list(rows: Rows) -> list[Row]:
  return [dict(rows)] if isinstance(rows, Mapping) else [dict(row) for row in rows]


def run(study: Study[Config], config: Config) -> int:
  """Runs, prints and saves; returns the exit status.

  It is 0, 2 after bad input, and 130 after Ctrl-C, with what was finished until then.
  """
  try:
    connect(config)
    with together():
      data = study.prepare(config)
    program = study.program or f"scripts.{study.room().name}"
    files = RunFolder(config, type(study).__name__, program, study.depends_on(config))
  except (ValueError, FileNotFoundError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print("Interrupted.", file=sys.stderr)
    return 130
  with contextlib.closing(files):
    return _play(study, Run(study, config, data, files), files)


def _play(study: Study[Config], run: Run[Config], files: RunFolder) -> int:
  terminal, status = console(), 0
  with Bar(terminal) as bar:
    try:
      run.play(bar)
      with _left_out(terminal):
        study.finish(run)
    except KeyboardInterrupt:
      ASKED_TO_STOP.clear()
      status = 130
  if status:
    terminal.print("Interrupted; --resume goes on. What was finished until then:")
  results = run.results()
  if len(results.rows):
    for table in study.tables(results):
      table.print(terminal)
    for remark in study.remarks(results):
      terminal.print(remark)
    if not status or jax.process_count() == 1:  # Others may have stopped at another step.
      with _left_out(terminal):
        study.draw(run)
  if run.config.save_results and not status and not jax.process_index():
    kept = study.room() / "results" / run.config.save_results
    files.save_results(kept, run.mine)
  terminal.print(f"{folder.METRICS}, {folder.RESULTS} and pictures are in {run.path}")
  return status


def _stop(*_: Any) -> None:
  ASKED_TO_STOP.set()
  raise KeyboardInterrupt


@contextlib.contextmanager
def _left_out(terminal: Console) -> Generator[None, None, None]:
  """Goes on without what needs a checkpoint that was deleted."""
  try:
    yield
  except FileNotFoundError as error:
    terminal.print(f"Left out, since {error}")


def main(config: type[Config], run: Callable[[Config], int], doc: str | None) -> None:
  """The program of an experiment: reads the command line, runs, and ends the process."""
  told = tyro.cli(config, description=doc)
  if told.smoke:
    small = config(**told.given())  # Read again, since a value that was given may be the default.
    told = tyro.cli(config, default=small, description=doc)
    # Compilation is most of its time.
    jax.config.update("jax_disable_most_optimizations", True)
  signal.signal(signal.SIGINT, _stop)
  try:
    status = run(told)
  except KeyboardInterrupt:  # Again, while what was finished was shown.
    status = 130
  sys.stdout.flush()
  sys.stderr.flush()
  if status == 130:  # Not by way of the runtime's destructors: a compilation may still be going on.
    os._exit(status)
  sys.exit(status)
