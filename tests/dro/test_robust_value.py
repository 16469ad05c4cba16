"""Robust values have the right first and second derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbo
from tests.dro import families

pytestmark = pytest.mark.slow  # All together, not each.

PARAMETERS = {
  "kl": [0.6],
  "kl_ball": [0.3],
  "cvar": [0.5],
  "kl_cvar": [0.3, 0.4],
  "chi_square": [1.2],
  "chi_square_ball": [0.3],
  "cressie_read_ball": [0.3, 1.5],
  "total_variation_ball": [0.3],
  "tilted": [-0.8],
}
LOSSES = np.array([0.3, 1.4, -0.7, 2.0, 0.9])
DIRECTION = np.array([1.0, -0.5, 0.3, 0.8, -1.2])


@pytest.mark.parametrize("name", PARAMETERS)
def test_first_and_second_derivatives_are_the_weights_and_theirs(name, x64):
  weighting = families.MAKE[name](*PARAMETERS[name])
  mask, losses = jnp.arange(6) < 5, jnp.asarray([*LOSSES, jnp.nan])
  direction = jnp.asarray([*DIRECTION, 0.0])
  value = lambda losses: jaxbo.dro.robust_value(losses, weighting, mask=mask)
  gradient = jax.grad(value)

  @jax.jit
  def derivatives(losses):
    return value(losses), *jax.jvp(gradient, (losses,), (direction,))

  result, weights, second = derivatives(losses)
  expected, info = families.weigh(name, LOSSES, *PARAMETERS[name])
  np.testing.assert_allclose(result, info.objective, rtol=1e-12)
  np.testing.assert_allclose(weights, [*expected, 0], atol=1e-12)
  eps = 1e-5
  ahead, behind = (derivatives(losses + s * eps * direction) for s in (1, -1))
  difference = (ahead[0] - behind[0]) / (2 * eps)
  np.testing.assert_allclose(difference, expected @ DIRECTION, atol=1e-8)
  np.testing.assert_allclose((ahead[1] - behind[1]) / (2 * eps), second, atol=1e-7)
  if name in ("cvar", "total_variation_ball"):
    assert not np.any(second)
  else:
    assert np.max(np.abs(second)) > 0.01


@pytest.mark.parametrize("name", PARAMETERS)
def test_derivatives_by_parameters_of_the_weighting(name, x64):
  """Of the value, and of its gradient, against finite differences."""
  parameters = [jnp.float64(parameter) for parameter in PARAMETERS[name]]
  losses = jnp.asarray([*LOSSES, jnp.nan])
  value = lambda losses, *p: jaxbo.dro.robust_value(losses, families.MAKE[name](*p))

  @jax.jit
  def derivatives(*parameters):
    all_of_them = tuple(range(1 + len(parameters)))
    grads = jax.grad(value, all_of_them)(losses, *parameters)
    mixed = jax.jacfwd(jax.grad(value), all_of_them[1:])(losses, *parameters)
    return value(losses, *parameters), grads[0], grads[1:], mixed

  _, _, first, mixed = derivatives(*parameters)
  for i in range(len(parameters)):
    moved = lambda eps, i=i: derivatives(*(p + eps * (j == i) for j, p in enumerate(parameters)))
    ahead, behind = moved(1e-5), moved(-1e-5)
    np.testing.assert_allclose(first[i], (ahead[0] - behind[0]) / 2e-5, atol=1e-8)
    np.testing.assert_allclose(mixed[i], (ahead[1] - behind[1]) / 2e-5, atol=1e-7)
    assert abs(first[i]) > 0.02


def test_a_traced_parameter_that_is_not_differentiated_changes_nothing():
  """Its tangent is zero, though the value's slope in it is infinite: the root of a radius."""

  @jax.jit
  def gradient(losses, radius):
    return jax.grad(lambda v: jaxbo.dro.robust_value(v, jaxbo.dro.chi_square_ball(radius)))(losses)

  losses = jnp.array([1.0, 2.0, 4.0])
  expected = jaxbo.dro.chi_square_ball(1e-12).weigh(losses, ())[0]
  np.testing.assert_array_equal(gradient(losses, jnp.float32(1e-12)), expected)


