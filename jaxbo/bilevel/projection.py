"""Projections on convex sets, for the end of a chain."""

import functools
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check, _tree
from jaxbo._optimizer import LearningRate, optimizer
from jaxbo._types import PyTree
from jaxbo.bilevel.parameters import Bilevel, check_params

Projection = Callable[[PyTree], PyTree]


def project(
  outer: Projection | None = None, inner: Projection | None = None
) -> optax.GradientTransformationExtraArgs:
  r"""Projects :class:`jaxbo.Bilevel` parameters: each step ends in :math:`X \times Y`.

  .. math:: u \leftarrow P(z + u) - z, \qquad P = (P_X, P_Y), \quad z = (x, y)

  Put ``project`` last in a chain, where the updates are the final change of the parameters. Optax
  has projections (``optax.projections``) but only one transformation that applies a projection,
  ``optax.keep_params_nonnegative``.

  ``optax.apply_updates`` computes :math:`z + u` again, so rounding may put a parameter slightly off
  a face of the set. Entries that the projection does not change keep their updates bit for bit.
  The sum is in float32 at least.

  Cost: each projection once. Memory: one copy of the parameters.

  Args:
    outer: maps ``x`` to the nearest point of :math:`X`, such as
      ``lambda x: optax.projections.projection_box(x, 0.0, 1.0)`` for one array or
      ``optax.projections.projection_simplex``; ``None`` for no constraint.
    inner: the same for ``y``.

  Returns:
    A transformation on :class:`jaxbo.Bilevel` updates; ``update`` must be given ``params``.

  Raises:
    TypeError: if a projection is not a function of one argument; if parameters or updates are not
      :class:`jaxbo.Bilevel`.
    ValueError: if a projection changes the structure or a shape.

  Example:
    >>> import jax.numpy as jnp, jaxbo, optax
    >>> box = lambda x: optax.projections.projection_box(x, 0.0, 1.0)
    >>> tx = optax.chain(optax.sgd(1.0), jaxbo.project(outer=box))
    >>> params = jaxbo.Bilevel(outer=jnp.float32(0.5), inner=jnp.float32(0.5))
    >>> updates, _ = tx.update(jaxbo.Bilevel(jnp.float32(3.0), jnp.float32(3.0)),
    ...                        tx.init(params), params)
    >>> [float(p) for p in optax.apply_updates(params, updates)]
    [0.0, -2.5]
  """
  for name, projection in (("outer", outer), ("inner", inner)):
    if projection is not None:
      _check.takes_arguments(name, projection, "params")

  def update(updates, state, params=None, **extra_args):
    del extra_args
    params = check_params("project", params)
    if not isinstance(updates, Bilevel):
      raise TypeError(f"project: updates must be jaxbo.Bilevel, got {type(updates).__name__}")
    _check.same_structure("updates", updates, "params", params)
    return Bilevel(
      _end_inside("outer", outer, updates.outer, params.outer),
      _end_inside("inner", inner, updates.inner, params.inner),
    ), state

  return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


class ProjectParamsState(NamedTuple):
  """State of :func:`~jaxbo.bilevel.project_params`: empty."""


class Step(NamedTuple):
  """A step of an optimizer while it is computed.

  Attributes:
    grads: the gradients that it is made of; the optimizer may change or hide them.
    ended: the leaves that :func:`at_projections` has projected by then, in the order of the leaves.
  """

  grads: PyTree
  ended: set[int]


AtProjection = Callable[[PyTree, PyTree, Step, Callable[[PyTree, PyTree], PyTree]], PyTree]
"""``at_projection(updates, params, step, project)``, in place of ``project(updates, params)``."""

_AT_PROJECTION: ContextVar[AtProjection | None] = ContextVar("at_projection", default=None)
_STEP: ContextVar[Step] = ContextVar("step")


@contextmanager
def at_projections(function: AtProjection) -> Generator[None]:
  """Lets ``function`` look at, and change, what each ``project_params`` inside does."""
  token = _AT_PROJECTION.set(function)
  try:
    yield
  finally:
    _AT_PROJECTION.reset(token)


@contextmanager
def step_by(grads: PyTree) -> Generator[None]:
  """Says which gradients the one step inside is made of."""
  token = _STEP.set(Step(grads, set()))
  try:
    yield
  finally:
    _STEP.reset(token)


