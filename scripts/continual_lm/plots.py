"""Pictures of continual language-model training."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.colors
import numpy as np
from matplotlib.axes import Axes

from scripts.common import plots
from scripts.common.plots import plt
from scripts.continual_lm import report as lm_report
from scripts.continual_lm.methods import BASELINE, METHODS
from scripts.continual_lm.report import START, Row


def color_of(method: str) -> str:
  """The colour of a method in all pictures; uniform weights are grey."""
  others = [name for name in METHODS if name != BASELINE]
  return "0.4" if method == BASELINE else f"C{others.index(method)}"


# Drawn dashed: what others are compared with, and what would hide another line.
DASHED = (BASELINE, "ir_dro_compositional")


def arm_title(corruption: float, kind: str) -> str:
  """What the data of a share of noise are."""
  what = "with shuffled tokens" if kind == "shuffled" else "of random tokens"
  return f"{corruption:.0%} of the sequences {what}" if corruption else "clean data"


def draw_overview(
  rows: Sequence[Row], lines: Sequence[Row], domains: Sequence[str], kind: str, path: Path
) -> None:
  """For each share of noise: losses beside those of uniform weights, weights, and their ESS."""
  corruptions = sorted({row["corruption"] for row in rows if row["method"] != START})
  fig, grid = plt.subplots(
    len(corruptions),
    3,
    figsize=(15, 0.4 + 4.2 * len(corruptions)),
    width_ratios=[1.1, 0.8, 1.0],
    layout="constrained",
    squeeze=False,
  )
  for corruption, (losses, weights, ess) in zip(corruptions, grid, strict=True):
    methods = [name for name, _ in lm_report.runs_of(rows, corruption) if name != START]
    _draw_differences(losses, rows, corruption, methods)
    losses.set_title(f"{arm_title(corruption, kind)}: test loss", loc="left", fontsize="medium")
    _draw_weights(weights, rows, corruption, methods, domains)
    for method in methods:
      curves = _curves(lines, corruption, method, "ess")
      plots.mean_and_range(
        ess,
        *curves,
        label=METHODS[method].label,
        color=color_of(method),
        band=method not in DASHED,
      )
    ess.set(xlabel="steps", ylim=(0, 1.05))
    ess.set_title("effective sample size / batch", loc="left", fontsize="medium")
  handles, labels = grid[0, 2].get_legend_handles_labels()
  fig.legend(handles, labels, loc="outside lower center", ncols=6, fontsize="small")
  plots.save(fig, path)


def _draw_differences(
  axes: Axes, rows: Sequence[Row], corruption: float, methods: Sequence[str]
) -> None:
  """Points with a bar of one standard deviation: left of zero is better than uniform weights."""
  for name, label, marker, shift in (
    ("loss", "mean", "o", -0.12),
    ("worst", "worst domain", "D", 0.12),
  ):
    for i, method in enumerate(methods):
      values = lm_report.differences(rows, corruption, method, name)
      if method == BASELINE or not values:
        continue
      axes.errorbar(
        np.mean(values),
        i + shift,
        xerr=np.std(values, ddof=1) if len(values) > 1 else None,
        color=color_of(method),
        marker=marker,
        markerfacecolor=color_of(method) if name == "loss" else "white",
        linestyle="none",
      )
    axes.plot([], [], marker, color="0.3", markerfacecolor=None if name == "loss" else "white",
              label=label)  # fmt: skip
  axes.axvline(0, color=color_of(BASELINE), linestyle="--", linewidth=1)
  axes.set_yticks(range(len(methods)), [METHODS[method].label for method in methods])
  axes.set_ylim(len(methods) - 0.5, -0.5)
  axes.set_xlabel("minus that of uniform weights, nats per token (left is better)")
  axes.grid(axis="y", alpha=0.3)
  axes.legend(fontsize="small")


def _draw_weights(
  axes: Axes,
  rows: Sequence[Row],
  corruption: float,
  methods: Sequence[str],
  domains: Sequence[str],
) -> None:
  """The mean relative weight of each domain, and of noise, as a table with colours."""
  columns = {f"weight/{name}": name for name in domains}
  if corruption:
    columns |= {"weight_noise": "noise"}
  runs = dict(lm_report.runs_of(rows, corruption))
  table = np.array([[np.mean([row[c] for row in runs[m]]) for c in columns] for m in methods])
  scale = matplotlib.colors.LogNorm(1 / 3, 3, clip=True)
  axes.imshow(np.maximum(table, 1e-3), cmap="RdBu_r", norm=scale, aspect="auto", alpha=0.8)
  for (i, j), value in np.ndenumerate(table):
    color = "black" if 0.45 < value < 2.4 else "white"
    axes.text(j, i, f"{value:.2f}", color=color, ha="center", va="center", fontsize="small")
  axes.set_xticks(range(len(columns)), [*columns.values()], fontsize="small", rotation=15)
  axes.set_yticks([])
  axes.set_title("mean weight (uniform: 1)", loc="left", fontsize="medium")


def draw_curves(
  lines: Sequence[Row],
  start: Mapping[int, float],
  looked_at: Mapping[str, tuple[Sequence[int], Sequence[float]]],
  kind: str,
  path: Path,
) -> None:
  """Validation losses over steps, and what batches of a size let a weighting look at.

  Args:
    lines: of all runs.
    start: the validation loss of each seed's checkpoint.
    looked_at: curves over batch sizes of the weighted mean loss, by method; "" for one method's on
      all data at once.
    kind: of the noise.
    path: of the picture.
  """
  continual = [line for line in lines if line["method"] in METHODS]
  corruptions = sorted({line["corruption"] for line in continual})
  fig, panels = plt.subplots(
    1, len(corruptions) + 1, figsize=(5 * len(corruptions) + 5, 4.8), layout="constrained"
  )
  for axes, corruption in zip(panels, corruptions, strict=False):
    for method in METHODS:
      steps, values = _curves(continual, corruption, method, "validation_loss")
      if values:
        seeds = _seeds(continual, corruption, method)
        values = [[start[seed], *curve] for seed, curve in zip(seeds, values, strict=True)]
        mean = np.mean(values, axis=0)
        line = "--" if method in DASHED else "-"
        axes.plot([0, *steps], mean, line, color=color_of(method), label=METHODS[method].label)
    axes.set(xlabel="steps", ylabel="validation loss, mean over seeds (nats per token)")
    axes.set_title(arm_title(corruption, kind), loc="left", fontsize="medium")
  for method, (sizes, values) in looked_at.items():
    if method:
      style = {"color": color_of(method), "linestyle": "--" if method == BASELINE else "-"}
      panels[-1].plot(sizes, values, marker=".", label=METHODS[method].label, **style)
    else:
      panels[-1].plot(sizes, values, "k:", label="IR-DRO, all data at once")
  panels[-1].set_xscale("log", base=2)
  panels[-1].set(xlabel="batch size", ylabel="weighted mean of the checkpoint's losses")
  panels[-1].set_title("what weights look at, by batch size", loc="left", fontsize="medium")
  panels[-1].legend(fontsize="small")
  handles, labels = panels[0].get_legend_handles_labels()
  fig.legend(handles, labels, loc="outside lower center", ncols=6, fontsize="small")
  plots.save(fig, path)


def _of_run(lines: Sequence[Row], corruption: float, method: str) -> dict[int, list[Row]]:
  """The lines of a method at a share of noise, by seed; of the runs that are the longest."""
  runs: dict[int, list[Row]] = {}
  for line in lines:
    if line["method"] == method and line["corruption"] == corruption:
      runs.setdefault(line["seed"], []).append(line)
  longest = max(map(len, runs.values()), default=0)
  return {seed: run for seed, run in runs.items() if len(run) == longest}


def _seeds(lines: Sequence[Row], corruption: float, method: str) -> list[int]:
  return list(_of_run(lines, corruption, method))


def _curves(
  lines: Sequence[Row], corruption: float, method: str, name: str
) -> tuple[np.ndarray, list[list[float]]]:
  """Steps, and a number over them for each seed; NaN where a file has none that is finite."""
  runs = _of_run(lines, corruption, method)
  steps = [line["step"] for line in next(iter(runs.values()), [])]
  values = [np.array([line[name] for line in run], float).tolist() for run in runs.values()]
  return np.array(steps), values
