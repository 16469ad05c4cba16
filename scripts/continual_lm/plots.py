"""Pictures of continual language-model training."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.colors
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from scripts.common import plots, table
from scripts.common.plots import plt
from scripts.continual_lm import report
from scripts.continual_lm.methods import BASELINE, LABELS, METHODS, START

# Uniform weights are grey in all pictures. Drawn dashed is what others are compared with, and what
# would hide another line.
COLORS = {BASELINE: "0.4"} | {n: f"C{i}" for i, n in enumerate(m for m in METHODS if m != BASELINE)}
DASHED = (BASELINE, "ir_dro_compositional")
NOISE = {
  "shuffled": "with shuffled tokens",
  "random": "of random tokens",
  "swapped": "with others' responses",
}


def arm_title(corruption: float, kind: str) -> str:
  """What the data of a share of noise are."""
  return f"{corruption:.0%} of the sequences {NOISE[kind]}" if corruption else "clean data"


def draw_overview(
  rows: pd.DataFrame, lines: pd.DataFrame, domains: Sequence[str], kind: str, path: Path
) -> None:
  """For each share of noise: losses beside those of uniform weights, weights, and their ESS."""
  corruptions = report.shares_of_noise(rows)
  num = len(corruptions)
  fig = plt.figure(figsize=(15, 0.4 + 4.2 * num), layout="constrained")
  grid = fig.subplots(num, 3, width_ratios=[1.1, 0.8, 1.0], squeeze=False)
  for corruption, (losses, weights, ess) in zip(corruptions, grid, strict=True):
    arm = report.of_arm(rows, corruption)
    methods = [method for method in arm["method"].unique() if method != START]
    _draw_differences(losses, arm, methods)
    losses.set_title(f"{arm_title(corruption, kind)}: test loss", loc="left", fontsize="medium")
    columns = {f"weight/{name}": name for name in domains}
    columns |= {"weight_noise": "noise"} if corruption else {}
    _draw_weights(weights, arm.groupby("method")[[*columns]].mean().loc[methods], columns)
    for method in methods:
      curves = _curves(lines, corruption, method, "ess")
      style = {"color": COLORS[method], "band": method not in DASHED}
      plots.mean_and_range(ess, curves.columns.to_numpy(), curves, label=LABELS[method], **style)
    ess.set(xlabel="steps", ylim=(0, 1.05))
    ess.set_title("effective sample size / batch", loc="left", fontsize="medium")
  plots.save(fig, path, legend_of=grid[0, 2])


def _draw_differences(axes: Axes, arm: pd.DataFrame, methods: Sequence[str]) -> None:
  """Points with a bar of one standard deviation: left of zero is better than uniform weights."""
  gains = table.differences(report.in_pairs(arm), "method", BASELINE)
  for name, label, marker, face, shift in (
    ("loss", "mean", "o", None, -0.12),
    ("worst", "worst domain", "D", "white", 0.12),
  ):
    axes.plot([], [], marker, color="0.3", markerfacecolor=face, label=label)
    for i, method in enumerate(methods):
      values = gains.loc[gains["method"] == method, name]
      if method != BASELINE and len(values):
        style = {"fmt": marker, "color": COLORS[method], "markerfacecolor": face}
        spread = values.std() if len(values) > 1 else None
        axes.errorbar(values.mean(), i + shift, xerr=spread, **style)
  axes.axvline(0, color=COLORS[BASELINE], linestyle="--", linewidth=1)
  axes.set_yticks(range(len(methods)), [LABELS[method] for method in methods])
  axes.set_ylim(len(methods) - 0.5, -0.5)
  axes.set_xlabel("minus that of uniform weights, nats per token (left is better)")
  axes.grid(axis="y", alpha=0.3)
  axes.legend(fontsize="small")


def _draw_weights(axes: Axes, weights: pd.DataFrame, columns: Mapping[str, str]) -> None:
  """The mean relative weight of each domain, and of noise, as a table with colours."""
  scale = matplotlib.colors.LogNorm(1 / 3, 3, clip=True)
  axes.imshow(np.maximum(weights, 1e-3), cmap="RdBu_r", norm=scale, aspect="auto", alpha=0.8)
  for (i, j), value in np.ndenumerate(weights):
    color = "black" if 0.45 < value < 2.4 else "white"
    axes.text(j, i, f"{value:.2f}", color=color, ha="center", va="center", fontsize="small")
  axes.set_xticks(range(len(columns)), [*columns.values()], fontsize="small", rotation=15)
  axes.set_yticks([])
  axes.set_title("mean weight (uniform: 1)", loc="left", fontsize="medium")


def draw_curves(
  lines: pd.DataFrame, start: float, looked_at: dict[str, report.Curve], kind: str, path: Path
) -> None:
  """Validation losses over steps, and what batches of a size let a weighting look at.

  They begin at ``start``, the loss of the checkpoint.
  """
  corruptions = report.shares_of_noise(lines)
  num = len(corruptions) + 1
  fig, (*panels, sizes) = plt.subplots(1, num, figsize=(5 * num, 4.8), layout="constrained")
  for axes, corruption in zip(panels, corruptions, strict=True):
    for method in METHODS:
      curves = _curves(lines, corruption, method, "validation_loss")
      if len(curves):
        curves.insert(0, 0, start)
        style = {"color": COLORS[method], "linestyle": "--" if method in DASHED else "-"}
        axes.plot(curves.columns, curves.mean(skipna=False), label=LABELS[method], **style)
    axes.set(xlabel="steps", ylabel="validation loss, mean over seeds (nats per token)")
    axes.set_title(arm_title(corruption, kind), loc="left", fontsize="medium")
  for method, curve in looked_at.items():
    style = {"color": COLORS.get(method, "black"), "marker": "." if method else None}
    dash = {BASELINE: "--", "": ":"}.get(method, "-")
    sizes.plot(*curve, dash, label=LABELS.get(method, "IR-DRO, all data at once"), **style)
  sizes.set_xscale("log", base=2)
  sizes.set(xlabel="batch size", ylabel="weighted mean of the checkpoint's losses")
  sizes.set_title("what weights look at, by batch size", loc="left", fontsize="medium")
  sizes.legend(fontsize="small")
  plots.save(fig, path, legend_of=panels[0])


def _curves(lines: pd.DataFrame, corruption: float, method: str, name: str) -> pd.DataFrame:
  """A number over the steps of a method, a row for each seed; of the runs that are the longest."""
  mine = lines[(lines["corruption"] == corruption) & (lines["method"] == method)]
  lengths = mine.groupby("seed")["step"].transform("size")
  mine = mine[lengths == lengths.max()]
  return mine.pivot(index="seed", columns="step", values=name).astype(float)
