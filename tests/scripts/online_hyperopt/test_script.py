"""Online hyperparameter optimization: losses and steps against plain NumPy, files, errors."""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
from PIL import Image

import jaxbo
from scripts.common import data, folder
from scripts.common.checkpoints import latest_step
from scripts.common.data import Examples
from scripts.common.tuning import Choice
from scripts.online_hyperopt import __main__ as script
from scripts.online_hyperopt import config as settings
from scripts.online_hyperopt import methods as online_methods
from scripts.online_hyperopt import plots as online_plots
from scripts.online_hyperopt import problems, runs, streams, tuning
from scripts.online_hyperopt.config import Config
from scripts.online_hyperopt.methods import METHODS, Rates, Setting, Variant
from tests.scripts.common.stopped import programs_kept, stopped_after

pytestmark = pytest.mark.slow  # All together, not each.

RNG = np.random.default_rng(0)
FEATURES, CLASSES, ROUNDS, BATCH = 3, 3, 20, 8
EXAMPLES = Examples(
  RNG.normal(size=(120, FEATURES)).astype(np.float32), (np.arange(120) % CLASSES).astype(np.int32)
)
POOLS = [streams.split_by_class(EXAMPLES, 20, 8, seed) for seed in (0, 1)]
TUNING = problems.loss_tuning(problems.make_features("linear", FEATURES, FEATURES), CLASSES)


@pytest.fixture(scope="module", autouse=True)
def _small_pools():
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(settings.DATASETS, "digits", (20, 8))
    yield


def stream(seeds=(0, 1), examples=EXAMPLES, kind="static", problem="loss_tuning"):
  config = Config(problem=problem, rounds=ROUNDS, batch_size=BATCH)
  return runs.draw(config, settings.Data(examples, None, TUNING), kind, seeds)


# -- Losses and steps, written anew in float64.


def weighted(z, batch):
  z = z - z.max(axis=1, keepdims=True)
  losses = np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(z)), batch.labels]
  return (batch.weights * losses).sum() / batch.weights.sum()


def batches(seed=0):
  """The pairs of batches of the rounds, as the stream of the run gives them."""
  schedule = jax.tree.map(lambda leaf: leaf[seed], stream().schedule)
  of_seed = streams.stream_of(EXAMPLES.images, schedule)
  return [of_seed(jax.random.key(0), t) for t in range(ROUNDS)]


def flat_losses():
  """The losses on ``x [2, classes]`` and a flat ``y``, in plain JAX."""

  def cross_entropy(z, batch):
    losses = jax.nn.logsumexp(z, axis=1) - z[jnp.arange(len(z)), batch.labels]
    return jnp.sum(batch.weights * losses) / jnp.sum(batch.weights)

  def apply(y, batch):
    w, b = y[:-CLASSES].reshape(FEATURES, CLASSES), y[-CLASSES:]
    return batch.images @ w + b[None]

  inner = lambda x, y, batch: cross_entropy(apply(y, batch) / (1 + jnp.exp(-x[:1])) + x[1:], batch)
  return inner, lambda y, batch: cross_entropy(apply(y, batch), batch)


INNER, OUTER = flat_losses()
GRAD_Y = jax.jit(jax.grad(INNER, 1))
HESSIAN = jax.jit(jax.hessian(INNER, 1))
CROSS = jax.jit(jax.jacobian(jax.grad(INNER, 1), 0))
GRAD_F = jax.jit(jax.grad(OUTER))


def played(method, rates, window, rounds):
  """``x`` and ``y`` after some rounds of a method of the script, flat."""
  y = jax.eval_shape(TUNING.init, jax.random.key(0))[1]
  arguments = METHODS[method].make(Setting(TUNING, rates, window, y, ROUNDS))
  loop = jaxbo.online_loop(TUNING.outer_loss, **arguments)
  schedule = jax.tree.map(lambda leaf: leaf[0], stream().schedule)
  of_seed = streams.stream_of(jnp.asarray(EXAMPLES.images), schedule)
  state = loop.init(*TUNING.init(jax.random.key(0)), of_seed)
  state, _ = jax.jit(loop.run, static_argnums=2)(state, of_seed, rounds)
  head = state.y["head"]
  return (
    np.stack([state.x["temperature"], state.x["shift"]]),
    np.concatenate([np.ravel(head["w"]), head["b"]]),
  )


