"""What a run shows while it goes on: a console, and one bar for all of its cells."""

from collections.abc import Sequence
from typing import Any, Self

import jax
from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  TextColumn,
  TimeRemainingColumn,
)


def console() -> Console:
  """A console that does not break tables when the output goes to a file; of process 0 alone."""
  plain = Console(quiet=jax.process_index() > 0)
  return plain if plain.is_terminal else Console(width=160, quiet=plain.quiet)


class Bar:
  """A bar of steps with the name of the cell and its last numbers."""

  def __init__(self, console: Console):
    self._progress = Progress(
      TextColumn("{task.description}"),
      BarColumn(),
      MofNCompleteColumn(),
      TimeRemainingColumn(),
      TextColumn("{task.fields[told]}"),
      console=console,
    )
    self._task = self._progress.add_task("", total=None, told="")

  @classmethod
  def silent(cls) -> Self:
    """A bar that prints nothing."""
    return cls(Console(quiet=True))

  def total(self, steps: int) -> None:
    """Says how many steps there are."""
    self._progress.update(self._task, total=steps)

  def label(self, text: str) -> None:
    """Names the cell that runs."""
    self._progress.update(self._task, description=text, told="compiling")

  def advance(self, steps: int = 1) -> None:
    """Counts steps."""
    self._progress.advance(self._task, steps)

  skip = advance

  def tell(self, lines: Sequence[dict[str, Any]]) -> None:
    """Shows the numbers of the last line."""
    if lines:
      numbers = [(name, value) for name, value in lines[-1].items() if isinstance(value, float)]
      told = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in numbers[:3])
      self._progress.update(self._task, told=told)

  def __enter__(self) -> Self:
    self._progress.start()
    return self

  def __exit__(self, *exc_info: Any) -> None:
    self._progress.stop()
