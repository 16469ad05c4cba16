"""Online hyperparameter optimization: SOBOW and OAGD on streams that change.

Three problems (`--problem`), each on streams whose distribution changes with time: temperatures and
shifts of the classes in the loss, for imbalanced training data (`loss_tuning`, the protocol of
OAGD's published code); a ridge for each feature, for data with wrong labels (`ridge`); a backbone
under a linear head, for priors of the classes that move (`representation`).

Each method plays `x` and `y`, then sees the losses of the round, and takes its steps. SOBOW keeps
the last K hypergradient estimates, OAGD the last K batches. Beside each stands descent with the
same inner steps and without response (OGD), so that what `x` gains can be told from what more
inner steps do. "cum. loss" is the sum over rounds of the outer loss of what was played; "at one T"
is that of the same logits divided by one temperature for the whole run (that of even rounds chosen
on the odd ones, and the other way round), and "T" is that temperature: a method that is ahead in
the first and level in the second is better calibrated, not better. "acc. played" is the accuracy in
the same rounds, with the weights of the loss; "bal. acc." is balanced accuracy on fresh data, the
mean over 21 evaluations and at the end; "regret" is the sum of the squared norms of the true
hypergradient, where it is known; "CG stops" is the share of rounds in which conjugate gradient met
curvature that was not positive; "grads" are hypergradients evaluated in a round; "ms/round" is
for one seed, of those that run side by side; "kept KiB" is what one seed keeps beside both levels'
parameters: windows, batches, the linear solution, momenta of `x`.

Learning rates were chosen with `--tune` on the seeds 100 to 102, which are not reported, by the
cumulative loss over all streams; they are in scripts/online_hyperopt/rates.json. Methods that are
called published have those of OAGD's code and its window of 5. On streams with closed forms, the
regret against the number of rounds and the window under noise: `python -m
scripts.online_hyperopt.regret` and `.noise`.

  python -m scripts.online_hyperopt                                  digits, no download
  python -m scripts.online_hyperopt --problem ridge --dataset newsgroups
  python -m scripts.online_hyperopt --dataset mnist --model conv4    the published protocol; hours
  python -m scripts.online_hyperopt --tune --output-dir runs/rates   writes runs/rates/rates.json
"""

import functools
from collections.abc import Iterable

import numpy as np
import pandas as pd

from scripts.common import study, table
from scripts.common.study import Results, Run, Study
from scripts.common.table import Column, Table
from scripts.common.task import Cell, Row
from scripts.online_hyperopt import plots
from scripts.online_hyperopt.config import NUM_EVALUATIONS, STREAMS, Config, Data, read
from scripts.online_hyperopt.methods import Variant
from scripts.online_hyperopt.noise import Noise
from scripts.online_hyperopt.regret import Regret
from scripts.online_hyperopt.runs import Play
from scripts.online_hyperopt.slopes import mean_cell
from scripts.online_hyperopt.tuning import Tuning

__all__ = ["Noise", "OnlineHyperopt", "Regret"]  # The studies whose results are kept.

COLUMNS = {
  "cumulative_loss": Column("cum. loss", 1),
  "scaled_loss": Column("at one T", 1),
  "temperature": Column("T", 2, mean_only=True),
  "played_accuracy": Column("acc. played"),
  "mean_accuracy": Column("bal. acc."),
  "final_accuracy": Column("at the end"),
  "distance": Column("|x - x0|", 1, mean_only=True),
  "regret": Column("regret", 4),
  "breakdown_share": Column("CG stops, %", 0, 100, mean_only=True),
  "hypergradients": Column("grads", 0, mean_only=True),
  "seconds_per_round": Column("ms/round", 2, 1e3, mean_only=True),
  "state_bytes": Column("kept KiB", 1, 2**-10, mean_only=True),
}


BASELINE = "ogd"
PAIRED = ("cumulative_loss", "scaled_loss", "played_accuracy", "mean_accuracy", "final_accuracy")


