"""The online meta-learner against hand-written loops in NumPy: every rule, on closed forms.

The loss of a model is half its squared distance to the mean of the samples (P11), so that an inner
run of k steps of rate a ends at ``m_S + (1 - a)^k (theta - m_S)`` and the meta-gradient is
``(1 - a)^k (phi - m_Q)``.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbo
from tests.cases import cases

pytestmark = pytest.mark.slow

RATE, STEPS = 0.3, 2
LEFT = (1 - RATE) ** STEPS
INF = float("inf")


def loss(x, y, samples):
  miss = x + y - jnp.mean(samples, axis=0)
  return 0.5 * jnp.sum(miss**2), miss


def first_of(loss):
  return lambda *args: loss(*args)[0]


SCORE = lambda miss: miss**2 / 2  # Its mean over two coordinates is half the loss.
INNER = jaxbo.inner_solver(first_of(loss), optax.sgd(RATE), STEPS)
STREAM = jaxbo.tasks.moving_gaussian_stream(
  2, 5, stay_probability=0.6, domain_switch_probability=0.3, num_queries=4
)
UNROLLED = jaxbo.add_unrolled_response(INNER)


def gated(scales=(0.125, 1.0, 0.0), response=UNROLLED):
  return optax.chain(response, jaxbo.gate_by_detection(optax.sgd(0.5), *scales))


@functools.partial(jax.jit, static_argnums=(0, 2))
def play(learner, state, num_rounds=60):
  """The state, and of every round the batch, the meta-model, the task's model and the info."""

  def body(state, _):
    stream_state, batch = STREAM.step(state.stream_state)
    meta = state.meta_params
    state, info = learner.step(state._replace(stream_state=stream_state), batch)
    return state, (batch, meta, state.task.x + state.task.y, info)

  return jax.lax.scan(body, state, length=num_rounds)


def by_hand(batch, *, detect, scales=(0.125, 1.0, 0.0), always=False, query="given", left=LEFT):
  """The loop in NumPy; ``detect(t, loss_before, drop, loss_after)`` gives both flags."""
  support, queries = (np.mean(np.asarray(leaf), axis=1) for leaf in (batch.train, batch.val))
  theta, phi, result = np.zeros(2), np.zeros(2), []
  half = lambda v: 0.5 * v @ v
  for t, (m_s, m_q) in enumerate(zip(support, queries, strict=True)):
    before, fresh = half(phi - m_s), m_s + LEFT * (theta - m_s)
    drop = before - half(fresh - m_s)
    switch = t == 0 or detect(t, before, drop, None)[0]
    phi = fresh if switch or always else m_s + LEFT * (phi - m_s)
    shift = bool(switch and detect(t, before, drop, half(phi - m_s) / 2)[1])
    meta = theta
    scale = scales[2] if not switch else scales[1] if shift else scales[0]
    if query == "next":
      gradient = np.zeros(2)
      if t:
        old = support[t - 1]
        gradient = left * (old + LEFT * (theta - old) - m_s)
    else:
      gradient = left * (fresh - (m_q if query == "given" else m_s))
    theta = theta - 0.5 * scale * gradient
    after = half(phi - (m_q if query == "given" else m_s))
    result.append((meta, phi, before, after, drop, switch, shift))
  return [np.array(column) for column in zip(*result, strict=True)]


def compare(learner, num_rounds=60, state=None, drop=False, **rules):
  state = learner.init(jnp.zeros(2), stream=STREAM, key=1) if state is None else state
  end, (batch, metas, phis, info) = play(learner, state, num_rounds)
  expected = by_hand(batch, **rules)
  found = (
    metas,
    phis,
    info.before.loss,
    info.after.loss,
    info.detection.scores.switch,
    info.detection.switch,
    info.detection.shift,
  )
  for i, (f, e) in enumerate(zip(found, expected, strict=True)):
    if i != 4 or drop:
      np.testing.assert_allclose(f, e, rtol=0, atol=1e-12)
  return end, info, batch


