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

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import jax
import pandas as pd
from pydantic import model_validator

import jaxbo
from benchmarks import measure
from scripts.common import cleaning, study, table
from scripts.common.config import FREE, Among, Count, Index, Share, StudyConfig
from scripts.common.study import Results, Run, Study
from scripts.common.table import Column, Table
from scripts.common.task import Cell, Row, Spent
from scripts.multiple_minima import plots, toys, training
from scripts.multiple_minima.methods import BASELINES, COMPARED, DATASETS, LABELS, METHODS
from scripts.multiple_minima.toys import TOYS, Trajectory
from scripts.multiple_minima.training import BUDGETS, Parts, Problem, Training, make_problem

NUM_POINTS = 15  # Of the curve of a method, until its gradients are spent.
UNIT = "everything"  # A step of it is one gradient.


class Config(StudyConfig):
  """Where the inner problem has many minima: all bilevel methods side by side."""

  smallest: ClassVar = {"methods": ("pdbo", "itd"), "toys": ("T1",), "seeds": 1, "budget": 60}

  dataset: Annotated[str, Among(DATASETS)] = "digits"
  """Of hyper-cleaning: digits are in scikit-learn's wheel, mnist is by tensorflow-datasets."""
  methods: Annotated[tuple[str, ...], Among(COMPARED)] = COMPARED
  """Which methods to run; hyper-cleaning has its baselines too. A resumed run has the same."""
  toys: Annotated[tuple[str, ...], Among(TOYS, least=0), FREE] = tuple(TOYS)
  """Which toys to run; none if nothing follows."""
  seeds: Index = 3
  """Seeds of hyper-cleaning: split, wrong labels and initial model; 0 leaves it out."""
  first_seed: Index = 0
  """The first of them. The settings were chosen on seeds 100 and 101."""
  budget: Count | None = None
  """Gradients of the inner loss for each method, instead of the data set's default."""
  corruption: Share = 0.5
  """The share of wrong training labels, in [0, 1)."""
  output_dir: Annotated[Path, FREE] = Path("runs/multiple_minima")
  """Where results go."""

  @model_validator(mode="after")
  def _something_to_run(self) -> Self:
    if not self.toys and not self.seeds:
      raise ValueError("toys must not be empty with seeds 0: nothing would be left to run")
    return self

  def num_gradients(self) -> int:
    """The gradients that each method may spend."""
    return self.budget or BUDGETS[self.dataset]


def problem_of(run: Run[Config], method: str, seed: int) -> Problem:
  """What a method is given on a seed."""
  settings = DATASETS[run.config.dataset]
  split = lambda: cleaning.split(run.data, settings, run.config.corruption, seed)
  return make_problem(method, run.shared(seed, split), settings, seed)


def parts_of(run: Run[Config], method: str) -> Parts:
  """A method with the settings chosen for it."""
  config, chosen = run.config, METHODS[method].chosen
  settings, share = DATASETS[config.dataset], config.num_gradients() / NUM_POINTS
  problem = problem_of(run, method, config.first_seed)
  return run.shared(method, lambda: Parts(method, chosen, settings, share, problem))


def measure_costs(run: Run[Config]) -> dict[str, Row]:
  """What an outer step of each method costs, and how many ``steps`` are a point of its curve.

  All are timed in turns, so that what slows the machine slows all of them.
  """
  seed, names = run.config.first_seed, (*BASELINES, *run.config.methods)
  tasks = {name: Training(parts_of(run, name), problem_of(run, name, seed), seed) for name in names}

  def some_steps(task):
    task.state, _ = task.step(task.state, 0)
    return task.state

  calls = {name: functools.partial(some_steps, task) for name, task in tasks.items()}
  timings = measure.time_together(calls, num_rounds=5, calls=1)
  return {
    name: {
      "steps": task.parts.steps,
      "gradients": task.parts.gradients,
      "seconds": timings[name].seconds / task.parts.steps,
      "temporary_bytes": task.program.temporary_bytes,
    }
    for name, task in tasks.items()
  }


def budgets_of(config: Config, costs: Any) -> dict[str, float]:
  """The gradients and the seconds that each method may spend."""
  gradients = config.num_gradients()
  return {"gradients": gradients, "seconds": gradients * costs[UNIT]["seconds"]}


