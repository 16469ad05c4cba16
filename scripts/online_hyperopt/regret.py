r"""SOBOW's regret against the number of rounds, on streams with closed forms.

The paper's headline is a bilevel local regret of the order of T/W + V_T + H_T, where W is the sum
of the weights of the window, V_T the variation of the outer values, H_T the squared path of the
inner minima. Here all of them are known exactly (`drifting.py`), on five drifts: none; a target at
1/sqrt(t) from its end; steps of 1/sqrt(t) in one direction; jumps with probability 1/sqrt(t); a
sine. SOBOW and OAGD have a window of 1, of 10, or of sqrt(T) with a decay of 1 - 1/K, as the bound
wants it. Two yardsticks, the same for all methods: the sum of the squared true hypergradients
("plain", a window of 1) and that of their averages over the last sqrt(T) rounds ("windowed").

For each method, window, drift, T and yardstick the outer rate is the best of twelve on four other
seeds (100 to 103). Slopes are fitted for each seed on a log-log scale; ± is half of the 95 %
interval of their mean. "bound" is the slope of T/W + V_T + H_T.

  python -m scripts.online_hyperopt.regret                           3 minutes on one core
"""

import functools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

import jaxbo
from scripts.common import study
from scripts.common.config import FREE, Count, Several, StudyConfig
from scripts.common.study import Results, Run, Study
from scripts.common.table import Table
from scripts.common.task import Cell, Row, Spent, Task
from scripts.online_hyperopt import drifting, regret_plots
from scripts.online_hyperopt.drifting import DESCRIPTIONS, DRIFTS
from scripts.online_hyperopt.slopes import ratio_cell, slope_cell, slopes

TUNING_SEEDS = range(100, 104)
RATES = 0.002 * 2.0 ** np.arange(12)
YARDSTICKS = {"plain": "squared hypergradients", "windowed": "squared averages of √T of them"}
ROWS = {  # A window of 0 is the square root of T.
  ("ogd", 1): "OGD",
  ("sobow", 1): "SOBOW, K=1",
  ("sobow", 10): "SOBOW, K=10",
  ("sobow", 0): "SOBOW, K=√T",
  ("oagd", 10): "OAGD, K=10",
  ("oagd", 0): "OAGD, K=√T",
}
BASELINE = ("sobow", 1)


class Config(StudyConfig):
  """SOBOW's regret against the number of rounds, on streams with closed forms."""

  smallest: ClassVar = {"horizons": (16, 64), "seeds": 2}

  horizons: Several[Count] = (512, 1024, 2048, 4096, 8192)
  """The numbers of rounds T."""
  seeds: Count = 24
  """How many seeds; each draws the matrices and the directions of the drift."""
  output_dir: Annotated[Path, FREE] = Path("runs/online_regret")
  """Where results go."""

  def identity(self) -> dict[str, Any]:
    """With the seeds, which run side by side in one program."""
    return super().identity() | {"seeds": self.seeds, "first_seed": self.first_seed}


def window_of(rule: int, rounds: int) -> int:
  """The window of a rule for so many rounds."""
  return rule or math.ceil(math.sqrt(rounds))


def decay_of(window: int) -> float:
  """The decay that belongs to a window."""
  return 1 - 1 / window if window > 1 else 1.0


def weight_of(window: int) -> float:
  """The sum of the weights of a window."""
  return float(np.sum(decay_of(window) ** np.arange(window)))


def yardsticks(rounds: int, hypergradient: Any) -> dict[str, Any]:
  """The two regrets, as metrics of a loop."""
  window = window_of(0, rounds)
  windowed = jaxbo.online.local_regret(hypergradient, window=window, decay=decay_of(window))
  return {"plain": jaxbo.online.local_regret(hypergradient), "windowed": windowed}


@functools.partial(jax.jit, static_argnames=("method", "window", "rounds"))
@functools.partial(jax.vmap, in_axes=(0, 0, None, None, None))
def _regrets(stream, rate, method, window, rounds):
  told = drifting.play(
    method, stream, rate, rounds=rounds, window=window, decay=decay_of(window),
    metrics=functools.partial(yardsticks, rounds),
  )  # fmt: skip
  return jnp.stack([told[name].total[-1] for name in YARDSTICKS])


class Horizon(Task):
  """A method for a number of rounds on all drifts: its first step tunes, its second one reports."""

  def __init__(self, method: str, window: int, rounds: int, seeds: Iterable[int]):
    self.method, self.window, self.rounds, self.seeds = method, window, rounds, list(seeds)
    drifts, kinds = len(DRIFTS), len(YARDSTICKS)
    self.state = {
      "rates": jnp.zeros((drifts, kinds)),
      "regrets": jnp.zeros((drifts, len(self.seeds), kinds)),
    }

  def _play(self, seeds: list[int], rates: np.ndarray) -> np.ndarray:
    """The regrets for ``rates [drifts, n]``: ``[drifts, seeds, n, yardsticks]``."""
    shape = (len(DRIFTS), len(seeds), rates.shape[1])
    drawn = [drifting.draw(drift, seed, self.rounds) for drift in DRIFTS for seed in seeds]
    streams = jax.tree.map(lambda leaf: np.repeat(leaf, shape[2], axis=0), drifting.stack(drawn))
    lanes = np.broadcast_to(rates[:, None], shape).ravel().astype(np.float32)
    return np.asarray(_regrets(streams, lanes, self.method, self.window, self.rounds)).reshape(
      *shape, len(YARDSTICKS)
    )

  def step(self, state: Any, t: int) -> tuple[Any, None]:
    """Chooses rates by the mean over the tuning seeds, or plays the reported ones."""
    if t == 0:
      tried = self._play(list(TUNING_SEEDS), np.tile(RATES, (len(DRIFTS), 1))).mean(axis=1)
      best = np.nan_to_num(tried, nan=np.inf).argmin(axis=1)
      return {**state, "rates": jnp.asarray(RATES[best], jnp.float32)}, None
    own = np.einsum("dsyy->dsy", self._play(self.seeds, np.asarray(state["rates"])))
    return {**state, "regrets": jnp.asarray(own)}, None

  def result(self, state: Any, spent: Spent) -> list[Row]:
    """A row for each drift and seed."""
    short = lambda value: float(f"{float(value):.6g}")
    return [
      {"drift": drift, "seed": seed}
      | {name: short(state["regrets"][i, j, k]) for k, name in enumerate(YARDSTICKS)}
      | {f"{name}_rate": short(state["rates"][i, k]) for k, name in enumerate(YARDSTICKS)}
      for i, drift in enumerate(DRIFTS)
      for j, seed in enumerate(self.seeds)
    ]


