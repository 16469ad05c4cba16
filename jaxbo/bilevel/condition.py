"""The condition that an inner solution meets, which implicit responses differentiate."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check, _tree
from jaxbo._types import Data, PyTree
from jaxbo.bilevel.projection import at_projections, leaves_of, masked_as
from jaxbo.bilevel.solution import InnerSolution, InnerSolver
from jaxbo.bilevel.step_kinds import BlindStep, StepKind, step_kinds

Residual = Callable[[PyTree, PyTree, Data], PyTree]
"""``F(x, y, batch)``, with one equation for each inner parameter; zero at a solution."""


class Condition(NamedTuple):
  """A condition ``F(x, y) = 0`` on one batch.

  Attributes:
    residual: ``F(x, y)``, shaped like ``y``. Where an entry of ``moves`` is false, ``y`` is a
      constant and ``F`` is ``y`` itself, so that the linear system leaves it alone.
    symmetric: whether the derivative of ``F`` in ``y`` is symmetric.
    moves: for each leaf of ``y``, whether the inner optimizer moves it; an array, shaped like the
      leaf, where it may move some of the entries.
  """

  residual: Callable[[PyTree, PyTree], PyTree]
  symmetric: bool
  moves: list[bool | jax.Array]

  def of_moving(self, tree: PyTree) -> PyTree:
    """Returns ``tree``, shaped like ``y``, with zeros for what does not move."""
    return _select(self.moves, tree, optax.tree.zeros_like(tree))


def condition_for(
  inner: InnerSolver,
  condition: str | Residual | None,
  x: PyTree,
  solution: InnerSolution,
  batch: Data,
) -> Condition:
  """The condition of ``condition=`` of :func:`jaxbo.add_implicit_response` on one batch."""
  y = solution.params
  all_leaves = [True] * len(jax.tree.leaves(y))
  if callable(condition):
    of_user = condition

    def given(x, y):
      value = of_user(x, y, batch)
      _check.same_structure("what condition returns", value, "y", y)
      return value

    return Condition(given, symmetric=False, moves=[*all_leaves])

  gradient = jax.grad(inner.loss, argnums=1)
  blind = lambda x, y, grads: inner.descend(x, y, grads, batch, with_loss=False)
  moves: list[bool | jax.Array] = [*all_leaves]
  if inner.after is None or condition == "gradient":
    moves = [*_check.depends_by_leaf(lambda grads: blind(x, y, grads), optax.tree.zeros_like(y))]
  kinds = []
  if condition != "gradient":
    kinds = step_kinds(blind, x, y, solution.opt_state)
  fixed = [kind.shows_where_it_stops for kind in kinds]
  if condition == "fixed_point" or (inner.after is not None and condition is None):
    fixed = all_leaves
  if not any(fixed):
    return Condition(_hold(moves, lambda x, y: gradient(x, y, batch)), symmetric=True, moves=moves)

  descend = inner.descend
  if any(kind.is_hidden for kind in kinds):
    rate = _inverse_curvature(lambda y: gradient(x, y, batch), y)
    descend = _with_plain_steps(inner, kinds, rate)
  blind = lambda x, y, grads: descend(x, y, grads, batch, with_loss=False)
  lengths, stirs = _lengths(blind, x, y, gradient(x, y, batch))
  if inner.after is None:
    moves = [
      one and (stir if f else True) for one, stir, f in zip(moves, stirs, fixed, strict=True)
    ]

  def residual(x, y):
    grads = gradient(x, y, batch)
    updates = descend(x, y, grads, batch)
    if inner.after is not None:
      updates = inner.after(x, y, updates, batch)
    scaled = jax.tree.map(lambda length, u: -u / length, lengths, updates)
    return _select(fixed, scaled, grads)

  return Condition(_hold(moves, residual), symmetric=False, moves=moves)


def _with_plain_steps(
  inner: InnerSolver, kinds: list[StepKind], rate: jax.Array
) -> Callable[..., optax.Updates]:
  """``inner.descend``, with plain descent in front of a projection that hides another step."""

  def descend(x, y, grads, batch, **options):
    def project_plain(updates, params, step, project):
      part = masked_as(updates, step.grads)
      leaves = {i for i, one in enumerate(leaves_of(updates, step.grads)) if one}
      if part is None or not step.ended.isdisjoint(leaves):  # A second projection goes on.
        return project(updates, params)
      step.ended.update(leaves)
      return project(_tree.scaled(-rate, part), params)

    with at_projections(project_plain):
      projected = inner.descend(x, y, grads, batch, **options)
    cut = jax.tree.map(lambda y, g: jnp.maximum(-rate * g, -y), y, grads)
    projected = _select([kind.nonnegative for kind in kinds], cut, projected)
    own = inner.descend(x, y, grads, batch, **options)
    return _select([kind.is_hidden for kind in kinds], projected, own)

  return descend


def _inverse_curvature(gradient: Callable[[PyTree], PyTree], y: PyTree) -> jax.Array:
  """About the inverse of the Hessian's eigenvalues: a step that neither crawls nor flies."""
  draw = optax.tree.random_like(jax.random.key(0), y, jax.random.normal)
  ratio = _tree.norm(draw) / _tree.norm(jax.jvp(gradient, (y,), (draw,))[1])
  return jax.lax.stop_gradient(jnp.where(jnp.isfinite(ratio), ratio, 1))