class OnCleaning(Training):
  """A method on hyper-cleaning until both budgets are spent; a step is a point of its curve."""

  def __init__(self, run: Run[Config], method: str, seed: int, costs: Any, num_points: int):
    super().__init__(parts_of(run, method), problem_of(run, method, seed), seed)
    self.run, self.method, self.seed, self.num_points = run, method, seed, num_points
    self.cost, self.budgets = costs[method], budgets_of(run.config, costs)

  def evaluate(self, state: Any, told: list[Any]) -> Row:
    """What was spent and what was reached; at the end, a new model with the learnt weights."""
    point = int(told[-1])
    steps = point * self.parts.steps
    spent = {name: steps * self.cost[name] for name in self.budgets}
    line = {"steps": steps, **spent, **self.values(state)}
    if point == self.num_points:
      line["retrained"] = math.nan if self.method in BASELINES else self._retrained(state)
    return line

  def _retrained(self, state: Any) -> float:
    of_weights = functools.partial(training.retrained_accuracy, DATASETS[self.run.config.dataset])
    retrain = self.run.shared("retrain", lambda: jax.jit(of_weights))
    key = jax.random.fold_in(jax.random.key(self.seed), 2**20)
    return float(retrain(self.parts.loop.params(state).outer, key, self.problem))

  def result(self, state: Any, spent: Spent) -> Row:
    """What the gradients were enough for; the model that had seconds, and the one trained last."""
    lines, budgets = spent.lines, self.budgets
    of_gradients = within(lines, "gradients", budgets["gradients"])
    names = ("auc", "f1", "wrong_learnt", "gap", "outer_loss", "steps")
    return {
      "accuracy": of_gradients["accuracy"],
      "accuracy_at_seconds": within(lines, "seconds", budgets["seconds"])["accuracy"],
      "retrained": lines[-1]["retrained"],
      **{name: of_gradients[name] for name in names},
      "gradients_per_step": lines[0]["gradients"] / lines[0]["steps"],
      "seconds_per_step": self.cost["seconds"],
      "temporary_bytes": self.cost["temporary_bytes"],
    }


def within(lines: Sequence[Row], name: str, most: float) -> Row:
  """The last point that spent no more than that; NaN if even the first did."""
  allowed = [line for line in lines if line[name] <= most * (1 + 1e-9)]
  return allowed[-1] if allowed else dict.fromkeys(lines[0], math.nan)


COLUMNS = {
  "accuracy": Column("by gradients"),
  "accuracy_at_seconds": Column("by seconds"),
  "retrained": Column("retrained"),
  "auc": Column("AUC"),
  "wrong_learnt": Column("learnt", 2, mean_only=True),
  "gradients_per_step": Column("grad./step", 1, mean_only=True),
  "seconds_per_step": Column("ms/step", 1, 1e3, mean_only=True),
}


def on_toys(rows: pd.DataFrame) -> "pd.Series[bool]":
  """Which rows are of toys."""
  return rows.reindex(columns=["toy"])["toy"].notna()


class MultipleMinima(Study[Config]):
  """The experiment."""

  config = Config
  step_name = "point"

  def prepare(self, config: Config) -> cleaning.Read | None:
    """The examples of hyper-cleaning."""
    return cleaning.read(config.dataset, config.data_dir) if config.seeds else None

  def begin(self, run: Run[Config]) -> None:
    """What the methods of hyper-cleaning cost."""
    if run.config.seeds:
      run.note("costs", lambda: measure_costs(run))

  def cells(self, run: Run[Config]) -> Iterable[Cell]:
    """Every method on every toy, then every method and baseline on every seed of hyper-cleaning."""
    config = run.config
    for toy, method in itertools.product(config.toys, config.methods):
      yield toys.cell(toy, method)
    costs: dict[str, Row] = run.notes.get("costs", {})
    for seed in config.all_seeds():
      for method, cost in costs.items():
        steps, budgets = 0, budgets_of(config, costs)
        while any(steps * cost[name] < budget for name, budget in budgets.items()):
          steps += cost["steps"]
        num_points = steps // cost["steps"]
        make = functools.partial(OnCleaning, run, method, seed, costs, num_points)
        label = f"seed {seed}, {LABELS[method]}"
        yield Cell({"method": method, "seed": seed}, make, num_points, label, every=1)

  def tables(self, results: Results[Config]) -> Iterable[Table]:
    """The ends on the toys, and means over seeds of hyper-cleaning."""
    config, settings, toy = results.config, DATASETS[results.config.dataset], on_toys(results.rows)
    if toy.any():
      yield toys.table(results.rows[toy])
    if not toy.all():
      title = (
        f"{config.dataset}: {settings.num_train} training examples, {config.corruption:.0%} of "
        f"labels wrong; {settings.num_val} clean validation examples; hidden layer of "
        f"{settings.hidden[0]}\ntest accuracy after {config.num_gradients():,} gradients of the "
        "inner loss, and after the seconds of so many;\nlearnt: the share of wrong labels that the "
        "model gives back; mean ± standard deviation over seeds"
      )
      rows = results.rows[~toy]
      learnt = rows["auc"].mask(rows["method"].isin(BASELINES))  # Their weights are given.
      yield table.spread(title, rows.assign(auc=learnt), "method", LABELS, COLUMNS)

  def draw(self, run: Run[Config]) -> None:
    """Where the methods went on the toys, and the curves of hyper-cleaning."""
    results, trajectories = run.results(), {}
    toy = on_toys(results.rows)
    for _, row in results.rows[toy].iterrows():
      saved = run.saved(toys.cell(row["toy"], row["method"]))
      params = jaxbo.Bilevel(**saved.pop("params"))
      trajectories[row["method"], row["toy"]] = Trajectory(params, **saved)
    if trajectories:
      plots.draw_toys(trajectories, run.path / "toys.png")
    if not toy.all():
      ended = results.lines.merge(results.rows.loc[~toy, ["method", "seed"]])
      budgets = budgets_of(run.config, results.notes["costs"])
      plots.draw_cleaning(ended, budgets, run.path / "cleaning.png")


if __name__ == "__main__":
  study.main(Config, functools.partial(study.run, MultipleMinima()), __doc__)
