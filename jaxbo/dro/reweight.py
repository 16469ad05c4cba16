"""The transformation: per-example gradients in, the gradient of the weighted loss out."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check, _tree
from jaxbo._types import PyTree
from jaxbo.dro import per_example
from jaxbo.dro.batch import (
  AxisName,
  Over,
  both,
  check_losses,
  check_named,
  is_checked,
  over,
  scores_of,
)
from jaxbo.dro.diagnostics import WeightInfo, zero_info
from jaxbo.dro.per_example import PerExampleGrads
from jaxbo.dro.weighting import Weighting, check_weighting


class ReweightState(NamedTuple):
  """State of :func:`~jaxbo.reweight`.

  Attributes:
    weighting_state: the state of the weighting.
    info: the :class:`WeightInfo` of the last update.
  """

  weighting_state: PyTree
  info: WeightInfo


def reweight(
  weighting: Weighting, *, axis_name: AxisName = None, scale: str = "mean"
) -> optax.GradientTransformationExtraArgs:
  r"""Weights the examples of a batch by their losses and returns the weighted gradient.

  .. math:: g = \sum_i w_i \nabla \ell_i, \qquad w = \text{weighting}(\ell_1, \dots, \ell_n)

  The weights are constants. If they maximize a robust objective (:func:`~jaxbo.dro.kl`,
  :func:`~jaxbo.dro.cvar`, :func:`~jaxbo.dro.chi_square`, ...), :math:`g` is the exact gradient of
  that objective, by Danskin's theorem.

  *Devices.* Under ``jit``, a batch sharded over devices needs nothing special: the weights are
  those of the whole batch. Inside ``shard_map``, pass ``axis_name``. Devices then exchange sums and
  maxima of losses, never the losses, and every device gets the gradient of the global batch; do not
  average it again. This holds with the replication check (``check_vma``) on or off.

  With the check on, JAX sums gradients of replicated parameters over devices. Parameters that vary
  over the axis (you shard them by hand) get the gradient of their own shard. Take stored
  per-example gradients at ``jax.lax.pcast(params, axis_name, to="varying")``, so that JAX does not
  sum these gradients.

  *Examples that do not count.* Losses that are not finite get weight zero and are counted in
  ``info.num_excluded``. A weight of zero does not silence them in the backward pass, so their whole
  batch gets a zero gradient, unless ``per_example_grad(..., repair=True)`` recomputes the gradient
  without them. Masked losses get weight zero and are not counted. The exception is a masked loss
  that is not finite, in a batch without ``repair``: it makes the gradient zero too, so it is
  counted. A finite loss may have a gradient that is not finite: the gradient of the batch is then
  zero, and ``info.gradient_finite`` is false. Rows of stored gradients that are not finite get
  weight zero and are counted. If no example counts, the gradient is zero and the state does not
  change.

  Cost: one forward and one backward pass, as in ordinary training, and a few operations on
  ``[batch]`` numbers.

  Args:
    weighting: a :class:`~jaxbo.dro.Weighting`, such as :func:`~jaxbo.dro.kl`.
    axis_name: the axis, or axes, of the enclosing ``shard_map`` over which the batch is divided;
      ``None`` (default) outside ``shard_map``.
    scale: ``"mean"`` (default): weights sum to 1 and gradients have the scale of a mean loss.
      ``"sum"``: weights sum to the number of examples that count.

  Returns:
    A transformation that stands first in the chain. ``update`` takes
    :class:`~jaxbo.dro.PerExampleGrads`; or, as an optax ``Aggregator``, stored per-example
    gradients with leaves ``[batch, *param_shape]`` and ``losses=``. It also takes these ``[batch]``
    arguments: ``mask=`` (boolean, true for examples that count), ``prior=`` (the reference
    distribution), ``groups=`` (integer ids), and ``scores=`` (floats from which to find the weights
    instead of the losses: a margin, or the excess over a reference model).

  Note:
    ``optax.experimental.aggregating.process`` does not forward extra arguments to neighbors that do
    not take them: wrap those neighbors in ``optax.with_extra_args_support``. Put wrappers such as
    ``optax.MultiSteps`` after this transformation, not around it. To accumulate over microbatches,
    use :func:`streaming_grad`.

  Raises:
    ValueError: if ``scale`` is unknown; if losses are not one-dimensional, or another argument
      does not have their shape; if ``losses=`` is missing, or given along with
      :class:`~jaxbo.dro.PerExampleGrads`; if ``axis_name`` is not an axis of the enclosing
      ``shard_map``, or forgets an axis over which the losses vary and the parameters do not. The
      last needs the replication check; without it, a forgotten axis goes unnoticed (see the
      tutorial *Many devices*).
    TypeError: if ``weighting`` is not a :class:`~jaxbo.dro.Weighting`.

  Example:
    >>> import jax, jax.numpy as jnp, jaxbo, optax
    >>> def loss_fn(params, batch):
    ...   return 0.5 * (params - batch) ** 2
    >>> tx = optax.chain(jaxbo.reweight(jaxbo.dro.kl(temperature=0.1)), optax.sgd(0.05))
    >>> @jax.jit
    ... def step(params, state, batch):
    ...   grads = jaxbo.per_example_grad(loss_fn)(params, batch)
    ...   updates, state = tx.update(grads, state, params)
    ...   return optax.apply_updates(params, updates), state, grads.losses
    >>> params, batch = jnp.float32(0.0), jnp.array([0.0, 0.0, 0.0, 2.0])
    >>> state = tx.init(params)
    >>> for _ in range(100):
    ...   params, state, losses = step(params, state, batch)
    >>> print(f"{params:.2f}")                                    # the mean of the batch is 0.5
    0.95
    >>> print(f"{optax.tree.get(state, 'WeightInfo').max_weight:.2f}")
    0.48

  References:
    Chen et al., `Take the Bull by the Horns: Hard Sample-Reweighted Continual Training Improves LLM
    Generalization <https://arxiv.org/abs/2402.14270>`_, 2024.
  """
  check_weighting("weighting", weighting)
  _check.one_of("scale", scale, ("mean", "sum"))

  def init(params):
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(params))
    return ReweightState(_tree.copy(weighting.init(dtype)), zero_info(dtype))

  def update(
    updates,
    state,
    params=None,
    *,
    losses: jax.typing.ArrayLike | None = None,
    scores: jax.typing.ArrayLike | None = None,
    mask: jax.typing.ArrayLike | None = None,
    prior: jax.typing.ArrayLike | None = None,
    groups: jax.typing.ArrayLike | None = None,
    **extra_args,
  ):
    del extra_args
    losses = _find_losses(updates, losses, params)
    check_named(axis_name, losses, _types_of(params, updates, losses))
    scores = scores_of(scores, losses)
    if isinstance(updates, PerExampleGrads):
      mask = both(mask, updates.mask, losses)
    weights, weighting_state, info = weighting.weigh(
      scores, state.weighting_state, mask=mask, prior=prior, groups=groups, axis_name=axis_name
    )
    info = _tree.cast_like(info, state.info)
    if scale == "sum":
      weights *= info.num_valid.astype(weights.dtype)
    reductions = over(axis_name, weights)
    if isinstance(updates, PerExampleGrads):
      if updates.pullback_without is None:
        bad = per_example.masked_and_bad(losses, mask, reductions)
        info = info._replace(num_excluded=info.num_excluded + bad)
      info = info._replace(aux_finite=reductions.everywhere(_tree.all_finite(updates.aux)))
      gradient = per_example.weighted(updates, weights, reductions)
      gradient = add_over_devices(gradient, reductions)
    else:
      _check_varying(updates, losses)
      gradient = _materialised(updates, weights)
      gradient = jax.lax.psum(gradient, reductions.axes) if reductions.axes else gradient
    gradient, finite = per_example.guarded(gradient, reductions)
    return gradient, ReweightState(weighting_state, info._replace(gradient_finite=finite))

  return optax.GradientTransformationExtraArgs(init, update)


def _types_of(params: optax.Params | None, grads: PyTree, losses: jax.Array) -> PyTree:
  """Returns the parameters, or what has their types where ``update`` is not given them."""
  if params is not None or not _tree.varying_axes(losses):
    return params
  return jax.eval_shape(grads.pullback, losses) if isinstance(grads, PerExampleGrads) else grads


def _materialised(grads: optax.Updates, weights: jax.Array) -> optax.Updates:
  """Returns the weighted sum of stored per-example gradients."""

  def add_up(leaf):
    w = jnp.expand_dims(weights, tuple(range(1, leaf.ndim)))
    wide = _tree.at_least_float32(jnp.where(w == 0, 0, leaf))
    return jnp.sum(w.astype(wide.dtype) * wide, axis=0).astype(leaf.dtype)

  return jax.tree.map(add_up, grads)


def _check_varying(grads: optax.Updates, losses: jax.Array) -> None:
  for axis in sorted(_tree.varying_axes(losses)):
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
      if axis not in _tree.varying_axes(leaf):
        raise ValueError(
          f"grads{jax.tree_util.keystr(path)} must vary over the axis {axis!r}, as the losses do, "
          "got the same on all devices: shard_map has summed the gradients of replicated "
          f"parameters; differentiate at jax.lax.pcast(params, {axis!r}, to='varying')"
        )


def add_over_devices(gradient: optax.Updates, reductions: Over) -> optax.Updates:
  """Sums pulled-back gradients over devices.

  With the replication check on, the pullback has already summed them.
  """
  axes = tuple(axis for axis in reductions.axes if not is_checked(axis))
  return jax.lax.psum(gradient, axes) if axes else gradient


def _find_losses(
  grads: PyTree, losses: jax.typing.ArrayLike | None, params: optax.Params | None
) -> jax.Array:
  if isinstance(grads, PerExampleGrads):
    if losses is not None:
      raise ValueError("losses= is for stored per-example gradients; PerExampleGrads has its own")
    return grads.losses
  if losses is None:
    raise ValueError(
      "reweight: update must be given PerExampleGrads, from "
      "jaxbo.per_example_grad(loss_fn)(params, batch), and stand first in the chain; or "
      "per-example gradients with losses="
    )
  losses = check_losses("losses", losses)
  for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
    if jnp.ndim(leaf) < 1 or jnp.shape(leaf)[0] != losses.size:
      raise ValueError(
        f"grads{jax.tree_util.keystr(path)} must be [{losses.size}, *param_shape], one gradient "
        f"for each loss, got {jnp.shape(leaf)}"
      )
  if params is not None:  # A gradient of the whole batch may have as many rows as the batch.
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), grads)
    _check.same_structure("grads of one example", one, "params", params)
  # A row that is not finite does not count, as if its loss were not.
  of_row = lambda leaf: jnp.all(jnp.isfinite(leaf), axis=tuple(range(1, leaf.ndim)))
  rows = map(of_row, jax.tree.leaves(grads))
  return jnp.where(functools.reduce(jnp.logical_and, rows, jnp.isfinite(losses)), losses, jnp.nan)