OPTIONS = {
  "leeds": ((0.125, 1.0, 0.0), {}),
  "skip": ((0.0, 1.0, 0.0), {}),
  "every round": ((0.125, 1.0, 0.25), {}),
  "next": ((0.125, 0.5, 1.0), {"query": "next"}),
  "always": ((0.25, 0.75, 0.5), {"query": "same", "restart": "always"}),
}


@functools.cache
def oracle_learner(**options):
  known_shifts = lambda batch: batch.domain % 2 == 1
  oracle = jaxbo.meta.oracle_detector(out_of_distribution=known_shifts)
  return jaxbo.meta.online_meta_learner(loss, INNER, gated(), oracle, shift_score=SCORE, **options)


@pytest.mark.parametrize("name", OPTIONS)
def test_with_an_oracle_it_equals_a_hand_written_loop(name, x64):
  """The scales are data, so most of these are one program."""
  scales, options = OPTIONS[name]
  learner = oracle_learner(**options)
  state = learner.init(jnp.zeros(2), stream=STREAM, key=1)
  inside, outside, without = jnp.float32(scales)
  gate_scales = jaxbo.meta.GateScales(without, inside, outside)
  meta_state = optax.tree.set(state.meta_state, gate_scales=gate_scales)
  state = state._replace(meta_state=meta_state)
  truth = play(learner, state)[1][0].extra
  detect = lambda t, *scores: (truth.task_switch[t], truth.domain[t] % 2 == 1)
  rules = {"always": name == "always", "query": options.get("query", "given")}
  end, info, _ = compare(learner, state=state, detect=detect, scales=scales, **rules)
  np.testing.assert_array_equal(info.detection.switch, truth.task_switch)
  assert 5 < np.sum(info.detection.shift) < np.sum(info.detection.switch) < 40
  assert np.linalg.norm(end.meta_params) > 0.3
  assert np.all(info.finite)
  cases = np.asarray(info.detection.switch, int) + np.asarray(info.detection.shift, int)
  expected = np.array([without, inside, outside])[cases] > 0
  if name == "next":
    expected[0] = False  # There is nothing before it to adapt to.
  np.testing.assert_array_equal(info.meta_updated, expected)
  np.testing.assert_array_equal(np.isfinite(info.outer_loss), expected)


@functools.cache
def threshold_learner():
  return jaxbo.meta.online_meta_learner(
    loss, INNER, gated(), jaxbo.meta.threshold_detector(0.3, 0.02), shift_score=SCORE
  )


def with_thresholds(switch, shift):
  state = threshold_learner().init(jnp.zeros(2), stream=STREAM, key=1)
  rules = [jaxbo.meta.FixedThresholdState(jnp.float32(value)) for value in (switch, shift)]
  detector_state = state.detector_state._replace(switch_rule=rules[0], shift_rule=rules[1])
  return state._replace(detector_state=detector_state)


THRESHOLDS = [(2.0, 0.75), (INF, INF), (INF, -INF), (-INF, INF), (-INF, -INF)]


@pytest.mark.parametrize(("switch", "shift"), THRESHOLDS)
def test_thresholds_choose_the_branch_and_infinite_ones_force_it(switch, shift, x64):
  """Infinity: no restart after the first round. Minus infinity: MAML, a restart in every round."""
  detect = lambda t, before, drop, after: (before > switch, after is not None and after > shift)
  state = with_thresholds(switch, shift)
  _, info, _ = compare(threshold_learner(), state=state, detect=detect)
  if switch == INF:
    assert np.sum(info.detection.switch) == 1
  elif switch == -INF:
    assert np.all(info.detection.switch)
    assert np.all(np.asarray(info.detection.shift) == (shift == -INF))
  else:
    assert 5 < np.sum(info.detection.shift) < np.sum(info.detection.switch) < 50


