"""What a run shows while it goes on: a console, and one bar for all of its cells."""

from collections.abc import Sequence
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from scripts.common.task import Row


def console() -> Console:
  """A console that does not break tables when the output goes to a file; of process 0 alone."""
  quiet = jax.process_index() > 0
  return Console(quiet=quiet, width=None if Console().is_terminal else 160)


class Bar(Progress):
  """A bar of steps with the name of the cell and its last numbers."""

  def __init__(self, console: Console):
    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    super().__init__("{task.description}", *columns, "{task.fields[told]}", console=console)
    self._all = self.add_task("", total=None, told="")

  def show(self, **changes: Any) -> None:
    """Changes what rich's ``update`` knows: ``description``, ``total``, ``advance``."""
    self.update(self._all, **changes)

  def say(self, sentence: str) -> None:
    """Prints a sentence above the bar."""
    self.console.print(sentence, markup=False, highlight=False)

  def tell(self, lines: Sequence[Row]) -> None:
    """Shows the numbers of the last line."""
    if lines:
      numbers = [(name, value) for name, value in lines[-1].items() if isinstance(value, float)]
      told = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in numbers[:3])
      self.show(told=told)
