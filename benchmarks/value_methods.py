"""The methods of ``benchmarks/value_function.py``, and the grids that their settings come from."""

from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jaxbo
from benchmarks.bilevel_quadratic import NUM_INNER, inner_loss, outer_loss

CG_STEPS = 10


class Method(NamedTuple):
  """A method and what it may choose from.

  Attributes:
    make: ``make(smoothness, *static, **traced) -> (init, step)``, a loop as of
      ``jaxbo.bilevel_loop``.
    static: names and values that the program depends on.
    traced: names and values that are arguments of the program.
    products: second-order products of an update.
  """

  make: Callable[..., tuple[Callable[..., Any], Callable[..., Any]]]
  static: Mapping[str, tuple[Any, ...]]
  traced: Mapping[str, tuple[float, ...]]
  products: int = 0


class State(NamedTuple):
  """State of the loop of a value-function method; ``x`` is found there as in a ``BilevelState``."""

  x: jax.Array
  y: jax.Array
  opt_state: Any


def _loop(tx):
  """The loop of a method on ``Bilevel`` parameters."""
  tx = optax.with_extra_args_support(tx)

  def init(x, y):
    return State(x, y, tx.init(jaxbo.Bilevel(x, y)))

  def step(state, train, val):
    params = jaxbo.Bilevel(state.x, state.y)
    grads = jaxbo.Bilevel(*jax.grad(outer_loss, (0, 1))(*params, val))
    updates, opt_state = tx.update(grads, state.opt_state, params, batch=train)
    moved: Any = optax.apply_updates(params, updates)
    return State(moved.outer, moved.inner, opt_state), None

  return init, step


def _scaled(head, smoothness, rate):
  """A step of ``rate / (L_f + multiplier L_h)``."""
  smooth_f, _, smooth_h = smoothness
  head = jaxbo.scale_by_lagrangian_smoothness(
    head, outer_smoothness=smooth_f, constraint_smoothness=smooth_h
  )
  return _loop(optax.chain(head, optax.sgd(rate)))


def _lower(smoothness, num_steps):
  return {"num_steps": num_steps, "inner_optimizer": optax.sgd(1 / smoothness[1])}


def _primal_dual(smoothness, num_steps, slack, dual, **options):
  """With a rate for the multiplier, of order slack^(-1/2), in units of multiplier / slack."""
  return jaxbo.add_primal_dual_penalty(
    inner_loss,
    slack=slack,
    dual_learning_rate=dual / slack**1.5,
    extrapolation=1.0,
    **_lower(smoothness, num_steps),
    **options,
  )


def _pdbo(smoothness, num_steps, *, slack, dual, rate):
  return _scaled(_primal_dual(smoothness, num_steps, slack, dual, dual_bound=1e6), smoothness, rate)


def _alternating_pdbo(smoothness, alternate, *, slack, bound, rate):
  """The tail of F2SA behind the head of PDBO; y has the step that suits the bound."""
  smooth_f, smooth_g, _ = smoothness
  bound = bound / slack**0.5
  head = _primal_dual(smoothness, 1, slack, 0.03, dual_bound=bound)
  turn = lambda step: jnp.asarray(step) % (alternate + 1)
  inner = optax.sgd(1 / (smooth_f + bound * smooth_g))
  levels: dict[Hashable, optax.GradientTransformation] = {
    "outer": optax.conditionally_mask(optax.sgd(rate), lambda step, **_: turn(step) == alternate),
    "inner": optax.conditionally_mask(inner, lambda step, **_: turn(step) != alternate),
  }
  tail = optax.partition(levels, jaxbo.Bilevel("outer", "inner"))
  return _loop(optax.chain(head, tail))


def _bome(smoothness, num_steps, *, barrier, rate):
  """With a constant rate, as published: divided by its own multiplier it hardly moves."""
  tx = jaxbo.bome(rate, inner_loss, barrier_rate=barrier, **_lower(smoothness, num_steps))
  return _loop(tx)


def _v_pbgd(smoothness, num_steps, *, multiplier, rate):
  head = jaxbo.add_value_function_penalty(
    inner_loss, multiplier=multiplier, **_lower(smoothness, num_steps)
  )
  return _scaled(head, smoothness, rate)


def _f2sa(smoothness, alternate, *, multiplier, rate):
  smooth_f, smooth_g, _ = smoothness
  tx = jaxbo.f2sa(
    rate,
    1 / (smooth_f + multiplier * smooth_g),
    inner_loss,
    multiplier=multiplier,
    alternate=alternate,
    **_lower(smoothness, 1),
  )
  return _loop(tx)


def _response(smoothness, num_steps, linear_solver, rate, inner_rate):
  solver = jaxbo.inner_solver(inner_loss, optax.sgd(inner_rate / smoothness[1]), num_steps)
  tx = jaxbo.aid(rate, solver, linear_solver, inner_params=jnp.zeros(NUM_INNER))
  return jaxbo.bilevel_loop(outer_loss, solver, tx)


def _soba(smoothness, num_steps, *, rate, inner_rate):
  linear_solver = jaxbo.fixed_point(1, 1.0, warm_start=True)
  return _response(smoothness, num_steps, linear_solver, rate, inner_rate)


def _aid(smoothness, num_steps, *, rate, inner_rate):
  linear_solver = jaxbo.conjugate_gradient(CG_STEPS, damping=1e-6)
  return _response(smoothness, num_steps, linear_solver, rate, inner_rate)


_NUM_STEPS = {"num_steps": (1, 5)}
_SLACKS = (1.0, 1e-1, 3e-2, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
_PENALTIES = (10.0, 30.0, 100.0, 200.0, 400.0, 1000.0, 3000.0, 10_000.0)
METHODS = {
  "PDBO": Method(
    _pdbo,
    _NUM_STEPS,
    {"slack": _SLACKS, "dual": (0.01, 0.1), "rate": (1.9,)},
  ),
  "PDBO, alternating": Method(
    _alternating_pdbo,
    {"alternate": (3, 20)},
    {"slack": _SLACKS, "bound": (5.0,), "rate": (0.1, 0.3)},
  ),
  "BOME": Method(
    _bome,
    {"num_steps": (10, 30)},
    {"barrier": (0.1, 0.3, 0.5, 0.9), "rate": (0.003, 0.01, 0.03, 0.1)},
  ),
  "V-PBGD": Method(_v_pbgd, _NUM_STEPS, {"multiplier": _PENALTIES, "rate": (1.0, 1.9)}),
  "F2SA": Method(_f2sa, {"alternate": (3, 20)}, {"multiplier": _PENALTIES, "rate": (0.1, 0.3)}),
  "SOBA-style": Method(
    _soba,
    _NUM_STEPS,
    {"rate": (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0, 1.5), "inner_rate": (1.0, 1.7)},
    products=3,
  ),
  f"AID, CG {CG_STEPS}": Method(
    _aid,
    _NUM_STEPS,
    {"rate": (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0, 1.5), "inner_rate": (1.0, 1.7)},
    products=CG_STEPS + 1,
  ),
}
