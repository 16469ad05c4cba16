"""The plug-in for benchopt, in a room that has no benchopt: its base class is a stub."""

import importlib
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.suite_problems import exact, quadratic

pytestmark = pytest.mark.slow


class BaseSolver:
  """What the plug-in needs of benchopt's."""

  def __init__(self, **options):
    for name, values in self.parameters.items():
      setattr(self, name, options.get(name, values[0]))

  def run_once(self, num_looks):
    looks = iter([True] * num_looks + [False])
    self.run(lambda: next(looks))


@pytest.fixture
def solver(monkeypatch):
  monkeypatch.setitem(sys.modules, "benchopt", types.SimpleNamespace(BaseSolver=BaseSolver))
  monkeypatch.delitem(sys.modules, "benchmarks.benchopt.jaxbo_solver", raising=False)
  return importlib.import_module("benchmarks.benchopt.jaxbo_solver").Solver


def losses(problem):
  """As the benchmark hands them over: the inner variable first, and where a minibatch starts."""

  def of(loss, data):
    cut = lambda leaf, start, size: jnp.asarray(leaf)[start + jnp.arange(size)]
    part = lambda start, size: tuple(cut(leaf, start, size) for leaf in data)
    minibatch = lambda y, x, start=0, batch_size=1: loss(x, y, part(start, batch_size))
    return minibatch, lambda y, x: loss(x, y, tuple(map(jnp.asarray, data)))

  inner = of(problem.inner_loss, problem.train)
  return inner, of(problem.outer_loss, problem.val)


@pytest.mark.parametrize(
  ("method", "ends_below"), [("saba", 1e-7), ("srba", 1e-5), ("amigo", 0.2), ("aid", 1e-7)]
)
def test_a_method_runs_as_benchopt_runs_it(solver, method, ends_below):
  """Methods with variance reduction reach the solution; AmIGO the noise around it."""
  problem = quadratic(0, n=12, d=4, p=3, batch_size=2)
  (f_inner, f_inner_fb), (f_outer, f_outer_fb) = losses(problem)
  one = solver(method=method, step_size=0.1, outer_ratio=1.0, batch_size=2, eval_freq=300)
  one.set_objective(
    f_inner=f_inner,
    f_outer=f_outer,
    n_inner_samples=12,
    n_outer_samples=12,
    inner_var0=problem.y,
    outer_var0=problem.x,
    f_inner_fb=f_inner_fb,
    f_outer_fb=f_outer_fb,
  )
  one.run_once(5)
  result = one.get_result()
  at = exact(problem)
  value = lambda x, y: np.sum(at(x, y)[0] ** 2)
  begin = value(problem.x, problem.y)
  assert value(result["outer_var"], result["inner_var"]) < ends_below * begin