@pytest.mark.parametrize(
  ("name", "parameter", "losses"),
  [
    ("kl_ball", 0.1, [2.0, 2.0, 2.0]),
    ("kl_ball", 2.0, [1.0, 3.0, 3.0]),  # All weight is on the maximum, inside of the ball.
    ("chi_square_ball", 0.3, [2.0, 2.0, 2.0]),
    ("chi_square_ball", 1.0, [1.0, 2.0, 3.0]),  # All weight is on the maximum, at its edge.
    ("cressie_read_ball", (0.3, 1.5), [2.0, 2.0, 2.0]),
    ("cressie_read_ball", (1.0, 1.5), [1.0, 3.0, 3.0]),
  ],
)
def test_where_a_ball_has_no_second_derivative_it_is_zero(name, parameter, losses):
  weighting = families.MAKE[name](*np.atleast_1d(parameter))
  gradient = jax.grad(lambda v: jaxbo.dro.robust_value(v, weighting))
  second = jax.jit(jax.jacfwd(gradient))(jnp.array(losses))
  np.testing.assert_array_equal(second, np.zeros((3, 3)))


def test_what_is_masked_may_have_any_tangent():
  mask = jnp.array([True, True, False])
  value = lambda losses: jaxbo.dro.robust_value(losses, jaxbo.dro.kl(1.0), mask=mask)
  losses, tangents = jnp.array([1.0, 1.0, 9.0]), jnp.array([1.0, 3.0, jnp.nan])
  np.testing.assert_allclose(jax.jvp(value, (losses,), (tangents,))[1], 2.0, rtol=1e-6)


def test_a_robust_value_is_an_inner_loss_too():
  """AID through it: the Hessian of the inner problem is right."""
  data = jnp.array([0.0, 1.0, 3.0])

  def inner_loss(x, y, batch):
    return jaxbo.dro.robust_value(0.5 * (y - batch - x) ** 2, jaxbo.dro.kl(0.8))

  solver = jaxbo.inner_solver(inner_loss, optax.sgd(0.1), 300)
  head = jaxbo.add_implicit_response(solver, jaxbo.conjugate_gradient(3))
  x = jnp.float32(0.5)

  @jax.jit
  def hypergradient(x):
    y = solver.solve(x, solver.init(jnp.float32(0.0)), data)
    return head.update((jnp.float32(0), jnp.float32(1)), head.init(x), x, solution=y, batch=data)[0]

  np.testing.assert_allclose(hypergradient(x), 1.0, rtol=1e-3)  # The minimum moves with x.


def test_weightings_that_maximise_nothing_give_the_weighted_loss():
  losses = jnp.array([1.0, 9.0, 2.0, 3.0])
  value, gradient = jax.value_and_grad(jaxbo.dro.robust_value)(losses, jaxbo.dro.mid_rank(0.25, 1))
  assert value == 3.0
  np.testing.assert_array_equal(gradient, [0, 0, 0, 1])


def test_a_state_and_groups_are_used():
  weighting = jaxbo.dro.group(2, 1.0)
  losses, groups = jnp.array([1.0, 3.0]), jnp.array([0, 1])
  state = jaxbo.dro.GroupState(jnp.log(jnp.array([0.9, 0.1])))
  value = jaxbo.dro.robust_value(losses, weighting, groups=groups, state=state)
  q = np.array([0.9 * np.e, 0.1 * np.e**3])
  np.testing.assert_allclose(value, q @ [1, 3] / q.sum(), rtol=1e-6)


def test_values_of_small_batches_are_biased_low_as_jensen_says():
  r"""Exponential losses: :math:`E e^{s l} = 1 / (1 - s)`, so mean and variance are known."""
  temperature, size, count = 4.0, 32, 200_000
  losses = jax.random.exponential(jax.random.key(0), (count, size))
  value = lambda row: jaxbo.dro.robust_value(row, jaxbo.dro.kl(temperature))
  values = jax.jit(jax.vmap(value))(losses)
  mean, square = 1 / (1 - 1 / temperature), 1 / (1 - 2 / temperature)
  bias = -temperature * (square / mean**2 - 1) / (2 * size)
  error = float(values.mean()) - temperature * np.log(mean)
  standard_error = float(values.std()) / np.sqrt(count)
  assert abs(error - bias) < 4 * standard_error < 0.35 * abs(bias)
