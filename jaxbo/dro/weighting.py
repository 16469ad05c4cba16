"""The contract of a weighting, and how one is made from a rule on finite losses."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbo import _tree
from jaxbo.dro.batch import AxisName, Batch, check_arguments, make_batch
from jaxbo.dro.diagnostics import diagnose


class Weighting(NamedTuple):
  """A rule that finds the weights of a batch from its losses: what :func:`jaxbo.reweight` takes.

  All rules of the library are pure, work under ``jit`` and ``vmap``, treat weights as constants,
  give examples of equal loss equal shares of the prior, and give weights that sum to 1 (but for
  :func:`jaxbo.dro.compositional`). What is masked, has no finite loss, or has a prior of zero gets
  weight zero; if that is all, so do all weights, and the state stays as it was.

  Attributes:
    init: ``init(dtype=float32) -> state``.
    weigh: ``weigh(losses, state, *, mask=None, prior=None, groups=None, axis_name=None,
      stop_gradient=True) -> (weights, state, info)``. ``losses`` are ``[batch]`` floats; ``mask``
      is boolean, true for what counts; ``prior`` is the reference distribution, non-negative and
      not necessarily normalised, uniform by default; ``groups`` are integer ids. ``axis_name``
      names the axes of the ``shard_map`` around whose devices hold parts of the batch: weights
      are local, all sums are global. ``weights`` are ``[batch]``, float32 at least; ``info`` is a
      :class:`WeightInfo`. With ``stop_gradient=False`` weights have derivatives in the losses.
    log_ratio: ``log_ratio(losses, state)``, the logarithm of ``weights / prior`` up to a constant,
      for weightings that know it for each loss alone; else ``None``. It is what
      :func:`jaxbo.streaming_grad` needs to do with one pass.
  """

  init: Callable[..., Any]
  weigh: Callable[..., Any]
  log_ratio: Callable[..., jax.Array] | None = None


class Response(NamedTuple):
  """What a rule gives.

  Attributes:
    weights: ``[batch]``; what is not valid is set to zero later.
    state: the next state.
    objective: the robust value; ``None`` for the surrogate.
    temperature: for the diagnostics.
  """

  weights: jax.Array
  state: Any = ()
  objective: jax.Array | None = None
  temperature: jax.Array | None = None


def no_state(dtype: jax.typing.DTypeLike = jnp.float32) -> tuple[()]:
  """The state of a weighting without memory."""
  del dtype
  return ()


def make_weighting(
  respond: Callable[[Batch, Any], Response],
  init: Callable[..., Any] = no_state,
  *,
  log_ratio: Callable[..., jax.Array] | None = None,
  num_groups: int = 0,
) -> Weighting:
  """Makes a weighting of ``respond(batch, state)``, which sees nothing but good numbers."""

  # Compiled even where the caller is not: an eager loop would compile anew at every call.
  @functools.partial(jax.jit, static_argnames="axis_name")
  def weigh_good(arguments: dict[str, Any], state: Any, axis_name: tuple[str, ...]):
    batch = make_batch(**arguments, num_groups=num_groups, axis_name=axis_name)
    weights, new_state, objective, temperature = respond(batch, state)
    weights = jnp.where(batch.valid, weights, 0)
    # Nothing but a schedule that returns NaN, or sums beyond the range of floats, can do this.
    bad = batch.over.number_of(~jnp.isfinite(weights)) > 0
    weights = jnp.where(bad, batch.reference, weights)
    good = (batch.over.number_of(batch.valid) > 0) & _tree.all_finite(new_state)
    new_state = _tree.where(good, jax.tree.map(_like, new_state, state), state)
    return weights, new_state, diagnose(batch, weights, objective, temperature)

  def weigh(
    losses: Any,
    state: Any,
    *,
    mask: Any = None,
    prior: Any = None,
    groups: Any = None,
    axis_name: AxisName = None,
    stop_gradient: bool = True,
  ):
    arguments = check_arguments(losses, mask, prior, groups, num_groups)
    if stop_gradient:
      arguments = jax.lax.stop_gradient(arguments)
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name or ())
    return weigh_good(arguments, state, names)

  return Weighting(init, weigh, log_ratio)


def weigh_within(inner: Weighting, scores: jax.Array, batch: Batch, state: Any, **changes: Any):
  """Calls ``inner`` on ``scores`` from the rule of another weighting."""
  arguments = {"mask": batch.valid, "prior": batch.reference, "groups": batch.groups} | changes
  return inner.weigh(scores, state, axis_name=batch.over.axes, stop_gradient=False, **arguments)


def check_weighting(name: str, value: Any) -> None:
  """Raises ``TypeError`` unless ``value`` is a weighting."""
  if not isinstance(value, Weighting):
    raise TypeError(f"{name} must be a jaxbo.dro.Weighting, say jaxbo.dro.kl(1.0), got {value!r}")


def _like(new: Any, old: jax.Array) -> jax.Array:
  return jnp.asarray(new).astype(old.dtype)
