"""All methods where the inner problem has many minima, small: toys, budgets, files, resumption."""

import contextlib
import dataclasses
import io
import json
import math
import shutil
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
from PIL import Image

import jaxbo
from scripts.common import cleaning, folder, study
from scripts.multiple_minima import __main__ as script
from scripts.multiple_minima import loops, methods, toys, training, tune
from scripts.multiple_minima.__main__ import Config, MultipleMinima
from scripts.multiple_minima.training import Parts, Training, make_problem
from tests.bilevel import value_problems as vp
from tests.scripts.common.stopped import programs_kept, stopped_after
from tests.scripts.multiple_minima import small

pytestmark = pytest.mark.slow  # All together, not each.

SMALL, BUDGET = small.SETTINGS, small.BUDGET


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """The folder of a small run, what it printed, and its programs."""
  path, printed, programs = tmp_path_factory.mktemp("whole"), io.StringIO(), {}
  with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
    small.patch(patch.setattr, patch.setitem)
    with programs_kept(programs):
      assert study.run(MultipleMinima(), small.config(path)) == 0
  return path, printed.getvalue(), programs


def read(path):
  """Lines and rows of hyper-cleaning, without seconds that passed and what is NaN."""
  numbers = lambda entry: {k: v for k, v in entry.items() if v == v and k != "seconds"}
  of_cleaning = lambda entries: [numbers(entry) for entry in entries if entry.get("toy") != "T1"]
  return list(map(of_cleaning, folder.read(path)[:2]))


def test_a_run_prints_its_tables_and_writes_its_files(whole):
  path, output, _ = whole
  for word in ("T1 distance", "T1 gap", "PDBO", "validation only", "50% of labels", "retrained"):
    assert word in output
  assert "T2" not in output
  rows, lines = pd.read_csv(path / "results.csv"), folder.read(path)[0]
  on_toys, rows = rows[rows["toy"] == "T1"], rows[rows["toy"].isna()]
  assert on_toys["method"].tolist() == ["pdbo", "itd"]
  assert rows["method"].tolist() == ["everything", "validation", "pdbo", "itd"]
  limit = BUDGET * rows["seconds_per_step"].iloc[0]  # A step of plain training is one gradient.
  for _, row in rows.iterrows():
    mine = [line for line in lines if line["method"] == row["method"] and "toy" not in line]
    # Both budgets were spent, and what is reported lies within each.
    assert mine[-1]["gradients"] >= BUDGET
    assert mine[-1]["seconds"] >= limit
    assert mine[-2]["gradients"] < BUDGET or mine[-2]["seconds"] < limit
    of_gradients = [line for line in mine if line["gradients"] <= BUDGET + 1e-9][-1]
    of_seconds = [line for line in mine if line["seconds"] <= limit + 1e-9][-1]
    assert row["accuracy"] == of_gradients["accuracy"]
    assert row["accuracy_at_seconds"] == of_seconds["accuracy"]
    assert row["steps"] * row["gradients_per_step"] <= BUDGET + 1e-9
    assert ["retrained" in line for line in mine] == [False] * (len(mine) - 1) + [True]
    assert math.isnan(mine[-1]["retrained"]) == (row["method"] in methods.BASELINES)
    assert mine[-1]["retrained"] != 0  # With the weights that were learnt.
    assert math.isnan(row["auc"]) == (row["method"] == "validation")
  of_cleaning = [line for line in lines if "toy" not in line]
  assert all(line["dual"] >= 0 for line in of_cleaning if line["method"] == "pdbo")
  assert all(math.isnan(line["dual"]) for line in of_cleaning if line["method"] == "itd")
  for name in ("toys.png", "cleaning.png"):
    with Image.open(path / name) as picture:
      assert picture.height > 1000


def test_a_stopped_run_goes_on_bit_for_bit(whole, tmp_path, monkeypatch):
  """From the costs of the whole run: the points of a curve depend on the clock."""
  for name in ("config.json", "notes.json"):
    shutil.copy(whole[0] / name, tmp_path)
  small.patch(monkeypatch.setattr, monkeypatch.setitem)
  config = small.config(tmp_path, toys=(), resume=True)
  monkeypatch.setattr(MultipleMinima, "draw", lambda *_: None)  # It takes seconds.
  with programs_kept(whole[2]):
    with stopped_after(40):
      study.run(MultipleMinima(), config)
    assert [len(entries) for entries in read(tmp_path)] == [40, 1]  # In the second cell.
    assert study.run(MultipleMinima(), config) == 0
  assert read(tmp_path) == read(whole[0])


