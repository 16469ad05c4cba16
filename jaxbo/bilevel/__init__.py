"""The parts of bilevel methods: records of the inner problem, linear solvers and states."""

from jaxbo.bilevel.differentiable_solve import differentiable_solve
from jaxbo.bilevel.dynamic_barrier import DynamicBarrierInfo, DynamicBarrierState
from jaxbo.bilevel.es import EsInfo, EsResponseState
from jaxbo.bilevel.finite_difference import (
  FiniteDifferenceInfo,
  FiniteDifferenceResponseState,
)
from jaxbo.bilevel.implicit import ImplicitInfo, ImplicitResponseState
from jaxbo.bilevel.linear_system import LinearInfo, LinearSolver
from jaxbo.bilevel.loop import BilevelInfo, BilevelState
from jaxbo.bilevel.outer_grad import OuterGrads
from jaxbo.bilevel.penalty import ValuePenaltyInfo, ValuePenaltyState
from jaxbo.bilevel.primal_dual import PrimalDualInfo, PrimalDualState
from jaxbo.bilevel.projection import project_params
from jaxbo.bilevel.proximal import ProximalInfo, ProximalState
from jaxbo.bilevel.response import DropInfo, DropResponseState
from jaxbo.bilevel.saba import AveragedResponseInfo, AveragedResponseState, AverageTable
from jaxbo.bilevel.single_loop import InnerTerms
from jaxbo.bilevel.solution import FeatureProblem, InnerInfo
from jaxbo.bilevel.unrolled import UnrolledInfo, UnrolledResponseState
from jaxbo.bilevel.value_function import ConstraintTerm

__all__ = [
  "AverageTable",
  "AveragedResponseInfo",
  "AveragedResponseState",
  "BilevelInfo",
  "BilevelState",
  "ConstraintTerm",
  "DropInfo",
  "DropResponseState",
  "DynamicBarrierInfo",
  "DynamicBarrierState",
  "EsInfo",
  "EsResponseState",
  "FeatureProblem",
  "FiniteDifferenceInfo",
  "FiniteDifferenceResponseState",
  "ImplicitInfo",
  "ImplicitResponseState",
  "InnerInfo",
  "InnerTerms",
  "LinearInfo",
  "LinearSolver",
  "OuterGrads",
  "PrimalDualInfo",
  "PrimalDualState",
  "ProximalInfo",
  "ProximalState",
  "UnrolledInfo",
  "UnrolledResponseState",
  "ValuePenaltyInfo",
  "ValuePenaltyState",
  "differentiable_solve",
  "project_params",
]
