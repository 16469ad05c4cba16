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

**Tasks**: :func:`jaxbo.tasks.sample_episode`; streams, :func:`jaxbo.tasks.minibatch_stream` and
:func:`jaxbo.tasks.phase_stream`.

**Whole methods**: :func:`esj`, :func:`itd`, :func:`aid`, :func:`stocbio`, and the loop
:func:`bilevel`; :func:`pdbo`, :func:`proximal_pdbo`, :func:`bome`, :func:`v_pbgd`, :func:`f2sa`;
:func:`sobow`, :func:`oagd`, :func:`ogd`, :func:`sogd`.
"""

from jaxbo import tasks as tasks
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
from jaxbo.online.driver import Online, OnlineInfo, OnlineState, online
from jaxbo.online.oagd import BatchAverageInfo, BatchAverageState, average_over_batches, oagd
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
from jaxbo.online.window import Window, WindowAverageInfo, WindowAverageState, window_average

__all__ = [
  "Accumulated",
  "BatchAverageInfo",
  "BatchAverageState",
  "Bilevel",
  "BilevelInfo",
  "BilevelState",
  "CorrectedResponseInfo",
  "CorrectedResponseState",
  "DropInfo",
  "DropResponseState",
  "DynamicBarrierInfo",
  "DynamicBarrierState",
  "EsInfo",
  "EsResponseState",
  "ImplicitInfo",
  "ImplicitResponseState",
  "InnerInfo",
  "InnerSolution",
  "InnerSolver",
  "LinearInfo",
  "LinearSolver",
  "Online",
  "OnlineBatch",
  "OnlineInfo",
  "OnlineMetric",
  "OnlineRound",
  "OnlineState",
  "PrimalDualInfo",
  "PrimalDualState",
  "ProximalInfo",
  "ProximalState",
  "Through",
  "Triple",
  "UnrolledInfo",
  "UnrolledResponseState",
  "ValuePenaltyInfo",
  "ValuePenaltyState",
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
  "average_over_batches",
  "bilevel",
  "bome",
  "conjugate_gradient",
  "drop_response",
  "esj",
  "f2sa",
  "fixed_point",
  "inner_solver",
  "itd",
  "local_regret",
  "neumann",
  "oagd",
  "ogd",
  "online",
  "over_tasks",
  "path_length",
  "pdbo",
  "project",
  "project_params",
  "proximal_pdbo",
  "scale_by_lagrangian_smoothness",
  "sobow",
  "sogd",
  "stocbio",
  "v_pbgd",
  "window_average",
]

__version__ = "0.1.0"
