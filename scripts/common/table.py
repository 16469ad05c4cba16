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


def half_width(values: Sequence[float]) -> float:
  """Half of the 95 % interval of the mean of two values or more, by Student's t."""
  from scipy import stats

  quantile: Any = stats.t.ppf(0.975, len(values) - 1)
  return float(quantile * np.std(values, ddof=1) / math.sqrt(len(values)))


@dataclass(frozen=True)
class Column:
  """A column of a table."""

  title: str
  digits: int = 3  # Behind the point.
  factor: float = 1.0  # Of the unit that it is shown in.
  mean_only: bool = False  # Its spread says nothing.
  interval: bool = False  # The spread is half of a 95 % interval of the mean, by Student's t.

  def cell(self, values: Iterable[Any]) -> str:
    """``mean ± sample standard deviation`` of the finite values; a dash if there is none."""
    finite = [self.factor * v for v in values if v is not None and math.isfinite(v)]
    if not finite:
      return "-"
    mean = f"{np.mean(finite):.{self.digits}f}"
    if len(finite) == 1 or self.mean_only:
      return mean
    spread = half_width(finite) if self.interval else np.std(finite, ddof=1)
    return f"{mean} ± {spread:.{self.digits}f}"


def spread(
  title: str,
  rows: pd.DataFrame,
  by: str | list[str],
  label: Callable[[Any], str] | Mapping[Any, str],
  columns: Mapping[str, Column],
  head: str = "method",
) -> Table:
  """Mean and spread of the columns over the runs of each group, with how many runs it has."""
  text = label.__getitem__ if isinstance(label, Mapping) else label
  body = [
    [text(group), str(len(mine)), *(c.cell(mine[name]) for name, c in columns.items())]
    for group, mine in rows.groupby(by, sort=False)
  ]
  return Table(title, [head, "seeds", *(column.title for column in columns.values())], body)


def differences(rows: pd.DataFrame, by: str, baseline: Any) -> pd.DataFrame:
  """The numbers of ``rows`` minus those of the baseline's run of the same seed."""
  numbers = rows.set_index([by, "seed"]).select_dtypes("number")
  base = numbers[numbers.index.get_level_values(by) == baseline].droplevel(by)
  mine = numbers[numbers.index.isin(base.index, level="seed")]
  return mine.sub(base, level="seed").reset_index()


def paired(
  title: str,
  rows: pd.DataFrame,
  by: str,
  baseline: Any,
  label: Mapping[Any, str],
  columns: Mapping[str, Column],
) -> Table:
  """Differences to the baseline between runs of one seed: mean and spread."""
  gains = differences(rows, by, baseline)
  gains = gains[gains[by] != baseline]
  return spread(title, gains, by, label, columns, f"minus {label[baseline]}")
