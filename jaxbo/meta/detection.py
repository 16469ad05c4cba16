"""Detectors of task switches and distribution shifts, from scores of the learner."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxbo import _check
from jaxbo._types import Data, PyTree
from jaxbo.meta.thresholds import Threshold, fixed_threshold


class Scores(NamedTuple):
  """The two scores that detectors see in a round; high values indicate a change.

  Attributes:
    switch: how badly the previous task's model does on the new data, a scalar.
    shift: how little the data look like the pre-training data, a scalar.
  """

  switch: jax.Array
  shift: jax.Array


class Detection(NamedTuple):
  """What was detected in a round: one of the three cases of LEEDS.

  Attributes:
    switch: whether the task changed, bool.
    shift: whether the new task comes from another distribution, bool; false without a switch.
    scores: the :class:`Scores` behind the detection; later sweeps over thresholds need them.
  """

  switch: jax.Array
  shift: jax.Array
  scores: Scores


class DetectorState(NamedTuple):
  """State of a :class:`Detector`.

  Attributes:
    has_task: whether a round was played before, bool.
    switch_rule: the state of the rule for switches.
    shift_rule: the state of the rule for shifts.
  """

  has_task: jax.Array
  switch_rule: PyTree
  shift_rule: PyTree


class Detector(NamedTuple):
  """A pair of detectors, of task switches and of distribution shifts; pure functions with state.

  There are two steps because a learner knows the shift score only after it has acted on the switch.
  :meth:`update` takes both steps at once, for logged scores.

  Attributes:
    init: ``init() -> DetectorState``.
    detect_switch: ``detect_switch(score, state, batch=None) -> (switch, state)``. The first round
      always counts as a switch.
    detect_shift: ``detect_shift(score, state, batch=None, *, switch) -> (shift, state)``. Without a
      ``switch`` there is no shift, and the rule does not learn from the score.
  """

  init: Callable[[], DetectorState]
  detect_switch: Callable[..., tuple[jax.Array, DetectorState]]
  detect_shift: Callable[..., tuple[jax.Array, DetectorState]]

  def update(
    self, scores: Scores, state: DetectorState, batch: Data = None
  ) -> tuple[Detection, DetectorState]:
    """Runs both detectors on the scores of a round."""
    switch, state = self.detect_switch(scores.switch, state, batch)
    shift, state = self.detect_shift(scores.shift, state, batch, switch=switch)
    return Detection(switch, shift, scores), state


def threshold_detector(
  switch: Threshold | jax.typing.ArrayLike, shift: Threshold | jax.typing.ArrayLike
) -> Detector:
  r"""Detects a switch where one score exceeds a threshold, and a shift where another does.

  .. math::
    \text{switch}_t = [s_t > \ell] \text{ or } t = 1, \qquad
    \text{shift}_t = \text{switch}_t \text{ and } [e_t > \tau]

  :func:`jaxbo.meta.online_meta_learner` chooses the scores. A threshold of minus infinity always
  detects; a threshold of infinity never does (except the switch of the first round). A NaN score
  exceeds no threshold.

  Args:
    switch: :math:`\ell`, a number or a rule such as :func:`jaxbo.meta.quantile_threshold`.
    shift: :math:`\tau`, a number or a rule.

  Returns:
    A :class:`Detector`.

  Raises:
    ValueError: if a threshold is NaN.
    TypeError: if a threshold is neither a number nor a :class:`jaxbo.meta.Threshold`.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> detector = jaxbo.meta.threshold_detector(switch=2.0, shift=-3.0)
    >>> state = detector.init()
    >>> for loss, energy in ((0.1, -9.0), (0.5, 9.0), (4.0, -1.0)):
    ...   scores = jaxbo.meta.Scores(jnp.float32(loss), jnp.float32(energy))
    ...   detection, state = detector.update(scores, state)
    ...   print(detection.switch, detection.shift)
    True False
    False False
    True True
  """
  rules = [
    rule if isinstance(rule, Threshold) else _fixed(name, rule)
    for name, rule in (("switch", switch), ("shift", shift))
  ]

  def init():
    return DetectorState(jnp.bool_(False), *(rule.init() for rule in rules))

  def detect_switch(score, state, batch=None):
    del batch
    # The meta-model made the first score, so it is a sample of neither kind.
    exceeded, rule = rules[0].update(score, state.switch_rule, state.has_task)
    switch = exceeded | ~state.has_task
    return switch, state._replace(has_task=jnp.ones_like(state.has_task), switch_rule=rule)

  def detect_shift(score, state, batch=None, *, switch):
    del batch
    exceeded, rule = rules[1].update(score, state.shift_rule, switch)
    return exceeded & switch, state._replace(shift_rule=rule)

  return Detector(init, detect_switch, detect_shift)


def _fixed(name: str, value: PyTree) -> Threshold:
  return fixed_threshold(_check.not_nan(name, value))


def oracle_detector(
  switch: Callable[[Data], jax.typing.ArrayLike] | None = None,
  out_of_distribution: Callable[[Data], jax.typing.ArrayLike] | None = None,
) -> Detector:
  """A detector that reads the truth from the batch: the upper bound for any detector.

  Args:
    switch: ``switch(batch) -> bool``, whether the task changed; by default ``batch.task_switch``.
    out_of_distribution: ``out_of_distribution(batch) -> bool``, whether the task comes from a
      domain other than the pre-training domain; by default ``batch.domain != 0``.

  Returns:
    A :class:`Detector`. The first round always counts as a switch.

  Raises:
    TypeError: if an argument is not a function of a batch; in a round, if an argument is missing
      and the batch lacks the default field.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> detector = jaxbo.meta.oracle_detector(lambda batch: batch > 0, lambda batch: batch > 1)
    >>> state, scores = detector.init(), jaxbo.meta.Scores(jnp.float32(0.0), jnp.float32(0.0))
    >>> for batch in (0, 0, 2):
    ...   detection, state = detector.update(scores, state, batch)
    ...   print(detection.switch, detection.shift)
    True False
    False False
    True True
  """
  unknown = out_of_distribution
  if switch is None:
    switch = lambda batch: _told(batch, "task_switch", "switch")
  if unknown is None:
    unknown = lambda batch: _told(batch, "domain", "out_of_distribution") != 0
  for name, function in (("switch", switch), ("out_of_distribution", unknown)):
    _check.takes_arguments(name, function, "batch")

  def init():
    return DetectorState(jnp.bool_(False), (), ())

  def detect_switch(score, state, batch=None):
    del score
    told = jnp.asarray(switch(batch), bool) | ~state.has_task
    return told, state._replace(has_task=jnp.ones_like(state.has_task))

  def detect_shift(score, state, batch=None, *, switch):
    del score
    return jnp.asarray(unknown(batch), bool) & switch, state

  return Detector(init, detect_switch, detect_shift)


def _told(batch: Data, field: str, argument: str) -> jax.typing.ArrayLike:
  if not hasattr(batch, field):
    raise TypeError(
      f"{argument} must be given for batches without {field}, got a {type(batch).__name__}"
    )
  return getattr(batch, field)
