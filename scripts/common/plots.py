"""Pieces of pictures that several scripts draw."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # Scripts write files, also where there is no display.

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike


def one_wide_and_a_grid(num_panels: int) -> tuple[Figure, Axes, list[Axes]]:
  """A figure with one large plot on the left and ``num_panels`` small ones, two in a row."""
  fig = plt.figure(figsize=(13, 5.5), layout="constrained")
  if not num_panels:
    return fig, fig.subplots(), []
  left, right = fig.subfigures(1, 2, squeeze=False)[0]
  rows = -(-num_panels // 2)
  panels = right.subplots(rows, min(num_panels, 2), squeeze=False, sharex=True, sharey=True).ravel()
  for panel in panels[num_panels:]:
    panel.set_visible(False)
  return fig, left.subplots(), list(panels[:num_panels])


def mean_and_range(
  axes: Axes, x: np.ndarray, values: ArrayLike, *, label: str, color: str, band: bool = True
) -> None:
  """A line through the mean of ``values`` (one row a seed), in a band from least to greatest.

  Without ``band`` the line is dashed.
  """
  array = np.asarray(values, float)
  line = "-" if band else "--"
  axes.plot(x, array.mean(axis=0), color=color, label=label, linestyle=line, marker=".", ms=4)
  if band:
    axes.fill_between(x, array.min(axis=0), array.max(axis=0), color=color, alpha=0.15, lw=0)


def broken_off(axes: Axes, x: ArrayLike, values: ArrayLike, *, label: str, color: str) -> None:
  """A thin dotted line that ends in a cross: a run that did not end."""
  style = {"linestyle": ":", "marker": "x", "markevery": [np.size(x) - 1]}
  axes.plot(np.asarray(x), np.asarray(values), color=color, label=label, **style)


def histograms(axes: Axes, groups: Mapping[str, np.ndarray], edges: np.ndarray) -> None:
  """A histogram for each named group of numbers, over each other."""
  for label, values in groups.items():
    axes.hist(values, list(edges), alpha=0.6, label=label)
  axes.legend(fontsize="small")


def save(fig: Figure, path: Path, legend_of: Axes | None = None, ncols: int = 6) -> None:
  """Writes a picture and frees its memory; below it is the legend of ``legend_of``, if given."""
  if legend_of is not None:
    legend = legend_of.get_legend_handles_labels()
    fig.legend(*legend, loc="outside lower center", ncols=ncols, fontsize="small")
  fig.savefig(path, dpi=120)
  plt.close(fig)
