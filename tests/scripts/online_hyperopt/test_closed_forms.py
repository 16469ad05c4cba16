"""Streams with closed forms: hypergradients, changes, regrets and laws against brute force."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from scripts.common import folder
from scripts.common.checkpoints import latest_step
from scripts.online_hyperopt import drifting, noise, regret
from scripts.online_hyperopt.slopes import half_width, mean_cell, ratio_cell, slope_cell, slopes
from tests.scripts.common.stopped import StoppedError

pytestmark = pytest.mark.slow  # All together, not each.

ROUNDS = 24
STREAM = drifting.draw("jumps", 1, ROUNDS)


def outer(stream, x, t):
  """``F_t(x)``, which knows where the inner minimum is."""
  return np.sum(1 - np.cos((stream.B @ x + stream.b[t]) / stream.a - stream.c[t]))


@pytest.fixture(scope="module")
def run():
  """A noisy run of SOBOW, with what it played, the true hypergradients and the regrets."""
  noisy = STREAM._replace(noise=0.1 * np.random.default_rng(0).normal(size=STREAM.c.shape))

  def metrics(hypergradient):
    told = {"x": lambda round: round.x, "y": lambda round: round.after.solution.params}
    told["gradient"] = lambda round: hypergradient(round.x, round.batch)
    return told | regret.yardsticks(ROUNDS, hypergradient)

  play = lambda stream: drifting.play(
    "sobow", stream, 0.1, rounds=ROUNDS, window=3, decay=0.5, metrics=metrics
  )
  return jax.tree.map(np.asarray, jax.jit(play)(jax.tree.map(jnp.float32, noisy)))


def test_the_exact_hypergradient_is_the_slope_of_the_outer_value_without_noise(run):
  for t in (0, 7, 23):
    x = run["x"][t].astype(np.float64)
    steps = 1e-6 * np.eye(drifting.SIZE)
    slope = [(outer(STREAM, x + e, t) - outer(STREAM, x - e, t)) / 2e-6 for e in steps]
    np.testing.assert_allclose(run["gradient"][t], slope, atol=2e-5)
  assert np.abs(run["x"][-1]).max() > 0.1


def test_the_inner_step_goes_down_the_inner_loss(run):
  target = (run["x"] @ STREAM.B.T + STREAM.b) / STREAM.a
  before = np.concatenate([np.zeros((1, drifting.SIZE)), run["y"][:-1]]) - target
  expected = (1 - drifting.STEP * STREAM.a) * before
  np.testing.assert_allclose(run["y"] - target, expected, atol=1e-5)


def test_both_regrets_are_those_of_brute_force(run):
  gradients, totals = run["gradient"].astype(np.float64), {"plain": 0.0, "windowed": 0.0}
  window = 5  # of 24 rounds
  weights = 0.8 ** np.arange(window)
  for t in range(ROUNDS):
    totals["plain"] += np.sum(gradients[t] ** 2)
    average = sum(weights[i] * gradients[t - i] for i in range(window) if t >= i) / weights.sum()
    totals["windowed"] += np.sum(average**2)
  for name, total in totals.items():
    assert run[name].total[-1] == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("drift", drifting.DRIFTS)
def test_the_changes_of_the_losses_are_the_largest_over_x(drift):
  stream = drifting.draw(drift, 3, ROUNDS)
  variation, path = stream.variation(), stream.path()
  rng = np.random.default_rng(0)
  grid = np.linspace(0, 2 * np.pi, 2001)
  for t in range(1, ROUNDS):
    # Each coordinate of y* can be anything, so the largest difference is found one by one.
    shift = [s.c[t] - s.b[t] / s.a for s, t in ((stream, t), (stream, t - 1))]
    of = np.cos(grid[:, None] - shift[1]) - np.cos(grid[:, None] - shift[0])
    assert variation[t] == pytest.approx(of.max(axis=0).sum(), abs=1e-5)
    x = rng.normal(size=drifting.SIZE)
    assert abs(outer(stream, x, t) - outer(stream, x, t - 1)) <= variation[t] + 1e-9
    minima = [(stream.B @ x + stream.b[s]) / stream.a for s in (t, t - 1)]
    assert path[t] == pytest.approx(np.sum((minima[0] - minima[1]) ** 2), abs=1e-12)
  assert (variation[0], path[0]) == (0, 0)
  assert (variation.sum() > 0.1) == (drift != "static")


def test_slopes_are_the_exponents_of_power_laws_and_intervals_those_of_student():
  x = np.array([10.0, 100, 1000])
  np.testing.assert_allclose(slopes(x, [5 * x**0.5, 2 * x**-1.25]), [0.5, -1.25], rtol=1e-12)
  assert slope_cell(x, [x**0.5, x**0.7]) == "0.60 ± 1.27"  # 12.706 times 0.1
  assert slope_cell(x, [3 * x]) == "1.00"
  assert half_width([1.0, 2.0, 3.0]) == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
  assert mean_cell([1.0, 2.0, 3.0, np.nan], 1) == "2.0 ± 2.5"
  assert mean_cell([np.inf], 1) == "-"
  assert ratio_cell([2.0, 8.0, 4.0], [1.0, 2.0, 1.0]) == "3.17 (1.17 to 8.58)"


# -- The laws of noise.


def simulated(method, window, rate, seen):
  """``x`` of all rounds, from the recursion with an exact inner solution."""
  x, played = 0.0, []
  for t in range(len(seen)):
    played.append(x)
    ages = [i for i in range(window) if t >= i]
    weights = np.array([1, 0.9, 0.81][:window]) if method == "sobow_decay" else np.ones(window)
    old = sum(weights[i] * (x if method == "oagd" else played[t - i]) for i in ages)
    x = x - rate * (old - sum(weights[i] * seen[t - i] for i in ages)) / weights.sum()
  return np.array(played)


@pytest.mark.parametrize(
  "method, window, rate", [("sobow", 3, 0.4), ("sobow_decay", 3, 0.8), ("oagd", 4, 0.7)]
)
def test_the_law_is_that_of_the_recursion(method, window, rate):
  rounds = 4000
  impulse = simulated(method, window, rate, np.eye(1, 400, 10)[0])
  passed = np.abs(noise.transfer(method, window, rate, noise.spectrum("independent")[0])) ** 2
  assert passed.mean() == pytest.approx(np.sum(impulse**2), rel=1e-6)
  c = np.sin(2 * np.pi * np.arange(rounds) / noise.PERIOD)
  turns = np.random.default_rng(0).normal(size=noise.BATCHES)
  turns -= turns.mean()
  played = simulated(method, window, rate, c + turns[np.arange(rounds) % noise.BATCHES])
  measured = np.mean((played - c)[1000:] ** 2)
  # One draw of the batches has its own power at each harmonic; the law has their expectation.
  power = np.abs(np.fft.fft(turns)[1:] / noise.BATCHES) ** 2
  frequencies, _ = noise.spectrum("in turns")
  miss = 1 - noise.transfer(method, window, rate, 2 * np.pi / noise.PERIOD)
  passed = np.abs(noise.transfer(method, window, rate, frequencies)) ** 2
  assert measured == pytest.approx(np.abs(miss) ** 2 / 2 + power @ passed, rel=1e-3)
  expected = noise.law(method, window, rate, "in turns")
  assert expected == pytest.approx(np.abs(miss) ** 2 / 2 + passed.sum() / noise.BATCHES)


def test_the_spectrum_is_that_of_what_is_drawn():
  rounds = 200
  for name in noise.NOISES:
    rng = np.random.default_rng(0)
    drawn = np.array([noise.NOISES[name](rng, rounds) for _ in range(3000)])
    frequencies, power = noise.spectrum(name)
    assert power.sum() == pytest.approx(np.mean(drawn**2), rel=0.05)
    for lag in (1, 4, 9, 10, 13):
      products = (drawn[:, :-lag] * drawn[:, lag:]).mean(axis=1)
      error = products.std() / len(products) ** 0.5
      assert abs(products.mean() - power @ np.cos(lag * frequencies)) < 4 * error + 0.002


@pytest.mark.parametrize("window", [1, 2, 3, 10, 100])
def test_sobow_is_stable_up_to_its_limit(window):
  limit = 2 if window == 1 else window * (1 - np.cos(np.pi / window))
  assert noise.is_stable("sobow", window, 0.99 * limit)
  assert not noise.is_stable("sobow", window, 1.01 * limit)


def test_decay_widens_what_is_stable_as_far_as_the_reference_says():
  for window, limit in ((2, 2.111111), (3, 1.678343), (5, 1.199179), (10, 0.888658)):
    assert noise.is_stable("sobow_decay", window, limit - 1e-5)
    assert not noise.is_stable("sobow_decay", window, limit + 1e-5)


# -- The studies.


def test_the_regret_is_told_stopped_and_resumed(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(regret, "ROWS", {("sobow", 1): "SOBOW, K=1"})
  config = regret.Config(horizons=(16, 32), output_dir=tmp_path / "whole")
  assert regret.study.run(regret.Regret(), config) == 0
  output = capsys.readouterr().out
  assert "Slopes of the plain regret" in output
  play, calls = regret.Horizon._play, []

  def play_twice(self, *arguments):
    calls.append(self.rounds)
    if len(calls) == 2:
      raise StoppedError
    return play(self, *arguments)

  stopped = config.but(output_dir=tmp_path / "stopped")
  monkeypatch.setattr(regret.Horizon, "_play", play_twice)
  with pytest.raises(StoppedError):
    regret.study.run(regret.Regret(), stopped)
  assert latest_step(folder.checkpoints(stopped.output_dir, regret.key_of("sobow", 1, 16))) == 1
  assert regret.study.run(regret.Regret(), stopped.but(resume=True)) == 0
  rows, again = (folder.read(c.output_dir)[1] for c in (config, stopped))
  assert rows == again
  table = pd.DataFrame(rows)
  assert len(table) == 2 * 5 * 24  # horizons, drifts, seeds
  assert np.isin(np.float32(table["plain_rate"]), np.float32(regret.RATES)).all()
  one = table.query("drift == 'jumps' and seed == 3 and rounds == 32")
  stream = jax.tree.map(jnp.float32, drifting.draw("jumps", 3, 32))
  metrics = functools.partial(regret.yardsticks, 32)
  told = drifting.play(
    "sobow", stream, one["plain_rate"].item(), rounds=32, window=1, decay=1.0, metrics=metrics
  )
  assert one["plain"].item() == pytest.approx(float(told["plain"].total[-1]), rel=1e-3)


def test_noise_is_measured_beside_its_law(tmp_path, capsys):
  config = noise.Config(windows=(2,), rounds=1010, seeds=2, output_dir=tmp_path)
  assert noise.study.run(noise.Noise(), config) == 0
  assert "SOBOW, best rate: law" in capsys.readouterr().out
  rows = pd.read_csv(tmp_path / "results.csv")
  assert len(rows) == 3 * 3 * 2
  drawn = noise.draw("shuffled", 1, 1010)
  played = simulated("sobow", 2, 0.2, (drawn.c + drawn.noise)[:, 0])
  one = rows.query("method == 'sobow' and noise == 'shuffled' and seed == 1")
  expected = np.mean((played - drawn.c[:, 0])[1000:] ** 2)
  assert one["fixed"].item() == pytest.approx(expected, rel=1e-3)
  assert noise.cell(pd.Series([1.0, np.nan])) == "diverged"
  assert noise.number(noise.predicted("sobow", 50, "independent", "fixed")) == "unstable"
