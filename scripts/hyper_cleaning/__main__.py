"""Data hyper-cleaning: which training labels are wrong, learnt from a small clean set.

Half of the labels are replaced by others. Each training example gets a weight, learnt so that the
model trained on the weighted examples does well on clean validation examples.

Claim, on scikit-learn's digits (1,000 training, 300 validation, 497 test examples; softmax
regression; mean of seeds 0 to 4): the weights find the wrong labels with an AUC of 0.97 (ITD), 0.96
(AID-CG), 0.98 (stocBiO) and 0.98 (ESJ, 64 directions); ITD and AID-CG come within one point of a
model trained on the truly clean examples. The whole table is in
docs/experiments/hyper_cleaning.md.

What it does not show: on so easy a task, training on the 300 validation examples alone does as
well. What is learnt here is which labels are wrong. First order does nothing at all, since the
outer loss does not depend on the weights directly: every weight stays one half.

AUC and F1 are of "this label is wrong". "Gain share" is the share of the oracle's gain over
training on everything. "ms/step" is training time for one outer step, without compilation and
evaluation; "temp. MiB" is the temporary memory that XLA plans for the compiled loop of outer steps,
beside its inputs and outputs.

  python -m scripts.hyper_cleaning                               1 minute on 2 CPU cores
  python -m scripts.hyper_cleaning --dataset mnist --seeds 1     7 minutes; a perceptron
"""

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar

import jax
import numpy as np
import pandas as pd

from scripts.common import cleaning, study, table
from scripts.common.cleaning import METHODS, CleaningData, Settings
from scripts.common.config import FREE, Among, Count, Positive, Share, StudyConfig
from scripts.common.data import Examples
from scripts.common.study import Results, Run, Study
from scripts.common.table import Column, Table
from scripts.common.task import Cell, Compiled, Program, Row, Spent
from scripts.hyper_cleaning import plots

NUM_EVALUATIONS = 20
LABELS = {name: method.label for name, method in METHODS.items()}


