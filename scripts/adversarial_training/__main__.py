"""Adversarial training: DONE beside nine other methods, on balanced and on long-tailed data.

Each method trains a small network on images that an attack changes within a box: plain adversarial
training (AT), TRADES, MART, friendly adversarial training (FAT), GAIRAT, MAIL, Fast-BAT, AT with KL
weights, and DONE, which smooths the attack by a barrier and differentiates through it; its attack
is gradient descent or Adam. Model, images, batches, steps of the attack, steps of training and
optimizer are the same for all methods.

Claim (long-tailed MNIST, epsilon 0.1, rates chosen on validation, 95 % intervals of 5 pairs): DONE
lowers the loss of the worst 10 % of the test images by 0.31 (0.04) nats against AT, but with the
best temperature of the softmax for each model it is 0.06 (0.14) above AT's, and RA-Tail-30 gains
0.3 (0.9) points. MAIL gains 5.1 (2.2).

Accuracies are in percent, on test images with the same number in each class. "Worst case" counts an
image only if it withstands PGD-20 and the four attacks of AutoAttack, with fewer steps than
published. "RA-Tail-30" is the mean of this accuracy over the worst 30 % of the classes (three of
ten), "worst class" is that of the worst class. "loss of the worst 10 %" is the mean cross-entropy
under PGD-20 of the tenth of the images with the highest loss; "calibrated" is the same with the one
temperature of the softmax that is best on validation images. Tables have the mean and the standard
deviation over seeds, and gains the mean and its 95 % interval; seconds per epoch count training
alone. Methods that reweight can look better under PGD than they are, so look at the worst case;
warnings of the checks for masked gradients are printed below the tables.

  python -m scripts.adversarial_training                     45 minutes on one core
  python -m scripts.adversarial_training --tune --output-dir runs/rates   writes rates.json there
  python -m scripts.adversarial_training --dataset cifar10   after a download by TFDS
  ... --smoke                                                the smallest run, of two methods
  ... --resume                                               goes on bit for bit

Batches are divided among all devices, attacked images too.

Several processes, on one machine or many that share output_dir, need --distributed, or where they
cannot find each other:
  ... --coordinator-address HOST:PORT --num-processes 2 --process-id 0      and the same with 1
"""

import functools
import itertools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from scripts.adversarial_training import plots
from scripts.adversarial_training.config import Config
from scripts.adversarial_training.data import SETS, counts_of
from scripts.adversarial_training.methods import BASELINE, DONE, LABELS
from scripts.adversarial_training.train import Training, Workplace
from scripts.adversarial_training.tuning import Tuning
from scripts.common import study, table
from scripts.common.study import Results, Run, Study
from scripts.common.table import Column, Table
from scripts.common.task import Cell, Row

COLUMNS = {
  "clean": Column("clean", 1),
  "pgd": Column("PGD-20", 1),
  "worst": Column("worst case", 1),
  "tail": Column("RA-Tail-30", 1),
  "worst_class": Column("worst class", 1),
  "tail_loss": Column("loss of the worst 10 %", 2),
  "tail_loss_calibrated": Column("calibrated", 2),
}
ALONE = {  # No gains of these.
  "softmax_temperature": Column("best temperature", 2),
  "seconds_per_epoch": Column("s / epoch", 2),
}


class AdversarialTraining(Study[Config]):
  """The report: every method on every training set and seed."""

  config = Config
  step_name = "epoch"

  def prepare(self, config: Config) -> Workplace:
    """The images, enough for every training set, and what else all runs share."""
    return Workplace(config)

  def depends_on(self, config: Config) -> Row:
    """The rates that were chosen."""
    return {"rates_chosen": config.rates_tables().get(config.name(), {})}

  def cells(self, run: Run[Config]) -> Iterable[Cell]:
    """Every method on every training set and seed."""
    config = run.config
    for seed, kind, method in itertools.product(config.all_seeds(), config.sets, config.methods):
      key = {"set": kind, "method": method, "seed": seed}
      make = functools.partial(Training, run, kind, method, seed, config.chosen(kind, method))
      label = f"seed {seed}, {SETS[kind]}, {LABELS[method]}"
      yield Cell(key, make, config.epochs, label, every=1, checkpoint_every=1)

  def tables(self, results: Results[Config]) -> Iterable[Table]:
    """For each training set, means over seeds, and gains in pairs of runs of one seed."""
    for kind, rows in results.rows.groupby("set", sort=False):
      counts = class_counts(results, str(kind))
      title = (
        f"{results.config.dataset}, {SETS[str(kind)]} ({counts.max()} to {counts.min()} images of "
        f"a class), epsilon {results.config.largest_change():.3g}, {results.config.epochs} epochs"
      )
      yield table.spread(title, rows, "method", LABELS, COLUMNS | ALONE)
      if {BASELINE} < set(rows["method"]):
        title += f"; gain over {LABELS[BASELINE]}, with 95 % intervals"
        columns = {name: replace(column, interval=True) for name, column in COLUMNS.items()}
        yield table.paired(title, rows, "method", BASELINE, LABELS, columns)

  def remarks(self, results: Results[Config]) -> Iterable[str]:
    """What each run's robust accuracies are doubted for."""
    for row in results.rows.to_dict("records"):
      if row["doubts"]:
        of_run = f"{SETS[row['set']]}, {LABELS[row['method']]}, seed {row['seed']}"
        yield f"[red]Doubtful: {of_run}: {row['doubts']}[/red]"

  def draw(self, run: Run[Config]) -> None:
    """Gains of each class; weights and attacked images of the first seed on the last set."""
    config, names, path = run.config, run.data.images.names, run.path
    compared = [name for name in (BASELINE, DONE) if name in config.methods] or config.methods[:2]
    results = run.results()
    counts = {kind: class_counts(results, kind) for kind in config.sets}
    plots.draw_gains(results.rows, counts, names, path / plots.GAINS)
    last = {"set": config.sets[-1], "seed": config.first_seed}
    params = {
      cell.key["method"]: run.saved(cell)["params"]
      for cell in run.finished()
      if cell.key["method"] in compared and last.items() <= cell.key.items()
    }
    if BASELINE in params:
      shown = plots.weights_and_margins(run.data, params[BASELINE])
      plots.draw_weights(*shown, path / plots.WEIGHTS)
    if params:
      plots.draw_examples(*plots.examples(run.data, params), names, path / plots.EXAMPLES)


def class_counts(results: Results[Config], kind: str) -> Any:
  """How many images of each class a training set has."""
  num_classes = sum(str(name).startswith("robust/") for name in results.rows.columns)
  return counts_of(kind, num_classes, results.config.largest, results.config.ratio)


def run(config: Config) -> int:
  """Runs the report, or chooses rates; returns the exit status."""
  return study.run(Tuning() if config.tune else AdversarialTraining(), config)


if __name__ == "__main__":
  study.main(Config, run, __doc__)
