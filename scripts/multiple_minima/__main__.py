"""Where the inner problem has many minima: all bilevel methods, on toys and on hyper-cleaning.

Methods with a response (ITD, AID-CG, ESJ) differentiate the inner minimum that the inner solver
happens to find; methods on the value function (PDBO, Proximal-PDBO, BOME, V-PBGD, F2SA) move the
inner parameters as well, to the inner minimum that is best for the outer loss.

1. Four toys with closed forms (``scripts/multiple_minima/toys.py``).
2. Hyper-cleaning with a perceptron that has more parameters than there are examples, so that it can
   fit every label, right or wrong. Each method gets the same number of gradients of the inner loss
   (operations of a step, in units of one such gradient) and the same number of seconds (time of a
   step, all methods measured in turns). "Retrained" is a new model trained with the learnt weights
   alone: the model of a value-function method has seen the validation examples.

Settings were chosen on seeds 100 and 101 by ``scripts/multiple_minima/tune.py``; the table is of
others. Numbers are in docs/experiments/multiple_minima.md.

  python -m scripts.multiple_minima                              a minute and a half on 2 CPU cores
  python -m scripts.multiple_minima --dataset mnist --toys       20 minutes; 5,000 examples, no toys
  ... --resume                                                   goes on where a run was stopped
"""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro
from rich.console import Console
from rich.progress import Progress

from scripts.common import cleaning, report
from scripts.multiple_minima import cleaning as minima_cleaning
from scripts.multiple_minima import equal_budget
from scripts.multiple_minima import plots as minima_plots
from scripts.multiple_minima import toys as toy_problems
from scripts.multiple_minima.cleaning import BASELINES, METHODS
from scripts.multiple_minima.equal_budget import Cells, Cost
from scripts.multiple_minima.settings import CHOSEN
from scripts.multiple_minima.toys import LABELS, TOYS, Trajectory

METRICS, COSTS, CSV = "metrics.jsonl", "costs.json", "results.csv"
PICTURES = "toys.png", "cleaning.png"


@dataclasses.dataclass(frozen=True)
class Config:
  """Where the inner problem has many minima: all bilevel methods side by side."""

  dataset: str = "digits"
  """Of hyper-cleaning: digits (in scikit-learn's wheel) or mnist (by tensorflow-datasets)."""
  methods: tuple[str, ...] = tuple(LABELS)
  """Which methods to run; hyper-cleaning has its baselines too."""
  toys: tuple[str, ...] = tuple(TOYS)
  """Which toys to run; none if nothing follows."""
  seeds: int = 3
  """Seeds of hyper-cleaning: split, wrong labels and initial model; 0 leaves it out."""
  first_seed: int = 0
  """The first of them. The settings were chosen on seeds 100 and 101."""
  budget: int | None = None
  """Gradients of the inner loss for each method, instead of the data set's default."""
  corruption: float = 0.5
  """The share of wrong training labels, in [0, 1)."""
  resume: bool = False
  """Goes on from the seeds and methods that an earlier run finished in output_dir."""
  data_dir: Path | None = None
  """Where tensorflow-datasets has its files, instead of TFDS_DATA_DIR or ~/tensorflow_datasets."""
  output_dir: Path = Path("runs/multiple_minima")
  """Where results go. Files of an earlier run there are replaced, unless it is resumed."""

  def check(self) -> None:
    """Raises ``ValueError`` for what cannot run."""
    for name, allowed in (("methods", LABELS), ("toys", TOYS)):
      value = getattr(self, name)
      if not set(value) <= set(allowed):
        raise ValueError(f"{name} must be among {', '.join(allowed)}; got {' '.join(value)}")
      if len(set(value)) < len(value):
        raise ValueError(f"{name} must name each once, got {' '.join(value)}")
    if self.dataset not in CHOSEN:
      raise ValueError(f"dataset must be one of {', '.join(CHOSEN)}; got {self.dataset!r}")
    if not self.methods:
      raise ValueError(f"methods must be among {', '.join(LABELS)}; got none")
    if not 0 <= self.corruption < 1:
      raise ValueError(f"corruption must be in [0, 1), got {self.corruption}")
    for name in ("seeds", "first_seed"):
      if getattr(self, name) < 0:
        raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
    if self.budget is not None and self.budget < 1:
      raise ValueError(f"budget must be at least 1, got {self.budget}")
    if not self.toys and not self.seeds:
      raise ValueError("toys must not be empty with seeds 0: nothing would be left to run")

  def identity(self) -> dict[str, Any]:
    """What a resumed run must have in common with the run that it continues."""
    settings = {
      "settings": repr(minima_cleaning.DATASETS[self.dataset]),
      "chosen": CHOSEN[self.dataset],
    }
    run = {"methods": list(self.methods), "budget": self.num_gradients()}
    return json.loads(json.dumps(settings | run | {"corruption": self.corruption}))

  def num_gradients(self) -> int:
    """The gradients that each method may spend."""
    return self.budget or equal_budget.BUDGETS[self.dataset]


