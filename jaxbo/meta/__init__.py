"""Online meta-learning: the learner, change detectors, thresholds, scores and baselines."""

from jaxbo.meta.baselines import fine_tuning, frozen_maml, meta_ogd, train_from_scratch
from jaxbo.meta.bgd import BgdInfo, BgdState, bayesian_gradient_descent
from jaxbo.meta.cmaml import ModulationInfo, ModulationState, c_maml
from jaxbo.meta.cmaml_pap import SupportBuffer, c_maml_pap
from jaxbo.meta.detection import (
  Detection,
  Detector,
  DetectorState,
  Scores,
  oracle_detector,
  threshold_detector,
)
from jaxbo.meta.detection_quality import DetectionQuality, detection_quality
from jaxbo.meta.gate import GateInfo, GateScales, GateState
from jaxbo.meta.learner import online_meta_learner
from jaxbo.meta.ood_scores import energy_score, entropy_score, max_softmax_score
from jaxbo.meta.rounds import (
  OnlineMetaInfo,
  OnlineMetaLearner,
  OnlineMetaState,
  Prediction,
  TaskModel,
)
from jaxbo.meta.task_regret import task_averaged_regret
from jaxbo.meta.thresholds import (
  FixedThresholdState,
  QuantileThresholdState,
  Threshold,
  Thresholds,
  calibrate,
  fixed_threshold,
  quantile_threshold,
)

__all__ = [
  "BgdInfo",
  "BgdState",
  "Detection",
  "DetectionQuality",
  "Detector",
  "DetectorState",
  "FixedThresholdState",
  "GateInfo",
  "GateScales",
  "GateState",
  "ModulationInfo",
  "ModulationState",
  "OnlineMetaInfo",
  "OnlineMetaLearner",
  "OnlineMetaState",
  "Prediction",
  "QuantileThresholdState",
  "Scores",
  "SupportBuffer",
  "TaskModel",
  "Threshold",
  "Thresholds",
  "bayesian_gradient_descent",
  "c_maml",
  "c_maml_pap",
  "calibrate",
  "detection_quality",
  "energy_score",
  "entropy_score",
  "fine_tuning",
  "fixed_threshold",
  "frozen_maml",
  "max_softmax_score",
  "meta_ogd",
  "online_meta_learner",
  "oracle_detector",
  "quantile_threshold",
  "task_averaged_regret",
  "threshold_detector",
  "train_from_scratch",
]
