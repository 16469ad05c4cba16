"""The gate: scales an optimizer's update by what was detected."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check, _tree
from jaxbo.bilevel.response import MISSING
from jaxbo.meta.detection import Detection


class GateScales(NamedTuple):
  """The factor on the update in each of the three cases; float32 scalars.

  Attributes:
    no_switch: the task continues.
    in_distribution: a new task from the known distribution.
    out_of_distribution: a new task from another distribution.
  """

  no_switch: jax.Array
  in_distribution: jax.Array
  out_of_distribution: jax.Array

  def of(self, detection: Detection) -> jax.Array:
    """Returns the scale of the detected case."""
    new = jnp.where(detection.shift, self.out_of_distribution, self.in_distribution)
    return jnp.where(detection.switch, new, self.no_switch)


class GateInfo(NamedTuple):
  """Diagnostics of :func:`~jaxbo.gate_by_detection`.

  Attributes:
    gate_scale: the factor on the last update, float32.
  """

  gate_scale: jax.Array


class GateState(NamedTuple):
  """State of :func:`~jaxbo.gate_by_detection`.

  Attributes:
    gated_state: the state of the wrapped optimizer.
    gate_scales: the :class:`GateScales`. They are arrays in the state, so one compiled program
      serves a sweep over scales.
    info: the :class:`GateInfo` of the last update.
  """

  gated_state: optax.OptState
  gate_scales: GateScales
  info: GateInfo


def gate_by_detection(
  optimizer: optax.GradientTransformation,
  in_distribution_scale: jax.typing.ArrayLike,
  out_of_distribution_scale: jax.typing.ArrayLike,
  no_switch_scale: jax.typing.ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
  r"""Wraps an optimizer and scales its update by what was detected.

  .. math::
    u = \begin{cases}
      c_0\, \mathrm{optimizer}(g) & \text{no switch} \\
      c_{\text{in}}\, \mathrm{optimizer}(g) & \text{a switch, in distribution} \\
      c_{\text{out}}\, \mathrm{optimizer}(g) & \text{a switch, out of distribution}
    \end{cases}

  A scale of zero closes the gate: the parameters *and* the optimizer's state stay unchanged, bit
  for bit, even if the optimizer's own update is NaN. This is why the gate wraps the optimizer. A
  gate in front of Adam would not work: with a gradient of zero, Adam's momentum still moves the
  parameters, and scales of 0.1 and 1 give the same first step.

  Put the response first: ``optax.chain(response, gate_by_detection(optimizer, ...))``.
  :func:`jaxbo.meta.online_meta_learner` checks the gate before each meta-update. While the gate is
  closed, it computes neither the meta-gradient nor the response (unless the gate covers only some
  of the parameters, as in ``optax.partition``).

  Args:
    optimizer: any optax optimizer.
    in_distribution_scale: :math:`c_{\text{in}} \ge 0`; small or zero to keep what is known.
    out_of_distribution_scale: :math:`c_{\text{out}} \ge 0`; large to learn fast.
    no_switch_scale: :math:`c_0 \ge 0`.

  Returns:
    A transformation whose ``update`` requires ``detection=``, a :class:`jaxbo.meta.Detection`.
    Memory: the optimizer's, plus four numbers.

  Raises:
    ValueError: if a scale is negative or not finite.
    TypeError: if ``optimizer`` is not a transformation; if ``update`` does not receive
      ``detection=``.

  Example:
    >>> import jax.numpy as jnp, jaxbo, optax
    >>> tx = jaxbo.gate_by_detection(optax.sgd(1.0), 0.25, 1.0)
    >>> x = jnp.float32(0.0)
    >>> state, scores = tx.init(x), jaxbo.meta.Scores(jnp.float32(0.0), jnp.float32(0.0))
    >>> for switch, shift in ((False, False), (True, False), (True, True)):
    ...   detection = jaxbo.meta.Detection(jnp.bool_(switch), jnp.bool_(shift), scores)
    ...   updates, state = tx.update(jnp.float32(-2.0), state, x, detection=detection)
    ...   print(updates)
    0.0
    0.5
    2.0

  References:
    Sow, Lin, Liang and Zhang, `Algorithm Design for Online Meta-Learning with Task Boundary
    Detection <https://arxiv.org/abs/2302.00857>`_, 2024. The three cases are our reading: see
    Departures from the papers.
  """
  _check.transformation("optimizer", optimizer)
  given = {
    "no_switch_scale": no_switch_scale,
    "in_distribution_scale": in_distribution_scale,
    "out_of_distribution_scale": out_of_distribution_scale,
  }
  for name, value in given.items():
    _check.non_negative(name, value)
  gated = optax.with_extra_args_support(optimizer)

  def init(params):
    scales = GateScales(*(jnp.asarray(value, jnp.float32) for value in given.values()))
    return GateState(gated.init(params), _tree.copy(scales), GateInfo(jnp.float32(0.0)))

  def update(updates, state, params=None, *, detection: Any = MISSING, **extra_args):
    if not isinstance(detection, Detection):
      raise TypeError(
        "gate_by_detection: update must be given detection=, a jaxbo.meta.Detection; "
        "jaxbo.meta.online_meta_learner gives it"
      )
    scales = state.gate_scales
    if not all(map(_check.is_known, given.values())):  # optax.inject_hyperparams has new ones.
      scales = GateScales(*(jnp.asarray(value, jnp.float32) for value in given.values()))
    scale = scales.of(detection)
    opened, gated_state = gated.update(
      updates, state.gated_state, params, detection=detection, **extra_args
    )
    is_open = scale > 0
    scaled = _tree.scaled(scale, opened)
    return (
      _tree.where(is_open, scaled, optax.tree.zeros_like(scaled)),
      GateState(_tree.where(is_open, gated_state, state.gated_state), scales, GateInfo(scale)),
    )

  return optax.GradientTransformationExtraArgs(init, update)


def gate_is_open(state: optax.OptState, detection: Detection) -> jax.Array:
  """Returns whether a transformation with this state would move anything; true without a gate.

  A gate for some of the parameters (in ``optax.partition`` or ``optax.masked``) does not count: the
  other parameters may move.
  """
  stop = lambda node: isinstance(node, (GateState, optax.MaskedState))
  nodes = jax.tree.leaves(state, is_leaf=stop)
  scales = [node.gate_scales.of(detection) for node in nodes if isinstance(node, GateState)]
  return functools.reduce(jnp.logical_and, [scale > 0 for scale in scales], jnp.bool_(True))
