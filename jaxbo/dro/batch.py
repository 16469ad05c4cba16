"""A batch of losses as weightings see it, and its reductions on any number of devices."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbo import _check, _tree
from jaxbo._types import PyTree

AxisName = str | Sequence[str] | None


class Over(NamedTuple):
  """Reductions over a batch that may be divided among devices.

  Attributes:
    axes: the mesh axes whose devices hold parts of the batch; empty if ``jit`` sees all of it.
  """

  axes: tuple[str, ...] = ()

  def sum(self, x: jax.typing.ArrayLike, axis: int | None = None) -> jax.Array:
    """The sum over the batch, in the dtype of ``x``."""
    total = jnp.sum(x, axis=axis, dtype=jnp.result_type(x))
    return jax.lax.psum(total, self.axes) if self.axes else total

  def max(self, x: jax.typing.ArrayLike) -> jax.Array:
    """The maximum over the batch."""
    return jax.lax.pmax(jnp.max(x), self.axes) if self.axes else jnp.max(x)

  def min(self, x: jax.typing.ArrayLike) -> jax.Array:
    """The minimum over the batch."""
    return jax.lax.pmin(jnp.min(x), self.axes) if self.axes else jnp.min(x)

  def number_of(self, x: jax.typing.ArrayLike) -> jax.Array:
    """How many entries of ``x`` are true, int32."""
    return self.sum(jnp.asarray(x, jnp.int32))

  def everywhere(self, x: jax.Array) -> jax.Array:
    """Whether ``x`` is true on all devices, also where parameters alone are divided."""
    varying = sorted(_tree.varying_axes(x))
    axes = (*varying, *(name for name in self.axes if not is_checked(name)))
    return jax.lax.psum(jnp.asarray(~x, jnp.int32), axes) == 0 if axes else x

  def first(self, x: jax.Array) -> jax.Array:
    """Keeps the first true entry of the booleans ``x``, ``[batch]``, and clears the others."""
    index = jnp.arange(x.size, dtype=jnp.int32)
    if self.axes:
      index += x.size * jax.lax.axis_index(self.axes)
    return x & (index == self.min(jnp.where(x, index, jnp.iinfo(jnp.int32).max)))


def over(axis_name: AxisName, losses: jax.Array) -> Over:
  """Reductions over the axes of ``axis_name`` along which ``losses`` may differ."""
  varies = _tree.varying_axes(losses)
  return Over(tuple(name for name in names_of(axis_name) if name in varies or not is_checked(name)))


def check_named(axis_name: AxisName, losses: jax.Array, params: PyTree) -> None:
  """Raises ``ValueError`` if ``axis_name`` forgets an axis over which the batch is divided."""
  _check.same_on_devices(
    "losses",
    losses,
    params,
    f"where its devices have parts of a batch, set axis_name={{axis!r}} (got {axis_name!r}); where "
    "all have the same examples, take jax.lax.pmean(losses, {axis!r})",
    named=names_of(axis_name),
  )


def names_of(axis_name: AxisName) -> tuple[str, ...]:
  """The axes as a tuple."""
  return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name or ())


def is_checked(name: str) -> bool:
  """Whether ``shard_map`` tracks which values differ along the axis ``name``.

  With tracking (``check_vma=True``), pullbacks already sum over devices.
  """
  try:
    index = jax.lax.axis_index(name)
  except NameError:
    raise ValueError(
      f"axis_name must be an axis of the enclosing shard_map, got {name!r}; under jit with a "
      "sharded batch, leave axis_name out"
    ) from None
  return name in _tree.varying_axes(index)


class Batch(NamedTuple):
  """The losses of a batch, without masked losses and losses that are not finite.

  Attributes:
    losses: ``[batch]``, at least float32, all finite: invalid entries hold the largest valid loss.
    reference: the distribution that weights are compared with, ``[batch]``; zero for invalid
      examples, and everywhere if no example is valid.
    valid: which examples count: unmasked, with a finite loss, a positive prior and a known group.
    num_excluded: how many unmasked examples do not count because their loss or prior is not finite
      or their group is out of range.
    groups: group ids, ``[batch]``, or ``None``.
    over: the reductions.
  """

  losses: jax.Array
  reference: jax.Array
  valid: jax.Array
  num_excluded: jax.Array
  groups: jax.Array | None
  over: Over

  @property
  def max(self) -> jax.Array:
    """The largest loss."""
    return self.over.max(self.losses)

  @property
  def min(self) -> jax.Array:
    """The smallest loss."""
    return self.over.min(jnp.where(self.valid, self.losses, self.max))

  def expectation(self, x: jax.Array) -> jax.Array:
    """The mean of ``x`` under the reference."""
    return self.over.sum(self.reference * x)


def check_arguments(
  losses: jax.typing.ArrayLike,
  mask: jax.typing.ArrayLike | None,
  prior: jax.typing.ArrayLike | None,
  groups: jax.typing.ArrayLike | None,
  num_groups: int,
) -> dict[str, jax.Array | None]:
  """Checks the arguments of a weighting; returns those of :func:`make_batch` as arrays."""
  losses = check_losses("losses", losses)
  mask = check_mask(mask, losses)
  if prior is not None:
    check_length("prior", prior, losses)
    if _check.is_known(prior) and not np.all(np.asarray(prior) >= 0):
      raise ValueError(f"prior must be non-negative, got {np.min(np.asarray(prior))}")
    prior = jnp.asarray(prior, losses.dtype)
  groups = _check_groups(groups, num_groups, losses)
  return {"losses": losses, "mask": mask, "prior": prior, "groups": groups}


def make_batch(
  losses: jax.Array,
  mask: jax.Array | None,
  prior: jax.Array | None,
  groups: jax.Array | None,
  num_groups: int,
  axis_name: AxisName,
) -> Batch:
  """Builds a :class:`Batch`; takes out masked and unusable examples."""
  reductions = over(axis_name, losses)
  unmasked = jnp.ones_like(losses, bool) if mask is None else mask
  prior = jnp.ones_like(losses) if prior is None else prior
  usable = jnp.isfinite(losses) & jnp.isfinite(prior)
  if groups is not None and num_groups:
    usable &= (groups >= 0) & (groups < num_groups)

  prior = jnp.where(unmasked & usable, bounded(prior), 0)
  reference = prior / at_least_tiny(reductions.sum(prior))
  valid = reference > 0
  largest = reductions.max(jnp.where(valid, losses, jnp.finfo(losses.dtype).min))
  losses = jnp.where(valid, losses, jnp.where(reductions.number_of(valid) > 0, largest, 0))
  num_excluded = reductions.number_of(unmasked & ~usable)
  return Batch(losses, reference, valid, num_excluded, groups, reductions)


def bounded(prior: jax.Array) -> jax.Array:
  """Clips ``prior`` to [0, 1e30], so that sums and reciprocals stay in the range of floats."""
  return jnp.clip(prior, 0, 1e30)


def at_least_tiny(x: jax.Array) -> jax.Array:
  """Returns ``x``, at least the smallest normal number: a safe denominator."""
  return jnp.maximum(x, jnp.finfo(x.dtype).tiny)


def check_losses(name: str, losses: jax.typing.ArrayLike) -> jax.Array:
  """Returns ``losses`` in at least float32; raises unless they are a vector of real floats."""
  losses = jnp.asarray(losses)  # A list will do.
  if losses.ndim != 1:
    raise ValueError(
      f"{name} must be one-dimensional, [batch], one number for each example; got shape "
      f"{losses.shape}"
    )
  if losses.shape[0] == 0:
    raise ValueError(f"{name} must hold at least one example, got shape (0,)")
  if not jnp.issubdtype(losses.dtype, jnp.floating):
    raise TypeError(f"{name} must be real floats, got dtype {losses.dtype}")
  return _tree.at_least_float32(losses)


def scores_of(scores: jax.typing.ArrayLike | None, losses: jax.Array) -> jax.Array:
  """Returns what to find weights from: the scores, NaN where the loss is not finite; or losses."""
  if scores is None:
    return losses
  scores = check_losses("scores", scores)
  check_length("scores", scores, losses)
  return jnp.where(jnp.isfinite(losses), scores, jnp.nan)


def check_mask(mask: jax.typing.ArrayLike | None, losses: jax.Array) -> jax.Array | None:
  """Returns the mask as an array; raises unless it holds a boolean for each loss."""
  if mask is None:
    return None
  mask = jnp.asarray(mask)
  if mask.dtype != bool:
    raise TypeError(f"mask must be boolean, got dtype {mask.dtype}")
  check_length("mask", mask, losses)
  return mask


def both(
  mask: jax.typing.ArrayLike | None, other: jax.typing.ArrayLike | None, losses: jax.Array
) -> jax.Array | None:
  """Returns the mask of the examples that both masks keep; ``None`` keeps all."""
  first, second = check_mask(mask, losses), check_mask(other, losses)
  return second if first is None else first if second is None else first & second


def check_length(name: str, value: jax.typing.ArrayLike, losses: jax.Array) -> None:
  """Raises ``ValueError`` unless ``value`` has the shape of ``losses``."""
  if jnp.shape(value) != losses.shape:
    raise ValueError(
      f"{name} must have the shape of the losses, {losses.shape}, got {jnp.shape(value)}"
    )


def _check_groups(
  groups: jax.typing.ArrayLike | None, num_groups: int, losses: jax.Array
) -> jax.Array | None:
  """Checks group ids; ``num_groups=0`` is for weightings that only pass the ids on."""
  if groups is None:
    if num_groups:
      raise TypeError("groups= must be given: the group of each example, integers, [batch]")
    return None
  groups = jnp.asarray(groups)
  check_length("groups", groups, losses)
  if not jnp.issubdtype(groups.dtype, jnp.integer):
    raise TypeError(f"groups must be integers, got dtype {groups.dtype}")
  if num_groups and _check.is_known(groups):
    low, high = np.min(np.asarray(groups)), np.max(np.asarray(groups))
    if low < 0 or high >= num_groups:
      raise ValueError(f"groups must be from 0 to {num_groups - 1}, got {low} to {high}")
  return _tree.at_least_int32(groups)
