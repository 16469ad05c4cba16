"""Linear solvers against dense solves, and what they do where no solution is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbo
from tests.cases import cases


def system(q=6, *, seed=0, condition=20.0):
  rng = np.random.default_rng(seed)
  basis, _ = np.linalg.qr(rng.normal(size=(q, q)))
  matrix = basis @ np.diag(np.geomspace(1 / condition, 1, q)) @ basis.T
  return jnp.asarray(matrix), jnp.asarray(rng.normal(size=q))


def solve(solver, matrix, b, x0=None):
  x0 = jnp.zeros_like(b) if x0 is None else x0
  return jax.jit(lambda m, b, x0: solver(lambda v: m @ v, b, x0))(matrix, b, x0)


def test_conjugate_gradient_is_exact_after_q_steps(x64):
  matrix, b = system()
  x, info = solve(jaxbo.conjugate_gradient(6), matrix, b)
  np.testing.assert_allclose(x, np.linalg.solve(matrix, b), rtol=1e-9)
  assert info.num_steps == 6
  assert info.residual < 1e-10
  assert not info.breakdown


def test_conjugate_gradient_equals_the_textbook_iterates(x64):
  """After k steps the iterate minimises the energy over the Krylov space."""
  matrix, b = system()
  for k in (1, 2, 4):
    x, info = solve(jaxbo.conjugate_gradient(k), matrix, b)
    krylov = np.stack([np.linalg.matrix_power(matrix, i) @ b for i in range(k)], axis=1)
    basis, _ = np.linalg.qr(krylov)
    expected = basis @ np.linalg.solve(basis.T @ matrix @ basis, basis.T @ b)
    np.testing.assert_allclose(x, expected, rtol=1e-8)
    residual = np.linalg.norm(b - matrix @ x) / np.linalg.norm(b)
    np.testing.assert_allclose(info.residual, residual, rtol=1e-8)


def test_damping_is_added_to_the_diagonal(x64):
  matrix, b = system()
  x, _ = solve(jaxbo.conjugate_gradient(6, damping=0.3), matrix, b)
  np.testing.assert_allclose(x, np.linalg.solve(matrix + 0.3 * np.eye(6), b), rtol=1e-9)


def test_tolerance_stops_early(x64):
  matrix, b = system()
  _, info = solve(jaxbo.conjugate_gradient(6, tolerance=0.2), matrix, b)
  assert info.residual <= 0.2
  assert 0 < info.num_steps < 6
  _, one_less = solve(jaxbo.conjugate_gradient(int(info.num_steps) - 1), matrix, b)
  assert one_less.residual > 0.2


@pytest.mark.parametrize(
  "make",
  [
    lambda **kwargs: jaxbo.conjugate_gradient(2, **kwargs),
    lambda **kwargs: jaxbo.fixed_point(2, 0.5, **kwargs),
  ],
)
def test_warm_start_begins_at_x0_and_cold_start_ignores_it(make, x64):
  matrix, b = system()
  solution = jnp.asarray(np.linalg.solve(matrix, b))
  near = solution + 1e-3
  warm, info = solve(make(warm_start=True), matrix, b, near)
  assert np.linalg.norm(warm - solution) < np.linalg.norm(near - solution)
  assert info.num_steps == 2
  cold, _ = solve(make(), matrix, b, near)
  zero, _ = solve(make(warm_start=True), matrix, b, jnp.zeros(6))
  np.testing.assert_allclose(cold, zero, rtol=1e-12)


def test_neumann_is_the_truncated_series(x64):
  matrix, b = system()
  for num_steps in (1, 2, 5):
    x, info = solve(jaxbo.neumann(num_steps, 0.7), matrix, b)
    left = np.eye(6) - 0.7 * matrix
    expected = 0.7 * sum(np.linalg.matrix_power(left, q) @ b for q in range(num_steps + 1))
    np.testing.assert_allclose(x, expected, rtol=1e-10)
    residual = np.linalg.norm(np.linalg.matrix_power(left, num_steps) @ b) / np.linalg.norm(b)
    np.testing.assert_allclose(info.residual, residual, rtol=1e-10)


def test_fixed_point_leaves_the_contracted_error(x64):
  matrix, b = system()
  solution = np.linalg.solve(matrix, b)
  x, info = solve(jaxbo.fixed_point(9, 0.7), matrix, b)
  left = np.linalg.matrix_power(np.eye(6) - 0.7 * matrix, 9)
  np.testing.assert_allclose(x, solution - left @ solution, rtol=1e-10)
  np.testing.assert_allclose(info.residual, np.linalg.norm(left @ b) / np.linalg.norm(b), rtol=1e-9)


SOLVERS = {
  "cg": jaxbo.conjugate_gradient(20),
  "cg_warm": jaxbo.conjugate_gradient(20, warm_start=True),
  "neumann": jaxbo.neumann(20, 0.5),
  "fixed_point": jaxbo.fixed_point(20, 0.5),
}


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("eigenvalues", [(1.0, -1.0), (-1.0, -2.0), (1.0, 0.0, -0.5)])
def test_negative_curvature_is_reported_and_the_solution_stays_finite(name, eigenvalues):
  x, info = solve(SOLVERS[name], jnp.diag(jnp.array(eigenvalues)), jnp.ones(len(eigenvalues)))
  assert info.breakdown
  assert np.all(np.isfinite(x))
  assert np.isfinite(info.residual)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_steps", [6, 9, 30])
def test_singular_system_in_a_rotated_basis_ends_no_worse_than_it_began(seed, num_steps):
  """Rounding leaves a curvature just above zero, and the next step would be 1e5 times too long."""
  rng = np.random.default_rng(seed)
  basis, _ = np.linalg.qr(rng.normal(size=(10, 10)))
  eigenvalues = np.array([1.0, 0.9, 0.7, 0.5, 0.4, 0.3, 0.2, 0.0, 0.0, 0.0])
  matrix = jnp.asarray((basis * eigenvalues) @ basis.T, jnp.float32)
  b = jnp.asarray(rng.normal(size=10), jnp.float32)
  x, info = solve(jaxbo.conjugate_gradient(num_steps), matrix, b)
  residual = np.linalg.norm(b - matrix @ x) / np.linalg.norm(b)
  np.testing.assert_allclose(info.residual, residual, rtol=1e-3)
  assert residual <= (10 if num_steps < 10 else 1)
  assert np.linalg.norm(x) < 50 * np.linalg.norm(b)
  assert info.breakdown or num_steps < 10


def test_ill_conditioned_system_is_solved_on_in_spite_of_tiny_curvatures():
  """A condition of 1e5 is near the resolution of float32 and no breakdown."""
  eigenvalues = jnp.array([1.0, 1e-1, 1e-2, 1e-5])
  x, info = solve(jaxbo.conjugate_gradient(12), jnp.diag(eigenvalues), jnp.ones(4))
  np.testing.assert_allclose(x, 1 / eigenvalues, rtol=1e-2)
  assert not info.breakdown


def test_conjugate_gradient_reports_a_singular_system_without_solution():
  """T1's inner Hessian: the second search direction has zero curvature."""
  x, info = solve(SOLVERS["cg"], jnp.diag(jnp.array([1.0, 0.0])), jnp.ones(2))
  assert info.breakdown
  assert np.all(np.isfinite(x))


