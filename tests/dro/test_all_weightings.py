"""What holds for every weighting, all compiled together for batches of eight."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbo

pytestmark = pytest.mark.slow  # All together, not each.

N = 8
ROBUST = {  # convex in the losses, so that raising one never lowers its weight
  "kl": jaxbo.dro.kl(0.7),
  "kl_ball": jaxbo.dro.kl_ball(0.2),
  "cvar": jaxbo.dro.cvar(0.4),
  "kl_cvar": jaxbo.dro.kl_cvar(0.4, 0.5),
  "chi_square": jaxbo.dro.chi_square(0.8),
  "chi_square_ball": jaxbo.dro.chi_square_ball(0.3),
  "cressie_read_ball": jaxbo.dro.cressie_read_ball(0.3, 1.5),
  "total_variation_ball": jaxbo.dro.total_variation_ball(0.3),
  "tilted": jaxbo.dro.tilted(1.5),
  "top_k": jaxbo.dro.top_k(3),
}
ALL = ROBUST | {
  "uniform": jaxbo.dro.uniform(),
  "kl_target": jaxbo.dro.kl(jaxbo.dro.target_ess(0.6)),
  "tilted_down": jaxbo.dro.tilted(-1.5),
  "group": jaxbo.dro.group(3, 0.5, adjustment=1.0, group_sizes=[10, 20, 1]),
  "mid_rank": jaxbo.dro.mid_rank(0.3, 1),
  "doro": jaxbo.dro.doro(jaxbo.dro.kl(0.5), 0.25),
  "lin_upper": jaxbo.dro.lin_upper(0.4),
  "quadratic": jaxbo.dro.quadratic(jaxbo.dro.target_ess(0.7), jaxbo.dro.quantile_range(0.1, 0.8)),
  "extremes": jaxbo.dro.extremes(1.0, jaxbo.dro.running_range(0.3)),
  "compositional": jaxbo.dro.compositional(jaxbo.dro.kl(0.7), 0.2),
}


@jax.jit
def compiled(losses, mask, prior, groups):
  results = {}
  for name, weighting in ALL.items():
    results[name] = weighting.weigh(losses, weighting.init(), mask=mask, prior=prior, groups=groups)
  return results


def weigh(losses, mask=None, prior=None, groups=None):
  """``{name: (weights, state, info)}`` as NumPy."""
  mask = np.ones(N, bool) if mask is None else np.asarray(mask)
  prior = np.ones(N, np.float32) if prior is None else np.asarray(prior, np.float32)
  groups = np.zeros(N, np.int32) if groups is None else np.asarray(groups, np.int32)
  losses = np.asarray(losses, np.float32)
  return jax.tree.map(np.asarray, compiled(losses, mask, prior, groups))


few_losses = st.lists(st.floats(-5, 5, width=32), min_size=N, max_size=N)
settings = functools.partial(hypothesis.settings, derandomize=True, deadline=None, database=None)


@settings(max_examples=60)
@hypothesis.given(
  few_losses,
  st.lists(st.booleans(), min_size=N, max_size=N),
  st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=N, max_size=N),
)
def test_weights_are_a_distribution_on_what_counts(losses, mask, prior):
  for name, (weights, _, info) in weigh(losses, mask, prior).items():
    assert np.all(weights >= 0), name
    assert not np.any(weights[~np.array(mask)]), name
    np.testing.assert_allclose(weights.sum(), float(any(mask)), rtol=1e-5, err_msg=name)
    assert info.num_valid == sum(mask)
    assert all(np.all(np.isfinite(field)) for field in info), name
    assert info.kl >= -1e-6, name
    if name in ROBUST:
      assert info.surrogate_gap >= -1e-5, name


@settings(max_examples=40)
@hypothesis.given(few_losses, st.permutations(range(N)))
def test_a_permutation_permutes_the_weights(losses, order):
  order = np.array(order)
  groups = np.arange(N) % 3
  plain = weigh(losses, groups=groups)
  permuted = weigh(np.array(losses)[order], groups=groups[order])
  for name in ALL:
    np.testing.assert_allclose(
      permuted[name][0], plain[name][0][order], rtol=1e-3, atol=1e-5, err_msg=name
    )


@settings(max_examples=40)
@hypothesis.given(few_losses, st.integers(0, N - 1), st.floats(0, 3, width=32))
def test_raising_a_loss_raises_its_weight(losses, i, amount):
  raised = np.array(losses, np.float32)
  raised[i] += amount
  before, after = weigh(losses), weigh(raised)
  for name in ROBUST:
    assert after[name][0][i] >= before[name][0][i] - 1e-5, name
  assert after["tilted_down"][0][i] <= before["tilted_down"][0][i] + 1e-5
  # And so do harder groups.
  groups = np.arange(N) % 3
  of_group = lambda losses: weigh(losses, groups=groups)["group"][0][groups == groups[i]].sum()
  assert of_group(raised) >= of_group(losses) - 1e-5


@settings(max_examples=40)
@hypothesis.given(few_losses, st.integers(0, N - 1), st.integers(0, N - 1))
def test_equal_losses_get_equal_weights_and_larger_ones_larger(losses, i, j):
  losses = np.array(losses, np.float32)
  losses[i] = losses[j]
  for name, (weights, _, _) in weigh(losses).items():
    np.testing.assert_allclose(weights[i], weights[j], rtol=1e-4, atol=1e-6, err_msg=name)
    if name in ROBUST:
      assert np.all(np.diff(weights[np.argsort(losses)]) >= -1e-5), name


@pytest.mark.parametrize("value", [0.0, -3.0, 1e4, 1e-30])
def test_equal_losses_get_uniform_weights(value):
  for name, (weights, _, info) in weigh(np.full(N, value)).items():
    np.testing.assert_allclose(weights, 1 / N, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(info.objective, value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_single_example_gets_all():
  mask = np.arange(N) == 3
  for name, (weights, _, info) in weigh(np.linspace(-1, 2, N), mask).items():
    np.testing.assert_allclose(weights, mask, rtol=1e-6, err_msg=name)
    assert info.effective_sample_size == pytest.approx(1), name


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_losses_that_are_not_finite_are_excluded_and_counted(bad):
  losses = np.linspace(-1, 2, N)
  losses[[2, 5]] = bad
  keep = np.isfinite(losses)
  masked = weigh(np.where(keep, losses, 9.0), keep)
  for name, (weights, _, info) in weigh(losses).items():
    np.testing.assert_allclose(weights, masked[name][0], rtol=1e-6, err_msg=name)
    assert info.num_excluded == 2, name
    assert masked[name][2].num_excluded == 0, name
    assert info.num_valid == N - 2, name


@pytest.mark.parametrize("empty", ["masked", "bad", "prior"])
def test_where_nothing_counts_weights_are_zero_and_the_state_stays(empty):
  losses = np.full(N, np.nan) if empty == "bad" else np.linspace(-1, 2, N)
  mask = np.full(N, empty != "masked")
  prior = np.full(N, float(empty != "prior"))
  for name, (weights, state, info) in weigh(losses, mask, prior).items():
    assert not np.any(weights), name
    assert info.weight_sum == info.effective_sample_size == info.objective == 0, name
    assert all(np.all(np.isfinite(field)) for field in info), name
    jax.tree.map(np.testing.assert_array_equal, state, ALL[name].init())


def test_groups_out_of_range_and_bad_priors_are_excluded_under_jit():
  groups = np.array([0, 1, 2, 3, -1, 0, 1, 2])
  weights, _, info = weigh(np.ones(N), groups=groups)["group"]
  assert info.num_excluded == 2
  assert not np.any(weights[3:5])
  prior = np.where(np.arange(N) < 2, [np.nan, np.inf] * 4, 1.0)
  for name, (weights, _, info) in weigh(np.linspace(0, 1, N), prior=prior).items():
    assert info.num_excluded == 2, name
    assert not np.any(weights[:2]), name
  # Huge ones do not overflow, and a negative one counts as zero.
  for name, (weights, _, _) in weigh(np.linspace(0, 1, N), prior=np.full(N, 3e38)).items():
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-5, err_msg=name)
  assert weigh(np.ones(N), prior=np.linspace(-1, 6, N))["kl"][0][0] == 0


def test_shifts_and_scales():
  losses = np.array([0.3, -1.0, 2.0, 0.5, 0.0, 1.0, -2.0, 1.5])
  plain, shifted, doubled = weigh(losses), weigh(losses + 4.0), weigh(2 * losses)
  for name in ALL:
    np.testing.assert_allclose(shifted[name][0], plain[name][0], atol=1e-5, err_msg=name)
  scale_free = (
    "kl_target kl_ball cvar chi_square_ball cressie_read_ball total_variation_ball top_k mid_rank "
    "lin_upper quadratic extremes uniform"
  )
  for name in scale_free.split():
    np.testing.assert_allclose(doubled[name][0], plain[name][0], atol=1e-5, err_msg=name)
  # Twice the losses at twice the temperature.
  weighting = jaxbo.dro.kl(1.4)
  weights, _, info = weighting.weigh(jnp.asarray(2 * losses, jnp.float32), weighting.init())
  np.testing.assert_allclose(weights, plain["kl"][0], rtol=1e-5)
  np.testing.assert_allclose(info.objective, 2 * plain["kl"][2].objective, rtol=1e-5)


def test_weights_are_constants_unless_asked_otherwise():
  """Test 5 of the specification: what goes wrong if they are differentiated."""
  losses, temperature = jnp.array([1.0, 2.0, 3.0, 4.0]), 0.7
  weighting = jaxbo.dro.kl(temperature)
  weigh = lambda losses, **options: weighting.weigh(losses, weighting.init(), **options)[0]
  surrogate = lambda losses, **options: jnp.sum(weigh(losses, **options) * losses)
  weights = np.asarray(weigh(losses))
  exact = jax.grad(lambda losses: temperature * jnp.log(jnp.mean(jnp.exp(losses / temperature))))
  np.testing.assert_allclose(jax.grad(surrogate)(losses), weights, rtol=1e-6)
  np.testing.assert_allclose(exact(losses), weights, rtol=1e-5)
  wrong = jax.grad(lambda losses: surrogate(losses, stop_gradient=False))(losses)
  expected = weights * (1 + (losses - weights @ losses) / temperature)
  np.testing.assert_allclose(wrong, expected, rtol=1e-4)
  assert np.max(np.abs(wrong - weights)) > 0.1


def test_weightings_vmap():
  losses = np.random.default_rng(0).normal(size=(3, N)).astype(np.float32)
  for name in ("kl", "cvar", "chi_square_ball"):
    weighting = ALL[name]
    weights = jax.vmap(lambda row, w=weighting: w.weigh(row, w.init())[0])(losses)
    for row, of_row in zip(losses, weights, strict=True):
      np.testing.assert_allclose(of_row, weigh(row)[name][0], rtol=1e-5, atol=1e-6)