def test_the_drop_of_the_loss_has_its_closed_form(x64):
  """P12: ``|phi - u|^2 / 2 - (1 - a)^2k |theta - u|^2 / 2``, and it decides."""
  learner = jaxbo.meta.online_meta_learner(
    loss,
    INNER,
    gated(),
    jaxbo.meta.threshold_detector(0.2, INF),
    switch_score="drop",
    shift_score=SCORE,
  )
  detect = lambda t, before, drop, after: (drop > np.float32(0.2), False)
  _, info, batch = compare(learner, detect=detect, drop=True)
  means = np.mean(np.asarray(batch.train), axis=1)
  _, (_, metas, phis, _) = play(learner, learner.init(jnp.zeros(2), stream=STREAM, key=1))
  last = np.concatenate([np.zeros((1, 2)), phis[:-1]])
  squared = lambda v: np.sum(np.square(v), axis=1)
  expected = squared(last - means) / 2 - LEFT**2 * squared(metas - means) / 2
  np.testing.assert_allclose(info.detection.scores.switch, expected, rtol=0, atol=1e-12)
  assert 3 < np.sum(info.detection.switch) < 57


LAM = 0.5


def proximal_loss(x, y, samples):
  return loss(x, y, samples)[0] + 0.5 * LAM * jnp.sum(y**2)


def test_every_response_plugs_in(x64):
  """First order lacks the factor, ESJ with orthogonal directions in both dimensions is exact, and
  the implicit response of the proximal minimum has the factor lam / (1 + lam).
  """
  es = jaxbo.add_es_response(INNER, 2, smoothing=1e-3, directions="orthogonal", key=0)
  everywhere = jaxbo.meta.oracle_detector(lambda batch: True, lambda batch: True)
  for response, left in ((jaxbo.drop_response(), 1.0), (es, LEFT)):
    learner = jaxbo.meta.online_meta_learner(
      loss, INNER, gated(response=response), everywhere, shift_score=SCORE
    )
    detect = lambda t, *scores: (True, True)
    compare(learner, detect=detect, left=left)
  inner = jaxbo.inner_solver(proximal_loss, optax.sgd(1 / (1 + LAM)), 1)
  response = jaxbo.add_implicit_response(inner, jaxbo.conjugate_gradient(2))
  learner = jaxbo.meta.online_meta_learner(
    loss, inner, gated(response=response), everywhere, shift_score=SCORE
  )
  _, (batch, metas, phis, _) = play(learner, learner.init(jnp.zeros(2), stream=STREAM))
  m_s, m_q = (np.mean(np.asarray(leaf), axis=1) for leaf in (batch.train, batch.val))
  np.testing.assert_allclose(phis, (m_s + LAM * metas) / (1 + LAM), rtol=0, atol=1e-12)
  steps = -0.5 * LAM / (1 + LAM) * (phis - m_q)
  np.testing.assert_allclose(np.diff(metas, axis=0), steps[:-1], rtol=0, atol=1e-10)


def test_the_meta_model_as_a_running_mean_has_the_regret_of_p16(x64):
  """Welford: sum (n-1)/n |p_n - m_{n-1}|^2 / 2 is the least sum of squares, exactly."""
  inner = jaxbo.inner_solver(
    first_of(loss), optax.sgd(0.0), 1
  )  # The task's model is the meta-model.
  gate = jaxbo.gate_by_detection(optax.sgd(lambda count: 1 / (count + 1.0)), 1.0, 1.0)
  outer = optax.chain(jaxbo.add_unrolled_response(inner), gate)
  detector = jaxbo.meta.threshold_detector(-INF, INF)
  learner = jaxbo.meta.online_meta_learner(
    loss, inner, outer, detector, query="same", restart="always", shift_score=SCORE
  )
  state = learner.init(jnp.zeros(2), stream=STREAM, key=2)
  _, (batch, metas, _, info) = play(learner, state)
  points, n = np.mean(np.asarray(batch.train), axis=1), np.arange(1, 61)
  running = np.cumsum(points, axis=0) / n[:, None]
  np.testing.assert_allclose(metas[1:], running[:-1], rtol=0, atol=1e-11)
  # What is reported after the inner run is the loss of the meta-model, before the meta-update.
  regret = np.sum((n - 1) / n * info.after.loss)
  least = 0.5 * np.sum((points - points.mean(axis=0)) ** 2)
  np.testing.assert_allclose(regret, least, rtol=1e-12)