def table_of(title: str, rows: pd.DataFrame) -> Table:
  """Means over the seeds that did not diverge; how many did stands beside the method.

  So does in how many rounds of all seeds the true hypergradient was not finite: the regret leaves
  them out.
  """
  by = ["method", "window"]
  rows = rows.assign(finite=np.isfinite(rows["cumulative_loss"]))
  left_out = rows.groupby(by)["left_out"].sum().to_dict()

  def label(group: tuple[str, int]) -> str:
    rounds = f", regret without {left_out[group]} rounds" if left_out[group] else ""
    return label_of(rows, *group) + rounds

  kept = rows[rows["finite"] | ~rows.groupby(by)["finite"].transform("any")]
  return table.spread(title, kept, by, label, COLUMNS).without_dashes()


def label_of(rows: pd.DataFrame, method: str, window: int) -> str:
  """The name of a method, with how many of its seeds diverged."""
  losses = rows[(rows["method"] == method) & (rows["window"] == window)]["cumulative_loss"]
  diverged = (~np.isfinite(losses)).sum()
  lost = f", {diverged} of {len(losses)} diverged" if diverged else ""
  return Variant(method, window).label + lost


def paired_table(title: str, rows: pd.DataFrame) -> Table | None:
  """Differences to OGD on the same seed, if there is OGD; seeds that diverged are left out."""
  columns = {name: COLUMNS[name] for name in PAIRED}
  finite = rows[np.isfinite(rows["cumulative_loss"])]
  of_seed = lambda mine: mine.set_index("seed")[list(columns)]
  baseline = of_seed(finite[finite["method"] == BASELINE])
  if not len(baseline):
    return None
  body = []
  for (method, window), mine in finite.groupby(["method", "window"], sort=False):
    if method != BASELINE:
      gains = (of_seed(mine) - baseline).dropna()
      cells = [mean_cell(gains[name], column.digits) for name, column in columns.items()]
      body.append([label_of(rows, str(method), int(str(window))), *cells])
  return Table(title, ["minus OGD", *(column.title for column in columns.values())], body)


class OnlineHyperopt(Study[Config]):
  """The experiment."""

  config = Config
  step_name = "evaluation"

  def depends_on(self, config: Config) -> Row:
    """The rates that were chosen."""
    return {"rates": config.rates_tables().get(config.name(), {})}

  def prepare(self, config: Config) -> Data:
    """The examples and the problem; every method must have rates."""
    for variant in config.variants():
      config.rates_of(variant)
    return read(config)

  def cells(self, run: Run[Config]) -> Iterable[Cell]:
    """Every method on every stream."""
    for variant in run.config.variants():
      for name in run.config.stream_names():
        key, label = {"stream": name, **variant._asdict()}, f"{variant.label}, {name}"
        make = functools.partial(Play, run, name, variant)
        yield Cell(key, make, NUM_EVALUATIONS, label, every=1, checkpoint_every=5)

  def tables(self, results: Results[Config]) -> Iterable[Table]:
    """Two for each stream: all that was measured, and differences to OGD in pairs."""
    config, pairs = results.config, list[Table]()
    for stream, rows in results.rows.groupby("stream", sort=False):
      what = f"{config.problem} of {config.model_name()} on {config.dataset}, stream {stream}"
      size = f"{config.rounds} rounds of {config.batch_size} examples"
      yield table_of(f"{what}: {size}; mean ± standard deviation of {config.seeds} seeds", rows)
      paired = paired_table(f"{what}: in pairs of one seed, mean ± half of the 95 % interval", rows)
      pairs += [paired] if paired else []
    yield from pairs

  def draw(self, run: Run[Config]) -> None:
    """Loss over seconds and over hypergradients; accuracy beside loss."""
    results, kinds = run.results(), STREAMS[run.config.problem]
    plots.draw_costs(results.lines, results.rows, kinds, run.path / "online_hyperopt.png")
    plots.draw_calibration(results.rows, kinds, run.path / "online_calibration.png")


def run(config: Config) -> int:
  """Runs the experiment, or chooses rates; returns the exit status."""
  return study.run(Tuning() if config.tune else OnlineHyperopt(), config)


if __name__ == "__main__":
  study.main(Config, run, __doc__)
