"""The benchmark of value-function methods measures what it says; no test asks how long it takes."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import bilevel_quadratic, value_function
from benchmarks.value_function import METHODS, make_variant, points

pytestmark = pytest.mark.slow  # All together, not each.


@pytest.mark.parametrize("flat", [False, True])
def test_the_optimum_solves_the_constrained_problem(flat):
  """Against the KKT system of: least f where the inner gradient vanishes."""
  problem = bilevel_quadratic.random_quadratic(flat, 3)
  (hessian, coupling, linear), (outer_hessian, outer_linear) = problem.inner, problem.outer
  constraint = np.hstack([coupling, hessian])
  zero = np.zeros((len(hessian), len(hessian)))
  kkt = np.block([[outer_hessian, constraint.T], [constraint, zero]])
  solution = np.linalg.lstsq(kkt, -np.concatenate([outer_linear, linear]), rcond=1e-12)[0]
  np.testing.assert_allclose(problem.optimum, solution[: len(problem.optimum)], atol=1e-8)
  rank = np.linalg.matrix_rank(hessian)
  assert rank == (50 if flat else 100)


def test_the_smoothness_is_that_of_the_losses(x64):
  problem = bilevel_quadratic.as_arrays(bilevel_quadratic.random_quadratic(True, 3))
  x, y = bilevel_quadratic.start()
  smooth_f, smooth_g, smooth_h = problem.smoothness
  outer_loss = lambda z: bilevel_quadratic.outer_loss(z[:50], z[50:], problem.outer)
  inner_loss = lambda y: bilevel_quadratic.inner_loss(x, y, problem.inner)
  z = np.zeros(150)
  outer, inner = jax.jit(lambda y, z: (jax.hessian(outer_loss)(z), jax.hessian(inner_loss)(y)))(
    y, z
  )
  np.testing.assert_allclose(np.linalg.norm(outer, 2), smooth_f, rtol=1e-9)
  np.testing.assert_allclose(np.linalg.norm(inner, 2), smooth_g, rtol=1e-9)
  inverse = np.linalg.pinv(inner, rtol=1e-10)

  def gap(z):
    least = -inverse @ (problem.inner[1] @ z[:50] + problem.inner[2])
    of = lambda y: bilevel_quadratic.inner_loss(z[:50], y, problem.inner)
    return of(z[50:]) - of(least)

  hessian = jax.jit(jax.hessian(gap))(z)
  np.testing.assert_allclose(np.linalg.norm(hessian, 2), smooth_h, rtol=1e-6)


@pytest.fixture(scope="module")
def variants():
  with jax.enable_x64(True):
    problem = bilevel_quadratic.as_arrays(bilevel_quadratic.random_quadratic(False, 0))
    return {
      variant.label: variant
      for name, method in METHODS.items()
      for static in points(method.static)[: 2 if name == "PDBO" else 1]
      for variant in [make_variant(name, static, problem, 2000)]
    }


def test_an_update_costs_num_steps_plus_3_gradients(variants):
  for variant in variants.values():
    num_steps = variant.static.get("num_steps", 1)
    assert variant.gradients == num_steps + 3, variant.label
    if not METHODS[variant.name].products:  # Then that is all it costs.
      assert variant.cost == pytest.approx(num_steps + 3.85, abs=0.15), variant.label
    else:
      assert variant.cost > num_steps + 5, variant.label
    assert variant.temporary_bytes > 0


def test_all_methods_have_grids_of_one_size():
  for name, method in METHODS.items():
    assert len(points(method.static)) * len(points(method.traced)) == 32, name


def test_implicit_differentiation_wins_where_the_inner_minimum_is_unique_and_is_lost_elsewhere(
  variants, x64
):
  end = {}
  for flat in (False, True):
    problem = bilevel_quadratic.as_arrays(bilevel_quadratic.random_quadratic(flat, 0))
    soba = variants["SOBA-style, num steps 1"].run(problem, {"rate": 0.3, "inner_rate": 1.0})
    f2sa = variants["F2SA, alternate 3"].run(problem, {"multiplier": 30.0, "rate": 0.1})
    end[flat] = float(soba[-1]), float(jnp.min(f2sa))
  assert end[False][0] < 1e-4 < end[False][1] < 0.2
  assert end[True][1] < 0.2 < end[True][0]


def test_updates_until_an_accuracy_that_lasts():
  trace = np.array([0.5, 0.2, 0.3, 0.1])
  assert value_function.updates_to_reach(trace, 0.5) == 1
  assert value_function.updates_to_reach(trace, 0.2) == 4
  assert value_function.updates_to_reach(trace, 0.3) == 2
  assert value_function.updates_to_reach(trace, 0.05) == np.inf
  assert value_function.updates_to_reach(np.array([0.1, np.nan]), 0.5) == np.inf


def test_a_run_prints_and_saves_its_tables(tmp_path, capsys, monkeypatch):
  kept = ("PDBO", "SOBA-style")
  small = {
    name: METHODS[name]._replace(
      static={"num_steps": (1,)},
      traced={key: values[-1:] for key, values in METHODS[name].traced.items()},
    )
    for name in kept
  }
  small["SOBA-style"] = small["SOBA-style"]._replace(traced={"rate": (0.3,), "inner_rate": (1.0,)})
  monkeypatch.setattr(value_function, "METHODS", small)
  options = ["--rounds", "1", "--problems", "2", "--budget", "600", "--save", str(tmp_path / "out")]
  monkeypatch.setattr(sys, "argv", ["x", *options])
  value_function.main()
  text = (tmp_path / "out.md").read_text()
  printed = capsys.readouterr().out
  for title in ("An update", "To reach an accuracy: unique", "To reach an accuracy: flat"):
    assert f"## {title}" in text
    assert f"## {title}" in printed
  data = json.loads((tmp_path / "out.json").read_text())
  assert [row["gradients"] for row in data["updates"]] == [4, 4]
  reached = data["unique"]["SOBA-style"][0]
  assert reached["accuracy"] == 0.1
  assert len(reached["cost"]) == 2
  assert all(0 < cost <= 600 for cost in reached["cost"])
  assert data["flat"]["SOBA-style"][1]["seconds"] is None