def leaves_of(updates: PyTree, y: PyTree) -> list[bool]:
  """For each leaf of ``y``, whether it is in ``updates``, a part that optax masked out of ``y``.

  All leaves, where ``updates`` are something else, such as one flat vector.
  """
  there = lambda node, part: jax.tree.map(lambda _: not _is_masked(node), part)
  try:
    return jax.tree.leaves(jax.tree.map(there, updates, y, is_leaf=_is_masked))
  except ValueError:
    return [True] * len(jax.tree.leaves(y))


def masked_as(updates: PyTree, tree: PyTree) -> PyTree | None:
  """The leaves of ``tree`` that are in ``updates``, a part that optax masked out of such a tree.

  ``None`` where ``updates`` are something else.
  """
  pick = lambda node, part: node if _is_masked(node) else part
  try:
    part = jax.tree.map(pick, updates, tree, is_leaf=_is_masked)
  except ValueError:
    return None
  return part if _shapes(part) == _shapes(updates) else None


def _shapes(tree: PyTree) -> list[tuple[int, ...]]:
  return [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]


def _is_masked(node: object) -> bool:
  return isinstance(node, optax.MaskedNode)


def project_params(projection: Projection) -> optax.GradientTransformationExtraArgs:
  r"""Projects the parameters of one level: each step ends in a convex set.

  .. math:: u \leftarrow P_X(x + u) - x

  Put ``project_params`` last in a chain. Rounding in ``optax.apply_updates`` may put a parameter
  slightly off a face of the set; entries that the projection does not change keep their updates bit
  for bit. Cost: one projection. Memory: one copy of the parameters.

  Args:
    projection: maps ``x`` to the nearest point of :math:`X`.

  Returns:
    A transformation of the updates of any parameters; ``update`` must be given ``params``.

  Raises:
    TypeError: if ``projection`` is not a function of one argument.
    ValueError: if ``params`` is missing, or the projection changes the structure or a shape.

  Example:
    >>> import jax.numpy as jnp, jaxbo, optax
    >>> box = lambda x: optax.projections.projection_box(x, 0.0, 1.0)
    >>> tx = optax.chain(optax.sgd(1.0), jaxbo.bilevel.project_params(box))
    >>> x = jnp.float32(0.5)
    >>> updates, _ = tx.update(jnp.float32(3.0), tx.init(x), x)
    >>> float(optax.apply_updates(x, updates))
    0.0
  """
  _check.takes_arguments("projection", projection, "params")

  def update(updates, state, params=None, **extra_args):
    del extra_args
    if params is None:
      raise ValueError("project_params: update must be given params, the outer parameters x")
    _check.same_structure("updates", updates, "params", params)
    project = functools.partial(_end_inside, "projection", projection)
    if at_projection := _AT_PROJECTION.get():
      return at_projection(updates, params, _STEP.get(), project), state
    return project(updates, params), state

  return optax.GradientTransformationExtraArgs(lambda params: ProjectParamsState(), update)


def _end_inside(name, projection, updates, params):
  """The updates from ``params`` to the projection of ``params + updates``."""
  if projection is None:
    return updates
  # Both sums in one precision, so that entries that the projection does not change compare equal.
  wide = _tree.at_least_float32(params)
  target = jax.tree.map(lambda p, u: p + u.astype(p.dtype), wide, updates)
  projected = project_tree(name, projection, target)
  return jax.tree.map(
    lambda new, old, p, u: jnp.where(new == old, u, (new - p).astype(u.dtype)),
    projected,
    target,
    wide,
    updates,
  )


def descend(
  learning_rate: LearningRate | Bilevel,
  project_outer: Projection | None,
  project_inner: Projection | None,
) -> list[optax.GradientTransformation]:
  """The tail of the aliases: learning rates or optimizers, then projections, if any."""
  if isinstance(learning_rate, Bilevel):
    tail = optax.partition(
      {
        "outer": optimizer(learning_rate.outer, name="learning_rate.outer"),
        "inner": optimizer(learning_rate.inner, name="learning_rate.inner"),
      },
      Bilevel("outer", "inner"),
    )
  else:
    tail = optimizer(learning_rate)
  if project_outer is None and project_inner is None:
    return [tail]
  return [tail, project(project_outer, project_inner)]


def project_tree(name: str, projection: Projection | None, tree: PyTree) -> PyTree:
  """The projection of ``tree``, checked, in the dtypes of ``tree``; ``tree`` without one."""
  if projection is None:
    return tree
  projected = projection(tree)
  _check.same_structure(f"what {name} returns", projected, "its argument", tree)
  return jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), projected, tree)
