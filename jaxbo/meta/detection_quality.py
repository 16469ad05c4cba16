"""The quality of a change detector: precision, recall, delay."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class DetectionQuality(NamedTuple):
  """Counts of a detector's hits and misses, with the ratios as properties; it can follow a stream.

  Attributes:
    num_judged: rounds so far, int32, like all counts.
    num_changes: true changes.
    num_hits: changes that were detected in time.
    num_false_alarms: detections that were not hits.
    total_delay: rounds from change to detection, summed over the hits.
    change_pending: whether the last change has not been detected yet, bool.
    change_age: rounds since the last change or boundary.
  """

  num_judged: jax.Array
  num_changes: jax.Array
  num_hits: jax.Array
  num_false_alarms: jax.Array
  total_delay: jax.Array
  change_pending: jax.Array
  change_age: jax.Array

  @classmethod
  def start(cls) -> "DetectionQuality":
    """Returns the counts before the first round."""
    zero = jnp.int32(0)
    return cls(zero, zero, zero, zero, zero, jnp.bool_(False), zero)

  def update(
    self,
    detected: jax.typing.ArrayLike,
    changed: jax.typing.ArrayLike,
    boundary: jax.typing.ArrayLike = False,
    *,
    max_delay: jax.typing.ArrayLike | None = None,
  ) -> "DetectionQuality":
    """Returns the counts after one more round.

    Args:
      detected: whether the detector raised a flag in this round.
      changed: whether there was a true change in this round.
      boundary: whether the time to detect an earlier change ends in this round.
      max_delay: the largest delay of a hit in rounds; a later flag is a false alarm.
    """
    judged = self.num_judged > 0  # In the first round nothing could have changed.
    detected, changed = jnp.asarray(detected, bool) & judged, jnp.asarray(changed, bool) & judged
    begins = changed | jnp.asarray(boundary, bool)
    age = jnp.where(begins, 0, self.change_age + 1)
    pending = jnp.where(begins, changed, self.change_pending)
    hit = detected & pending & (True if max_delay is None else age <= max_delay)
    add = lambda count, flag: count + jnp.asarray(flag, jnp.int32)
    return DetectionQuality(
      num_judged=add(self.num_judged, True),
      num_changes=add(self.num_changes, changed),
      num_hits=add(self.num_hits, hit),
      num_false_alarms=add(self.num_false_alarms, detected & ~hit),
      total_delay=self.total_delay + jnp.where(hit, age, 0),
      change_pending=pending & ~hit,
      change_age=age,
    )

  @property
  def precision(self) -> jax.Array:
    """The fraction of detections that were hits; NaN without detections."""
    return self.num_hits / (self.num_hits + self.num_false_alarms)

  @property
  def recall(self) -> jax.Array:
    """The fraction of changes that were detected; NaN without changes."""
    return self.num_hits / self.num_changes

  @property
  def mean_delay(self) -> jax.Array:
    """Rounds from a change to its detection, 0 for the same round; NaN without hits."""
    return self.total_delay / self.num_hits


def detection_quality(
  detected: jax.typing.ArrayLike,
  changed: jax.typing.ArrayLike,
  *,
  boundaries: jax.typing.ArrayLike | None = None,
  max_delay: jax.typing.ArrayLike | None = None,
) -> DetectionQuality:
  r"""Judges the flags of a detector by the true changes.

  The first flag from the round of a change on, before the next change or boundary, *detects* the
  change. The delay is the number of rounds between the two. Every other flag is a *false alarm*,
  including a second flag for the same change.

  .. math::
    \text{precision} = \frac{\text{hits}}{\text{flags}}, \qquad
    \text{recall} = \frac{\text{hits}}{\text{changes}}

  The first round is not judged: every detector raises its flag there, and nothing changed. (OSAKA's
  code defines other ratios: see Departures from the papers.)

  An online meta-learner has two detectors. Judge the switch detector by

  ``detection_quality(detection.switch, truth.task_switch)``,

  and the shift detector by the switches that left the distribution of the pre-training; its time to
  detect a shift ends with the next task:

  ``detection_quality(detection.shift, truth.task_switch & (truth.domain != 0),
  boundaries=truth.task_switch)``.

  To sweep thresholds after a run, replace the flags by comparisons of the logged scores:
  ``jax.vmap(lambda l: detection_quality(scores.switch > l, changed))(thresholds)``. The result says
  what other thresholds would have detected on the scores of *this* run. A learner that really used
  another threshold would produce other scores.

  Args:
    detected: the detector's flags, ``[rounds]`` bool.
    changed: the true changes, ``[rounds]`` bool.
    boundaries: ``[rounds]`` bool: where the time to detect a change ends, besides at the next
      change.
    max_delay: the largest delay of a hit, in rounds; a later flag is a false alarm. No limit by
      default.

  Returns:
    The :class:`DetectionQuality`, with ``precision``, ``recall``, ``mean_delay`` and
    ``num_false_alarms``. The function is pure: use it under ``jit`` and ``vmap``. To follow a
    stream round by round, use ``DetectionQuality.start()`` and its ``update``.

  Raises:
    ValueError: if the flags do not all have one shape ``[rounds]``.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> changed = jnp.array([1, 0, 0, 1, 0, 0, 1, 0, 0], bool)
    >>> detected = jnp.array([1, 0, 1, 0, 1, 1, 1, 0, 0], bool)
    >>> quality = jaxbo.meta.detection_quality(detected, changed)
    >>> print(quality.precision, quality.recall, quality.mean_delay, quality.num_false_alarms)
    0.5 1.0 0.5 2
  """
  flags = {"detected": detected, "changed": changed, "boundaries": boundaries}
  given = {name: jnp.asarray(flag, bool) for name, flag in flags.items() if flag is not None}
  shapes = {name: flag.shape for name, flag in given.items()}
  if len(set(shapes.values())) != 1 or len(shapes["detected"]) != 1:
    raise ValueError(f"all flags must have one shape [rounds], got {shapes}")

  def body(quality, flags):
    return quality.update(*flags, max_delay=max_delay), None

  return jax.lax.scan(body, DetectionQuality.start(), tuple(given.values()))[0]
