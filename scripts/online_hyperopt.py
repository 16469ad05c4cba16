"""Online hyperparameter optimization: SOBOW and OAGD on streams that change.

Three problems (`--problem`), each on streams whose distribution changes with time: temperatures and
shifts of the classes in the loss, for imbalanced training data (`loss_tuning`, the protocol of
OAGD's published code); a ridge for each feature, for data with wrong labels (`ridge`); a backbone
under a linear head, for priors of the classes that move (`representation`).

Each method plays `x` and `y`, then sees the losses of the round, and takes its steps. SOBOW keeps
the last K hypergradient estimates, OAGD the last K batches. Beside each stands descent with the
same inner steps and without response (OGD), so that what `x` gains can be told from what more
inner steps do. "cum. loss" is the sum over rounds of the outer loss of what was played; "bal.
acc." is balanced accuracy on fresh data, the mean over 21 evaluations and at the end; "regret" is
the sum of the squared norms of the true hypergradient, where it is known; "CG stops" is the share
of rounds in which conjugate gradient met curvature that was not positive; "kept KiB" is the
window, the memory and the linear solution of one seed. Learning rates were chosen on other seeds
(100 to 102), by the cumulative loss, with `--tune`; see scripts/online_rates.json. The method
"published" has the published ones.

  python -m scripts.online_hyperopt                                  digits, no download
  python -m scripts.online_hyperopt --windows 1 2 5 10 20            what the window does
  python -m scripts.online_hyperopt --problem ridge --dataset newsgroups
  python -m scripts.online_hyperopt --dataset mnist --model conv4    the published protocol; hours
"""

import dataclasses
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import tyro
from rich.progress import Progress

from scripts.common import (
  data,
  online_plots,
  online_problems,
  online_runs,
  online_streams,
  online_tuning,
  report,
)
from scripts.common.data import Examples
from scripts.common.online_methods import METHODS, Rates
from scripts.common.online_problems import Problem
from scripts.common.online_runs import Data, Program, Run
from scripts.common.online_streams import Pools, StreamKind

CSV, PICTURE, SWEEP = "results.csv", "online_hyperopt.png", "online_sweep.png"
RATES_FILE = Path(__file__).with_name("online_rates.json")
NUM_EVALUATIONS = 20
PUBLISHED_WINDOW = 5
STREAMS = {
  "loss_tuning": online_streams.IMBALANCED,
  "ridge": online_streams.NOISY,
  "representation": online_streams.SHIFTING,
}


class Sizes(NamedTuple):
  """How many examples of each class the inner and the outer losses are drawn from."""

  train: int
  val: int


DATASETS = {"digits": Sizes(100, 40), "mnist": Sizes(4000, 1000), "newsgroups": Sizes(170, 55)}


