"""Whole methods take a learning rate, a schedule or an optimizer, and optax injects their numbers.

That a method is its chain is shown in tests/test_catalogue.py.
"""

import inspect

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.interpreters import partial_eval

import jaxbo
from tests import catalogue
from tests.bilevel.catalogue import DUAL, LOWER
from tests.catalogue import (
  inner_loss,
  online,
  outer_loss,
  plain_solver,
  response,
  robust,
  value_function,
)
from tests.online.catalogue import AVERAGED, detected, indexed

SOLVER = plain_solver()
PROXIMAL = {"outer_weight": 0.3, "constraint_weight": 0.2, "period": 2}
CORRECTED = {"linear_learning_rate": 0.1, "correction": 0.3}
METHODS = [
  (response, jaxbo.itd, (SOLVER,), {}),
  (response, jaxbo.aid, (SOLVER,), {}),
  (response, jaxbo.stocbio, (SOLVER, 3, 0.2), {}),
  (response, jaxbo.soba, (SOLVER, 0.3), {"inner_params": catalogue.INNER}),
  (response, jaxbo.amigo, (SOLVER, 3, 0.3), {"inner_params": catalogue.INNER}),
  (response, jaxbo.darts, (SOLVER,), {}),
  (response, jaxbo.esj, (SOLVER, 3, 0.1), {}),
  (response, jaxbo.ogd, (), {}),
  (response, jaxbo.sobow, (SOLVER,), {"window": 3, "inner_params": catalogue.INNER}),
  (response, jaxbo.leeds, (SOLVER,), {}),
  (online, jaxbo.oagd, (SOLVER, outer_loss), {}),
  (online, jaxbo.sogd, (0.2, inner_loss, outer_loss), CORRECTED),
  (online, jaxbo.srba, (0.2, inner_loss, outer_loss), {"linear_learning_rate": 0.1}),
  (online, jaxbo.saba, (0.2, inner_loss), AVERAGED | {"linear_learning_rate": 0.1}),
  (value_function, jaxbo.pdbo, (inner_loss,), DUAL),
  (value_function, jaxbo.proximal_pdbo, (inner_loss,), DUAL | PROXIMAL),
  (value_function, jaxbo.bome, (inner_loss,), LOWER),
  (value_function, jaxbo.v_pbgd, (inner_loss,), LOWER | {"multiplier": 2.0}),
  (value_function, jaxbo.f2sa, (0.2, inner_loss), LOWER | {"multiplier": 2.0}),
  (robust, jaxbo.ir_dro, (0.5,), {}),
  (robust, jaxbo.group_dro, (2,), {}),
  (robust, jaxbo.cvar_dro, (0.7,), {}),
  (robust, jaxbo.chi2_dro, (0.5,), {}),
  (robust, jaxbo.term, (0.5,), {}),
  (robust, jaxbo.done, (0.5,), {}),
]
ALL = pytest.mark.parametrize(
  ("kind", "method", "arguments", "options"),
  [pytest.param(*line, id=line[1].__name__) for line in METHODS],
)


def harness_of(kind, method, tx):
  """The catalogue's way to use the method."""
  wrap = {jaxbo.leeds: detected, jaxbo.saba: indexed}.get(method, lambda tx: tx)
  made = wrap(tx)
  window = {"solver": plain_solver, "window": 2} if method is jaxbo.oagd else {}
  return kind(method.__name__, made, **window).make(0, catalogue.INNER)


def types_after_a_step(kind, method, tx):
  """The carry of the harness before and after a step, by shapes."""
  harness = harness_of(kind, method, tx)
  carry = jax.eval_shape(harness.init, catalogue.params())
  return carry, jax.eval_shape(harness.step, carry, jnp.int32(0))


def test_every_whole_method_is_here():
  first = lambda member: next(iter(inspect.signature(member).parameters), "")
  verbs = ("add_", "scale_by_", "gate_by_", "modulate_by_")
  takes_a_rate = {
    name
    for name in jaxbo.__all__
    if inspect.isfunction(getattr(jaxbo, name)) and not name.startswith(verbs)
    if first(getattr(jaxbo, name)).endswith("learning_rate")
  }
  assert takes_a_rate == {method.__name__ for _, method, _, _ in METHODS}


@ALL
def test_a_learning_rate_may_be_a_schedule_or_an_optimizer(kind, method, arguments, options):
  for rate in (optax.linear_schedule(0.1, 0.0, 9), optax.adam(optax.linear_schedule(0.1, 0.0, 9))):
    before, after = types_after_a_step(kind, method, method(rate, *arguments, **options))
    assert after == before
    adam = optax.tree.get(after, "ScaleByAdamState") is not None
    assert adam == isinstance(rate, optax.GradientTransformation) or method is jaxbo.ir_dro


@ALL
def test_optax_injects_every_number_as_a_hyperparameter(kind, method, arguments, options):
  bound = inspect.signature(method).bind(0.1, *arguments, **options)
  bound.apply_defaults()
  numbers = {name for name, value in bound.arguments.items() if isinstance(value, float)}
  static = {
    name for name, value in bound.arguments.items() if callable(value) or isinstance(value, int)
  }
  inject = optax.inject_hyperparams(method, static_args=static)
  harness = harness_of(kind, method, inject(0.1, *arguments, **options))
  before = jax.eval_shape(harness.init, catalogue.params())
  after = jax.eval_shape(harness.step, before, jnp.int32(0))
  assert after == before
  given = optax.tree.get(after, "hyperparams")
  assert numbers <= set(given)

  def parameters_after(given):
    """After two steps, since a multiplier or a window moves them in the second."""
    start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), before)
    for t in range(2):
      start = harness.step(optax.tree.set(start, hyperparams=given), jnp.int32(t))
    return start[0]

  numbers = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), given)
  jaxpr = jax.make_jaxpr(parameters_after)(numbers).jaxpr
  _, used = partial_eval.dce_jaxpr(jaxpr, True)
  assert dict(zip(sorted(given), used, strict=True)) == dict.fromkeys(given, True)


@pytest.mark.parametrize("bad", [optax.adam, None, "0.1", (0.1, 0.2)])
def test_what_is_not_a_learning_rate_is_refused(bad, as_users_run):
  says = "learning_rate must be a number, a schedule or an optimizer such as"
  for make in (
    lambda: jaxbo.ogd(bad),
    lambda: jaxbo.ir_dro(bad),
    lambda: jaxbo.leeds(bad, SOLVER),
    lambda: jaxbo.pdbo(bad, inner_loss, **DUAL),
    lambda: jaxbo.pdbo(jaxbo.Bilevel(0.1, bad), inner_loss, **DUAL),
    lambda: jaxbo.f2sa(0.1, bad, inner_loss, multiplier=1.0, **LOWER),
  ):
    with pytest.raises(TypeError, match=says.replace("learning_rate", r"learning_rate\S*")):
      make()
