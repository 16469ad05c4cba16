"""What a table of online hyperparameter optimization shows."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from scripts.common import report
from scripts.online_hyperopt.config import Config, Variant, rates_of
from scripts.online_hyperopt.runs import Run

Runs = dict[tuple[str, Variant], Run]


class Result(NamedTuple):
  """A method on a stream, one seed; a row of ``results.csv``. NaN where a number is not defined."""

  stream: str
  method: str
  window: int
  seed: int
  cumulative_loss: float
  mean_accuracy: float
  final_accuracy: float
  distance: float
  regret: float
  breakdown_share: float
  seconds_per_round: float
  state_bytes: int
  inner_learning_rate: float
  outer_learning_rate: float
  damping: float


def summarize(config: Config, runs: Runs) -> list[Result]:
  """The rows of all runs."""
  rows = []
  for (stream, variant), run in runs.items():
    rates = rates_of(config, variant)
    for i in range(config.seeds):
      rows.append(
        Result(
          stream,
          variant.method,
          variant.window,
          config.first_seed + i,
          cumulative_loss=float(run.loss[:, i].sum()),
          mean_accuracy=float(run.accuracy[:, i].mean()),
          final_accuracy=float(run.accuracy[-1, i]),
          distance=float(run.distance[i]),
          regret=float(run.regret[-1, i]),
          breakdown_share=float(run.breakdown[:, i].mean()),
          seconds_per_round=run.seconds / run.loss.size,
          state_bytes=run.state_bytes,
          inner_learning_rate=rates.inner,
          outer_learning_rate=rates.outer,
          damping=rates.damping,
        )
      )
  return rows


COLUMNS = (
  "method", "cum. loss", "bal. acc.", "at the end", "|x - x0|", "regret", "CG stops", "ms/round",
  "kept KiB",
)  # fmt: skip


def table_rows(results: Sequence[Result]) -> list[list[str]]:
  """The rows of the table of one stream, formatted: means over the seeds that did not diverge."""
  rows = []
  for variant in dict.fromkeys(Variant(result.method, result.window) for result in results):
    label = variant.label
    all_seeds = [row for row in results if (row.method, row.window) == variant]
    mine = [row for row in all_seeds if math.isfinite(row.cumulative_loss)]
    if len(mine) < len(all_seeds):
      label += f", {len(all_seeds) - len(mine)} of {len(all_seeds)} diverged"
      mine = mine or all_seeds
    spread = lambda name, digits, mine=mine: report.mean_and_spread(
      (getattr(row, name) for row in mine), digits
    )
    stops = np.mean([row.breakdown_share for row in mine])
    rows.append(
      [
        label,
        spread("cumulative_loss", 1),
        spread("mean_accuracy", 3),
        spread("final_accuracy", 3),
        spread("distance", 1),
        spread("regret", 4),
        "-" if math.isnan(mine[0].breakdown_share) else f"{stops:.0%}",
        f"{1e3 * mine[0].seconds_per_round:.2f}",
        f"{mine[0].state_bytes / 2**10:.1f}",
      ]
    )
  return rows


def without_dashes(rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
  """Columns and rows of a table, without the columns that say nothing."""
  kept = [i for i in range(len(COLUMNS)) if any(row[i] != "-" for row in rows)]
  return [COLUMNS[i] for i in kept], [[row[i] for i in kept] for row in rows]


def title(config: Config, stream: str) -> str:
  """What the numbers of a table are of."""
  return (
    f"{config.problem} of {config.model_name()} on {config.dataset}, stream {stream}: "
    f"{config.rounds} rounds of {config.batch_size} examples; mean ± standard deviation of "
    f"{config.seeds} seeds"
  )
