"""Experiments as sets of cells: one mechanism trains, measures, resumes and reports all of them.

A *cell* is a method with a seed and a setting. It makes a *task*: a state (all that a checkpoint
holds), a step, an evaluation (a line of ``metrics.jsonl``) and a result (a row of ``results.csv``).
A *study* says which cells there are, and which tables and pictures come of them.
"""

import contextlib
import functools
import inspect
import os
import sys
import time
from collections.abc import Callable, Generator, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import jax
import pandas as pd
import tyro
from rich.console import Console

from scripts.common import folder, signals
from scripts.common.checkpoints import Checkpoints, Header, Saved
from scripts.common.config import StudyConfig
from scripts.common.devices import connect, together
from scripts.common.files import UnusableError
from scripts.common.folder import RunFolder
from scripts.common.progress import Bar, console
from scripts.common.table import Table
from scripts.common.task import Cell, Row, Rows, Spent

Config = TypeVar("Config", bound=StudyConfig)


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
      if self._finished(cell) and self._has_all_lines(cell):
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
      UnusableError: if it is damaged.
    """
    return self._checkpoints(cell).raw(of_end=True)

  def state(self, cell: Cell) -> Any:
    """The final state of a finished cell; it may be given to several, which must not reuse it."""
    if self._last[0] != cell.key:
      self._train(cell, None)
    return self._last[1]

  def _checkpoints(self, cell: Cell) -> Checkpoints:
    same = {k: v for k, v in self._files.identity.items() if k not in self.config.lengths()}
    return Checkpoints(folder.checkpoints(self.path, cell.key), {**same, **cell.key})

  def _finished(self, cell: Cell) -> bool:
    return any(map(cell.owns, self._files.rows))

  def _has_all_lines(self, cell: Cell) -> bool:
    header = self._checkpoints(cell).last()
    return header is None or not self._unfit(cell, header)

  def _lines(self, cell: Cell, done: int) -> list[Row]:
    """The lines of a cell until a step."""
    name = self.study.step_name
    return [line for line in self._files.lines if cell.owns(line) and line[name] <= done]

  def _unfit(self, cell: Cell, header: Header) -> str:
    """Why a checkpoint cannot be gone on with, or nothing."""
    if (there := len(self._lines(cell, header.done))) < header.lines:
      return f"{folder.METRICS} has {there} of the {header.lines} lines that the part had then"
    if header.done > cell.steps:
      return "it is of a longer run"
    if header.done == header.steps < cell.steps and header.done not in cell.stops(0):
      return "it is of the end of a shorter run, between two evaluations"
    return ""

  def _train(self, cell: Cell, bar: Bar | None) -> None:
    bar = bar or Bar(Console(quiet=True))
    bar.show(description=cell.label, told="compiling")
    task, checkpoints = cell.make(*map(self.state, cell.needs)), self._checkpoints(cell)
    saved = checkpoints.restore(task.state, functools.partial(self._unfit, cell))
    state, seconds, done = task.state, 0.0, 0
    if saved is not None:
      state, seconds, done = saved.state, saved.header.seconds, saved.header.done
    self._begin(cell, done, saved, bar)

    def save(at: int, told: list[Any] | None = None) -> None:
      checkpoints.save(at, state, seconds, cell.steps, len(self._lines(cell, at)), told)

    if not cell.steps:  # Others may need its state all the same.
      save(0)
    with signals.at_a_step() as asked_to_stop:
      for stop in cell.stops(done):
        told, start = list[Any](), time.perf_counter()
        for t in range(done, stop):
          if asked_to_stop():
            jax.block_until_ready((state, told))
            seconds += time.perf_counter() - start
            if told or saved is None:  # There is something new.
              save(t, told)
            raise KeyboardInterrupt
          state, one = task.step(state, t)
          jax.block_until_ready(told[-1:])  # One step waits while another runs.
          if saved is not None:
            told, saved = saved.told_as(one), None
          told.append(one)
          bar.show(advance=1)
        jax.block_until_ready((state, told))
        done, seconds = stop, seconds + time.perf_counter() - start
        if cell.due(cell.every, done):
          line = {**cell.key, self.study.step_name: done, "seconds": seconds}
          values = _as_list(task.evaluate(state, told))
          self._files.add_lines([line | one for one in values])
          bar.tell(values)
        if cell.due(cell.checkpoint_every, done):
          save(done)
      if not self._finished(cell):
        spent = Spent(seconds, self._lines(cell, done))
        if rows := _as_list(task.result(state, spent)):  # What only others need has none.
          self._files.add_rows([{**cell.key, **row} for row in rows])
    self._last = (cell.key, state)

  def _begin(self, cell: Cell, done: int, saved: Saved | None, bar: Bar) -> None:
    """Says where a cell begins, and forgets the lines that it will write again."""
    bar.show(advance=done)
    for reason in saved.lost if saved else ():
      bar.say(f"{reason}; {cell.label} goes on from step {done}.")
    mine, kept = self._lines(cell, cell.steps), self._lines(cell, done)
    if mine and saved is None:
      bar.say(f"{cell.label} has no checkpoint: it starts anew.")
    if len(kept) < len(mine):
      late = [line for line in mine if line not in kept]
      self._files.keep_lines([line for line in self._files.lines if line not in late])


def _as_list(rows: Rows) -> list[Row]:
  return [dict(rows)] if isinstance(rows, Mapping) else [dict(row) for row in rows]


def run(study: Study[Config], config: Config) -> int:
  """Runs, prints and saves; returns the exit status.

  It is 0, 2 after bad input or a damaged file, 1 after one that could not be written, 130 after
  Ctrl-C and 143 after SIGTERM, with what was finished until then.
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
    return signals.status()
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
      status = signals.status()
      signals.forget()
    except UnusableError as error:
      status = error.status
      print(f"error: {error}", file=sys.stderr)
  if status:
    stopped = "Interrupted; --resume goes on." if status > 2 else "Stopped."
    terminal.print(f"{stopped} What was finished until then:")
  results = run.results()
  if len(results.rows):
    for table in study.tables(results):
      table.print(terminal)
    for remark in study.remarks(results):
      terminal.print(remark)
  try:
    # Others may have stopped at another step, disks be full, and clusters wait.
    if len(results.rows) and (not status or (status == 130 and jax.process_count() == 1)):
      with _left_out(terminal):
        study.draw(run)
    if run.config.save_results and not status and not jax.process_index():
      kept = study.room() / "results" / run.config.save_results
      files.save_results(kept, run.mine)
  except UnusableError as error:
    print(f"error: {error}", file=sys.stderr)
    return status or error.status
  terminal.print(f"{folder.METRICS}, {folder.RESULTS} and pictures are in {run.path}")
  return status


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
  signals.listen()
  try:
    status = run(told)
  except KeyboardInterrupt:  # Again, while what was finished was shown.
    status = signals.status()
  sys.stdout.flush()
  sys.stderr.flush()
  if (
    status > 2
  ):  # Interrupted. Not by way of the runtime's destructors: a compilation may still be going on.
    os._exit(status)
  sys.exit(status)
