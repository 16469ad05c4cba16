"""One rate of each method, chosen on images for validation."""

import functools
import itertools
from collections.abc import Iterable

import pandas as pd

from scripts.adversarial_training.config import Config
from scripts.adversarial_training.data import SETS
from scripts.adversarial_training.methods import LABELS, METHODS
from scripts.adversarial_training.train import Trial, Workplace
from scripts.common import tuning
from scripts.common.study import Results, Run
from scripts.common.table import Table
from scripts.common.task import Cell
from scripts.common.tuning import Choice

SEEDS = (100, 101)  # No report has them; --seeds 1 takes the first alone.
CRITERION = "tail"  # The worst case of the worst classes: what the report is about.


class Tuning(tuning.Tuning[Config]):
  """The choice of rates, for each training set on its own."""

  config = Config
  step_name = "epoch"

  def prepare(self, config: Config) -> Workplace:
    """What the report is on, too."""
    return Workplace(config)

  def cells(self, run: Run[Config]) -> Iterable[Cell]:
    """Every value of the rate of every method that has one, on every training set and seed."""
    config, seeds = run.config, SEEDS[: run.config.seeds]
    for seed, kind, method in itertools.product(seeds, config.sets, config.methods):
      rate, values = METHODS[method].rate, METHODS[method].values
      for value in values:
        rates = config.rates.but(**{str(rate): value})
        key = {"set": kind, "method": method, "rate": rate, "value": value, "seed": seed}
        make = functools.partial(Trial, run, kind, method, seed, rates)
        label = f"seed {seed}, {SETS[kind]}, {LABELS[method]}, {rate} {value:g}"
        yield Cell(key, make, config.epochs, label, every=1, checkpoint_every=1)

  def choices(self, rows: pd.DataFrame) -> Iterable[Choice]:
    """For each method on each training set the value with the highest mean."""
    names = ["set", "method", "rate", "value"]
    means = rows.groupby(names, sort=False)[CRITERION].mean().reset_index()
    best = means.groupby(names[:2], sort=False)[CRITERION].idxmax()
    for row in means.loc[best].to_dict("records"):
      label = f"{SETS[row['set']]}, {LABELS[row['method']]}"
      found = {row["rate"]: row["value"]}
      yield Choice(label, (row["set"], row["method"]), found, row[CRITERION])

  def tables(self, results: Results[Config]) -> Iterable[Table]:
    """What was chosen, of what."""
    means = results.rows.groupby(["set", "method", "value"])[CRITERION].mean()
    lines = []
    for one in self.choices(results.rows):
      [(rate, value)] = one.rates.items()
      tried = [f"{tried:g}: {score:.1f}" for tried, score in means[one.entry].items()]
      lines.append([one.label, rate, f"{value:g}", ", ".join(tried)])
    columns = ("set, method", "rate", "chosen", "RA-Tail-30 of validation images, by value")
    seeds = " and ".join(map(str, sorted(set(results.rows["seed"]))))
    yield Table(f"Rates for {results.config.name()}, by seed {seeds}", columns, lines)