@pytest.mark.parametrize("shift_model", ["meta", "initial"])
def test_the_shift_score_of_other_models(shift_model, x64):
  learner = jaxbo.meta.online_meta_learner(
    loss,
    INNER,
    gated(),
    jaxbo.meta.threshold_detector(0.3, 10.0),
    shift_model=shift_model,
    shift_score=SCORE,
  )
  state = learner.init(jnp.ones(2), stream=STREAM, key=1)
  _, (batch, metas, _, info) = play(learner, state)
  seen = metas if shift_model == "meta" else np.ones((60, 2))
  expected = np.mean((seen - np.mean(np.asarray(batch.train), axis=1)) ** 2, axis=1) / 2
  np.testing.assert_allclose(info.detection.scores.shift, expected, rtol=0, atol=1e-12)
  assert np.any(info.detection.shift)


def test_where_the_gate_is_closed_the_response_is_not_computed():
  """A transformation in front of the gate counts how often it is called."""
  counter = optax.scale_by_schedule(lambda count: 1.0)
  outer = optax.chain(UNROLLED, counter, jaxbo.gate_by_detection(optax.sgd(0.5), 0.0, 1.0))
  learner = jaxbo.meta.online_meta_learner(
    loss, INNER, outer, jaxbo.meta.oracle_detector(), shift_score=SCORE
  )
  end, (_, metas, _, info) = play(learner, learner.init(jnp.zeros(2), stream=STREAM, key=1))
  calls = optax.tree.get(end.meta_state, "ScaleByScheduleState").count
  assert calls == np.sum(info.detection.shift) == np.sum(info.meta_updated)
  moved = np.any(np.diff(metas, axis=0) != 0, axis=1)
  np.testing.assert_array_equal(moved, info.detection.shift[:-1])


def test_without_an_outer_transformation_the_meta_model_stays():
  detector = jaxbo.meta.oracle_detector()
  learner = jaxbo.meta.online_meta_learner(loss, INNER, None, detector, shift_score=SCORE)
  end, (_, metas, _, info) = play(learner, learner.init(jnp.ones(2), stream=STREAM, key=1))
  np.testing.assert_array_equal(metas, np.ones((60, 2)))
  assert not np.any(info.meta_updated)
  assert end.meta_state == ()


@functools.cache
def jitted_step():
  return jax.jit(threshold_learner().step)


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_round_that_is_not_finite_moves_nothing_and_the_next_goes_on(part):
  step = jitted_step()
  state, batch = with_thresholds(-INF, -INF), STREAM.step(STREAM.init(0))[1]
  state, _ = step(state, batch)
  bad = batch._replace(**{part: getattr(batch, part).at[0, 0].set(jnp.nan)})
  after, info = step(state, bad)
  np.testing.assert_array_equal(after.meta_params, state.meta_params)
  for leaf in jax.tree.leaves((after.task, after.meta_state)):
    assert np.all(np.isfinite(leaf))
  assert bool(info.finite) == (part == "train")  # A NaN loss is no switch, so no update.
  assert bool(info.meta_updated) == (part == "val")
  good, info = step(after, batch)
  assert info.meta_updated
  assert np.any(good.meta_params != state.meta_params)


def test_memory_is_the_meta_model_the_task_and_numbers():
  """No leaf has the shape of data, and nothing grows."""
  learner = threshold_learner()
  state = learner.init(jnp.zeros(2), stream=STREAM, key=1)
  after, _ = jitted_step()(state, STREAM.step(STREAM.init(0))[1])
  shapes = [leaf.shape for leaf in jax.tree.leaves(after._replace(stream_state=()))]
  assert shapes.count((2,)) == 3  # theta, and the pair of the task.
  assert all(shape in ((2,), ()) for shape in shapes)
  same = lambda a, b: (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type)
  assert jax.tree.all(jax.tree.map(same, *(jax.tree.map(jax.typeof, s) for s in (state, after))))
  pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
  assert len(set(pointers)) == len(pointers)


NEVER = lambda t, *scores: (False, False)


