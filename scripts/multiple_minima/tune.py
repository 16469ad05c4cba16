"""Chooses the settings of ``scripts.multiple_minima`` for hyper-cleaning.

  python -m scripts.multiple_minima.tune                        15 minutes on 2 CPU cores

Every method has a grid of 16 points (``scripts/multiple_minima/cleaning.py``) and runs each on
seeds 100 and 101, which no report uses, for the same budget of gradients as the script. The point
of the best mean test accuracy at the end of the budget is printed as what belongs into
``CHOSEN`` of ``scripts/multiple_minima/settings.py``.
"""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from scripts.common import cleaning, report
from scripts.multiple_minima import cleaning as minima_cleaning
from scripts.multiple_minima import equal_budget
from scripts.multiple_minima.cleaning import BASELINES, METHODS


@dataclasses.dataclass(frozen=True)
class Config:
  """Chooses the settings of scripts.multiple_minima on seeds that it does not report."""

  dataset: str = "digits"
  """digits or mnist."""
  methods: tuple[str, ...] = tuple(name for name in METHODS if name not in BASELINES)
  """Which methods to tune."""
  budget: int | None = None
  """Gradient evaluations, instead of the data set's default."""
  seeds: tuple[int, ...] = (100, 101)
  """Seeds."""
  data_dir: Path | None = None
  """Where tensorflow-datasets has its files."""
  output: Path = Path("runs/tune_multiple_minima.jsonl")
  """Where a line for each point goes."""


def main(config: Config) -> None:
  """Runs the grids; prints the best of each."""
  settings = minima_cleaning.DATASETS[config.dataset]
  budget = config.budget or equal_budget.BUDGETS[config.dataset]
  examples = cleaning.read(config.dataset, config.data_dir)
  data = {seed: cleaning.split(*examples, settings, 0.5, seed) for seed in config.seeds}
  with report.MetricsLog(config.output) as log:
    for method in config.methods:
      best: tuple[float, dict[str, Any]] = (-1.0, {})
      grid = METHODS[method].grid
      for values in itertools.product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        accuracies = score(method, chosen, settings, budget, data)
        log.write(method=method, **chosen, accuracies=accuracies)
        best = max(best, (float(np.mean(accuracies)), chosen), key=lambda pair: pair[0])
      print(f"{method}: {best[0]:.3f} {json.dumps(best[1])}", flush=True)


def score(
  method: str, chosen: dict[str, Any], settings: Any, budget: int, data: Any
) -> list[float]:
  """Test accuracies at the end of the budget, one for each seed."""
  program = equal_budget.make_program(
    method, chosen, settings, budget, next(iter(data.values())), num_points=1
  )
  accuracies = []
  for seed, of_seed in data.items():
    problem = minima_cleaning.make_problem(method, of_seed, settings, seed)
    state = program.init(problem)
    state = program.run(state, jax.random.key(seed), problem)
    accuracies.append(float(program.measure(state, problem)["accuracy"]))
  return accuracies


if __name__ == "__main__":
  main(tyro.cli(Config))
