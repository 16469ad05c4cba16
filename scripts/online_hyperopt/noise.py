r"""When SOBOW's window pays: noisy hypergradients, windows of 1 to 100, beside the exact law.

The target of :math:`F_t(x) = (x - c_t)^2 / 2` is a sine, and each round shows it with noise. With
an exact inner solution SOBOW and OAGD are linear filters of what they see: with
:math:`z = e^{i \omega}`, the rate :math:`\beta`, and :math:`W(z) = \sum_{i<K} w_i z^{-i}` for the
weights of the window, their :math:`x` is

.. math::
  H_{\text{SOBOW}}(z) = \frac{\beta W(z)}{z - 1 + \beta W(z)}, \qquad
  H_{\text{OAGD}}(z) = \frac{\beta W(z)}{z - 1 + \beta}

times target and noise. So the plain regret of a round is, exactly, half of :math:`|1 - H|^2` at the
frequency of the sine and the mean of :math:`|H|^2` over the spectrum of the noise. The noise is
independent; or that of 10 batches that take turns ("in turns"); or of such batches in an order
drawn anew for each pass ("shuffled"), as minibatches are. The law says which window is the best;
the runs measure it, at the rate 0.2 for all windows and at the best of 16 rates on seeds 100 to
103, for all alike.

  python -m scripts.online_hyperopt.noise                            1 minute on one core
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

import jaxbo
from scripts.common import study
from scripts.common.config import FREE, Count, Several, StudyConfig
from scripts.common.study import Results, Run, Study
from scripts.common.table import Table
from scripts.common.task import Cell, Row, Spent, Task
from scripts.online_hyperopt import drifting, regret_plots
from scripts.online_hyperopt.slopes import mean_cell

PERIOD = 500  # of the sine, of amplitude 1
BATCHES = 10  # of a pass
SETTLING = 1000  # rounds that do not count
TUNING_SEEDS = range(100, 104)
RATES = 2.0 ** np.arange(-8, 0, 0.5)
FIXED = 0.2
DECAY = 0.9
METHODS = {"sobow": "SOBOW", "sobow_decay": f"SOBOW, decay {DECAY:g}", "oagd": "OAGD"}
RATE_KINDS = {"fixed": f"rate {FIXED:g}", "tuned": "best rate"}


def _of_batches(orders: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
  def draw(rng: np.random.Generator, rounds: int) -> np.ndarray:
    values = rng.normal(size=BATCHES)
    return (values - values.mean())[orders(rng, rounds)]

  return draw


def _shuffled(rng: np.random.Generator, rounds: int) -> np.ndarray:
  passes = [rng.permutation(BATCHES) for _ in range(-(-rounds // BATCHES))]
  return np.concatenate(passes)[:rounds]


NOISES: Mapping[str, Callable[[np.random.Generator, int], np.ndarray]] = {
  "independent": lambda rng, rounds: rng.normal(size=rounds),
  "in turns": _of_batches(lambda rng, rounds: np.arange(rounds) % BATCHES),
  "shuffled": _of_batches(_shuffled),
}


class Config(StudyConfig):
  """When SOBOW's window pays: noisy hypergradients, windows of 1 to 100, beside the law."""

  smallest: ClassVar = {"windows": (1, 2), "rounds": 1020, "seeds": 2}

  windows: Several[Count] = (1, 2, 5, 10, 20, 50, 100)
  """Windows K."""
  rounds: Annotated[int, Field(gt=SETTLING)] = 4000
  """Rounds of a run, of which the first 1,000 do not count."""
  seeds: Count = 32
  """How many seeds."""
  output_dir: Annotated[Path, FREE] = Path("runs/online_noise")
  """Where results go."""

  def identity(self) -> dict[str, Any]:
    """With the seeds, which run side by side in one program."""
    return super().identity() | {"seeds": self.seeds, "first_seed": self.first_seed}


# -- The law.


