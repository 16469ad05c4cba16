"""Data hyper-cleaning: which training labels are wrong, learnt from a small clean set.

Half of the labels are replaced by others. Each training example gets a weight, learnt so that the
model trained on the weighted examples does well on clean validation examples.

Claim, on scikit-learn's digits (1,000 training, 300 validation, 497 test examples; softmax
regression; mean of seeds 0 to 4): the weights find the wrong labels with an AUC of 0.97 (ITD), 0.96
(AID-CG), 0.98 (stocBiO) and 0.98 (ESJ, 64 directions); ITD and AID-CG come within one point of a
model trained on the truly clean examples. README.md has the whole table, with the spread.

What it does not show: on so easy a task, training on the 300 validation examples alone does as
well. What is learnt here is which labels are wrong. First order does nothing at all, since the
outer loss does not depend on the weights directly: every weight stays one half.

The table's means are over the seeds that finished (column "seeds"). AUC and F1 are of "this label
is wrong". "ms/step" is training time for one outer step, without compilation and evaluation; "temp.
MiB" is the temporary memory that XLA plans for the compiled loop of outer steps, beside its inputs
and outputs. Ctrl-C ends the run with what was measured so far.

  python -m scripts.hyper_cleaning                               1 minute on 2 CPU cores
  python -m scripts.hyper_cleaning --dataset mnist --seeds 1     7 minutes; a perceptron
"""

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import tyro
from rich.progress import Progress

from scripts.common import cleaning, measure, plots, report
from scripts.common.cleaning import METHODS, CleaningData, Program, Settings
from scripts.common.data import Examples

NUM_EVALUATIONS = 20
CSV, PICTURE = "results.csv", "hyper_cleaning.png"


@dataclasses.dataclass(frozen=True)
class Config:
  """Data hyper-cleaning: learns one weight per training example from a small clean set."""

  dataset: str = "digits"
  """digits (in scikit-learn's wheel), mnist or fashion_mnist (prepared by tensorflow-datasets)."""
  methods: tuple[str, ...] = tuple(METHODS)
  """Which methods to run."""
  seeds: int = 5
  """How many seeds; each draws the split, the wrong labels and the initial parameters."""
  first_seed: int = 0
  """The first of them. The settings were chosen on seeds from 100 on."""
  corruption: float = 0.5
  """The share of wrong training labels, in [0, 1)."""
  data_dir: Path | None = None
  """Where tensorflow-datasets has its files, instead of TFDS_DATA_DIR or ~/tensorflow_datasets."""
  output_dir: Path = Path("runs/hyper_cleaning")
  """Where results go. Files of an earlier run there are replaced."""
  outer_steps: int | None = None
  """Outer steps, instead of the data set's default (as for all below)."""
  inner_steps: int | None = None
  """Inner steps for one outer step."""
  inner_learning_rate: float | None = None
  """Learning rate of SGD, inside."""
  outer_learning_rate: float | None = None
  """Learning rate of Adam, outside, on the logits of the weights."""
  num_samples: int | None = None
  """Directions of ESJ."""
  smoothing: float | None = None
  """Smoothing radius of ESJ."""

  def check(self) -> None:
    """Raises ``ValueError`` for what cannot run."""
    if self.dataset not in cleaning.DATASETS:
      raise ValueError(
        f"dataset must be one of {', '.join(cleaning.DATASETS)}; got {self.dataset!r}"
      )
    if not self.methods or not set(self.methods) <= set(METHODS):
      got = " ".join(self.methods) or "none"
      raise ValueError(f"methods must be among {', '.join(METHODS)}; got {got}")
    if len(set(self.methods)) < len(self.methods):
      raise ValueError(f"methods must name each method once, got {' '.join(self.methods)}")
    if not 0 <= self.corruption < 1:
      raise ValueError(f"corruption must be in [0, 1), got {self.corruption}")
    if self.first_seed < 0:
      raise ValueError(f"first_seed must not be negative, got {self.first_seed}")
    for name in ("seeds", "outer_steps", "inner_steps", "num_samples"):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    for name in ("inner_learning_rate", "outer_learning_rate", "smoothing"):
      value = getattr(self, name)
      if value is not None and not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")

  def settings(self) -> Settings:
    """The data set's settings, with what was given instead."""
    given = {field.name: getattr(self, field.name, None) for field in dataclasses.fields(Settings)}
    given = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(cleaning.DATASETS[self.dataset], **given)


class Result(NamedTuple):
  """A method on one seed; a row of ``results.csv``. NaN where a number means nothing.

  ``outer_steps`` were done, fewer than asked for if the run was interrupted; ``test_accuracy`` is
  after the last. ``auc`` and ``f1`` are of "this label is wrong". ``temporary_bytes`` is XLA's
  temporary memory of the compiled loop of outer steps, -1 if unknown.
  """

  method: str
  seed: int
  outer_steps: int
  test_accuracy: float
  auc: float
  f1: float
  seconds_per_step: float
  temporary_bytes: int
  compile_seconds: float


