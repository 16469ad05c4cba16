"""Data hyper-cleaning: which training labels are wrong, learned from a small clean set.

Half of the labels are replaced: by the next class, as by an annotator who confuses two classes
("systematic"), or by any other class ("uniform"). Each training example gets a weight, learned so
that a model trained on the weighted examples does well on the clean examples. Then every row of the
table, including the simple choices, trains the same model from scratch: on the examples that it
keeps (a weight of at least one half) and on the clean ones.

The simple choices are: the clean examples only; everything; the examples with the smallest losses
under a model of everything, or of the clean examples (they are told how many labels are right, and
keep that many; the responses are not told); confident learning by cleanlab; and an oracle, which
knows the wrong labels.

docs/experiments/hyper_cleaning.md has the tables, and says where bilevel optimization pays here and
where it does not. First order learns nothing and keeps everything, because the outer loss does not
depend on the weights directly.

AUC and F1 score the detection of wrong labels. "ms/step" is the training time of one outer step of
20 inner steps, without compilation and evaluation; "temp. MiB" is the temporary memory that XLA
plans for the compiled loop of outer steps, beside its inputs and outputs.

  python -m scripts.hyper_cleaning                               1 minute on 2 CPU cores
  python -m scripts.hyper_cleaning --noises systematic uniform --num-clean 20 50 100 500
                                   --seeds 20                    20 minutes on one core
  python -m scripts.hyper_cleaning --dataset mnist --seeds 1 --num-clean 1000     a perceptron
"""

import functools
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import jax
import numpy as np
import pandas as pd
from pydantic import model_validator

from scripts.common import cleaning, study, table
from scripts.common.cleaning import METHODS, CleaningData, Settings
from scripts.common.config import FREE, Among, Count, Positive, Several, Share, StudyConfig
from scripts.common.data import Examples
from scripts.common.study import Results, Run, Study
from scripts.common.table import Column, Table
from scripts.common.task import Cell, Compiled, Program, Row, Spent, Task
from scripts.hyper_cleaning import plots, selection
from scripts.hyper_cleaning.selection import SELECTIONS, Problem

NUM_CALLS = 10
LABELS = {name: label for name, (label, _) in SELECTIONS.items()} | {
  name: method.label for name, method in METHODS.items()
}
BASELINE = "small_loss_clean"
SCORED = ("small_loss", "small_loss_clean", "confident")  # Choices that say which labels are wrong.