def spectrum(noise: str) -> tuple[np.ndarray, np.ndarray]:
  """Frequencies, and how much of the variance of the noise is at each of them."""
  if noise == "in turns":  # Harmonics of a pass; batches are centred, so there is none at 0.
    return 2 * np.pi * np.arange(1, BATCHES) / BATCHES, np.full(BATCHES - 1, 1 / BATCHES)
  frequencies = 2 * np.pi * (np.arange(4096) + 0.5) / 4096
  power = np.ones(4096)
  if noise == "shuffled":  # Two rounds of one pass see different batches: less than independent.
    lags = np.arange(1, BATCHES)
    correlations = -(1 - lags / BATCHES) / (BATCHES - 1)
    power += 2 * np.cos(np.outer(frequencies, lags)) @ correlations
    power *= (BATCHES - 1) / BATCHES
  return frequencies, power / 4096


def weights_of(method: str, window: int) -> np.ndarray:
  """The weights of the window by age; they sum to 1."""
  weights = decay_of(method) ** np.arange(window, dtype=float)
  return weights / weights.sum()


def decay_of(method: str) -> float:
  """The decay of the window."""
  return DECAY if method == "sobow_decay" else 1.0


def transfer(method: str, window: int, rate: float, frequencies: Any) -> np.ndarray:
  """What a method makes of what it sees, at each frequency."""
  z = np.exp(1j * np.asarray(frequencies))
  aged = [weight * z ** -float(age) for age, weight in enumerate(weights_of(method, window))]
  average = np.sum(aged, axis=0)
  return rate * average / (z - 1 + rate * (1 if method == "oagd" else average))


def is_stable(method: str, window: int, rate: float) -> bool:
  """Whether the poles lie inside the unit circle: without decay, rate < K (1 - cos(π / K))."""
  if method == "oagd":
    return rate < 2
  poles = np.zeros(window + 1)  # z^(K-1) (z - 1) + rate (w_0 z^(K-1) + ... + w_(K-1))
  poles[:2] = 1, -1
  poles[1:] += rate * weights_of(method, window)
  return bool(np.abs(np.roots(poles)).max() < 1)


def law(method: str, window: int, rate: float, noise: str) -> float:
  """The expected plain regret of a round, once settled; infinite without stability."""
  if not is_stable(method, window, rate):
    return math.inf
  frequencies, power = spectrum(noise)
  miss = 1 - transfer(method, window, rate, 2 * np.pi / PERIOD)
  passed = np.abs(transfer(method, window, rate, frequencies)) ** 2
  return float(np.abs(miss) ** 2 / 2 + power @ passed)


def predicted(method: str, window: int, noise: str, kind: str) -> float:
  """The law at the fixed rate, or at its own best one of those that are tried."""
  rates = [FIXED] if kind == "fixed" else RATES
  return min(law(method, window, float(rate), noise) for rate in rates)


# -- The runs.


def draw(noise: str, seed: int, rounds: int) -> drifting.Drifting:
  """A sine with a phase of its own, seen through noise."""
  rng = np.random.default_rng([seed, 8])
  c = np.sin(2 * np.pi * (np.arange(rounds) / PERIOD + rng.random()))[:, None]
  return drifting.Drifting(np.ones(1), np.eye(1), 0 * c, c, NOISES[noise](rng, rounds)[:, None])


@functools.partial(jax.jit, static_argnames=("method", "window", "rounds"))
@functools.partial(jax.vmap, in_axes=(0, 0, None, None, None))
def _regret(stream, rate, method, window, rounds):
  told = drifting.play(
    method.removesuffix("_decay"), stream, rate, rounds=rounds, window=window,
    decay=decay_of(method), step=1.0, loss=drifting.SQUARE,
    metrics=lambda hypergradient: {"regret": jaxbo.online.local_regret(hypergradient)},
  )  # fmt: skip
  return jnp.mean(told["regret"].term[SETTLING:])


