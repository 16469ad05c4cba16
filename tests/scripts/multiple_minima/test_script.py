"""All methods where the inner problem has many minima, small: toys, parts of the data, settings."""

import contextlib
import dataclasses
import io
import json
import math
from pathlib import Path

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
from scripts.common.data import Examples
from scripts.multiple_minima import __main__ as script
from scripts.multiple_minima import config as config_module
from scripts.multiple_minima import loops, methods, toys, training, tuning
from scripts.multiple_minima.__main__ import MultipleMinima
from scripts.multiple_minima.config import Config
from scripts.multiple_minima.training import Parts, make_problem
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
  numbers = lambda entry: {k: v for k, v in entry.items() if v == v and "seconds" not in k}
  of_cleaning = lambda entries: [numbers(entry) for entry in entries if entry.get("toy") != "T1"]
  return list(map(of_cleaning, folder.read(path)[:2]))


def test_a_run_prints_its_tables_and_writes_its_files(whole):
  path, output, _ = whole
  for word in ("T1 distance", "T1 gap", "PDBO", "stopped early", "50% of their labels", "minus"):
    assert word in output
  assert "T2" not in output
  rows = pd.read_csv(path / "results.csv")
  on_toys, rows = rows[rows["toy"] == "T1"], rows[rows["toy"].isna()].set_index("method")
  assert on_toys["method"].tolist() == ["pdbo", "itd"]
  assert rows.index.tolist() == ["everything", "stopped", "validation", "oracle", "pdbo", "itd"]
  spent = rows["steps"] * rows["gradients_per_step"]
  assert (spent <= BUDGET).all()
  assert (spent + rows["gradients_per_step"] > BUDGET).all()
  assert (rows["retrained"].drop("oracle") > 0).all()  # With weights that are not all one.
  assert rows["retrained"][["everything", "stopped", "validation"]].round(3).eq(30).all()
  assert rows.loc["oracle", ["retrained", "auc"]].isna().all()
  assert rows["dual"]["pdbo"] >= 0
  assert rows["dual"].drop("pdbo").isna().all()
  for name in ("toys.png", "cleaning.png"):
    with Image.open(path / name) as picture:
      assert picture.height > 300


def test_a_stopped_run_goes_on_bit_for_bit(whole, tmp_path, monkeypatch):
  small.patch(monkeypatch.setattr, monkeypatch.setitem)
  config = small.config(tmp_path / "run", toys=())
  monkeypatch.setattr(MultipleMinima, "draw", lambda *_: None)  # It takes seconds.
  with programs_kept(whole[2]):
    with stopped_after(3):
      study.run(MultipleMinima(), config)
    assert [len(entries) for entries in read(tmp_path / "run")] == [3, 2]  # In the third cell.
    assert study.run(MultipleMinima(), config.but(resume=True)) == 0
  assert read(tmp_path / "run") == read(whole[0])


@pytest.mark.parametrize(
  "wrong, message",
  [
    ({"toys": (), "seeds": 0}, "seeds must be positive to tune, or without toys"),
    ({"tune": True, "seeds": 0}, "seeds must be positive to tune, or without toys"),
    ({"toys": (), "budget": 0}, "budget should be greater than or equal to 1, got 0"),
    ({"slacks": (0.1, 0.0)}, "slacks should be greater than 0, got 0"),
  ],
)
def test_bad_input_says_what_is_allowed(wrong, message):
  with pytest.raises(ValueError, match=message):
    Config(**wrong)


# The settings, and the data that they were chosen on.


