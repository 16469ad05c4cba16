"""SOBOW and OAGD on drifting quadratics, against golden traces and closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

import jaxbo
from tests.online import drifting
from tests.online.drifting import p1, p2, p3, p4, p8, play

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("x64")]

CLOSE = {"rtol": 0, "atol": 1e-9}


def start(problem):
  outer, inner = problem.B.shape[1], len(problem.A)
  return jnp.zeros(outer), jnp.zeros(inner)


def trace_p1(**options):
  problem = p1()
  options = {"window": 3, "num_rounds": 6, **options}
  return play(problem.stream(), *start(problem), 0.25, 0.4, 0.5, **options)[1]["trace"]


def test_p1():
  trace = trace_p1()
  x = [0, 0.2628571429, 0.6256326531, 0.9661411079, 1.1808738692, 1.2775694713, 1.2963278926]
  y = [0.05, 0.2564285714, 0.5910306122, 0.9785858601, 1.3297298646, 1.6036496680]
  h = [-1.15, -1.0121428571, -0.6961530612, -0.3383435860, -0.0798332007, 0.0424344036]
  np.testing.assert_allclose(trace["x"][:, 0], x[:-1], **CLOSE)
  np.testing.assert_allclose(trace["next_x"][:, 0], x[1:], **CLOSE)
  np.testing.assert_allclose(trace["next_y"][:, 0], y, **CLOSE)
  np.testing.assert_allclose(trace["h"][:, 0], h, **CLOSE)
  gradients = [-1.1, -0.8057142857, -0.3615510204, 0.0492116618, 0.2713108038, 0.3163542069]
  problem = p1()
  exact = [problem.gradient(np.array([x]), t)[0] for t, x in enumerate(trace["x"][:, 0])]
  np.testing.assert_allclose(exact, gradients, **CLOSE)


P1_VARIANTS = {
  "before": (
    {"hyper_at": "before"},
    [0.2742857143, 0.6886530612, 1.1229294461, 1.4459275968, 1.6191444679, 1.6500250840],
  ),
  "present": (
    {"normalization": "present"},
    [0.46, 0.8306666667, 1.0905142857, 1.2191395918, 1.2538861885, 1.2442723542],
  ),
  "box": ({"box": 0.3}, [0.2628571429, 0.3, 0.3, 0.3, 0.3, 0.3]),
}


@pytest.mark.parametrize("name", P1_VARIANTS)
def test_p1_variants(name):
  options, x = P1_VARIANTS[name]
  np.testing.assert_allclose(trace_p1(**options)["next_x"][:, 0], x, **CLOSE)


def test_p1_in_a_box_averages_what_it_would_without_one():
  h = np.asarray(trace_p1(box=0.3)["h"][:, 0])
  np.testing.assert_allclose((h[5] + 0.5 * h[4] + 0.25 * h[3]) / 1.75, -1.2082397959, **CLOSE)


P2 = {
  "warm": (
    {"cg": (1, True)},
    """0.0283558185 0.0290793018 0.0847905407 0.0731364384 0.1632822600 0.1297806005
    0.2552485725 0.1952050584 0.3401043725 0.2557324679 0.4110436374 0.3159878279""",
  ),
  "cold": (
    {"cg": (1, False)},
    """0.0283558185 0.0290793018 0.0778250860 0.0809027813 0.1419221674 0.1498798709
    0.2149604275 0.2310928937 0.2804485331 0.3083341528 0.3374525415 0.3806669510""",
  ),
  "exact": (
    {"cg": (2, True)},
    """0.0393291836 0.0209351287 0.1071920904 0.0592108206 0.1936175729 0.1118740665
    0.2896205050 0.1764342477 0.3712354837 0.2421361694 0.4365877991 0.3085467083""",
  ),
  "oagd": (
    {"cg": (2, True), "method": "oagd"},
    """0.0393291836 0.0209351287 0.1046055038 0.0601705640 0.1822477946 0.1157224758
    0.2603218445 0.1857365361 0.3217153579 0.2570383026 0.3669858427 0.3288233634""",
  ),
}


@pytest.mark.parametrize("name", P2)
def test_p2(name):
  options, golden = P2[name]
  problem = p2()
  _, metrics = play(
    problem.stream(), *start(problem), 0.2, 0.3, 0.8, window=4, num_rounds=6, **options
  )
  golden = np.array(golden.split(), float).reshape(6, 2)
  np.testing.assert_allclose(metrics["trace"]["next_x"], golden, **CLOSE)


def test_a_warm_start_of_oagd_goes_through_the_batches_and_on_to_the_next_round():
  """One step of CG for each batch, from the solution of the batch before, in NumPy."""
  problem, weights = p2(), 0.8 ** np.arange(4)
  options = {"method": "oagd", "window": 4, "num_rounds": 6, "cg": (1, True)}
  _, metrics = play(problem.stream(), *start(problem), 0.2, 0.3, 0.8, **options)
  x, y, v = np.zeros((3, 2))
  for t in range(6):
    y = y - 0.2 * (problem.A @ y - x - problem.b[t])
    d = np.zeros(2)
    for age in (3, 2, 1, 0):
      if age <= t:
        residual = y - problem.c[t - age] - problem.A @ v
        v = v + residual @ residual / (residual @ problem.A @ residual) * residual
        d += weights[age] / weights.sum() * (0.1 * x + v)
    x = x - 0.3 * d
    np.testing.assert_allclose(metrics["trace"]["next_x"][t], x, **CLOSE)


def ramp(problem, num_rounds, **options):
  """The distance to the minimum with exact inner solutions."""
  x, y = start(problem)
  options = {"cg": (1, False), "num_rounds": num_rounds, **options}
  _, metrics = play(problem.stream(), x, y, 1.0, 0.2, options.pop("decay"), window=5, **options)
  return np.asarray(metrics["trace"]["x"])[:, 0] - problem.c[:, 0]


@pytest.mark.parametrize(
  ("method", "decay", "error"),
  [
    ("sobow", 1.0, -0.05),
    ("sobow", 0.9, -0.05),
    ("oagd", 1.0, -0.07),
    ("oagd", 0.9, -0.0679029),
  ],
)
def test_a_ramp_is_tracked_with_the_delay_of_p8(method, decay, error):
  """Old gradients at old iterates cost no steady error; old losses at the current one do."""
  found = ramp(p8(0.01 * np.arange(400)), 400, method=method, decay=decay)
  np.testing.assert_allclose(found[-10:], error, rtol=0, atol=1e-6 if decay == 1 else 1e-7)


@pytest.mark.parametrize("method", ["sobow", "oagd"])
def test_a_sinusoid_is_tracked_with_the_transfer_function_of_p8(method):
  omega, beta, decay, window = 0.3, 0.2, 0.9, 5
  t = np.arange(400)
  found = ramp(p8(np.cos(omega * t)), 400, method=method, decay=decay)
  z, weights = np.exp(1j * omega), decay ** np.arange(window)
  smooth = np.sum(weights / weights.sum() * z ** -np.arange(window))
  transfer = beta * smooth / (z - 1 + beta * (smooth if method == "sobow" else 1))
  expected = np.real((transfer - 1) * z**t)
  np.testing.assert_allclose(found[-50:], expected[-50:], rtol=0, atol=1e-6)


def test_path_lengths_of_p4():
  """The example of 2511.01126: streaming sums against the table, in one scan."""
  problem = p4(10_000)
  found = np.array(path_metrics(problem, 1.0, 10_000))[:, [9, 99, 999, 9999]]
  variation = [4.3475444680, 4.7998, 4.9367524468, 4.97999998]
  path = [0.1151254154, 0.1163617491, 0.1163741240, 0.1163742477]
  np.testing.assert_allclose(found, [variation, path], rtol=1e-9)


def path_metrics(problem, radius, num_rounds):
  """V_T over a ball and H_{2,T}, by the metric; changes by the closed form, in JAX."""

  def value_change(batch, last):
    value = lambda x, batch: drifting.outer_loss(
      x, jnp.linalg.solve(batch.train[0], batch.train[1] @ x + batch.train[2]), batch.val
    )
    zero = jnp.zeros(problem.B.shape[1])
    change = lambda x: value(x, batch) - value(x, last)
    return radius * jnp.linalg.norm(jax.grad(change)(zero)) + jnp.abs(change(zero))

  def minimum_change(batch, last):
    return jnp.linalg.norm(jnp.linalg.solve(batch.train[0], batch.train[2] - last.train[2]))

  metrics = {
    "V": jaxbo.online.path_length(value_change),
    "H": jaxbo.online.path_length(minimum_change, power=2),
  }
  inner = jaxbo.inner_solver(drifting.inner_loss, optax.sgd(0.1), 1)
  loop = jaxbo.online_loop(drifting.outer_loss, inner, jaxbo.ogd(0.1), metrics=metrics)
  stream = problem.stream()
  run = jax.jit(loop.run, static_argnums=2)
  _, info = run(loop.init(*start(problem), stream), stream, num_rounds)
  return [info.metrics[name].total for name in ("V", "H")]


def test_path_lengths_of_p3():
  problem = p3(20, np.sqrt)
  found = path_metrics(problem, 2.0, 20)
  expected = problem.variation(2.0).sum(), problem.path(2).sum()
  np.testing.assert_allclose(np.array(found)[:, -1], expected, rtol=1e-9)
  # No point of the sphere does better than the supremum, and the best comes close.
  points = np.random.default_rng(0).normal(size=(2000, 3))
  points *= 2 / np.linalg.norm(points, axis=1, keepdims=True)
  change = max(abs(problem.value(x, 7) - problem.value(x, 6)) for x in points)
  assert 0.98 < change / problem.variation(2.0)[6] <= 1


def test_obbo_with_the_euclidean_distance_takes_the_steps_of_sobow():
  """The mirror step argmin <d, x> + |x - x_t|^2 / (2 beta) over a box, by a generic solver."""
  problem, box = p2(), 0.12
  _, metrics = play(
    problem.stream(), *start(problem), 0.3, 0.4, 0.9, window=3, num_rounds=6, box=box
  )
  trace = jax.tree.map(np.asarray, metrics["trace"])
  weights = 0.9 ** np.arange(3)
  on_a_face = 0
  for t, x in enumerate(trace["x"]):
    d = sum(w * trace["h"][t - i] for i, w in enumerate(weights) if t >= i) / weights.sum()
    mirror = lambda z, x=x, d=d: (d @ z + np.sum((z - x) ** 2) / 0.8, d + (z - x) / 0.4)
    options = {"method": "L-BFGS-B", "tol": 1e-14, "bounds": [(-box, box)] * 2}
    result = scipy.optimize.minimize(mirror, x, jac=True, **options)
    np.testing.assert_allclose(trace["next_x"][t], result.x, rtol=0, atol=1e-7)
    on_a_face += int(np.any(np.abs(result.x) == box))
  assert 0 < on_a_face < 6


DRIFTS = {
  "static": lambda t: 0 * t,
  "fading": lambda t: 1 / np.sqrt(t),
  "sin": lambda t: np.sin(0.3 * t),
  "linear": lambda t: 0.05 * t,
}


@functools.cache
def long_run(name):
  """3200 rounds of P3 with an exact linear solver, and both regrets with the window of SOBOW."""
  problem = p3(3200, DRIFTS[name])
  options = {"window": 5, "num_rounds": 3200, "cg": (6, True), "regret": 5}
  _, metrics = play(problem.stream(), *start(problem), 0.3, 0.1, 0.9, **options)
  return problem, jax.tree.map(np.asarray, metrics)


def test_the_inner_error_contracts_by_the_step_and_the_bias_is_that_of_y():
  """P3: y_{t+1} - y* = (I - alpha A)(y_t - y*), and h - grad F = B'A^{-1}(y - y*)."""
  problem, metrics = long_run("sin")
  trace = metrics["trace"]
  y = np.vstack([np.zeros(5), trace["next_y"]])
  left = np.eye(5) - 0.3 * problem.A
  for t in range(50):
    x = trace["x"][t]
    minimum = problem.minimum(x, t)
    np.testing.assert_allclose(y[t + 1] - minimum, left @ (y[t] - minimum), atol=1e-12)
    bias = problem.B.T @ np.linalg.solve(problem.A, y[t + 1] - minimum)
    np.testing.assert_allclose(trace["h"][t] - problem.gradient(x, t), bias, **CLOSE)


