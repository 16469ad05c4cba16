"""The methods of hyper-cleaning, and the grids that their settings were chosen from."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

import jaxbo
from scripts.common.cleaning import Settings
from scripts.multiple_minima import loops
from scripts.multiple_minima.loops import Loop

DATASETS = {
  "digits": Settings(num_train=500, num_val=100, hidden=(256,), ridge=0.0, inner_learning_rate=0.1),
  "mnist": Settings(
    num_train=5000, num_val=500, hidden=(100,), ridge=0.0, batch_size=256, inner_learning_rate=0.1
  ),
}


class Method(NamedTuple):
  """A row of the table."""

  label: str
  make: Callable[..., Loop]  # make(inner_loss, outer_loss, settings, **chosen)
  grid: Mapping[str, tuple[Any, ...]] = {}  # 16 points; rates.json has the one that was chosen.


def sgd(settings: Settings, learning_rate: Any = None) -> optax.GradientTransformation:
  """The optimizer of models."""
  rate = settings.inner_learning_rate if learning_rate is None else learning_rate
  return optax.sgd(rate, settings.momentum)


def _value_function(make_head: Callable[..., Any], *, scale: bool = True) -> Callable[..., Loop]:
  """A head, SGD for the model and Adam for the logits of the weights."""

  def make(inner_loss, outer_loss, settings, *, outer, num_steps, alternate=None, **chosen):
    head = make_head(inner_loss, num_steps=num_steps, inner_optimizer=sgd(settings), **chosen)
    if scale:  # A step of y that stays stable as the multiplier grows: 1 / (1 + multiplier).
      smooth = {"outer_smoothness": 1.0, "constraint_smoothness": 1.0}
      head = jaxbo.scale_by_lagrangian_smoothness(head, **smooth)
    tail = loops.levels(optax.adam(outer), sgd(settings), alternate)
    return loops.value_function_loop(outer_loss, optax.chain(head, tail))

  return make


def _proximal(inner_loss, *, outer_weight, **chosen):
  head = jaxbo.add_primal_dual_penalty(inner_loss, dual_learning_rate=0.1, **chosen)
  weights = {"outer_weight": outer_weight, "constraint_weight": outer_weight}
  return jaxbo.add_proximal_terms(head, **weights, period=20)


def _v_pbgd(inner_loss, *, multiplier, ramp, **chosen):
  schedule = optax.linear_schedule(0.0, multiplier, ramp)
  return jaxbo.add_value_function_penalty(inner_loss, multiplier=schedule, normalize=True, **chosen)


def _f2sa(inner_loss, *, growth, **chosen):
  """The published multiplier starts at 1 and is raised by ``growth / t^(1/7)``."""
  schedule = lambda t: 1 + growth * 7 / 6 * (jnp.asarray(t, jnp.float32) + 1) ** (6 / 7)
  return jaxbo.add_value_function_penalty(inner_loss, multiplier=schedule, **chosen)


def _response(make_head: Callable[..., Any]) -> Callable[..., Loop]:
  """An inner solver by SGD, a head, and Adam for the logits of the weights."""

  def make(inner_loss, outer_loss, settings, *, outer, inner, num_steps, **chosen):
    per_step = settings.batch_size is not None
    optimizer = sgd(settings, inner)
    solver = jaxbo.inner_solver(inner_loss, optimizer, num_steps, per_step_batches=per_step)
    tx = optax.chain(make_head(solver, **chosen), optax.adam(outer))
    return loops.response_loop(outer_loss, solver, tx)

  return make


def _aid(inner, linear_steps, damping):
  solver = jaxbo.conjugate_gradient(linear_steps, damping=damping)
  return jaxbo.add_implicit_response(inner, solver)


def _train(inner_loss, outer_loss, settings):
  return loops.training_loop(inner_loss, sgd(settings))


def _stop(inner_loss, outer_loss, settings):
  return loops.best_of(_train(inner_loss, outer_loss, settings), outer_loss)


_SHORT = {"outer": (0.1, 0.3), "num_steps": (1, 5)}
METHODS = {
  "everything": Method("everything", _train),
  "stopped": Method("everything, stopped early", _stop),
  "validation": Method("clean examples only", _train),
  "oracle": Method("right labels (oracle)", _train),
  "oracle_validation": Method("right and clean (oracle)", _train),
  "pdbo": Method(
    "PDBO",
    _value_function(jaxbo.add_primal_dual_penalty),
    grid={**_SHORT, "slack": (0.01, 0.1), "dual_learning_rate": (0.1, 1.0)},
  ),
  "proximal_pdbo": Method(
    "Proximal-PDBO",
    _value_function(_proximal),
    grid={**_SHORT, "slack": (0.01, 0.1), "outer_weight": (1e-3, 1e-2)},
  ),
  "bome": Method(
    "BOME",
    _value_function(jaxbo.add_dynamic_barrier),
    grid={**_SHORT, "barrier_rate": (0.1, 0.5), "phi": ("gradient", "value")},
  ),
  "v_pbgd": Method(
    "V-PBGD",
    _value_function(_v_pbgd, scale=False),
    grid={**_SHORT, "multiplier": (1.0, 5.0), "ramp": (50, 200)},
  ),
  "f2sa": Method(
    "F2SA",
    _value_function(_f2sa),
    grid={**_SHORT, "growth": (0.01, 0.1), "alternate": (None, 4)},
  ),
  "itd": Method(
    "ITD",
    _response(jaxbo.add_unrolled_response),
    grid={"outer": (0.03, 0.1, 0.3, 1.0), "inner": (0.03, 0.1), "num_steps": (5, 20)},
  ),
  "aid": Method(
    "AID-CG",
    _response(_aid),
    grid={**_SHORT, "inner": (0.03, 0.1), "damping": (0.1, 1.0), "linear_steps": (5,)},
  ),
  "esj": Method(
    "ESJ",
    _response(lambda inner, num_samples: jaxbo.add_es_response(inner, num_samples, 1e-2)),
    grid={"outer": (0.1, 1.0), "inner": (0.03, 0.1), "num_steps": (1, 5), "num_samples": (4, 16)},
  ),
}
LABELS = {name: method.label for name, method in METHODS.items()}
BASELINES = tuple(name for name, method in METHODS.items() if not method.grid)
COMPARED = tuple(name for name, method in METHODS.items() if method.grid)
RESPONSES = ("itd", "aid", "esj")