class Regret(Study[Config]):
  """The experiment."""

  config = Config
  program = "scripts.online_hyperopt.regret"

  def begin(self, run: Run[Config]) -> None:
    """How much the streams change, exactly; means over the seeds."""

    def change() -> dict[str, Any]:
      longest = max(run.config.horizons)
      of = lambda drift: [drifting.draw(drift, seed, longest) for seed in run.config.all_seeds()]
      sums = lambda rows: np.mean(np.cumsum(rows, axis=-1), axis=0)
      found = {}
      for drift in DRIFTS:
        streams = of(drift)
        v, h = sums([s.variation() for s in streams]), sums([s.path() for s in streams])
        found[drift] = {str(t): [v[t - 1], h[t - 1]] for t in run.config.horizons}
      return found

    run.note("change", change)

  def cells(self, run: Run[Config]) -> Iterable[Cell]:
    """Every method for every number of rounds."""
    for (method, rule), label in ROWS.items():
      for rounds in run.config.horizons:
        seeds, window = run.config.all_seeds(), window_of(rule, rounds)
        make = functools.partial(Horizon, method, window, rounds, seeds)
        key = key_of(method, rule, rounds)
        yield Cell(key, make, 2, f"{label}, T={rounds}", checkpoint_every=1)

  def tables(self, results: Results[Config]) -> Iterable[Table]:
    """Slopes by both yardsticks beside the bound, and regrets at the end beside the baseline's."""
    horizons, rows = results.config.horizons, results.rows
    columns = ["method", *DESCRIPTIONS.values()]
    groups = {row: mine for row in ROWS if len(mine := of_row(rows, row))}
    for yardstick, what in YARDSTICKS.items():
      body = [
        [ROWS[row], *(slope_cell(horizons, regrets(mine, drift, yardstick)) for drift in DRIFTS)]
        for row, mine in groups.items()
      ]
      body += [bound_row(results, rule) for rule in (1, 10, 0)]
      title = f"Slopes of the {yardstick} regret (the sum of the {what}) against T"
      yield Table(f"{title}, {horizons[0]} to {horizons[-1]} rounds", columns, body)
    for yardstick in YARDSTICKS if BASELINE in groups else ():
      last = {
        row: [regrets(mine, drift, yardstick)[:, -1] for drift in DRIFTS]
        for row, mine in groups.items()
      }
      body = [
        [ROWS[row], *map(ratio_cell, ends, last[BASELINE])]
        for row, ends in last.items()
        if row != BASELINE
      ]
      title = f"The {yardstick} regret of {horizons[-1]} rounds, in multiples of that of SOBOW, K=1"
      yield Table(f"{title} on the same seed (95 % interval)", columns, body)

  def draw(self, run: Run[Config]) -> None:
    """Regrets against the number of rounds."""
    results = run.results()
    curves = {
      (yardstick, drift): {
        row: regrets(mine, drift, yardstick)
        for row in ROWS
        if len(mine := of_row(results.rows, row))
      }
      for yardstick in YARDSTICKS
      for drift in DRIFTS
    }
    bounds = {drift: bound(results, 0, drift) for drift in DRIFTS}
    horizons, path = run.config.horizons, run.path / "online_regret.png"
    regret_plots.draw_regret(curves, bounds, horizons, ROWS, path)


def key_of(method: str, rule: int, rounds: int) -> Row:
  """What names a cell."""
  return {"method": method, "rule": rule, "rounds": rounds}


def of_row(rows: pd.DataFrame, row: tuple[str, int]) -> pd.DataFrame:
  """The rows of a method with a rule for its window."""
  return rows[(rows["method"] == row[0]) & (rows["rule"] == row[1])]


def regrets(mine: pd.DataFrame, drift: str, yardstick: str) -> np.ndarray:
  """The regrets of a method on a drift, ``[seeds, horizons]``."""
  here = mine[mine["drift"] == drift]
  return here.pivot(index="seed", columns="rounds", values=yardstick).to_numpy()


def bound(results: Results[Config], rule: int, drift: str) -> np.ndarray:
  """T/W + V_T + H_T for all horizons."""
  horizons, change = results.config.horizons, results.notes["change"][drift]
  return np.array([t / weight_of(window_of(rule, t)) + sum(change[str(t)]) for t in horizons])


def bound_row(results: Results[Config], rule: int) -> list[str]:
  """The slopes of the bound."""
  label = {0: "√T"}.get(rule, str(rule))
  horizons = results.config.horizons
  fitted = [slopes(horizons, bound(results, rule, drift)[None])[0] for drift in DRIFTS]
  return [f"bound, K={label}", *(f"{slope:.2f}" for slope in fitted)]


if __name__ == "__main__":
  study.main(Config, functools.partial(study.run, Regret()), __doc__)
