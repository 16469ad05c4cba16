"""Online hyperparameter optimization: losses and steps against plain NumPy, files, errors."""

import csv
import itertools
import json
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image
from sklearn.metrics import balanced_accuracy_score

from scripts.common import data, report
from scripts.common.data import Examples
from scripts.online_hyperopt import __main__ as script
from scripts.online_hyperopt import methods as online_methods
from scripts.online_hyperopt import plots as online_plots
from scripts.online_hyperopt import problems, streams
from scripts.online_hyperopt import report as online_report
from scripts.online_hyperopt import runs as online_runs
from scripts.online_hyperopt import tuning as online_tuning
from scripts.online_hyperopt.config import Config, Variant
from scripts.online_hyperopt.methods import METHODS, Rates

pytestmark = pytest.mark.slow  # All together, not each.

RNG = np.random.default_rng(0)
FEATURES, CLASSES, ROUNDS, BATCH = 3, 3, 20, 8
EXAMPLES = Examples(
  RNG.normal(size=(120, FEATURES)).astype(np.float32), (np.arange(120) % CLASSES).astype(np.int32)
)
POOLS = [streams.split_by_class(EXAMPLES, 20, 8, seed) for seed in (0, 1)]
TUNING = problems.loss_tuning(problems.make_features("linear", FEATURES, FEATURES), CLASSES)


def schedules(kind=streams.IMBALANCED["static"]):
  return online_runs.draw_data(kind, EXAMPLES, POOLS, (0, 1), ROUNDS, BATCH)


# -- Losses and steps, written anew in float64.


def weighted(z, batch):
  z = z - z.max(axis=1, keepdims=True)
  losses = np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(z)), batch.labels]
  return (batch.weights * losses).sum() / batch.weights.sum()


def batches(seed=0):
  """The pairs of batches of the rounds, as the stream of the run gives them."""
  schedule = jax.tree.map(lambda leaf: leaf[seed], schedules().schedules)
  stream = streams.stream_of(EXAMPLES.images, schedule)
  return [stream(jax.random.key(0), t) for t in range(ROUNDS)]


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
  loop = online_methods.make_loop(method, TUNING, rates, window, y, ROUNDS)
  schedule = jax.tree.map(lambda leaf: leaf[0], schedules().schedules)
  stream = streams.stream_of(jnp.asarray(EXAMPLES.images), schedule)
  state = loop.init(*TUNING.init(jax.random.key(0)), stream)
  state, _ = jax.jit(loop.run, static_argnums=2)(state, stream, rounds)
  head = state.y["head"]
  return (
    np.stack([state.x["temperature"], state.x["shift"]]),
    np.concatenate([np.ravel(head["w"]), head["b"]]),
  )


def test_the_losses_of_loss_tuning_are_as_published():
  x = {"temperature": jnp.array([0.5, -1.0, 2.0]), "shift": jnp.array([0.3, 0.0, -0.7])}
  y = {"features": {}, "head": {"w": jnp.asarray(RNG.normal(size=(3, 3))), "b": jnp.ones(3)}}
  batch = batches()[0].val
  assert len(set(np.asarray(batch.weights).tolist())) > 1
  batch = jax.tree.map(np.asarray, batch)
  z = batch.images @ np.asarray(y["head"]["w"], np.float64) + 1
  scale = 1 / (1 + np.exp(-np.asarray(x["temperature"], np.float64)))
  inner = weighted(z * scale + np.asarray(x["shift"], np.float64), batch)
  assert TUNING.inner_loss(x, y, batch) == pytest.approx(inner, rel=1e-5)
  assert TUNING.outer_loss(x, y, batch) == pytest.approx(weighted(z, batch), rel=1e-5)
  plain = batch._replace(weights=np.ones(BATCH))  # Equal weights are none.
  assert TUNING.outer_loss(x, y, plain._replace(weights=np.full(BATCH, 0.3))) == pytest.approx(
    weighted(z, plain), rel=1e-5
  )


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
  frozen, together = jax.jit(features.frozen), jax.jit(features.apply)(params, images)
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


