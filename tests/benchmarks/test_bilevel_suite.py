"""The suite's exact values, and its plain methods beside jaxbo's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbo
from benchmarks import bilevel_suite, suite_plain, suite_table
from benchmarks.suite_methods import METHODS
from benchmarks.suite_problems import exact, quadratic, selection

pytestmark = pytest.mark.slow

BY_NAME = {method.name: method for method in METHODS}


def small():
  return quadratic(0, n=12, d=4, p=3, batch_size=2)


def iterates(name, problem, num_steps):
  """(x, y) after steps of one stream."""
  rates = suite_plain.Rates(*map(jnp.float32, (0.05, 0.04, 0.1)))
  stream = jaxbo.tasks.finite_sum_stream(problem.train, problem.val, problem.sizes[0])
  init, step = BY_NAME[name].make(problem, rates)

  @jax.jit
  def run(stream):
    state = {**init(), "stream": stream.init(3)}
    return jax.lax.fori_loop(0, num_steps, lambda _, state: step(stream, state), state)

  state = run(stream)
  return state["x"], state["y"]


@pytest.mark.parametrize("name", ["SABA", "SRBA", "F2SA"])
def test_a_plain_method_is_that_of_the_library(name):
  """Where both take the same batches in the same order."""
  ours, plain = (iterates(f"{kind} {name}", small(), 30) for kind in ("jaxbo", "plain"))
  assert np.abs(ours[0] - small().x).max() > 1e-2
  for a, b in zip(ours, plain, strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


def test_exact_values_are_those_of_the_closed_form():
  problem = small()
  mean = lambda leaves: [np.mean(leaf, 0, np.float64) for leaf in leaves]
  (A, B, b), (C, D, c, E, e) = mean(problem.train), mean(problem.val)
  x = np.asarray(problem.x, np.float64)
  y = -np.linalg.solve(A, B @ x + b)
  v = np.linalg.solve(A, C @ y + D @ x + c)
  slope, solution, value = exact(problem)(problem.x, problem.y)
  np.testing.assert_allclose(solution, y, rtol=1e-9)
  loss = y @ C @ y / 2 + y @ (D @ x + c) + x @ E @ x / 2 + e @ x
  np.testing.assert_allclose(value, loss, rtol=1e-9)
  np.testing.assert_allclose(slope, E @ x + e + D.T @ y - B.T @ v, rtol=1e-8, atol=1e-10)


def test_exact_hypergradients_of_logistic_regression_are_differences_of_the_value():
  rng = np.random.default_rng(0)
  features, labels = rng.normal(size=(60, 3)), rng.integers(0, 3, 60)
  problem = selection("small", features, labels, 0, 40, 20, 20)
  at = exact(problem)
  slope, y, _ = at(problem.x, problem.y)
  value = lambda x: at(x, y)[2]
  for k in range(3):
    move = 1e-4 * np.eye(3)[k]
    difference = (value(problem.x + move) - value(problem.x - move)) / 2e-4
    np.testing.assert_allclose(slope[k], difference, rtol=1e-5)


def test_rates_are_chosen_on_one_seed_and_run_on_others(monkeypatch):
  small_one = lambda seed: quadratic(seed, n=12, d=4, p=3, batch_size=2)
  monkeypatch.setitem(bilevel_suite.PROBLEMS, "small", small_one)
  monkeypatch.setattr(bilevel_suite, "GRID", [(0.001, 0.001), (0.2, 0.1)])
  tuning, *setups = (bilevel_suite.set_up("small", seed) for seed in (100, 0, 1))
  row = bilevel_suite.measure_method(BY_NAME["plain SABA"], tuning, setups, 0.2)
  assert row["rates"] == (0.2, 0.1)
  assert [run["end"] < 1e-8 for run in row["runs"]] == [True, True]
  for run in row["runs"]:
    seconds, steps, values = map(np.array, run["trace"])
    assert np.all(np.diff(seconds) > 0)
    assert values[0] == pytest.approx(1)
    assert run["steps"] == [steps[np.argmax(values <= goal)] for goal in (1e-4, 1e-6)]
  assert row["runs"][0]["trace"][2] != row["runs"][1]["trace"][2]


def test_the_table_is_of_the_worse_seed_and_counts_passes():
  run = lambda *seconds: {"seconds": seconds, "steps": (10, 30), "end": 1e-9, "microseconds": 5.0}
  row = {"method": "m", "rates": (0.2, 0.1), "compile": 1.0, "passes": 0.5}
  cells = suite_table.cells({**row, "runs": [run(1.0, 2.0), run(3.0, 1.0)]})
  assert cells[3:7] == ["3", "2", "5", "15"]
  assert suite_table.cells({**row, "runs": [run(1.0, None), run(3.0, 1.0)]})[4] == "-"
  kept = {"rows": [{**row, "runs": [run(1.0, 2.0)]}], "about": "A.", "begins": [0.5]}
  results = {"given": {"seeds": 1, "seconds": 1.0}, "problems": {"p": kept}}
  text = suite_table.page(results, ["p", "q"], ["m", "n"])
  assert "Not measured yet: n." in text
  assert "Problems that are not measured yet: q." in text
  series = np.array([1.0, np.nan, 1e-5, 1e-3])
  assert bilevel_suite.first_below(series, 1e-4) == 2
  assert bilevel_suite.first_below(series, 1e-6) is None
  problem = small()
  assert BY_NAME["plain SABA"].passes(problem) == (3 * 2 + 2) / 24
  assert BY_NAME["jaxbo AID, L-BFGS, all data"].passes(problem) == (13 * 12 + 12) / 24
