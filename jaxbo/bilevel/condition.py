"""The condition that an inner solution meets, which implicit responses differentiate."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check
from jaxbo._types import Data, PyTree
from jaxbo.bilevel.projection import ProjectParamsState
from jaxbo.bilevel.solution import InnerSolution, InnerSolver

Residual = Callable[[PyTree, PyTree, Data], PyTree]
"""``F(x, y, batch)``, with one equation for each inner parameter; zero at a solution."""


class Condition(NamedTuple):
  """A condition ``F(x, y) = 0`` on one batch.

  Attributes:
    residual: ``F(x, y)``, shaped like ``y``. Where an entry of ``moves`` is false, ``y`` is a
      constant and ``F`` is ``y`` itself, so that the linear system leaves it alone.
    symmetric: whether the derivative of ``F`` in ``y`` is symmetric.
    moves: for each leaf of ``y``, whether the inner optimizer moves it.
  """

  residual: Callable[[PyTree, PyTree], PyTree]
  symmetric: bool
  moves: list[bool]

  def of_moving(self, tree: PyTree) -> PyTree:
    """Returns ``tree``, shaped like ``y``, with zeros for the leaves that do not move."""
    leaves, structure = jax.tree.flatten(tree)
    kept = [leaf if m else jnp.zeros_like(leaf) for m, leaf in zip(self.moves, leaves, strict=True)]
    return jax.tree.unflatten(structure, kept)


def condition_for(
  inner: InnerSolver,
  condition: str | Residual | None,
  x: PyTree,
  solution: InnerSolution,
  batch: Data,
) -> Condition:
  """The condition of ``condition=`` of :func:`jaxbo.add_implicit_response` on one batch."""
  y = solution.params
  zeros = optax.tree.zeros_like(y)
  blind = lambda x, y, grads: inner.descend(x, y, grads, batch, with_loss=False)
  moves = [True] * len(jax.tree.leaves(y))
  if not callable(condition) and (inner.after is None or condition == "gradient"):
    moves = _check.depends_by_leaf(lambda grads: blind(x, y, grads), zeros)
  if condition is None:
    kinds = (ProjectParamsState, optax.TraceState)
    nodes = jax.tree.leaves(solution.opt_state, is_leaf=lambda node: isinstance(node, kinds))
    projects = any(isinstance(node, ProjectParamsState) for node in nodes)
    moves_alone = _is_plain(nodes) and _moves_alone(blind, x, y)
    fixed = projects or inner.after is not None or moves_alone
    condition = "fixed_point" if fixed else "gradient"

  def residual(x, y):
    if callable(condition):
      value = condition(x, y, batch)
      _check.same_structure("what condition returns", value, "y", y)
      return value
    grads = jax.grad(inner.loss, argnums=1)(x, y, batch)
    if condition == "gradient":
      return grads
    updates = inner.descend(x, y, grads, batch)
    if inner.after is not None:
      updates = inner.after(x, y, updates, batch)
    return jax.tree.map(lambda rate, u: -u / rate, rates(), updates)

  def rates():
    """The step length of each coordinate; 1 where the optimizer holds it, at a bound say.

    By them the system is one with the Hessian, as linear solvers expect: their damping and learning
    rates mean what they mean for plain descent.
    """
    held = jax.lax.stop_gradient((x, y))
    grads = jax.grad(inner.loss, argnums=1)(*held, batch)
    draw = optax.tree.random_like(jax.random.key(0), y, jax.random.normal)
    step = jax.jvp(lambda grads: blind(*held, grads), (grads,), (draw,))[1]
    length = jax.tree.map(lambda s, d: jnp.abs(s / d), step, draw)
    longest = jnp.max(jnp.stack([jnp.max(leaf) for leaf in jax.tree.leaves(length)]))
    one = lambda leaf: jnp.where(leaf > 1e-3 * longest, longest, 1).astype(leaf.dtype)
    return jax.lax.stop_gradient(jax.tree.map(one, length))

  def with_constants(x, y):
    leaves, structure = jax.tree.flatten(y)
    held = [
      leaf if m else jax.lax.stop_gradient(leaf) for m, leaf in zip(moves, leaves, strict=True)
    ]
    values = jax.tree.leaves(residual(x, jax.tree.unflatten(structure, held)))
    kept = [v if m else leaf for m, v, leaf in zip(moves, values, leaves, strict=True)]
    return jax.tree.unflatten(structure, kept)

  return Condition(
    residual if all(moves) else with_constants, symmetric=condition == "gradient", moves=moves
  )


def _moves_alone(blind: Callable[..., PyTree], x: PyTree, y: PyTree) -> bool:
  """Whether the optimizer moves parameters without a gradient: it decays, shrinks or projects."""
  zeros = optax.tree.zeros_like(y)
  if not _check.depends(lambda xy: blind(xy[0], xy[1], zeros), (x, y)):
    return False
  # A trust ratio reads parameters and moves nothing alone; at x = 0 a decay by x would not, either.
  with jax.ensure_compile_time_eval():
    fill = lambda tree, value: jax.tree.map(lambda v: jnp.full(v.shape, value, v.dtype), tree)
    updates = jax.tree.leaves(blind(fill(x, 0.7), fill(y, -1e3), fill(y, 0.0)))
    return any(bool(jnp.any(leaf != 0)) for leaf in updates)


def _is_plain(nodes: list[PyTree]) -> bool:
  """Whether an optimizer's first step shows where it stops: it keeps counters and momentum only.

  Adam's first step has a length of its own, and L-BFGS only remembers the parameters.
  """
  return all(
    isinstance(node, optax.TraceState)
    or (hasattr(node, "dtype") and jnp.issubdtype(node.dtype, jnp.integer))
    for node in nodes
  )
