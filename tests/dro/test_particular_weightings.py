"""What is particular to the rank-based, loss-based, group and compositional weightings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbo

pytestmark = pytest.mark.slow


def weigh(weighting, losses, state=None, **options):
  state = weighting.init() if state is None else state
  return weighting.weigh(jnp.asarray(losses, jnp.float32), state, **options)


EIGHT = [1, 1.5, 2, 2.5, 3, 3.5, 4, 5]


@pytest.mark.parametrize(
  ("weighting", "expected", "ess"),
  [
    (jaxbo.dro.lin_upper(1.0), [0.472733, 0.607001, 0.779405, 1.000776] + [1.285021] * 4, 7.2677),
    (jaxbo.dro.lin_upper(0.4), [0.12985, 0.242592, 0.453222, 0.846731] + [1.581901] * 4, 5.8141),
    (
      jaxbo.dro.quadratic(1.0),
      [0.512548, 0.79385, 1.085064, 1.308837, 1.39325, 1.308837, 1.085064, 0.512548],
      None,
    ),
    (
      jaxbo.dro.extremes(1.0),
      [1.508161, 1.174557, 0.914746, 0.712405, 0.554821, 0.712405, 0.914746, 1.508161],
      None,
    ),
  ],
)
def test_golden_vector_of_the_strategies(weighting, expected, ess):
  weights, _, info = weigh(weighting, EIGHT)
  np.testing.assert_allclose(8 * weights, expected, atol=3e-6)
  if ess:
    np.testing.assert_allclose(info.effective_sample_size, ess, atol=1e-4)
  # Normalised by minimum and maximum, weights do not see an affine map.
  moved, _, _ = weigh(weighting, 3 * np.array(EIGHT) + 7)
  np.testing.assert_allclose(moved, weights, rtol=1e-4)


def test_ratio_bounds_of_lin_upper():
  for temperature, ratio in ((0.4, 12.18), (100.0, 1.01005)):
    weights, _, _ = weigh(jaxbo.dro.lin_upper(temperature), EIGHT)
    np.testing.assert_allclose(weights.max() / weights.min(), ratio, rtol=1e-3)
  # Above 1 / log 2 no weight exceeds 2 / n, even where a single example stands out.
  weights, _, _ = weigh(jaxbo.dro.lin_upper(1 / np.log(2)), [0.0] * 999 + [1.0])
  assert 1.9 < 1000 * weights.max() <= 2


@pytest.mark.parametrize(("temperature", "share"), [(1.0, 0.209), (0.4, 0.455)])
def test_enough_hard_examples_keep_all_weights_of_lin_upper_below_twice_uniform(temperature, share):
  for num_hard, holds in ((round(1000 * share) - 1, False), (round(1000 * share) + 1, True)):
    losses = [0.0] * (1000 - num_hard) + [1.0] * num_hard
    weights, _, _ = weigh(jaxbo.dro.lin_upper(temperature), losses)
    assert bool(1000 * weights.max() <= 2) is holds


def test_min_max_spreads_weights_even_where_losses_are_nearly_equal():
  weights, _, _ = weigh(jaxbo.dro.lin_upper(0.4), np.linspace(2.0, 2.0001, 8))
  np.testing.assert_allclose(8 * weights[jnp.array([0, -1])], [0.124, 1.51], atol=5e-3)


def test_one_outlier_sets_the_scale_of_min_max_and_not_of_quantiles():
  losses = [1.0] * 7 + [10.0]
  for temperature, weight in ((1.0, 0.280), (0.4, 0.635)):
    weights, _, _ = weigh(jaxbo.dro.lin_upper(temperature), losses)
    np.testing.assert_allclose(weights[-1], weight, atol=1e-3)
  # Two values are both extreme.
  np.testing.assert_allclose(weigh(jaxbo.dro.quadratic(0.4), losses)[0], 1 / 8, rtol=1e-5)
  spread = [*np.linspace(0, 1, 9), 1000.0]
  weights, _, _ = weigh(jaxbo.dro.lin_upper(0.4, jaxbo.dro.quantile_range(0.0, 0.8)), spread)
  expected = np.exp(np.minimum(2 * np.array(spread) / 1.0, 1) / 0.4)
  np.testing.assert_allclose(weights, expected / expected.sum(), rtol=1e-4)


def test_a_running_range_averages_the_ends():
  weighting = jaxbo.dro.shaped(jaxbo.dro.tilted(1.0), lambda h: h, jaxbo.dro.running_range(0.25))
  _, state, _ = weigh(weighting, [0.0, 8.0])
  weights, state, _ = weigh(weighting, [4.0, 12.0, 2.0], state)  # the ends are 0.5 and 9
  h = np.clip(2 * (np.array([4.0, 12.0, 2.0]) - 0.5) / 8.5 - 1, -1, 1)
  np.testing.assert_allclose(weights, np.exp(h) / np.exp(h).sum(), rtol=1e-5)
  np.testing.assert_allclose(state[1].range_low, 0.5)
  np.testing.assert_allclose(state[1].range_high, 9.0)
  assert state[1].range_count == 2


def published_mid_rank(losses, fraction, band):
  capacity = int(fraction * len(losses))
  order = np.argsort(-np.array(losses))[band * capacity : (band + 1) * capacity]
  return np.isin(np.arange(len(losses)), order) / len(order)


def test_mid_rank_keeps_the_published_bands():
  losses = np.random.default_rng(0).normal(size=16)
  for fraction, band in ((0.125, 1), (0.125, 7), (1.0, 0)):
    weights, _, _ = weigh(jaxbo.dro.mid_rank(fraction, band), losses)
    expected = published_mid_rank(losses, fraction, band)
    np.testing.assert_allclose(weights, expected, atol=1e-6)


def test_a_band_narrower_than_an_example_and_ties_at_the_edges():
  # Mass 0.1 to 0.2 lies within the largest of four.
  np.testing.assert_allclose(weigh(jaxbo.dro.mid_rank(0.1, 1), [4.0, 1, 2, 3])[0], [1, 0, 0, 0])
  # 0.3 to 0.6: all of the second but what the first leaves, and a part of the third.
  weights, _, _ = weigh(jaxbo.dro.mid_rank(0.3, 1), [4.0, 3, 2, 1])
  np.testing.assert_allclose(weights, np.array([0, 0.2, 0.1, 0]) / 0.3, atol=1e-6)
  # Of three that tie for two places, each gets a third.
  np.testing.assert_allclose(
    weigh(jaxbo.dro.mid_rank(0.5, 0), [5.0, 5, 5, 1])[0], [1 / 3, 1 / 3, 1 / 3, 0], rtol=1e-6
  )
  # The last band is what is left.
  np.testing.assert_allclose(
    weigh(jaxbo.dro.mid_rank(0.4, 2), [4.0, 3, 2, 1, 0])[0], [0, 0, 0, 0, 1], atol=1e-6
  )


def test_top_k_is_of_what_counts():
  mask = jnp.array([True, False, True, True, True])
  weights, _, _ = weigh(jaxbo.dro.top_k(2), [1.0, 9.0, 3.0, 2.0, 5.0], mask=mask)
  np.testing.assert_allclose(weights, [0, 0, 0.5, 0, 0.5], atol=1e-6)
  weights, _, _ = weigh(jaxbo.dro.top_k(9), [1.0, 9.0, 3.0, 2.0, 5.0], mask=mask)
  np.testing.assert_allclose(weights, mask / 4, rtol=1e-6)


def published_cvar_doro(losses, level, fraction):
  """Where the ranks are integers."""
  n = len(losses)
  first, last = round(fraction * n), round((fraction + level * (1 - fraction)) * n)
  order = np.argsort(-np.array(losses))[first:last]
  return np.isin(np.arange(n), order) / (level * (n - first))


def test_doro_with_cvar_and_chi_square():
  losses = np.random.default_rng(1).normal(size=20)
  weights, _, _ = weigh(jaxbo.dro.doro(jaxbo.dro.cvar(0.5), 0.2), losses)
  np.testing.assert_allclose(weights, published_cvar_doro(losses, 0.5, 0.2), atol=1e-6)
  # Level 0.2 is the radius 8, and sqrt(1 + 2 * 8) = 4.1231056.
  radius = 0.5 * (1 / 0.2 - 1) ** 2
  assert radius == 8
  _, _, info = weigh(jaxbo.dro.doro(jaxbo.dro.chi_square_ball(radius), 0.2), losses)
  kept = np.sort(losses)[:16]
  etas = np.linspace(kept.min() - 2, kept.max(), 4001)
  norms = np.mean(np.maximum(kept[None, :] - etas[:, None], 0) ** 2, axis=1) ** 0.5
  np.testing.assert_allclose(info.surrogate, (etas + 4.1231056 * norms).min(), atol=1e-4)


def test_rounding_leaves_nothing_of_an_outlier():
  """A share of 1e-8 of it would take all of an exponential weight."""
  for n, k in ((10, 4), (7, 5)):
    losses = np.r_[np.linspace(0, 1, n - k), np.linspace(1e4, 2e4, k)]
    weights, _, _ = weigh(jaxbo.dro.doro(jaxbo.dro.kl(0.1), k / n), losses)
    assert not np.any(weights[-k:])
    np.testing.assert_allclose(np.sum(weights), 1, rtol=1e-5)


def test_group_weights_climb_by_exponentiated_gradient():
  rng = np.random.default_rng(0)
  counts, adjustment, step_size = [100, 25, 4], 0.7, 0.3
  weighting = jaxbo.dro.group(3, step_size, adjustment=adjustment, group_sizes=counts)
  state, q = weighting.init(), np.ones(3) / 3
  step = jax.jit(lambda losses, groups, state: weighting.weigh(losses, state, groups=groups))
  for t in range(5):
    losses, groups = rng.normal(size=6) + 2, rng.integers(0, 3, size=6)
    if t == 2:
      groups = np.array([0, 0, 2, 2, 2, 0])  # One group is absent.
    weights, state, info = step(losses.astype(np.float32), groups, state)
    present = np.unique(groups)
    means = {g: losses[groups == g].mean() for g in present}
    for g in present:
      q[g] *= np.exp(step_size * (means[g] + adjustment / np.sqrt(counts[g])))
    q /= q.sum()
    share = q / q[present].sum()
    expected = [share[g] / np.sum(groups == g) for g in groups]
    np.testing.assert_allclose(weights, expected, rtol=1e-4)
    np.testing.assert_allclose(info.objective, sum(share[g] * means[g] for g in present), rtol=1e-4)
  np.testing.assert_allclose(np.exp(state.group_log_weights), q, rtol=1e-4)


def test_groups_pass_through_wrappers():
  weighting = jaxbo.dro.doro(jaxbo.dro.group(2, 1.0), 0.25)
  weights, _, _ = weigh(weighting, [0.0, 1.0, 2.0, 50.0], groups=jnp.array([0, 0, 1, 1]))
  q = np.exp([0.5, 2.0])
  q /= q.sum()
  np.testing.assert_allclose(weights, [q[0] / 2, q[0] / 2, q[1], 0], rtol=1e-5)


@pytest.mark.parametrize(
  ("u", "g", "expected"),
  [
    (np.log(3), np.log(np.mean(np.exp([1, 2, 5]))), np.log(7.9840165677)),
    (900, 1200, 1197.69741491),
  ],
)
def test_the_moving_average_is_of_the_normaliser_in_the_log_domain(u, g, expected, x64):
  weighting = jaxbo.dro.compositional(jaxbo.dro.kl(1.0), 0.1)
  one = lambda value, state: weighting.weigh(jnp.array([value]), state)
  _, state, _ = one(float(u), weighting.init(jnp.float64))
  weights, state, info = one(float(g), state)
  np.testing.assert_allclose(state.running_value, expected, rtol=1e-9)
  np.testing.assert_allclose(info.objective, expected, rtol=1e-9)
  np.testing.assert_allclose(weights, np.exp(g - expected), rtol=1e-7)
  np.testing.assert_allclose(info.weight_sum, weights[0], rtol=1e-12)


def test_the_moving_average_does_not_overflow_in_single_precision():
  weighting = jaxbo.dro.compositional(jaxbo.dro.kl(1.0), 0.1)
  for first, second in ((900.0, 1200.0), (1200.0, 900.0)):
    _, state, _ = weigh(weighting, [first])
    weights, state, _ = weigh(weighting, [second], state)
    np.testing.assert_allclose(state.running_value, 1200 + np.log(0.1 if second > first else 0.9))
    np.testing.assert_allclose(weights, 10.0 if second > first else 0.0, rtol=1e-3)


def test_the_running_value_is_in_units_of_the_loss():
  """So that a schedule may change the temperature, and a high one does not cancel."""
  losses = [1.0, 2.0, 3.0, 4.0]
  plain, _, _ = weigh(jaxbo.dro.kl(1.0), losses)
  whole = jaxbo.dro.compositional(jaxbo.dro.kl(1.0), 1.0)
  _, state, _ = weigh(whole, [9.0, 9.0, 9.0, 9.0])
  np.testing.assert_allclose(weigh(whole, losses, state)[0], plain, rtol=1e-6)  # rate 1: no memory
  hot = jaxbo.dro.compositional(jaxbo.dro.kl(1e8), 0.25)
  _, state, _ = weigh(hot, losses)
  weights, state, _ = weigh(hot, [5.0, 6.0, 7.0, 8.0], state)
  np.testing.assert_allclose(state.running_value, 0.75 * 2.5 + 0.25 * 6.5, rtol=1e-6)
  np.testing.assert_allclose(weights, 0.25, rtol=1e-6)
  # Tilts of both signs, and none.
  for t in (-0.7, 0.0):
    tilted = jaxbo.dro.compositional(jaxbo.dro.tilted(t), 0.25)
    _, state, _ = weigh(tilted, losses)
    weights, state, _ = weigh(tilted, [5.0, 6.0, 7.0, 8.0], state)
    old, new = np.array(losses), np.array([5.0, 6.0, 7.0, 8.0])
    u = 0.75 * np.mean(np.exp(t * old)) + 0.25 * np.mean(np.exp(t * new))
    np.testing.assert_allclose(weights, np.exp(t * new) / u / 4, rtol=1e-5)
    expected = np.log(u) / t if t else 0.75 * 2.5 + 0.25 * 6.5
    np.testing.assert_allclose(state.running_value, expected, rtol=1e-5)


def test_every_schedule_counts_batches():
  """The second batch of 1 / (1 + count) is that of the number 1/2."""
  makers = [
    lambda value: jaxbo.dro.kl_cvar(0.3, value),
    jaxbo.dro.chi_square,
    jaxbo.dro.tilted,
    lambda value: jaxbo.dro.compositional(jaxbo.dro.kl(1.0), value),
  ]

  @jax.jit
  def second_weights(losses):
    results = []
    for weighting in (make(v) for make in makers for v in (lambda count: 1 / (1.0 + count), 0.5)):
      _, state, _ = weigh(weighting, losses)
      results.append(weigh(weighting, losses + 4, state)[0])
    return results

  weights = second_weights(jnp.array([1.0, 2.0, 3.0, 4.0]))
  for found, expected in zip(weights[::2], weights[1::2], strict=True):
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_target_for_capped_weights_is_met_with_the_cap():
  weighting = jaxbo.dro.kl_cvar(0.5, jaxbo.dro.target_ess(0.6))
  weights, _, info = weigh(weighting, [1.0, 2.0, 3.0, 4.0])
  np.testing.assert_allclose(info.effective_sample_size, 0.6 * 4, rtol=1e-4)
  np.testing.assert_allclose(weights[-1], 0.5, rtol=1e-5)


def test_diagnostics_are_of_the_weights_divided_by_their_sum():
  weighting = jaxbo.dro.compositional(jaxbo.dro.kl(1.0), 0.1)
  _, state, _ = weigh(weighting, [0.0, 0.0, 0.0])
  weights, _, info = weigh(weighting, [3.0, 4.0, 5.0], state)
  assert weights.sum() > 2
  w = np.asarray(weights / weights.sum(), float)
  expected = (1 / np.sum(w**2), np.sum(w * np.log(3 * w)), -np.sum(w * np.log(w)), w.max())
  np.testing.assert_allclose(info[:4], expected, rtol=1e-5)
  np.testing.assert_allclose(info.surrogate, w @ [3.0, 4.0, 5.0], rtol=1e-5)
