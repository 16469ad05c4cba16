"""Where the inner problem has many minima: all bilevel methods, on toys and on hyper-cleaning.

Methods with a response (ITD, AID-CG, ESJ) differentiate the inner minimum that the inner solver
happens to find; methods on the value function (PDBO, Proximal-PDBO, BOME, V-PBGD, F2SA) move the
inner parameters as well, to the inner minimum that is best for the outer loss.

1. Four toys with closed forms (``scripts/multiple_minima/toys.py``).
2. Hyper-cleaning with a perceptron that has more parameters than there are examples, so that it can
   fit every label, right or wrong. Each method gets the same number of gradients of the inner loss
   (operations of a step, in units of one such gradient). "Retrained" is a new model trained with
   the learnt weights alone: the model of a value-function method has seen the clean examples. A row
   without weights keeps the half of the training examples on which its model has smaller losses.

The settings in scripts/multiple_minima/rates.json were chosen with ``--tune``, from 16 points for
each method, on a part of the data that no report uses, by the retrained accuracy on validation
examples that no loss saw. Numbers are in docs/experiments/multiple_minima.md.

  python -m scripts.multiple_minima                                  3 minutes on one core
  python -m scripts.multiple_minima --dataset mnist --toys           5,000 examples, no toys
  python -m scripts.multiple_minima --slacks 0.001 0.01 0.1 --toys   PDBO by its slack
  python -m scripts.multiple_minima --tune --seeds 3                 writes rates.json in output_dir
  ... --resume                                                       goes on where a run was stopped
"""

import functools
import itertools
from collections.abc import Iterable
from dataclasses import replace

import pandas as pd

import jaxbo
from scripts.common import cleaning, study, table
from scripts.common.study import Results, Run, Study
from scripts.common.table import Column, Table
from scripts.common.task import Cell, Row
from scripts.multiple_minima import plots, toys
from scripts.multiple_minima.config import Config, read
from scripts.multiple_minima.methods import DATASETS, LABELS
from scripts.multiple_minima.toys import Trajectory
from scripts.multiple_minima.training import Training
from scripts.multiple_minima.tuning import Tuning

TARGETS = {"retrained": Column("retrained"), "accuracy": Column("by gradients")}
COLUMNS = TARGETS | {
  "auc": Column("AUC"),
  "wrong_learnt": Column("learnt", 2, mean_only=True),
  "steps": Column("steps", 0, mean_only=True),
  "gradients_per_step": Column("grad./step", 1, mean_only=True),
}
OF_SLACK = TARGETS | {
  "auc": COLUMNS["auc"],
  "wrong_learnt": COLUMNS["wrong_learnt"],
  "gap": Column("violation", 4),
  "dual": Column("multiplier", 3),
}


def on_toys(rows: pd.DataFrame) -> "pd.Series[bool]":
  """Which rows are of toys."""
  return rows.reindex(columns=["toy"])["toy"].notna()


class MultipleMinima(Study[Config]):
  """The experiment."""

  config = Config

  def depends_on(self, config: Config) -> Row:
    """The settings that were chosen."""
    return {"rates": config.chosen()}

  def prepare(self, config: Config) -> cleaning.Read | None:
    """The examples of hyper-cleaning; every method must have settings."""
    if config.seeds:
      config.variants()
    return read(config)

  def cells(self, run: Run[Config]) -> Iterable[Cell]:
    """Every method on every toy, then every method and baseline on every seed of hyper-cleaning."""
    config = run.config
    for toy, method in itertools.product(config.toys, config.methods):
      yield toys.cell(toy, method)
    for seed in config.all_seeds():
      for name, (method, chosen) in config.variants().items():
        make, label = functools.partial(Training, run, method, chosen, seed), LABELS.get(name, name)
        yield Cell({"method": name, "seed": seed}, make, 1, f"seed {seed}, {label}")

  def tables(self, results: Results[Config]) -> Iterable[Table]:
    """The ends on the toys; means over seeds of hyper-cleaning, and differences to PDBO."""
    config, settings, toy = results.config, DATASETS[results.config.dataset], on_toys(results.rows)
    if toy.any():
      yield toys.table(results.rows[toy])
    rows = results.rows[~toy]
    if not len(rows):
      return
    title = (
      f"{config.dataset}: {settings.num_train} training examples, {config.corruption:.0%} of their "
      f"labels wrong; {settings.num_val} clean examples; hidden layer of {settings.hidden[0]}; "
      f"{config.budget:,} gradients; test accuracy"
    )
    if config.slacks:
      yield table.spread(title, rows, "method", str, OF_SLACK, "PDBO")
      return
    yield table.spread(title, rows, "method", LABELS, COLUMNS)
    pairs = {name: replace(column, interval=True) for name, column in TARGETS.items()}
    title = f"{config.dataset}: test accuracy in pairs of one seed, 95 % intervals"
    yield table.paired(title, rows, "method", "pdbo", LABELS, pairs)

  def draw(self, run: Run[Config]) -> None:
    """Where the methods went on the toys, and how far each is from PDBO on hyper-cleaning."""
    rows, trajectories = run.results().rows, {}
    toy = on_toys(rows)
    for _, row in rows[toy].iterrows():
      saved = run.saved(toys.cell(row["toy"], row["method"]))
      params = jaxbo.Bilevel(**saved.pop("params"))
      trajectories[row["method"], row["toy"]] = Trajectory(params, **saved)
    if trajectories:
      plots.draw_toys(trajectories, run.path / "toys.png")
    if "pdbo" in set(rows.loc[~toy, "method"]):
      plots.draw_cleaning(rows[~toy], run.path / "cleaning.png")


def run(config: Config) -> int:
  """Runs the experiment, or chooses settings; returns the exit status."""
  return study.run(Tuning() if config.tune else MultipleMinima(), config)


if __name__ == "__main__":
  study.main(Config, run, __doc__)
