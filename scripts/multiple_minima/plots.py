"""The pictures of methods where the inner problem has many minima."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from scripts.common import plots
from scripts.multiple_minima.methods import BASELINES, COMPARED, LABELS, RESPONSES
from scripts.multiple_minima.toys import TOYS, Trajectory

COLORS = {name: f"C{i}" for i, name in enumerate(COMPARED)}
WINDOWS = {  # of x, and of what stands on the vertical axis
  "T1": ((-0.3, 3.3), (-0.6, 2.2)),
  "T2": ((-0.3, 3.3), (-0.6, 3.0)),
  "T3": ((0.6, 2.1), (-2.1, -0.6)),
  "T4": ((1.0, 7.2), (2.6, 8.6)),
}
_STUCK = "ITD, AID-CG, ESJ: $y_2$ never moves"
NOTES = {  # a text, what it points at, and where it stands
  "T1": (_STUCK, (2.0, 0.0), (1.25, -0.32)),
  "T2": (_STUCK, (2.2, 0.0), (1.25, -0.32)),
  "T4": ("BOME, ITD, AID-CG, ESJ:\nthe nearest valley", (5.4, 7.4), (2.6, 7.6)),
}


def draw_toys(trajectories: Mapping[tuple[str, str], Trajectory], path: Path) -> None:
  """Draws ``trajectories[method, toy]``: landscapes, violations of the constraint, multipliers."""
  names = [name for name in TOYS if any(toy == name for _, toy in trajectories)]
  options: Any = {"layout": "constrained", "squeeze": False, "height_ratios": [1.5, 1, 1]}
  fig, axes = plt.subplots(3, len(names), figsize=(4.6 * len(names) + 0.6, 11), **options)
  for column, name in zip(axes.T, names, strict=True):
    _landscape(column[0], name)
    for method in COMPARED:
      if (method, name) in trajectories:
        _method(column, name, method, trajectories[method, name])
    xlim, ylim = WINDOWS[name]
    column[0].set(xlim=xlim, ylim=ylim, title=TOYS[name].title)
    column[1].set(xscale="log", yscale="log", ylim=(1e-12, 30))
    column[2].set(xscale="log", yscale="symlog", ylim=(0, 1e3), xlabel="updates")
  axes[1, 0].set_ylabel("violation of the constraint\n$g(x, y) - g^*(x)$")
  axes[2, 0].set_ylabel("multiplier")
  handles = {}
  for ax in axes[:2].ravel():
    handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
  fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6)
  plots.save(fig, path)


def _landscape(ax: Any, name: str) -> None:
  """The outer loss; where the inner minima are; the solution."""
  toy = TOYS[name]
  (left, right), (low, high) = WINDOWS[name]
  x, v = np.meshgrid(np.linspace(left, right, 200), np.linspace(low, high, 200))
  flat = name in ("T1", "T2")
  # Of the inner minima (x, y1 = x, y2) of T1 and T2, all in the plane that is drawn; or of (x, y).
  y = jnp.stack([x, v], axis=-1) if flat else v
  f = np.asarray(jax.vmap(jax.vmap(toy.outer_loss))(x, y))
  ax.contourf(x, v, np.sqrt(f - f.min()), levels=14, cmap="Greys", alpha=0.55)
  ax.set(xlabel="$x$", ylabel="$y_2$" if flat else "$y$")
  if flat:
    note = "the plane $y_1 = x$: every point is an inner minimum"
    ax.text(0.5, 0.02, note, transform=ax.transAxes, ha="center", fontsize="small")
  else:
    lines = [0.0] if name == "T3" else [1.5 * np.pi + 2 + 2 * np.pi * k for k in (-1, 0, 1)]
    for level in lines:
      edge = np.array([left, right])
      ax.plot(edge, level - edge, color="k", lw=3, alpha=0.35, label="inner minima")
  if name in NOTES:
    note, at, where = NOTES[name]
    ax.annotate(note, at, where, fontsize="small", arrowprops={"arrowstyle": "-"})
  style: Any = {"zorder": 5, "mec": "k", "ls": "none"}
  (x, y), (x0, y0) = toy.optimum, toy.start
  ax.plot(x, y[1] if flat else y, "*", ms=20, mfc="gold", label="solution", **style)
  ax.plot(x0, y0[1] if flat else y0, "o", ms=9, mfc="w", label="start", **style)
  ax.plot([], [], "X", ms=8, mfc="0.4", mec="w", ls="none", label="end")


def _method(column: Any, name: str, method: str, trajectory: Trajectory) -> None:
  x, y = trajectory.params
  vertical = y[:, 1] if y.ndim == 2 else y
  # Dashes of methods that coincide take turns.
  offset = 5 * RESPONSES.index(method) if method in RESPONSES else 0
  style = {"color": COLORS[method], "ls": (offset, (5, 10)) if method in RESPONSES else "-"}
  column[0].plot(x, vertical, lw=1.3, alpha=0.9, **style)
  column[0].plot(x[-1], vertical[-1], marker="X", ms=8, mec="w", zorder=6, color=style["color"])
  steps = np.unique(np.geomspace(1, len(trajectory.dual), 300).astype(int))
  gap = np.maximum(trajectory.gap[steps], 1e-16)
  column[1].plot(steps, gap, label=LABELS[method], lw=1.3, **style)
  if method not in RESPONSES:
    column[2].plot(steps, trajectory.dual[steps - 1], lw=1.3, **style)


PANELS = (  # (on the horizontal axis, on the vertical axis, title)
  ("gradients", "accuracy", "test accuracy, equal gradients"),
  ("seconds", "accuracy", "test accuracy, equal seconds"),
  ("gradients", "auc", "AUC of the weights: which labels are wrong"),
  ("gradients", "wrong_learnt", "wrong labels that the model has learnt"),
  ("gradients", "gap", "violation of the constraint, $g(x, y) - 0$"),
  ("gradients", "dual", "multiplier"),
)
_BASELINES = dict(zip(BASELINES, (":", "-.", "--", (0, (6, 1))), strict=True))


def draw_cleaning(lines: pd.DataFrame, budgets: Mapping[str, float], path: Path) -> None:
  """Draws the curves of hyper-cleaning, means and ranges over seeds."""
  fig, axes = plt.subplots(2, 3, figsize=(16, 9), layout="constrained")
  for ax, (horizontal, vertical, title) in zip(axes.ravel(), PANELS, strict=True):
    for method, mine in lines.groupby("method", sort=False):
      values = mine.pivot(index="seed", columns="point", values=vertical).to_numpy(float)
      x = mine[horizontal].to_numpy()[: values.shape[1]]
      if np.isnan(values).all() or (vertical == "auc" and method in _BASELINES):
        continue
      label = LABELS[str(method)]
      if method in _BASELINES:
        ax.plot(x, values.mean(axis=0), color="k", ls=_BASELINES[str(method)], label=label)
      else:
        plots.mean_and_range(ax, x, values, label=label, color=COLORS[str(method)])
        if method in RESPONSES:
          ax.get_lines()[-1].set_linestyle("--")
    ax.set(title=title, xlabel=horizontal, xlim=(0, budgets[horizontal]))
  for ax in axes[0, :2]:
    ax.set_ylim(0.7, 1.0)
  axes[1, 1].set_yscale("log")
  axes[1, 2].set_yscale("symlog", linthresh=0.1)
  axes[1, 2].set_ylim(0)
  plots.save(fig, path, legend_of=axes[0, 0])
