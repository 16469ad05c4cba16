"""Varies one rate of one method at a time, and says what the images for validation say.

Nothing here looks at the test set.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from scripts.adversarial_training import report as adv_report
from scripts.adversarial_training.config import Config
from scripts.adversarial_training.data import SETS, AdversarialData
from scripts.adversarial_training.methods import GRIDS, METHODS, Rates
from scripts.adversarial_training.report import Row
from scripts.adversarial_training.run import Outcome, Runner
from scripts.common import report

CSV = "tune.csv"
COLUMNS = {
  "clean": "clean",
  "pgd": "PGD-20",
  "worst": "APGD worst case",
  "tail": "RA-Tail-30",
  "worst_class": "worst class",
  "tail_loss": "loss of the worst 10 %",
}


def settings(config: Config) -> Iterator[tuple[str, str, Config]]:
  """Methods and what is changed of them: nothing, and then one rate at a time."""
  for method in config.methods:
    yield method, "as given", config
    for name, values in GRIDS.get(method, {}).items():
      for value in values:
        if value != getattr(config.rates, name):
          rates: Rates = dataclasses.replace(config.rates, **{name: value})
          yield method, f"{name} {value:g}", dataclasses.replace(config, rates=rates)


def tune_and_report(config: Config, data: AdversarialData, console: Console) -> int:
  """Trains and prints; returns the exit status."""
  with report.bad_input():
    try:
      config.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise report.not_writable(config.output_dir, error) from error
  rows: list[Row] = []
  status, all_settings = 0, list(settings(config))
  with report.progress_bar(console) as progress:
    runner = Runner(config, data, Outcome([]), lambda **values: None, progress)
    bar = progress.add_task(
      "tuning", total=len(config.sets) * len(all_settings) * config.seeds, loss=""
    )
    try:
      for kind in config.sets:
        for method, changed, setting in all_settings:
          for seed in config.all_seeds():
            params = _train(runner, kind, method, seed, setting, changed)
            told = runner.evaluator.of_test(params, data.validation, data.names)
            rows.append({"set": kind, "method": method, "changed": changed, "seed": seed} | told)
            progress.advance(bar)
            progress.update(bar, loss=f"{METHODS[method].label}, {changed}: {told['tail']:.1f} %")
    except KeyboardInterrupt:
      status = 130
  if rows:
    report.write_csv(config.output_dir / CSV, rows)
  for kind in config.sets:
    title = f"{config.dataset}, {SETS[kind]}: validation images, one rate changed at a time"
    report.print_table(console, title, *table(rows, kind))
  return status


def table(rows: list[Row], kind: str) -> tuple[list[str], list[list[str]]]:
  """Columns and rows of a training set: mean and spread over seeds."""
  runs: dict[tuple[str, str], list[Row]] = {}
  for row in rows:
    if row["set"] == kind:
      runs.setdefault((row["method"], row["changed"]), []).append(row)
  cells = [
    [
      f"{METHODS[method].label}, {changed}",
      *(
        report.mean_and_spread((row[name] for row in mine), adv_report.digits(name))
        for name in COLUMNS
      ),
    ]
    for (method, changed), mine in runs.items()
  ]
  return ["method", *COLUMNS.values()], cells


def _train(runner: Runner, kind: str, method: str, seed: int, config: Config, changed: str) -> Any:
  trainer = runner.trainer(kind, method, seed, config, changed)
  for _ in trainer.fit(0, config.epochs):
    pass
  return trainer.state.params
