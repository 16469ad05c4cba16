"""Gradient transformations for problems with more than one level.

A method is an optax gradient transformation: gradients go in, better gradients come out, and memory
lives in the state. A *response* turns the gradients of the outer loss at the inner solution into
the hypergradient. Any optax chain can follow.

>>> import jax, jax.numpy as jnp, jaxbo, optax
>>> def inner_loss(x, y, batch):                        # ridge regression, x = log regularization
...   return jnp.mean((batch["a"] @ y - batch["b"]) ** 2) + jnp.exp(x) * jnp.sum(y**2)
>>> def outer_loss(x, y, batch):
...   return jnp.mean((batch["a"] @ y - batch["b"]) ** 2)
>>> inner = jaxbo.inner_solver(inner_loss, optax.sgd(0.1), num_steps=50)
>>> outer = optax.chain(jaxbo.add_implicit_response(inner, jaxbo.conjugate_gradient(5)),
...                     optax.adam(0.1))
>>> init, step = jaxbo.bilevel_loop(outer_loss, inner, outer)
>>> train, val = ({"a": (1 + i) * jnp.eye(3), "b": jnp.ones(3)} for i in range(2))
>>> state, info = jax.jit(step)(init(jnp.float32(0.0), jnp.zeros(3)), train, val)
>>> bool(state.x != 0)
True

This module has verbs, which say what happens to a gradient, and whole methods, under the names of
their papers. The parts of the methods are in one module for each family.

**The inner problem**: :func:`inner_solver`, :func:`black_box` for any run, and :func:`over_tasks`
for a meta-batch.

**Responses**: :func:`add_unrolled_response`, :func:`add_implicit_response` with
:func:`conjugate_gradient`, :func:`gmres`, :func:`neumann` or :func:`fixed_point`,
:func:`add_finite_difference_response`, :func:`add_es_response`, :func:`drop_response`; whole
methods :func:`itd`, :func:`aid`, :func:`stocbio`, :func:`soba`, :func:`amigo`, :func:`darts`,
:func:`esj`; the input :func:`outer_grad` and the loop :func:`bilevel_loop`. The records are in
:mod:`jaxbo.bilevel`.

**Finite sums**, where minibatches come from a fixed set, on :class:`Bilevel` parameters, with
constant rates and without noise at the end: :func:`add_averaged_response` (:func:`saba`),
:func:`srba`; the stream is :func:`jaxbo.tasks.finite_sum_stream`.

**Value functions**, for inner problems with many minima, on :class:`Bilevel` parameters:
:func:`add_primal_dual_penalty` (:func:`pdbo`, :func:`proximal_pdbo` with
:func:`add_proximal_terms`), :func:`add_dynamic_barrier` (:func:`bome`),
:func:`add_value_function_penalty` (:func:`v_pbgd`, :func:`f2sa`);
:func:`scale_by_lagrangian_smoothness` wraps them and :func:`project` ends the chain.

**Online**, where the losses change with time: :func:`window_average` (:func:`sobow`),
:func:`average_over_batches` (:func:`oagd`), :func:`add_corrected_response` (:func:`sogd`),
:func:`ogd`; the loop :func:`online_loop` over a stream. Metrics are in :mod:`jaxbo.online`.

**Online meta-learning**, where tasks change without notice: :func:`leeds`,
:func:`gate_by_detection`, which wraps the optimizer of ``leeds``, and :func:`modulate_by_loss`. The
learner, change detectors, thresholds and baselines are in :mod:`jaxbo.meta`.

**Distributionally robust training**: :func:`per_example_grad` or :func:`streaming_grad`, and
:func:`reweight` with a weighting of :mod:`jaxbo.dro`; whole methods :func:`ir_dro`,
:func:`group_dro`, :func:`cvar_dro`, :func:`chi2_dro`, :func:`term`.

**Adversarial training**: :func:`done`. Attacks, gradients through attacks, losses, weights and
evaluation are in :mod:`jaxbo.adversarial`.

**Tasks** and streams of tasks are in :mod:`jaxbo.tasks`.
"""

