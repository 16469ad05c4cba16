"""Losses and weights of the competitors are their published formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import log_softmax, logsumexp, softmax

import jaxbo

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
CLEAN, MOVED = RNG.normal(size=(2, 6, 4)) * 3
LABELS = np.array([0, 1, 2, 3, 0, 1])
ROWS = np.arange(6)


def kl(a, b):
  return np.sum(softmax(a, 1) * (log_softmax(a, 1) - log_softmax(b, 1)), axis=1)


def others(values):
  values = values.copy()
  values[ROWS, LABELS] = -np.inf
  return values


def cross_entropy(logits):
  return logsumexp(logits, axis=1) - logits[ROWS, LABELS]


def close(a, b, rtol=2e-5):
  np.testing.assert_allclose(np.asarray(a), b, rtol=rtol, atol=1e-6)


def test_losses_are_their_formulas():
  weights = np.linspace(0, 2, 6)

  @jax.jit
  def everything(clean, moved, labels):
    return (
      jaxbo.adversarial.cross_entropy_loss(clean, labels),
      jaxbo.adversarial.margin_loss(clean, labels),
      jaxbo.adversarial.probabilistic_margin(clean, labels),
      jaxbo.adversarial.trades_loss(clean, moved, labels),
      jaxbo.adversarial.trades_loss(clean, moved, labels, 0.5, weights=weights),
      jaxbo.adversarial.mart_loss(clean, moved, labels),
    )

  entropy, margin, probabilistic, trades, weighted, mart = everything(CLEAN, MOVED, LABELS)
  close(entropy, cross_entropy(CLEAN))
  close(margin, others(CLEAN).max(axis=1) - CLEAN[ROWS, LABELS])
  p, q = softmax(CLEAN, 1), softmax(MOVED, 1)
  close(probabilistic, others(p).max(axis=1) - p[ROWS, LABELS])
  close(trades, cross_entropy(CLEAN) + 6 * kl(CLEAN, MOVED))
  close(weighted, cross_entropy(CLEAN) + 0.5 * weights * kl(CLEAN, MOVED))
  expected = cross_entropy(MOVED) - np.log(1 - others(q).max(axis=1))
  close(mart, expected + 5 * kl(CLEAN, MOVED) * (1 - p[ROWS, LABELS]))


def test_losses_and_their_gradients_are_finite_where_logits_are_extreme():
  """1 - p is zero in float32 here, from whichever side."""
  logits = jnp.array([[200.0, 0.0, -200.0], [-200.0, 200.0, 0.0]])
  labels = jnp.array([0, 0])

  @jax.jit
  def slopes_of(clean, moved):
    return jax.value_and_grad(total, (0, 1))(clean, moved)

  def total(clean, moved):
    return jnp.sum(
      jaxbo.adversarial.mart_loss(clean, moved, labels)
      + jaxbo.adversarial.trades_loss(clean, moved, labels)
    )

  for moved in (logits, logits[::-1]):
    value, slopes = slopes_of(logits, moved)
    assert np.isfinite(value)
    assert all(np.isfinite(s).all() for s in slopes)
  # -log(1 - p) of the second row is the gap of the two largest.
  boosted = jax.jit(lambda z: jaxbo.adversarial.mart_loss(z, z, labels, beta=0.0))(logits)
  close(boosted, [0.0, 400.0 + 200.0])


MASKED = np.array([[0.0, -np.inf, 1.0], [2.0, -np.inf, -1.0]])
MASKED_MOVED = np.array([[0.5, -np.inf, 0.7], [-1.0, -np.inf, 0.3]])


def test_a_masked_class_is_as_if_it_were_not_there():
  """Values and slopes, with the label among the two classes that are left."""

  def both(clean, moved, labels):
    trades = jaxbo.adversarial.trades_loss(clean, moved, labels)
    return trades, jaxbo.adversarial.mart_loss(clean, moved, labels)

  slopes_of = jax.jit(jax.jacrev(both, (0, 1)))
  few = [0, 2]
  for label in (0, 1):
    labels, there = np.full(2, 2 * label), np.full(2, label)
    losses = jax.jit(both)(MASKED, MASKED_MOVED, labels)
    close(losses, jax.jit(both)(MASKED[:, few], MASKED_MOVED[:, few], there))
    slopes = jax.tree.leaves(slopes_of(jnp.float32(MASKED), jnp.float32(MASKED_MOVED), labels))
    without = slopes_of(*(jnp.float32(z[:, few]) for z in (MASKED, MASKED_MOVED)), there)
    for slope, expected in zip(slopes, jax.tree.leaves(without), strict=True):
      close(slope[..., few], expected)
      assert not np.any(slope[..., 1])
  close(both(MASKED[:1], MASKED_MOVED[:1], np.array([0]))[0], [1.7316], rtol=1e-4)


def test_one_class_that_is_left_is_certain():
  """All others are masked: no loss, no slope, whichever class it is."""
  for label in range(3):
    logits = np.where(np.arange(3) == label, 1.0, -np.inf)[None].astype(np.float32)
    for loss in (jaxbo.adversarial.trades_loss, jaxbo.adversarial.mart_loss):
      total = lambda clean, moved, loss=loss, label=label: loss(clean, moved, np.array([label]))[0]
      value, slopes = jax.value_and_grad(total, (0, 1))(logits, logits)
      assert value == 0
      assert not np.any(slopes)


def test_divergence_is_infinite_where_only_the_second_masks_a_class_and_nan_stays_nan():
  loss = lambda clean, moved: jaxbo.adversarial.trades_loss(clean, moved, np.array([0]))
  unmasked = np.array([[0.0, 1.0, 1.0]], np.float32)
  assert loss(unmasked, np.array([[0.0, -np.inf, 1.0]]))[0] == np.inf
  assert np.isnan(loss(np.array([[0.0, np.nan, 1.0]]), unmasked)[0])
  assert np.isnan(loss(unmasked, np.array([[0.0, np.nan, 1.0]]))[0])


def test_losses_take_narrow_floats_and_any_integers():
  narrow = jnp.asarray(CLEAN, jnp.bfloat16)
  for dtype in (np.uint8, np.int8, np.int64):
    value = jax.jit(jaxbo.adversarial.cross_entropy_loss)(narrow, LABELS.astype(dtype))
    assert value.dtype == jnp.float32
    close(value, cross_entropy(np.asarray(narrow, np.float64)), rtol=1e-4)
  margin_loss = jax.jit(jaxbo.adversarial.margin_loss)
  assert np.isnan(margin_loss(CLEAN[:1], np.array([7])))[0]
  many = 50.0 * (np.arange(300) == 290)[None]
  close(margin_loss(many, np.array([34], np.uint8)), [50.0])


def test_errors_of_losses_name_the_argument():
  for loss in (jaxbo.adversarial.trades_loss, jaxbo.adversarial.mart_loss):
    with pytest.raises(ValueError, match="beta must be non-negative"):
      loss(CLEAN, MOVED, LABELS, beta=-1.0)
    with pytest.raises(ValueError, match="adversarial_logits must have the shape of clean_logits"):
      loss(CLEAN, MOVED[:, :2], LABELS)
  with pytest.raises(ValueError, match=r"weights must be \(6,\), got shape \(2,\)"):
    jaxbo.adversarial.trades_loss(CLEAN, MOVED, LABELS, weights=np.ones(2))
  for loss in (
    jaxbo.adversarial.cross_entropy_loss,
    jaxbo.adversarial.margin_loss,
    jaxbo.adversarial.probabilistic_margin,
  ):
    with pytest.raises(ValueError, match=r"logits must be \[batch, num_classes\] and labels"):
      loss(CLEAN[0], LABELS)
    with pytest.raises(TypeError, match="labels must be integers, got dtype float"):
      loss(CLEAN, LABELS + 0.5)


def weights(weighting, scores, state=None, **options):
  state = weighting.init() if state is None else state
  return weighting.weigh(jnp.asarray(scores, jnp.float32), state, **options)[:2]


def test_gairat_weights_are_their_formula():
  kappa, steps = np.array([0.0, 3, 5, 7, 10]), 10
  inside = 5 * (1 - 2 * kappa / steps)
  expected = {
    "tanh": (1 + np.tanh(-1 + inside)) / 2,
    "sigmoid": 1 / (1 + np.exp(1 - inside)),
    "discrete": (steps + 1 - kappa) / (steps + 1),
  }
  for shape, w in expected.items():
    close(weights(jaxbo.adversarial.gairat(steps, shape=shape), kappa)[0], w / w.sum(), rtol=1e-4)
  close(weights(jaxbo.adversarial.gairat(steps, np.inf), kappa)[0], np.full(5, 0.2))
  # An odd number of steps is not rounded; where all are hopeless they share.
  w = (1 + np.tanh(0.5 + 5 * (1 - 2 * kappa / 7))) / 2
  close(weights(jaxbo.adversarial.gairat(7, 0.5), kappa)[0], w / w.sum(), rtol=1e-4)
  close(weights(jaxbo.adversarial.gairat(10, -1e3), [10.0, 10.0])[0], [0.5, 0.5])


def test_mail_weights_are_their_formula():
  margins = np.array([-1.0, -0.2, 0.0, 0.7])
  for slope, bias in [(10.0, -0.5), (2.0, 0.0)]:
    w = 1 / (1 + np.exp(-slope * (margins + bias)))
    close(weights(jaxbo.adversarial.mail(slope, bias), margins)[0], w / w.sum(), rtol=1e-4)
  default = 1 / (1 + np.exp(-10 * (margins - 0.5)))
  close(weights(jaxbo.adversarial.mail(), margins)[0], default / default.sum(), rtol=1e-4)
  close(weights(jaxbo.adversarial.mail(slope=0.0), margins)[0], np.full(4, 0.25))
  close(weights(jaxbo.adversarial.mail(1e4), [-1.0, -1.0])[0], [0.5, 0.5])


def test_schedules_follow_the_number_of_batches():
  switch = lambda first, then: lambda count: jnp.where(count < 1, first, then)
  for weighting, plain in [
    (jaxbo.adversarial.gairat(4, switch(jnp.inf, -1.0)), jaxbo.adversarial.gairat(4)),
    (jaxbo.adversarial.mail(switch(0.0, 10.0)), jaxbo.adversarial.mail()),
  ]:
    scores = [0.0, 0.5, 1.0]
    first, state = weights(weighting, scores)
    close(first, np.full(3, 1 / 3))
    close(weights(weighting, scores, state)[0], weights(plain, scores)[0])


def test_masks_and_priors_count_for_weights_of_instances():
  for weighting in (jaxbo.adversarial.gairat(4), jaxbo.adversarial.mail()):
    scores = np.array([0.3, 0.1, 0.9, np.nan])
    mask, prior = jnp.array([True, False, True, True]), jnp.array([1.0, 5.0, 3.0, 1.0])
    w = weights(weighting, scores, mask=mask, prior=prior)[0]
    pair = weights(weighting, scores[[0, 2]])[0] * np.array([1.0, 3.0])
    close(w, [pair[0] / pair.sum(), 0, pair[1] / pair.sum(), 0])


def test_wat_weights_are_those_of_hedge():
  costs, labels = np.array([0.5, 2.0, 1.0]), np.array([0, 1, 2, 1])
  weighting = jaxbo.adversarial.wat(3, learning_rate=0.7)
  state = jaxbo.adversarial.WatState(jnp.asarray(costs, jnp.float32))
  shares = softmax(0.7 * np.append(costs, costs.mean()))
  expected = (shares[:3] + shares[3] / 3)[labels]
  w, after = weights(weighting, np.ones(4), state, groups=labels)
  close(w, expected / expected.sum())
  np.testing.assert_array_equal(after.class_costs, state.class_costs)
  # Untouched, all classes weigh the same.
  close(weights(weighting, np.ones(4), groups=labels)[0], np.full(4, 0.25))
  # Of more classes than labels of few bits can count too.
  narrow = labels.astype(np.int8)
  close(weights(jaxbo.adversarial.wat(200), np.ones(4), groups=narrow)[0], np.full(4, 0.25))


def test_costs_of_classes_are_set_in_the_state_of_the_optimizer():
  tx = optax.chain(jaxbo.reweight(jaxbo.adversarial.wat(2, 1.0)), optax.sgd(1.0))
  params, labels = jnp.float32(1.0), jnp.array([0, 1])
  state = tx.init(params)
  old = optax.tree.get(state, "class_costs")
  state = optax.tree.set(state, class_costs=old + jnp.array([0.0, 50.0]))
  grads = jaxbo.per_example_grad(lambda p, x: p * x)(params, jnp.array([1.0, 3.0]))
  updates, _ = tx.update(grads, state, params, groups=labels)
  assert float(updates) == pytest.approx(-3.0, rel=1e-4)


def test_scores_of_gairat_go_through_reweight():
  tx = jaxbo.reweight(jaxbo.adversarial.gairat(10))
  params, kappa = jnp.float32(1.0), jnp.array([0, 10], jnp.int32)
  grads = jaxbo.per_example_grad(lambda p, x: p * x)(params, jnp.array([1.0, 3.0]))
  gradient, _ = tx.update(grads, tx.init(params), params, scores=kappa.astype(jnp.float32))
  assert float(gradient) == pytest.approx(1.0, rel=1e-3)


def test_errors_of_weightings_name_the_argument():
  for make, message in [
    (lambda: jaxbo.adversarial.gairat(0), "num_steps must be at least 1"),
    (lambda: jaxbo.adversarial.gairat(5, float("nan")), "shift must be a number or an infinity"),
    (
      lambda: jaxbo.adversarial.gairat(5, shape="relu"),
      "shape must be one of 'tanh', 'sigmoid', 'discrete'",
    ),
    (lambda: jaxbo.adversarial.mail(-1.0), "slope must be non-negative"),
    (lambda: jaxbo.adversarial.mail(1.0, np.inf), "bias must be finite"),
    (lambda: jaxbo.adversarial.wat(0), "num_classes must be at least 1"),
    (lambda: jaxbo.adversarial.wat(3, 0.0), "learning_rate must be positive"),
    (lambda: jaxbo.done(0.1, 0.0), "temperature must be positive"),
    (lambda: jaxbo.done(0.1, rate=0.0), "rate must be in"),
  ]:
    with pytest.raises(ValueError, match=message):
      make()
