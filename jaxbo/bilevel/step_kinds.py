"""What a step of an inner optimizer does to each leaf of the inner parameters."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check
from jaxbo._types import PyTree
from jaxbo.bilevel.projection import at_projections, leaves_of

BlindStep = Callable[..., optax.Updates]
"""``step(x, y, grads)``, the updates of an optimizer that does not see the loss."""


class StepKind(NamedTuple):
  """What the optimizer does to one leaf.

  Attributes:
    moves_alone: whether it moves the leaf without a gradient: it decays, shrinks or projects.
    plain: whether the step is as long as the gradient makes it, as in SGD. Only then does the step
      show where the run stops: the first step of Adam has a length of its own.
    projected: whether a projection ends the step: :func:`jaxbo.bilevel.project_params` or
      ``optax.keep_params_nonnegative``.
    nonnegative: whether it is the second one.
  """

  moves_alone: bool = False
  plain: bool = True
  projected: bool = False
  nonnegative: bool = False


def step_kinds(step: BlindStep, x: PyTree, y: PyTree, opt_state: optax.OptState) -> list[StepKind]:
  """Tries the optimizer at a few known numbers, in place of ``x`` and ``y``, for each leaf."""
  zeros = optax.tree.zeros_like(y)
  if not _check.depends(lambda xy: step(*xy, zeros), (x, y)):
    return [StepKind() for _ in jax.tree.leaves(y)]
  projects = [False] * len(jax.tree.leaves(y))

  def without_projections(updates, grads):
    for i, one in enumerate(leaves_of(updates, y)):
      projects[i] |= one
    return updates, False

  # At x = 0 a decay by x would not show.
  fill = lambda tree, value: jax.tree.map(lambda v: jnp.full(v.shape, value, v.dtype), tree)
  at = lambda y_value, grad: jax.tree.leaves(step(fill(x, 0.7), fill(y, y_value), fill(y, grad)))
  is_zero = lambda leaves: [not bool(jnp.any(leaf != 0)) for leaf in leaves]
  with jax.ensure_compile_time_eval():
    rests, rests_above = is_zero(at(-1e3, 0.0)), is_zero(at(1e3, 0.0))
    with at_projections(without_projections):
      alone = at(0.0, 0.0)

      def reach(grad):
        """The longest update of each leaf, beside that without a gradient."""
        far = [jax.tree.map(jnp.subtract, at(0.0, g), alone) for g in (grad, -grad)]
        return [max(float(jnp.max(jnp.abs(u))) for u in ends) for ends in zip(*far, strict=True)]

      plain = [twice >= 1.5 * once for once, twice in zip(reach(1e-3), reach(2e-3), strict=True)]
  is_nonnegative = lambda node: isinstance(node, optax.NonNegativeParamsState)
  any_nonnegative = any(map(is_nonnegative, jax.tree.leaves(opt_state, is_leaf=is_nonnegative)))
  kinds = []
  for below, above, is_plain, projected in zip(rests, rests_above, plain, projects, strict=True):
    nonnegative = any_nonnegative and above and not below and not projected
    kinds.append(StepKind(not below, is_plain, projected or nonnegative, nonnegative))
  return kinds
