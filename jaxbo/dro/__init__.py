"""Distributionally robust training: weightings of a batch, their parts, and what they report."""

from jaxbo.dro.chi_square import chi_square, chi_square_ball
from jaxbo.dro.compositional import CompositionalState, compositional
from jaxbo.dro.cressie_read import cressie_read_ball
from jaxbo.dro.cvar import cvar, kl_cvar
from jaxbo.dro.diagnostics import WeightInfo
from jaxbo.dro.group import GroupState, group
from jaxbo.dro.kl import kl, kl_ball, tilted, uniform
from jaxbo.dro.loss_based import (
  Normalizer,
  RunningRangeState,
  extremes,
  lin_upper,
  min_max,
  quadratic,
  quantile_range,
  running_range,
  shaped,
)
from jaxbo.dro.per_example import PerExampleGrads
from jaxbo.dro.ranking import doro, mid_rank, top_k
from jaxbo.dro.reweight import ReweightState
from jaxbo.dro.robust_value import robust_value
from jaxbo.dro.sinkhorn import sinkhorn_loss
from jaxbo.dro.temperature import TargetEss, TemperatureState, target_ess
from jaxbo.dro.total_variation import total_variation_ball
from jaxbo.dro.wasserstein import WassersteinLoss, wasserstein_loss
from jaxbo.dro.weighting import Weighting

__all__ = [
  "CompositionalState",
  "GroupState",
  "Normalizer",
  "PerExampleGrads",
  "ReweightState",
  "RunningRangeState",
  "TargetEss",
  "TemperatureState",
  "WassersteinLoss",
  "WeightInfo",
  "Weighting",
  "chi_square",
  "chi_square_ball",
  "compositional",
  "cressie_read_ball",
  "cvar",
  "doro",
  "extremes",
  "group",
  "kl",
  "kl_ball",
  "kl_cvar",
  "lin_upper",
  "mid_rank",
  "min_max",
  "quadratic",
  "quantile_range",
  "robust_value",
  "running_range",
  "shaped",
  "sinkhorn_loss",
  "target_ess",
  "tilted",
  "top_k",
  "total_variation_ball",
  "uniform",
  "wasserstein_loss",
]