def test_the_losses_of_loss_tuning_are_as_published():
  on_device = lambda batch: jax.tree.map(jnp.asarray, batch)
  x = {"temperature": jnp.array([0.5, -1.0, 2.0]), "shift": jnp.array([0.3, 0.0, -0.7])}
  y = {"features": {}, "head": {"w": jnp.asarray(RNG.normal(size=(3, 3))), "b": jnp.ones(3)}}
  batch = batches()[0].val
  assert len(set(np.asarray(batch.weights).tolist())) > 1
  batch = jax.tree.map(np.asarray, batch)
  z = batch.images @ np.asarray(y["head"]["w"], np.float64) + 1
  scale = 1 / (1 + np.exp(-np.asarray(x["temperature"], np.float64)))
  inner = weighted(z * scale + np.asarray(x["shift"], np.float64), batch)
  assert TUNING.inner_loss(x, y, on_device(batch)) == pytest.approx(inner, rel=1e-5)
  assert TUNING.outer_loss(x, y, on_device(batch)) == pytest.approx(weighted(z, batch), rel=1e-5)
  plain = batch._replace(weights=np.ones(BATCH))  # Equal weights are none.
  assert TUNING.outer_loss(
    x, y, on_device(plain._replace(weights=np.full(BATCH, 0.3)))
  ) == pytest.approx(weighted(z, plain), rel=1e-5)


def conjugate_gradient(matrix, b, start, num_steps):
  v, r = start, b - matrix @ start
  p = r
  for _ in range(num_steps):
    alpha = r @ r / (p @ matrix @ p)
    v, old, r = v + alpha * p, r, r - alpha * (matrix @ p)
    p = r + r @ r / (old @ old) * p
  return v


def test_sobow_takes_its_steps_along_the_window_of_old_estimates():
  alpha, beta, damping, window, rounds = 0.5, 0.5, 0.003, 3, 5
  x, y = np.stack([np.ones(CLASSES), np.zeros(CLASSES)]), np.zeros(FEATURES * CLASSES + CLASSES)
  v, estimates = np.zeros(len(y)), []
  weights = 0.9 ** np.arange(window)
  for train, val, _ in batches()[:rounds]:
    y = y - alpha * np.asarray(GRAD_Y(x, y, train))
    matrix = np.asarray(HESSIAN(x, y, train), np.float64) + damping * np.eye(len(y))
    v = conjugate_gradient(matrix, np.asarray(GRAD_F(y, val), np.float64), v, 5)
    estimates.insert(0, -np.einsum("yjc,y->jc", np.asarray(CROSS(x, y, train)), v))
    kept = estimates[:window]
    x = x - beta * np.einsum("k,kjc->jc", weights[: len(kept)], kept) / weights.sum()
  got = played("sobow", Rates(alpha, beta, damping), window, rounds)
  np.testing.assert_allclose(got[0], x, rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(got[1], y, rtol=1e-3, atol=1e-4)
  assert np.abs(x - np.stack([np.ones(CLASSES), np.zeros(CLASSES)])).max() > 0.05


def test_oagd_as_published_replays_its_window_and_evaluates_old_batches_anew():
  """Momentum, weight decay, schedules, a rest of ``x``, and six terms of the Neumann series."""
  window, rounds = 3, 7
  inner_rates, outer_rates, start = online_methods.published_rates(ROUNDS)
  assert start == 4
  x, y = np.stack([np.ones(CLASSES), np.zeros(CLASSES)]), np.zeros(FEATURES * CLASSES + CLASSES)
  velocity, outer_velocity = np.zeros_like(y), np.zeros_like(x)
  all_batches = batches()
  for t in range(rounds):
    kept = all_batches[max(0, t - window + 1) : t + 1]  # oldest first
    for train, _, _ in kept:
      velocity = 0.9 * velocity + np.asarray(GRAD_Y(x, y, train)) + 1e-4 * y
      y = y - inner_rates[t] * velocity
    if t < start:
      continue
    weights = 0.9 ** np.arange(len(kept))[::-1]
    total = np.zeros_like(x)
    for weight, (train, val, _) in zip(weights / weights.sum(), kept, strict=True):
      term = np.asarray(GRAD_F(y, val), np.float64)
      matrix, series = np.asarray(HESSIAN(x, y, train), np.float64), term
      for _ in range(5):
        term = term - 0.5 * matrix @ term
        series = series + term
      total -= weight * np.einsum("yjc,y->jc", np.asarray(CROSS(x, y, train)), 0.5 * series)
    outer_velocity = 0.9 * outer_velocity + total + 1e-4 * x
    x = x - outer_rates[t] * outer_velocity
  got = played("oagd_published", Rates(0.0, 0.0), window, rounds)
  np.testing.assert_allclose(got[1], y, rtol=1e-4, atol=1e-6)
  moved = x - np.stack([np.ones(CLASSES), np.zeros(CLASSES)])
  assert np.abs(moved).max() > 1e-5
  np.testing.assert_allclose(got[0] - np.stack([np.ones(3), np.zeros(3)]), moved, atol=2e-6)


def test_ogd_leaves_x_and_replay_takes_as_many_steps_as_oagd():
  rates = Rates(0.3, 0.0)
  x, y = played("ogd", rates, 1, 4)
  assert (x == np.stack([np.ones(CLASSES), np.zeros(CLASSES)])).all()
  expected = np.zeros_like(y)
  for train, *_ in batches()[:4]:
    expected = expected - 0.3 * np.asarray(GRAD_Y(x, expected, train))
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-6)
  _, replayed = played("ogd_replay", rates, 3, 4)
  _, of_oagd = played("oagd", Rates(0.3, 1e-9), 3, 4)
  np.testing.assert_allclose(replayed, of_oagd, atol=1e-6)
  assert np.abs(replayed - y).max() > 0.01