@dataclasses.dataclass(frozen=True)
class Config:
  """Online hyperparameter optimization: SOBOW and OAGD on streams that change."""

  problem: str = "loss_tuning"
  """loss_tuning, ridge or representation."""
  dataset: str = "digits"
  """digits (in scikit-learn's wheel), mnist or newsgroups (prepared by tensorflow-datasets)."""
  streams: tuple[str, ...] | None = None
  """Which streams, instead of all: gradual, zigzag, static; static, staged, dynamic elsewhere."""
  methods: tuple[str, ...] | None = None
  """Which methods, instead of all: ogd, sobow, ogd_replay, oagd; loss_tuning has
  ogd_published, ogd_replay_published and oagd_published too."""
  windows: tuple[int, ...] = (1, 5)
  """Windows K of those methods that have one; the published ones have 5."""
  model: str | None = None
  """linear, mlp or conv4; linear by default, mlp for representation."""
  width: int | None = None
  """Units of mlp or channels of conv4, instead of 64."""
  log_ridge: float = -4.0
  """Where the logarithms of the ridge begin, in [-7, -2]."""
  rounds: int = 400
  """Rounds of a stream, a multiple of 20."""
  batch_size: int = 64
  """Examples of a batch, inside and outside."""
  seeds: int = 5
  """How many seeds; each draws the split of the digits, the stream and the initial parameters."""
  first_seed: int = 0
  """The first of them."""
  tune: bool = False
  """Chooses learning rates on the seeds 100 to 102 and writes them to rates_file; no report."""
  rates_file: Path = RATES_FILE
  """Where the chosen learning rates are."""
  inner_learning_rate: float | None = None
  """Instead of the chosen ones, for all methods that are not published; with the next one."""
  outer_learning_rate: float | None = None
  """See inner_learning_rate."""
  damping: float = 0.0
  """Damping of conjugate gradient, with the learning rates above."""
  data_dir: Path | None = None
  """Where tensorflow-datasets has its files, instead of TFDS_DATA_DIR or ~/tensorflow_datasets."""
  output_dir: Path = Path("runs/online_hyperopt")
  """Where results go. Files of an earlier run there are replaced."""

  def check(self) -> None:
    """Raises ``ValueError`` for what cannot run."""
    for name, allowed in (("problem", STREAMS), ("dataset", DATASETS)):
      value = getattr(self, name)
      if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
    lists = (
      ("streams", self.stream_names(), STREAMS[self.problem]),
      ("methods", self.method_names(), self.allowed_methods()),
    )
    for name, values, allowed in lists:
      if not values or not set(values) <= set(allowed):
        got = " ".join(values) or "none"
        raise ValueError(f"{name} must be among {', '.join(allowed)}; got {got}")
    for name, values in (*(pair[:2] for pair in lists), ("windows", self.windows)):
      if len(set(values)) < len(values):
        raise ValueError(f"{name} must name each one once, got {' '.join(map(str, values))}")
    if not self.windows or min(self.windows) < 1:
      raise ValueError(f"windows must be at least 1 each, got {self.windows}")
    if self.rounds < NUM_EVALUATIONS or self.rounds % NUM_EVALUATIONS:
      raise ValueError(f"rounds must be a multiple of {NUM_EVALUATIONS}, got {self.rounds}")
    for name in ("width", "batch_size", "seeds"):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    if self.tune and self.grid_name() not in online_tuning.GRIDS:
      raise ValueError(
        f"tune must be of one of {', '.join(online_tuning.GRIDS)}; got {self.grid_name()}"
      )
    if self.first_seed < 0:
      raise ValueError(f"first_seed must not be negative, got {self.first_seed}")
    given = (self.inner_learning_rate, self.outer_learning_rate)
    if (given[0] is None) != (given[1] is None):
      raise ValueError(
        f"inner_learning_rate and outer_learning_rate must be given together, got {given}"
      )
    for name in ("inner_learning_rate", "outer_learning_rate"):
      value = getattr(self, name)
      if value is not None and not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
    if not self.damping >= 0:
      raise ValueError(f"damping must not be negative, got {self.damping}")
    if self.problem == "ridge" and self.model_name() != "linear":
      raise ValueError(f"model must be linear for ridge, got {self.model!r}")
    if self.problem == "representation" and self.model_name() == "linear":
      raise ValueError("model must be mlp or conv4 for representation, got 'linear'")

  def allowed_methods(self) -> list[str]:
    """The methods that the problem has."""
    published = self.problem == "loss_tuning"
    return [name for name, method in METHODS.items() if published or not method.published]

  def method_names(self) -> tuple[str, ...]:
    """The methods to run."""
    return tuple(self.allowed_methods()) if self.methods is None else self.methods

  def stream_names(self) -> tuple[str, ...]:
    """The streams to run."""
    return tuple(STREAMS[self.problem]) if self.streams is None else self.streams

  def model_name(self) -> str:
    """The model to train."""
    return self.model or ("mlp" if self.problem == "representation" else "linear")

  def name(self) -> str:
    """The name of the table of learning rates."""
    return f"{self.problem}/{self.dataset}/{self.model_name()}"

  def grid_name(self) -> str:
    """The name of the grid of learning rates."""
    return f"{self.problem}/{self.dataset}"

  def variants(self) -> list["Variant"]:
    """The methods with their windows, without those that a window of 1 makes equal to others."""
    variants = []
    for name in self.method_names():
      method = METHODS[name]
      windows = self.windows if method.windowed else (1,)
      if method.published and method.windowed:
        windows = (PUBLISHED_WINDOW,)
      variants += [Variant(name, k) for k in windows if not method.inner_per_window or k > 1]
    return variants


class Variant(NamedTuple):
  """A method with a window."""

  method: str
  window: int

  @property
  def label(self) -> str:
    """Its name in tables."""
    method = METHODS[self.method]
    return f"{method.label}, K={self.window}" if method.windowed else method.label


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


Runs = dict[tuple[str, Variant], Run]


def read(config: Config) -> tuple[Examples, np.ndarray | None]:
  """All examples, and the rows of an official test set if there is one."""
  if config.dataset == "digits":
    examples, test = data.digits(), None
  elif config.dataset == "newsgroups":
    examples, num_train = data.newsgroups(config.data_dir)
    test = np.arange(num_train, len(examples.labels))
  else:
    train = data.tfds_images("mnist", "train", config.data_dir)
    fresh = data.tfds_images("mnist", "test[:1000]", config.data_dir)  # as the published code
    test = len(train.labels) + np.arange(1000)
    examples = Examples(*(np.concatenate(pair) for pair in zip(train, fresh, strict=True)))
  if config.problem == "ridge":  # Rows of unit norm bound the curvature of the inner loss.
    norms = np.linalg.norm(examples.images, axis=1, keepdims=True)
    return examples._replace(images=examples.images / np.maximum(norms, 1e-6)), test
  if config.dataset == "mnist":  # As the published code normalises it.
    return examples._replace(images=(examples.images - 0.1307) / 0.3081), test
  return examples, test


