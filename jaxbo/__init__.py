"""Gradient transformations for problems with more than one level.

A method is an optax gradient transformation: gradients go in, better gradients come out, memory
lives in the state. A *response* takes the gradients of the outer loss at the inner solution and
gives the hypergradient; behind it stands any optax chain.

>>> import jax, jax.numpy as jnp, jaxbo, optax
>>> def inner_loss(x, y, batch):                        # ridge regression, x = log regularisation
...   return jnp.mean((batch["a"] @ y - batch["b"]) ** 2) + jnp.exp(x) * jnp.sum(y**2)
>>> def outer_loss(x, y, batch):
...   return jnp.mean((batch["a"] @ y - batch["b"]) ** 2)
>>> inner = jaxbo.inner_solver(inner_loss, optax.sgd(0.1), num_steps=50)
>>> outer = optax.chain(jaxbo.add_implicit_response(inner, jaxbo.conjugate_gradient(5)),
...                     optax.adam(0.1))
>>> init, step = jaxbo.bilevel(outer_loss, inner, outer)

**The inner problem**: :func:`inner_solver`, :class:`InnerSolver`, :class:`InnerSolution`;
:func:`over_tasks` for a meta-batch.

**Responses**: :func:`add_unrolled_response` (ITD), :func:`add_implicit_response` (AID) with
:func:`conjugate_gradient`, :func:`neumann` and :func:`fixed_point`, :func:`add_es_response` (ESJ),
:func:`drop_response` (first order).

**Value functions**, for inner problems with many minima, on :class:`Bilevel` parameters:
:func:`add_primal_dual_penalty` (PDBO), :func:`add_dynamic_barrier` (BOME),
:func:`add_value_function_penalty` (V-PBGD, F2SA); around them :func:`add_proximal_terms` and
:func:`scale_by_lagrangian_smoothness`, behind them :func:`project`; :func:`project_params` is that
for one level.

**Online**, where the losses change with time: :func:`window_average`, a window of old gradients
(SOBOW), :func:`average_over_batches`, old losses at the current iterate (OAGD),
:func:`add_corrected_response`, momentum corrections (SOGD); the loop :func:`online` over a stream,
with the metrics :func:`local_regret` and :func:`path_length`.

**Online meta-learning**, where tasks change without notice: the loop :func:`online_meta_learner`;
:func:`threshold_detector` and :func:`oracle_detector` of task switches and distribution shifts,
with :func:`quantile_threshold` and :func:`calibrate`; :func:`gate_by_detection` around an
optimizer; the metrics :func:`detection_quality` and :func:`task_averaged_regret`.

**Tasks**: :func:`jaxbo.tasks.sample_episode`; streams, :func:`jaxbo.tasks.minibatch_stream` and
:func:`jaxbo.tasks.phase_stream`; streams of tasks, :func:`jaxbo.tasks.osaka_stream`.

**Distributionally robust training**: :func:`per_example_grad` and :func:`reweight` with a
:class:`Weighting`: :func:`kl` (IR-DRO), :func:`kl_ball`, :func:`cvar`, :func:`kl_cvar`,
:func:`chi_square`, :func:`chi_square_ball`, :func:`tilted`, :func:`group`, :func:`mid_rank`,
:func:`top_k`, :func:`doro`, :func:`lin_upper`, :func:`quadratic`, :func:`extremes`,
:func:`uniform`, :func:`compositional`; :func:`streaming_grad` and :func:`robust_value`.

**Adversarial training**: attacks :func:`pgd`, :func:`fgsm`, :func:`apgd`, :func:`square`;
:func:`done_grad` and :func:`fast_bat_grad`, gradients through the attack; losses
:func:`trades_loss`, :func:`mart_loss`; weights :func:`gairat`, :func:`mail`, :func:`wat`;
:func:`evaluate_robustness` with :func:`standard_attacks`.

**Whole methods**: :func:`esj`, :func:`itd`, :func:`aid`, :func:`stocbio`, and the loop
:func:`bilevel`; :func:`pdbo`, :func:`proximal_pdbo`, :func:`bome`, :func:`v_pbgd`, :func:`f2sa`;
:func:`sobow`, :func:`oagd`, :func:`ogd`, :func:`sogd`; :func:`leeds`, and beside it
:func:`fine_tuning`, :func:`frozen_maml`, :func:`train_from_scratch`, :func:`meta_ogd`,
:func:`c_maml` and :func:`c_maml_pap` with :func:`modulate_by_loss`,
:func:`bayesian_gradient_descent`; :func:`ir_dro`, :func:`group_dro`, :func:`cvar_dro`,
:func:`chi2_dro`, :func:`term`; :func:`done`.
"""