class Config(StudyConfig):
  """Data hyper-cleaning: learns one weight per training example from a small clean set."""

  smallest: ClassVar = {"seeds": 1, "outer_steps": 40}

  dataset: Annotated[str, Among(cleaning.DATASETS)] = "digits"
  """Digits are in scikit-learn's wheel; the others are prepared by tensorflow-datasets."""
  methods: Annotated[tuple[str, ...], Among(METHODS), FREE] = tuple(METHODS)
  """Which methods to run."""
  seeds: Count = 5
  """How many seeds; each draws the split, the wrong labels and the initial parameters. The settings
  were chosen on seeds from 100 on."""
  corruption: Share = 0.5
  """The share of wrong training labels, in [0, 1)."""
  output_dir: Annotated[Path, FREE] = Path("runs/hyper_cleaning")
  """Where results go."""
  outer_steps: Count | None = None
  """Outer steps, instead of the data set's default (as for all below)."""
  inner_steps: Count | None = None
  """Inner steps for one outer step."""
  inner_learning_rate: Positive | None = None
  """Learning rate of SGD, inside."""
  outer_learning_rate: Positive | None = None
  """Learning rate of Adam, outside, on the logits of the weights."""
  num_samples: Count | None = None
  """Directions of ESJ."""
  smoothing: Positive | None = None
  """Smoothing radius of ESJ."""

  def settings(self) -> Settings:
    """The data set's settings, with what was given instead."""
    return self.override(cleaning.DATASETS[self.dataset])

  def steps_per_call(self) -> int:
    """The outer steps between two evaluations, of about ``NUM_EVALUATIONS``: a divisor of all."""
    steps = self.settings().outer_steps
    most = -(-steps // NUM_EVALUATIONS)
    return max(divisor for divisor in range(1, most + 1) if steps % divisor == 0)


def data_of(run: Run[Config], seed: int) -> CleaningData:
  """The data of a seed."""
  settings, corruption = run.config.settings(), run.config.corruption
  split = lambda: cleaning.split(run.data, settings, corruption, seed)
  return run.shared(("data", seed), split)


class Cleaning(Compiled):
  """A method on one seed; a step is as many outer steps as there are between evaluations."""

  def __init__(self, run: Run[Config], method: str, seed: int):
    settings = run.config.settings()
    self.method, self.steps_per_call = method, run.config.steps_per_call()
    self.of_seed = data_of(run, seed)
    state, run_steps, train = cleaning.make_program(
      method, self.of_seed, settings, seed, self.steps_per_call
    )

    def step(state, t, key, train, val):
      key = jax.random.fold_in(jax.random.wrap_key_data(key), t)
      return run_steps(state, key, train, val)

    program = run.shared(method, lambda: Program(step))
    score = lambda y, examples: cleaning.accuracy(settings, y, examples)
    self._accuracy = run.shared("accuracy", lambda: jax.jit(score))
    key = jax.random.key_data(jax.random.key(seed))
    super().__init__(program, state, key, train, self.of_seed.val)
    self._test: Examples = jax.device_put(self.of_seed.test)

  def evaluate(self, state: Any, told: list[Any]) -> Row:
    """Losses and accuracy so far."""
    accuracy = float(self._accuracy(state.solution.params, self._test))
    return {"outer_loss": float(told[-1][-1]), "accuracy": accuracy}

  def result(self, state: Any, spent: Spent) -> Row:
    """What the weights say of the labels, and what they cost."""
    auc, f1 = np.nan, np.nan
    if METHODS[self.method].head is not None:
      weights = np.asarray(jax.nn.sigmoid(state.x), np.float64)
      auc, f1 = cleaning.detection_scores(weights, self.of_seed.corrupted)
    steps = len(spent.lines) * self.steps_per_call
    return {
      "outer_steps": steps,
      "test_accuracy": spent.lines[-1]["accuracy"],
      "auc": auc,
      "f1": f1,
      "seconds_per_step": spent.seconds / steps,
      "temporary_bytes": self.program.temporary_bytes,
      "compile_seconds": self.program.compile_seconds,
    }


def gain_share(rows: pd.DataFrame) -> pd.Series:
  """The share of the oracle's gain over training on everything, on the same seed."""
  accuracy = rows.set_index(["method", "seed"])["test_accuracy"].unstack("method")
  worst, best = (rows["seed"].map(accuracy.get(name, {})) for name in ("everything", "oracle"))
  return ((rows["test_accuracy"] - worst) / (best - worst)).where(best > worst)


COLUMNS = {
  "test_accuracy": Column("accuracy"),
  "gain_share": Column("gain share", 2),
  "auc": Column("AUC"),
  "f1": Column("F1"),
  "seconds_per_step": Column("ms/step", 1, 1e3),
  "temporary_bytes": Column("temp. MiB", 1, 2**-20, mean_only=True),
}


class HyperCleaning(Study[Config]):
  """The experiment."""

  config = Config
  step_name = "evaluation"

  def prepare(self, config: Config) -> cleaning.Read:
    """All examples, and the official test set where there is one."""
    return cleaning.read(config.dataset, config.data_dir)

  def cells(self, run: Run[Config]) -> Iterable[Cell]:
    """Every method on every seed."""
    steps = run.config.settings().outer_steps // run.config.steps_per_call()
    for seed in run.config.all_seeds():
      for method in run.config.methods:
        make = functools.partial(Cleaning, run, method, seed)
        label = f"seed {seed}, {LABELS[method]}"
        yield Cell({"method": method, "seed": seed}, make, steps, label, every=1)

  def tables(self, results: Results[Config]) -> Iterable[Table]:
    """Means over seeds."""
    config, settings = results.config, results.config.settings()
    batch = "all examples" if settings.batch_size is None else f"{settings.batch_size} examples"
    title = (
      f"{config.dataset}: {settings.num_train} training examples, {config.corruption:.0%} of labels"
      f" wrong; {settings.num_val} clean validation examples\n{settings.outer_steps} outer steps "
      f"of {settings.inner_steps} inner steps on {batch}; mean ± standard deviation over seeds"
    )
    rows = results.rows.assign(gain_share=gain_share(results.rows))
    yield table.spread(title, rows, "method", LABELS, COLUMNS)

  def draw(self, run: Run[Config]) -> None:
    """Accuracy against seconds, and the learnt weights of finished runs."""
    weights: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for cell in run.finished():
      method, seed = cell.key["method"], cell.key["seed"]
      if METHODS[method].head is not None:
        values = np.asarray(jax.nn.sigmoid(run.saved(cell)["x"]))
        weights.setdefault(method, []).append((values, data_of(run, seed).corrupted))
    plots.draw(run.results().lines, weights, LABELS, run.path / "hyper_cleaning.png")


if __name__ == "__main__":
  study.main(Config, functools.partial(study.run, HyperCleaning()), __doc__)