from jaxbo import adversarial, bilevel, dro, meta, online, tasks
from jaxbo.adversarial.done import done
from jaxbo.bilevel.aid import aid, amigo, soba, stocbio
from jaxbo.bilevel.black_box import black_box
from jaxbo.bilevel.dynamic_barrier import add_dynamic_barrier, bome
from jaxbo.bilevel.es import add_es_response
from jaxbo.bilevel.esj import esj
from jaxbo.bilevel.finite_difference import add_finite_difference_response, darts
from jaxbo.bilevel.gmres import gmres
from jaxbo.bilevel.implicit import add_implicit_response
from jaxbo.bilevel.inner import inner_solver
from jaxbo.bilevel.lagrangian import scale_by_lagrangian_smoothness
from jaxbo.bilevel.linear_solvers import conjugate_gradient, fixed_point, neumann
from jaxbo.bilevel.loop import bilevel_loop
from jaxbo.bilevel.outer_grad import outer_grad
from jaxbo.bilevel.over_tasks import over_tasks
from jaxbo.bilevel.parameters import Bilevel
from jaxbo.bilevel.penalty import add_value_function_penalty, f2sa, v_pbgd
from jaxbo.bilevel.primal_dual import add_primal_dual_penalty, pdbo
from jaxbo.bilevel.projection import project
from jaxbo.bilevel.proximal import add_proximal_terms, proximal_pdbo
from jaxbo.bilevel.response import drop_response
from jaxbo.bilevel.saba import add_averaged_response, saba
from jaxbo.bilevel.solution import InnerSolution, InnerSolver
from jaxbo.bilevel.unrolled import add_unrolled_response, itd
from jaxbo.dro.aliases import chi2_dro, cvar_dro, group_dro, ir_dro, term
from jaxbo.dro.per_example import per_example_grad
from jaxbo.dro.reweight import reweight
from jaxbo.dro.streaming import streaming_grad
from jaxbo.meta.cmaml import modulate_by_loss
from jaxbo.meta.gate import gate_by_detection
from jaxbo.meta.leeds import leeds
from jaxbo.online.loop import online_loop
from jaxbo.online.oagd import average_over_batches, oagd
from jaxbo.online.sobow import ogd, sobow
from jaxbo.online.sogd import add_corrected_response, sogd
from jaxbo.online.srba import srba
from jaxbo.online.window import window_average

__all__ = [
  "Bilevel",
  "InnerSolution",
  "InnerSolver",
  "add_averaged_response",
  "add_corrected_response",
  "add_dynamic_barrier",
  "add_es_response",
  "add_finite_difference_response",
  "add_implicit_response",
  "add_primal_dual_penalty",
  "add_proximal_terms",
  "add_unrolled_response",
  "add_value_function_penalty",
  "adversarial",
  "aid",
  "amigo",
  "average_over_batches",
  "bilevel",
  "bilevel_loop",
  "black_box",
  "bome",
  "chi2_dro",
  "conjugate_gradient",
  "cvar_dro",
  "darts",
  "done",
  "dro",
  "drop_response",
  "esj",
  "f2sa",
  "fixed_point",
  "gate_by_detection",
  "gmres",
  "group_dro",
  "inner_solver",
  "ir_dro",
  "itd",
  "leeds",
  "meta",
  "modulate_by_loss",
  "neumann",
  "oagd",
  "ogd",
  "online",
  "online_loop",
  "outer_grad",
  "over_tasks",
  "pdbo",
  "per_example_grad",
  "project",
  "proximal_pdbo",
  "reweight",
  "saba",
  "scale_by_lagrangian_smoothness",
  "soba",
  "sobow",
  "sogd",
  "srba",
  "stocbio",
  "streaming_grad",
  "tasks",
  "term",
  "v_pbgd",
  "window_average",
]

__version__ = "0.1.0"
