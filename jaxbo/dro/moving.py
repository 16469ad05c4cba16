"""The parts of a batch that a worst case may move: what Wasserstein and Sinkhorn losses share."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxbo import _tree
from jaxbo._types import BatchLoss, Data, PyTree
from jaxbo.dro.batch import check_losses
from jaxbo.dro.per_example import example_mask


@dataclasses.dataclass(frozen=True)
class RobustLoss:
  """Other losses of the examples of ``loss_fn``, of which the same ones count.

  Attributes:
    losses: ``losses(params, batch) -> [batch]``.
    loss_fn: the loss that they are made of.
  """

  losses: Callable[[PyTree, Data], jax.Array]
  loss_fn: BatchLoss

  def __call__(self, params: PyTree, batch: Data, /) -> jax.Array:
    """The losses of a batch."""
    return self.losses(params, batch)

  def example_mask(self, batch: Data) -> jax.Array | None:
    """Which examples have a loss at all, if ``loss_fn`` says so."""
    return example_mask(self.loss_fn, batch)


def take_apart(
  batch: Data, moves: PyTree
) -> tuple[list[jax.Array], Callable[[list[jax.Array]], Data]]:
  """Takes out of a batch what may move.

  Args:
    batch: a pytree of arrays.
    moves: booleans, a prefix of ``batch``.

  Returns:
    The leaves of floats that are to move, ``[batch, ...]``, at least float32; and a function that
    takes others in their place and returns the batch.

  Raises:
    ValueError: if ``moves`` is not a prefix of ``batch``, or no leaf is to move.
  """
  leaves, treedef = jax.tree.flatten(batch)
  try:
    flags = jax.tree.leaves(jax.tree.map(lambda flag, part: _like(part, flag), moves, batch))
  except (TypeError, ValueError) as error:
    raise ValueError(f"moves must be a prefix of the batch, {treedef}, got {moves}") from error
  floating = [jnp.issubdtype(jnp.result_type(leaf), jnp.floating) for leaf in leaves]
  chosen = [i for i, flag in enumerate(flags) if flag and floating[i]]
  if not chosen:
    raise ValueError(f"moves must name a leaf of floats of the batch, got {moves}")

  def join(moved: list[jax.Array]) -> Data:
    new = dict(zip(chosen, moved, strict=True))
    return jax.tree.unflatten(treedef, [new.get(i, leaf) for i, leaf in enumerate(leaves)])

  return [jax.lax.stop_gradient(_tree.at_least_float32(leaves[i])) for i in chosen], join


def losses_of(loss_fn: BatchLoss, params: PyTree, batch: Data) -> jax.Array:
  """The losses ``[batch]``, at least float32; raises if ``loss_fn`` returns something else."""
  losses = loss_fn(params, batch)
  if isinstance(losses, tuple):
    raise TypeError("loss_fn must return losses alone, got a tuple")
  return check_losses("the losses that loss_fn returns", losses)


def squared_distances(a: list[jax.Array], b: list[jax.Array]) -> jax.Array:
  """The squared Euclidean distance of each example, over all leaves, ``[batch]``."""
  each = [jnp.sum((x - y) ** 2, axis=range(1, x.ndim)) for x, y in zip(a, b, strict=True)]
  return sum(each[1:], each[0])


def _like(part: PyTree, flag: bool) -> PyTree:
  return jax.tree.map(lambda _: flag, part)
