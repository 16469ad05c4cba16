"""Continual pre-training: light training on by reweighted losses, from one checkpoint.

A small byte-level transformer is trained on a mixture of domains. From its checkpoint, every
reweighting of sequences goes on for a few steps on the same data, in the same batches: IR-DRO, with
and without the compositional normaliser, bands of MidRanking, LinUpper, Quadratic, Extremes, CVaR
and group DRO over domains, beside uniform weights. Then the same with noise in a share of the
sequences.

Claim (3 seeds; docs/experiments/continual_lm.md has the table): on clean data uniform weights have
the best mean loss, and methods that prefer what is hard trade it for the worst domain or the
hardest sequences. With 20 % of the sequences shuffled, IR-DRO gives noise 2.3 times its share and
loses 0.11 nats to uniform weights; MidRanking's band 3 and Quadratic, which give it less than its
share, lose nothing.

The text is what ships with Python: topics of its manual, documentation strings, code, names of
characters. It is the same for one version of Python; losses of two versions do not compare.
Held-out sequences are of other documents, and the same for all methods. Losses are in nats per
token (a byte here), and means over the mixture of domains that is trained on. Tables have the mean
and the standard deviation over seeds; differences are between runs of the same seed. "ESS" is the
effective sample size as a share of the batch, "noise weight" the mean weight of noisy sequences, 1
for uniform weights; "time" is that of a step beside one with uniform weights, in turns.

  python -m scripts.continual_lm                           8 minutes on 2 CPU cores, no download
  python -m scripts.continual_lm --dataset text_domains    WikiText-2, novels, politics, ...
  python -m scripts.continual_lm --init hf --model-dir DIR --dataset text_domains --batch-size 8
                                                           real GPT-2, OPT or Pythia weights
  ... --resume                                             goes on bit for bit where it was stopped

Batches are divided among all devices. Several processes, on one machine or many that share
output_dir, need --distributed, or where they cannot find each other:
  ... --coordinator-address HOST:PORT --num-processes 2 --process-id 0      and the same with 1
"""

import sys

import jax
import numpy as np
import tyro
from jax.experimental import multihost_utils
from rich.console import Console

import jaxbo
from scripts.common import report
from scripts.continual_lm import data as lm_data
from scripts.continual_lm import documents as lm_documents
from scripts.continual_lm import plots as lm_plots
from scripts.continual_lm import report as lm_report
from scripts.continual_lm import run as lm_run
from scripts.continual_lm.config import Config
from scripts.continual_lm.data import LanguageData
from scripts.continual_lm.methods import BASELINE
from scripts.continual_lm.report import Row
from scripts.continual_lm.run import Outcome, Runner

CSV, METRICS, PICTURES = "results.csv", "metrics.jsonl", ("continual_lm.png", "curves.png")


def connect(config: Config) -> None:
  """Meets the other processes; before anything is computed."""
  config.check_processes()
  if config.coordinator_address is not None:
    jax.distributed.initialize(config.coordinator_address, config.num_processes, config.process_id)
  elif config.distributed:
    jax.distributed.initialize()


def read(config: Config) -> tuple[lm_run.Language, LanguageData]:
  """The model, and the sequences that it is trained and tested on."""
  corpus = lm_documents.read(config.dataset, config.data_dir)
  language, length = lm_run.make_language(config), config.sequence_length()
  if length > language.max_length:
    raise ValueError(
      f"length must be at most {language.max_length}, that of the model; got {length}"
    )
  sizes = config.validation_sequences, config.test_sequences
  data = lm_data.make(corpus, language.tokenizer, length, *sizes)
  if config.batch_size > len(data.train.tokens):
    raise ValueError(
      f"batch_size must be at most {len(data.train.tokens)}, the sequences for training; got "
      f"{config.batch_size}"
    )
  return language, data


def prepare_output(config: Config) -> list[Row]:
  """Checks and writes the identity of the run; returns the lines of the run that goes on."""
  if config.resume:
    lines = report.read_run(config.output_dir, config.identity(), METRICS)
    lines = lm_run.lines_to_keep(config, lines)
  else:
    report.start_run(config.output_dir, config.identity())
    lines = []
  if jax.process_count() > 1:  # No process may write what another is still to read.
    multihost_utils.sync_global_devices("output_dir is prepared")
  return lines