from jaxbo import tasks as tasks
from jaxbo.adversarial.apgd import apgd
from jaxbo.adversarial.attack import Attack, AttackInfo
from jaxbo.adversarial.class_metrics import class_accuracy, tail_accuracy
from jaxbo.adversarial.done import done, done_grad
from jaxbo.adversarial.evaluate import RobustnessReport, evaluate_robustness, standard_attacks
from jaxbo.adversarial.fast_bat import fast_bat_grad
from jaxbo.adversarial.implicit import DoneInfo
from jaxbo.adversarial.losses import (
  cross_entropy_loss,
  margin_loss,
  mart_loss,
  probabilistic_margin,
  trades_loss,
)
from jaxbo.adversarial.pgd import fgsm, pgd
from jaxbo.adversarial.square import square
from jaxbo.adversarial.weightings import WatState, gairat, mail, wat
from jaxbo.bilevel.driver import BilevelInfo, BilevelState, bilevel
from jaxbo.bilevel.dynamic_barrier import (
  DynamicBarrierInfo,
  DynamicBarrierState,
  add_dynamic_barrier,
  bome,
)
from jaxbo.bilevel.es import EsInfo, EsResponseState, add_es_response, esj
from jaxbo.bilevel.implicit import (
  ImplicitInfo,
  ImplicitResponseState,
  add_implicit_response,
  aid,
  stocbio,
)
from jaxbo.bilevel.inner import InnerInfo, InnerSolution, InnerSolver, Through, inner_solver
from jaxbo.bilevel.lagrangian import scale_by_lagrangian_smoothness
from jaxbo.bilevel.linear_solvers import (
  LinearInfo,
  LinearSolver,
  conjugate_gradient,
  fixed_point,
  neumann,
)
from jaxbo.bilevel.over_tasks import over_tasks
from jaxbo.bilevel.parameters import Bilevel
from jaxbo.bilevel.penalty import (
  ValuePenaltyInfo,
  ValuePenaltyState,
  add_value_function_penalty,
  f2sa,
  v_pbgd,
)
from jaxbo.bilevel.primal_dual import (
  PrimalDualInfo,
  PrimalDualState,
  add_primal_dual_penalty,
  pdbo,
)
from jaxbo.bilevel.projection import project, project_params
from jaxbo.bilevel.proximal import (
  ProximalInfo,
  ProximalState,
  add_proximal_terms,
  proximal_pdbo,
)
from jaxbo.bilevel.response import DropInfo, DropResponseState, drop_response
from jaxbo.bilevel.unrolled import (
  UnrolledInfo,
  UnrolledResponseState,
  add_unrolled_response,
  itd,
)
from jaxbo.dro.aliases import chi2_dro, cvar_dro, group_dro, ir_dro, term
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
from jaxbo.dro.per_example import PerExampleGrads, per_example_grad
from jaxbo.dro.ranking import doro, mid_rank, top_k
from jaxbo.dro.reweight import ReweightState, reweight
from jaxbo.dro.robust_value import robust_value
from jaxbo.dro.streaming import streaming_grad
from jaxbo.dro.temperature import TargetEss, TemperatureState, target_ess
from jaxbo.dro.weighting import Weighting
from jaxbo.online.bgd import BgdInfo, BgdState, bayesian_gradient_descent
from jaxbo.online.cmaml import ModulationInfo, ModulationState, c_maml, modulate_by_loss
from jaxbo.online.cmaml_pap import SupportBuffer, c_maml_pap
from jaxbo.online.detection import (
  Detection,
  Detector,
  DetectorState,
  Scores,
  oracle_detector,
  threshold_detector,
)
from jaxbo.online.detection_quality import DetectionQuality, detection_quality
from jaxbo.online.driver import Online, OnlineInfo, OnlineState, online
from jaxbo.online.gate import GateInfo, GateScales, GateState, gate_by_detection
from jaxbo.online.leeds import leeds
from jaxbo.online.meta_baselines import (
  fine_tuning,
  frozen_maml,
  meta_ogd,
  train_from_scratch,
)
from jaxbo.online.meta_learner import OnlineMetaLearner, online_meta_learner
from jaxbo.online.meta_rounds import OnlineMetaInfo, OnlineMetaState, Prediction, TaskModel
from jaxbo.online.oagd import BatchAverageInfo, BatchAverageState, average_over_batches, oagd
from jaxbo.online.ood_scores import energy_score, entropy_score, max_softmax_score
from jaxbo.online.regret import Accumulated, local_regret, path_length
from jaxbo.online.rounds import OnlineBatch, OnlineMetric, OnlineRound
from jaxbo.online.sobow import ogd, sobow
from jaxbo.online.sogd import (
  CorrectedResponseInfo,
  CorrectedResponseState,
  Triple,
  add_corrected_response,
  sogd,
)
from jaxbo.online.task_regret import task_averaged_regret
from jaxbo.online.thresholds import (
  FixedThresholdState,
  QuantileThresholdState,
  Threshold,
  Thresholds,
  calibrate,
  fixed_threshold,
  quantile_threshold,
)
from jaxbo.online.window import Window, WindowAverageInfo, WindowAverageState, window_average

