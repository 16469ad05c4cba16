"""Distributionally robust training: weightings of a batch, their parts, and what they report."""

from jaxbo.dro.chi_square import chi_square, chi_square_ball
from jaxbo.dro.compositional import CompositionalState, compositional
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
from jaxbo.dro.temperature import TargetEss, TemperatureState, target_ess
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
  "WeightInfo",
  "Weighting",
  "chi_square",
  "chi_square_ball",
  "compositional",
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
  "target_ess",
  "tilted",
  "top_k",
  "uniform",
]