def test_settings_are_chosen_on_examples_that_no_report_uses(tmp_path, monkeypatch):
  """Whatever the seeds; the official test set is in no choice."""
  every = Examples(np.arange(60000.0)[:, None], np.zeros(60000, np.int32))
  official = Examples(-np.ones((5, 1)), np.zeros(5, np.int32))
  for name, num, test in (("digits", 1797, None), ("mnist", 60000, official)):
    monkeypatch.setattr(cleaning, "read", lambda *_: (every.take(slice(num)), test))  # noqa: B023
    settings, used = methods.DATASETS[name], {}
    for tune, seeds in ((True, (100, 101)), (False, (0, 1))):
      part = config_module.read(small.config(tmp_path, dataset=name, tune=tune, slacks=(1.0,)))
      splits = [cleaning.split(part, settings, 0.5, seed) for seed in seeds]
      assert all(not set(s.test.images[:, 0]) & set(s.val.images[:, 0]) for s in splits)
      used[tune] = {x for s in splits for e in s[:3] for x in e.images[:, 0]}
      assert len(part[0].labels) == config_module.TUNED_ON[name] if tune else True
      assert (-1 in used[tune]) == (test is not None and not tune)
    assert not used[True] & used[False]
  assert config_module.read(small.config(tmp_path, seeds=0)) is None


def test_every_method_has_as_many_points_and_a_row_for_each_slack_is_pdbo(tmp_path):
  assert {len(tuning.grid_of(name)) for name in methods.COMPARED} == {16}
  names = list(small.config(tmp_path).variants())
  assert names == [*methods.BASELINES, "pdbo", "itd"]
  variants = small.config(tmp_path, slacks=(0.001, 0.1)).variants()
  of = lambda slack: ("pdbo", small.CHOSEN["pdbo"] | {"slack": slack})
  assert variants == {"slack 0.001": of(0.001), "slack 0.1": of(0.1)}
  with pytest.raises(ValueError, match="no settings were chosen for aid, esj: choose them"):
    small.config(tmp_path, methods=("aid", "pdbo", "esj")).variants()


def test_tuning_writes_the_best_point_of_a_grid(tmp_path, capsys, monkeypatch):
  small.patch(monkeypatch.setattr, monkeypatch.setitem)
  grid = {"outer": (0.1, 0.3), "inner": (0.1,), "num_steps": (1,)}
  monkeypatch.setitem(methods.METHODS, "itd", methods.METHODS["itd"]._replace(grid=grid))
  config = small.config(tmp_path / "run", methods=("itd",), seeds=1, tune=True)
  programs = {}
  with programs_kept(programs):
    assert script.run(config) == 0
  parts = [made for made in programs.values() if isinstance(made, Parts)]
  assert len(parts) == 1  # Rates are arguments of one program.
  rows = pd.read_csv(tmp_path / "run" / "results.csv")
  data = cleaning.split(config_module.read(config), SMALL, 0.5, tuning.FIRST_SEED)
  problem = make_problem("itd", data, SMALL, tuning.FIRST_SEED)
  for point, retrained in zip(tuning.grid_of("itd"), rows["retrained"], strict=True):
    loop = loop_of("itd", SMALL, point)
    run = jax.jit(training.make_run(loop, SMALL, parts[0].steps))
    key = jax.random.fold_in(jax.random.key(tuning.FIRST_SEED), 0)
    x = loop.params(run(loop.init(problem.x, problem.y), key, problem)).outer
    np.testing.assert_allclose(retrained, jnp.std(x), rtol=1e-5)
  written = json.loads((tmp_path / "rates.json").read_text())["digits"]
  assert written["itd"] == tuning.grid_of("itd")[rows["retrained"].argmax()]
  assert written["pdbo"] == small.CHOSEN["pdbo"]
  [ran] = json.loads((tmp_path / "run" / "config.json").read_text())["runs"]
  assert ran["command"].startswith("python -m scripts.multiple_minima ")
  assert " --tune " in ran["command"]
  assert "outer: 0.3" in capsys.readouterr().out


def test_the_first_of_equal_points_is_the_best_and_one_that_diverged_is_the_worst():
  rows = pd.DataFrame({
    "method": "itd", "point": [0, 0, 1, 1, 2, 2, 3, 3],
    "retrained": [0.2, 0.3, 0.5, 0.1, 0.0, 0.6, math.nan, 0.9],
  })  # fmt: skip
  [choice] = tuning.Tuning().choices(rows)
  assert (choice.entry, choice.rates) == (("itd",), tuning.grid_of("itd")[1])
  assert choice.score == pytest.approx(0.3)