def test_published_rates_warm_up_and_fall_at_their_rounds():
  inner, outer, start = online_methods.published_rates(400)
  assert start == 80
  np.testing.assert_allclose(inner[[0, 3, 4, 219, 220, 259, 260, 399]],
                             [0.02, 0.08, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])  # fmt: skip
  np.testing.assert_allclose(outer[[0, 79, 80, 88, 89, 179, 180, 219, 220]],
                             [0, 0, 1e-4, 9e-4, 1e-3, 1e-3, 1e-4, 1e-4, 1e-5])  # fmt: skip


def test_the_true_hypergradient_of_the_ridge_is_that_of_newton_in_float64():
  problem = problems.feature_ridge(FEATURES, CLASSES, -7.0, exact=True)
  x = jnp.array([-7.0, -4.0, -2.0])
  rows = EXAMPLES.images / np.linalg.norm(EXAMPLES.images, axis=1, keepdims=True)
  batch = jax.tree.map(np.asarray, batches()[3])
  unit = lambda level: level._replace(
    images=level.images / np.linalg.norm(level.images, axis=1, keepdims=True)
  )
  batch = batch._replace(train=unit(batch.train), val=unit(batch.val))
  got = jax.jit(problem.hypergradient)(x, batch)

  assert np.allclose(np.linalg.norm(rows, axis=1), 1)
  ridge, y = np.exp(np.asarray(x, np.float64)), np.zeros((FEATURES, CLASSES))
  one_hot = np.eye(CLASSES)

  def gradient(y, level):
    z = level.images @ y
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return level.images.T @ (p - one_hot[level.labels]) / BATCH, p

  for _ in range(30):
    g, p = gradient(y, batch.train)
    curvature = np.einsum("nc,cd->ncd", p, one_hot) - np.einsum("nc,nd->ncd", p, p)
    images = batch.train.images.astype(np.float64)
    hessian = np.einsum("ni,ncd,nj->icjd", images, curvature, images).reshape(9, 9) / BATCH
    hessian += np.kron(np.diag(ridge), one_hot)
    y = y - np.linalg.solve(hessian, (g + ridge[:, None] * y).ravel()).reshape(y.shape)
  v = np.linalg.solve(hessian, gradient(y, batch.val)[0].ravel()).reshape(y.shape)
  np.testing.assert_allclose(got, -ridge * (y * v).sum(axis=1), rtol=1e-3, atol=1e-7)
  assert problem.project(jnp.array([-9.0, 0.0])).tolist() == [-7.0, -2.0]


def test_conv4_in_evaluation_has_the_statistics_of_the_reference():
  features = problems.make_features("conv4", 256, width=8)
  params = jax.jit(features.init)(jax.random.key(0))
  images = jnp.asarray(RNG.normal(size=(12, 256)), jnp.float32)
  frozen, together = jax.jit(features.apply), jax.jit(features.apply)(params, images)
  np.testing.assert_allclose(frozen(params, images, images), together, atol=2e-5)
  alone = frozen(params, images[:1], images)
  np.testing.assert_allclose(alone, together[:1], atol=2e-5)
  assert not np.allclose(frozen(params, images[:1], 2 * images + 1), alone, atol=1e-2)
  kernel = params["Conv_1"]["kernel"]  # [3, 3, 8, 8], variance 2 / 72
  assert float(jnp.std(kernel)) == pytest.approx(np.sqrt(2 / 72), rel=0.15)


