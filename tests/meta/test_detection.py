"""Scores, thresholds and detectors: golden values, identities, exact error rates, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import jaxbo
from jaxbo.meta.ood_scores import mean_score

pytestmark = pytest.mark.slow  # All together, not each.

INF = float("inf")
LOGITS = [np.zeros(5), np.zeros(10), np.array([10.0, 0, 0, 0, 0]), np.arange(1.0, 4.0)]


def test_the_golden_values_of_p13(x64):
  energies = [-1.6094379124, -2.3025850930, -10.0001815832, -3.4076059644]
  for logits, expected in zip(LOGITS, energies, strict=True):
    np.testing.assert_allclose(jaxbo.meta.energy_score(logits), expected, rtol=0, atol=1e-10)
  tempered = [(LOGITS[0], 2.0, -3.2188758248), (LOGITS[3], 0.5, -3.0714658142)]
  for logits, temperature, expected in tempered:
    found = jaxbo.meta.energy_score(logits, temperature)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)
  logits = LOGITS[3]
  np.testing.assert_allclose(jaxbo.meta.entropy_score(logits), 0.8323955818, rtol=0, atol=1e-10)
  np.testing.assert_allclose(jaxbo.meta.max_softmax_score(logits), 0.6652409558, rtol=0, atol=1e-10)


def test_the_identities_of_the_energy(x64):
  logits = jnp.asarray(3 * np.random.default_rng(0).normal(size=(50, 7)))
  top, energy = jnp.max(logits, axis=-1), jaxbo.meta.energy_score(logits)
  assert np.all(energy <= -top)
  assert np.all(energy >= -top - np.log(7))
  np.testing.assert_allclose(jaxbo.meta.energy_score(logits + 2.5), energy - 2.5, rtol=1e-12)
  log_p = jax.nn.log_softmax(logits)
  np.testing.assert_allclose(-log_p, -logits - energy[:, None], rtol=0, atol=1e-12)
  for score in (jaxbo.meta.entropy_score, jaxbo.meta.max_softmax_score):
    np.testing.assert_allclose(score(logits + 2.5), score(logits), rtol=1e-12)


def test_scores_of_extreme_logits_are_finite_and_of_low_precision_are_float32():
  logits = jnp.array([[1e4, -1e4, -INF], [0.0, 0.0, 0.0]])
  np.testing.assert_allclose(jaxbo.meta.energy_score(logits), [-1e4, -np.log(3)], rtol=1e-6)
  np.testing.assert_allclose(jaxbo.meta.entropy_score(logits), [0, np.log(3)], rtol=1e-6)
  np.testing.assert_allclose(jaxbo.meta.max_softmax_score(logits), [1, 1 / 3], rtol=1e-6)
  for score in (jaxbo.meta.energy_score, jaxbo.meta.entropy_score, jaxbo.meta.max_softmax_score):
    assert score(logits.astype(jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("name", ["energy", "entropy", "max_softmax"])
def test_every_score_that_has_a_name_is_high_for_unknown_data(name):
  sure, unsure = jnp.array([[9.0, 0.0, 0.0]]), jnp.array([[1.0, 1.0, 1.0]])
  score = mean_score("shift_score", name)
  assert score(unsure) > score(sure) + 0.5
  np.testing.assert_allclose(
    score(jnp.concatenate([sure, unsure])), (score(sure) + score(unsure)) / 2
  )


@functools.partial(jax.jit, static_argnums=0)
def detect_all(detector, state, scores):
  """The detections of scores ``[rounds]``."""
  update = lambda state, scores: detector.update(scores, state)[::-1]
  return jax.lax.scan(update, state, scores)[::-1]


def detections(switch, shift, switch_scores, shift_scores=None):
  detector = jaxbo.meta.threshold_detector(switch, shift)
  switch_scores = jnp.asarray(switch_scores, jnp.float32)
  shift_scores = switch_scores if shift_scores is None else jnp.asarray(shift_scores, jnp.float32)
  scores = jaxbo.meta.Scores(switch_scores, shift_scores)
  return detect_all(detector, detector.init(), scores)[0]


def test_the_first_round_is_a_switch_and_a_shift_needs_one():
  found = detections(2.0, 0.5, [0.0, 1.0, 3.0, 3.0, 2.0], [1.0, 1.0, 1.0, 0.0, 1.0])
  np.testing.assert_array_equal(found.switch, [True, False, True, True, False])
  np.testing.assert_array_equal(found.shift, [True, False, True, False, False])
  np.testing.assert_array_equal(found.scores.switch, [0, 1, 3, 3, 2])


def test_infinite_thresholds_force_or_forbid_and_a_nan_score_detects_nothing():
  scores = [0.0, 1.0, -5.0, np.nan, 2.0]
  np.testing.assert_array_equal(detections(-INF, -INF, scores).switch, [1, 1, 1, 0, 1])
  np.testing.assert_array_equal(detections(-INF, -INF, scores).shift, [1, 1, 1, 0, 1])
  np.testing.assert_array_equal(detections(INF, INF, scores).switch, [1, 0, 0, 0, 0])
  assert not np.any(detections(-INF, INF, scores).shift)


def test_thresholds_are_data_so_that_a_sweep_is_a_vmap():
  detector = jaxbo.meta.threshold_detector(0.0, 0.0)
  scores = jaxbo.meta.Scores(jnp.arange(6.0), jnp.arange(6.0))
  start, levels = detector.init(), jnp.array([-1.0, 2.5, 9.0])
  states = jax.vmap(lambda v: start._replace(switch_rule=jaxbo.meta.FixedThresholdState(v)))(levels)
  found = jax.vmap(lambda state: detect_all(detector, state, scores)[0].switch)(states)
  np.testing.assert_array_equal(np.sum(found, axis=1), [6, 4, 1])


def test_a_quantile_of_the_last_active_scores():
  """The second detector sees scores at switches only; the first leaves out the first round."""
  rng = np.random.default_rng(1)
  scores = rng.normal(size=400).astype(np.float32)
  switch = jaxbo.meta.quantile_threshold(0.9, 50, initial=-INF)
  found = detections(switch, jaxbo.meta.quantile_threshold(0.5, 9), scores, -scores)
  expected = [True]
  for t in range(1, 400):
    old = scores[max(t - 50, 1) : t]
    expected.append(scores[t] > (np.quantile(old, 0.9) if len(old) == 50 else -INF))
  np.testing.assert_array_equal(found.switch, expected)
  at_switches = np.flatnonzero(expected)
  for i, t in enumerate(at_switches):
    old = -scores[at_switches[max(i - 9, 0) : i]]
    assert found.shift[t] == (len(old) == 9 and -scores[t] > np.quantile(old, 0.5))
  rate = np.mean(expected[100:])
  assert abs(rate - 0.1) < 4 * np.sqrt(0.1 * 0.9 / 300)


def test_a_score_that_is_not_finite_does_not_enter_the_window():
  rule = jaxbo.meta.quantile_threshold(0.5, 2)
  state = rule.init()
  for score in (1.0, np.nan, INF, 3.0):
    _, state = rule.update(jnp.float32(score), state)
  np.testing.assert_array_equal(np.sort(state.score_window.values), [1, 3])
  assert rule.update(jnp.float32(2.5), state)[0]
  assert not rule.update(jnp.float32(2.0), state)[0]  # Above, not at.


P12 = {3.5: (0.03237410977, 0.8995890117), 3.0: (0.1572420272, 0.9791063038)}


def test_the_error_rates_of_p12_by_simulation():
  """2e5 rounds at each distance, within four standard deviations; and by the noncentral chi2."""
  n, d = 10, 5
  detector = jaxbo.meta.threshold_detector(0.0, INF)
  start = detector.init()._replace(has_task=jnp.bool_(True))

  def detected(loss, threshold):
    state = start._replace(switch_rule=jaxbo.meta.FixedThresholdState(threshold))
    return detector.detect_switch(loss, state)[0]

  @jax.jit
  def rates(key, distance):
    def one(key):
      samples = jax.random.normal(key, (n, d)).at[:, 0].add(distance)  # phi is the origin.
      loss = jnp.sum(samples**2) / (2 * n)
      return jnp.stack([detected(loss, jnp.float32(threshold)) for threshold in P12])

    count = lambda key: jnp.sum(jax.vmap(one)(jax.random.split(key, 20_000)), axis=0)
    return jnp.sum(jax.lax.map(count, jax.random.split(key, 10)), axis=0) / 2e5

  for seed, distance in enumerate((0.0, 2.0)):
    found = rates(jax.random.key(seed), distance)
    for rate, (threshold, expected) in zip(found, P12.items(), strict=True):
      exact = stats.ncx2.sf(2 * n * threshold, n * d, max(n * distance**2, 1e-12))
      np.testing.assert_allclose(exact, expected[seed], rtol=1e-8)
      assert abs(rate - exact) < 4 * np.sqrt(exact * (1 - exact) / 2e5)


def test_an_oracle_is_told():
  batch = jaxbo.tasks.StreamBatch(
    images=jnp.zeros((3, 1)),
    labels=jnp.zeros(3, jnp.int32),
    domain=jnp.int32(1),
    classes=jnp.zeros(1, jnp.int32),
    task_switch=jnp.bool_(True),
    domain_switch=jnp.bool_(False),
  )
  detector, scores = jaxbo.meta.oracle_detector(), jaxbo.meta.Scores(jnp.float32(0), jnp.float32(0))
  detection, state = detector.update(scores, detector.init(), batch)
  assert detection.switch
  assert detection.shift
  same = batch._replace(task_switch=jnp.bool_(False))
  detection, _ = detector.update(scores, state, same)
  assert not detection.switch
  assert not detection.shift
  known = batch._replace(domain=jnp.int32(0))
  assert not detector.update(scores, state, known)[0].shift


def validation_scores():
  rng = np.random.default_rng(2)
  switch, unknown = rng.random(4000) < 0.2, rng.random(4000) < 0.3
  scores = jaxbo.meta.Scores(
    np.where(switch, rng.normal(4, 1, 4000), rng.normal(0, 1, 4000)),
    np.where(unknown, rng.normal(9, 1, 4000), rng.normal(1, 1, 4000)),
  )
  return scores, switch, unknown


def test_calibration_finds_the_thresholds_of_two_normals():
  """Midpoint and ROC are both the middle, by symmetry; the shift is a normal quantile."""
  scores, switch, unknown = validation_scores()
  known = np.sum(switch & ~unknown)
  for rule, tolerance in (("midpoint", 4 * np.sqrt(np.pi / 2 / 800)), ("roc", 0.5)):
    found = jaxbo.meta.calibrate(scores, switch, unknown, rule=rule)
    assert abs(found.switch - 2) < tolerance
    # The standard error of a quantile is sqrt(q (1 - q) / n) / density.
    density = stats.norm.pdf(stats.norm.ppf(0.95))
    error = np.sqrt(0.95 * 0.05 / known) / density
    assert abs(found.shift - stats.norm.ppf(0.95, 1, 1)) < 4 * error
  median = jaxbo.meta.calibrate(scores, switch, unknown, level=0.5).shift
  assert abs(median - 1) < 4 * np.sqrt(np.pi / 2 / known)


def test_the_roc_threshold_is_the_best_of_all():
  scores, switch, unknown = validation_scores()
  found = jaxbo.meta.calibrate(scores, switch, unknown, rule="roc").switch
  with_switch, without = scores.switch[1:][switch[1:]], scores.switch[1:][~switch[1:]]
  youden = lambda threshold: np.mean(with_switch > threshold) - np.mean(without > threshold)
  assert youden(found) == max(youden(value) for value in scores.switch)
  assert found not in scores.switch  # Halfway to the next one.


def test_the_first_round_and_what_is_not_finite_do_not_count():
  scores = jaxbo.meta.Scores(
    np.array([99.0, 1.0, 5.0, np.nan, 1.0, INF]), np.array([99.0, 0.0, 2.0, 0.0, 0.0, np.nan])
  )
  switch = np.array([True, False, True, False, False, True])
  found = jaxbo.meta.calibrate(scores, switch, np.zeros(6, bool))
  assert found == jaxbo.meta.Thresholds(3.0, 2.0)


def test_bad_arguments():
  with pytest.raises(ValueError, match="temperature must be positive and finite, got 0"):
    jaxbo.meta.energy_score(jnp.zeros((2, 3)), 0.0)
  with pytest.raises(ValueError, match=r"logits must have shape \[batch, classes\], got shape"):
    jaxbo.meta.entropy_score(jnp.zeros((2, 0)))
  with pytest.raises(TypeError, match="logits must be real floats, got dtype int32"):
    jaxbo.meta.max_softmax_score(jnp.arange(3))
  for name in ("switch", "shift"):
    arguments = {"switch": 0.0, "shift": 0.0, name: float("nan")}
    with pytest.raises(ValueError, match=f"{name} must be a number or an infinity, got nan"):
      jaxbo.meta.threshold_detector(**arguments)
  with pytest.raises(ValueError, match="level must be in"):
    jaxbo.meta.quantile_threshold(1.5, 3)
  with pytest.raises(ValueError, match="window must be at least 1, got 0"):
    jaxbo.meta.quantile_threshold(0.5, 0)
  with pytest.raises(ValueError, match="initial must be a number or an infinity, got nan"):
    jaxbo.meta.quantile_threshold(0.5, 3, initial=float("nan"))
  with pytest.raises(TypeError, match="switch must be a function switch"):
    jaxbo.meta.oracle_detector(lambda: True)
  oracle, nothing = jaxbo.meta.oracle_detector(), jaxbo.meta.Scores(jnp.float32(0), jnp.float32(0))
  with pytest.raises(TypeError, match="switch must be given for batches without task_switch, got"):
    oracle.update(nothing, oracle.init(), {"images": jnp.zeros(3)})
  scores, switch, unknown = validation_scores()
  with pytest.raises(ValueError, match="rule must be one of 'midpoint', 'roc', got 'best'"):
    jaxbo.meta.calibrate(scores, switch, unknown, rule="best")
  with pytest.raises(ValueError, match="must have one shape"):
    jaxbo.meta.calibrate(scores, switch[:-1], unknown)
  with pytest.raises(ValueError, match="at least one finite round with a switch, after"):
    jaxbo.meta.calibrate(scores, np.zeros(4000, bool), unknown)
  with pytest.raises(TypeError, match="scores must be a jaxbo"):
    jaxbo.meta.calibrate(jaxbo.meta.Detection(switch, unknown, scores), switch, unknown)
  with pytest.raises(ValueError, match="at least one finite round without a switch"):
    jaxbo.meta.calibrate(scores, np.ones(4000, bool), unknown)
  with pytest.raises(ValueError, match="a switch to an in-distribution task"):
    jaxbo.meta.calibrate(scores, switch, np.ones(4000, bool))


def test_a_threshold_is_a_number_or_a_rule(as_users_run):
  with pytest.raises(TypeError, match="shift must be a number, got 'high'"):
    jaxbo.meta.threshold_detector(0.0, "high")  # pyright: ignore
