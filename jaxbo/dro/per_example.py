"""Per-example gradients that stay lazy until their weights are known."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check, _tree
from jaxbo._not_gradients import NotGradients
from jaxbo._types import BatchLoss, Data, PyTree
from jaxbo.dro import microbatch
from jaxbo.dro.batch import Over, check_losses


@dataclasses.dataclass(frozen=True, eq=False)
class PerExampleGrads(NotGradients):
  """The losses of a batch, and the backward pass that turns weights into a gradient.

  Make this record and give it to :func:`~jaxbo.reweight` in the same function, inside one
  ``jax.jit``. Whatever treats the record as a tree of gradients raises ``TypeError``: a
  transformation in front of ``reweight``, a wrapper around ``reweight``, or passing the record into
  or out of a ``jit``, ``scan`` or branch.

  Attributes:
    losses: ``[batch]``.
    pullback: ``pullback(weights)`` runs one backward pass and returns the gradient of
      ``sum(weights * losses)`` for constant weights.
    aux: what the loss returned besides the losses; ``None`` without ``has_aux``.
    pullback_without: ``pullback_without(weights, keep, over)`` returns the same gradient, if it is
      finite. Otherwise it replaces the rows of the batch that are not kept, because a weight of
      zero does not silence a loss or a slope that is not finite (``0 * nan``). ``None`` if rows
      cannot be replaced.
    mask: which examples count, booleans ``[batch]``, by ``loss_fn.example_mask(batch)``; ``None``
      for all.

  Example:
    >>> import jax, jax.numpy as jnp, jaxbo, optax
    >>> grads = jaxbo.per_example_grad(lambda params, x: params * x)(1.0, jnp.ones(2))
    >>> optax.scale(2.0).update(grads, optax.EmptyState())
    Traceback (most recent call last):
    TypeError: PerExampleGrads are not gradients yet: put jaxbo.reweight first in the chain, ...
  """

  _cure: ClassVar[str] = "jaxbo.reweight"

  losses: jax.Array
  pullback: Callable[[jax.Array], optax.Updates]
  aux: PyTree = None
  pullback_without: Callable[[jax.Array, jax.Array, Over], optax.Updates] | None = None
  mask: jax.Array | None = None

  def replace(self, **changes: Any) -> "PerExampleGrads":
    """A copy with other fields."""
    return dataclasses.replace(self, **changes)

  def aux_or(self, previous: PyTree) -> PyTree:
    """Returns ``aux`` if all floats in it are finite, and ``previous`` otherwise.

    Carry these batch statistics to the next step: one image that is not finite turns the statistics
    of its batch into NaN, and with them every later prediction.
    """
    _check.same_structure("previous", previous, "aux", self.aux)
    return _tree.where(_tree.all_finite(self.aux), self.aux, previous)


def per_example_grad(
  loss_fn: BatchLoss,
  *,
  has_aux: bool = False,
  batch_axes: PyTree = 0,
  microbatch_size: int | None = None,
  repair: bool = False,
) -> Callable[..., PerExampleGrads]:
  r"""Per-example gradients, computed lazily: the input of :func:`reweight`.

  The forward pass computes the losses and keeps what the backward pass needs. Once the weights are
  known, one backward pass gives :math:`\sum_i w_i \nabla \ell_i`. No per-example gradient is
  stored, so this costs as much as ordinary training.

  Args:
    loss_fn: ``loss_fn(params, batch) -> losses``, real floats ``[batch]``. Prefer float32: the
      backward pass rounds the weights to the dtype of the losses. With ``microbatch_size`` or
      ``repair``, the loss of an example must not depend on other examples. ``loss_fn`` may have a
      function ``loss_fn.example_mask(batch)``, which returns booleans ``[batch]``: false for
      examples that do not count, such as a sequence without a target.
    has_aux: whether ``loss_fn`` returns ``(losses, aux)``; with ``microbatch_size``, every leaf of
      ``aux`` must be ``[batch, ...]``. Carry batch statistics to the next step by
      ``grads.aux_or(previous)``.
    batch_axes: which axis of each leaf of the batch counts the examples: an integer, ``None`` for
      leaves that all examples share (a key, a scalar, a table, frozen parameters), or a tree of
      these that is a prefix of the batch, like ``in_axes`` of ``jax.vmap``. The default 0 takes
      every leaf as ``[batch, ...]``: a shared leaf with as many rows as examples is then cut
      without an error. Only ``microbatch_size`` and ``repair`` cut the batch; a shared leaf goes
      whole to every part.
    microbatch_size: how many examples go through the model at once; ``None`` for all. It must
      divide the batch. Activation memory falls to that of one microbatch. The losses are computed
      again for the backward pass, so the cost rises to 4/3.
    repair: what to do with a batch that contains a loss that is not finite (``info.num_excluded``
      counts such losses). ``False`` gives the whole batch a zero gradient. ``True`` replaces the
      bad rows, and those of weight zero, by a good one. With ``microbatch_size`` this adds no pass.
      Without it, a bad batch is run again example by example, about two more passes; ``loss_fn``
      must then accept a batch of one, the model is compiled twice, and :func:`reweight` cannot be
      differentiated in reverse mode. If an example counts and has a finite loss but a gradient that
      is not finite, the whole batch gets a zero gradient either way, and ``info.gradient_finite``
      is false.

  Returns:
    A function ``(params, batch) -> PerExampleGrads``.

  Raises:
    TypeError: if ``loss_fn`` does not take ``(params, batch)``, or if parameters or losses are not
      floats.
    ValueError: if losses are not one-dimensional; if ``microbatch_size`` is not positive or does
      not divide the batch; if ``batch_axes`` is not a prefix of the batch, or a leaf does not have
      one row for each loss along its axis; with ``microbatch_size``, if a leaf of ``aux`` is not
      ``[batch, ...]``.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> def loss_fn(params, batch):
    ...   return (params * batch["x"] - batch["y"]) ** 2
    >>> batch = {"x": jnp.array([1.0, 2.0]), "y": jnp.array([1.0, 1.0])}
    >>> grads = jaxbo.per_example_grad(loss_fn)(jnp.float32(2.0), batch)
    >>> grads.losses.tolist()
    [1.0, 9.0]
    >>> float(grads.pullback(jnp.array([0.5, 0.5])))           # 0.5 * 2 * 1 + 0.5 * 2 * 3 * 2
    7.0
  """
  _check.takes_arguments("loss_fn", loss_fn, "params", "batch")
  if microbatch_size is not None:
    microbatch_size = _check.positive_int("microbatch_size", microbatch_size)

  def losses_and_aux(params, batch):
    value = loss_fn(params, batch)
    losses, aux = _split_aux(value) if has_aux else (value, None)
    if isinstance(losses, tuple):
      raise TypeError("loss_fn must return losses, got a tuple; for (losses, aux) set has_aux=True")
    check_losses("the losses that loss_fn returns", losses)
    return losses, aux

  def losses_alone(params, batch):
    return losses_and_aux(params, batch)[0]

  def whole(params, batch):
    losses, vjp, aux = jax.vjp(lambda params: losses_and_aux(params, batch), params, has_aux=True)
    if repair or batch_axes != 0:  # said, so it must be right, even if this batch is not cut
      microbatch.split_batch(batch, batch_axes, losses.size)
    pullback = lambda weights: vjp(weights)[0]
    without = functools.partial(pull_without, pullback, params, batch) if repair else None
    return PerExampleGrads(losses, pullback, aux, without)

  def pull_without(pullback, params, batch, weights, keep, over: Over):
    """Runs ``pullback(weights)``, then again example by example if that is not finite.

    A weight of zero times what is not finite is NaN, so a finite gradient has nothing of bad rows.

    The second run sits in a loop that runs once or not at all. Unlike a conditional, the loop lets
    XLA fuse the first run with the code before it, and costs nothing on clean batches under
    ``vmap``.
    """
    gradient = pullback(weights)
    bad = ~over.everywhere(_tree.all_finite(gradient))
    if _check.is_known(bad) and not bad:  # no need to compile the loop
      return gradient
    cut = microbatch.make_microbatches(keep.size, microbatch.num_shards(keep))
    again = lambda carry: (carry[0] & False, repaired(cut, params, batch, weights, keep, over))
    return jax.lax.while_loop(lambda carry: carry[0], again, (bad, gradient))[1]

  def in_microbatches(size, params, batch):
    whole_losses, whole_aux = jax.eval_shape(losses_and_aux, params, batch)
    cut = microbatch.make_microbatches(whole_losses.size, size)
    rows, join = microbatch.split_batch(batch, batch_axes, cut.num_examples)
    take = cut.each(rows)
    step = lambda carry, j: (carry, losses_and_aux(params, join(take(j))))
    _, stacked = jax.lax.scan(step, (), jnp.arange(cut.num_steps))
    check_aux(whole_aux, stacked[1], cut)
    losses, aux = jax.tree.map(cut.merge, stacked)
    pullback = functools.partial(summed, cut, params, take, join)
    without = functools.partial(repaired, cut, params, batch) if repair else None
    return PerExampleGrads(losses, pullback, aux, without)

  def repaired(cut, params, batch, weights, keep, over):
    rows, join = microbatch.split_batch(batch, batch_axes, cut.num_examples)
    take = microbatch.take_repaired(cut, rows, keep, over)
    return only_if(over.number_of(keep) > 0, summed(cut, params, take, join, weights))

  def summed(cut, params, take, join, weights):
    at = lambda j: join(take(j))
    return microbatch.weighted_gradient(losses_alone, params, at, weights, cut)

  def gradients(params: optax.Params, batch: Data) -> PerExampleGrads:
    _check.floating("params", params)
    if microbatch_size is None:
      grads = whole(params, batch)
    else:
      grads = in_microbatches(microbatch_size, params, batch)
    return grads.replace(mask=example_mask(loss_fn, batch))

  return gradients


def example_mask(loss_fn: BatchLoss, batch: Data) -> jax.Array | None:
  """Which examples of the batch have a loss at all, if ``loss_fn`` says so."""
  of_batch = getattr(loss_fn, "example_mask", None)
  return None if of_batch is None else of_batch(batch)


def weighted(grads: PerExampleGrads, weights: jax.Array, over: Over) -> optax.Updates:
  """Returns the gradient of ``sum(weights * losses)`` without the losses that are not finite."""
  finite = jnp.isfinite(grads.losses)
  weights = weights.astype(grads.losses.dtype)
  if grads.pullback_without is None:
    return only_if(over.number_of(~finite) == 0, grads.pullback(weights))
  return grads.pullback_without(weights, finite & (weights != 0), over)


def masked_and_bad(
  losses: jax.Array, mask: jax.typing.ArrayLike | None, over: Over
) -> jax.Array | int:
  """How many masked losses are not finite: without ``repair`` they spoil the batch all the same."""
  if mask is None:
    return 0
  return over.number_of(~jnp.isfinite(losses) & ~jnp.asarray(mask, bool))


def guarded(gradient: optax.Updates, over: Over) -> tuple[optax.Updates, jax.Array]:
  """Returns ``gradient``, or zeros if it is not finite on every device, and whether it is."""
  finite = over.everywhere(_tree.all_finite(gradient))
  return only_if(finite, gradient), finite


def only_if(good: jax.Array, gradient: optax.Updates) -> optax.Updates:
  """Returns ``gradient`` if ``good``, and zeros otherwise."""
  return jax.tree.map(lambda leaf: jnp.where(good, leaf, 0), gradient)


def check_aux(whole: PyTree, stacked: PyTree, cut: microbatch.Microbatches) -> None:
  """Raises ``ValueError`` if a leaf does not have a row for each example, in the parts too."""
  leaves = zip(jax.tree_util.tree_leaves_with_path(whole), jax.tree.leaves(stacked), strict=True)
  for (path, leaf), parts in leaves:
    of_rows = leaf.shape[:1] == (cut.num_examples,)
    if not of_rows or parts.shape != (cut.num_steps, cut.size, *leaf.shape[1:]):
      raise ValueError(
        f"aux{jax.tree_util.keystr(path)} must be [batch, ...] with microbatch_size, one row for "
        f"each of {cut.num_examples} examples, got shape {leaf.shape}: statistics of a batch are "
        "not those of its parts; return them by example, or leave microbatch_size out"
      )


def _split_aux(value: PyTree) -> tuple[jax.Array, PyTree]:
  if not isinstance(value, tuple) or len(value) != 2:
    raise TypeError(f"loss_fn must return (losses, aux) with has_aux=True, got {value!r}")
  return value
