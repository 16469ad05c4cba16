"""The value-function heads on numbers that are not finite, and on what users get wrong."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import jaxbo
from tests.bilevel.value_problems import HEADS, heads
from tests.cases import cases

pytestmark = pytest.mark.slow  # All together, not each.


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("name", HEADS)
def test_a_bad_batch_leaves_the_state_and_passes_the_gradient(name, bad):
  loss = lambda x, y, batch: jnp.sum(batch * (y - jnp.tanh(x)) ** 2)
  tx = heads(loss, 3)[name]
  params = jaxbo.Bilevel(jnp.float32(0.5), jnp.ones(2))
  grads = jaxbo.Bilevel(jnp.float32(2.0), jnp.array([-1.0, -3.0]))
  update = jax.jit(lambda s, b: tx.update(grads, s, params, batch=b))
  good, state = update(tx.init(params), jnp.float32(1.0))
  assert good.outer != grads.outer
  assert state.info.finite
  result, after = update(state, jnp.float32(bad))
  chex.assert_trees_all_equal(result, grads)
  assert not after.info.finite
  chex.assert_trees_all_equal(
    after._replace(info=after.info._replace(finite=state.info.finite)), state
  )
  again, recovered = update(after, jnp.float32(1.0))
  assert again.outer != grads.outer
  assert recovered.info.finite


@pytest.mark.parametrize("name", HEADS)
def test_a_bad_gradient_of_the_outer_loss_reaches_no_state(name):
  """It comes out, for the caller to handle: optax.apply_if_finite stands behind."""
  loss = lambda x, y, batch: jnp.sum((y - x) ** 2)
  tx = heads(loss, 3)[name]
  params = jaxbo.Bilevel(jnp.float32(0.5), jnp.ones(2))
  grads = jaxbo.Bilevel(jnp.float32(jnp.nan), jnp.ones(2))
  result, state = jax.jit(tx.update)(grads, tx.init(params), params, batch=None)
  assert jnp.isnan(result.outer)
  chex.assert_tree_all_finite(state)


def test_an_incoming_gradient_that_passes_alone_is_normalized_too():
  """By the multiplier of the last good update, so that its step is no longer than others."""
  tx = jaxbo.add_value_function_penalty(
    lambda x, y, batch: jnp.sum(batch * (y - x) ** 2),
    multiplier=4.0,
    num_steps=1,
    inner_optimizer=optax.sgd(0.1),
    normalize=True,
  )
  params = jaxbo.Bilevel(jnp.float32(0.5), jnp.ones(2))
  _, state = tx.update(params, tx.init(params), params, batch=1.0)
  result, _ = tx.update(params, state, params, batch=jnp.nan)
  chex.assert_trees_all_equal(result, jax.tree.map(lambda leaf: leaf / 4, params))


def test_a_bad_gap_is_not_kept():
  """The lower value diverges only after many more steps."""
  tx = jaxbo.add_primal_dual_penalty(
    lambda x, y, batch: jnp.sum((y - x) ** 2),
    slack=0.1,
    dual_learning_rate=0.5,
    num_steps=1,
    inner_optimizer=optax.sgd(100.0),
    gap_steps=100,
  )
  params = jaxbo.Bilevel(jnp.float32(0.5), jnp.ones(2))
  _, state = tx.update(params, tx.init(params), params, batch=None)
  assert state.info.finite
  assert state.info.gap == 0


def test_bad_parameters_do_not_become_the_centre():
  head = heads(lambda x, y, batch: jnp.sum((y - x) ** 2), 1)["pdbo"]
  tx = jaxbo.add_proximal_terms(head, outer_weight=1.0, constraint_weight=1.0, period=1)
  params = jaxbo.Bilevel(jnp.float32(0.5), jnp.ones(2))
  bad = params._replace(outer=jnp.float32(jnp.nan))
  _, state = tx.update(params, tx.init(params), bad, batch=None)
  chex.assert_tree_all_finite(state)
  chex.assert_trees_all_equal(state.proximal_centre, params)


# Errors.


@cases("name", [*HEADS, "proximal", "smoothness"])
def test_bad_updates_are_refused(name, as_users_run):
  made = heads(lambda x, y, batch: jnp.sum((y - x) ** 2), 1)
  wrapped = {
    "proximal": jaxbo.add_proximal_terms(
      made["pdbo"], outer_weight=1.0, constraint_weight=1.0, period=1
    ),
    "smoothness": jaxbo.scale_by_lagrangian_smoothness(
      made["pdbo"], outer_smoothness=1.0, constraint_smoothness=1.0
    ),
  }
  tx = {**made, **wrapped}[name]
  params = jaxbo.Bilevel(jnp.float32(0.5), jnp.ones(2))
  state = tx.init(params)
  pair = (params.outer, params.inner)
  swapped = jaxbo.Bilevel(params.inner, params.outer)
  integers = jaxbo.Bilevel(jnp.int32(1), jnp.ones(2))
  cases = [
    ((params, state, None), {"batch": None}, ValueError, "update must be given params"),
    ((params, state, params), {}, TypeError, "update must be given batch="),
    ((params, state, pair), {"batch": None}, TypeError, r"params must be jaxbo\.Bilevel\(outer=x"),
    ((pair, state, params), {"batch": None}, TypeError, r"as jaxbo\.Bilevel\(outer=df/dx"),
    ((swapped, state, params), {"batch": None}, ValueError, "grads must have the structure"),
    ((params, state, integers), {"batch": None}, TypeError, "params must be real floats"),
  ]
  for arguments, extra, error, message in cases:
    with pytest.raises(error, match=message):
      tx.update(*arguments, **extra)
  with pytest.raises(TypeError, match=r"params must be jaxbo\.Bilevel\(outer=x, inner=y\)"):
    tx.init({"outer": 1.0})


@cases("name", HEADS)
@cases(
  ("loss", "error", "message"),
  [
    (lambda x, y, batch: y - x, ValueError, r"inner_loss must return a scalar, got shape \(2,\)"),
    (lambda x, y, batch: (y[0], y), TypeError, "inner_loss must return a scalar, got a tuple"),
    (lambda x, y, batch: jnp.int32(1), TypeError, "inner_loss must return a real float"),
  ],
)
def test_bad_inner_losses_are_refused(name, loss, error, message):
  tx = heads(loss, 1)[name]
  params = jaxbo.Bilevel(jnp.ones(2), jnp.ones(2))
  with pytest.raises(error, match=message):
    tx.update(params, tx.init(params), params, batch=None)


PDBO = {"slack": 0.1, "dual_learning_rate": 0.1, "num_steps": 1, "inner_optimizer": optax.sgd(0.1)}
BOME = {"barrier_rate": 0.1, "num_steps": 1, "inner_optimizer": optax.sgd(0.1)}
PENALTY = {"multiplier": 0.1, "num_steps": 1, "inner_optimizer": optax.sgd(0.1)}


@cases(
  ("make", "options", "wrong", "error", "message"),
  [
    ("add_primal_dual_penalty", PDBO, {"slack": 0.0}, ValueError, "slack must be positive .* 0"),
    ("add_primal_dual_penalty", PDBO, {"slack": -1.0}, ValueError, "slack must be positive"),
    ("add_primal_dual_penalty", PDBO, {"dual_bound": 0}, ValueError, "dual_bound must be positive"),
    ("add_primal_dual_penalty", PDBO, {"dual_bound": -1}, ValueError, "dual_bound must be pos"),
    ("add_primal_dual_penalty", PDBO, {"slack": "a"}, TypeError, "slack must be a number"),
    (
      "add_primal_dual_penalty",
      PDBO,
      {"dual_learning_rate": 0.0},
      ValueError,
      "dual_learning_rate must be positive",
    ),
    (
      "add_primal_dual_penalty",
      PDBO,
      {"value_regularizer": -0.1},
      ValueError,
      "value_regularizer must be non-negative",
    ),
    (
      "add_primal_dual_penalty",
      PDBO,
      {"extrapolation": -1.0},
      ValueError,
      "extrapolation must be non-negative",
    ),
    (
      "add_primal_dual_penalty",
      PDBO,
      {"gap_steps": -1},
      ValueError,
      "gap_steps, unless 0, must be at least 1, got -1",
    ),
    ("add_primal_dual_penalty", PDBO, {"num_steps": 0}, ValueError, "num_steps must be at least 1"),
    (
      "add_primal_dual_penalty",
      PDBO,
      {"inner_optimizer": 0.1},
      TypeError,
      "inner_optimizer must be an optax transformation",
    ),
    (
      "add_primal_dual_penalty",
      PDBO,
      {"project_inner": 1.0},
      TypeError,
      r"project_inner must be a function project_inner\(y\)",
    ),
    (
      "add_primal_dual_penalty",
      PDBO,
      {"project_outer": lambda: 0},
      TypeError,
      r"project_outer must be a function project_outer\(x\)",
    ),
    ("add_dynamic_barrier", BOME, {"barrier_rate": 0.0}, ValueError, "barrier_rate must be pos"),
    ("add_dynamic_barrier", BOME, {"epsilon": 0.0}, ValueError, "epsilon must be positive"),
    (
      "add_dynamic_barrier",
      BOME,
      {"phi": "norm"},
      ValueError,
      "phi must be one of 'gradient', 'value', got 'norm'",
    ),
    (
      "add_value_function_penalty",
      PENALTY,
      {"multiplier": -1.0},
      ValueError,
      "multiplier must be non-negative",
    ),
  ],
)
def test_bad_arguments_are_refused(make, options, wrong, error, message, as_users_run):
  with pytest.raises(error, match=message):
    getattr(jaxbo, make)(lambda x, y, batch: y, **{**options, **wrong})


@cases(
  ("make", "options"),
  [
    (jaxbo.add_primal_dual_penalty, PDBO),
    (jaxbo.add_dynamic_barrier, BOME),
    (jaxbo.add_value_function_penalty, PENALTY),
  ],
)
@cases("loss", [lambda x, y: y, 3.0])
def test_an_inner_loss_with_other_arguments_is_refused(make, options, loss, as_users_run):
  with pytest.raises(TypeError, match=r"inner_loss must be a function inner_loss\(x, y, batch\)"):
    make(loss, **options)


def test_bad_arguments_of_the_wrappers_are_refused(as_users_run):
  head = jaxbo.add_primal_dual_penalty(lambda x, y, batch: y, **PDBO)
  proximal = {"outer_weight": 1.0, "constraint_weight": 1.0, "period": 1}
  for wrong in ({"outer_weight": -1.0}, {"constraint_weight": -1.0}, {"period": 0}):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
      jaxbo.add_proximal_terms(head, **{**proximal, **wrong})
  smooth = {"outer_smoothness": 1.0, "constraint_smoothness": 1.0}
  for wrong in ({"outer_smoothness": 0.0}, {"constraint_smoothness": -1.0}):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be positive"):
      jaxbo.scale_by_lagrangian_smoothness(head, **{**smooth, **wrong})
  for make, options in (
    (jaxbo.add_proximal_terms, proximal),
    (jaxbo.scale_by_lagrangian_smoothness, smooth),
  ):
    with pytest.raises(TypeError, match="head must be an optax transformation"):
      make(0.1, **options)
  with pytest.raises(ValueError, match="alternate must be at least 1"):
    jaxbo.f2sa(0.1, 0.1, lambda x, y, batch: y, alternate=0, **PENALTY)