@pytest.mark.parametrize("dataset", methods.DATASETS)
def test_the_settings_in_the_sources_are_those_of_the_kept_choice(dataset):
  room = Path(script.__file__).parent
  _, rows, _ = folder.read(room / "results" / f"{dataset}_tune")
  [chosen] = [
    t for name, t in json.loads((room / "rates.json").read_text()).items() if name == dataset
  ]
  choices = tuning.Tuning().choices(pd.DataFrame(rows))
  assert {choice.entry[0]: choice.rates for choice in choices} == chosen
  assert set(chosen) == set(methods.COMPARED)


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
  shares = {"everything": 1, "stopped": 1, "oracle": 0.5, "pdbo": 0.5, "validation": 1}
  for name, share in shares.items():
    np.testing.assert_allclose(jnp.mean(weights[name]), share, atol=1e-6)
    np.testing.assert_array_equal(problem[name].noisy.labels, data.train.labels)
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
  assert expected == training.retrained_accuracy(SMALL, key(), problem._replace(x=oracle.x))
  assert expected > training.retrained_accuracy(SMALL, key(), problem)


PDBO = {"outer": 0.1, "num_steps": 6, "slack": 0.1, "dual_learning_rate": 1.0}


def parts_of(method, problem, **chosen):
  rates = {name: value for name, value in chosen.items() if isinstance(value, float)}
  static = {name: value for name, value in chosen.items() if name not in rates}
  return Parts(method, static, rates, SMALL, 1, problem)


def test_what_a_method_ends_with_against_numpy(data):
  """What has no weights keeps the examples of the smaller losses, as many as are right."""
  for method, chosen in (("pdbo", PDBO), ("everything", {})):
    problem = make_problem(method, data, SMALL, 0)
    problem = problem._replace(x=problem.x + jnp.linspace(-1.0, 1.0, 40))
    parts = parts_of(method, problem, **chosen)
    values, scores, weights = parts.found(parts.init(problem), problem)
    logits = np.asarray(cleaning.logits(SMALL, problem.y, problem.train.images), np.float64)
    labels, x = np.asarray(problem.train.labels), np.asarray(problem.x, np.float64)
    loss = np.log(np.exp(logits).sum(0)) - logits[labels, np.arange(40)]
    np.testing.assert_allclose(values["gap"], np.mean(loss / (1 + np.exp(-x))), rtol=1e-5)
    learnt = (logits.argmax(0) == labels)[data.corrupted].mean()
    np.testing.assert_allclose(values["wrong_learnt"], learnt)
    if method == "pdbo":
      np.testing.assert_array_equal(scores, problem.x)
      np.testing.assert_array_equal(weights, problem.x)
    else:
      kept = np.argsort(loss)[:20]
      np.testing.assert_array_equal(np.sort(np.flatnonzero(weights > 0)), np.sort(kept))
      np.testing.assert_array_equal(np.abs(weights), 30)
      np.testing.assert_allclose(np.diff(scores), -np.diff(loss), atol=1e-5)


def test_early_stopping_keeps_what_has_the_least_outer_loss():
  """The parameter counts steps, and the outer loss is least at three."""
  step = lambda state, train, val: jaxbo.Bilevel(state.outer, state.inner + 1)
  loop = loops.Loop(jaxbo.Bilevel, step, lambda state: state)
  loop = loops.best_of(loop, lambda x, y, val: (y - val) ** 2)
  state, seen = loop.init(0.0, 0.0), []
  for _ in range(5):
    state = loop.step(state, None, 3.0)
    seen.append(float(loop.params(state).inner))
  assert seen == [1, 2, 3, 3, 3]


def test_the_unit_of_cost_is_one_gradient(data):
  """Plain training costs one; PDBO N + 2 and the outer gradient; ITD about three a step."""

  def gradients(name, chosen):
    problem = make_problem(name, data, SMALL, 0)
    return training.cost_of_a_step(loop_of(name, SMALL, chosen), 1, SMALL, problem)

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
  loop, models = loop_of("everything", settings, {}), []
  run = jax.jit(training.make_run(loop, settings, 1))
  for key in map(jax.random.key, (7, 8)):
    models.append(loop.params(run(loop.init(problem.x, problem.y), key, problem)).inner)
  first, second = (np.asarray(jax.tree.leaves(model)[-1]) for model in models)
  assert (first != second).any()
