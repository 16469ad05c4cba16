"""Online meta-learning without task boundaries: LEEDS, C-MAML and others on OSAKA's streams.

A stream brings 10-way 5-shot rounds of Omniglot's characters, MNIST's digits and Fashion-MNIST's
clothes. In each round the task stays with probability p; the learner is told neither when a task
ends nor the domain of the next one. Conv4 was pre-trained on other characters by MAML (by ANIL for
ANIL), with early stopping. Every method then plays the same rounds, with the same number of inner
steps:

* "acc. before" is the accuracy in percent on the images of a round *before* their labels are used.
  The next columns have it by domain and for all rounds out of distribution. "after" is the accuracy
  after adaptation, on the same images (on others with `--query given`). With 10 ways, chance is
  10 %; in the round of a switch every method is at chance, because labels are drawn anew.
* "regret" is the task-averaged regret against the best fixed model of each task, a copy of the
  pre-trained one that saw all rounds of the task many times. "meta-upd." counts meta-updates. "KiB"
  is the memory beside the meta-model (the task's model, buffers, moments, detectors).
* `jaxbo.meta.detection_quality` judges detectors: precision, recall, delay in rounds, false alarms;
  of switches, and of shifts, which are switches that leave the domain of the pre-training.

Claim (500 rounds, p = 0.9, 3 seeds, percent before adaptation): LEEDS reaches 78.4 (3.7), and so
does a version that is told all switches. A restart at switches without meta-updates reaches 78.2
(3.7), in pairs 0.2 less (95 % interval: 0.6 to either side); fine-tuning reaches 75.3 (3.3), 3.1
less (1.4 to either side). C-MAML (69.4) and MetaOGD (65.8; LEEDS 78.0, 200 rounds) were measured
by an older version, with one model and thresholds that had seen other images of the classes that
are out of distribution. The program is more careful now:

* Each seed pre-trains its own model. Streams of characters alone, which neither pre-training nor
  the report uses, give every model its thresholds.
* "restart" is LEEDS without meta-updates: from the pre-trained model at every detected switch.
* C-MAML's detector is always on; its threshold is a quantile of the scores of each model.

"Told" methods know the switches. The rates in scripts/online_meta/rates.json were chosen with
`--tune` on streams of other characters and other images (those of C-MAML and of the restart by this
version, the others by an older one). The traces in checkpoints/ keep the scores of every round, for
later sweeps over thresholds.

  python -m scripts.online_meta                         about 20 minutes on one core
  python -m scripts.online_meta --tune --output-dir runs/rates
                                                        chooses rates, for --rates-file
  python -m scripts.online_meta --validation --methods leeds leeds_told --switch-score drop
                                                        an open choice of LEEDS, on validation
                                                        streams
  python -m scripts.online_meta --size 28 --width 64 --rounds 10000 --seeds 5 --seeds-at-once 5
                                                        the published size, for a GPU; --tune first
  python -m scripts.online_meta --dataset glyphs        drawn on the spot; --tune first
  ... --resume                                          goes on where a run was stopped

What is cut by default: images of 16 pixels instead of 28, 16 channels instead of 64, streams of 200
rounds instead of 10,000, 2 draws of BGD instead of 5.
"""

import functools
import itertools
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pandas as pd

from scripts.common import study, table
from scripts.common.study import Results, Run, Study
from scripts.common.table import Column, Table
from scripts.common.task import Cell, Row
from scripts.online_meta import plots, pretraining, runs, sweep, tuning
from scripts.online_meta.config import Config, read
from scripts.online_meta.data import NAMES, Domains
from scripts.online_meta.methods import METHODS, Rates
from scripts.online_meta.report import Trace
from scripts.online_meta.runs import Streams
from scripts.online_meta.tuning import Tuning

LABELS = {name: method.label for name, method in METHODS.items()}


def columns(dataset: str) -> dict[str, Column]:
  """Accuracies in percent and what they cost."""
  titles = {
    "accuracy": "acc. before",
    **{f"accuracy_domain_{i}": name for i, name in enumerate(NAMES[dataset])},
    "accuracy_out": "all OOD",
    "accuracy_after": "after",
  }
  return {
    **{name: Column(title, 1, 100) for name, title in titles.items()},
    "regret": Column("regret", 1),
    "meta_updates": Column("meta-upd.", 0, mean_only=True),
    "seconds_per_round": Column("ms/round", 1, 1e3, mean_only=True),
    "state_bytes": Column("KiB", 0, 2**-10, mean_only=True),
  }


def paired_columns(dataset: str) -> dict[str, Column]:
  """Accuracies before adaptation, with 95 % intervals of the mean."""
  shown = [name for name in columns(dataset) if name.startswith("accuracy")]
  return {name: replace(columns(dataset)[name], interval=True) for name in shown}


DETECTION = {
  "precision": Column("precision", 2),
  "recall": Column("recall", 2),
  "delay": Column("delay", 2),
  "false_alarms": Column("false alarms", 1),
}


