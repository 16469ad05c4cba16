"""Pictures of the regret: against the number of rounds, and with noise against the window."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scripts.common import plots
from scripts.common.plots import plt
from scripts.online_hyperopt.drifting import DESCRIPTIONS

# Colours that all eyes tell apart, and a marker and a line each; what frames the others is grey.
STYLES = {
  ("ogd", 1): ("0.55", "x", ":"),
  ("sobow", 1): ("#0072B2", "o", "-"),
  ("sobow", 0): ("#D55E00", "D", "-"),
  ("oagd", 0): ("#009E73", "^", "--"),
}
OF_NOISE = {
  ("sobow", "fixed"): ("#56B4E9", "s"),
  ("sobow", "tuned"): ("#0072B2", "o"),
  ("sobow_decay", "tuned"): ("#CC79A7", "D"),
  ("oagd", "fixed"): ("#E69F00", "v"),
  ("oagd", "tuned"): ("#009E73", "^"),
}
SHOWN = ("static", "slowing", "sine")  # The other drifts are in the tables.
TITLES = {"plain": "plain regret", "windowed": "regret of averages of √T"}


def draw_regret(
  curves: Mapping[tuple[str, str], Mapping[tuple[str, int], np.ndarray]],
  bounds: Mapping[str, np.ndarray],
  horizons: Sequence[int],
  labels: Mapping[tuple[str, int], str],
  path: Path,
) -> None:
  """A row for each yardstick, a column for each drift; bands go from least to greatest.

  ``curves[yardstick, drift][method]`` is ``[seeds, horizons]``; ``bounds[drift]`` is of a window of
  √T, drawn through the first point of its method.
  """
  bounds = {drift: bounds[drift] for drift in SHOWN}
  fig, grid = plt.subplots(
    len(TITLES), len(bounds), figsize=(1 + 3.2 * len(bounds), 6.8), sharex=True, sharey="row",
    squeeze=False, layout="constrained",
  )  # fmt: skip
  for (yardstick, what), panels in zip(TITLES.items(), grid, strict=True):
    panels[0].set_ylabel(what)
    for (drift, bound), axes in zip(bounds.items(), panels, strict=True):
      mine = curves[yardstick, drift]
      for method, (color, marker, line) in STYLES.items():
        if method in mine:
          low, high = mine[method].min(axis=0), mine[method].max(axis=0)
          axes.fill_between(horizons, low, high, color=color, alpha=0.15, lw=0)
          style: Any = {"color": color, "marker": marker, "linestyle": line, "ms": 5}
          mean = np.exp(np.log(mine[method]).mean(axis=0))
          axes.plot(horizons, mean, label=labels[method], **style)
      if ("sobow", 0) in mine:
        start = np.exp(np.log(mine["sobow", 0][:, 0]).mean())
        shown = start * bound / bound[0]
        label = "slope of the bound for K=√T"
        axes.plot(horizons, shown, color="0.2", linestyle=(0, (1, 3)), lw=2.5, label=label)
      axes.set(xscale="log", yscale="log")
      axes.grid(alpha=0.3)
  for drift, axes in zip(bounds, grid[0], strict=True):
    axes.set_title(DESCRIPTIONS[drift], fontsize="medium")
  for axes in grid[-1]:
    axes.set_xlabel("rounds T")
    axes.set_xticks(horizons, [str(t) for t in horizons], rotation=45)
    axes.minorticks_off()
  plots.save(fig, path, legend_of=grid[0, 0], ncols=3)


def draw_noise(
  curves: Mapping[str, Mapping[tuple[str, str], tuple[pd.Series, np.ndarray]]],
  methods: Mapping[str, str],
  rates: Mapping[str, str],
  path: Path,
) -> None:
  """Markers are means over seeds, lines the law; what the law calls unstable has neither."""
  fig, panels = plt.subplots(
    1, len(curves), figsize=(1 + 3.9 * len(curves), 4.4), sharey=True, squeeze=False,
    layout="constrained",
  )  # fmt: skip
  for (noise, mine), axes in zip(curves.items(), panels[0], strict=True):
    windows = [1]
    for (method, kind), (color, marker) in OF_NOISE.items():
      measured, expected = mine[method, kind]
      windows, finite = list(measured.index), np.isfinite(expected)
      line = "-" if kind == "tuned" else "--"
      axes.plot(np.array(windows)[finite], expected[finite], color=color, linestyle=line, lw=1.2)
      label = f"{methods[method]}, {rates[kind]}"
      mean = measured.to_numpy()[finite]
      axes.plot(np.array(windows)[finite], mean, marker, color=color, ms=6, label=label)
    axes.set(xscale="log", yscale="log", xlabel="window K", title=f"noise {noise}")
    axes.set_xticks(windows, [str(k) for k in windows])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
  panels[0, 0].set_ylabel("plain regret of a round")
  plots.save(fig, path, legend_of=panels[0, 0], ncols=3)
