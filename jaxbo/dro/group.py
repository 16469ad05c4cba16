"""Group DRO: exponentiated gradient ascent on the weights of groups."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbo import _check
from jaxbo.dro.batch import at_least_tiny
from jaxbo.dro.weighting import Response, Weighting, make_weighting


class GroupState(NamedTuple):
  """State of :func:`group`.

  Attributes:
    group_log_weights: the logarithms of the groups' weights, ``[num_groups]``.
  """

  group_log_weights: jax.Array


def group(
  num_groups: int,
  learning_rate: float | jax.Array,
  *,
  adjustment: float | jax.Array | None = None,
  group_sizes: Sequence[int] | None = None,
) -> Weighting:
  r"""The worst case over groups, with weights from exponentiated gradient ascent (group DRO).

  .. math::
    q_g \propto q_g\, e^{\eta (\bar\ell_g + C / \sqrt{n_g})}, \qquad
    w_i = q_{g(i)} \frac{p_i}{\sum_{j \in g(i)} p_j}

  :math:`\bar\ell_g` is the mean loss of group :math:`g` in the batch. Each batch first updates
  :math:`q` by one step, then takes its weights from the new :math:`q`. A group absent from the
  batch keeps its :math:`q_g` up to normalization; the groups present share a total weight of 1 (our
  choice: see Departures from the papers). The method assumes that batches draw all groups equally
  often.

  Args:
    num_groups: the number of groups, at least 1.
    learning_rate: :math:`\eta > 0`; the published experiments use 0.01.
    adjustment: :math:`C \ge 0`, the generalization adjustment, in units of the loss: groups of few
      training examples get weights as if their loss were higher. The losses do not change. ``None``
      is zero.
    group_sizes: :math:`n_g`, how many training examples each group has; needed for ``adjustment``.

  Returns:
    A :class:`Weighting` that needs ``groups=``, integers from 0 to ``num_groups - 1``. An id out of
    range raises ``ValueError``; under ``jit``, where ids are not known, its example is excluded and
    counted in ``info.num_excluded``. ``info.objective`` is :math:`\sum_g q_g \bar\ell_g` over the
    groups present.

  Raises:
    ValueError: if ``num_groups < 1``, ``learning_rate <= 0`` or ``adjustment < 0``; if
      ``group_sizes`` are missing, or are not ``num_groups`` positive numbers.

  Example:
    >>> import jax.numpy as jnp, jaxbo, numpy as np
    >>> weighting = jaxbo.dro.group(num_groups=2, learning_rate=1.0)
    >>> losses, groups = jnp.array([1.0, 1.0, 2.0]), jnp.array([0, 0, 1])
    >>> weights, state, _ = weighting.weigh(losses, weighting.init(), groups=groups)
    >>> print(np.asarray(weights).round(3))                # softmax([1, 2]) = [0.269, 0.731]
    [0.134 0.134 0.731]
    >>> weights, state, _ = weighting.weigh(losses, state, groups=groups)
    >>> print(np.asarray(weights).round(3))
    [0.06  0.06  0.881]

  References:
    Sagawa et al., `Distributionally Robust Neural Networks for Group Shifts
    <https://arxiv.org/abs/1911.08731>`_, 2020.
  """
  num_groups = _check.positive_int("num_groups", num_groups)
  _check.positive("learning_rate", learning_rate)
  if adjustment is not None:
    _check.non_negative("adjustment", adjustment)
  sizes = np.ones(num_groups)
  if group_sizes is not None:
    sizes = np.asarray(group_sizes)
    if sizes.shape != (num_groups,) or not np.all(sizes > 0):
      raise ValueError(f"group_sizes must be {num_groups} positive numbers, got {group_sizes}")
  elif adjustment is not None:
    raise ValueError(f"group_sizes must be given with adjustment={adjustment}, got None")

  def init(dtype: jax.typing.DTypeLike = jnp.float32) -> GroupState:
    return GroupState(jnp.full(num_groups, -np.log(num_groups), dtype))

  def respond(batch, state):
    dtype = batch.losses.dtype
    ids = jnp.arange(num_groups, dtype=jnp.int32)
    member = batch.groups.astype(jnp.int32)[:, None] == ids[None, :]
    in_group = lambda x: batch.over.sum(jnp.where(member, x[:, None], 0), axis=0)
    mass = in_group(batch.reference)
    losses = in_group(batch.reference * batch.losses) / at_least_tiny(mass)
    bonus = jnp.asarray(0.0 if adjustment is None else adjustment, dtype) / jnp.sqrt(
      jnp.asarray(sizes, dtype)
    )
    gain = jnp.asarray(learning_rate, dtype) * jnp.where(mass > 0, losses + bonus, 0)
    log_weights = jax.nn.log_softmax(state.group_log_weights.astype(dtype) + gain)

    present = jax.nn.softmax(jnp.where(mass > 0, log_weights, -jnp.inf))
    of_group = jnp.where(mass > 0, present / at_least_tiny(mass), 0)
    weights = batch.reference * jnp.sum(jnp.where(member, of_group[None, :], 0), axis=1)
    return Response(weights, GroupState(log_weights))

  return make_weighting(respond, init, num_groups=num_groups)