def test_baselines_without_meta_updates_equal_their_loops(x64):
  frozen = {"scales": (0.0, 0.0, 0.0)}
  tuned = jaxbo.meta.fine_tuning(loss, INNER, shift_score=SCORE)
  compare(tuned, detect=NEVER, **frozen)
  maml = jaxbo.meta.frozen_maml(loss, INNER, shift_score=SCORE)
  compare(maml, detect=NEVER, always=True, **frozen)
  detector = jaxbo.meta.threshold_detector(2.0, INF)
  scratch = jaxbo.meta.train_from_scratch(loss, INNER, detector, shift_score=SCORE)
  compare(scratch, detect=lambda t, before, drop, after: (before > 2.0, False), **frozen)


def test_query_says_what_every_baseline_is_judged_on():
  detector = jaxbo.meta.threshold_detector(2.0, INF)
  for make in (
    lambda **it: jaxbo.meta.fine_tuning(loss, INNER, shift_score=SCORE, **it),
    lambda **it: jaxbo.meta.frozen_maml(loss, INNER, shift_score=SCORE, **it),
    lambda **it: jaxbo.meta.train_from_scratch(loss, INNER, detector, shift_score=SCORE, **it),
    lambda **it: jaxbo.meta.meta_ogd(loss, INNER, jaxbo.itd(0.5, INNER), shift_score=SCORE, **it),
  ):
    judged = []
    for query in ("given", "same"):
      learner = make(query=query)
      batch = jnp.ones((1, 2)), 5 * jnp.ones((1, 2))
      _, info = learner.step(learner.init(jnp.zeros(2), batch=batch), batch)
      judged.append(float(info.after.loss))
    assert judged[0] > judged[1] + 1
    with pytest.raises(ValueError, match="query must be one of"):
      make(query="nonsense")


def test_meta_ogd_takes_the_same_step_in_every_round(x64):
  learner = jaxbo.meta.meta_ogd(loss, INNER, jaxbo.itd(0.5, INNER), shift_score=SCORE)
  compare(learner, detect=NEVER, always=True, scales=(1.0, 1.0, 1.0))


def test_c_maml_equals_its_loop(x64):
  """Pairs of rounds; no step at a boundary; with modulation by the loss that is descended."""
  modulation = 2.0
  learner = jaxbo.meta.c_maml(
    loss, INNER, optax.sgd(0.5), drop_threshold=0.5, modulation=modulation, shift_score=SCORE
  )
  state = learner.init(jnp.zeros(2), stream=STREAM, key=1)
  _, (batch, metas, phis, info) = play(learner, state)
  means, theta, phi = np.mean(np.asarray(batch.train), axis=1), np.zeros(2), np.zeros(2)
  for t, mean in enumerate(means):
    np.testing.assert_allclose(metas[t], theta, rtol=0, atol=1e-7)
    fresh = mean + LEFT * (theta - mean)
    drop = 0.5 * np.sum((phi - mean) ** 2) - 0.5 * np.sum((fresh - mean) ** 2)
    assert info.detection.switch[t] == (t == 0 or drop > 0.5)
    if t and drop <= 0.5:
      miss = means[t - 1] + LEFT * (theta - means[t - 1]) - mean
      value = 0.5 * np.sum(miss**2)
      np.testing.assert_allclose(info.outer_loss[t], value, rtol=1e-6, atol=1e-8)
      theta = theta - 0.5 * LEFT * miss * -np.expm1(-modulation * value)
    phi = fresh
    np.testing.assert_allclose(phis[t], phi, rtol=0, atol=1e-7)
  assert 5 < np.sum(info.detection.switch) < 55