class Config(StudyConfig):
  """Data hyper-cleaning: learns one weight per training example from a small clean set."""

  smallest: ClassVar = {"seeds": 1, "outer_steps": 10, "num_clean": (50,), "num_samples": 8}

  dataset: Annotated[str, Among(cleaning.DATASETS)] = "digits"
  """The data set. Digits come with scikit-learn; tensorflow-datasets prepares the others."""
  methods: Annotated[tuple[str, ...], Among(LABELS), FREE] = tuple(LABELS)
  """Which rows the tables have."""
  num_clean: Annotated[Several[Count], FREE] = (20, 100, 500)
  """How many clean examples there are. A resumed run may change these numbers, noises and seeds."""
  noises: Annotated[Several[str], Among(cleaning.NOISES), FREE] = ("systematic",)
  """How labels are wrong: systematic (the next class) or uniform (any other class)."""
  seeds: Count = 3
  """How many seeds; each draws the split, the wrong labels and the initial parameters. The settings
  were chosen on seeds from 100 on."""
  corruption: Share = 0.5
  """The share of wrong training labels, in [0, 1)."""
  output_dir: Annotated[Path, FREE] = Path("runs/hyper_cleaning")
  """Where results go."""
  outer_steps: Count | None = None
  """Outer steps, instead of the data set's default (as for all below)."""
  inner_steps: Count | None = None
  """Inner steps in one outer step."""
  inner_learning_rate: Positive | None = None
  """Learning rate of the inner SGD."""
  outer_learning_rate: Positive | None = None
  """Learning rate of the outer Adam, on the logits of the weights."""
  num_samples: Count | None = None
  """Directions of ESJ."""
  smoothing: Positive | None = None
  """Smoothing radius of ESJ."""

  @model_validator(mode="after")
  def clean_examples_are_there(self) -> Self:
    """Refuses more clean examples than there are."""
    most = self.settings().num_val
    if max(self.num_clean) > most:
      raise ValueError(f"num_clean should be at most {most}, got {max(self.num_clean)}")
    return self

  def settings(self) -> Settings:
    """The data set's settings, with what was given instead."""
    return self.override(cleaning.DATASETS[self.dataset])

  def in_full(self) -> dict[str, Any]:
    """The settings."""
    return self.settings_in_full(settings=self.settings())

  def steps_per_call(self) -> int:
    """The outer steps of a program, of which about ``NUM_CALLS`` run: a divisor of all."""
    steps = self.settings().outer_steps
    most = -(-steps // NUM_CALLS)
    return max(divisor for divisor in range(1, most + 1) if steps % divisor == 0)


def data_of(run: Run[Config], noise: str, clean: int, seed: int) -> CleaningData:
  """The data of a seed: the first so many of its clean examples, and none in the other places."""
  settings, corruption = run.config.settings(), run.config.corruption
  split = lambda: cleaning.split(run.data, settings, corruption, seed, noise)
  whole = run.shared(("data", noise, seed), split)
  labels = np.where(np.arange(settings.num_val) < clean, whole.val.labels, -1)
  return whole._replace(val=Examples(whole.val.images, labels))


class Kept:
  """The training that follows every choice of examples, for one seed."""

  def __init__(self, run: Run[Config], noise: str, clean: int, seed: int):
    self.settings, self.data = run.config.settings(), data_of(run, noise, clean, seed)
    self.pool: Examples = jax.device_put(selection.pooled(self.data))
    self.key = jax.random.key(seed)
    self._retrain = run.shared(
      "retrain", lambda: jax.jit(functools.partial(selection.retrain, self.settings))
    )
    score = functools.partial(cleaning.accuracy, self.settings)
    self._accuracy = run.shared("accuracy", lambda: jax.jit(score))

  def retrain(self, kept: np.ndarray) -> Any:
    """The model of the clean examples and of those that are kept, bool ``[num_train]``."""
    weights = np.concatenate([kept, self.data.val.labels >= 0]).astype(np.float32)
    y = cleaning.init_params(self.settings, self.pool.images.shape[1], self.key)
    return self._retrain(y, self.pool, weights, self.key)

  def accuracy(self, y: Any) -> float:
    """On the test examples."""
    return float(self._accuracy(y, self.data.test))

  def row(self, weights: np.ndarray) -> Row:
    """What the weights say of the labels, and the accuracy after training on what is kept."""
    auc, f1 = cleaning.detection_scores(weights, self.data.corrupted)
    accuracy = np.nan
    if np.isfinite(weights).all():
      accuracy = self.accuracy(self.retrain(weights >= 0.5))
    return {"test_accuracy": accuracy, "auc": auc, "f1": f1}


class Selection(Task):
  """A row without a bilevel problem; its state is the weights."""

  def __init__(self, run: Run[Config], method: str, noise: str, clean: int, seed: int):
    self.kept = Kept(run, noise, clean, seed)
    settings, corruption = run.config.settings(), run.config.corruption
    given = Problem(self.kept.data, settings, corruption, seed, self.kept.retrain)
    self.state = {"weights": np.asarray(SELECTIONS[method][1](given), np.float32)}

  def result(self, state: Any, spent: Spent) -> Row:
    """The scores."""
    return self.kept.row(np.asarray(state["weights"], np.float64))


class Cleaning(Compiled):
  """A response on one seed; a step is a call of some outer steps."""

  def __init__(self, run: Run[Config], method: str, noise: str, clean: int, seed: int):
    self.kept, self.steps_per_call = Kept(run, noise, clean, seed), run.config.steps_per_call()
    data = self.kept.data
    state, run_steps = cleaning.make_program(
      method, data, self.kept.settings, seed, self.steps_per_call
    )

    def step(state, t, key, train, val):
      key = jax.random.fold_in(jax.random.wrap_key_data(key), t)
      return run_steps(state, key, train, val)

    program = run.shared(method, lambda: Program(step))
    super().__init__(program, state, jax.random.key_data(self.kept.key), data.train, data.val)

  def evaluate(self, state: Any, told: list[Any]) -> Row:
    """The outer loss, and the accuracy of the inner solution, before the examples are chosen."""
    accuracy = self.kept.accuracy(state.solution.params)
    return {"outer_loss": float(told[-1][-1]), "accuracy": accuracy}

  def result(self, state: Any, spent: Spent) -> Row:
    """The scores, and what the weights cost."""
    steps = self.steps_per_call * spent.lines[-1]["call"]
    return self.kept.row(np.asarray(jax.nn.sigmoid(state.x), np.float64)) | {
      "outer_steps": steps,
      "seconds_per_step": spent.seconds / steps,
      "temporary_bytes": self.program.temporary_bytes,
      "compile_seconds": self.program.compile_seconds,
    }


FOUND = {
  "auc": Column("AUC"),
  "f1": Column("F1"),
  "seconds_per_step": Column("ms/step", 1, 1e3),
  "temporary_bytes": Column("temp. MiB", 1, 2**-20, mean_only=True),
}


class HyperCleaning(Study[Config]):
  """The experiment."""

  config = Config
  step_name = "call"

  def prepare(self, config: Config) -> cleaning.Read:
    """All examples, and the official test set where there is one."""
    return cleaning.read(config.dataset, config.data_dir)

  def cells(self, run: Run[Config]) -> Iterable[Cell]:
    """Every method on every seed, for each number of clean examples and each noise."""
    config = run.config
    steps = config.settings().outer_steps // config.steps_per_call()
    of = (config.noises, config.num_clean, config.all_seeds(), config.methods)
    for noise, clean, seed, method in itertools.product(*of):
      key = {"noise": noise, "clean": clean, "method": method, "seed": seed}
      label = f"{noise} noise, {clean} clean, seed {seed}, {LABELS[method]}"
      task = Cleaning if method in METHODS else Selection
      make = functools.partial(task, run, **{name: key[name] for name in key})
      yield Cell(key, make, steps if method in METHODS else 0, label)

  def tables(self, results: Results[Config]) -> Iterable[Table]:
    """For each noise accuracies by the number of clean examples, and what finds wrong labels."""
    config, settings = results.config, results.config.settings()
    for noise, rows in results.rows.groupby("noise", sort=False):
      sizes = {f"{clean}": Column(f"{clean}") for clean in rows["clean"].unique()}
      title = (
        f"{config.dataset}: {settings.num_train} training examples, {config.corruption:.0%} of "
        f"labels wrong, as {cleaning.NOISES[str(noise)]}"
      )
      wide = by_size(rows)
      accuracy = f"{title}; test accuracy after training on what is kept, by clean examples"
      yield table.spread(accuracy, wide, "method", LABELS, sizes)
      if BASELINE in set(rows["method"]):
        minus = f"{title}; test accuracy by clean examples, in pairs"
        yield table.paired(minus, wide, "method", BASELINE, LABELS, sizes)
      clean = shown(rows["clean"].unique().tolist())
      found = rows[(rows["clean"] == clean) & rows["method"].isin([*METHODS, *SCORED])]
      told = f"{title}; who finds them, with {clean} clean examples"
      yield table.spread(told, found, "method", LABELS, FOUND)

  def draw(self, run: Run[Config]) -> None:
    """Accuracy by the number of clean examples, and the weights that two methods learn."""
    rows, config = run.results().rows, run.config
    noise, clean = config.noises[0], shown(config.num_clean)
    weights: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for cell in run.finished():
      key = cell.key
      if key["method"] in plots.WITH_WEIGHTS and (key["noise"], key["clean"]) == (noise, clean):
        values = np.asarray(jax.nn.sigmoid(run.saved(cell)["x"]))
        corrupted = data_of(run, noise, clean, key["seed"]).corrupted
        weights.setdefault(key["method"], []).append((values, corrupted))
    plots.draw(rows, weights, LABELS, clean, run.path / "hyper_cleaning.png")


def by_size(rows: pd.DataFrame) -> pd.DataFrame:
  """A row for each method and seed, with the accuracy at each number of clean examples."""
  wide = rows.pivot(index=["method", "seed"], columns="clean", values="test_accuracy")
  wide = wide.loc[rows["method"].unique()].rename(columns=str)
  return wide.reset_index()


def shown(num_clean: Sequence[int]) -> int:
  """The number of clean examples that the details are of."""
  return sorted(num_clean)[(len(num_clean) - 1) // 2]


if __name__ == "__main__":
  study.main(Config, functools.partial(study.run, HyperCleaning()), __doc__)