def looked_at(config: Config, losses: np.ndarray) -> dict[str, tuple[list[int], list[float]]]:
  """What IR-DRO looks at in batches of each size, plain and compositional."""
  temperature, rate = config.rates.temperature, config.rates.compositional_rate
  plain = jaxbo.kl(temperature)
  of_all = float(np.exp((losses - losses.max()) / temperature) @ losses)
  of_all /= float(np.exp((losses - losses.max()) / temperature).sum())
  sizes = [2**i for i in range(9)]
  curves = {"ir_dro": plain, "ir_dro_compositional": jaxbo.compositional(plain, rate)}
  values = {
    name: (sizes, lm_report.weighted_losses(weighting, losses, sizes, 1000))
    for name, weighting in curves.items()
  }
  ends = [sizes[0], sizes[-1]]
  return values | {
    "": (ends, [of_all, of_all]),
    BASELINE: (ends, [float(losses.mean())] * 2),
  }


def of_this_run(config: Config, row: Row) -> bool:
  """Whether it is of a method, a share of noise and a seed that were asked for this time."""
  wanted = row["method"] in config.methods and row["corruption"] in config.corruptions
  return wanted and row["seed"] in config.all_seeds()


def print_and_draw(config: Config, data: LanguageData, outcome: Outcome, console: Console) -> None:
  """Prints tables, and writes the rows and pictures of what there is."""
  kept_by = ("corruption", "method", "seed") if config.resume else ()
  report.write_csv(config.output_dir / CSV, outcome.rows, kept_by)
  for corruption in config.corruptions:
    if not any(of_this_run(config, r) and r["corruption"] == corruption for r in outcome.rows):
      continue
    title = (
      f"{config.dataset}, {lm_plots.arm_title(corruption, config.corruption_kind)}: "
      f"{config.steps} steps of {config.batch_size} sequences of {config.sequence_length()} tokens"
    )
    losses = lm_report.loss_table(outcome.rows, corruption, data.domains)
    report.print_table(console, f"{title}; test loss", *losses)
    compared = lm_report.comparison_table(outcome.rows, corruption, outcome.timings)
    report.print_table(console, f"{title}; test loss minus that of uniform weights", *compared)
  begun = lambda line: of_this_run(config, line) and line["seed"] in outcome.start
  lines = [line for line in outcome.lines if begun(line)]
  written = f"{METRICS} and {CSV}"
  if any(of_this_run(config, row) for row in outcome.rows):
    written = f"{METRICS}, {CSV} and pictures"
    overview, curves = (config.output_dir / name for name in PICTURES)
    kind = config.corruption_kind
    lm_plots.draw_overview(outcome.rows, lines, data.domains, kind, overview)
    by_size = looked_at(config, outcome.start_losses)
    lm_plots.draw_curves(lines, outcome.start, by_size, kind, curves)
  console.print(f"{written} are in {config.output_dir}")


def run_and_report(config: Config) -> int:
  """Runs, prints and saves; returns the exit status."""
  with report.bad_input():
    connect(config)
    config.check()
    language, data = read(config)
    outcome = Outcome(prepare_output(config))
  if jax.process_index():  # Works along with process 0, which writes and prints.
    with report.progress_bar(Console(quiet=True)) as progress:
      Runner(config, language, data, outcome, lambda **values: None, progress).run_all()
    return 0
  console, status = report.console(), 0
  log = report.MetricsLog(config.output_dir / METRICS, outcome.lines)
  with log, report.progress_bar(console) as progress:
    try:
      Runner(config, language, data, outcome, log.write, progress).run_all()
    except KeyboardInterrupt:
      status = 130
  if status:
    console.print("Interrupted; --resume goes on. What was finished until then:")
  if outcome.rows:
    print_and_draw(config, data, outcome, console)
  return status


def main(config: Config) -> int:
  """Runs, prints and saves. Returns the exit status: 130 if interrupted, with what was finished."""
  return report.exit_status(run_and_report, config)


if __name__ == "__main__":
  sys.exit(main(tyro.cli(Config)))
