"""The weighted gradient of a batch that is too large for one pass, microbatch by microbatch."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check, _tree
from jaxbo._types import BatchLoss, Data, PyTree
from jaxbo.dro.batch import (
  AxisName,
  both,
  bounded,
  check_arguments,
  check_named,
  over,
  scores_of,
)
from jaxbo.dro.microbatch import make_microbatches, split_batch
from jaxbo.dro.per_example import (
  PerExampleGrads,
  check_aux,
  example_mask,
  guarded,
  masked_and_bad,
  only_if,
  per_example_grad,
  weighted,
)
from jaxbo.dro.reweight import ReweightState, add_over_devices, reweight
from jaxbo.dro.weighting import Weighting, check_weighting


def losses_and_aux(grads: PerExampleGrads) -> tuple[jax.Array, PyTree]:
  """What of the gradients may leave a trace."""
  return grads.losses, grads.aux


def streaming_grad(
  loss_fn: BatchLoss,
  weighting: Weighting,
  *,
  microbatch_size: int,
  has_aux: bool = False,
  batch_axes: PyTree = 0,
  axis_name: AxisName = None,
  repair: bool = False,
) -> Callable[..., tuple[optax.Updates, PyTree] | tuple[optax.Updates, PyTree, PyTree]]:
  r"""The exact reweighted gradient of a large batch, accumulated over microbatches.

  The weights are those of the whole batch, up to rounding. Averaging the reweighted gradients of
  microbatches would instead weight each example relative to its microbatch.

  *One pass* suffices for exponential weights (:func:`~jaxbo.dro.kl` and :func:`~jaxbo.dro.tilted`
  at a given temperature, :func:`~jaxbo.dro.compositional`, :func:`~jaxbo.dro.uniform`). It uses the
  online softmax: keep the largest score so far :math:`m`, :math:`s = \sum_i p_i e^{z_i - m}` and
  :math:`G = \sum_i p_i e^{z_i - m} \nabla \ell_i`; rescale :math:`s` and :math:`G` whenever
  :math:`m` grows; return :math:`G / s`. This costs as much as plain gradient accumulation. *All
  other weightings* take two passes, one for the losses and one for the gradients, at 4/3 of the
  cost.

  Memory: the activations of one microbatch and one float32 gradient, for any number of
  microbatches.

  Args:
    loss_fn: ``loss_fn(params, batch) -> losses``, real floats ``[batch]``, preferably float32. The
      loss of an example must not depend on other examples.
    weighting: a :class:`~jaxbo.dro.Weighting`, such as :func:`~jaxbo.dro.kl`.
    microbatch_size: how many examples go through the model at once; it must divide the batch.
    has_aux: whether ``loss_fn`` returns ``(losses, aux)``, with leaves ``[batch, ...]``.
    batch_axes: which axis of each leaf of the batch counts the examples: an integer, ``None`` for
      leaves that all examples share (a key, a scalar, a table), or a tree of these that is a prefix
      of the batch, like ``in_axes`` of ``jax.vmap``. The default 0 takes every leaf as
      ``[batch, ...]``: a shared leaf with as many rows as examples is then cut without an error.
    axis_name: the axis, or axes, of the enclosing ``shard_map`` over which the batch is divided.
    repair: what to do if a loss is not finite. ``False`` gives the whole batch a zero gradient;
      ``True`` leaves out the bad examples. In the one-pass case, ``True`` costs about two more
      passes of each bad microbatch, and ``loss_fn`` must accept a batch of one.

  Returns:
    A function ``(params, batch, state=None, *, scores=None, mask=None, prior=None, groups=None)``
    that returns the gradient, the :class:`~jaxbo.dro.WeightInfo` and, with ``has_aux``, ``aux``.
    The ``[batch]`` arguments are those of :func:`~jaxbo.reweight`. For a weighting with memory (a
    schedule, a moving average), pass as ``state`` the :class:`~jaxbo.dro.ReweightState` from
    ``reweight(weighting).init(params)``; the second result is then the next state, which contains
    the ``info``.

  Raises:
    ValueError: if ``microbatch_size`` is not positive, or does not divide the batch; if
      ``batch_axes`` is not a prefix of the batch, or a leaf does not have one row for each loss
      along its axis; if a leaf of ``aux`` is not ``[batch, ...]``; if ``scores``, ``mask``,
      ``prior`` or ``groups`` do not have the shape of the losses; if ``axis_name`` forgets an axis
      over which the losses vary and the parameters do not (with the replication check on).
    TypeError: if ``loss_fn`` does not take ``(params, batch)``, if ``weighting`` is not a
      :class:`~jaxbo.dro.Weighting`, or if parameters or losses are not floats.

  Example:
    >>> import jax, jax.numpy as jnp, jaxbo, optax
    >>> def loss_fn(params, batch):
    ...   return 0.5 * (params - batch) ** 2
    >>> gradient = jaxbo.streaming_grad(loss_fn, jaxbo.dro.kl(0.1), microbatch_size=2)
    >>> g, info = jax.jit(gradient)(jnp.float32(0.0), jnp.array([0.0, 1.0, -1.0, 1.0]))
    >>> print(g.round(3))                    # -(2 - 1) / 3, but for the example whose loss is 0
    -0.333
  """
  _check.takes_arguments("loss_fn", loss_fn, "params", "batch")
  check_weighting("weighting", weighting)
  microbatch_size = _check.positive_int("microbatch_size", microbatch_size)
  log_ratio = weighting.log_ratio
  options: Any = {"has_aux": has_aux, "repair": repair, "batch_axes": batch_axes}
  of_microbatch = per_example_grad(loss_fn, **options)
  in_two_passes = per_example_grad(loss_fn, microbatch_size=microbatch_size, **options)
  tx: Any = reweight(weighting, axis_name=axis_name)

  def two_passes(params, batch, state, **of_examples):
    grads = in_two_passes(params, batch)
    return *tx.update(grads, state, params, **of_examples), grads.aux

  def one_pass(log_ratio, params, batch, state, *, scores, mask, prior, groups):
    shapes = jax.eval_shape(lambda: losses_and_aux(of_microbatch(params, batch)))
    like = _tree.vary_alike(jnp.zeros(shapes[0].shape, shapes[0].dtype), shapes[0])
    check_named(axis_name, like, params)
    mask = both(mask, example_mask(loss_fn, batch), like)
    of_examples = check_arguments(like, mask, prior, groups, 0)
    del of_examples["losses"]
    scores = None if scores is None else scores_of(scores, like)
    cut = make_microbatches(like.size, microbatch_size)
    rows, join = split_batch(batch, batch_axes, like.size)
    take, take_of_examples = cut.each(rows), cut.each(of_examples | {"scores": scores})

    def add(carry, j):
      highest, gradient, total = carry
      grads, given = of_microbatch(params, join(take(j))), take_of_examples(j)
      losses = _tree.at_least_float32(jax.lax.stop_gradient(grads.losses))
      reductions = over(axis_name, losses)
      scores = scores_of(given["scores"], losses)
      prior = jnp.ones_like(losses) if given["prior"] is None else given["prior"]
      counts = jnp.isfinite(scores) & jnp.isfinite(prior) & (prior > 0)
      prior = bounded(prior)
      counts = counts if given["mask"] is None else counts & given["mask"]
      scores = log_ratio(scores, state.weighting_state).astype(dtype)
      scores = jnp.where(counts, scores, -jnp.inf)
      new_highest = jnp.maximum(highest, reductions.max(scores))
      finite = jnp.where(new_highest > -jnp.inf, new_highest, 0)
      weights = jnp.where(counts, prior * jnp.exp(scores - finite), 0)
      shrink = jnp.exp(highest - finite)
      more = weighted(grads, weights, reductions)
      gradient = jax.tree.map(lambda g, m: shrink.astype(g.dtype) * g + m, gradient, more)
      carry = new_highest, gradient, shrink * total + reductions.sum(weights)
      return carry, losses_and_aux(grads)

    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(params))
    nothing = over(axis_name, like).max(like).astype(dtype)  # zero, which varies as maxima do
    start = (nothing - jnp.inf, _tree.zeros_at_least_float32(params), nothing)
    (_, gradient, total), stacked = jax.lax.scan(add, start, jnp.arange(cut.num_steps))
    check_aux(shapes[1], stacked[1], cut)
    losses, aux = jax.tree.map(cut.merge, stacked)
    _, weighting_state, info = weighting.weigh(
      scores_of(scores, losses), state.weighting_state, axis_name=axis_name, **of_examples
    )
    reductions = over(axis_name, losses)
    gradient = add_over_devices(gradient, reductions)
    if not repair:  # The gradient of the clean microbatches alone would be that of another batch.
      gradient = only_if(reductions.number_of(~jnp.isfinite(losses)) == 0, gradient)
      bad = masked_and_bad(losses, mask, reductions)
      info = info._replace(num_excluded=info.num_excluded + bad)
    factor = info.weight_sum / jnp.where(total > 0, total, 1)
    gradient = _tree.scaled(factor, gradient)
    gradient, finite = guarded(_tree.cast_like(gradient, params), reductions)
    aux_finite = reductions.everywhere(_tree.all_finite(aux))
    info = info._replace(gradient_finite=finite, aux_finite=aux_finite)
    return gradient, ReweightState(weighting_state, _tree.cast_like(info, state.info)), aux

  def gradient(
    params: optax.Params,
    batch: Data,
    state: ReweightState | None = None,
    *,
    scores: jax.typing.ArrayLike | None = None,
    mask: jax.typing.ArrayLike | None = None,
    prior: jax.typing.ArrayLike | None = None,
    groups: jax.typing.ArrayLike | None = None,
  ):
    before = tx.init(params) if state is None else state
    compute = two_passes if log_ratio is None else functools.partial(one_pass, log_ratio)
    given = {"scores": scores, "mask": mask, "prior": prior, "groups": groups}
    result, after, aux = compute(params, batch, before, **given)
    after = after.info if state is None else after
    return (result, after, aux) if has_aux else (result, after)

  return gradient
