"""What is told of runs of continual language-model training."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

import jaxbo
from scripts.common.task import Row
from scripts.continual_lm.data import HeldOut, LanguageData, Sequences
from scripts.continual_lm.methods import BASELINE, METHODS, START, Rates
from scripts.continual_lm.train import Shown

QUANTILES = {"median": 0.5, "q90": 0.9, "q99": 0.99}
TEMPERATURES = tuple(2.0 ** (i / 8) for i in range(-8, 17))  # Of the softmax, 0.5 to 4.
Curve = tuple[list[int], list[float]]


def of_window(
  shown: Shown, rows: np.ndarray, sequences: Sequences, domains: Sequence[str]
) -> dict[str, float]:
  """The means over steps of ``[steps, ...]`` that were shown, on ``[steps, batch]`` rows.

  A weight is relative to that of uniform weights, 1; it is NaN where there is nothing to weigh.
  """
  domain, corrupted = (
    field[rows].reshape(shown.losses.shape) for field in (sequences.domain, sequences.corrupted)
  )
  there = domain >= 0
  mean = lambda chosen: float(shown.weights[chosen].mean()) if chosen.any() else math.nan
  return {
    "train_loss": float(shown.losses[there].mean()),
    "ess": float(shown.effective_sample_size.mean()),
    "weight_clean": mean(there & ~corrupted),
    "weight_noise": mean(there & corrupted),
    **{f"weight/{name}": mean(domain == i) for i, name in enumerate(domains)},
  }


def of_held_out(losses: np.ndarray, held_out: HeldOut, domains: Sequence[str]) -> Row:
  """Mean, worst domain, quantiles, and the mean of each domain, in nats per token.

  Mean and quantiles are over sequences of the mixture of domains that is trained on.
  """
  domain, weights = held_out.sequences.domains(), held_out.weights
  means = {name: float(losses[domain == i].mean()) for i, name in enumerate(domains)}
  quantiles = np.quantile(losses, [*QUANTILES.values()], weights=weights, method="inverted_cdf")
  return {
    "loss": float(weights @ losses),
    "worst": max(means.values()),
    "worst_domain": max(means, key=lambda name: means[name]),
    **dict(zip(QUANTILES, quantiles.tolist(), strict=True)),
    **{f"loss/{name}": value for name, value in means.items()},
  }


def calibrated(validation: np.ndarray, test: np.ndarray, data: LanguageData) -> Row:
  """The test loss at the one softmax temperature that is best on validation.

  The losses are ``[examples, temperatures]``. A weighting that lowers a model's confidence lowers
  its worst losses, and so does a temperature: what is left here is not of that kind.
  """
  best = int(np.argmin(data.validation.weights @ validation))
  return {
    "calibrated": float(data.test.weights @ test[:, best]),
    "calibration": TEMPERATURES[best],
  }


def accuracies(right: np.ndarray, others: np.ndarray, alone: np.ndarray, data: LanguageData) -> Row:
  """The share of questions whose right response is likelier, for each token, than the others.

  And the share of those whose right response gains more by the prompt, against the same response
  without a prompt, than the others: whether a response is a likely text has no part in it.

  ``right`` are the losses of the test examples, ``others`` those with other responses, ``alone``
  those of responses without prompts. Examples count as in the mean loss; a tie is wrong.
  """
  assert data.choices is not None
  asked, of_others, *_ = data.choices
  weights, others = data.test.weights[asked], others.reshape(of_others.shape)
  share = lambda right, others: float(np.average(right < others.min(axis=1), weights=weights))
  return {
    "accuracy": share(right[asked], others),
    "accuracy_by_gain": share(right[asked] - alone[asked], others - alone[of_others]),
  }


def of_run(lines: Sequence[Row], tokens_per_step: int) -> dict[str, float]:
  """What a run has been like, from all of its lines: means over its steps."""
  told = pd.DataFrame(lines)
  lengths = np.diff(told["step"], prepend=0)
  names = [name for name in told if name == "ess" or str(name).startswith("weight")]
  means = {str(n): float(np.average(told[n].astype(float), weights=lengths)) for n in names}
  tokens = lines[-1]["step"] * tokens_per_step
  return means | {"tokens_per_second": tokens / lines[-1]["seconds"]}


def weighted_losses(
  weighting: jaxbo.dro.Weighting, losses: np.ndarray, sizes: Sequence[int], num_batches: int
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


def looked_at(rates: Rates, losses: np.ndarray) -> dict[str, Curve]:
  """What IR-DRO looks at in batches of each size: its name, sizes, weighted means of losses.

  It is compared with its own weights of all losses at once, under ``""``, and with uniform ones.
  """
  sizes = [2**i for i in range(9)]
  looks = lambda name: weighted_losses(METHODS[name].weighting(rates, 1), losses, sizes, 1000)
  values = {name: (sizes, looks(name)) for name in ("ir_dro", "ir_dro_compositional")}
  weights, ends = np.exp((losses - losses.max()) / rates.temperature), [sizes[0], sizes[-1]]
  flat = {"": float(weights @ losses) / float(weights.sum()), BASELINE: float(losses.mean())}
  return values | {name: (ends, [value, value]) for name, value in flat.items()}


def shares_of_noise(rows: pd.DataFrame) -> list[float]:
  """Those that methods have rows or lines of."""
  return sorted(rows.loc[rows["method"] != START, "corruption"].unique().tolist())


def of_arm(rows: pd.DataFrame, corruption: float) -> pd.DataFrame:
  """The rows of methods at a share of noise; the checkpoint counts as one at each."""
  return rows[(rows["corruption"] == corruption) | (rows["method"] == START)]


def in_pairs(arm: pd.DataFrame) -> pd.DataFrame:
  """The rows of an arm with the checkpoint's once for each seed, if all began at one."""
  start, trained = arm[arm["method"] == START], arm[arm["method"] != START]
  if len(start) > 1:
    return arm
  return pd.concat([*(start.assign(seed=seed) for seed in trained["seed"].unique()), trained])
