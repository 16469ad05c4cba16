"""Thresholds of detectors: fixed, by quantile, or calibrated on a validation stream."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbo import _check
from jaxbo._types import PyTree
from jaxbo.online.window import Window, empty_window


class Threshold(NamedTuple):
  """A rule that says which scores are too high.

  Attributes:
    init: ``init() -> state``.
    update: ``update(score, state, active=True) -> (exceeded, state)``, with a scalar score. The
      rule learns from a score only if ``active`` is true and the score is finite. A NaN score
      exceeds no threshold.
  """

  init: Callable[[], PyTree]
  update: Callable[..., tuple[jax.Array, PyTree]]


class FixedThresholdState(NamedTuple):
  """State of :func:`fixed_threshold`.

  Attributes:
    threshold: float32. The threshold is an array in the state, so one compiled program serves a
      sweep over thresholds.
  """

  threshold: jax.Array


class QuantileThresholdState(NamedTuple):
  """State of :func:`quantile_threshold`.

  Attributes:
    score_window: the :class:`jaxbo.online.Window` of the last scores, float32.
  """

  score_window: Window


def fixed_threshold(value: jax.typing.ArrayLike) -> Threshold:
  """A threshold that never changes.

  Args:
    value: the threshold; higher scores exceed it. Minus infinity always detects, infinity never.

  Returns:
    A :class:`Threshold`.

  Raises:
    ValueError: if ``value`` is NaN.
    TypeError: if ``value`` is not a number.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> rule = jaxbo.meta.fixed_threshold(2.0)
    >>> exceeded, state = rule.update(jnp.float32(3.0), rule.init())
    >>> bool(exceeded)
    True
  """
  _check.not_nan("threshold", value)

  def init():
    return FixedThresholdState(jnp.asarray(value, jnp.float32))

  def update(score, state, active=True):
    del active
    return score > state.threshold, state

  return Threshold(init, update)


def quantile_threshold(
  level: jax.typing.ArrayLike, window: int, *, initial: jax.typing.ArrayLike = float("inf")
) -> Threshold:
  """A threshold at a quantile of the last scores, for scores of unknown scale.

  The rule compares each score with the scores before it and then adds it to them, whether it
  exceeded the threshold or not. If the rule left high scores out, the threshold would sink forever.
  So ``level`` is the fraction of all (active) scores that should pass. For task switches it is the
  probability that a task stays. For distribution shifts it is the fraction of switches that lead to
  in-distribution tasks.

  Args:
    level: the quantile, in [0, 1].
    window: how many of the last scores count, at least 1. Memory: ``window`` numbers.
    initial: the threshold until the window holds ``window`` scores.

  Returns:
    A :class:`Threshold`.

  Raises:
    ValueError: if ``level`` is outside [0, 1], ``window < 1``, or ``initial`` is NaN.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> rule = jaxbo.meta.quantile_threshold(0.5, 3)
    >>> state, exceeded = rule.init(), []
    >>> for score in (1.0, 2.0, 9.0, 1.5, 8.0):
    ...   now, state = rule.update(jnp.float32(score), state)
    ...   exceeded.append(bool(now))
    >>> exceeded                                   # 1.5 is below the median of 1, 2, 9; 8 above 2
    [False, False, False, False, True]
  """
  _check.within("level", level, 0, 1)
  window = _check.positive_int("window", window)
  _check.not_nan("initial", initial)

  def init():
    return QuantileThresholdState(empty_window(jnp.zeros((), jnp.float32), window))

  def update(score, state, active=True):
    window = state.score_window
    quantile = jnp.quantile(window.values, jnp.asarray(level, jnp.float32))
    threshold = jnp.where(jnp.all(window.present), quantile, initial)
    learn = jnp.asarray(active) & jnp.isfinite(score)
    pushed = window.push(jnp.where(learn, score, 0))
    window = jax.tree.map(lambda new, old: jnp.where(learn, new, old), pushed, window)
    return score > threshold, QuantileThresholdState(window)

  return Threshold(init, update)


class Thresholds(NamedTuple):
  """The thresholds that :func:`calibrate` found.

  Attributes:
    switch: the threshold of the switch score, a float.
    shift: the threshold of the shift score, a float.
  """

  switch: float
  shift: float


def calibrate(
  scores: PyTree,
  task_switch: PyTree,
  out_of_distribution: PyTree,
  *,
  rule: str = "midpoint",
  level: float = 0.95,
) -> Thresholds:
  """Finds both thresholds from the scores of a validation stream whose true changes are known.

  Play the stream with :func:`jaxbo.meta.oracle_detector`, so that the learner restarts exactly
  where it should. Then pass the history's ``detection.scores``. Build the stream from validation
  classes: do not choose thresholds on the stream whose results you report. The first round has no
  previous task, so it does not count; scores that are not finite do not count either.

  The rules are our choice: see Departures from the papers.

  Args:
    scores: a :class:`jaxbo.meta.Scores` with fields ``[rounds]``.
    task_switch: the true switches, ``[rounds]`` bool.
    out_of_distribution: ``[rounds]`` bool: whether the task comes from a distribution other than
      that of the pre-training.
    rule: the rule for the switch threshold. ``"midpoint"``: halfway between the median scores with
      and without a switch. ``"roc"``: where the detection rate exceeds the false-alarm rate most
      (Youden's index), halfway to the next score.
    level: the quantile, in [0, 1], of the scores at switches to in-distribution tasks that becomes
      the shift threshold.

  Returns:
    The :class:`Thresholds`, for :func:`jaxbo.meta.threshold_detector`.

  Raises:
    ValueError: if ``rule`` is neither value, ``level`` is outside [0, 1], or shapes differ; if the
      stream, after its first round, has no finite score with a switch, without a switch, or with a
      switch to an in-distribution task.
    TypeError: if ``scores`` is not a pair of scores, for example a :class:`jaxbo.meta.Detection`.

  Example:
    >>> import numpy as np, jaxbo
    >>> scores = jaxbo.meta.Scores(switch=np.array([9.0, 1.0, 5.0, 1.0]), shift=np.arange(4.0))
    >>> truth = np.array([True, False, True, False])
    >>> jaxbo.meta.calibrate(scores, truth, np.zeros(4, bool))
    Thresholds(switch=3.0, shift=2.0)
  """
  _check.one_of("rule", rule, ("midpoint", "roc"))
  _check.within("level", level, 0, 1)
  if not hasattr(scores, "switch") or not hasattr(scores, "shift") or len(scores) != 2:
    raise TypeError(
      "scores must be a jaxbo.meta.Scores, as in history.detection.scores, "
      f"got {type(scores).__name__}"
    )
  switch_scores, shift_scores = (np.asarray(leaf, np.float64) for leaf in scores)
  switches, unknown = np.asarray(task_switch, bool), np.asarray(out_of_distribution, bool)
  shapes = {leaf.shape for leaf in (switch_scores, shift_scores, switches, unknown)}
  if len(shapes) != 1 or switches.ndim != 1:
    raise ValueError(
      f"scores, task_switch and out_of_distribution must have one shape [rounds], got {shapes}"
    )
  later = np.arange(len(switches)) > 0
  with_switch = _finite("with a switch", switch_scores[switches & later])
  without = _finite("without a switch", switch_scores[~switches & later])
  known = _finite(
    "with a switch to an in-distribution task", shift_scores[switches & ~unknown & later]
  )
  if rule == "midpoint":
    threshold = (np.median(with_switch) + np.median(without)) / 2
  else:
    values = np.unique(np.concatenate([with_switch, without]))
    above = lambda sample: 1 - np.searchsorted(np.sort(sample), values, "right") / len(sample)
    best = int(np.argmax(above(with_switch) - above(without)))
    threshold = np.mean(values[best : best + 2])
  return Thresholds(float(threshold), float(np.quantile(known, level)))


def _finite(kind: str, sample: np.ndarray) -> np.ndarray:
  sample = sample[np.isfinite(sample)]
  if not sample.size:
    raise ValueError(f"scores must have at least one finite round {kind}, after the first round")
  return sample
