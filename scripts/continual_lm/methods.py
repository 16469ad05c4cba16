"""The reweightings of continual language-model training, with their rates and where these are from.

What a paper or its code says was taken, and what it does not say is our choice, made before any
result was seen. ``--tune`` chooses learning rates, and the temperature of IR-DRO, on validation.
"""

from collections.abc import Callable
from typing import Annotated, NamedTuple

import optax
from pydantic import Field

import jaxbo
from scripts.common.config import Checked, Positive

Part = Annotated[float, Field(gt=0, le=1)]


class Rates(Checked):
  """What the weightings take."""

  temperature: Positive = 1.0
  """Of IR-DRO, in nats per token; 1 is the published default."""
  compositional_rate: Part = 0.1
  """The share of a new batch in the moving average; our choice."""
  fraction: Part = 0.125
  """Of a band of ranks; 1/8 is published, for batches of 8."""
  shape_temperature: Positive = 0.4
  """Of LinUpper, Quadratic and Extremes, for scores from 0 to 1; 0.4 is published (as is 1, for the
  smallest model). The published burn-in at 100 is left out: it is for losses that do not say much
  yet, and here they are those of a trained model (our reading)."""
  level: Part = 0.25
  """Of CVaR, the share of the batch; our choice."""
  group_step_size: Positive = 0.01
  """Of group DRO; 0.01 is published."""


class Chosen(NamedTuple):
  """What a method is trained with."""

  learning_rate: float
  temperature: float | None  # Of the KL weights, for methods that have them.
  tuned: bool  # Whether both were chosen on validation.


class Method(NamedTuple):
  """A way to weigh a batch: its name, and ``weighting(rates, num_domains)``."""

  label: str
  weighting: Callable[[Rates, int], jaxbo.dro.Weighting]


METHODS = {
  "uniform": Method("uniform", lambda r, _: jaxbo.dro.uniform()),
  "ir_dro": Method("IR-DRO", lambda r, _: jaxbo.dro.kl(r.temperature)),
  "ir_dro_compositional": Method(
    "IR-DRO, compositional",
    lambda r, _: jaxbo.dro.compositional(jaxbo.dro.kl(r.temperature), r.compositional_rate),
  ),
  "mid_rank_0": Method(
    "MidRanking, band 0 (hardest)", lambda r, _: jaxbo.dro.mid_rank(r.fraction, 0)
  ),
  "mid_rank_1": Method("MidRanking, band 1", lambda r, _: jaxbo.dro.mid_rank(r.fraction, 1)),
  "mid_rank_3": Method("MidRanking, band 3", lambda r, _: jaxbo.dro.mid_rank(r.fraction, 3)),
  "lin_upper": Method("LinUpper", lambda r, _: jaxbo.dro.lin_upper(r.shape_temperature)),
  "quadratic": Method("Quadratic", lambda r, _: jaxbo.dro.quadratic(r.shape_temperature)),
  "extremes": Method("Extremes", lambda r, _: jaxbo.dro.extremes(r.shape_temperature)),
  "cvar": Method("CVaR", lambda r, _: jaxbo.dro.cvar(r.level)),
  "group_dro": Method("group DRO", lambda r, domains: jaxbo.dro.group(domains, r.group_step_size)),
}
HAVE_TEMPERATURE = ("ir_dro", "ir_dro_compositional")
BASELINE = "uniform"
START = "checkpoint"  # What all of them go on from, whatever their seed.
START_KEY = {"corruption": 0.0, "method": START, "seed": 0}
LABELS = {START: "checkpoint (no training on)"} | {n: one.label for n, one in METHODS.items()}


def make_optimizer(
  weighting: jaxbo.dro.Weighting, learning_rate: optax.ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
  """Weighted gradients, clipped, into AdamW with the settings that GPT-like models are used to."""
  return optax.chain(
    jaxbo.reweight(weighting),
    optax.clip_by_global_norm(1.0),
    optax.adamw(learning_rate, b1=0.9, b2=0.95, weight_decay=0.1),
  )


def pretraining_schedule(learning_rate: float, num_steps: int) -> optax.Schedule:
  """A warm-up over a twentieth of the steps, then a cosine down to a tenth."""
  warm_up = max(num_steps // 20, 1)
  return optax.warmup_cosine_decay_schedule(
    learning_rate / warm_up, learning_rate, warm_up, num_steps, 0.1 * learning_rate
  )


def continual_schedule(learning_rate: float, num_steps: int) -> optax.Schedule:
  """A warm-up over a tenth of the steps, while Adam's moments form, then constant as published."""
  warm_up = max(num_steps // 10, 1)
  return optax.linear_schedule(learning_rate / warm_up, learning_rate, warm_up)
