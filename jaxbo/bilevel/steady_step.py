"""A step of an optimizer in the middle of its schedules, with its momentum at rest."""

import jax
import jax.numpy as jnp
import optax

from jaxbo._types import PyTree
from jaxbo.bilevel.projection import step_by

_is_momentum = lambda node: isinstance(node, optax.TraceState)


def steady_updates(
  tx: optax.GradientTransformationExtraArgs,
  state: optax.OptState,
  grads: optax.Updates,
  params: optax.Params,
  num_steps: int,
  extra_args: dict[str, PyTree],
) -> optax.Updates:
  r"""The updates of ``tx`` for gradients that stay as they are, from its fresh ``state``.

  A fresh momentum is zero, so the first step is shorter than those that follow, and what comes
  after it in the chain, a proximal step say, weighs more. The momentum :math:`m = \beta m + v` of
  gradients that stay is :math:`v / (1 - \beta)`. Schedules stand in the middle of the run, since a
  warm-up begins at zero and a decay ends there; at the golden section, since cycles may end at a
  half or a third of it.
  """
  is_schedule = lambda node: "Schedule" in type(node).__name__ and hasattr(node, "count")
  middle = lambda node: node._replace(
    count=jnp.full_like(node.count, max(1, round(0.382 * num_steps)))
  )
  state = jax.tree.map(lambda n: middle(n) if is_schedule(n) else n, state, is_leaf=is_schedule)

  def update(grads, state, params):
    with step_by(grads):
      return tx.update(grads, state, params, **extra_args)

  momenta = _momenta(state)
  if not momenta:
    return update(grads, state, params)[0]
  zeros = optax.tree.zeros_like
  entered = _momenta(update(grads, state, params)[1])
  ones = _with_momenta(state, jax.tree.map(jnp.ones_like, momenta))
  kept = _momenta(update(zeros(grads), ones, zeros(params))[1])
  at_rest = jax.tree.map(lambda v, beta: v / (1 - beta), entered, kept)
  return update(grads, _with_momenta(state, at_rest), params)[0]


def _momenta(state: optax.OptState) -> list[PyTree]:
  nodes = jax.tree.leaves(state, is_leaf=_is_momentum)
  return [node.trace for node in nodes if _is_momentum(node)]


def _with_momenta(state: optax.OptState, momenta: list[PyTree]) -> optax.OptState:
  given = iter(momenta)
  return jax.tree.map(
    lambda node: optax.TraceState(next(given)) if _is_momentum(node) else node,
    state,
    is_leaf=_is_momentum,
  )