def test_hyper_representation_has_a_strongly_convex_inner_loss():
  features = problems.make_features("mlp", FEATURES, width=4)
  problem = problems.representation(features, CLASSES, ridge=0.1)
  x, y = problem.init(jax.random.key(0))
  batch = batches()[0].train
  assert jax.tree.map(jnp.shape, y) == {"w": (4, CLASSES), "b": (CLASSES,)}
  hessian = jax.jit(jax.hessian(lambda w: problem.inner_loss(x, y | {"w": w}, batch)))(y["w"])
  assert np.linalg.eigvalsh(np.asarray(hessian).reshape(12, 12)).min() > 0.09
  difference = problem.inner_loss(x, jax.tree.map(jnp.ones_like, y), batch) - problem.outer_loss(
    x, jax.tree.map(jnp.ones_like, y), batch
  )
  assert difference == pytest.approx(0.05 * 15, rel=1e-5)


# -- Runs.

RATES = Rates(*map(jnp.float32, (0.3, 0.5, 0.1)))


def played_by(variant, seeds, examples=EXAMPLES, kind="static", problem="loss_tuning", of=TUNING):
  """The player, the stream and the final state of a method, with the regret of every step."""
  of = problems.feature_ridge(FEATURES, CLASSES, -4.0, exact=True) if problem == "ridge" else of
  player, on = runs.Player(variant, of, ROUNDS, CLASSES), stream(seeds, examples, kind, problem)
  state = runs.first_state(player.init(RATES, on), len(seeds), ROUNDS, BATCH, CLASSES)
  step, regrets = player.program.compile(state, RATES, on), []
  for t in range(20):
    state, regret = step(state, jnp.int32(t), RATES, on)
    regrets.append(regret)
  return player, on, state, regrets


def test_seeds_side_by_side_are_single_runs_and_the_tuner_sees_their_losses():
  variant = Variant("sobow", 2)
  player, both, state, _ = played_by(variant, (0, 1))
  *_, alone, _ = played_by(variant, (1,))
  assert state.loss.shape == (2, ROUNDS)
  np.testing.assert_allclose(state.loss[1], alone.loss[0], rtol=2e-4)
  assert state.loss[0, 0] == pytest.approx(np.log(CLASSES), rel=1e-5)  # of what was played
  assert not np.allclose(state.loss[0, 5:], state.loss[1, 5:], rtol=1e-2)
  assert np.isin(state.breakdown, (0, 1)).all()
  candidates = jax.tree.map(lambda rate: jnp.stack([rate, 2 * rate]), RATES)
  losses = np.asarray(player.losses(candidates, both))
  assert losses[0] == pytest.approx(float(state.loss.sum(axis=1).mean()), rel=1e-4)
  assert losses[1] != pytest.approx(losses[0], rel=1e-3)


def test_a_window_keeps_gradients_in_sobow_and_batches_in_oagd():
  def kept(method, window):
    player = runs.Player(Variant(method, window), TUNING, ROUNDS, CLASSES)
    return runs.kept_bytes(jax.eval_shape(player.init, RATES, stream())) // 2

  of_x = 4 * 2 * CLASSES
  of_batch = 2 * BATCH * 4 * (FEATURES + 2)  # both levels: images, labels, weights
  flags = 1  # whether a slot is taken
  assert kept("sobow", 3) - kept("sobow", 1) == 2 * (of_x + flags)
  assert kept("oagd", 3) - kept("oagd", 1) == 2 * (of_batch + flags)


def test_the_regret_of_a_run_is_the_sum_of_squared_true_hypergradients():
  rows = EXAMPLES.images / np.linalg.norm(EXAMPLES.images, axis=1, keepdims=True)
  unit = EXAMPLES._replace(images=rows)
  _, on, state, regrets = played_by(Variant("ogd", 1), (0,), unit, "staged", "ridge")
  one = streams.stream_of(rows, jax.tree.map(lambda leaf: leaf[0], on.schedule))
  problem = problems.feature_ridge(FEATURES, CLASSES, -4.0, exact=True)
  true = jax.jit(problem.hypergradient)  # OGD leaves x where it is.
  terms = [np.sum(true(jnp.full(FEATURES, -4.0), one(None, t)) ** 2) for t in range(ROUNDS)]
  told = np.ravel([step["regret"] for step in regrets])
  np.testing.assert_allclose(told, np.cumsum(terms), rtol=1e-3)
  assert not np.any([step["left_out"] for step in regrets])
  assert (state.online.x == -4.0).all()