class Window(Task):
  """A method with a window on all kinds of noise: its first step tunes, its second one reports."""

  def __init__(self, method: str, window: int, rounds: int, seeds: Iterable[int]):
    self.method, self.window, self.rounds, self.seeds = method, window, rounds, list(seeds)
    shape = (len(NOISES), len(self.seeds), len(RATE_KINDS))
    self.state = {"rates": jnp.zeros((len(NOISES), len(RATE_KINDS))), "regrets": jnp.zeros(shape)}

  def _play(self, seeds: list[int], rates: np.ndarray) -> np.ndarray:
    """The mean regret of a round for ``rates [noises, n]``: ``[noises, seeds, n]``."""
    shape = (len(NOISES), len(seeds), rates.shape[1])
    drawn = [draw(noise, seed, self.rounds) for noise in NOISES for seed in seeds]
    streams = jax.tree.map(lambda leaf: np.repeat(leaf, shape[2], axis=0), drifting.stack(drawn))
    lanes = np.broadcast_to(rates[:, None], shape).ravel().astype(np.float32)
    played = _regret(streams, lanes, self.method, self.window, self.rounds)
    return np.asarray(played).reshape(shape)

  def step(self, state: Any, t: int) -> tuple[Any, None]:
    """Chooses rates by the mean over the tuning seeds, or plays the reported ones."""
    if t == 0:
      tried = self._play(list(TUNING_SEEDS), np.tile(RATES, (len(NOISES), 1))).mean(axis=1)
      best = RATES[np.nan_to_num(tried, nan=np.inf).argmin(axis=1)]
      rates = np.stack([np.full(len(NOISES), FIXED), best], axis=1)
      return {**state, "rates": jnp.asarray(rates, jnp.float32)}, None
    return {
      **state,
      "regrets": jnp.asarray(self._play(self.seeds, np.asarray(state["rates"]))),
    }, None

  def result(self, state: Any, spent: Spent) -> list[Row]:
    """A row for each kind of noise and seed."""
    short = lambda value: float(f"{float(value):.6g}")
    return [
      {"noise": noise, "seed": seed, "tuned_rate": short(state["rates"][i, 1])}
      | {kind: short(state["regrets"][i, j, k]) for k, kind in enumerate(RATE_KINDS)}
      for i, noise in enumerate(NOISES)
      for j, seed in enumerate(self.seeds)
    ]


class Noise(Study[Config]):
  """The experiment."""

  config = Config
  program = "scripts.online_hyperopt.noise"

  def cells(self, run: Run[Config]) -> Iterable[Cell]:
    """Both methods with every window."""
    for method, label in METHODS.items():
      for window in run.config.windows:
        make = functools.partial(Window, method, window, run.config.rounds, run.config.all_seeds())
        yield Cell(
          {"method": method, "window": window}, make, 2, f"{label}, K={window}", checkpoint_every=1
        )

  def tables(self, results: Results[Config]) -> Iterable[Table]:
    """Measured and predicted regrets by the window, one for each kind of noise."""
    columns = ["method", *(f"K={window}" for window in results.config.windows)]
    for noise in NOISES:
      body, rows = [], results.rows[results.rows["noise"] == noise]
      for method, kind in ((m, k) for m in METHODS for k in RATE_KINDS):
        label = f"{METHODS[method]}, {RATE_KINDS[kind]}"
        measured = {
          window: rows[(rows["method"] == method) & (rows["window"] == window)][kind]
          for window in results.config.windows
        }
        expected = [predicted(method, window, noise, kind) for window in measured]
        body.append([label, *map(cell, measured.values())])
        body.append([f"{label}: law", *map(number, expected)])
      title = f"Plain regret of a round, noise {noise}: mean ± half of the 95 % interval"
      yield Table(title, columns, body)

  def draw(self, run: Run[Config]) -> None:
    """Regrets against the window."""
    windows, curves = run.config.windows, dict[str, Any]()
    for noise in NOISES:
      rows = run.results().rows.query("noise == @noise")
      curves[noise] = {
        (method, kind): (
          rows[rows["method"] == method].groupby("window")[kind].mean().reindex(windows),
          np.array([predicted(method, window, noise, kind) for window in windows]),
        )
        for method in METHODS
        for kind in RATE_KINDS
      }
    regret_plots.draw_noise(curves, METHODS, RATE_KINDS, run.path / "online_noise.png")


def cell(values: Any) -> str:
  """``mean ± half`` of regrets, or that they diverged."""
  if not len(values):
    return "-"
  if not np.isfinite(values).all() or values.max() > 100:
    return "diverged"
  return mean_cell(values, 4)


def number(value: float) -> str:
  """What the law says."""
  return f"{value:.4f}" if math.isfinite(value) else "unstable"


if __name__ == "__main__":
  study.main(Config, functools.partial(study.run, Noise()), __doc__)