def test_modulation_of_losses_that_are_no_numbers():
  tx = jaxbo.modulate_by_loss(2.0)
  scale = lambda value: float(tx.update(jnp.float32(1.0), tx.init(0.0), value=value)[0])
  np.testing.assert_allclose(scale(0.3), 1 - np.exp(-0.6), rtol=1e-6)
  assert [scale(value) for value in (-1.0, 0.0, np.nan, np.inf)] == [0, 0, 1, 1]
  info = tx.update(jnp.float32(5.0), tx.init(0.0), value=0.3)[1].info
  np.testing.assert_allclose(info.modulation, 1 - np.exp(-0.6), rtol=1e-6)
  with pytest.raises(TypeError, match="modulate_by_loss: update must be given value="):
    tx.update(jnp.float32(1.0), tx.init(0.0))
  with pytest.raises(ValueError, match="modulation must be positive and finite, got 0"):
    jaxbo.modulate_by_loss(0.0)


def test_bgd_is_fine_tuning_with_another_inner_optimizer():
  """It finds the mean of the task and grows certain."""
  bgd = jaxbo.meta.bayesian_gradient_descent(1.0, 0.3, num_samples=20, num_examples=5)
  inner = jaxbo.inner_solver(first_of(loss), bgd, 1)
  learner = jaxbo.meta.fine_tuning(loss, inner, shift_score=SCORE)
  batch = (jnp.ones((5, 2)), jnp.ones((5, 2)))
  step, state = jax.jit(learner.step), learner.init(jnp.zeros(2), batch=batch)
  for _ in range(50):
    state, _ = step(state, batch)
  np.testing.assert_allclose(state.task.y, 1, atol=0.1)
  assert np.all(state.task.opt_state.deviations < 0.1)
  assert state.task.opt_state.bgd_count == 50


BAD = {
  "restart": ({"restart": "never"}, "restart must be one of 'switch', 'always', got 'never'"),
  "query": ({"query": "half"}, "query must be one of 'given', 'same', 'next', got 'half'"),
  "switch_score": ({"switch_score": "gap"}, "switch_score must be one of 'loss', 'drop', got"),
  "shift_score": ({"shift_score": "msp"}, "shift_score must be one of 'energy', 'entropy', 'max_"),
  "shift_model": ({"shift_model": "x"}, "shift_model must be one of 'adapted', 'meta', 'initial'"),
}


@cases("name", BAD)
def test_bad_options(name):
  options, message = BAD[name]
  with pytest.raises(ValueError, match=message):
    jaxbo.meta.online_meta_learner(loss, INNER, gated(), jaxbo.meta.oracle_detector(), **options)


def test_bad_arguments():
  oracle = jaxbo.meta.oracle_detector()
  make = functools.partial(jaxbo.meta.online_meta_learner, loss, INNER)
  with pytest.raises(ValueError, match="init must be given either a stream or a batch"):
    make(gated(), oracle).init(jnp.zeros(2))
  with pytest.raises(ValueError, match="num_rounds must be at least 1, got 0"):
    threshold_learner().run(with_thresholds(0.0, 0.0), STREAM, 0)
  without = make(None, oracle).init(jnp.zeros(2), batch=(jnp.zeros((5, 2)), jnp.zeros((5, 2))))
  with pytest.raises(ValueError, match="run needs a state from init"):
    make(None, oracle).run(without, STREAM, 3)
  with pytest.raises(TypeError, match=r"metric must be a function metric\(logits, batch\)"):
    make(gated(), oracle, metric=lambda logits: logits)
  with pytest.raises(TypeError, match=r"start must be a function start\(x\)"):
    make(gated(), oracle, start=lambda: 0)
  headless = make(optax.sgd(0.1), oracle, shift_score=SCORE)
  state, batch = headless.init(jnp.zeros(2), stream=STREAM), STREAM.step(STREAM.init(0))[1]
  with pytest.raises(ValueError, match="outer must begin with a response"):
    headless.step(state, batch)
  scalar = jaxbo.meta.online_meta_learner(first_of(loss), INNER, gated(), oracle, shift_score=SCORE)
  with pytest.raises(TypeError, match=r"outer_loss must return \(scalar, aux\)"):
    scalar.step(state, batch)


def test_a_detector_must_be_one(as_users_run):
  with pytest.raises(TypeError, match="detector must be a Detector"):
    jaxbo.meta.online_meta_learner(loss, INNER, gated(), 0.5)  # pyright: ignore
