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
cumulative loss over all streams; they are in scripts/online_hyperopt/rates.json. Methods with a
star have the published ones of OAGD and its window of 5.

  python -m scripts.online_hyperopt                                  digits, no download
  python -m scripts.online_hyperopt --windows 1 2 5 10 20            what the window does
  python -m scripts.online_hyperopt --problem ridge --dataset newsgroups
  python -m scripts.online_hyperopt --dataset mnist --model conv4    the published protocol; hours
"""

import itertools
import sys
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np
import tyro
from rich.progress import Progress

from scripts.common import report
from scripts.common.data import Examples
from scripts.online_hyperopt import plots as online_plots
from scripts.online_hyperopt import runs as online_runs
from scripts.online_hyperopt import tuning as online_tuning
from scripts.online_hyperopt.config import (
  NUM_EVALUATIONS,
  STREAMS,
  Config,
  Variant,
  make_problem,
  pools_of,
  rates_of,
  read,
)
from scripts.online_hyperopt.methods import METHODS, Rates
from scripts.online_hyperopt.problems import Problem
from scripts.online_hyperopt.report import Runs, summarize, table_rows, title, without_dashes
from scripts.online_hyperopt.runs import Data, Program, Run
from scripts.online_hyperopt.streams import StreamKind

CSV, PICTURE, SWEEP = "results.csv", "online_hyperopt.png", "online_sweep.png"


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
  with report.bad_input():
    config.check()
    if config.tune:
      return tune_and_report(config)
    for variant in config.variants():
      rates_of(config, variant)
    examples, test = read(config)
    make_problem(config, examples)
    pools_of(config, examples, test, config.first_seed)
    log = report.start_output(config.output_dir, "metrics.jsonl", stale=(CSV, PICTURE, SWEEP))
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
  return report.exit_status(run_and_report, config)


if __name__ == "__main__":
  sys.exit(main(tyro.cli(Config)))
