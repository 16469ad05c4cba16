"""Online hyperparameter optimization: SOBOW and OAGD on streams that change.

Three problems (`--problem`), each on streams whose distribution changes with time: temperatures and
shifts of the classes in the loss, for imbalanced training data (`loss_tuning`, the protocol of
OAGD's published code); a ridge for each feature, for data with wrong labels (`ridge`); a backbone
under a linear head, for priors of the classes that move (`representation`).

Each method plays `x` and `y`, then sees the losses of the round, and takes its steps. SOBOW keeps
the last K hypergradient estimates, OAGD the last K batches. Beside each stands descent with the
same inner steps and without response (OGD), so that what `x` gains can be told from what more
inner steps do. "cum. loss" is the sum over rounds of the outer loss of what was played; "bal. acc."
is balanced accuracy on fresh data, the mean over 21 evaluations and at the end; "regret" is the sum
of the squared norms of the true hypergradient, where it is known; "CG stops" is the share of rounds
in which conjugate gradient met curvature that was not positive; "ms/round" is for one seed, of
those that run side by side; "kept KiB" is what one seed keeps beside both levels' parameters:
windows, batches, the linear solution, momenta of `x`.

Learning rates were chosen with `--tune` on the seeds 100 to 102, which are not reported, by the
cumulative loss over all streams; they are in scripts/common/online_rates.json. Methods with a star
have the published ones of OAGD and its window of 5.

  python -m scripts.online_hyperopt                                  digits, no download
  python -m scripts.online_hyperopt --windows 1 2 5 10 20            what the window does
  python -m scripts.online_hyperopt --problem ridge --dataset newsgroups
  python -m scripts.online_hyperopt --dataset mnist --model conv4    the published protocol; hours
"""

import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import tyro
from rich.progress import Progress

from scripts.common import online_plots, online_runs, online_tuning, report
from scripts.common.data import Examples
from scripts.common.online_config import (
  NUM_EVALUATIONS,
  STREAMS,
  Config,
  Variant,
  make_problem,
  pools_of,
  rates_of,
  read,
)
from scripts.common.online_methods import METHODS, Rates
from scripts.common.online_problems import Problem
from scripts.common.online_runs import Data, Program, Run
from scripts.common.online_streams import StreamKind

CSV, PICTURE, SWEEP = "results.csv", "online_hyperopt.png", "online_sweep.png"


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
    moves_x = config.problem == "representation" or METHODS[variant.method].responds
    candidates = online_tuning.candidates(
      online_tuning.GRIDS[config.grid_name()],
      moves_x=moves_x,
      damped=METHODS[variant.method].damped,
    )
    task = progress.add_task(variant.label, total=len(streams), loss="")
    program = make_program(config, variant, problem, examples)
    losses = np.zeros(len(candidates.inner))
    for stream in streams:
      losses += np.asarray(
        program.losses(candidates, stream.features, stream.schedules, stream.seeds)
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
        report.print_table(console, title(config, stream), *without_dashes(table_rows(mine)))
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