def test_fixed_point_solves_the_regular_part_of_a_singular_system():
  x, info = solve(SOLVERS["fixed_point"], jnp.diag(jnp.array([1.0, 0.0])), jnp.ones(2))
  np.testing.assert_allclose(x[0], 1.0, rtol=1e-5)
  assert not info.breakdown


def test_too_large_a_step_is_reported_before_it_overflows():
  x, info = solve(jaxbo.fixed_point(500, 3.0), jnp.eye(2), jnp.ones(2))
  assert info.breakdown
  assert info.num_steps == 0
  np.testing.assert_array_equal(x, 0)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("bad", ["b", "matrix"])
def test_numbers_that_are_not_finite_never_reach_the_solution(name, bad):
  matrix, b = jnp.eye(2), jnp.ones(2)
  matrix, b = (matrix, b * jnp.nan) if bad == "b" else (matrix * jnp.inf, b)
  x, info = solve(SOLVERS[name], matrix, b)
  assert info.breakdown
  assert np.all(np.isfinite(x))


@pytest.mark.parametrize("name", SOLVERS)
def test_zero_right_hand_side_needs_no_step(name):
  x, info = solve(SOLVERS[name], jnp.eye(2), jnp.zeros(2))
  np.testing.assert_array_equal(x, 0)
  assert info.num_steps == 0
  assert info.residual == 0
  assert not info.breakdown


