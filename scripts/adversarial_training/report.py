"""What runs of adversarial training say: numbers of a run, and tables of all."""

from collections.abc import Mapping, Sequence
from typing import Any

from scripts.adversarial_training.data import SETS
from scripts.common import report

Row = dict[str, Any]  # a line of metrics.jsonl, or a row of results.csv

# Columns of the table: percentages, nats and seconds.
COLUMNS = {
  "clean": "clean",
  "pgd": "PGD-20",
  "worst": "APGD worst case",
  "tail": "RA-Tail-30",
  "worst_class": "worst class",
  "tail_loss": "loss of the worst 10 %",
  "seconds_per_epoch": "s / epoch",
}


def digits(name: str) -> int:
  """How many digits a column has behind the point."""
  return 2 if name in ("tail_loss", "seconds_per_epoch") else 1


def runs_of(rows: Sequence[Row], kind: str) -> dict[str, list[Row]]:
  """The rows of a training set, by method."""
  runs: dict[str, list[Row]] = {}
  for row in rows:
    if row["set"] == kind:
      runs.setdefault(row["method"], []).append(row)
  return runs


def table(
  rows: Sequence[Row], kind: str, labels: Mapping[str, str]
) -> tuple[list[str], list[list[str]]]:
  """Columns and rows of a training set: mean and spread over seeds."""
  cells = []
  for method, mine in runs_of(rows, kind).items():
    numbers = [report.mean_and_spread((row[n] for row in mine), digits(n)) for n in COLUMNS]
    cells.append([labels[method], str(len(mine)), *numbers])
  return ["method", "seeds", *COLUMNS.values()], cells


def differences(rows: Sequence[Row], kind: str, method: str, base: str, name: str) -> list[float]:
  """A number of a method minus that of ``base``, for each seed that has both."""
  runs = runs_of(rows, kind)
  of_base = {row["seed"]: row[name] for row in runs.get(base, [])}
  return [
    row[name] - of_base[row["seed"]] for row in runs.get(method, []) if row["seed"] in of_base
  ]


def difference_table(
  rows: Sequence[Row], kind: str, base: str, labels: Mapping[str, str]
) -> tuple[list[str], list[list[str]]]:
  """Columns and rows: what methods gain over ``base``, in pairs of runs of one seed."""
  names = [name for name in COLUMNS if name != "seconds_per_epoch"]
  cells = []
  for method in runs_of(rows, kind):
    if method != base:
      gains = [
        report.mean_and_spread(differences(rows, kind, method, base, name), digits(name))
        for name in names
      ]
      cells.append([labels[method], *gains])
  return [f"minus {labels[base]}", *(COLUMNS[name] for name in names)], cells


def doubts(rows: Sequence[Row], labels: Mapping[str, str]) -> list[str]:
  """What each run's robust accuracies are doubted for, a line a run."""
  return [
    f"{SETS[row['set']]}, {labels[row['method']]}, seed {row['seed']}: {row['doubts']}"
    for row in rows
    if row["doubts"]
  ]