@pytest.mark.parametrize("name", ["p2", "p3"])
def test_the_error_of_h_is_bounded_by_those_of_y_and_v_in_every_round(name):
  """With the constant of 2511.01126; P2 with a single step of CG, so that v is wrong too."""
  if name == "p2":
    problem = p2()
    options = {"window": 4, "num_rounds": 6, "cg": (1, True)}
    metrics = play(problem.stream(), *start(problem), 0.2, 0.3, 0.8, **options)[1]
  else:
    problem, metrics = long_run("linear")
  trace = jax.tree.map(np.asarray, metrics["trace"])
  zero = np.zeros((len(problem.B.T),) * 2)
  smoothness = np.linalg.norm(np.block([[zero, -problem.B.T], [-problem.B, problem.A]]), 2)
  constant_sq = 2 * max(1.0, smoothness) ** 2  # l_g2 = 0
  ratios = []
  for t, x in enumerate(trace["x"]):
    minimum = problem.minimum(x, t)
    v = np.linalg.solve(problem.A, minimum - problem.c[t])
    errors = np.sum((trace["next_y"][t] - minimum) ** 2) + np.sum((trace["v"][t] - v) ** 2)
    ratios.append(np.sum((trace["h"][t] - problem.gradient(x, t)) ** 2) / (constant_sq * errors))
  assert max(ratios) <= 1
  assert max(ratios) > 1e-3  # The bound is no triviality.