def test_converged_conjugate_gradient_stops_instead_of_dividing_by_rounding():
  x, info = solve(jaxbo.conjugate_gradient(100), 2 * jnp.eye(3), jnp.ones(3))
  np.testing.assert_allclose(x, 0.5)
  assert info.num_steps <= 2
  assert not info.breakdown


@cases(
  ("build", "message"),
  [
    (lambda: jaxbo.conjugate_gradient(0), "num_steps must be at least 1, got 0"),
    (lambda: jaxbo.conjugate_gradient(3, -1.0), "tolerance must be non-negative and finite"),
    (lambda: jaxbo.conjugate_gradient(3, damping=-1.0), "damping must be non-negative"),
    (lambda: jaxbo.neumann(0, 0.1), "num_steps must be at least 1"),
    (lambda: jaxbo.neumann(3, 0.0), "learning_rate must be positive and finite, got 0.0"),
    (lambda: jaxbo.fixed_point(3, float("nan")), "learning_rate must be positive and finite"),
  ],
)
def test_bad_arguments_are_refused(build, message):
  with pytest.raises(ValueError, match=message):
    build()


def test_gmres_starts_where_it_is_told():
  """One step from the solution is exact; one step from zero is not."""
  matrix, b = jnp.array([[3.0, 1.0], [0.0, 2.0]]), jnp.ones(2)
  exact = jnp.array([1 / 6, 0.5])
  x, _ = jaxbo.gmres(1, warm_start=True)(lambda v: matrix @ v, b, exact)
  np.testing.assert_allclose(x, exact, rtol=1e-5)
  x, _ = jaxbo.gmres(1)(lambda v: matrix @ v, b, exact)
  assert np.max(np.abs(x - exact)) > 0.01


def test_gmres_has_the_smallest_residual_of_its_krylov_space(x64):
  """Of matrices that are not symmetric, skew ones (which are singular if odd) and singular ones."""
  rng = np.random.default_rng(0)
  n = 5
  dense, row = rng.normal(size=(n, n)), rng.normal(size=n)
  singular = np.concatenate([dense[:, :1], dense[:, :4]], axis=1)
  for num_steps in (2, n):
    solve = jax.jit(lambda A, b, m=num_steps: jaxbo.gmres(m)(lambda v: A @ v, b, jnp.zeros(n)))
    for A, b in ((dense, row), (dense - dense.T, row), (singular, singular @ row)):
      x, info = solve(A, b)
      krylov = np.linalg.qr(
        np.array([np.linalg.matrix_power(A, i) @ b for i in range(num_steps)]).T
      )[0]
      best = krylov @ np.linalg.lstsq(A @ krylov, b, rcond=None)[0]
      smallest = np.linalg.norm(b - A @ best) / np.linalg.norm(b)
      np.testing.assert_allclose(np.linalg.norm(b - A @ x) / np.linalg.norm(b), smallest, atol=1e-8)
      np.testing.assert_allclose(info.residual, smallest, atol=1e-8)
      assert info.num_steps <= num_steps
  assert not solve(dense, row)[1].breakdown
  assert solve(dense - dense.T, row)[1].breakdown


def test_gmres_of_divided_vectors():
  """On explicit axes, without ``jax.set_mesh``; and it stops where it is told."""
  mesh = jax.make_mesh((8,), ("data",))
  divided = jax.device_put(
    jnp.arange(1.0, 17.0), jax.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  )
  x, info = jax.jit(lambda b: jaxbo.gmres(6, 1e-3)(lambda v: (1 + b / 16) * v, b, 0 * b))(divided)
  assert info.residual <= 1e-3
  assert 0 < info.num_steps < 6
  assert x.sharding.spec == divided.sharding.spec
