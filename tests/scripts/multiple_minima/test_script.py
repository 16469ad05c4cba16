"""All methods where the inner problem has many minima, small: toys, budgets, files, resumption."""

import csv
import dataclasses
import itertools
import json
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

import jaxbo
from scripts.common import cleaning
from scripts.multiple_minima import __main__ as multiple_minima
from scripts.multiple_minima import cleaning as minima_cleaning
from scripts.multiple_minima import equal_budget, loops, toys
from scripts.multiple_minima import tune as tune_multiple_minima
from scripts.multiple_minima.__main__ import Config
from scripts.multiple_minima.equal_budget import Cost
from tests.bilevel import value_problems as vp

pytestmark = pytest.mark.slow  # All together, not each.

BUDGET = 40
SMALL = dataclasses.replace(
  minima_cleaning.DATASETS["digits"], num_train=40, num_val=20, hidden=(8,)
)


@pytest.fixture
def small(monkeypatch):
  """Small problems, and times that are not measured."""
  monkeypatch.setitem(minima_cleaning.DATASETS, "digits", SMALL)
  monkeypatch.setattr(minima_cleaning, "RETRAINING_STEPS", 20)
  for name, toy in toys.TOYS.items():
    monkeypatch.setitem(toys.TOYS, name, toy._replace(num_updates=20))
  seconds = lambda program: program.gradients * (2.0 if program.gradients > 1.5 else 1.0)
  monkeypatch.setattr(
    equal_budget,
    "measure_costs",
    lambda programs, problems: {
      name: Cost(seconds(program), 1024) for name, program in programs.items()
    },
  )


def config(path, **kwargs):
  small = {"methods": ("pdbo", "itd"), "toys": ("T1",), "seeds": 2, "budget": BUDGET}
  return Config(output_dir=path, **(small | kwargs))


def rows_of(path):
  with (path / "results.csv").open() as file:
    return list(csv.DictReader(file))