def test_the_regret_leaves_out_rounds_that_are_not_finite_and_counts_them():
  def hypergradient(x, batch):
    bad = batch.val.labels[0] == 0
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.where(bad, jnp.nan, 1)), x)

  told = TUNING._replace(hypergradient=hypergradient)
  *_, regrets = played_by(Variant("ogd", 1), (0,), of=told)
  bad = np.cumsum([batch.val.labels[0] == 0 for batch in batches()])
  assert 0 < bad[-1] < ROUNDS
  assert np.ravel([step["left_out"] for step in regrets]).tolist() == bad.tolist()
  good = np.arange(1, ROUNDS + 1) - bad
  np.testing.assert_array_equal(np.ravel([step["regret"] for step in regrets]), 2 * CLASSES * good)


# -- The choice of rates.


def test_the_least_finite_loss_is_chosen_of_what_matters_to_a_method():
  grid = Rates((0.1, 1.0), (0.3, 3.0), (0.0, 0.1))
  rates = tuning.candidates(grid, moves_x=True, damped=False)
  np.testing.assert_allclose(
    np.array(rates).T, [(0.1, 0.3, 0), (0.1, 3, 0), (1, 0.3, 0), (1, 3, 0)], rtol=1e-6
  )
  assert len(tuning.candidates(grid, moves_x=False, damped=False).inner) == 2
  losses = pd.Series([np.nan, 2.0, 1.5, np.inf])
  rows = pd.DataFrame(np.array(rates).T, columns=list(Rates._fields), dtype=float).round(6)
  rows = rows.assign(method="sobow", window=5, cumulative_loss=losses)
  choices = lambda rows: list(tuning.Tuning().choices(rows))
  assert choices(rows) == [Choice("SOBOW, K=5", ("sobow", "5"), [1.0, 0.3, 0.0], 1.5)]
  assert [choice.score for choice in choices(rows.assign(cumulative_loss=np.nan))] == [np.inf]


def test_rates_are_of_the_largest_window_that_is_not_larger(tmp_path):
  path = tmp_path / "rates.json"
  table = {"sobow": {"1": [1.0, 2.0, 0.0], "5": [3.0, 4.0, 0.1]}}
  path.write_text(json.dumps({"loss_tuning/digits/linear": table}))
  config = Config(rates_file=path)
  for window, outer in ((1, 2.0), (4, 2.0), (5, 4.0), (20, 4.0)):
    assert config.rates_of(Variant("sobow", window)).outer == outer
  with pytest.raises(ValueError, match="no learning rates were chosen for oagd on loss_tuning/dig"):
    config.rates_of(Variant("oagd", 1))
  for problem in settings.STREAMS:  # The committed file has all that the default runs need.
    for variant in Config(problem=problem).variants():
      assert Config(problem=problem).rates_of(variant)


# -- The script.


def config(path, **kwargs):
  small = {
    "methods": ("ogd", "sobow"), "streams": ("gradual",), "windows": (2,), "seeds": 2,
    "rounds": 20, "batch_size": 8, "inner_learning_rate": 1.0, "outer_learning_rate": 1.0,
  }  # fmt: skip
  return Config(output_dir=path, **(small | kwargs))


