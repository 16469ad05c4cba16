"""A meta-batch: several tasks, each with an inner problem, that share the outer parameters."""

import functools

import jax
import jax.numpy as jnp

from jaxbo import _check
from jaxbo._types import PyTree
from jaxbo.bilevel.solution import FeatureProblem, InnerSolution, InnerSolver


def over_tasks(inner: InnerSolver, num_tasks: int, *, average_start: bool = False) -> InnerSolver:
  r"""Lifts an inner solver to a meta-batch of tasks that share the outer parameters.

  .. math:: g(x, (y_1, \dots, y_T), (\xi_1, \dots, \xi_T)) = \sum_{t=1}^T g_t(x, y_t, \xi_t)

  All tasks run at once under ``vmap``. Inner parameters, optimizer states and the diagnostics of a
  run have the leading axis ``[num_tasks, ...]``. The batch has this axis too, or with per-step
  batches the axes ``[num_steps, num_tasks, ...]``. Every response accepts the result like any other
  solver: the outer loss averages (or sums) over the tasks, and the responses of the tasks add up.
  :func:`jaxbo.add_es_response` can sample tasks separately (``per_task``).

  Args:
    inner: the solver of one task.
    num_tasks: the number :math:`T \ge 1` of tasks.
    average_start: ``True``: every run starts at the mean of the last solutions over the tasks, with
      a fresh optimizer state, as in the published few-shot code of ESJ. ``False``: each run starts
      as ``inner`` does: at the last solution of its task with ``warm_start``, else at ``y0``. If
      the tasks are new at every step, use ``average_start=True`` or ``warm_start=False``.

  Returns:
    An :class:`InnerSolver` whose ``init(y0)`` takes the inner parameters of *one* task, the start
    of all tasks.

  Raises:
    ValueError: if ``num_tasks < 1``; if ``inner`` already has tasks; if a batch has another number
      of tasks.

  Example:
    >>> import jax.numpy as jnp, jaxbo, optax
    >>> one = jaxbo.inner_solver(lambda x, y, batch: (y - x * batch) ** 2, optax.sgd(0.25), 30)
    >>> inner = jaxbo.over_tasks(one, 3)
    >>> y = inner.solve(jnp.float32(2.0), inner.init(jnp.float32(0.0)), jnp.array([1.0, 2.0, 3.0]))
    >>> bool(jnp.allclose(y.params, jnp.array([2.0, 4.0, 6.0])))
    True
  """
  num_tasks = _check.positive_int("num_tasks", num_tasks)
  if inner.task is not None:
    raise ValueError(f"inner must be a solver of one task, got one with {inner.num_tasks} tasks")
  axis = 1 if inner.per_step_batches else 0
  over_batches = functools.partial(jax.vmap, axis_size=num_tasks)

  def checked(batch):
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
      if jnp.ndim(leaf) <= axis or jnp.shape(leaf)[axis] != num_tasks:
        expected = f"[num_steps={inner.num_steps}, " * axis or "["
        raise ValueError(
          f"batch{jax.tree_util.keystr(path)} must have the shape {expected}num_tasks={num_tasks}, "
          f"...], got {jnp.shape(leaf)}"
        )
    return batch

  def repeat(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.repeat(leaf[None], num_tasks, axis=0), tree)

  def shapes_of_one(batch):
    """The shapes of the batch of one task, which are all that ``inner.init`` needs."""
    first = lambda batch: jax.tree.map(lambda leaf: leaf.take(0, axis), checked(batch))
    return jax.eval_shape(first, batch)

  def init(y0, x=None, batch=None):
    return repeat(inner.init(y0, x, shapes_of_one(batch)))

  def from_average(x, solution, batch):
    mean = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0).astype(leaf.dtype), solution.params)
    start = inner.init(mean, x, shapes_of_one(batch))
    start = repeat((start.params, start.opt_state))
    return InnerSolution(params=start[0], opt_state=start[1], start=start, info=solution.info)

  def solve(x, solution, batch):
    batch = checked(batch)
    if average_start:
      solution = from_average(x, solution, batch)
    return over_batches(inner.solve, in_axes=(None, 0, axis))(x, solution, batch)

  def descend(x, y, grads, batch, *, opt_state=None, with_loss=True):
    def one(x, y, grads, batch, opt_state):
      return inner.descend(x, y, grads, batch, opt_state=opt_state, with_loss=with_loss)

    return over_batches(one, in_axes=(None, 0, 0, 0, 0))(x, y, grads, batch, opt_state)

  after = inner.after
  if after is not None:
    after = over_batches(after, in_axes=(None, 0, 0, 0))

  def run(x, start, batch):
    return over_batches(inner.run, in_axes=(None, 0, axis))(x, start, checked(batch))

  def path(x, start, batch, *, last=None):
    one = functools.partial(inner.path, last=last)
    return over_batches(one, in_axes=(None, 0, axis))(x, start, checked(batch))

  def loss(x, y, batch):
    return jnp.sum(over_batches(inner.loss, in_axes=(None, 0, 0))(x, y, batch))

  through = inner.through
  if through is not None:
    of_one = through

    def features(x, batch):
      return over_batches(of_one.features, in_axes=(None, axis))(x, checked(batch))

    def path_from_features(z, start, batch, *, last=None):
      one = functools.partial(of_one.path, last=last)
      return over_batches(one, in_axes=(0, 0, axis))(z, start, batch)

    through = FeatureProblem(features, path_from_features)
  return inner._replace(
    init=init,
    solve=solve,
    run=run,
    path=path,
    loss=loss,
    descend=descend,
    after=after,
    through=through,
    task=inner,
    num_tasks=num_tasks,
  )