class Executable(NamedTuple):
  """A method, compiled once for all seeds."""

  run: jax.stages.Compiled
  compile_seconds: float


class Run(NamedTuple):
  """A method on one seed, as far as it came.

  Attributes:
    executable: the compiled method.
    outer_steps: outer steps done.
    seconds: training time at each evaluation, without compilation and evaluation.
    outer_loss: outer loss at each evaluation.
    accuracy: test accuracy at each evaluation.
    weights: the weights of the training examples at the last one, ``[num_train]``.
    corrupted: which of them have a wrong label.
  """

  executable: Executable
  outer_steps: int
  seconds: list[float]
  outer_loss: list[float]
  accuracy: list[float]
  weights: np.ndarray
  corrupted: np.ndarray


Runs = dict[tuple[str, int], Run]  # by method and seed


def compile_program(program: Program, val: Examples) -> Executable:
  """Compiles ``program.run``; it takes the state's memory over."""
  start = time.perf_counter()
  lowered = jax.jit(program.run, donate_argnums=0).lower(
    program.state, jax.random.key(0), program.train, val
  )
  return Executable(lowered.compile(), time.perf_counter() - start)


def fit(
  program: Program,
  executable: Executable,
  data: CleaningData,
  num_runs: int,
  seed: int,
  accuracy: Callable[..., jax.Array],
) -> Iterator[Run]:
  """Runs a method to its end; yields the run so far at each of ``num_runs`` evaluations."""
  state, train, val, test = jax.device_put((program.state, program.train, data.val, data.test))
  run = Run(executable, 0, [], [], [], np.zeros(0), data.corrupted)
  total = 0.0
  for i in range(num_runs):
    key = jax.random.fold_in(jax.random.key(seed), i)
    start = time.perf_counter()
    state, losses = jax.block_until_ready(executable.run(state, key, train, val))
    total += time.perf_counter() - start
    run = run._replace(
      outer_steps=run.outer_steps + len(losses),
      seconds=[*run.seconds, total],
      outer_loss=[*run.outer_loss, float(losses[-1])],
      accuracy=[*run.accuracy, float(accuracy(state.solution.params, test))],
      # Read now: after an interruption the state's memory may be gone.
      weights=np.asarray(jax.nn.sigmoid(state.x), np.float64),
    )
    yield run


