"""The contract of a weighting, and the function that builds one from a rule on finite losses."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbo import _tree
from jaxbo._types import PyTree
from jaxbo.dro.batch import AxisName, Batch, check_arguments, make_batch, names_of
from jaxbo.dro.diagnostics import WeightInfo, diagnose


class Weighting(NamedTuple):
  """A rule that finds the weights of a batch from its losses; :func:`jaxbo.reweight` applies it.

  Every rule of the library is pure, works under ``jit`` and ``vmap``, treats weights as constants,
  and gives examples of equal loss weights proportional to their prior. The weights sum to 1, except
  those of :func:`jaxbo.dro.compositional`. An example gets weight zero if it is masked, if its loss
  is not finite, or if its prior is zero. If no example counts, all weights are zero and the state
  does not change.

  Attributes:
    init: ``init(dtype=float32) -> state``.
    weigh: ``weigh(losses, state, *, mask=None, prior=None, groups=None, axis_name=None,
      stop_gradient=True) -> (weights, state, info)``. ``losses`` are floats ``[batch]``. ``mask``
      is boolean, true for examples that count. ``prior`` is the reference distribution:
      non-negative, of any sum, uniform by default. ``groups`` are integer ids. ``axis_name`` names
      the axes of the enclosing ``shard_map`` over which the batch is divided; each device then gets
      the weights of its own examples, while sums run over all devices. ``weights`` are ``[batch]``,
      at least float32; ``info`` is a :class:`WeightInfo`. With ``stop_gradient=False`` the weights
      are differentiable functions of the losses.
    log_ratio: ``log_ratio(losses, state)`` is the logarithm of ``weights / prior`` up to a constant
      and lets :func:`jaxbo.streaming_grad` run in one pass. ``None`` if this ratio does not follow
      from each loss alone.
  """

  init: Callable[..., PyTree]
  weigh: Callable[..., tuple[jax.Array, PyTree, WeightInfo]]
  log_ratio: Callable[..., jax.Array] | None = None


class Response(NamedTuple):
  """What a rule returns.

  Attributes:
    weights: ``[batch]``; :func:`make_weighting` sets those of invalid examples to zero.
    state: the next state.
    objective: the robust value; ``None`` if it is the surrogate.
    temperature: for the diagnostics.
  """

  weights: jax.Array
  state: PyTree = ()
  objective: jax.Array | None = None
  temperature: jax.Array | None = None


def no_state(dtype: jax.typing.DTypeLike = jnp.float32) -> tuple[()]:
  """The state of a weighting without memory."""
  del dtype
  return ()


def make_weighting(
  respond: Callable[[Batch, PyTree], Response],
  init: Callable[..., PyTree] = no_state,
  *,
  log_ratio: Callable[..., jax.Array] | None = None,
  num_groups: int = 0,
) -> Weighting:
  """Builds a weighting from ``respond(batch, state)``, which sees only finite numbers."""

  # Compiled even if the caller is not: an eager loop would compile again at every call.
  @functools.partial(jax.jit, static_argnames="axis_name")
  def weigh_good(arguments: dict[str, Any], state: PyTree, axis_name: tuple[str, ...]):
    batch = make_batch(**arguments, num_groups=num_groups, axis_name=axis_name)
    weights, new_state, objective, temperature = respond(batch, state)
    weights = jnp.where(batch.valid, weights, 0)
    # Happens only if a schedule returns NaN or a sum leaves the range of floats.
    bad = batch.over.number_of(~jnp.isfinite(weights)) > 0
    weights = jnp.where(bad, batch.reference, weights)
    good = (batch.over.number_of(batch.valid) > 0) & _tree.all_finite(new_state)
    new_state = _tree.where(good, jax.tree.map(_like, new_state, state), state)
    return weights, new_state, diagnose(batch, weights, objective, temperature)

  def weigh(
    losses: jax.typing.ArrayLike,
    state: PyTree,
    *,
    mask: jax.typing.ArrayLike | None = None,
    prior: jax.typing.ArrayLike | None = None,
    groups: jax.typing.ArrayLike | None = None,
    axis_name: AxisName = None,
    stop_gradient: bool = True,
  ):
    arguments = check_arguments(losses, mask, prior, groups, num_groups)
    if stop_gradient:
      arguments = jax.lax.stop_gradient(arguments)
    return weigh_good(arguments, state, names_of(axis_name))

  return Weighting(init, weigh, log_ratio)


def weigh_within(
  inner: Weighting, scores: jax.Array, batch: Batch, state: PyTree, **changes: jax.Array
) -> tuple[jax.Array, PyTree, WeightInfo]:
  """Calls ``inner`` on ``scores`` from the rule of another weighting."""
  arguments = {"mask": batch.valid, "prior": batch.reference, "groups": batch.groups} | changes
  return inner.weigh(scores, state, axis_name=batch.over.axes, stop_gradient=False, **arguments)


def check_weighting(name: str, value: object) -> None:
  """Raises ``TypeError`` unless ``value`` is a weighting."""
  if not isinstance(value, Weighting):
    raise TypeError(f"{name} must be a jaxbo.dro.Weighting, say jaxbo.dro.kl(1.0), got {value!r}")


def _like(new: jax.typing.ArrayLike, old: jax.Array) -> jax.Array:
  return jnp.asarray(new).astype(old.dtype)
