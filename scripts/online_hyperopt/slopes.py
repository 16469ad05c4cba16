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
  """The geometric mean of ratios of paired values, with its interval."""
  logs = np.log(np.asarray(values, float) / np.asarray(baseline, float))
  half, mean = half_width(logs), logs.mean()
  show = lambda log: np.format_float_positional(np.exp(log), 3, fractional=False, trim="-")
  return show(mean) + ("" if np.isnan(half) else f" ({show(mean - half)} to {show(mean + half)})")
