"""Tables of continual language-model training."""

from collections.abc import Iterable

import pandas as pd

from scripts.common import table
from scripts.common.study import Results
from scripts.common.table import Column, Table
from scripts.continual_lm import plots, report
from scripts.continual_lm.config import Config
from scripts.continual_lm.methods import BASELINE, LABELS, METHODS, START

LOSSES = {
  "loss": Column("loss"),
  "calibrated": Column("calibrated loss"),
  "calibration": Column("softmax temperature", 2),
  "accuracy": Column("accuracy"),
  "accuracy_by_gain": Column("accuracy by gain"),
  "worst": Column("worst domain"),
}


def of(results: Results[Config]) -> Iterable[Table]:
  """For each share of noise losses, differences and weights; what a step costs; and rates."""
  config, rows = results.config, results.rows
  domains = [name.removeprefix("loss/") for name in map(str, rows) if name.startswith("loss/")]
  losses = {name: column for name, column in LOSSES.items() if name in rows}  # Older runs: not all.
  quantiles = {name: Column(name) for name in report.QUANTILES}
  weights = {
    "ess": Column("ESS", 2),
    **{f"weight/{name}": Column(name, 2) for name in domains},
    "weight_noise": Column("noise weight", 2),
    "tokens_per_second": Column("tokens/s", 0, mean_only=True),
  }
  for corruption in report.shares_of_noise(rows):
    noise = plots.arm_title(corruption, config.corruption_kind)
    title = (
      f"{config.data_name()}, {noise}: {config.steps_of(BASELINE)} steps of "
      f"{config.rows_of_batch()} sequences of {config.sequence_length()} tokens"
    )
    arm = report.of_arm(rows, corruption)
    of_domains = {f"loss/{name}": Column(name) for name in domains}
    yield table.spread(f"{title}; test loss", arm, "method", LABELS, losses | of_domains)
    if BASELINE in set(arm["method"]):
      minus = f"{title}; test loss minus that of uniform weights"
      differ = {name: column for name, column in losses.items() if name != "calibration"}
      pairs, differ = report.in_pairs(arm), differ | quantiles
      yield table.paired(minus, pairs, "method", BASELINE, LABELS, differ)
    trained = arm[arm["method"] != START]
    told = table.spread(f"{title}; mean weights", trained, "method", LABELS, weights)
    yield told.without_dashes()
  times = {name: results.notes.get(f"time/{name}") for name in METHODS}
  ratio = lambda time: f"{time['ratio']:.2f} ± {time['spread']:.2f}"
  steps = [[LABELS[n], f"{1e3 * t['seconds']:.1f}", ratio(t)] for n, t in times.items() if t]
  if steps:
    yield Table("time beside uniform weights, in turns", ["method", "ms/step", "time"], steps)
  if "learning_rate" in rows:
    yield of_rates(rows[rows["method"] != START])


def of_rates(rows: pd.DataFrame) -> Table:
  """What every method was trained with."""
  columns = ["method", "noise", "learning rate", "KL temperature", "chosen on validation"]
  rates = ["corruption", "method", "learning_rate", "temperature", "tuned"]
  number = lambda value: "-" if pd.isna(value) else f"{float(value):g}"
  body = [
    [LABELS[method], f"{noise:.0%}", number(rate), number(temperature), "yes" if tuned else "no"]
    for noise, method, rate, temperature, tuned in rows[rates].drop_duplicates().to_numpy().tolist()
  ]
  return Table("rates", columns, body)
