"""Weightings by rank: the top of the batch, one band of it, or all of it without the top."""

import jax
import jax.numpy as jnp

from jaxbo import _check
from jaxbo.dro.batch import Batch, at_least_tiny
from jaxbo.dro.bisection import smallest
from jaxbo.dro.weighting import Response, Weighting, check_weighting, make_weighting, weigh_within


def threshold(batch: Batch, level: jax.Array) -> jax.Array:
  """Returns the largest loss with at least the reference mass ``level`` at or above it."""
  enough = lambda x: batch.expectation(-batch.losses <= x) >= level - _rounding(level)
  return -smallest(enough, -batch.max, -batch.min)


def top_mass(batch: Batch, level: jax.Array) -> jax.Array:
  """Returns the part of each example's reference mass that is in the top ``level``, by loss.

  The parts sum to ``level``. Examples at the threshold share the remaining mass in proportion to
  their own, so the order of the batch does not matter.
  """
  value, rounding = threshold(batch, level), _rounding(level)
  above = jnp.where(batch.losses > value, batch.reference, 0)
  at = jnp.where(batch.losses == value, batch.reference, 0)
  left, mass = level - batch.over.sum(above), batch.over.sum(at)
  # An exponential weight could blow up even the tiny mass of an outlier that rounding leaves.
  whole = (left > rounding) & (left >= mass - rounding)
  return above + at * jnp.where(whole, 1, jnp.clip(left / at_least_tiny(mass), 0, 1))


def _rounding(level: jax.Array) -> float:
  """Returns how far sums of masses may be off."""
  return 32 * float(jnp.finfo(level.dtype).eps)


def cvar_weights(batch: Batch, level: jax.Array) -> jax.Array:
  """Returns the weights of the mean over the top ``level``."""
  mass = top_mass(batch, level)
  return mass / at_least_tiny(batch.over.sum(mass))


def top_k(k: int) -> Weighting:
  r"""The mean of the ``k`` largest losses (online hard example mining).

  This is :func:`cvar` at the level :math:`k / n`, where :math:`n` examples count. Examples that tie
  for the last places share them.

  Cost: a search with one sum over the batch at 7 numbers in each of 11 steps (22 in float64).

  Args:
    k: how many losses to average, at least 1. If fewer examples count, all of them are averaged.

  Returns:
    A :class:`Weighting` without state.

  Raises:
    ValueError: if ``k < 1``.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> jaxbo.dro.top_k(2).weigh(jnp.array([1.0, 4.0, 2.0, 3.0]), ())[0].tolist()
    [0.0, 0.5, 0.0, 0.5]

  References:
    Shrivastava et al., `Training Region-based Object Detectors with Online Hard Example Mining
    <https://arxiv.org/abs/1604.03540>`_, 2016.
  """
  k = _check.positive_int("k", k)

  def respond(batch, state):
    num_valid = jnp.maximum(batch.over.number_of(batch.valid), 1).astype(batch.losses.dtype)
    return Response(cvar_weights(batch, jnp.minimum(k / num_valid, 1)), state)

  return make_weighting(respond)


def mid_rank(fraction: float, band: int) -> Weighting:
  r"""The mean over one band of the ranked losses (MidRanking).

  Losses are ranked from the largest down and cut into bands, each a ``fraction`` of the batch. The
  weights are equal within the chosen band and zero outside it. ``band=0`` keeps the hardest
  examples; ``band=1`` leaves those out as noise and keeps the next ones. An example on the edge of
  the band counts in part, and ties share (our choice: see Departures from the papers).

  Args:
    fraction: the width of a band, as a fraction of the reference mass, in (0, 1].
    band: which band to keep, at least 0, with ``band * fraction < 1``; the last band may be
      narrower.

  Returns:
    A :class:`Weighting` without state.

  Raises:
    ValueError: if ``fraction`` is outside its range, ``band`` is not an int of at least 0, or the
      band lies beyond the whole batch and selects nothing.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> jaxbo.dro.mid_rank(0.25, band=1).weigh(jnp.array([1.0, 9.0, 2.0, 3.0]), ())[0].tolist()
    [0.0, 0.0, 0.0, 1.0]

  References:
    Chen et al., `Take the Bull by the Horns: Hard Sample-Reweighted Continual Training Improves LLM
    Generalization <https://arxiv.org/abs/2402.14270>`_, 2024.
  """
  _check.within("fraction", fraction, 0, 1, ends="(]")
  if isinstance(band, bool) or not isinstance(band, int) or band < 0:
    raise ValueError(f"band must be a Python int of at least 0, got {band!r}")
  if (skipped := band * fraction) >= 1 - 1e-6:  # 49 * (1 / 49) is rounded to less than 1.
    raise ValueError(
      f"band must be below 1 / fraction = {1 / fraction:g}, beyond it selects nothing; got {band}"
    )
  level = min(fraction / (1 - skipped), 1.0)

  def respond(batch, state):
    kept = without_top(batch, skipped)
    return Response(cvar_weights(kept, jnp.asarray(level, batch.losses.dtype)), state)

  return make_weighting(respond)


def doro(weighting: Weighting, fraction: float | jax.Array) -> Weighting:
  r"""Leaves out the largest losses as outliers and applies a weighting to the rest (DORO).

  This removes the top ``fraction`` of the reference mass; the rest is the reference of
  ``weighting``. CVaR-DORO is ``doro(cvar(level), fraction)``; :math:`\chi^2`-DORO is
  ``doro(chi_square_ball(0.5 * (1 / level - 1) ** 2), fraction)``. The example at the edge counts in
  part (our choice: see Departures from the papers).

  Args:
    weighting: any :class:`Weighting`, for the remaining examples.
    fraction: the fraction of the reference mass to leave out, in [0, 1).

  Returns:
    A :class:`Weighting` with the state of ``weighting``.

  Raises:
    ValueError: if ``fraction`` is outside its range.
    TypeError: if ``weighting`` is not a :class:`Weighting`.

  Example:
    >>> import jax.numpy as jnp, jaxbo, numpy as np
    >>> weighting = jaxbo.dro.doro(jaxbo.dro.cvar(1 / 3), fraction=0.25)
    >>> weights, _, _ = weighting.weigh(jnp.array([1.0, 2.0, 3.0, 100.0]), weighting.init())
    >>> print(np.asarray(weights).round(3))
    [0. 0. 1. 0.]

  References:
    Zhai et al., `DORO: Distributional and Outlier Robust Optimization
    <https://arxiv.org/abs/2106.06142>`_, 2021.
  """
  check_weighting("weighting", weighting)
  _check.within("fraction", fraction, 0, 1, ends="[)")

  def respond(batch, state):
    kept = without_top(batch, fraction)
    weights, state, info = weigh_within(weighting, batch.losses, batch, state, prior=kept.reference)
    return Response(weights, state, info.objective, info.temperature)

  return make_weighting(respond, weighting.init)


def without_top(batch: Batch, fraction: float | jax.Array) -> Batch:
  """Returns ``batch`` with the top ``fraction`` of the mass removed from the reference."""
  kept = batch.reference - top_mass(batch, jnp.asarray(fraction, batch.losses.dtype))
  kept = jnp.maximum(kept, 0)
  valid = batch.valid & (kept > 0)
  return batch._replace(reference=kept / at_least_tiny(batch.over.sum(kept)), valid=valid)