def _lengths(
  step: BlindStep, x: PyTree, y: PyTree, grads: PyTree
) -> tuple[PyTree, list[jax.Array]]:
  """The step length of each leaf, and for each entry whether it can move at all.

  The residual divided by the length has the derivative of the gradient, as linear solvers expect:
  their damping and learning rates mean what they mean for plain descent. The length is 1 where the
  optimizer holds an entry, at a bound for example.
  """
  to_y, to_grads = (
    optax.tree.random_like(key, y, jax.random.normal) for key in jax.random.split(jax.random.key(0))
  )
  by_grads, moved = (
    jax.jvp(lambda y, grads: step(x, y, grads), (y, grads), (tangent, to_grads))[1]
    for tangent in (optax.tree.zeros_like(y), to_y)
  )
  length = jax.tree.map(lambda s, d: jnp.abs(s / d), by_grads, to_grads)
  longest = jnp.max(jnp.stack([jnp.max(leaf, initial=0) for leaf in jax.tree.leaves(length)]))

  def one_length(leaf):
    of_leaf = jnp.max(leaf, initial=0)
    shortest = jnp.maximum(1e-3 * of_leaf, 1e-9 * longest)
    return jnp.where(leaf > shortest, of_leaf, 1).astype(leaf.dtype)

  lengths = jax.tree.map(one_length, length)
  leaves = zip(*map(jax.tree.leaves, (step(x, y, grads), moved)), strict=True)
  stirs = [(u != 0) | (change != 0) for u, change in leaves]
  # If nothing does, the system must not be solved as if all were right.
  any_stirs = jnp.any(jnp.stack([jnp.any(leaf) for leaf in stirs]))
  return jax.lax.stop_gradient((lengths, [leaf | ~any_stirs for leaf in stirs]))


def _hold(
  moves: list[bool | jax.Array], residual: Callable[[PyTree, PyTree], PyTree]
) -> Callable[[PyTree, PyTree], PyTree]:
  """``residual``, with what does not move as constants that are their own residual."""
  if all(one is True for one in moves):
    return residual

  def with_constants(x, y):
    return _select(moves, residual(x, _select(moves, y, jax.lax.stop_gradient(y))), y)

  return with_constants


def _select(which: Sequence[bool | jax.Array], tree: PyTree, other: PyTree) -> PyTree:
  """``tree`` where ``which``, given for each leaf, is true, else ``other``."""
  pick = lambda w, a, b: jnp.where(w, a, b) if isinstance(w, jax.Array) else a if w else b
  return jax.tree.map(pick, jax.tree.unflatten(jax.tree.structure(tree), which), tree, other)