def program_of(method, window, calls, seeds, problem=TUNING):
  program = online_runs.make_program(method, problem, window, ROUNDS, ROUNDS // calls, CLASSES)
  pools = [POOLS[seed] for seed in seeds]
  kind = streams.IMBALANCED["static"]
  stream = online_runs.draw_data(kind, EXAMPLES, pools, seeds, ROUNDS, BATCH)
  return program, Rates(*map(jnp.float32, (0.3, 0.5, 0.1))), stream


def run_of(method, window, calls, seeds):
  program, rates, stream = program_of(method, window, calls, seeds)
  compiled = online_runs.compile_step(program, rates, stream)
  *evaluations, (_, run) = online_runs.play(compiled, rates, stream, calls)
  assert len(evaluations) == calls
  return run, program, rates, stream


def test_seeds_side_by_side_in_calls_are_single_runs_in_one_scan():
  run, program, rates, stream = run_of("sobow", window=2, calls=4, seeds=(0, 1))
  alone, *_ = run_of("sobow", window=2, calls=1, seeds=(1,))
  np.testing.assert_allclose(run.loss[:, 1], alone.loss[:, 0], rtol=2e-4)
  assert run.rounds == [0, 5, 10, 15, 20]
  assert run.loss.shape == (ROUNDS, 2)
  assert run.accuracy.shape == (5, 2)
  np.testing.assert_allclose(run.accuracy[[0, -1], 1], alone.accuracy[:, 0], atol=0.02)
  assert run.loss[0, 0] == pytest.approx(np.log(CLASSES), rel=1e-5)  # of what was played
  assert not np.allclose(run.loss[5:, 0], run.loss[5:, 1], rtol=1e-2)
  assert run.distance.min() > 0
  candidates = jax.tree.map(lambda rate: jnp.stack([rate, 2 * rate]), rates)
  losses = program.losses(candidates, stream.features, stream.schedules, stream.seeds)
  losses = np.asarray(losses)
  assert losses[0] == pytest.approx(run.loss.sum(axis=0).mean(), rel=1e-4)
  assert np.isin(run.breakdown, (0, 1)).all()
  assert losses[1] != pytest.approx(losses[0], rel=1e-3)


def test_a_window_keeps_gradients_in_sobow_and_batches_in_oagd():
  kept = {}
  for method, k in itertools.product(("sobow", "oagd"), (1, 3)):
    program, rates, stream = program_of(method, k, 1, (0, 1))
    shapes = jax.eval_shape(program.init, rates, stream.features, stream.schedules, stream.seeds)
    kept[method, k] = online_runs.kept_bytes(shapes) // 2
  of_x = 4 * 2 * CLASSES
  of_batch = 2 * BATCH * 4 * (FEATURES + 2)  # both levels: images, labels, weights
  flags = 1  # whether a slot is taken
  assert kept["sobow", 3] - kept["sobow", 1] == 2 * (of_x + flags)
  assert kept["oagd", 3] - kept["oagd", 1] == 2 * (of_batch + flags)


def test_balanced_accuracy_is_that_of_scikit_learn():
  labels, predicted = RNG.integers(0, 3, 50), RNG.integers(0, 4, 50)
  got = online_runs.balanced_accuracy(jnp.asarray(predicted), jnp.asarray(labels), 4)
  recalls = [np.mean(predicted[labels == label] == label) for label in range(3)]
  assert got == pytest.approx(np.mean(recalls))
  labels[:4], predicted[:4] = np.arange(4), 0
  got = online_runs.balanced_accuracy(jnp.asarray(predicted), jnp.asarray(labels), 4)
  assert got == pytest.approx(balanced_accuracy_score(labels, predicted))


def test_the_regret_of_a_run_is_the_sum_of_squared_true_hypergradients():
  rows = EXAMPLES.images / np.linalg.norm(EXAMPLES.images, axis=1, keepdims=True)
  problem = problems.feature_ridge(FEATURES, CLASSES, -4.0, exact=True)
  program = online_runs.make_program("ogd", problem, 1, ROUNDS, ROUNDS, CLASSES)
  unit = EXAMPLES._replace(images=rows)
  stream = online_runs.draw_data(streams.NOISY["staged"], unit, POOLS[:1], (0,), ROUNDS, BATCH)
  rates = Rates(*map(jnp.float32, (0.3, 0.5, 0.0)))
  *_, (_, run) = online_runs.play(
    online_runs.compile_step(program, rates, stream), rates, stream, 1
  )
  one = streams.stream_of(rows, jax.tree.map(lambda leaf: leaf[0], stream.schedules))
  true = jax.jit(problem.hypergradient)  # OGD leaves x where it is.
  terms = [np.sum(true(jnp.full(FEATURES, -4.0), one(None, t)) ** 2) for t in range(ROUNDS)]
  np.testing.assert_allclose(run.regret[:, 0], np.cumsum(terms), rtol=1e-3)
  assert run.distance == 0


# -- The choice of rates.


def test_the_least_finite_loss_is_chosen_and_kept_by_window(tmp_path):
  grid = online_tuning.Grid((0.1, 1.0), (0.3, 3.0), (0.0, 0.1))
  rates = online_tuning.candidates(grid, moves_x=True, damped=False)
  assert list(zip(*map(np.ndarray.tolist, rates), strict=True)) == [
    pytest.approx(values) for values in itertools.product((0.1, 1.0), (0.3, 3.0), (0.0,))
  ]
  chosen = online_tuning.choose(rates, np.array([np.nan, 2.0, 1.5, np.inf]))
  assert chosen == Rates(1.0, 0.3, 0.0)
  with pytest.raises(ValueError, match="every learning rate of the grid diverged"):
    online_tuning.choose(rates, np.full(4, np.nan))
  assert len(online_tuning.candidates(grid, moves_x=False, damped=False).inner) == 2

  path = tmp_path / "rates.json"
  online_tuning.write(path, "a/b/c", {"sobow": {"1": [1.0, 2.0, 0.0]}})
  online_tuning.write(path, "a/b/c", {"sobow": {"5": [3.0, 4.0, 0.1]}})
  tables = online_tuning.read(path)
  for window, outer in ((1, 2.0), (4, 2.0), (5, 4.0), (20, 4.0)):
    assert online_tuning.look_up(tables, "a/b/c", "sobow", window).outer == outer
  with pytest.raises(ValueError, match="no learning rates were chosen for oagd on a/b/c: choose"):
    online_tuning.look_up(tables, "a/b/c", "oagd", 1)


def test_the_rates_file_has_all_that_the_default_runs_need():
  for problem in script.STREAMS:
    for variant in Config(problem=problem).variants():
      assert script.rates_of(Config(problem=problem), variant)


# -- The script.


def config(path, **kwargs):
  small = {
    "methods": ("ogd", "sobow"), "streams": ("gradual",), "windows": (2,), "seeds": 2,
    "rounds": 20, "batch_size": 8, "inner_learning_rate": 1.0, "outer_learning_rate": 1.0,
  }  # fmt: skip
  return Config(output_dir=path, **(small | kwargs))


def rows_of(path):
  with (path / "results.csv").open() as file:
    return list(csv.DictReader(file))


def test_a_run_prints_tables_and_writes_its_files(tmp_path, capsys):
  streams_of, windows = ("gradual", "zigzag"), (2, 3)
  given = {"streams": streams_of, "windows": (1, *windows), "methods": ("ogd_replay",)}
  assert script.main(config(tmp_path, **given)) == 0
  output = capsys.readouterr().out
  for word in ("stream gradual", "stream zigzag", "OGD, replay, K=3", "20 rounds of 8", "2 seeds"):
    assert word in output
  rows = rows_of(tmp_path)
  assert [(row["stream"], row["method"], row["window"], row["seed"]) for row in rows] == [
    (stream, "ogd_replay", str(window), seed)
    for window in windows
    for stream in streams_of
    for seed in "01"
  ]
  assert len({row["cumulative_loss"] for row in rows}) == len(rows)
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert len(lines) == len(rows) * 21
  assert lines[20]["cumulative_loss"] == pytest.approx(float(rows[0]["cumulative_loss"]), rel=1e-6)
  assert lines[20]["balanced_accuracy"] == float(rows[0]["final_accuracy"])
  assert lines[0]["regret"] == 0 or lines[0]["regret"] is None
  for name in (script.PICTURE, script.SWEEP):
    with Image.open(tmp_path / name) as picture:
      assert picture.width > 800


def test_seeds_that_diverged_are_counted_and_left_out_of_the_means():
  result = lambda seed, loss: online_report.Result(
    "gradual", "sobow", 5, seed, loss, 0.5, 0.5, 1.0, math.nan, 0.0, 1e-3, 1024, 1.0, 1.0, 0.0
  )
  rows = online_report.table_rows([result(0, 2.0), result(1, math.nan), result(2, 4.0)])
  assert rows[0][:2] == ["SOBOW, K=5, 1 of 3 diverged", "3.0 ± 1.4"]
  columns, [row] = online_report.without_dashes(rows)
  assert "regret" not in columns
  assert len(row) == len(columns) == len(online_report.COLUMNS) - 1
  [row] = online_report.table_rows([result(0, math.inf)])
  assert row[:2] == ["SOBOW, K=5, 1 of 1 diverged", "-"]


def test_an_interruption_leaves_what_was_finished(tmp_path, capsys, monkeypatch):
  write, calls = report.MetricsLog.write, itertools.count(1)

  def interrupted_write(self, **values):
    write(self, **values)
    if next(calls) == 2 * 21:  # after OGD
      raise KeyboardInterrupt

  monkeypatch.setattr(report.MetricsLog, "write", interrupted_write)
  assert script.main(config(tmp_path)) == 130
  output = capsys.readouterr().out
  assert "Interrupted. What was finished until then:" in output
  assert [(row["method"], row["seed"]) for row in rows_of(tmp_path)] == [("ogd", "0"), ("ogd", "1")]
  assert (tmp_path / script.PICTURE).exists()


def test_tuning_writes_rates_that_a_run_uses(tmp_path, capsys, monkeypatch):
  grids = {"loss_tuning/digits": online_tuning.Grid((0.3, 1.0), (0.5,), (0.1,))}
  monkeypatch.setattr(online_tuning, "GRIDS", grids)
  file = tmp_path / "rates.json"
  given = {"inner_learning_rate": None, "outer_learning_rate": None, "rates_file": file}
  assert script.main(config(tmp_path / "a", **given)) == 2
  assert "no learning rates were chosen for ogd" in capsys.readouterr().err
  assert script.main(config(tmp_path / "a", tune=True, **given)) == 0
  table = json.loads(file.read_text())["loss_tuning/digits/linear"]
  assert table.keys() == {"ogd", "sobow"}
  assert table["ogd"]["1"][1:] == [0.0, 0.0]
  assert table["sobow"]["2"][1:] == [0.5, 0.1]
  assert not (tmp_path / "a").exists()
  assert script.rates_of(config(tmp_path, **given), Variant("sobow", 2)) == Rates(
    *table["sobow"]["2"]
  )


@pytest.mark.parametrize(
  "wrong, message",
  [
    (
      {"problem": "magic"},
      "problem must be one of loss_tuning, ridge, representation; got 'magic'",
    ),
    ({"dataset": "cifar"}, "dataset must be one of digits, mnist, newsgroups; got 'cifar'"),
    ({"streams": ("staged",)}, "streams must be among gradual, zigzag, static; got staged"),
    ({"methods": ()}, "methods must be among ogd, sobow, "),
    ({"methods": ("ogd", "ogd")}, "methods must name each one once, got ogd ogd"),
    (
      {"problem": "ridge", "streams": None, "methods": ("oagd_published",)},
      "methods must be among",
    ),
    ({"windows": (0, 5)}, "windows must be at least 1 each, got (0, 5)"),
    ({"windows": (5, 5)}, "windows must name each one once, got 5 5"),
    ({"rounds": 50}, "rounds must be a multiple of 20, got 50"),
    ({"seeds": 0}, "seeds must be at least 1, got 0"),
    ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ({"width": 0}, "width must be at least 1, got 0"),
    ({"first_seed": -1}, "first_seed must not be negative, got -1"),
    ({"outer_learning_rate": None}, "must be given together, got (1.0, None)"),
    ({"inner_learning_rate": 0.0}, "inner_learning_rate must be positive, got 0.0"),
    ({"damping": -1.0}, "damping must not be negative, got -1.0"),
    ({"model": "resnet"}, "model must be one of linear, mlp, conv4; got 'resnet'"),
    ({"model": "conv4"}, "model conv4 needs square images of 16 to 31 pixels a side, got 64"),
    ({"problem": "ridge", "streams": None, "model": "mlp"}, "model must be linear for ridge"),
    ({"problem": "representation", "streams": None, "model": "linear"}, "model must be mlp or"),
    ({"problem": "ridge", "streams": None, "log_ridge": 0.0}, "log_ridge must be in [-7, -2]"),
    ({"dataset": "mnist", "data_dir": Path("/nowhere")}, "Expected: mnist/<version>/ with"),
    ({"dataset": "newsgroups", "data_dir": Path("/nowhere")}, "300 posts of each of the 20 groups"),
  ],
)
def test_bad_input_says_what_is_allowed_and_touches_no_file(tmp_path, capsys, wrong, message):
  assert script.main(config(tmp_path, **wrong)) == 2
  assert message in capsys.readouterr().err
  assert not list(tmp_path.iterdir())


def test_hyper_representation_moves_its_backbone(tmp_path):
  given = {
    "problem": "representation", "streams": ("dynamic",), "methods": ("ogd", "sogd", "oagd"),
    "width": 4, "inner_learning_rate": 0.1, "outer_learning_rate": 0.01,
  }  # fmt: skip
  assert script.main(config(tmp_path, seeds=1, **given)) == 0
  rows = rows_of(tmp_path)
  for row in rows:
    assert np.isfinite(float(row["cumulative_loss"]))
    assert float(row["distance"]) > 0
    assert row["regret"] == "nan"
    assert (row["breakdown_share"] == "nan") == (not METHODS[row["method"]].damped)


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


def test_a_method_that_diverged_does_not_flatten_the_picture():
  fig, (few, many) = online_plots.plt.subplots(1, 2)
  curves = [np.zeros((3, 2)), -np.ones((3, 2)), np.full((3, 2), 4.0)]
  for axes, mine in ((few, curves), (many, [*curves, np.full((3, 2), 1e9)])):
    for curve in mine:
      axes.plot(curve)
    online_plots.leave_out_diverged(axes, mine)
  np.testing.assert_allclose(many.get_ylim(), few.get_ylim())
  online_plots.plt.close(fig)