def test_a_run_prints_tables_and_writes_its_files(tmp_path, capsys):
  given = {"streams": ("gradual", "zigzag"), "windows": (2, 3), "methods": ("sobow_steps",)}
  assert script.run(config(tmp_path, **given)) == 0
  output = capsys.readouterr().out
  for word in ("stream gradual", "stream zigzag", "SOBOW, K steps, K=3", "20 rounds of 8"):
    assert word in output
  rows = pd.read_csv(tmp_path / "results.csv")
  cells = [(stream, k, seed) for k in (2, 3) for stream in given["streams"] for seed in (0, 1)]
  assert list(rows[["stream", "window", "seed"]].itertuples(index=False, name=None)) == cells
  assert rows["cumulative_loss"].nunique() == len(rows)
  lines = pd.read_json(tmp_path / "metrics.jsonl", lines=True)
  assert len(lines) == len(rows) * 21
  mine = lines[(lines["stream"] == "gradual") & (lines["window"] == 2) & (lines["seed"] == 0)]
  assert mine["round"].tolist() == list(range(21))
  assert mine["cumulative_loss"].iloc[0] == 0
  assert mine["cumulative_loss"].iloc[-1] == pytest.approx(rows["cumulative_loss"][0], rel=1e-6)
  assert mine["balanced_accuracy"].iloc[-1] == pytest.approx(rows["final_accuracy"][0], rel=1e-6)
  assert mine["balanced_accuracy"].mean() == pytest.approx(rows["mean_accuracy"][0], rel=1e-6)
  for name in ("online_hyperopt.png", "online_calibration.png"):
    with Image.open(tmp_path / name) as picture:
      assert picture.width > 800


def test_seeds_that_diverged_are_counted_and_left_out_of_the_means():
  rows = pd.DataFrame(0.5, index=range(3), columns=list(script.COLUMNS))
  rows = rows.assign(method="sobow", window=5, seed=range(3), regret=np.nan, left_out=0)
  rows["cumulative_loss"] = [2.0, np.nan, 4.0]
  table = script.table_of("", rows)
  assert table.rows[0][:3] == ["SOBOW, K=5, 1 of 3 diverged", "2", "3.0 ± 1.4"]
  assert "regret" not in table.columns
  [row] = script.table_of("", rows.assign(cumulative_loss=np.inf)).rows
  assert row[0] == "SOBOW, K=5, 3 of 3 diverged"
  [row] = script.table_of("", rows.assign(cumulative_loss=1.0, left_out=[0, 2, 1])).rows
  assert row[0] == "SOBOW, K=5, regret without 3 rounds"


def test_differences_are_those_of_one_seed():
  rows = pd.DataFrame(0.5, index=range(6), columns=list(script.COLUMNS))
  rows = rows.assign(method=["ogd"] * 3 + ["sobow"] * 3, window=1, seed=[0, 1, 2, 2, 1, 0])
  rows["cumulative_loss"] = [10.0, 20, 30, 29, 18, 7]
  table = script.paired_table("", rows)
  assert table.rows == [["SOBOW, K=1", "-2.0 ± 2.5", "0.0 ± 0.0", *["0.000 ± 0.000"] * 3]]
  assert script.paired_table("", rows[rows["method"] == "sobow"]) is None
  rows.loc[3, ["cumulative_loss", "scaled_loss"]] = np.nan, 1e30
  [row] = script.paired_table("", rows).rows
  assert row[:3] == ["SOBOW, K=1, 1 of 3 diverged", "-2.5 ± 6.4", "0.0 ± 0.0"]


def test_tuning_writes_rates_that_a_run_uses(tmp_path, capsys, monkeypatch):
  grids = {"loss_tuning/digits": Rates((0.3, 1.0), (0.5,), (0.1,))}
  monkeypatch.setattr(tuning, "GRIDS", grids)
  committed = Config().rates_in_sources().read_text()
  given = {"inner_learning_rate": None, "outer_learning_rate": None}
  assert script.run(config(tmp_path, tune=True, **given)) == 0
  assert "SOBOW, K=2" in capsys.readouterr().out
  assert Config().rates_in_sources().read_text() == committed
  file = tmp_path / "rates.json"
  table = json.loads(file.read_text())["loss_tuning/digits/linear"]
  assert table.keys() == {"ogd", "sobow"}
  assert table["ogd"]["1"][1:] == [0.0, 0.0]
  assert table["sobow"]["2"][1:] == [0.5, 0.1]
  own = config(tmp_path, rates_file=file, **given)
  assert own.rates_of(Variant("sobow", 2)) == Rates(*table["sobow"]["2"])
  assert own.rates_to_write() == file
  assert script.run(config(tmp_path / "b", rates_file=tmp_path / "none", **given)) == 2
  assert "no learning rates were chosen for ogd" in capsys.readouterr().err