def run_all(
  config: Config,
  examples: Examples,
  test: Examples | None,
  log: report.MetricsLog,
  progress: Progress,
  runs: Runs,
) -> None:
  """Runs every method on every seed; fills ``runs`` as it goes."""
  settings = config.settings()
  steps = max(
    divisor
    for divisor in range(1, -(-settings.outer_steps // NUM_EVALUATIONS) + 1)
    if settings.outer_steps % divisor == 0
  )
  num_runs = settings.outer_steps // steps
  accuracy = jax.jit(lambda y, examples: cleaning.accuracy(settings, y, examples))
  executables: dict[str, Executable] = {}
  task = progress.add_task("", total=config.seeds * len(config.methods) * num_runs, loss="")
  for seed in range(config.first_seed, config.first_seed + config.seeds):
    data = cleaning.split(examples, test, settings, config.corruption, seed)
    for method in config.methods:
      progress.update(task, description=f"seed {seed}, {METHODS[method].label}")
      program = cleaning.make_program(method, data, settings, seed, steps)
      if method not in executables:
        executables[method] = compile_program(program, data.val)
      for run in fit(program, executables[method], data, num_runs, seed, accuracy):
        runs[method, seed] = run
        loss = run.outer_loss[-1]
        progress.update(task, advance=1, loss=f"outer loss {loss:.4f}")
        values = {"seconds": run.seconds[-1], "outer_loss": loss, "accuracy": run.accuracy[-1]}
        log.write(method=method, seed=seed, **values)


def summarize(method: str, seed: int, run: Run) -> Result:
  """The row of a run."""
  auc, f1 = math.nan, math.nan
  if METHODS[method].head is not None:
    auc, f1 = cleaning.detection_scores(run.weights, run.corrupted)
  return Result(
    method,
    seed,
    run.outer_steps,
    run.accuracy[-1],
    auc,
    f1,
    seconds_per_step=run.seconds[-1] / run.outer_steps,
    temporary_bytes=measure.temporary_bytes(run.executable.run),
    compile_seconds=run.executable.compile_seconds,
  )


def gain_share(result: Result, finished: Sequence[Result]) -> float:
  """The share of the oracle's gain over training on everything, on the same seed."""
  accuracies = {row.method: row.test_accuracy for row in finished if row.seed == result.seed}
  worst, best = (accuracies.get(name, math.nan) for name in ("everything", "oracle"))
  return (result.test_accuracy - worst) / (best - worst) if best > worst else math.nan


def table_rows(results: Sequence[Result], outer_steps: int) -> list[list[str]]:
  """The rows of the table, formatted: means over the runs that did all ``outer_steps``.

  A method that has only an unfinished run is shown with it, says so, and has 0 seeds.
  """
  rows = []
  finished = [result for result in results if result.outer_steps == outer_steps]
  for method in dict.fromkeys(result.method for result in results):
    label = METHODS[method].label
    mine = [result for result in finished if result.method == method]
    num_seeds = len(mine)
    if not mine:
      mine = [result for result in results if result.method == method]
      label += f", unfinished ({mine[0].outer_steps} of {outer_steps} steps)"
    rows.append(
      [
        label,
        str(num_seeds),
        report.mean_and_spread(result.test_accuracy for result in mine),
        report.mean_and_spread((gain_share(result, finished) for result in mine), digits=2),
        report.mean_and_spread(result.auc for result in mine),
        report.mean_and_spread(result.f1 for result in mine),
        report.mean_and_spread((1e3 * result.seconds_per_step for result in mine), digits=1),
        f"{mine[0].temporary_bytes / 2**20:.1f}" if mine[0].temporary_bytes >= 0 else "-",
      ]
    )
  return rows


COLUMNS = ["method", "seeds", "accuracy", "gain share", "AUC", "F1", "ms/step", "temp. MiB"]


def title(config: Config) -> str:
  """What the numbers are of."""
  settings = config.settings()
  batch = "all examples" if settings.batch_size is None else f"{settings.batch_size} examples"
  return (
    f"{config.dataset}: {settings.num_train} training examples, {config.corruption:.0%} of labels "
    f"wrong; {settings.num_val} clean validation examples\n{settings.outer_steps} outer steps of "
    f"{settings.inner_steps} inner steps on {batch}; mean ± standard deviation over seeds"
  )


def draw(runs: Runs, outer_steps: int, path: Path) -> None:
  """Draws accuracy against seconds, and the histograms of the learnt weights.

  Means and histograms are over finished runs; an unfinished one has a curve of its own that ends
  in a cross, and a histogram if its method has no other run.
  """
  by_method: dict[str, list[Run]] = {}
  for (method, _), run in runs.items():
    by_method.setdefault(method, []).append(run)
  moved = [
    method
    for method, mine in by_method.items()
    if METHODS[method].head is not None and np.ptp(mine[0].weights) > 0
  ]
  fig, left, panels = plots.one_wide_and_a_grid(len(moved))
  panel_of = dict(zip(moved, panels, strict=True))
  for i, (method, mine) in enumerate(by_method.items()):
    label, color = METHODS[method].label, f"C{i}"
    finished = [run for run in mine if run.outer_steps == outer_steps]
    for run in mine:
      if run.outer_steps < outer_steps:
        plots.broken_off(left, run.seconds, run.accuracy, color=color, label=f"{label}, unfinished")
    if finished:
      seconds = np.mean([run.seconds for run in finished], axis=0)
      accuracy = [run.accuracy for run in finished]
      plots.mean_and_range(left, seconds, accuracy, color=color, label=label, band=method in moved)
    if method in moved:
      shown = finished or mine
      weights = np.concatenate([run.weights for run in shown])
      corrupted = np.concatenate([run.corrupted for run in shown])
      groups = {"clean": weights[~corrupted], "wrong label": weights[corrupted]}
      plots.histograms(panel_of[method], groups, np.linspace(0, 1, 41))
      panel_of[method].set_title(label if finished else f"{label}, unfinished", fontsize="medium")
      panel_of[method].set(xlabel="weight", ylabel="examples")
  left.set(xscale="log", xlabel="training seconds (no compilation)", ylabel="test accuracy")
  fig.legend(
    *left.get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize="small"
  )
  plots.save(fig, path)


def run_and_report(config: Config) -> int:
  """Runs, prints and saves; returns the exit status."""
  try:
    config.check()
    examples, test = cleaning.read(config.dataset, config.data_dir)
    log = report.start_output(config.output_dir, "metrics.jsonl", stale=(CSV, PICTURE))
  except (ValueError, FileNotFoundError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  console, status = report.console(), 0
  runs: Runs = {}
  with log, report.progress_bar(console) as progress:
    try:
      run_all(config, examples, test, log, progress, runs)
    except KeyboardInterrupt:
      status = 130
  if status:
    console.print("Interrupted." + (" What was measured until then:" if runs else ""))
  if runs:
    outer_steps = config.settings().outer_steps
    results = [summarize(method, seed, run) for (method, seed), run in runs.items()]
    report.write_csv(config.output_dir / CSV, [result._asdict() for result in results])
    report.print_table(console, title(config), COLUMNS, table_rows(results, outer_steps))
    draw(runs, outer_steps, config.output_dir / PICTURE)
    console.print(f"metrics.jsonl, {CSV} and {PICTURE} are in {config.output_dir}")
  return status


def main(config: Config) -> int:
  """Runs, prints and saves. Returns the exit status: 130 if interrupted, with what was measured."""
  try:
    return run_and_report(config)
  except KeyboardInterrupt:  # Not in training: while reading data, printing or drawing.
    print("Interrupted.", file=sys.stderr)
    return 130


if __name__ == "__main__":
  sys.exit(main(tyro.cli(Config)))
