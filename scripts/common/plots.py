"""Pieces of pictures that several scripts draw."""

from pathlib import Path

import jax
import matplotlib

matplotlib.use("Agg")  # Scripts write files, also where there is no display.

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from scripts.common.files import writing


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


def save(fig: Figure, path: Path, legend_of: Axes | None = None, ncols: int = 6) -> None:
  """Writes a picture, in process 0, and frees its memory; below is the legend of ``legend_of``."""
  if legend_of is not None:
    legend = legend_of.get_legend_handles_labels()
    fig.legend(*legend, loc="outside lower center", ncols=ncols, fontsize="small")
  if not jax.process_index():
    with writing(path):
      fig.savefig(path, dpi=120)
  plt.close(fig)