@pytest.mark.parametrize(
  "wrong, message",
  [
    ({"toys": (), "seeds": 0}, "toys must not be empty with seeds 0"),
    ({"toys": (), "budget": 0}, "budget should be greater than or equal to 1, got 0"),
  ],
)
def test_bad_input_says_what_is_allowed(wrong, message):
  with pytest.raises(ValueError, match=message):
    Config(**wrong)


def test_a_step_that_costs_more_than_the_budget_is_reported_as_nothing():
  points = [{"gradients": 30.0, "accuracy": 0.5}, {"gradients": 60.0, "accuracy": 0.6}]
  assert script.within(points, "gradients", 60.0)["accuracy"] == 0.6
  assert script.within(points, "gradients", 59.0)["accuracy"] == 0.5
  assert math.isnan(script.within(points, "gradients", 29.0)["accuracy"])


def test_a_curve_goes_on_until_both_budgets_are_spent():
  """Three steps of two gradients a point; the unit's seconds times the budget are the limit."""
  for unit, seconds, num_points in ((0.0, 1.0, 4), (1.25, 1.0, 9), (1.25, 0.1, 84)):
    costs = {
      "everything": {"steps": 1, "gradients": 1.0, "seconds": unit},
      "itd": {"steps": 3, "gradients": 2.0, "seconds": seconds},
    }
    run = SimpleNamespace(config=Config(toys=(), seeds=1, budget=20), notes={"costs": costs})
    [_, cell] = MultipleMinima().cells(run)
    assert (cell.key, cell.steps) == ({"method": "itd", "seed": 0}, num_points)


# What the toys show.


def test_responses_cannot_move_along_a_flat_inner_direction():
  """T1 from y2 = 0: x ends at (1 + y2) / 2 and f at (1 - y2)^2 / 4."""
  toy = toys.TOYS["T1"]
  for method in methods.RESPONSES:
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
  slack = toy.slack
  e = np.sqrt(2 * slack)
  np.testing.assert_allclose(params.outer[[0, -1]], [3, 2 + e / 2], atol=1e-4)
  np.testing.assert_allclose(params.inner[-1], [2 - e / 2, 2 + e / 2], atol=1e-4)
  np.testing.assert_allclose(dual[-1], 1 / e - 0.5, rtol=1e-3)
  np.testing.assert_allclose(gap[-1], slack, rtol=1e-2)


@pytest.mark.parametrize("method", methods.COMPARED)
def test_a_slow_multiplier_leaves_the_nearest_valley(method):
  """T4 starts in another valley than the solution's: 2 pi apart in x + y."""
  toy = toys.TOYS["T4"]
  params, _, _ = toys.run(method, toy)
  stays = method in (*methods.RESPONSES, "bome")
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
  return cleaning.split(cleaning.read("digits"), SMALL, 0.5, seed=0)


def test_baselines_have_the_examples_that_their_names_say(data):
  problem = {name: make_problem(name, data, SMALL, 0) for name in (*methods.BASELINES, "pdbo")}
  weights = {name: jax.nn.sigmoid(p.x) for name, p in problem.items()}
  for name, share in {"everything": 1, "oracle": 0.5, "pdbo": 0.5, "validation": 1}.items():
    np.testing.assert_allclose(jnp.mean(weights[name]), share, atol=1e-6)
  np.testing.assert_array_equal(weights["oracle"] < 0.5, data.corrupted)
  np.testing.assert_array_equal(problem["validation"].train.labels, data.val.labels)
  both = problem["oracle_validation"]
  assert len(both.train.labels) == 60
  np.testing.assert_array_equal(both.train.images[40:], data.val.images)
  assert jnp.sum(weights["oracle_validation"]) == pytest.approx(20 + 20)


def loop_of(method, settings, chosen):
  return methods.METHODS[method].make(*cleaning.make_losses(settings), settings, **chosen)


def test_retraining_is_training_with_the_weights_alone(data):
  """With those of the oracle it is the oracle."""
  problem, oracle = (make_problem(name, data, SMALL, 0) for name in ("pdbo", "oracle"))
  loop, key = loop_of("oracle", SMALL, {}), lambda: jax.random.key(1)
  run = training.make_run(loop, SMALL, training.RETRAINING_STEPS)
  model = loop.params(run(loop.init(oracle.x, oracle.y), key(), oracle)).inner
  expected = cleaning.accuracy(SMALL, model, oracle.test)
  assert expected == training.retrained_accuracy(SMALL, oracle.x, key(), problem)
  assert expected > training.retrained_accuracy(SMALL, problem.x, key(), problem)


PDBO = {"outer": 0.1, "num_steps": 6, "slack": 0.1, "dual_learning_rate": 1.0}


