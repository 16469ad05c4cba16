"""What runs of continual language-model training say: numbers of a run, and tables of all."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxbo
from benchmarks.measure import Timing
from scripts.common import report
from scripts.continual_lm.data import HeldOut, Sequences
from scripts.continual_lm.methods import BASELINE, METHODS
from scripts.continual_lm.train import Window

Row = dict[str, Any]  # a line of metrics.jsonl, or a row of results.csv

START, START_LABEL = "checkpoint", "checkpoint (no training on)"
QUANTILES = {"median": 0.5, "q90": 0.9, "q99": 0.99}


def of_window(window: Window, sequences: Sequences, domains: Sequence[str]) -> Row:
  """The means over some steps: the loss, the effective sample size, and relative weights.

  A weight is relative to that of uniform weights, 1; it is NaN where there is nothing to weigh.
  """
  weights = window.shown.weights
  domain, corrupted = sequences.domain[window.rows], sequences.corrupted[window.rows]
  mean = lambda chosen: float(weights[chosen].mean()) if chosen.any() else math.nan
  return {
    "train_loss": float(window.shown.losses.mean()),
    "ess": float(window.shown.effective_sample_size.mean()),
    "weight_clean": mean(~corrupted),
    "weight_noise": mean(corrupted),
    **{f"weight/{name}": mean(domain == i) for i, name in enumerate(domains)},
  }


def of_held_out(losses: np.ndarray, held_out: HeldOut, domains: Sequence[str]) -> Row:
  """Mean, worst domain, quantiles, and the mean of each domain, in nats per token.

  Mean and quantiles are over sequences of the mixture of domains that is trained on.
  """
  domain, weights = held_out.sequences.domain, held_out.weights
  means = {name: float(losses[domain == i].mean()) for i, name in enumerate(domains)}
  quantiles = np.quantile(losses, [*QUANTILES.values()], weights=weights, method="inverted_cdf")
  return {
    "loss": float(weights @ losses),
    "worst": max(means.values()),
    "worst_domain": max(means, key=lambda name: means[name]),
    **dict(zip(QUANTILES, quantiles.tolist(), strict=True)),
    **{f"loss/{name}": value for name, value in means.items()},
  }


def of_run(lines: Sequence[Row], steps: int, tokens_per_step: int) -> Row:
  """What a run has been like, from all of its lines: means over its steps."""
  lengths = np.diff([0, *(line["step"] for line in lines)])
  means = {}
  for name in lines[0]:
    if name == "ess" or name.startswith("weight"):
      values = [math.nan if line[name] is None else line[name] for line in lines]
      means[name] = float(np.average(values, weights=lengths))
  return means | {"tokens_per_second": steps * tokens_per_step / lines[-1]["seconds"]}


def weighted_losses(
  weighting: jaxbo.Weighting, losses: np.ndarray, sizes: Sequence[int], num_batches: int
) -> list[float]:
  """The weighted mean of losses in random batches of each size: what a weighting looks at.

  It is the mean loss for uniform weights, and the more above it the more a method prefers what is
  hard. Weights do not have to sum to 1 in every batch.
  """
  batches = np.random.default_rng(0).choice(losses, (num_batches, max(sizes)))

  @jax.jit
  def of_size(batches, size):
    def weigh(state, batch):
      mask = jnp.arange(len(batch)) < size
      weights, state, _ = weighting.weigh(batch, state, mask=mask)
      return state, (weights.sum(), (weights * batch).sum())

    _, (sums, products) = jax.lax.scan(weigh, weighting.init(), batches)
    return products.sum() / sums.sum()

  return [float(of_size(batches, size)) for size in sizes]


# -- Tables: means over seeds, and differences to uniform weights in pairs of runs of one seed.


def label_of(method: str) -> str:
  """The name of a row."""
  return START_LABEL if method == START else METHODS[method].label


def runs_of(rows: Sequence[Row], corruption: float) -> Iterator[tuple[str, list[Row]]]:
  """The methods at a share of noise with their runs; the checkpoint counts as one at each."""
  arm = [row for row in rows if row["corruption"] == corruption or row["method"] == START]
  for method in dict.fromkeys(row["method"] for row in arm):
    yield method, [row for row in arm if row["method"] == method]


def differences(rows: Sequence[Row], corruption: float, method: str, name: str) -> list[float]:
  """A number of a method minus that of uniform weights, for each seed that has both."""
  runs = dict(runs_of(rows, corruption))
  base = {row["seed"]: row[name] for row in runs.get(BASELINE, [])}
  mine = runs.get(method, [])
  return [row[name] - base[row["seed"]] for row in mine if row["seed"] in base]


def loss_table(
  rows: Sequence[Row], corruption: float, domains: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
  """Columns and rows: losses on the test set."""
  columns = {"loss": "loss", "worst": "worst domain", **{f"loss/{d}": d for d in domains}}
  table = []
  for method, mine in runs_of(rows, corruption):
    spread = [report.mean_and_spread(row[name] for row in mine) for name in columns]
    table.append([label_of(method), str(len(mine)), *spread])
  return ["method", "seeds", *columns.values()], table


def comparison_table(
  rows: Sequence[Row], corruption: float, timings: Mapping[str, Timing]
) -> tuple[list[str], list[list[str]]]:
  """Columns and rows: differences to uniform weights, what the weights are like, and their cost."""
  compared = {"loss": "loss", "worst": "worst domain", **{name: name for name in QUANTILES}}
  table = []
  for method, mine in runs_of(rows, corruption):
    cells = [label_of(method)]
    cells += [report.mean_and_spread(differences(rows, corruption, method, n)) for n in compared]
    spread = lambda name, mine=mine: report.mean_and_spread((row[name] for row in mine), 2)
    shown = ("ess", "weight_noise") if corruption else ("ess",)
    if method == START:
      cells += ["-"] * (len(shown) + 1)
    else:
      cells += [spread(name) for name in shown]
      cells.append(f"{np.mean([row['tokens_per_second'] for row in mine]):.0f}")
    timing = timings.get(method)
    cells.append(f"{timing.ratio:.2f} ± {timing.spread:.2f}" if timing else "-")
    table.append(cells)
  noise = ["noise weight"] if corruption else []
  return ["minus uniform", *compared.values(), "ESS", *noise, "tokens/s", "time"], table