Trajectories = dict[tuple[str, str], Trajectory]  # by method and toy


class Result(NamedTuple):
  """A method on one seed; a row of ``results.csv``. NaN where a number means nothing.

  ``accuracy`` and all that has no name of its own is at the end of the budget of gradients;
  ``accuracy_at_seconds`` at that of seconds. ``retrained`` is with the weights of the last step.
  """

  method: str
  seed: int
  accuracy: float
  accuracy_at_seconds: float
  retrained: float
  auc: float
  f1: float
  wrong_learnt: float
  gap: float
  outer_loss: float
  steps: float
  gradients_per_step: float
  seconds_per_step: float
  temporary_bytes: int


def run_toys(config: Config, progress: Progress, trajectories: Trajectories) -> None:
  """Runs the methods on the toys; fills ``trajectories`` as it goes."""
  bar = progress.add_task("toys", total=len(config.toys) * len(config.methods), loss="")
  for toy in config.toys:
    for method in config.methods:
      progress.update(bar, description=f"{toy}, {LABELS[method]}")
      trajectories[method, toy] = toy_problems.run(method, TOYS[toy])
      progress.advance(bar)


def toy_rows(trajectories: Trajectories) -> list[list[str]]:
  """For each method: the distance to the solution and the gap at the end, toy by toy."""
  rows: dict[str, list[str]] = {}
  for (method, toy), (params, gap, _) in trajectories.items():
    end = np.concatenate([np.ravel(leaf[-1]) for leaf in params])
    optimum = np.concatenate([np.ravel(part) for part in TOYS[toy].optimum])
    row = rows.setdefault(method, [LABELS[method]])
    row += [f"{np.linalg.norm(end - optimum):.3f}", f"{gap[-1]:.1e}"]
  return list(rows.values())


def summarize(cells: Cells, costs: Mapping[str, Cost], budget: float) -> list[Result]:
  """The rows of all runs that ended."""
  limit = budget * costs[equal_budget.UNIT].seconds
  results = []
  for (method, seed), points in cells.items():
    point = equal_budget.within(points, "gradients", budget)
    results.append(
      Result(
        method=method,
        seed=seed,
        accuracy=point["accuracy"],
        accuracy_at_seconds=equal_budget.within(points, "seconds", limit)["accuracy"],
        retrained=points[-1]["retrained"],
        auc=point["auc"],
        f1=point["f1"],
        wrong_learnt=point["wrong_learnt"],
        gap=point["gap"],
        outer_loss=point["outer_loss"],
        steps=point["steps"],
        gradients_per_step=points[0]["gradients"] / points[0]["steps"],
        seconds_per_step=costs[method].seconds,
        temporary_bytes=costs[method].temporary_bytes,
      )
    )
  return results


COLUMNS = [
  "method",
  "by gradients",
  "by seconds",
  "retrained",
  "AUC",
  "learnt",
  "grad./step",
  "ms/step",
]


def table_rows(results: Sequence[Result]) -> list[list[str]]:
  """The rows of the table, formatted: means over seeds."""
  rows = []
  for method in dict.fromkeys(result.method for result in results):
    mine = [result for result in results if result.method == method]
    spread = lambda name, digits=3, mine=mine: report.mean_and_spread(
      (getattr(result, name) for result in mine), digits
    )
    learns = method not in BASELINES
    rows.append(
      [
        METHODS[method].label,
        spread("accuracy"),
        spread("accuracy_at_seconds"),
        spread("retrained") if learns else "-",
        spread("auc") if learns else "-",
        report.mean_and_spread([float(np.mean([result.wrong_learnt for result in mine]))], 2),
        f"{mine[0].gradients_per_step:.1f}",
        f"{1e3 * mine[0].seconds_per_step:.1f}",
      ]
    )
  return rows