def test_a_point_of_a_curve_against_numpy(data):
  problem = make_problem("pdbo", data, SMALL, 0)._replace(x=jnp.linspace(-1.0, 1.0, 40))
  parts = Parts("pdbo", PDBO, SMALL, 1, problem)
  point, weights = parts.measure(parts.init(problem), problem)
  logits = np.asarray(cleaning.logits(SMALL, problem.y, problem.train.images), np.float64)
  labels = np.asarray(problem.train.labels)
  loss = np.log(np.exp(logits).sum(0)) - logits[labels, np.arange(40)]
  np.testing.assert_allclose(weights, 1 / (1 + np.exp(-problem.x)), rtol=1e-6)
  np.testing.assert_allclose(point["gap"], np.mean(loss * weights), rtol=1e-5)
  learnt = (logits.argmax(0) == labels)[data.corrupted].mean()
  np.testing.assert_allclose(point["wrong_learnt"], learnt)


def test_the_unit_of_cost_is_one_gradient(data):
  """Plain training costs one; PDBO N + 2 and the outer gradient; ITD about three a step."""

  def gradients(name, chosen):
    problem = make_problem(name, data, SMALL, 0)
    return training.cost_of_a_step(loop_of(name, SMALL, chosen), chosen, SMALL, problem)

  assert gradients("everything", {}) == pytest.approx(1, abs=0.15)
  # Of g(x, y_hat) only the gradient in x is needed: a third. The outer loss has half the examples.
  assert gradients("pdbo", PDBO) == pytest.approx(6 + 1 + 1 / 3 + 1 / 2, rel=0.15)
  assert 12 < gradients("itd", {"outer": 0.1, "inner": 0.1, "num_steps": 6}) < 24


def test_batches_are_drawn_where_the_settings_say_so_and_anew_in_every_step(data):
  settings = dataclasses.replace(SMALL, batch_size=5)
  problem = make_problem("pdbo", data, settings, 0)
  seen = []

  def step(state, train, val):
    seen.append(train)
    return state

  for num_batches, shape in ((None, (5,)), (3, (3, 5))):
    loop = loops.Loop(lambda x, y: x, step, lambda state: state, num_batches)
    training.make_run(loop, settings, 1)(0.0, jax.random.key(0), problem)
    assert seen[-1].indices.shape == seen[-1].examples.labels.shape == shape
  for name in ("pdbo", "f2sa", "aid", "esj"):
    chosen = {key: values[0] for key, values in methods.METHODS[name].grid.items()}
    loop = loop_of(name, settings, chosen)
    run = training.make_run(loop, settings, 2)
    state = jax.eval_shape(run, loop.init(problem.x, problem.y), jax.random.key(0), problem)
    assert loop.params(state).outer.shape == (40,)
  parts, models = Parts("everything", {}, settings, 1, problem), []
  for seed, t in ((7, 0), (7, 1), (8, 0)):
    start = Training(parts, problem, seed)
    models.append(parts.loop.params(start.step(start.state, t)[0]).inner)
  first = [np.asarray(jax.tree.leaves(model)[-1]) for model in models]
  assert len({leaf.tobytes() for leaf in first}) == 3


def test_tuning_writes_the_best_point_of_a_grid(tmp_path, data, capsys, monkeypatch):
  small.patch(monkeypatch.setattr, monkeypatch.setitem)
  grid = {"outer": (0.1, 0.3), "inner": (0.1,), "num_steps": (1,)}
  monkeypatch.setitem(methods.METHODS, "itd", methods.METHODS["itd"]._replace(grid=grid))
  config = tune.Config(methods=("itd",), budget=30, seeds=1, first_seed=0, output_dir=tmp_path)
  assert study.run(tune.Tune(), config) == 0
  rows = pd.read_csv(tmp_path / "results.csv")
  problem = make_problem("itd", data, SMALL, 0)
  for point, accuracy in zip(tune.grid_of("itd"), rows["accuracy"], strict=True):
    parts = Parts("itd", point, SMALL, 30, problem)
    one = Training(parts, problem, 0)
    assert 1 < parts.steps <= 30
    assert accuracy == one.values(one.step(one.state, 0)[0])["accuracy"]
  chosen = json.loads((tmp_path / "chosen.json").read_text())
  assert chosen == {"itd": tune.grid_of("itd")[rows["accuracy"].argmax()]}
  [ran] = json.loads((tmp_path / "config.json").read_text())["runs"]
  assert ran["command"].startswith("python -m scripts.multiple_minima.tune --seeds 1")
  assert '{"outer"' in capsys.readouterr().out


def test_the_first_of_equal_points_is_the_best():
  rows = pd.DataFrame(
    {"method": "itd", "point": [0, 0, 1, 1, 2, 2], "accuracy": [0.2, 0.3, 0.5, 0.1, 0.0, 0.6]}
  )
  settings, accuracies = tune.best(rows)["itd"]
  assert settings == tune.grid_of("itd")[1]
  assert accuracies.tolist() == [0.5, 0.1]