@pytest.mark.parametrize(
  "wrong, message",
  [
    ({"streams": ("staged",)}, "streams of loss_tuning must be among gradual, zigzag, static; got"),
    ({"problem": "ridge", "streams": None, "methods": ("oagd_published",)}, "methods of ridge"),
    ({"windows": (5, 5)}, "windows should name each one once, got 5 5"),
    ({"outer_learning_rate": None}, r"must be given together, got \(1.0, None\)"),
    ({"problem": "ridge", "streams": None, "model": "mlp"}, "model of ridge must be among linear"),
  ],
)
def test_fields_that_do_not_go_together_say_what_is_allowed(tmp_path, wrong, message):
  with pytest.raises(ValueError, match=message):
    config(tmp_path, **wrong)


@pytest.mark.parametrize(
  "wrong, message",
  [
    ({"model": "conv4"}, "model conv4 needs square images of 16 to 31 pixels a side, got 64"),
    ({"dataset": "newsgroups", "tune": True}, "tune must be of one of loss_tuning/digits, "),
    ({"dataset": "mnist", "data_dir": Path("/nowhere")}, "Expected: mnist/<version>/ with"),
  ],
)
def test_what_cannot_be_run_ends_with_2_and_no_file(tmp_path, capsys, wrong, message):
  assert script.run(config(tmp_path, **wrong)) == 2
  assert message in capsys.readouterr().err
  assert not list(tmp_path.iterdir())


def test_hyper_representation_moves_its_backbone(tmp_path, monkeypatch):
  monkeypatch.setattr(script.OnlineHyperopt, "draw", lambda *_: None)  # It takes seconds.
  given = {
    "problem": "representation", "streams": ("dynamic",), "methods": ("ogd", "sogd", "oagd"),
    "width": 4, "inner_learning_rate": 0.1, "outer_learning_rate": 0.01,
  }  # fmt: skip
  assert script.run(config(tmp_path, seeds=1, **given)) == 0
  rows = pd.read_csv(tmp_path / "results.csv")
  assert np.isfinite(rows["cumulative_loss"]).all()
  assert (rows["distance"] > 0).all()
  assert rows["regret"].isna().all()
  damped = [METHODS[method].damped for method in rows["method"]]
  assert (rows["breakdown_share"].notna() == damped).all()


@programs_kept()
def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path, monkeypatch):
  monkeypatch.setattr(script.OnlineHyperopt, "draw", lambda *_: None)  # It takes seconds.
  mine = config(tmp_path / "stopped", streams=("gradual", "zigzag"), methods=("sobow",), seeds=1)
  assert script.run(mine.but(output_dir=tmp_path / "whole")) == 0
  with stopped_after(34):
    script.run(mine)
  assert [len(table) for table in folder.read(mine.output_dir)[:2]] == [34, 1]
  second = {"stream": "zigzag", "method": "sobow", "window": 2}
  assert latest_step(folder.checkpoints(mine.output_dir, second)) in (5, 10)
  assert script.run(mine.but(resume=True)) == 0
  stopped, whole = (folder.read(tmp_path / name) for name in ("stopped", "whole"))
  for a, b in zip(stopped[:2], whole[:2], strict=True):
    a, b = (pd.DataFrame(table).filter(regex="^(?!seconds)") for table in (a, b))
    pd.testing.assert_frame_equal(a, b, check_exact=True)


@pytest.mark.skipif(
  not list(Path(os.environ.get("TFDS_DATA_DIR", "/nowhere")).glob("newsgroups20/*")),
  reason="TFDS_DATA_DIR has no newsgroups20",
)
def test_newsgroups_are_rows_of_unit_norm_with_the_training_posts_first():
  examples, num_train = data.newsgroups(num_words=50)
  assert num_train == 4500
  assert examples.images.shape == (6000, 50)
  assert np.bincount(examples.labels[:num_train]).tolist() == [225] * 20
  norms = np.linalg.norm(examples.images, axis=1)
  assert np.allclose(norms[norms > 0], 1)
  assert optax.tree.size(examples.images) == 300_000


@pytest.mark.parametrize("diverged", [1e9, np.nan])
def test_a_method_that_diverged_does_not_flatten_the_picture(diverged):
  fig, (few, many) = online_plots.plt.subplots(1, 2)
  curves = [np.full(3, value) for value in (0.5, 1.0, 4.0)]
  for axes, mine in ((few, curves), (many, [*curves, np.full(3, diverged)])):
    for curve in mine:
      axes.semilogy(curve)
    untouched = axes.get_ylim()
    online_plots.leave_out_diverged(axes, mine)
    assert (axes.get_ylim() == untouched) == (axes is few)
  assert many.get_ylim()[1] == pytest.approx(4.4)
  online_plots.plt.close(fig)
