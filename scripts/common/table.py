"""Tables of runs: means with their spread over seeds, and differences between runs of one seed."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from rich import table as rich_table
from rich.console import Console


@dataclass(frozen=True)
class Table:
  """A table whose first column is text and whose others are numbers."""

  title: str
  columns: Sequence[str]
  rows: Sequence[Sequence[str]]

  def print(self, console: Console) -> None:
    """For the terminal."""
    table = rich_table.Table(title=self.title, title_justify="left")
    for i, column in enumerate(self.columns):
      table.add_column(column, justify="left" if i == 0 else "right")
    for row in self.rows:
      table.add_row(*row)
    console.print(table)

  def markdown(self) -> str:
    """For a page."""
    lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.rows]
    text = lambda cell: cell.replace("|", r"\|")
    return "\n".join(f"| {' | '.join(map(text, line))} |" for line in lines)

  def without_dashes(self) -> "Table":
    """The same without the columns that say nothing."""
    kept = [i for i in range(len(self.columns)) if any(row[i] != "-" for row in self.rows)]
    pick = lambda row: [row[i] for i in kept]
    return Table(self.title, pick(self.columns), [pick(row) for row in self.rows])


@dataclass(frozen=True)
class Column:
  """A column of a table."""

  title: str
  digits: int = 3  # Behind the point.
  factor: float = 1.0  # Of the unit that it is shown in.
  mean_only: bool = False  # Its spread says nothing.

  def cell(self, values: Iterable[Any]) -> str:
    """``mean ± sample standard deviation`` of the finite values; a dash if there is none."""
    finite = [self.factor * v for v in values if v is not None and math.isfinite(v)]
    if not finite:
      return "-"
    mean = f"{np.mean(finite):.{self.digits}f}"
    if len(finite) == 1 or self.mean_only:
      return mean
    return f"{mean} ± {np.std(finite, ddof=1):.{self.digits}f}"


Label = Callable[[Any], str] | Mapping[Any, str]


def spread(
  title: str,
  rows: pd.DataFrame,
  by: str | list[str],
  label: Label,
  columns: Mapping[str, Column],
  head: str = "method",
) -> Table:
  """Mean and spread of the columns over the runs of each group, with how many runs it has."""
  body = [
    [_text(label, group), str(len(mine)), *(c.cell(mine[name]) for name, c in columns.items())]
    for group, mine in rows.groupby(by, sort=False)
  ]
  return Table(title, [head, "seeds", *(column.title for column in columns.values())], body)


def differences(rows: pd.DataFrame, by: str, baseline: Any, pairs: list[str]) -> pd.DataFrame:
  """The numbers of ``rows`` minus those of the baseline's run of the same pair."""
  numbers = rows.set_index([by, *pairs]).select_dtypes("number")
  if baseline not in set(rows[by]):
    return rows.iloc[:0]
  base = numbers.xs(baseline, level=by).reset_index()
  mine = numbers.reset_index().merge(base, on=pairs, suffixes=("", "_of_base"))
  for name in numbers.columns:
    mine[name] -= mine[f"{name}_of_base"]
  return mine[[by, *pairs, *numbers.columns]]


def paired(
  title: str,
  rows: pd.DataFrame,
  by: str,
  baseline: Any,
  label: Label,
  columns: Mapping[str, Column],
  pairs: Sequence[str] = ("seed",),
) -> Table:
  """Differences to the baseline between runs of one seed: mean and spread."""
  gains = differences(rows, by, baseline, list(pairs))
  gains = gains[gains[by] != baseline]
  head = f"minus {_text(label, baseline)}"
  return spread(title, gains, by, label, columns, head)


def _text(label: Label, group: Any) -> str:
  return label[group] if isinstance(label, Mapping) else label(group)