def title(config: Config) -> str:
  """What the numbers are of."""
  settings = minima_cleaning.DATASETS[config.dataset]
  return (
    f"{config.dataset}: {settings.num_train} training examples, {config.corruption:.0%} of labels "
    f"wrong; {settings.num_val} clean validation examples; hidden layer of {settings.hidden[0]}\n"
    f"test accuracy after {config.num_gradients():,} gradients of the inner loss, and after the "
    "seconds of so many;\nlearnt: the share of wrong labels that the model gives back; mean ± "
    "standard deviation over seeds"
  )


def prepare_output(config: Config) -> tuple[Cells, dict[str, Cost]]:
  """Starts the files of a run, or reads what the run that goes on has finished."""
  if config.resume:
    lines = report.read_run(config.output_dir, config.identity(), METRICS)
    path = config.output_dir / COSTS
    costs = json.loads(path.read_text()) if path.exists() else {}
    return equal_budget.finished(lines), {name: Cost(**cost) for name, cost in costs.items()}
  with report.start_output(config.output_dir, METRICS, stale=(CSV, COSTS, *PICTURES)):
    identity = json.dumps(config.identity(), indent=1) + "\n"
    (config.output_dir / "config.json").write_text(identity)
  return {}, {}


def run_and_report(config: Config) -> int:
  """Runs, prints and saves; returns the exit status."""
  with report.bad_input():
    config.check()
    examples = cleaning.read(config.dataset, config.data_dir) if config.seeds else None
    cells, costs = prepare_output(config)
  console, status = report.console(), 0
  trajectories: Trajectories = {}
  earlier = [point for points in cells.values() for point in points]
  log = report.MetricsLog(config.output_dir / METRICS, map(report.jsonable, earlier))
  with log, report.progress_bar(console) as progress:
    try:
      run_toys(config, progress, trajectories)
      if examples:
        run_cleaning(config, examples, cells, costs, log, progress)
    except KeyboardInterrupt:
      status = 130
  if status:
    console.print("Interrupted; --resume goes on. What was measured until then:")
  print_and_draw(config, console, trajectories, cells, costs)
  return status


def run_cleaning(
  config: Config, examples: tuple[Any, Any], cells: Cells, costs: Any, log: Any, bar: Any
) -> None:
  """Fills ``cells`` and ``costs``."""
  settings = minima_cleaning.DATASETS[config.dataset]
  seeds = range(config.first_seed, config.first_seed + config.seeds)
  data = {seed: cleaning.split(*examples, settings, config.corruption, seed) for seed in seeds}
  chosen = {name: CHOSEN[config.dataset].get(name, {}) for name in (*BASELINES, *config.methods)}
  path = config.output_dir / COSTS
  budget = config.num_gradients()
  equal_budget.compare(chosen, settings, budget, data, cells, costs, path, log, bar)


def print_and_draw(
  config: Config, console: Console, trajectories: Trajectories, cells: Cells, costs: Any
) -> None:
  """Prints the tables and writes the pictures of what there is."""
  if trajectories:
    toys = dict.fromkeys(toy for _, toy in trajectories)
    columns = ["method", *(f"{toy} {what}" for toy in toys for what in ("distance", "gap"))]
    text = "Toys: distance to the solution, and gap g(x, y) - g*(x), at the end"
    report.print_table(console, text, columns, toy_rows(trajectories))
    minima_plots.draw_toys(trajectories, config.output_dir / PICTURES[0])
  if cells:
    results = summarize(cells, costs, config.num_gradients())
    report.write_csv(config.output_dir / CSV, [result._asdict() for result in results])
    report.print_table(console, title(config), COLUMNS, table_rows(results))
    limit = config.num_gradients() * costs[equal_budget.UNIT].seconds
    minima_plots.draw_cleaning(
      cells, config.num_gradients(), limit, config.output_dir / PICTURES[1]
    )
  console.print(f"Files are in {config.output_dir}")


def main(config: Config) -> int:
  """Runs, prints and saves. Returns the exit status: 130 if interrupted, with what was measured."""
  return report.exit_status(run_and_report, config)


if __name__ == "__main__":
  sys.exit(main(tyro.cli(Config)))