def pools_of(config: Config, examples: Examples, test: np.ndarray | None, seed: int) -> Pools:
  """The rows of a seed. MNIST keeps its order, as in the published code."""
  shuffle = None if config.dataset == "mnist" else seed
  return online_streams.split_by_class(examples, *DATASETS[config.dataset], shuffle, test)


def make_problem(config: Config, examples: Examples) -> Problem:
  """The problem on these examples."""
  num_inputs, num_classes = examples.images.shape[1], int(examples.labels.max()) + 1
  if config.problem == "ridge":
    exact = num_inputs * num_classes <= 1000  # Else the true hypergradient would take hours.
    return online_problems.feature_ridge(num_inputs, num_classes, config.log_ridge, exact=exact)
  features = online_problems.make_features(config.model_name(), num_inputs, config.width or 64)
  if config.problem == "representation":
    return online_problems.representation(features, num_classes, ridge=0.01)
  return online_problems.loss_tuning(features, num_classes)


def make_program(config: Config, variant: Variant, problem: Problem, examples: Examples) -> Program:
  """The program of a method."""
  return online_runs.make_program(
    variant.method,
    problem,
    variant.window,
    config.rounds,
    config.rounds // NUM_EVALUATIONS,
    int(examples.labels.max()) + 1,
  )


def draw(
  config: Config,
  kind: StreamKind,
  examples: Examples,
  test: np.ndarray | None,
  seeds: Sequence[int],
) -> Data:
  """A stream for all seeds."""
  pools = [pools_of(config, examples, test, seed) for seed in seeds]
  return online_runs.draw_data(kind, examples, pools, seeds, config.rounds, config.batch_size)


def rates_of(config: Config, variant: Variant) -> Rates:
  """The learning rates of a method."""
  if METHODS[variant.method].published:
    return Rates(math.nan, math.nan, math.nan)
  if config.inner_learning_rate is not None and config.outer_learning_rate is not None:
    return Rates(config.inner_learning_rate, config.outer_learning_rate, config.damping)
  tables = online_tuning.read(config.rates_file)
  return online_tuning.look_up(tables, config.name(), variant.method, variant.window)


def as_arrays(rates: Rates) -> Rates:
  """So that other rates do not compile again."""
  return Rates(*map(jnp.float32, rates))


def run_all(
  config: Config,
  examples: Examples,
  test: np.ndarray | None,
  log: report.MetricsLog,
  progress: Progress,
  runs: Runs,
) -> None:
  """Runs every method on every stream; fills ``runs`` as it goes."""
  problem, variants = make_problem(config, examples), config.variants()
  seeds = range(config.first_seed, config.first_seed + config.seeds)
  streams = {
    name: draw(config, STREAMS[config.problem][name], examples, test, seeds)
    for name in config.stream_names()
  }
  task = progress.add_task("", total=len(streams) * len(variants) * NUM_EVALUATIONS, loss="")
  for variant in variants:
    progress.update(task, description=variant.label, loss="compiling")
    rates = as_arrays(rates_of(config, variant))
    program = make_program(config, variant, problem, examples)
    program = online_runs.compile_step(program, rates, next(iter(streams.values())))
    for name, stream in streams.items():
      progress.update(task, description=f"{variant.label}, {name}")
      for accuracy, run in online_runs.play(program, rates, stream, NUM_EVALUATIONS):
        progress.update(task, advance=run is None, loss=f"balanced accuracy {accuracy:.3f}")
        if run is not None:
          runs[name, variant] = run
          write_lines(config, log, name, variant, run)


def write_lines(
  config: Config, log: report.MetricsLog, stream: str, variant: Variant, run: Run
) -> None:
  """A line for each seed and evaluation."""
  begin = np.zeros((1, config.seeds))
  loss, regret = (
    np.concatenate([begin, sums])[run.rounds] for sums in (np.cumsum(run.loss, 0), run.regret)
  )
  for i, (k, done) in itertools.product(range(config.seeds), enumerate(run.rounds)):
    log.write(
      stream=stream,
      method=variant.method,
      window=variant.window,
      seed=config.first_seed + i,
      round=done,
      balanced_accuracy=float(run.accuracy[k, i]),
      cumulative_loss=float(loss[k, i]),
      regret=float(regret[k, i]),
    )


