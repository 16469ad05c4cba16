"""The window average by itself: recursion, limits, noise, stability, what must not enter."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbo
from tests.cases import cases
from tests.online.drifting import inner_loss, outer_loss

pytestmark = pytest.mark.slow  # All together, not each.


def averages(gradients, size, decay=1.0, params=None, **options):
  """What comes out for each of ``gradients``, leaves ``[rounds, ...]``."""
  tx = jaxbo.window_average(size, decay, **options)
  params = jax.tree.map(lambda leaf: leaf[0], gradients) if params is None else params
  update = lambda state, gradient: tx.update(gradient, state, params)[::-1]
  return jax.jit(lambda g: jax.lax.scan(update, tx.init(params), g))(gradients)[::-1]


def test_a_thousand_steps_equal_the_recursion(x64):
  gradients = np.random.default_rng(0).normal(size=(1000, 4))
  size, decay = 20, 0.9
  found, _ = averages(jnp.asarray(gradients), size, decay)
  total, d, expected = np.sum(decay ** np.arange(size)), np.zeros(4), []
  for t, gradient in enumerate(gradients):
    leaving = gradients[t - size] if t >= size else 0
    d = gradient / total + decay * d - decay**size / total * leaving
    expected.append(d)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_a_window_longer_than_the_run_is_the_exponential_average(x64):
  gradients = np.random.default_rng(1).normal(size=(50, 3))
  found, _ = averages(jnp.asarray(gradients), 400, 0.9)
  average = np.zeros(3)
  for t, gradient in enumerate(gradients):
    average = 0.1 * gradient + 0.9 * average
    np.testing.assert_allclose(found[t], average, rtol=0, atol=1e-12)


def test_a_window_of_one_is_plain_online_aid():
  solver = jaxbo.inner_solver(inner_loss, optax.sgd(0.3), 1)
  cg = jaxbo.conjugate_gradient(2, warm_start=True)
  x, y = jnp.zeros(2), jnp.zeros(3)
  matrices = jnp.diag(jnp.arange(1.0, 4.0)), jnp.ones((3, 2)) + jnp.eye(3, 2)
  stream = lambda key, t: ((*matrices, jnp.cos(t + jnp.arange(3.0))), (jnp.ones(3), x, 0.5))

  def run(outer):
    loop = jaxbo.online_loop(outer_loss, solver, outer)
    return jax.jit(lambda s: loop.run(s, stream, 20))(loop.init(x, y, stream))[0].x

  found = run(jaxbo.sobow(0.1, solver, window=1, decay=0.5, linear_solver=cg, inner_params=y))
  expected = run(jaxbo.aid(0.1, solver, cg, inner_params=y))
  np.testing.assert_array_equal(found, expected)
  assert np.linalg.norm(found) > 0.1


@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_the_variance_of_noise_is_that_of_p10(decay, x64):
  """By the response to an impulse, which is the weights, and on noise."""
  size = 20
  impulse = jnp.zeros(40).at[5].set(1.0)
  weights, _ = averages(impulse, size, decay)
  expected = 1 / size if decay == 1 else 0.0672003431
  np.testing.assert_allclose(np.sum(np.asarray(weights) ** 2), expected, rtol=1e-8)
  assert not np.any(weights[:5])
  assert not np.any(weights[25:])
  noise = np.random.default_rng(2).normal(size=(30, 5000))
  found, _ = averages(jnp.asarray(noise), size, decay)
  # A sample variance of n normals has the relative standard error sqrt(2 / n).
  assert abs(np.var(found[-1]) / expected - 1) < 4 * np.sqrt(2 / 5000)


def assert_limits(jacobian, limits, *args):
  """Below each limit all eigenvalues are inside the unit circle, and above it one is not."""
  for side in (-1, 1):
    matrices = jacobian(limits + side * 1e-6, *args)
    radii = np.array([np.max(np.abs(np.linalg.eigvals(m))) for m in np.asarray(matrices)])
    assert np.all(side * (radii - 1) > 0), (side, radii)


P9 = {  # The limits of beta h for decays 1, 0.9 and 0.5.
  1: [2, 2, 2],
  2: [2, 2.111111, 3],
  3: [1.5, 1.678343, 4.666667],
  5: [0.954915, 1.199179, 5.636364],
  10: [0.489435, 0.888658, 6],
  20: [0.246233],
}


@pytest.mark.parametrize("size", P9)
def test_the_limits_of_stability_with_exact_inner_solutions(size, x64):
  """P9: gradient descent on x^2 / 2 behind the window, by the spectrum of a turn of the ring."""
  limits = np.array(P9[size])
  decays = np.array([1.0, 0.9, 0.5])[: len(limits)]

  @jax.jit
  @jax.vmap
  def jacobian(beta, decay):
    tx = optax.chain(jaxbo.window_average(size, decay), optax.scale(-beta))

    def turn(flat):
      state = tx.init(flat[0])
      state = optax.tree.set(state, values=flat[1:], present=jnp.ones(size, bool))

      def step(carry, _):
        x, state = carry
        updates, state = tx.update(x, state, x)
        return (x + updates, state), None

      (x, state), _ = jax.lax.scan(step, (flat[0], state), length=size)
      return jnp.append(x, optax.tree.get(state, "values"))

    return jax.jacfwd(turn)(jnp.ones(size + 1))

  assert_limits(jacobian, limits, decays)


ONE_STEP = {1: [3.619048, 2.4, 1.333333], 3: [2.152981, 0.965352, 1.0]}
ONE_STEP[10] = [0.333339, 0.278968, 0.326290]


@pytest.mark.parametrize("size", ONE_STEP)
def test_the_limits_of_stability_with_one_inner_step(size, x64):
  """P9 with the structure of P1, for inner contractions q = alpha a of 0.1, 0.5 and 1."""
  limits, q = np.array(ONE_STEP[size]), np.array([0.1, 0.5, 1.0])
  zero, a = jnp.zeros(1), 2 * jnp.eye(1)
  batch = ((a, a, zero), (zero, zero, jnp.float64(0.5)))

  @jax.jit
  @jax.vmap
  def jacobian(beta, alpha, decay):
    inner = jaxbo.inner_solver(inner_loss, optax.sgd(alpha), 1)
    cg = jaxbo.conjugate_gradient(1)  # Exact in one dimension.
    outer = jaxbo.sobow(beta, inner, window=size, decay=decay, linear_solver=cg)
    loop = jaxbo.online_loop(outer_loss, inner, outer)

    def turn(flat):
      state = loop.init(flat[:1], flat[1:2], lambda key, t: batch)
      state = optax.tree.set(state, values=flat[2:, None], present=jnp.ones(size, bool))
      state, _ = jax.lax.scan(lambda s, _: (loop.step(s, batch)[0], None), state, length=size)
      values = optax.tree.get(state, "values")[:, 0]
      return jnp.concatenate([state.x, state.y, values])

    return jax.jacfwd(turn)(jnp.ones(size + 2))

  assert_limits(jacobian, limits, q / 2, jnp.ones(3))
  if size == 3:  # The spectral radius that goes with the golden trace of P1.
    matrix = jacobian(jnp.full(3, 0.4), jnp.full(3, 0.25), jnp.full(3, 0.5))[0]
    radius = np.max(np.abs(np.linalg.eigvals(matrix))) ** (1 / size)
    np.testing.assert_allclose(radius, 0.7587316687, rtol=0, atol=1e-9)


def test_present_normalization_averages_what_is_there():
  found, _ = averages(jnp.float32([3.0, 6.0, 9.0]), 3, 0.5, normalization="present")
  np.testing.assert_allclose(found, [3.0, 7.5 / 1.5, 12.75 / 1.75], rtol=1e-6)


def test_bfloat16_halves_the_memory_and_sums_in_float32():
  gradients = np.random.default_rng(3).normal(size=(40, 6)).astype(np.float32)
  found, state = averages(jnp.asarray(gradients), 8, 0.9, storage_dtype=jnp.bfloat16)
  assert state.gradient_window.values.nbytes == 8 * 6 * 2
  assert found.dtype == jnp.float32
  rounded = gradients.astype(jnp.bfloat16).astype(np.float64)
  weights = 0.9 ** np.arange(8)
  expected = weights @ rounded[:-9:-1] / weights.sum()
  np.testing.assert_allclose(found[-1], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("normalization", ["full", "present"])
def test_a_gradient_that_is_not_finite_leaves_an_empty_slot(bad, normalization):
  """One bad entry keeps out the whole gradient; the older ones age; the next ones count."""
  gradients = {"a": np.arange(1.0, 7.0, dtype=np.float32), "b": np.ones((6, 2), np.float32)}
  gradients["b"][3, 1] = bad
  found, state = averages(gradients, 3, 0.5, normalization=normalization)
  chex.assert_tree_all_finite(found)
  scale = 1.75 if normalization == "full" else np.array([1, 1.5, 1.75, 0.75, 1.25, 1.5])
  sums = np.array([1, 2.5, 4.25, 0 + 1.5 + 0.5, 5 + 0.75, 6 + 2.5])
  np.testing.assert_allclose(found["a"], sums / scale, rtol=1e-6)
  assert state.info.num_present == 2
  assert state.info.finite


@pytest.mark.parametrize(("normalization", "first"), [("full", 2.5), ("present", 5.0)])
def test_nothing_is_left_after_a_whole_window_of_bad_gradients(normalization, first):
  gradients = jnp.float32([5.0, 5.0, np.nan, np.nan, np.nan])
  found, state = averages(gradients, 2, normalization=normalization)
  np.testing.assert_array_equal(found, [first, 5.0, first, 0.0, 0.0])
  assert state.info.num_present == 0
  assert not state.info.finite
  assert state.info.average_norm == 0


def test_what_overflows_in_storage_counts_as_not_finite():
  found, state = averages(jnp.float32([1.0, 1e5]), 2, storage_dtype=jnp.float16)
  np.testing.assert_allclose(found, [0.5, 0.5])
  assert not state.info.finite


def test_info_has_the_norm_of_what_comes_out():
  gradients = {"a": jnp.float32([0, 0, 9]), "b": jnp.float32([[0], [12], [0]])}
  _, state = averages(gradients, 3)
  np.testing.assert_allclose(state.info.average_norm, 5.0, rtol=1e-6)
  assert state.info.num_present == 3


@cases(
  ("arguments", "options", "error", "message"),
  [
    ((0,), {}, ValueError, "window must be at least 1, got 0"),
    ((2, 0.0), {}, ValueError, r"decay must be in \(0, 1\], got 0.0"),
    ((2, 1.5), {}, ValueError, r"decay must be in \(0, 1\], got 1.5"),
    ((2, float("nan")), {}, ValueError, r"decay must be in \(0, 1\], got nan"),
    (
      (2,),
      {"normalization": "none"},
      ValueError,
      "normalization must be one of 'full', 'present', got 'none'",
    ),
    ((2,), {"storage_dtype": jnp.int8}, TypeError, "storage_dtype must be a floating-point type"),
  ],
)
def test_bad_arguments(arguments, options, error, message):
  with pytest.raises(error, match=message):
    jaxbo.window_average(*arguments, **options)


def test_bad_updates_and_parameters():
  tx = jaxbo.window_average(2)
  state = tx.init(jnp.zeros(3))
  with pytest.raises(ValueError, match="updates must have the structure and shapes of the param"):
    tx.update((jnp.zeros(3), jnp.zeros(2)), state)
  with pytest.raises(TypeError, match="params must be real floats, got dtype int32"):
    tx.init(jnp.arange(3))


def test_window_is_a_python_int(as_users_run):
  with pytest.raises(TypeError, match=r"window must be a positive Python int, got 2\.0"):
    jaxbo.window_average(2.0)  # pyright: ignore