def test_on_a_static_problem_h_is_the_gradient_and_x_the_optimum():
  problem, metrics = long_run("static")
  trace = metrics["trace"]
  np.testing.assert_allclose(trace["next_x"][-1], problem.optimum(0), atol=1e-10)
  np.testing.assert_allclose(trace["h"][-1], 0.0, atol=1e-10)
  errors = [trace["h"][t] - problem.gradient(trace["x"][t], 0) for t in (0, 3199)]
  assert np.linalg.norm(errors[0]) > 0.1
  assert np.linalg.norm(errors[1]) < 1e-10


def growth(name, at):
  total = long_run(name)[1][at].total
  return total[3199] / total[799]


@pytest.mark.parametrize("at", ["own", "current"])
def test_the_regret_is_bounded_where_the_drift_fades_and_linear_where_it_goes_on(at):
  assert growth("static", at) == pytest.approx(1, abs=1e-9)
  assert growth("fading", at) == pytest.approx(1, abs=1e-2)
  for name in ("sin", "linear"):
    assert 3.5 < growth(name, at) < 4.5


def test_both_regrets_are_those_of_the_definition():
  problem, metrics = long_run("sin")
  x, weights = metrics["trace"]["x"], 0.9 ** np.arange(5)
  for at in ("own", "current"):
    total = 0.0
    for t in range(40):
      points = [x[t - i if at == "own" else t] for i in range(5)]
      terms = [w * problem.gradient(points[i], t - i) for i, w in enumerate(weights) if t >= i]
      total += np.sum((np.sum(terms, axis=0) / weights.sum()) ** 2)
    np.testing.assert_allclose(metrics[at].total[39], total, rtol=1e-9)
