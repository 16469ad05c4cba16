"""The tables of :mod:`benchmarks.bilevel_suite`."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from benchmarks.report import hardware, markdown, number

ACCURACIES = (1e-4, 1e-6)


def cells(row: dict[str, Any]) -> list[str]:
  """A row of the table: the worse of the runs."""

  def worst(name, i, times=1.0):
    found = [run[name][i] for run in row["runs"]]
    return "-" if None in found else number(times * max(found))

  ends = [run["end"] for run in row["runs"]]
  return [
    row["method"],
    f"{row['rates'][0]:g}, {row['rates'][1]:g}",
    number(float(np.mean([run["microseconds"] for run in row["runs"]]))),
    *(worst("seconds", i) for i in range(len(ACCURACIES))),
    *(worst("steps", i, row["passes"]) for i in range(len(ACCURACIES))),
    f"{max(ends):.1e}" if np.all(np.isfinite(ends)) else "diverged",
    number(row["compile"]),
  ]


def table(rows: list[dict[str, Any]]) -> str:
  """One line for each method, the fastest to the last accuracy first."""
  columns = ["method", "rates", "us a step"]
  columns += [f"s to {accuracy:g}" for accuracy in ACCURACIES]
  columns += [f"passes to {accuracy:g}" for accuracy in ACCURACIES]

  def order(row):
    found = [max((run["seconds"][i] or np.inf) for run in row["runs"]) for i in (1, 0)]
    return *found, max(run["end"] for run in row["runs"])

  lines = [cells(row) for row in sorted(rows, key=order)]
  return markdown([*columns, "end", "compile s"], lines)


def page(results: dict[str, Any], problems: Iterable[str], methods: Iterable[str]) -> str:
  """The page of all problems; it says which of the given ones it lacks."""
  methods, lacking = list(methods), [name for name in problems if name not in results["problems"]]
  given = results["given"]
  command = "PYTHONPATH=.:models python3 -m benchmarks.bilevel_suite"
  options = f"--seeds {given['seeds']} --seconds {given['seconds']:g}"
  text = f"""# Bilevel problems on finite sums

Made by `{command} {options}`, which explains the columns.

Hardware: {hardware()}, one of them used and shared with other programs.
"""
  for name, result in results["problems"].items():
    begins = ", ".join(f"{begin:.2g}" for begin in result["begins"])
    start = f"Squared norm of the hypergradient at the start: {begins}."
    text += f"\n## {name}\n\n{result['about']} {start}\n\n{table(result['rows'])}\n"
    missing = [name for name in methods if name not in {row["method"] for row in result["rows"]}]
    if missing:
      text += f"\nNot measured yet: {', '.join(missing)}.\n"
  if lacking:
    text += f"\nProblems that are not measured yet: {', '.join(lacking)}.\n"
  return text
