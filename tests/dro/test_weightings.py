"""Robust weightings: golden numbers, a generic solver, limits and hard numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbo
from tests.dro import families
from tests.dro.families import weigh

pytestmark = pytest.mark.slow  # All together, not each.

LOSSES = [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(
  ("name", "parameters", "value", "weights"),
  [
    ("kl", [1.0], 3.053895337441305, [0.0320586033, 0.0871443187, 0.2368828181, 0.6439142599]),
    ("kl", [0.4], 3.479724288664711, None),
    ("kl", [10.0], 2.5624116833527233, None),
    ("kl", [0.1], 3.8613751039840483, None),
    ("tilted", [-1.0], 1.9461046625587, [0.6439142599, 0.2368828181, 0.0871443187, 0.0320586033]),
    ("kl_ball", [0.1], 2.994274122, [0.120924, 0.183002, 0.276949, 0.419125]),
    ("kl_ball", [0.5], 3.551022019, None),
    ("cvar", [0.25], 4.0, [0, 0, 0, 1]),
    ("cvar", [0.1], 4.0, [0, 0, 0, 1]),
    ("cvar", [0.5], 3.5, [0, 0, 0.5, 0.5]),
    ("cvar", [0.6], 3.25, [0, 0.1666667, 0.4166667, 0.4166667]),
    ("cvar", [0.75], 3.0, None),
    ("cvar", [1.0], 2.5, [0.25, 0.25, 0.25, 0.25]),
    ("kl_cvar", [0.5, 1.0], 3.010655802, [0.0450152866, 0.1223642355, 0.3326204779, 0.5]),
    ("kl_cvar", [0.5, 0.1], 3.430687552, None),
    ("kl_cvar", [0.5, 10.0], 2.562411683, None),
    ("kl_cvar", [0.75, 0.5], 2.877313632, None),
    ("chi_square", [0.5], 3.375, [0, 0, 0.25, 0.75]),
    ("chi_square", [1.0], 3.0833333333, [0, 1 / 12, 1 / 3, 7 / 12]),
    ("chi_square", [2.0], 2.8125, [0.0625, 0.1875, 0.3125, 0.4375]),
    ("chi_square", [10.0], 2.5625, None),
    ("chi_square_ball", [0.02], 2.7236067978, None),
    ("chi_square_ball", [0.1], 3.0, [0.1, 0.2, 0.3, 0.4]),
    ("chi_square_ball", [0.5], 3.5773502692, [0, 0.0446582, 0.3333333, 0.6220085]),
    ("chi_square_ball", [1.0], 3.8535533906, None),
    ("cressie_read_ball", [0.1, 2.0], 3.0, [0.1, 0.2, 0.3, 0.4]),
    ("cressie_read_ball", [0.5, 2.0], 3.5773502692, [0, 0.0446582, 0.3333333, 0.6220085]),
    ("total_variation_ball", [0.25], 3.25, [0, 0.25, 0.25, 0.5]),
    ("total_variation_ball", [0.4], 3.55, [0, 0.1, 0.25, 0.65]),
    ("total_variation_ball", [1.0], 4.0, [0, 0, 0, 1]),
  ],
)
def test_golden_numbers(name, parameters, value, weights):
  result, info = weigh(name, LOSSES, *parameters)
  np.testing.assert_allclose(info.objective, value, atol=1e-8)
  if weights is not None:
    np.testing.assert_allclose(result, weights, atol=1e-6)


@pytest.mark.parametrize("power", [1.01, 2.0, 3.0])
def test_single_precision_resolves_the_edge_of_a_cressie_read_ball(power):
  losses = np.random.default_rng(0).normal(size=8).astype(np.float32)
  for radius in (0.01, 0.3, 1.0):
    weighting = jaxbo.dro.cressie_read_ball(radius, power)
    weights, _, info = weighting.weigh(jnp.asarray(losses), ())
    expected, exact = weigh("cressie_read_ball", losses, radius, power)
    np.testing.assert_allclose(weights, expected, atol=1e-3)
    np.testing.assert_allclose(info.objective, exact.objective, atol=1e-3)


@pytest.mark.parametrize("power", [1.01, 1.5, 3.0])
def test_a_small_cressie_read_ball_is_used_up(power):
  """Where densities are so near 1 that their divergence is found by its series."""
  weights, _ = weigh("cressie_read_ball", [0.0, 0.1, 0.2, 5.0], 5e-7, power)
  divergence = families.cressie_read_divergence(weights, np.full(4, 0.25), power)
  np.testing.assert_allclose(divergence, 5e-7, rtol=1e-6)


def test_golden_diagnostics():
  _, info = weigh("kl", LOSSES, 1.0)
  np.testing.assert_allclose(info.effective_sample_size, 2.08611, atol=1e-5)
  np.testing.assert_allclose(info.kl, 0.438757, atol=1e-6)
  np.testing.assert_allclose(info.surrogate_gap, 1.0 * info.kl, rtol=1e-12)
  np.testing.assert_allclose(info.entropy, np.log(4) - info.kl, rtol=1e-12)
  np.testing.assert_allclose(info.max_weight, 0.6439142599, atol=1e-9)
  np.testing.assert_allclose(info.weight_sum, 1, rtol=1e-12)
  assert info.temperature == 1.0
  for radius, temperature in ((0.1, 2.413506), (0.5, 0.908693)):
    _, info = weigh("kl_ball", LOSSES, radius)
    np.testing.assert_allclose(info.temperature, temperature, atol=1e-6)
    np.testing.assert_allclose(info.kl, radius, rtol=1e-9)
    assert info.surrogate_gap == 0


def random_parameters(name, rng):
  level, scale = rng.uniform(0.05, 1.0), np.exp(rng.uniform(-1.5, 1.5))
  if name == "tilted":
    return [rng.choice([-1, 1]) * scale]
  others = {"cressie_read_ball": [scale, 1 + min(scale, 2.0)]}
  others |= {"cvar": [level], "total_variation_ball": [level], "kl_cvar": [level, scale]}
  return others.get(name, [scale])


@pytest.mark.parametrize("name", families.MAKE)
@pytest.mark.parametrize("n", [1, 2, 5, 50])
def test_weights_are_those_of_a_generic_solver(name, n):
  rng = np.random.default_rng(n)
  for with_prior in (False, True) if n < 50 else (True,):
    losses, parameters = rng.normal(size=n) * 2, random_parameters(name, rng)
    prior = rng.uniform(0.2, 1.0, size=n) if with_prior else None
    weights, info = weigh(name, losses, *parameters, prior=prior)
    expected = families.optimum(name, losses, *parameters, prior=prior)
    np.testing.assert_allclose(info.objective, expected, atol=2e-6)
    # What is claimed is attained: the weights are feasible, and their value is the objective.
    p = np.full(n, 1 / n) if prior is None else prior / prior.sum()
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-12)
    assert weights.min() >= 0
    value = weights @ losses
    if name in ("kl", "tilted", "kl_cvar"):
      temperature = 1 / parameters[0] if name == "tilted" else parameters[-1]
      value -= temperature * families.kl_divergence(weights, p)
    elif name == "chi_square":
      value -= parameters[0] * families.chi_square_divergence(weights, p)
    elif name == "kl_ball":
      assert families.kl_divergence(weights, p) <= parameters[0] + 1e-9
    elif name == "chi_square_ball":
      assert families.chi_square_divergence(weights, p) <= parameters[0] + 1e-9
    elif name == "cressie_read_ball":
      assert families.cressie_read_divergence(weights, p, parameters[1]) <= parameters[0] + 1e-9
    elif name == "total_variation_ball":
      assert 0.5 * np.abs(weights - p).sum() <= parameters[0] + 1e-12
    if "cvar" in name:
      assert np.all(weights <= p / parameters[0] + 1e-12)
    np.testing.assert_allclose(value, info.objective, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
  ("name", "low", "high"),
  [
    ("kl", [1e-30], [1e9]),
    ("kl_cvar", [1e-3, 1e-30], [1.0, 1.0]),
    ("kl_cvar", [0.5, 1e-30], [0.5, 1e9]),
    ("kl_ball", [5.0], [1e-13]),
    ("cvar", [1e-3], [1.0]),
    ("chi_square", [1e-30], [1e9]),
    ("chi_square_ball", [20.0], [1e-15]),
    ("cressie_read_ball", [20.0, 1.5], [1e-15, 3.0]),
    ("total_variation_ball", [1.0], [1e-9]),
    ("tilted", [1e30], [0.0]),
  ],
)
def test_limits_are_the_maximum_shared_by_ties_and_the_mean(name, low, high):
  losses = [2.0, 1.0, 2.0, -3.0]
  half_is_cap = name == "kl_cvar" and low[0] == 0.5
  weights, info = weigh(name, losses, *low)
  np.testing.assert_allclose(weights, [0.5, 0, 0.5, 0], atol=1e-12)
  np.testing.assert_allclose(info.objective, 2.0, atol=1e-12)
  weights, info = weigh(name, losses, *high)
  np.testing.assert_allclose(weights, 0.25, atol=1e-6)
  np.testing.assert_allclose(info.objective, 0.5, atol=1e-6)
  if not half_is_cap:
    weights, _ = weigh(name, [7.0, 7.0, 7.0], *low)
    np.testing.assert_allclose(weights, 1 / 3, rtol=1e-9)


def test_a_steep_negative_tilt_is_the_minimum_shared_by_ties():
  weights, info = weigh("tilted", [2.0, 1.0, 3.0, 1.0], -1e30)
  np.testing.assert_allclose(weights, [0, 0.5, 0, 0.5], atol=1e-12)
  np.testing.assert_allclose(info.objective, 1.0, atol=1e-12)


def test_a_low_temperature_turns_capped_weights_into_cvar():
  for level in (0.3, 0.6, 0.75):
    expected, _ = weigh("cvar", LOSSES, level)
    weights, info = weigh("kl_cvar", LOSSES, level, 1e-30)
    np.testing.assert_allclose(weights, expected, atol=1e-12)
    np.testing.assert_allclose(info.objective, expected @ LOSSES, atol=1e-9)


def test_a_cap_that_does_not_bind_leaves_exponential_weights():
  expected, _ = weigh("kl", LOSSES, 0.7)
  np.testing.assert_allclose(weigh("kl_cvar", LOSSES, 0.25, 0.7)[0], expected, rtol=1e-12)


def test_value_falls_and_evenness_grows_with_the_temperature():
  infos = [weigh("kl", LOSSES, t)[1] for t in (0.1, 0.5, 1.0, 3.0, 10.0)]
  for field, sign in (("objective", -1), ("effective_sample_size", 1), ("entropy", 1)):
    steps = np.diff([getattr(info, field) for info in infos])
    assert np.all(sign * steps > 0), field
  assert all(2.5 <= info.objective <= 4 for info in infos)


@pytest.mark.parametrize("name", families.MAKE)
def test_duplicates_are_mass_of_the_prior(name):
  """An example twice is an example of twice the prior, whose weight they share."""
  rng = np.random.default_rng(3)
  parameters, losses = random_parameters(name, rng), rng.normal(size=4)
  twice, info = weigh(name, [*losses, losses[1]], *parameters)
  by_prior, prior_info = weigh(name, losses, *parameters, prior=[1, 2, 1, 1])
  np.testing.assert_allclose(twice[1], twice[4], rtol=1e-9)
  np.testing.assert_allclose(twice[:4] + np.array([0, twice[4], 0, 0]), by_prior, atol=1e-9)
  np.testing.assert_allclose(info.objective, prior_info.objective, rtol=1e-9)
  np.testing.assert_allclose(info.kl, prior_info.kl, atol=1e-9)


@pytest.mark.parametrize("fraction", [0.3, 0.5215, 0.9, 1.0])
def test_a_target_for_the_effective_sample_size_is_met(fraction):
  weighting = jaxbo.dro.kl(jaxbo.dro.target_ess(fraction))
  weights, _, info = jax.jit(weighting.weigh)(jnp.array(LOSSES), weighting.init())
  np.testing.assert_allclose(info.effective_sample_size, 4 * fraction, rtol=1e-4)
  np.testing.assert_allclose(weights, weigh("kl", LOSSES, info.temperature)[0], rtol=1e-4)


def test_a_target_below_the_share_of_ties_is_their_share():
  weighting = jaxbo.dro.kl(jaxbo.dro.target_ess(0.1))
  weights, _, _ = weighting.weigh(jnp.array([3.0, 1.0, 3.0, 2.0]), weighting.init())
  np.testing.assert_allclose(weights, [0.5, 0, 0.5, 0], atol=1e-6)


def test_single_precision_neither_overflows_nor_cancels():
  losses = jnp.array(LOSSES, jnp.float32)
  weigh_kl = jax.jit(lambda losses, t: jaxbo.dro.kl(t).weigh(losses, jaxbo.dro.kl(1.0).init()))
  mean_and_half_variance = lambda t: 2.5 + 1.25 / (2 * t)
  for temperature, value in (
    (1e4, mean_and_half_variance(1e4)),  # the textbook formula gives 2.49982
    (1e8, 2.5),  # and here 0
    (100.0, 2.50624991),
    (1e-4, 4.0 - 1e-4 * np.log(4)),
    (1e-30, 4.0),
    (3e38, 2.5),  # whose reciprocal is below the smallest normal number
  ):
    weights, _, info = weigh_kl(losses, jnp.float32(temperature))
    np.testing.assert_allclose(info.objective, value, rtol=3e-7)
    np.testing.assert_allclose(np.sum(weights), 1, rtol=1e-6)
    assert info.surrogate_gap >= -5e-7
  weights, _, info = weigh_kl(1e4 * losses, jnp.float32(1.0))
  np.testing.assert_allclose(weights, [0, 0, 0, 1])
  np.testing.assert_allclose(info.objective, 4e4 - np.log(4), rtol=1e-6)
  # Half precision is computed in single.
  weights, _, _ = weigh_kl(losses.astype(jnp.bfloat16), jnp.float32(1.0))
  assert weights.dtype == jnp.float32
  np.testing.assert_allclose(weights, weigh("kl", LOSSES, 1.0)[0], atol=1e-6)


def test_capped_weights_at_a_high_temperature_have_the_value_of_the_mean():
  """Rounding of the weights, times the temperature, would be -1e15."""
  for level in (0.5, 1.0):
    weighting = jaxbo.dro.kl_cvar(level, 1e30)
    info = weighting.weigh(jnp.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]), weighting.init())[2]
    np.testing.assert_allclose(info.objective, 4.0, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e20, 1e37])
def test_weights_of_a_chi_square_ball_are_the_same_at_every_scale(scale):
  """Squares of these losses are beyond the range of float32."""
  losses = jnp.array([-4.0, 2.0, 3.0, 4.0])
  expected = weigh("chi_square_ball", losses, 0.3)[0]
  weights = jaxbo.dro.chi_square_ball(0.3).weigh(scale * losses, ())[0]
  np.testing.assert_allclose(weights, expected, atol=1e-6)


def test_a_schedule_counts_batches_and_bad_values_give_the_limit_or_the_prior():
  weighting = jaxbo.dro.kl(lambda count: jnp.array([100.0, 1.0, 0.0, -1.0, jnp.nan])[count])
  weigh_next = jax.jit(weighting.weigh)
  state, weights = weighting.init(), []
  for _ in range(5):
    w, state, _ = weigh_next(jnp.array([1.0, 2.0]), state)
    weights.append(w)
  sigmoid = lambda x: 1 / (1 + np.exp(-x))
  expected = [sigmoid(0.01), sigmoid(1.0), 1.0, 1.0, 0.5]
  np.testing.assert_allclose([w[1] for w in weights], expected, rtol=1e-6)
  # An empty batch is no batch.
  _, after, _ = weigh_next(jnp.array([1.0, jnp.nan]), state, mask=jnp.array([False, True]))
  assert after.temperature_count == state.temperature_count == 5