def tune(
  config: Config, examples: Examples, test: np.ndarray | None, progress: Progress
) -> Iterator[tuple[Variant, Rates, float]]:
  """Chooses the rates of every method by its mean cumulative loss over streams and seeds."""
  problem = make_problem(config, examples)
  first = online_tuning.FIRST_SEED
  seeds = range(first, first + online_tuning.NUM_SEEDS)
  kinds = [STREAMS[config.problem][name] for name in config.stream_names()]
  streams = [draw(config, kind, examples, test, seeds) for kind in kinds]
  for variant in config.variants():
    if METHODS[variant.method].published:
      continue
    moves_x = config.problem == "representation" or METHODS[variant.method].has_system
    candidates = online_tuning.candidates(
      online_tuning.GRIDS[config.grid_name()],
      moves_x=moves_x,
      has_system=METHODS[variant.method].has_system,
    )
    task = progress.add_task(variant.label, total=len(streams), loss="")
    program = make_program(config, variant, problem, examples)
    losses = np.zeros(len(candidates.inner))
    for stream in streams:
      losses += np.asarray(
        program.losses(candidates, stream.features, stream.schedules, stream.keys)
      ) / len(streams)
      progress.update(task, advance=1, loss=f"{np.nanmin(losses):.1f}")
    yield variant, online_tuning.choose(candidates, losses), float(np.nanmin(losses))


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
  """The rows of the table of one stream, formatted."""
  rows = []
  for variant in dict.fromkeys(Variant(result.method, result.window) for result in results):
    mine = [row for row in results if (row.method, row.window) == variant]
    spread = lambda name, digits, mine=mine: report.mean_and_spread(
      (getattr(row, name) for row in mine), digits
    )
    rows.append(
      [
        variant.label,
        spread("cumulative_loss", 1),
        spread("mean_accuracy", 3),
        spread("final_accuracy", 3),
        spread("distance", 2),
        spread("regret", 4),
        f"{np.mean([row.breakdown_share for row in mine]):.0%}",
        f"{1e3 * mine[0].seconds_per_round:.2f}",
        f"{mine[0].state_bytes / 2**10:.1f}",
      ]
    )
  return rows


def title(config: Config, stream: str) -> str:
  """What the numbers of a table are of."""
  return (
    f"{config.problem} of {config.model_name()} on {config.dataset}, stream {stream}: "
    f"{config.rounds} rounds of {config.batch_size} examples; mean ± standard deviation of "
    f"{config.seeds} seeds"
  )


def tune_and_report(config: Config) -> int:
  """Chooses rates, prints and saves each as soon as it is there; returns the exit status."""
  console = report.console()
  with report.progress_bar(console) as progress:
    try:
      for variant, rates, loss in tune(config, *read(config), progress):
        chosen = {variant.method: {str(variant.window): list(rates)}}
        online_tuning.write(config.rates_file, config.name(), chosen)
        console.print(f"{variant.label}: {rates}, cumulative loss {loss:.2f}")
    except KeyboardInterrupt:
      return 130
  return 0


def run_and_report(config: Config) -> int:
  """Runs, prints and saves; returns the exit status."""
  try:
    config.check()
    if config.tune:
      return tune_and_report(config)
    for variant in config.variants():
      rates_of(config, variant)
    examples, test = read(config)
    make_problem(config, examples)
    pools_of(config, examples, test, config.first_seed)
    log = report.start_output(config.output_dir, "metrics.jsonl", stale=(CSV, PICTURE, SWEEP))
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
    console.print("Interrupted." + (" What was finished until then:" if runs else ""))
  if runs:
    results = summarize(config, runs)
    report.write_csv(config.output_dir / CSV, [result._asdict() for result in results])
    for stream in config.stream_names():
      mine = [result for result in results if result.stream == stream]
      if mine:
        report.print_table(console, title(config, stream), COLUMNS, table_rows(mine))
    kinds = {name: STREAMS[config.problem][name] for name in config.stream_names()}
    online_plots.draw_runs(runs, kinds, config.rounds, config.output_dir / PICTURE)
    if len(config.windows) > 2:
      online_plots.draw_sweep(runs, list(kinds), config.output_dir / SWEEP)
    console.print(f"metrics.jsonl, {CSV} and pictures are in {config.output_dir}")
  return status


def main(config: Config) -> int:
  """Runs, prints and saves. Returns the exit status: 130 if interrupted, with what was finished."""
  try:
    return run_and_report(config)
  except KeyboardInterrupt:  # Not in a run: while reading data, printing or drawing.
    print("Interrupted.", file=sys.stderr)
    return 130


if __name__ == "__main__":
  sys.exit(main(tyro.cli(Config)))
