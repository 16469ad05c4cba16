"""Intervals over seeds, of means, of ratios, and of slopes on a log-log scale."""

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats


def slopes(x: ArrayLike, values: ArrayLike) -> np.ndarray:
  r"""The exponents :math:`p` of :math:`x^p` fitted to each row of ``values [rows, len(x)]``."""
  log_x, log_values = np.log(np.asarray(x, float)), np.log(np.asarray(values, float))
  return np.polyfit(log_x, log_values.T, 1)[0]


def half_width(values: ArrayLike) -> float:
  """Half of the 95 % interval of the mean, by Student's law; NaN for one value."""
  array = np.asarray(values, float)
  if len(array) < 2:
    return np.nan
  return float(stats.t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array)))


def mean_cell(values: ArrayLike, digits: int) -> str:
  """``mean ± half`` of the finite values; a dash if there is none."""
  array = np.asarray(values, float)
  array, half = array[np.isfinite(array)], half_width(array[np.isfinite(array)])
  if not len(array):
    return "-"
  return f"{array.mean():.{digits}f}" + ("" if np.isnan(half) else f" ± {half:.{digits}f}")


def slope_cell(x: ArrayLike, values: ArrayLike) -> str:
  """``mean ± half`` of the slopes of the rows."""
  return mean_cell(slopes(x, values), 2)


def ratio_cell(values: ArrayLike, baseline: ArrayLike) -> str:
  """The geometric mean of ratios of paired values, with the factor that their interval has."""
  logs = np.log(np.asarray(values, float) / np.asarray(baseline, float))
  half, mean = half_width(logs), float(np.exp(logs.mean()))
  if np.isnan(half):
    return f"{mean:.3g}"
  low, high = np.exp(logs.mean() - half), np.exp(logs.mean() + half)
  return f"{mean:.3g} ({low:.3g} to {high:.3g})"