def lines_of(path):
  return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_a_run_prints_its_tables_and_writes_its_files(small, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(multiple_minima, "BASELINES", ("everything", "validation"))
  spread = lambda settings, x, key, problem: jnp.std(x)  # Zero for the logits of the start.
  monkeypatch.setattr(minima_cleaning, "retrained_accuracy", spread)
  assert multiple_minima.main(config(tmp_path, seeds=1)) == 0
  output = capsys.readouterr().out
  for word in (
    "T1 distance",
    "T1 gap",
    "PDBO",
    "validation only",
    "50% of labels",
    "retrained",
  ):
    assert word in output
  assert "T2" not in output
  methods = ["everything", "validation", "pdbo", "itd"]
  rows, lines = rows_of(tmp_path), lines_of(tmp_path)
  assert [(row["method"], row["seed"]) for row in rows] == [(method, "0") for method in methods]
  limit = BUDGET * float(rows[0]["seconds_per_step"])  # A step of plain training is one gradient.
  for row in rows:
    mine = [
      line for line in lines if (line["method"], str(line["seed"])) == (row["method"], row["seed"])
    ]
    # Both budgets were spent, and what is reported lies within each.
    assert mine[-1]["gradients"] >= BUDGET
    assert mine[-1]["seconds"] >= limit
    assert mine[-2]["gradients"] < BUDGET or mine[-2]["seconds"] < limit
    of_gradients = [line for line in mine if line["gradients"] <= BUDGET + 1e-9][-1]
    of_seconds = [line for line in mine if line["seconds"] <= limit + 1e-9][-1]
    assert float(row["accuracy"]) == of_gradients["accuracy"]
    assert float(row["accuracy_at_seconds"]) == of_seconds["accuracy"]
    assert float(row["steps"]) * float(row["gradients_per_step"]) <= BUDGET + 1e-9
    assert ["retrained" in line for line in mine] == [False] * (len(mine) - 1) + [True]
    assert (mine[-1]["retrained"] is None) == (row["method"] in minima_cleaning.BASELINES)
    assert mine[-1]["retrained"] != 0  # With the weights that were learnt.
    assert (row["auc"] == "nan") == (row["method"] == "validation")
  of_pdbo = [line for line in lines if line["method"] == "pdbo"]
  assert all(line["dual"] >= 0 for line in of_pdbo)
  assert all(line["dual"] is None for line in lines if line["method"] == "itd")
  for name in multiple_minima.PICTURES:
    with Image.open(tmp_path / name) as picture:
      assert picture.height > 1000


def test_a_resumed_run_is_that_of_no_interruption(small, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(multiple_minima, "BASELINES", ("everything",))
  options = {"toys": (), "methods": ("pdbo",)}
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  assert multiple_minima.main(config(whole, **options)) == 0
  scores, calls = cleaning.detection_scores, itertools.count(1)
  with monkeypatch.context() as patch:

    def interrupted(weights, corrupted):  # Once for each point.
      if next(calls) == 25:
        raise KeyboardInterrupt
      return scores(weights, corrupted)

    patch.setattr(cleaning, "detection_scores", interrupted)
    assert multiple_minima.main(config(parts, **options)) == 130
  assert "Interrupted; --resume goes on" in capsys.readouterr().out
  before = lines_of(parts)
  assert {(line["method"], line["seed"]) for line in before} == {("everything", 0)}
  assert multiple_minima.main(config(parts, resume=True, **options)) == 0
  assert lines_of(parts) == lines_of(whole)
  assert rows_of(parts) == rows_of(whole)
  assert lines_of(parts)[: len(before)] == before


def test_only_the_same_run_is_resumed(small, tmp_path, capsys):
  nothing = tmp_path / "nothing"
  assert multiple_minima.main(config(nothing, resume=True)) == 2
  assert "resume needs an earlier run in output_dir, none in" in capsys.readouterr().err
  assert multiple_minima.prepare_output(config(tmp_path)) == ({}, {})
  assert multiple_minima.prepare_output(config(tmp_path, resume=True)) == ({}, {})
  assert multiple_minima.main(config(tmp_path, budget=BUDGET + 1, resume=True)) == 2
  assert f"budget must be {BUDGET} to resume, got {BUDGET + 1}" in capsys.readouterr().err


@pytest.mark.parametrize(
  "wrong, message",
  [
    ({"dataset": "cifar"}, "dataset must be one of digits, mnist; got 'cifar'"),
    ({"methods": ("pdbo", "magic")}, "methods must be among pdbo, proximal_pdbo, bome, v_pbgd, "),
    ({"methods": ()}, "methods must be among pdbo, proximal_pdbo, bome, v_pbgd, f2sa, itd, aid, "),
    ({"methods": ("itd", "itd")}, "methods must name each once, got itd itd"),
    ({"toys": ("T9",)}, "toys must be among T1, T2, T3, T4; got T9"),
    ({"toys": (), "seeds": 0}, "toys must not be empty with seeds 0"),
    ({"corruption": 1.0}, "corruption must be in [0, 1), got 1.0"),
    ({"seeds": -1}, "seeds must not be negative, got -1"),
    ({"first_seed": -1}, "first_seed must not be negative, got -1"),
    ({"budget": 0}, "budget must be at least 1, got 0"),
    ({"dataset": "mnist", "data_dir": "/nowhere"}, "Expected: mnist/<version>/ with"),
  ],
)
def test_bad_input_says_what_is_allowed_and_touches_no_file(tmp_path, capsys, wrong, message):
  assert multiple_minima.main(config(tmp_path, **wrong)) == 2
  assert message in capsys.readouterr().err
  assert not list(tmp_path.iterdir())


def test_a_step_that_costs_more_than_the_budget_is_reported_as_nothing():
  points = [{"gradients": 30.0, "accuracy": 0.5}, {"gradients": 60.0, "accuracy": 0.6}]
  assert equal_budget.within(points, "gradients", 60.0)["accuracy"] == 0.6
  assert equal_budget.within(points, "gradients", 59.0)["accuracy"] == 0.5
  assert math.isnan(equal_budget.within(points, "gradients", 29.0)["accuracy"])


def test_a_curve_goes_on_until_both_budgets_are_spent_and_draws_new_batches_each_time():
  keys = []

  def run(state, key, problem):
    keys.append(tuple(jax.random.key_data(key).tolist()))
    return state + problem

  measure = lambda state, problem: {"accuracy": state / problem}
  program = equal_budget.Program(lambda problem: 0, run, lambda state: state, measure, 3, 2.0)
  for limit, seconds, num_points in ((0.0, 1.0, 4), (25.0, 1.0, 9), (25.0, 0.1, 84)):
    keys.clear()
    points = list(equal_budget.curve(program, 10, 7, 20.0, limit, seconds))
    assert len(points) == len(set(keys)) == num_points
    point, state = points[3]
    assert point == {"steps": 12, "gradients": 24.0, "seconds": 12 * seconds, "accuracy": 4}
    assert state == 40
  first = keys[0]
  keys.clear()
  list(equal_budget.curve(program, 10, 8, 20.0, 0.0, 1.0))
  assert keys[0] != first


def test_a_method_without_its_last_line_is_not_finished():
  line = lambda method, **more: {"method": method, "seed": 0, "auc": None, **more}
  cells = equal_budget.finished([line("itd"), line("itd", retrained=None), line("pdbo")])
  assert list(cells) == [("itd", 0)]
  assert len(cells["itd", 0]) == 2
  assert math.isnan(cells["itd", 0][0]["auc"])


# What the toys show.


def test_responses_cannot_move_along_a_flat_inner_direction():
  """T1 from y2 = 0: x ends at (1 + y2) / 2 and f at (1 - y2)^2 / 4."""
  toy = toys.TOYS["T1"]
  for method in toys.RESPONSES:
    params, gap, dual = toys.run(method, toy)
    np.testing.assert_allclose(params.outer[-1], 0.5, atol=1e-3)
    np.testing.assert_allclose(params.inner[-1], [0.5, 0.0], atol=1e-3)
    np.testing.assert_allclose(gap[-1], 0, atol=1e-9)
    assert np.isnan(dual).all()
    assert len(gap) == len(params.outer) == toy.num_updates + 1


@pytest.mark.parametrize("method", ["pdbo", "proximal_pdbo"])
def test_primal_dual_methods_end_at_the_closed_form_of_t2(method):
  toy = toys.TOYS["T2"]
  params, gap, dual = toys.run(method, toy)
  slack = toy.rates.slack
  e = np.sqrt(2 * slack)
  np.testing.assert_allclose(params.outer[[0, -1]], [3, 2 + e / 2], atol=1e-4)
  np.testing.assert_allclose(params.inner[-1], [2 - e / 2, 2 + e / 2], atol=1e-4)
  np.testing.assert_allclose(dual[-1], 1 / e - 0.5, rtol=1e-3)
  np.testing.assert_allclose(gap[-1], slack, rtol=1e-2)


@pytest.mark.parametrize("method", toys.LABELS)
def test_a_slow_multiplier_leaves_the_nearest_valley(method):
  """T4 starts in another valley than the solution's: 2 pi apart in x + y."""
  toy = toys.TOYS["T4"]
  params, _, _ = toys.run(method, toy)
  stays = method in (*toys.RESPONSES, "bome")
  valley = 1.5 * np.pi + 2 + (2 * np.pi if stays else 0)
  np.testing.assert_allclose(params.outer[-1] + params.inner[-1], valley, atol=0.15)


# Parts.


def test_alternating_levels_are_the_tail_of_f2sa():
  options = {"multiplier": 2.0, "num_steps": 1, "inner_optimizer": optax.sgd(1.0)}
  head = jaxbo.add_value_function_penalty(vp.flat_inner, **options)
  for alternate in (None, 2):
    tail = loops.levels(optax.sgd(0.1), optax.sgd(0.05), alternate)
    f2sa = jaxbo.f2sa(0.1, 0.05, vp.flat_inner, alternate=alternate, **options)
    ends = [
      vp.descend(tx, vp.active_outer, vp.start(0.5, (1.0, -1.0)), 7)[0][0]
      for tx in (optax.chain(head, tail), f2sa)
    ]
    chex.assert_trees_all_equal(*ends)


@pytest.fixture(scope="module")
def data():
  return cleaning.split(*cleaning.read("digits"), SMALL, 0.5, seed=0)


def test_baselines_have_the_examples_that_their_names_say(data):
  problem = {
    name: minima_cleaning.make_problem(name, data, SMALL, 0)
    for name in (*minima_cleaning.BASELINES, "pdbo")
  }
  weights = {name: jax.nn.sigmoid(p.x) for name, p in problem.items()}
  for name, share in {"everything": 1, "oracle": 0.5, "pdbo": 0.5, "validation": 1}.items():
    np.testing.assert_allclose(jnp.mean(weights[name]), share, atol=1e-6)
  np.testing.assert_array_equal(weights["oracle"] < 0.5, data.corrupted)
  np.testing.assert_array_equal(problem["validation"].train.labels, data.val.labels)
  both = problem["oracle_validation"]
  assert len(both.train.labels) == 60
  np.testing.assert_array_equal(both.train.images[40:], data.val.images)
  assert jnp.sum(weights["oracle_validation"]) == pytest.approx(20 + 20)


def test_retraining_is_training_with_the_weights_alone(data):
  """With those of the oracle it is the oracle."""
  problem, oracle = (
    minima_cleaning.make_problem(name, data, SMALL, 0) for name in ("pdbo", "oracle")
  )
  loop, key = minima_cleaning.make_loop("oracle", SMALL, {}), lambda: jax.random.key(1)
  run = minima_cleaning.make_run(loop, SMALL, minima_cleaning.RETRAINING_STEPS)
  model = loop.params(run(loop.init(oracle.x, oracle.y), key(), oracle)).inner
  expected = cleaning.accuracy(SMALL, model, oracle.test)
  assert expected == minima_cleaning.retrained_accuracy(SMALL, oracle.x, key(), problem)
  assert expected > minima_cleaning.retrained_accuracy(SMALL, problem.x, key(), problem)


def test_a_point_of_a_curve_against_numpy(data):
  problem = minima_cleaning.make_problem("pdbo", data, SMALL, 0)
  x = jnp.linspace(-1.0, 1.0, 40)
  point = minima_cleaning.measure(SMALL, jaxbo.Bilevel(x, problem.y), problem)
  logits = np.asarray(cleaning.logits(SMALL, problem.y, problem.train.images), np.float64)
  labels = np.asarray(problem.train.labels)
  loss = np.log(np.exp(logits).sum(0)) - logits[labels, np.arange(40)]
  np.testing.assert_allclose(point["gap"], np.mean(loss / (1 + np.exp(-x))), rtol=1e-5)
  learnt = (logits.argmax(0) == labels)[data.corrupted].mean()
  np.testing.assert_allclose(point["wrong_learnt"], learnt)


def test_the_unit_of_cost_is_one_gradient(data):
  """Plain training costs one; PDBO N + 2 and the outer gradient; ITD about three a step."""
  chosen = {"outer": 0.1, "num_steps": 6, "slack": 0.1, "dual_learning_rate": 1.0}

  def gradients(name, chosen):
    problem = minima_cleaning.make_problem(name, data, SMALL, 0)
    loop = minima_cleaning.make_loop(name, SMALL, chosen)
    return equal_budget.cost_of_a_step(loop, chosen, SMALL, problem)

  assert gradients("everything", {}) == pytest.approx(1, abs=0.15)
  # Of g(x, y_hat) only the gradient in x is needed: a third. The outer loss has half the examples.
  assert gradients("pdbo", chosen) == pytest.approx(6 + 1 + 1 / 3 + 1 / 2, rel=0.15)
  assert 12 < gradients("itd", {"outer": 0.1, "inner": 0.1, "num_steps": 6}) < 24


def test_batches_are_drawn_where_the_settings_say_so(data):
  settings = dataclasses.replace(SMALL, batch_size=5)
  problem = minima_cleaning.make_problem("pdbo", data, settings, 0)
  seen = []

  def step(state, train, val):
    seen.append(train)
    return state

  for num_batches, shape in ((None, (5,)), (3, (3, 5))):
    loop = loops.Loop(lambda x, y: x, step, lambda state: state, num_batches)
    minima_cleaning.make_run(loop, settings, 1)(0.0, jax.random.key(0), problem)
    assert seen[-1].indices.shape == seen[-1].examples.labels.shape == shape
  for name in ("pdbo", "f2sa", "aid", "esj"):
    chosen = {key: values[0] for key, values in minima_cleaning.METHODS[name].grid.items()}
    loop = minima_cleaning.make_loop(name, settings, chosen)
    run = minima_cleaning.make_run(loop, settings, 2)
    state = jax.eval_shape(run, loop.init(problem.x, problem.y), jax.random.key(0), problem)
    assert loop.params(state).outer.shape == (40,)


def test_tuning_prints_the_best_point_of_a_grid(small, tmp_path, capsys, monkeypatch):
  grid = {"outer": (0.1, 0.3), "inner": (0.1,), "num_steps": (1,)}
  method = minima_cleaning.METHODS["itd"]._replace(grid=grid)
  monkeypatch.setitem(minima_cleaning.METHODS, "itd", method)
  scores = {0.1: [0.2, 0.4], 0.3: [0.5, 0.0]}
  monkeypatch.setattr(
    tune_multiple_minima, "score", lambda name, chosen, *args: scores[chosen["outer"]]
  )
  options = {"methods": ("itd",), "output": tmp_path / "tune.jsonl", "budget": 10}
  tune_multiple_minima.main(tune_multiple_minima.Config(**options))
  assert capsys.readouterr().out == 'itd: 0.300 {"outer": 0.1, "inner": 0.1, "num_steps": 1}\n'
  assert len((tmp_path / "tune.jsonl").read_text().splitlines()) == 2


def test_a_score_is_the_test_accuracy_at_the_end_of_the_budget(data):
  chosen = {"outer": 0.1, "inner": 0.1, "num_steps": 1}
  [score] = tune_multiple_minima.score("itd", chosen, SMALL, 30, {0: data})
  program = equal_budget.make_program("itd", chosen, SMALL, 30, data, num_points=1)
  problem = minima_cleaning.make_problem("itd", data, SMALL, 0)
  state = program.run(program.init(problem), jax.random.key(0), problem)
  assert 1 < program.steps <= 30
  assert score == program.measure(state, problem)["accuracy"]
