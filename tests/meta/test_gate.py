"""The gate: three cases, and a closed gate that leaves everything as it was."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbo
from tests.cases import cases

pytestmark = pytest.mark.slow  # All together, not each.

SCORES = jaxbo.meta.Scores(jnp.float32(0.0), jnp.float32(0.0))
CASES = {"no switch": (False, False), "in": (True, False), "out": (True, True)}
PARAMS = {"a": jnp.float32(1.0), "b": jnp.arange(3.0)}
GRADS = {"a": jnp.float32(-2.0), "b": jnp.ones(3)}


def detected(case):
  switch, shift = CASES[case]
  return jaxbo.meta.Detection(jnp.bool_(switch), jnp.bool_(shift), SCORES)


@pytest.mark.parametrize("case", CASES)
def test_the_update_of_the_optimizer_is_scaled_after_it(case):
  """Behind Adam: in front of it, the scale of the gradient would not matter."""
  scales = {"no switch": 0.5, "in": 0.1, "out": 2.0}
  tx = jaxbo.gate_by_detection(optax.adam(0.1), 0.1, 2.0, 0.5)
  plain = optax.adam(0.1)
  expected, adam_state = plain.update(GRADS, plain.init(PARAMS))
  found, state = tx.update(GRADS, tx.init(PARAMS), PARAMS, detection=detected(case))
  chex.assert_trees_all_close(found, optax.tree.scale(scales[case], expected), rtol=1e-6)
  chex.assert_trees_all_equal(state.gated_state, adam_state)
  np.testing.assert_allclose(state.info.gate_scale, scales[case])


@pytest.mark.parametrize("bad", [1.0, np.nan, np.inf])
def test_a_closed_gate_leaves_the_optimizer_untouched(bad):
  """After a round with momentum, whatever the gradient."""
  tx = jaxbo.gate_by_detection(optax.adam(0.1), 0.0, 1.0)
  _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS, detection=detected("out"))
  for case in ("no switch", "in"):
    grads = optax.tree.scale(bad, GRADS)
    updates, after = jax.jit(tx.update)(grads, state, PARAMS, detection=detected(case))
    chex.assert_trees_all_equal(updates, optax.tree.zeros_like(PARAMS))
    chex.assert_trees_all_equal(after.gated_state, state.gated_state)
    assert after.info.gate_scale == 0
  reopened, _ = tx.update(GRADS, state, PARAMS, detection=detected("out"))
  assert np.all(reopened["b"] < 0)


def test_scales_are_data():
  tx = jaxbo.gate_by_detection(optax.sgd(1.0), 0.25, 1.0)
  state = tx.init(PARAMS)
  sweep = lambda scale: tx.update(
    GRADS,
    state._replace(gate_scales=state.gate_scales._replace(in_distribution=scale)),
    PARAMS,
    detection=detected("in"),
  )[0]["a"]
  np.testing.assert_allclose(jax.vmap(sweep)(jnp.array([0.0, 0.5, 3.0])), [0, 1, 6])


def test_extra_arguments_reach_the_optimizer():
  value_scaled = optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(),
    lambda updates, state, params=None, *, value, **extra: (
      optax.tree.scale(value, updates),
      state,
    ),
  )
  tx = jaxbo.gate_by_detection(value_scaled, 1.0, 1.0)
  updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, detection=detected("in"), value=3.0)
  np.testing.assert_allclose(updates["a"], -6)


@cases("name", ["in_distribution", "out_of_distribution", "no_switch"])
@cases("bad", [-0.1, float("nan"), float("inf")])
def test_a_scale_must_be_non_negative_and_finite(name, bad):
  scales = {"in_distribution_scale": 1.0, "out_of_distribution_scale": 1.0, f"{name}_scale": bad}
  with pytest.raises(ValueError, match=f"{name}_scale must be non-negative and finite, got {bad}"):
    jaxbo.gate_by_detection(optax.sgd(0.1), **scales)


def test_a_detection_must_be_given():
  tx = jaxbo.gate_by_detection(optax.sgd(0.1), 1.0, 1.0)
  for extra in ({}, {"detection": None}):
    with pytest.raises(TypeError, match="gate_by_detection: update must be given detection=, a"):
      tx.update(GRADS, tx.init(PARAMS), PARAMS, **extra)


def test_an_optimizer_must_be_one(as_users_run):
  with pytest.raises(TypeError, match="optimizer must be an optax transformation"):
    jaxbo.gate_by_detection(0.1, 1.0, 1.0)  # pyright: ignore
