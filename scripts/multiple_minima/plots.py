"""The pictures of methods where the inner problem has many minima."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from scripts.common import plots, table
from scripts.common.plots import plt
from scripts.multiple_minima.methods import BASELINES, LABELS, RESPONSES
from scripts.multiple_minima.toys import TOYS, Trajectory

# On toys: colours that all eyes tell apart, a line and a marker each. Proximal-PDBO and F2SA go
# where PDBO and V-PBGD go, and the three responses go together.
STYLES = {
  "pdbo": ("#0072B2", "-", "o", "PDBO"),
  "bome": ("#D55E00", "--", "s", "BOME"),
  "v_pbgd": ("#009E73", "-.", "^", "V-PBGD"),
  "itd": ("k", ":", "D", "ITD, AID-CG, ESJ"),
}
WINDOWS = {  # of x, and of what stands on the vertical axis
  "T1": ((-0.3, 3.3), (-0.6, 2.2)),
  "T2": ((-0.3, 3.3), (-0.6, 3.0)),
  "T3": ((0.6, 2.1), (-2.1, -0.6)),
  "T4": ((1.0, 7.2), (2.6, 8.6)),
}
FAMILIES = (  # Of rows in pairs: whose, a colour, a marker
  ("a response", "#D55E00", "s"),
  ("a value function", "#0072B2", "o"),
  ("neither", "0.45", "^"),
)
MOST = 12.0  # Percentage points to the left; what is further is written.


def draw_toys(trajectories: Mapping[tuple[str, str], Trajectory], path: Path) -> None:
  """Draws ``trajectories[method, toy]`` over the outer losses."""
  names = [name for name in TOYS if any(toy == name for _, toy in trajectories)]
  columns = min(len(names), 2)
  rows = -(-len(names) // columns)
  options: Any = {"layout": "constrained", "squeeze": False}
  fig, axes = plt.subplots(rows, columns, figsize=(3.6 * columns + 0.4, 3.5 * rows + 1), **options)
  for ax, name in zip(axes.ravel(), names, strict=False):
    _landscape(ax, name)
    for method in STYLES:
      if (method, name) in trajectories:
        _way(ax, method, trajectories[method, name])
    ax.set_title(TOYS[name].title, loc="left", fontsize="medium")
  for ax in axes.ravel()[len(names) :]:
    ax.set_axis_off()
  plots.save(fig, path, legend_of=axes.ravel()[len(names) - 1], ncols=3)


def _landscape(ax: Any, name: str) -> None:
  """The outer loss; where the inner minima are; the solution."""
  toy = TOYS[name]
  (left, right), (low, high) = window = WINDOWS[name]
  x, v = np.meshgrid(np.linspace(left, right, 200), np.linspace(low, high, 200))
  flat = name in ("T1", "T2")
  # Of the inner minima (x, y1 = x, y2) of T1 and T2, all in the plane that is drawn; or of (x, y).
  y = jnp.stack([x, v], axis=-1) if flat else v
  f = np.asarray(jax.vmap(jax.vmap(toy.outer_loss))(x, y))
  ax.contourf(x, v, np.sqrt(f - f.min()), levels=12, cmap="Greys", alpha=0.5)
  ax.set(xlim=window[0], ylim=window[1], xlabel="$x$", ylabel="$y_2$" if flat else "$y$")
  lines = {"T3": [0.0], "T4": [1.5 * np.pi + 2 + 2 * np.pi * k for k in (-1, 0, 1)]}
  for number, level in enumerate(lines.get(name, ())):
    edge, label = np.array([left, right]), None if number else "inner minima"
    ax.plot(edge, level - edge, color="k", lw=4, alpha=0.3, label=label)
  style: Any = {"zorder": 5, "mec": "k", "ls": "none"}
  (x, y), (x0, y0) = toy.optimum, toy.start
  ax.plot(x, y[1] if flat else y, "*", ms=17, mfc="gold", label="solution", **style)
  ax.plot(x0, y0[1] if flat else y0, "P", ms=9, mfc="w", label="start", **style)


def _way(ax: Any, method: str, trajectory: Trajectory) -> None:
  color, line, marker, label = STYLES[method]
  x, y = trajectory.params
  vertical = y[:, 1] if y.ndim == 2 else y
  style: Any = {"color": color, "lw": 2, "ls": line, "marker": marker, "ms": 8, "mec": "w"}
  ax.plot(x, vertical, markevery=[len(x) - 1], zorder=6, label=label, **style)


def draw_cleaning(rows: pd.DataFrame, path: Path) -> None:
  """Draws differences to PDBO in pairs of runs of one seed, with 95 % intervals."""
  gains = table.differences(rows, "method", "pdbo")
  names = [name for name in LABELS if name in set(gains["method"]) and name != "pdbo"]
  size: Any = {"figsize": (6.6, 1.6 + 0.34 * len(names)), "layout": "constrained", "sharey": True}
  fig, axes = plt.subplots(1, 2, **size)
  titles = {"retrained": "a model retrained\nwith the weights", "accuracy": "the model itself"}
  for ax, (column, title) in zip(axes, titles.items(), strict=True):
    ax.axvline(0, color="#0072B2", lw=1.5)
    for height, name in enumerate(reversed(names)):
      values = 100 * gains.loc[gains["method"] == name, column].dropna()
      label, color, marker = FAMILIES[0 if name in RESPONSES else 2 if name in BASELINES else 1]
      mean = values.mean()
      if mean < -MOST:
        ax.plot(-MOST, height, marker=8, color=color, ms=8)
        ax.text(1 - MOST, height, f"{mean:.0f}", va="center", color=color)
      elif len(values):
        error = table.half_width(values.tolist()) if len(values) > 1 else 0
        style: Any = {"color": color, "marker": marker, "ms": 7, "capsize": 3, "ls": "none"}
        ax.errorbar(mean, height, xerr=error, label=label, **style)
    ax.set(title=title, xlim=(-MOST - 0.8, 7), xlabel="points minus PDBO")
    ax.grid(axis="x", alpha=0.3)
  axes[0].set_yticks(range(len(names)), [LABELS[name] for name in reversed(names)])
  handles = {}
  for ax in axes:
    handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
  fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
  plots.save(fig, path)
