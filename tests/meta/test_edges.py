"""The online meta-learner at its edges: overflows, partial gates, momentum, extra arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbo
from tests.meta.test_learner import (
  INF,
  INNER,
  LEFT,
  RATE,
  SCORE,
  STEPS,
  STREAM,
  UNROLLED,
  first_of,
  loss,
  play,
)

pytestmark = pytest.mark.slow  # All together, not each.


def overflowing_loss(x, y, samples):
  """NaN where the model is huge, which no gradient leads out of."""
  value, miss = loss(x, y, samples)
  return value + 0 * jnp.exp(jnp.sum((x + y) ** 2)), miss


@pytest.mark.parametrize("switch_score", ["loss", "drop"])
def test_a_task_model_that_overflows_is_given_up(switch_score):
  """Unless it is the data, or switches are never detected."""
  inner = jaxbo.inner_solver(first_of(overflowing_loss), optax.sgd(RATE), STEPS)
  detector = jaxbo.meta.threshold_detector(5.0, INF)
  learner = jaxbo.meta.online_meta_learner(
    overflowing_loss, inner, None, detector, switch_score=switch_score, shift_score=SCORE
  )
  step, batch = jax.jit(learner.step), (jnp.ones((5, 2)), jnp.ones((5, 2)))
  state, _ = step(learner.init(jnp.zeros(2), batch=batch), batch)
  broken = state._replace(task=state.task._replace(y=jnp.full(2, 20.0)))
  _, info = step(broken, (jnp.full((5, 2), jnp.nan), batch[1]))
  assert not info.detection.switch
  after, info = step(broken, batch)
  assert np.isnan(info.before.loss)
  assert info.detection.switch
  assert info.detection.scores.switch == INF
  np.testing.assert_allclose(after.task.y, 1 - LEFT, rtol=1e-6)
  never = jaxbo.meta.FixedThresholdState(jnp.float32(INF))
  deaf = broken._replace(detector_state=broken.detector_state._replace(switch_rule=never))
  assert not step(deaf, batch)[1].detection.switch


def test_a_gate_for_a_part_of_the_meta_model_does_not_hold_the_rest():
  """Two gates, and a part without one."""
  names = {"a": "a", "b": "b", "c": "c"}
  part_loss = lambda x, y, u: (0.5 * sum((x[n] + y[n] - u) ** 2 for n in names), x["a"] + y["a"])
  inner = jaxbo.inner_solver(first_of(part_loss), optax.sgd(0.5), 1)
  gate = lambda *scales: jaxbo.gate_by_detection(optax.sgd(1.0), *scales)
  parts = optax.partition({"a": gate(0.0, 1.0), "b": gate(0.5, 1.0), "c": optax.sgd(1.0)}, names)
  outer = optax.chain(jaxbo.add_unrolled_response(inner), parts)
  oracle = jaxbo.meta.oracle_detector(lambda batch: batch[0] > 0, lambda batch: batch[0] > 1)
  learner = jaxbo.meta.online_meta_learner(part_loss, inner, outer, oracle, shift_score=jnp.square)
  step, u = jax.jit(learner.step), lambda value: (jnp.float32(value),) * 2
  state, _ = step(learner.init({name: jnp.float32(0.0) for name in names}, batch=u(1.0)), u(1.0))
  assert state.meta_params == {"a": 0, "b": 0.125, "c": 0.25}  # (1 - a)^2 of the way, then gated.
  known, _ = step(state, u(-1.0))  # No switch.
  assert (known.meta_params["a"], known.meta_params["b"]) == (0, 0.125)
  assert known.meta_params["c"] < 0.25
  other, _ = step(state, u(2.0))  # A shift.
  np.testing.assert_allclose(list(other.meta_params.values()), [0.5, 0.59375, 0.6875])


@pytest.mark.parametrize("warm_start", ["all", "params", False])
def test_the_momentum_of_the_inner_steps_lasts_as_long_as_the_task(warm_start, x64):
  """Whatever the solver does with solutions outside of this loop."""
  optimizer = optax.sgd(RATE, momentum=0.9)
  inner = jaxbo.inner_solver(first_of(loss), optimizer, STEPS, warm_start=warm_start)
  oracle = jaxbo.meta.oracle_detector()
  learner = jaxbo.meta.online_meta_learner(loss, inner, None, oracle, shift_score=SCORE)
  _, (batch, _, phis, _) = play(learner, learner.init(jnp.ones(2), stream=STREAM, key=1))
  phi = momentum = np.zeros(2)
  for t, mean in enumerate(np.mean(np.asarray(batch.train), axis=1)):
    if batch.task_switch[t]:
      phi, momentum = np.ones(2), np.zeros(2)
    for _ in range(STEPS):
      momentum = 0.9 * momentum + phi - mean
      phi = phi - RATE * momentum
    np.testing.assert_allclose(phis[t], phi, rtol=0, atol=1e-12)


def test_extra_arguments_of_a_step_reach_the_outer_transformation():
  times = optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(),
    lambda updates, state, params=None, *, factor, **_: (optax.tree.scale(-factor, updates), state),
  )
  batch = (jnp.ones((5, 2)), jnp.ones((5, 2)))
  one = jaxbo.meta.meta_ogd(loss, INNER, optax.chain(UNROLLED, times), shift_score=SCORE)
  two = jaxbo.meta.c_maml_pap(
    loss, INNER, times, drop_threshold=INF, buffer_size=1, shift_score=jnp.square
  )
  for learner, rounds in ((one, 1), (two, 2)):
    state = learner.init(jnp.zeros(2), batch=batch)
    for _ in range(rounds):
      state, _ = learner.step(state, batch, factor=2.0)
    np.testing.assert_allclose(state.meta_params, 2 * LEFT**2, rtol=1e-6)


def test_the_scales_of_leeds_that_are_not_given():
  scales = optax.tree.get(jaxbo.leeds(1.0, INNER).init(jnp.zeros(2)), "gate_scales")
  np.testing.assert_allclose(scales, (0.0, 0.1, 1.0), rtol=1e-6)
