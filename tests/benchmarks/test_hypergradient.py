"""The benchmark measures what it says; no test here asks how long anything takes."""

import functools
import json
import math
import sys

import jax
import numpy as np
import optax
import pytest

import jaxbo
from benchmarks import hypergradient, measure, problems, report
from benchmarks.hypergradient import Target

pytestmark = pytest.mark.slow  # All together, not each.


def small_quadratic():
  return problems.quadratic(5.0, size=12, num_outer=4)


@functools.cache
def small_steps():
  return hypergradient.make_steps(small_quadratic())


@functools.cache
def small_table():
  return hypergradient.table(small_quadratic(), small_steps(), 1, 1)


def small_digits():
  """Digits with little data: weights of 40 examples, every fourth pixel."""
  problem = problems.digits()
  train, val = ((images[:40, ::4], labels[:40]) for images, labels in (problem.train, problem.val))
  y0 = problem.y0 | {"w": problem.y0["w"][:, ::4]}
  return problem._replace(x=problem.x[:40], drift=problem.drift[:40], y0=y0, train=train, val=val)


def test_the_exact_hypergradient_of_a_quadratic_is_the_closed_form():
  problem = small_quadratic()
  hessian, coupling = (np.asarray(matrix, np.float64) for matrix in problem.train)
  x, target = (np.asarray(vector, np.float64) for vector in (problem.x, problem.val))
  y = np.linalg.solve(hessian, coupling @ x)
  expected = 0.01 * x + coupling.T @ np.linalg.solve(hessian, y - target) / 12
  np.testing.assert_allclose(problems.exact_hypergradient(problem), expected, rtol=1e-9)


def test_the_exact_hypergradient_of_hyper_cleaning_is_that_of_long_unrolling():
  problem = small_digits()
  inner = jaxbo.inner_solver(problem.inner_loss, optax.sgd(1.0, 0.9), 3000, remat=True)
  head = jaxbo.add_unrolled_response(inner)
  hypergradient, *_ = hypergradient_of(problem, inner, head)
  exact = problems.exact_hypergradient(problem)
  assert np.linalg.norm(hypergradient - exact) < 1e-3 * np.linalg.norm(exact)


def hypergradient_of(problem, inner, head):
  def step(x, solution, train, val):
    solution = inner.solve(x, solution, train)
    grads = jax.grad(problem.outer_loss, (0, 1))(x, solution.params, val)
    return head.update(grads, head.init(x), x, solution=solution, batch=train)

  return jax.jit(step)(problem.x, inner.init(problem.y0), problem.train, problem.val)


def test_rows_of_a_small_quadratic():
  rows = {row.name: row for row in small_table()}
  assert math.isnan(rows["inner solve"].error)
  assert rows["inner solve"].ratio == 1.0
  # 50 steps at condition 5 leave 1e-5 of the error; CG needs at most 12 steps.
  assert rows["first order"].error > 0.1
  for name in ("ITD", "ITD, remat", hypergradient.AID, hypergradient.WARM_AID):
    assert rows[name].error < 1e-2, name
  assert rows["ITD, last 25"].error < rows["first order"].error
  # Q inner runs and one more, up to the directions and the sums.
  assert rows[hypergradient.ESJ].mflop / rows["inner solve"].mflop == pytest.approx(65, rel=0.1)


def test_jaxopt_differentiates_the_same_problem():
  pytest.importorskip("jaxopt", reason="group bench is not installed")
  steps = small_steps()
  for ours, theirs in (
    (hypergradient.AID, hypergradient.JAXOPT_AID),
    ("ITD", hypergradient.JAXOPT_ITD),
  ):
    for adapt in (lambda step: step, hypergradient.without_diagnostics):
      np.testing.assert_allclose(adapt(steps[ours])()[0], adapt(steps[theirs])()[0], rtol=1e-4)


def test_remat_stores_less():
  memory = hypergradient.remat_memory(num_steps=100, size=64)
  assert memory["parameters"] == 2 * 64 * 4
  assert memory["plain"] > 100 * 3 * 64 * 4  # parameters and two moments of Adam, every step
  assert memory["remat"] < memory["plain"] / 3


def test_a_target_is_missed_above_its_limit_and_for_nan():
  assert [Target("", value, 1.0).verdict for value in (0.5, 1.0, 1.1, math.nan)] == [
    "PASS",
    "PASS",
    "MISSED",
    "MISSED",
  ]


def test_tables_are_markdown_that_reads_well():
  assert report.markdown(["name", "n"], [["a", "1"], ["long name", "10"]]) == (
    "| name      |  n |\n|-----------|---:|\n| a         |  1 |\n| long name | 10 |"
  )
  values = [1.0, 0.012345, 123.4, 1234.5, math.nan]
  assert [report.number(value) for value in values] == ["1", "0.0123", "123", "1,234", "-"]


def test_the_command_prints_and_saves(tmp_path, capsys, monkeypatch):
  problem, steps, rows = small_quadratic(), small_steps(), small_table()
  monkeypatch.setattr(problems, "quadratic", lambda condition: problem)
  monkeypatch.setattr(problems, "digits", lambda: problem)
  monkeypatch.setattr(hypergradient, "make_steps", lambda problem: steps)
  monkeypatch.setattr(hypergradient, "table", lambda *args: rows)
  memory = {"plain": 100, "remat": 5, "parameters": 1}
  monkeypatch.setattr(hypergradient, "remat_memory", lambda: memory)
  fixed = lambda programs, *args: {name: measure.Timing(1e-3, 1.0, 0.0) for name in programs}
  monkeypatch.setattr(measure, "time_together", fixed)
  path = tmp_path / "results" / "out"
  monkeypatch.setattr(sys, "argv", ["hypergradient", "--save", str(path)])
  hypergradient.main()
  out = capsys.readouterr().out
  text = path.with_suffix(".md").read_text()
  assert "Targets" in out
  assert text.count("| ITD ") == 3
  data = json.loads(path.with_suffix(".json").read_text())
  assert data["remat"] == memory
  verdicts = {target["claim"]: target["verdict"] for target in data["targets"]}
  assert [verdict for claim, verdict in verdicts.items() if "remat" in claim] == ["PASS"]
  assert [verdict for claim, verdict in verdicts.items() if "ESJ" in claim] == ["PASS"]
  assert f"jax {jax.__version__}" in data["hardware"]


@pytest.mark.parametrize("argument", ["--rounds", "--calls"])
def test_zero_rounds_are_refused(monkeypatch, capsys, argument):
  monkeypatch.setattr(sys, "argv", ["hypergradient", argument, "0"])
  with pytest.raises(SystemExit):
    hypergradient.main()
  assert f"{argument} must be at least 1, got 0" in capsys.readouterr().err
