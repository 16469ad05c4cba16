"""Online meta-learning without task boundaries: LEEDS, C-MAML and others on OSAKA's streams.

A stream brings 10-way 5-shot rounds of Omniglot's characters, MNIST's digits and Fashion-MNIST's
clothes. A task stays with probability p; nobody says when it ends, nor from which domain the next
one is. Conv4 was trained before on other characters, by MAML (ANIL for ANIL) with early stopping.
Every method then plays the same rounds, with the same number of inner steps:

* "acc. before" is the accuracy on the images of a round *before* their labels are used (in percent,
  as the next ones), then by domain, in all rounds out of distribution, and after adaptation, on the
  images that were adapted to (on others with `--query given`). With 10 ways, chance is 10 %; the
  round of a switch is chance for everybody, since labels are drawn anew.
* "regret" is the task-averaged regret against the best fixed model of each task, a copy of the
  pre-trained one that saw all rounds of the task many times; "meta-upd." counts meta-updates, "KiB"
  is what is kept beside the meta-model (the task's model, buffers, moments, detectors).
* Detectors are judged by `jaxbo.detection_quality`: precision, recall, delay in rounds, false
  alarms; of switches, and of shifts, the switches that lead out of the pre-training's domain.

Claim (default size, 3 seeds, percent before adaptation): LEEDS reaches 78.5 (3.7) at p = 0.9 and
90.4 (1.4) at p = 0.98, as a version that is told all switches does; C-MAML 71.1 (4.9) and 85.0
(1.3), MetaOGD 68.3 (4.5) and 79.2 (1.7), fine-tuning 75.7 (3.6) and 90.1 (1.5).

"told" methods know the switches. Rates are from scripts/online_meta/rates.json: they were chosen
with `--tune` on streams of other characters and other images. On such streams the thresholds of
LEEDS are calibrated first, after the pre-training. Scores of every round are kept with the traces
in checkpoints/, for sweeps of thresholds after the fact.

  python -m scripts.online_meta                         11 minutes on 2 cores
  python -m scripts.online_meta --tune                  chooses rates
  python -m scripts.online_meta --validation --methods leeds leeds_told --switch-score drop
                                                        an open choice of LEEDS, on validation
                                                        streams
  python -m scripts.online_meta --size 28 --width 64 --rounds 10000 --seeds 5 --seeds-at-once 5
                                                        the published size, for a GPU; --tune first
  python -m scripts.online_meta --dataset glyphs        drawn on the spot; --tune first
  ... --resume                                          goes on where a run was stopped

What is cut by default: images of 16 pixels instead of 28, 16 channels instead of 64, streams of 200
rounds instead of 10,000, 2 draws of BGD instead of 5, one pre-training for all seeds.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import tyro

from scripts.common import report
from scripts.online_meta import plots as meta_plots
from scripts.online_meta import report as meta_report
from scripts.online_meta import tuning as meta_tuning
from scripts.online_meta import workplace as meta_workplace
from scripts.online_meta.config import Config, read
from scripts.online_meta.methods import METHODS, Rates
from scripts.online_meta.plots import Sweep
from scripts.online_meta.report import Runs
from scripts.online_meta.runs import Run
from scripts.online_meta.workplace import Workplace

CSV, PICTURE, SWEEP = "results.csv", "online_meta.png", "online_meta_sweep.png"


def run_all(place: Workplace, rates: dict[str, Rates], runs: Runs) -> None:
  """Every method on every stream; fills ``runs`` as it goes."""
  config = place.config
  groups, streams = config.groups(), config.stay_probabilities
  place.progress.update(place.task, total=len(rates) * len(groups) * len(streams))
  for name, mine in rates.items():
    for p in streams:
      runs[p, name] = joined([place.kept(f"{p:g}_{name}", name, mine, p, s) for s in groups])


def with_own_thresholds(place: Workplace, rates: dict[str, Rates]) -> dict[str, Rates]:
  """The thresholds of LEEDS for the pre-trained model of this run, where none are given.

  Another machine rounds otherwise, and pre-training then ends at another model, with other scores.
  """
  if "leeds" not in rates or not np.isnan([rates["leeds"].switch, rates["leeds"].shift]).any():
    return rates
  seeds = np.arange(place.config.seeds_at_once) + meta_tuning.FIRST_SEED
  streams = place.config.stay_probabilities
  runs = [place.play("leeds_told", rates["leeds"], p, seeds, test=False) for p in streams]
  found = meta_tuning.thresholds(runs)
  given = rates["leeds"]
  own = {name: getattr(found, name) for name in found._fields if np.isnan(getattr(given, name))}
  place.progress.console.print(f"LEEDS, calibrated on validation streams: {own}")
  return rates | {"leeds": given._replace(**own)}


def joined(parts: Sequence[Run]) -> Run:
  """The runs of all seeds as one."""
  trace = jax.tree.map(lambda *leaves: np.concatenate(leaves), *(part.trace for part in parts))
  return Run(trace, sum(part.seconds for part in parts), parts[0].state_bytes)


def tune(place: Workplace) -> None:
  """Chooses the rates of every method on validation streams; each is saved at once."""
  config = place.config
  seeds = np.arange(config.seeds_at_once) + meta_tuning.FIRST_SEED
  streams = config.stay_probabilities
  for name in config.methods:
    if name == "leeds_told":  # It has those of LEEDS.
      continue
    count = sum(len(meta_tuning.grid_of(name, f)) for f in ("inner", *METHODS[name].moves))
    place.progress.update(place.task, total=count * len(streams), completed=0)
    play = lambda name, rates: [place.play(name, rates, p, seeds, test=False) for p in streams]
    rates, value = meta_tuning.search(name, play)
    unknown = {"switch": np.nan, "shift": np.nan} if name == "leeds" else {}  # Of each run.
    meta_tuning.write(config.rates_file, config.name(), name, rates._replace(**unknown))
    place.progress.console.print(f"{METHODS[name].label}: accuracy {value:.4f} with {rates}")
    if name == "leeds":
      calibrated = [place.play("leeds", rates, p, seeds, test=False) for p in streams]
      place.progress.console.print(
        f"LEEDS with its own detectors: accuracy {meta_tuning.score(calibrated):.4f}"
      )


def print_tables(config: Config, names: Sequence[str], results: list[Any], console: Any) -> None:
  """Both tables of every stream."""
  for p in config.stay_probabilities:
    mine = [result for result in results if result.stay_probability == p]
    if not mine:
      continue
    title = (
      f"{config.dataset}, p = {p:g}: {config.rounds} rounds, {config.num_ways}-way "
      f"{config.num_shots}-shot, {config.size} pixels, Conv4 of width {config.width}, "
      f"{config.inner_steps} inner steps; mean ± standard deviation of {config.seeds} seeds"
    )
    columns = meta_report.accuracy_columns(names)
    report.print_table(console, title, columns, meta_report.accuracy_rows(mine))
    rows = meta_report.detection_rows(mine)
    if rows:
      columns = meta_report.DETECTION_COLUMNS
      report.print_table(console, f"Detection, p = {p:g}", columns, rows)


def prepare_output(config: Config) -> None:
  """Makes the folder, or checks that it is of the same run."""
  wanted = json.loads(json.dumps(config.identity()))
  if config.resume:
    report.read_run(config.output_dir, wanted, "none")
  else:
    report.start_run(config.output_dir, wanted)


def chosen_rates(config: Config) -> dict[str, Rates]:
  """The rates of all methods, with what was given on the command line.

  Raises:
    ValueError: if some were not chosen, or one is NaN.
  """
  names = config.methods
  rates = dict(meta_tuning.all_rates(config.rates_file, config.name(), names))
  for name, mine in rates.items():
    for threshold in METHODS[name].thresholds:
      if np.isnan(getattr(mine, threshold)) and name != "leeds":  # LEEDS finds its own.
        raise ValueError(f"{name}: {threshold} must be a number or an infinity, got none")
    if name.startswith("leeds") and config.in_distribution_scale is not None:
      rates[name] = mine._replace(in_scale=config.in_distribution_scale)
  return rates


def run_and_report(config: Config) -> int:
  """Runs, prints and saves; returns the exit status."""
  with report.bad_input():
    config.check()
    domains = read(config)
    rates = {} if config.tune else chosen_rates(config)
    if not config.tune:
      prepare_output(config)
  console, status = report.console(), 0
  runs: Runs = {}
  best: dict[float, np.ndarray] = {}
  sweeps: dict[str, Sweep] = {}
  with report.progress_bar(console) as progress:
    place = Workplace(config, domains, progress)
    try:
      if config.tune:
        tune(place)
        return 0
      rates = with_own_thresholds(place, rates)
      run_all(place, rates, runs)
      best = meta_workplace.best_losses(place)
      if config.sweep and "leeds" in rates:
        sweeps = meta_workplace.sweep_all(place, rates["leeds"], runs)
    except KeyboardInterrupt:
      status = 130
  if status:
    console.print("Interrupted; --resume goes on. What was finished until then:")
  if runs:
    write_report(config, domains.names, runs, best, sweeps, console)
  return status


def write_report(
  config: Config,
  names: Sequence[str],
  runs: Runs,
  best: dict[float, np.ndarray],
  sweeps: dict[str, Sweep],
  console: Any,
) -> None:
  """Tables, ``results.csv`` and pictures of what there is."""
  seeds = range(config.first_seed, config.first_seed + config.seeds)
  nothing = np.full((config.seeds, config.rounds), np.nan, np.float32)
  known = {p: best.get(p, nothing) for p in config.stay_probabilities}
  results = meta_report.summarize(runs, seeds, known)
  kept_by = ("stay_probability", "method", "seed") if config.resume else ()
  report.write_csv(config.output_dir / CSV, [result._asdict() for result in results], kept_by)
  print_tables(config, names, results, console)
  meta_plots.draw_rounds(runs, names, config.output_dir / PICTURE)
  if sweeps:
    p = config.stay_probabilities[0]
    told = runs[p, "leeds_told"].trace.before[0].mean() if (p, "leeds_told") in runs else None
    meta_plots.draw_sweep(sweeps, told, config.output_dir / SWEEP)
  console.print(f"{CSV}, traces with all scores and pictures are in {config.output_dir}")


def main(config: Config) -> int:
  """Runs, prints and saves. Returns the exit status: 130 if interrupted, with what was finished."""
  return report.exit_status(run_and_report, config)


if __name__ == "__main__":
  sys.exit(main(tyro.cli(Config)))
