"""Detection quality and task-averaged regret, with values counted by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbo

pytestmark = pytest.mark.slow


def flags(text):
  return np.array([char == "1" for char in text])


def counts(quality):
  return tuple(
    int(count)
    for count in (
      quality.num_changes, quality.num_hits, quality.num_false_alarms, quality.total_delay
    )
  )  # fmt: skip


quality_of = jax.jit(jaxbo.meta.detection_quality)


@pytest.mark.parametrize(
  "changed, detected, expected",
  [
    # The first round does not count; a change is detected at once, and one round later.
    ("1001000100", "1001000010", (2, 2, 0, 1)),
    # A flag before any change, and a second one for the same change, are false alarms.
    ("1001000100", "0111100000", (2, 1, 3, 0)),
    # A change that was overtaken by the next is missed; its flag belongs to the next.
    ("0110000000", "0001000000", (2, 1, 0, 1)),
    ("0000000000", "1000000000", (0, 0, 0, 0)),
    # A detector that always fires has full recall, and the precision of chance.
    ("1010010000", "1111111111", (2, 2, 7, 0)),
  ],
)
def test_counts(changed, detected, expected):
  quality = quality_of(flags(detected), flags(changed))
  assert counts(quality) == expected
  changes, hits, alarms, delay = expected
  np.testing.assert_equal(float(quality.recall), hits / changes if changes else np.nan)
  precision = np.float32(hits / (hits + alarms)) if hits + alarms else np.nan
  np.testing.assert_equal(float(quality.precision), precision)
  np.testing.assert_equal(float(quality.mean_delay), delay / hits if hits else np.nan)


def test_a_shift_must_be_detected_before_the_task_ends():
  """The flag of round 4 is of the task that began there, and that was no shift."""
  shifted, switches, detected = flags("00100000"), flags("00101000"), flags("00001000")
  without = quality_of(detected, shifted)
  assert counts(without) == (1, 1, 0, 2)
  assert counts(quality_of(detected, shifted, boundaries=switches)) == (1, 0, 1, 0)


def test_a_flag_that_comes_too_late_is_a_false_alarm():
  changed, detected = flags("01000000"), flags("00010000")
  late = functools.partial(quality_of, detected, changed)
  assert counts(late(max_delay=jnp.int32(2))) == (1, 1, 0, 2)
  assert counts(late(max_delay=jnp.int32(1))) == (1, 0, 1, 0)


def test_the_stream_and_the_trace_agree():
  rng = np.random.default_rng(0)
  changed, detected, ends = rng.random((3, 50)) < 0.3
  quality = jaxbo.meta.DetectionQuality.start()
  update = jax.jit(jaxbo.meta.DetectionQuality.update)
  for row in zip(detected, changed, ends, strict=True):
    quality = update(quality, *row)
  whole = quality_of(detected, changed, boundaries=ends)
  assert [int(leaf) for leaf in quality] == [int(leaf) for leaf in whole]
  assert int(whole.num_judged) == 50
  assert int(whole.num_hits) + int(whole.num_false_alarms) == detected[1:].sum()


def test_logged_scores_can_be_swept_and_give_the_flags_of_a_run_with_that_threshold():
  """Where the scores do not depend on the threshold: a learner that restarts in every round."""
  loss = lambda x, y, u: (0.5 * jnp.sum((x + y - u.mean(axis=0)) ** 2), x + y)
  inner = jaxbo.inner_solver(lambda *args: loss(*args)[0], optax.sgd(0.5), 1)
  stream = jaxbo.tasks.moving_gaussian_stream(2, 5, stay_probability=0.8, domain_step=0.0)
  detector = jaxbo.meta.threshold_detector(0.0, 0.0)
  learner = jaxbo.meta.online_meta_learner(
    loss, inner, None, detector, restart="always", shift_score=jnp.square
  )
  state = learner.init(jnp.full(2, -6.0), stream=stream, key=0)
  run = jax.jit(learner.run, static_argnums=2)
  thresholds = jnp.array([-1.0, 0.3, 1.0, 1e9])

  def with_threshold(value):
    detector_state = state.detector_state
    rule = detector_state.switch_rule._replace(threshold=value)
    return state._replace(detector_state=detector_state._replace(switch_rule=rule))

  history = run(with_threshold(thresholds[1]), stream, 200)[1]
  truth, scores = history.extra.task_switch, history.detection.scores.switch
  swept = jax.vmap(lambda at: jaxbo.meta.detection_quality(scores > at, truth))(thresholds)
  online = jaxbo.meta.detection_quality(history.detection.switch, truth)
  assert counts(online) == counts(jax.tree.map(lambda leaf: leaf[1], swept))
  assert swept.recall[0] == 1
  assert np.all(np.diff(swept.recall) <= 0)
  assert swept.num_hits[-1] == swept.num_false_alarms[-1] == 0
  other = run(with_threshold(thresholds[2]), stream, 200)[1]
  assert counts(jaxbo.meta.detection_quality(other.detection.switch, truth)) == counts(
    jax.tree.map(lambda leaf: leaf[2], swept)
  )


def test_the_regret_is_against_the_best_of_each_task_not_of_each_round():
  losses = jnp.array([3.0, 1.0, 2.0, 5.0, 4.0])
  candidates = jnp.array([[0.0, 1.0], [4.0, 1.0], [9.0, 1.0], [1.0, 3.0], [1.0, 0.0]])
  switches = flags("10010")
  # Task 1: 6 against min(13, 3); task 2: 9 against min(2, 3).
  regret = jaxbo.meta.task_averaged_regret(losses, candidates, switches)
  assert float(regret) == ((6 - 3) + (9 - 2)) / 2
  # The first round begins a task, flagged or not.
  assert jaxbo.meta.task_averaged_regret(losses, candidates, flags("00010")) == regret
  best = jnp.array([1.0, 1.0, 1.0, 1.0, 1.0])
  assert float(jaxbo.meta.task_averaged_regret(losses, best, switches)) == (15 - 5) / 2


def test_the_regret_of_the_running_mean_on_quadratics(x64):
  """P16 for one task: follow the leader has the regret sum (n-1)/n |p_n - m_{n-1}|^2 / 2 too."""
  points = np.random.default_rng(1).normal(size=(2, 30, 3))
  half = lambda v: 0.5 * np.sum(v**2, axis=-1)
  played, best, welford = [], [], 0.0
  for task in points:
    n = np.arange(1, 31)
    running = np.cumsum(task, axis=0) / n[:, None]
    before = np.concatenate([np.zeros((1, 3)), running[:-1]])
    played.append(half(task - before))
    best.append(half(task - task.mean(axis=0)))
    # sum |p - m_{n-1}|^2 / 2 - sum |p - mean|^2 / 2 = sum (1 / n) |p_n - m_{n-1}|^2 / 2.
    welford += np.sum(played[-1] / n)
  switches = np.tile(np.arange(30) == 0, 2)
  regret = jaxbo.meta.task_averaged_regret(np.concatenate(played), np.concatenate(best), switches)
  np.testing.assert_allclose(regret, welford / 2, rtol=1e-12)


def test_bad_shapes():
  with pytest.raises(ValueError, match=r"all flags must have one shape \[rounds\], got"):
    jaxbo.meta.detection_quality(np.zeros(3, bool), np.zeros(4, bool))
  with pytest.raises(ValueError, match=r"losses and task_switch must have the shape \[rounds\]"):
    jaxbo.meta.task_averaged_regret(np.zeros(3), np.zeros(4), np.zeros(3, bool))
  with pytest.raises(ValueError, match=r"must have the shape \[rounds\], comparator_losses"):
    jaxbo.meta.task_averaged_regret(*[np.zeros(0)] * 3)
  for switches in (True, np.zeros((3, 2), bool)):
    with pytest.raises(ValueError, match=r"losses and task_switch must have the shape \[rounds\]"):
      jaxbo.meta.task_averaged_regret(np.zeros(3), np.zeros(3), switches)