__all__ = [
  "Accumulated",
  "Attack",
  "AttackInfo",
  "BatchAverageInfo",
  "BatchAverageState",
  "BgdInfo",
  "BgdState",
  "Bilevel",
  "BilevelInfo",
  "BilevelState",
  "CompositionalState",
  "CorrectedResponseInfo",
  "CorrectedResponseState",
  "Detection",
  "DetectionQuality",
  "Detector",
  "DetectorState",
  "DoneInfo",
  "DropInfo",
  "DropResponseState",
  "DynamicBarrierInfo",
  "DynamicBarrierState",
  "EsInfo",
  "EsResponseState",
  "FixedThresholdState",
  "GateInfo",
  "GateScales",
  "GateState",
  "GroupState",
  "ImplicitInfo",
  "ImplicitResponseState",
  "InnerInfo",
  "InnerSolution",
  "InnerSolver",
  "LinearInfo",
  "LinearSolver",
  "ModulationInfo",
  "ModulationState",
  "Normalizer",
  "Online",
  "OnlineBatch",
  "OnlineInfo",
  "OnlineMetaInfo",
  "OnlineMetaLearner",
  "OnlineMetaState",
  "OnlineMetric",
  "OnlineRound",
  "OnlineState",
  "PerExampleGrads",
  "Prediction",
  "PrimalDualInfo",
  "PrimalDualState",
  "ProximalInfo",
  "ProximalState",
  "QuantileThresholdState",
  "ReweightState",
  "RobustnessReport",
  "RunningRangeState",
  "Scores",
  "SupportBuffer",
  "TargetEss",
  "TaskModel",
  "TemperatureState",
  "Threshold",
  "Thresholds",
  "Through",
  "Triple",
  "UnrolledInfo",
  "UnrolledResponseState",
  "ValuePenaltyInfo",
  "ValuePenaltyState",
  "WatState",
  "WeightInfo",
  "Weighting",
  "Window",
  "WindowAverageInfo",
  "WindowAverageState",
  "add_corrected_response",
  "add_dynamic_barrier",
  "add_es_response",
  "add_implicit_response",
  "add_primal_dual_penalty",
  "add_proximal_terms",
  "add_unrolled_response",
  "add_value_function_penalty",
  "aid",
  "apgd",
  "average_over_batches",
  "bayesian_gradient_descent",
  "bilevel",
  "bome",
  "c_maml",
  "c_maml_pap",
  "calibrate",
  "chi2_dro",
  "chi_square",
  "chi_square_ball",
  "class_accuracy",
  "compositional",
  "conjugate_gradient",
  "cross_entropy_loss",
  "cvar",
  "cvar_dro",
  "detection_quality",
  "done",
  "done_grad",
  "doro",
  "drop_response",
  "energy_score",
  "entropy_score",
  "esj",
  "evaluate_robustness",
  "extremes",
  "f2sa",
  "fast_bat_grad",
  "fgsm",
  "fine_tuning",
  "fixed_point",
  "fixed_threshold",
  "frozen_maml",
  "gairat",
  "gate_by_detection",
  "group",
  "group_dro",
  "inner_solver",
  "ir_dro",
  "itd",
  "kl",
  "kl_ball",
  "kl_cvar",
  "leeds",
  "lin_upper",
  "local_regret",
  "mail",
  "margin_loss",
  "mart_loss",
  "max_softmax_score",
  "meta_ogd",
  "mid_rank",
  "min_max",
  "modulate_by_loss",
  "neumann",
  "oagd",
  "ogd",
  "online",
  "online_meta_learner",
  "oracle_detector",
  "over_tasks",
  "path_length",
  "pdbo",
  "per_example_grad",
  "pgd",
  "probabilistic_margin",
  "project",
  "project_params",
  "proximal_pdbo",
  "quadratic",
  "quantile_range",
  "quantile_threshold",
  "reweight",
  "robust_value",
  "running_range",
  "scale_by_lagrangian_smoothness",
  "shaped",
  "sobow",
  "sogd",
  "square",
  "standard_attacks",
  "stocbio",
  "streaming_grad",
  "tail_accuracy",
  "target_ess",
  "task_averaged_regret",
  "term",
  "threshold_detector",
  "tilted",
  "top_k",
  "trades_loss",
  "train_from_scratch",
  "uniform",
  "v_pbgd",
  "wat",
  "window_average",
]

__version__ = "0.1.0"