def detection_table(title: str, rows: pd.DataFrame) -> Table:
  """How well switches and shifts were detected, for the methods that detect."""
  parts = []
  for kind, plural in (("switch", "switches"), ("shift", "shifts")):
    changes = rows.groupby("method")[f"num_{plural}"].mean()
    names = {f"{kind}_{name}": name for name in DETECTION}
    label = [f"{LABELS[name]}, {changes[name]:.0f} {plural}" for name in rows["method"]]
    parts.append(rows.rename(columns=names)[[*DETECTION]].assign(detector=label))
  found = pd.concat(parts).sort_index(kind="stable").dropna(subset="false_alarms")
  return table.spread(title, found, "detector", str, DETECTION)


def traces_of(run: Run[Config]) -> dict[tuple[float, str], Trace]:
  """The traces of the first seed, by stream and method, as far as there are any."""
  first = [cell for cell in run.finished() if cell.key["group"] == run.config.first_seed]
  name = lambda cell: (cell.key["stay_probability"], cell.key["method"])
  return {name(cell): Trace(**run.saved(cell)).of(0) for cell in first}


class OnlineMeta(Study[Config]):
  """The experiment."""

  config = Config

  def depends_on(self, config: Config) -> Row:
    """The rates that were chosen."""
    return {"rates": config.rates_tables().get(config.name(), {})}

  def prepare(self, config: Config) -> Domains:
    """The images; every method must have rates."""
    for name in config.methods:
      config.rates_of(name)
    return read(config)

  def cells(self, run: Run[Config]) -> Iterable[Cell]:
    """Pre-training, then every method on every stream, in groups of seeds."""
    config = run.config
    begins = dict.fromkeys(["maml", *(METHODS[name].begins for name in config.methods)])
    for kind, seed in itertools.product(begins, config.all_seeds()):
      if kind != "random":
        yield pretraining.cell(run, kind, seed)
    for p, seeds in itertools.product(config.stay_probabilities, config.groups()):
      where = f"p = {p:g}, seed {seeds[0]}"
      key = {"stay_probability": p, "method": "best", "group": int(seeds[0])}
      streams = Streams(p, seeds)
      make = functools.partial(runs.Best, run, streams)
      best = Cell(key, make, 1, f"best fixed models, {where}")
      yield best
      for name in config.methods:
        rates = functools.partial(tuning.rates_of, run, name, seeds)
        make = functools.partial(runs.Play, run, name, rates, streams)
        yield Cell(key | {"method": name}, make, 1, f"{LABELS[name]}, {where}", needs=(best,))

  def finish(self, run: Run[Config]) -> None:
    """Tries other thresholds of LEEDS, on the first stream and the first seed."""
    config = run.config
    traces = traces_of(run)
    p = config.stay_probabilities[0]
    if not config.sweep or (p, "leeds") not in traces:
      return
    streams = Streams(p, config.groups()[0])
    rates = Rates(*(np.ravel(rate)[0] for rate in tuning.rates_of(run, "leeds", streams.seeds)))
    play = lambda rates: runs.play(run, "leeds", rates, streams).of(0)
    rows = pd.DataFrame(sweep.measure(run, rates, traces[p, "leeds"], play))
    told = traces[p, "leeds_told"].before.mean() if (p, "leeds_told") in traces else None
    chosen = {kind: getattr(rates, kind) for kind in ("switch", "shift")}
    plots.draw_sweep(rows, chosen, told, run.path / "online_meta_sweep.png")

  def tables(self, results: Results[Config]) -> Iterable[Table]:
    """Three for each stream."""
    config = results.config
    for p, rows in results.rows.groupby("stay_probability", sort=False):
      network = f"Conv4 of width {config.width}" if config.network == "conv4" else config.network
      title = (
        f"{config.dataset}, p = {p:g}: {config.rounds} rounds, {config.num_ways}-way "
        f"{config.num_shots}-shot, {config.size} pixels, {network}, "
        f"{config.inner_steps} inner steps; mean ± standard deviation of {config.seeds} seeds"
      )
      yield table.spread(title, rows, "method", LABELS, columns(config.dataset))
      if results.config.seeds > 1 and {"leeds"} < set(rows["method"]):
        title = f"p = {p:g}, in pairs; mean and 95 % interval by Student's t"
        yield table.paired(title, rows, "method", "leeds", LABELS, paired_columns(config.dataset))
      detection = detection_table(f"Detection, p = {p:g}", rows)
      if detection.rows:
        yield detection

  def remarks(self, results: Results[Config]) -> Iterable[str]:
    """The thresholds that this run has found."""
    for name, found in results.notes.items():
      if name.startswith("thresholds"):
        yield f"{name}: {found}"

  def draw(self, run: Run[Config]) -> None:
    """Accuracy over rounds, and how far behind LEEDS the others are."""
    names = NAMES[run.config.dataset]
    plots.draw_rounds(traces_of(run), names, run.path / "online_meta_rounds.png")
    rows = run.results().rows
    if {"leeds"} < set(rows["method"]):
      plots.draw_pairs(rows, run.path / "online_meta.png")


def run(config: Config) -> int:
  """Runs the experiment, or chooses rates; returns the exit status."""
  return study.run(Tuning() if config.tune else OnlineMeta(), config)


if __name__ == "__main__":
  study.main(Config, run, __doc__)
