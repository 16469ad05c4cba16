"""What a step of an inner optimizer does to each leaf of the inner parameters."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check
from jaxbo._types import PyTree
from jaxbo.bilevel.projection import ProjectParamsState, at_projections, leaves_of

BlindStep = Callable[..., optax.Updates]
"""``step(x, y, grads)``, the updates of an optimizer that does not see the loss."""


class StepKind(NamedTuple):
  """What the optimizer does to one leaf.

  Attributes:
    moves_alone: whether it moves the leaf without a gradient: it decays, shrinks or projects.
    plain: whether the step is as long as the gradient makes it, as in SGD. Only then does the step
      show where the run stops: Adam's step has a length of its own.
    projected: whether :func:`jaxbo.bilevel.project_params` ends the step.
    nonnegative: whether ``optax.keep_params_nonnegative`` ends a step that is not plain.
    decays: whether there is a step without a gradient in front of that projection.
  """

  moves_alone: bool = False
  plain: bool = True
  projected: bool = False
  nonnegative: bool = False
  decays: bool = False

  @property
  def shows_where_it_stops(self) -> bool:
    """Whether the step is zero at a solution, and not zero beside it."""
    return self.projected or self.nonnegative or (self.moves_alone and self.plain)

  @property
  def is_hidden(self) -> bool:
    """Whether a projection ends a step that descends by a length of its own."""
    return (self.projected or self.nonnegative) and not (self.plain or self.decays)


def step_kinds(step: BlindStep, x: PyTree, y: PyTree, opt_state: optax.OptState) -> list[StepKind]:
  """Looks at the optimizer's state and tries a few known numbers in place of ``x`` and ``y``."""
  num_leaves = len(jax.tree.leaves(y))
  zeros = optax.tree.zeros_like(y)
  reads = _check.depends_by_leaf(lambda xy: step(*xy, zeros), (x, y))
  simple = _remembers_momentum_only(opt_state)
  if not any(reads) or not (simple or _has_parts(opt_state)):
    return [StepKind()] * num_leaves
  projected = [False] * num_leaves

  def unprojected(updates, params, step, project):
    for i, one in enumerate(leaves_of(updates, y)):
      projected[i] |= one
    return updates

  def fill(value):
    return jax.tree.map(lambda leaf: jnp.full(leaf.shape, value, leaf.dtype), y)

  def at(from_x, y_value, grads=None):  # At one x for all, a decay by x might not show.
    ramp = lambda v: jnp.linspace(from_x, from_x + 1, v.size, dtype=v.dtype).reshape(v.shape)
    grads = fill(0) if grads is None else grads
    return jax.tree.leaves(step(jax.tree.map(ramp, x), fill(y_value), grads))

  def moved():
    """The leaves that move without a gradient, below and above zero."""
    tried = at(0.5, -1e3), at(2.0, 1e3)
    return [[bool(jnp.any(leaf != 0)) for leaf in leaves] for leaves in tried]

  def grows():
    """The leaves that move further by twice the gradient."""
    draw = optax.tree.random_like(jax.random.key(0), y, jax.random.normal)
    still = at(0.5, 0.0)
    reach = lambda size: [
      float(jnp.max(jnp.abs(u - u0), initial=0))
      for u, u0 in zip(at(0.5, 0.0, optax.tree.scale(size, draw)), still, strict=True)
    ]
    return [twice >= 1.5 * once for once, twice in zip(reach(1e-3), reach(2e-3), strict=True)]

  with at_projections(unprojected):
    jax.eval_shape(step, x, y, zeros)
  try:
    with jax.ensure_compile_time_eval():
      below, above = moved()
      if simple:
        plain, decays = [True] * num_leaves, [False] * num_leaves
      else:
        with at_projections(unprojected):
          plain, decays = grows(), [a or b for a, b in zip(*moved(), strict=True)]
  except jax.errors.ConcretizationTypeError:  # A rate, or a bound, that is not known yet.
    below = above = reads
    plain, decays = [simple] * num_leaves, [False] * num_leaves
  is_end = lambda node: isinstance(node, optax.NonNegativeParamsState)
  may_be = not simple and any(map(is_end, jax.tree.leaves(opt_state, is_leaf=is_end)))
  return [
    StepKind(
      moves_alone=low or high,
      plain=is_plain,
      projected=is_projected,
      nonnegative=may_be and low and not high and not is_projected,
      decays=is_projected and decay,
    )
    for low, high, is_plain, is_projected, decay in zip(
      below, above, plain, projected, decays, strict=True
    )
  ]


def _has_parts(state: optax.OptState) -> bool:
  """Whether an optimizer projects, or does not treat all leaves alike."""
  kinds = (ProjectParamsState, optax.NonNegativeParamsState, optax.MaskedNode)
  is_kind = lambda node: isinstance(node, kinds)
  return any(map(is_kind, jax.tree.leaves(state, is_leaf=is_kind)))


def _remembers_momentum_only(state: optax.OptState) -> bool:
  """Whether an optimizer keeps counters, switches, hyperparameters and momentum, and no more."""
  stops = lambda node: isinstance(node, optax.TraceState) or hasattr(node, "hyperparams")
  for node in jax.tree.leaves(state, is_leaf=stops):
    if hasattr(node, "hyperparams"):
      if not _remembers_momentum_only(node.inner_state):
        return False
    elif not isinstance(node, optax.TraceState) and jnp.issubdtype(node.dtype, jnp.inexact):
      return False
  return True
