"""Continued pre-training and instruction tuning with reweighted losses, from one checkpoint.

A small byte-level transformer is trained on a mixture of domains. From its checkpoint, every
reweighting goes on for a few steps in the same batches: IR-DRO, with and without the compositional
normaliser, bands of MidRanking, LinUpper, Quadratic, Extremes, CVaR and group DRO over domains,
beside uniform weights. Then the same with noise in a share of the sequences. `--task pretrain` goes
on with the same text. `--task instruct` learns responses to prompts: several examples in a row that
do not see each other, each with a weight of its own, and the loss is that of the response.

Claim (pretrain, an older model of 120,640 parameters; docs/experiments/continual_lm.md has the
table): on clean data uniform weights have the best mean loss, and methods that prefer what is hard
trade it for the worst domain or the hardest sequences. With 20 % of the sequences shuffled, IR-DRO
gives noise 2.3 times its share and loses 0.11 nats to uniform weights; MidRanking's band 3 and
Quadratic, which give it less than its share, lose nothing.

The text is what ships with Python: topics of its manual, documentation strings, code, names of
characters; instructions are signatures of its functions and the first sentences that document them.
They are the same for one version of Python; losses of two versions do not compare. Held-out
sequences are of other documents, and the same for all methods. Losses are in nats per token (a byte
here), and means over the mixture of domains that is trained on. "Calibrated" is the test loss at
the one softmax temperature that is best on validation; "accuracy" the share of test prompts whose
response is likelier, for each token, than three others of its domain (chance: 0.25), and "by gain"
the share where the prompt raises the likelihood of the right one most. Tables have the mean and the
standard deviation over seeds; differences are between runs of the same seed. "ESS" is the effective
sample size as a share of the examples of a batch, "noise weight" the mean weight of noisy ones, 1
for uniform weights; "time" is that of a step beside one with uniform weights, in turns.

  python -m scripts.continual_lm                           no download; minutes are on the page
  python -m scripts.continual_lm --task instruct           the same, on instructions
  ... --task instruct --instructions gsm8k self_instruct_seed --length 512   other ones
  ... --task instruct --corruption-kind swapped            the noise: responses of others
  python -m scripts.continual_lm --dataset text_domains    WikiText-2, novels, politics, ...
  python -m scripts.continual_lm --dataset MINE.txt        or .jsonl; --instructions MINE.jsonl
  python -m scripts.continual_lm --tune --output-dir runs/rates   writes runs/rates/rates.json
  python -m scripts.continual_lm --rates-file runs/rates/rates.json          the report with these
  ... --pretrained runs/rates/pretrained                   goes on from the first phase of that run
  python -m scripts.continual_lm --init hf --model-dir DIR --dataset text_domains --batch-size 8
                                                           weights of the Hugging Face hub
  ... --resume                                             goes on bit for bit where it was stopped
  python -m scripts.continual_lm --smoke                   the smallest run, less than a minute

Batches are divided among all devices.

Several processes, on one machine or many that share output_dir, need --distributed, or where they
cannot find each other:
  ... --coordinator-address HOST:PORT --num-processes 2 --process-id 0      and the same with 1
"""

import functools
import itertools
from collections.abc import Iterable

import numpy as np

from scripts.common import study
from scripts.common.study import Results, Run, Study
from scripts.common.table import Table
from scripts.common.task import Cell, Row
from scripts.continual_lm import plots, report, runs, tables
from scripts.continual_lm.config import Config
from scripts.continual_lm.methods import BASELINE, LABELS, START
from scripts.continual_lm.runs import Given, Training
from scripts.continual_lm.tuning import Tuning


class ContinualLM(Study[Config]):
  """The experiment."""

  config = Config

  def depends_on(self, config: Config) -> Row:
    """The rates that were chosen."""
    return {"rates_chosen": config.rates_tables().get(config.name(), {})}

  def prepare(self, config: Config) -> Given:
    """The model, and the sequences that it is trained and tested on."""
    return runs.prepare(config)

  def begin(self, run: Run[Config]) -> None:
    """Says what the data are like."""
    run.note("left_out", lambda: run.data.left_out)
    run.note("domains", lambda: list(run.data.data.domains))

  def cells(self, run: Run[Config]) -> Iterable[Cell]:
    """The checkpoint, and from there all methods on all seeds at every share of noise."""
    config = run.config
    start = runs.start(run, Training)
    yield start
    chosen = (config.all_seeds(), config.corruptions, runs.methods_of(run))
    for seed, corruption, method in itertools.product(*chosen):
      key = {"corruption": corruption, "method": method, "seed": seed}
      make, steps = functools.partial(Training, run, **key), config.steps_of(method)
      every = config.eval_every
      noise = f", {corruption:.0%} noise" if corruption else ""
      label = f"seed {seed}{noise}, {LABELS[method]}"
      yield Cell(key, make, steps, label, every, every, needs=(start,))

  def finish(self, run: Run[Config]) -> None:
    """Times the steps of methods whose time is not known yet."""
    config = run.config
    if config.timing_rounds and BASELINE in config.methods:
      times = functools.cache(lambda: runs.time_steps(run))
      for method in runs.methods_of(run):
        run.note(f"time/{method}", lambda m=method: times()[m]._asdict())

  def tables(self, results: Results[Config]) -> Iterable[Table]:
    """For each share of noise losses and differences of them; what a step costs; and rates."""
    yield from tables.of(results)

  def remarks(self, results: Results[Config]) -> Iterable[str]:
    """What was left out."""
    notes, config = results.notes, results.config
    if notes.get("left_out"):
      yield f"{notes['left_out']} examples were left out: they are longer than a row"
    if "group_dro" in config.methods and len(notes.get("domains", ())) == 1:
      yield "group DRO was left out: there is one domain"

  def draw(self, run: Run[Config]) -> None:
    """Losses, weights, and their ESS; curves, and what weights look at by batch size."""
    results, domains, kind = run.results(), run.data.data.domains, run.config.corruption_kind
    rows, lines = results.rows, results.lines
    if set(rows["method"]) - {START}:
      plots.draw_overview(rows, lines, domains, kind, run.path / "continual_lm.png")
      losses = np.array(results.notes["start_losses"], np.float32)
      looked_at = report.looked_at(run.config.rates, losses)
      start = rows.loc[rows["method"] == START, "validation_loss"].item()
      plots.draw_curves(lines, start, looked_at, kind, run.path / "curves.png")


def run(config: Config) -> int:
  """Runs the experiment, or chooses rates; returns the exit status."""
  return study.run(Tuning() if config.tune else ContinualLM(), config)


if __name__ == "__main__":
  study.main(Config, run, __doc__)
