"""The task-averaged regret of an online meta-learner."""

import jax
import jax.numpy as jnp


def task_averaged_regret(
  losses: jax.typing.ArrayLike,
  comparator_losses: jax.typing.ArrayLike,
  task_switch: jax.typing.ArrayLike,
) -> jax.Array:
  r"""The regret against the best fixed model of each task, averaged over tasks.

  With :math:`N` tasks, where task :math:`n` takes the rounds :math:`I_n`,

  .. math::
    \mathrm{TAR} = \frac1N \sum_{n=1}^N \Big[ \sum_{t \in I_n} l_t(\phi_{t-1})
      - \min_\phi \sum_{t \in I_n} l_t(\phi) \Big]

  where :math:`\phi_{t-1}` is the model that was played in round :math:`t`, before it learned from
  the labels; its losses are ``history.before.loss``. The minimum is over the models whose losses
  you pass, separately for each task. Pass :math:`M` candidates, or the one model found by training
  on all rounds of the task at once. If the best of them is not the true minimum, the regret is
  underestimated, by the same amount for every learner on that stream. The definition is the usual
  one: see Departures from the papers.

  Args:
    losses: :math:`l_t(\phi_{t-1})`, ``[rounds]``.
    comparator_losses: the losses of the best model of each round's task, ``[rounds]``; or of
      candidates that stay fixed within a task, ``[rounds, candidates]``.
    task_switch: ``[rounds]`` bool, where a task begins. The first round always begins a task.

  Returns:
    A scalar in the dtype of the losses, float32 at least. The function is pure: use it under
    ``jit`` and ``vmap``.

  Raises:
    ValueError: if the shapes do not match, or there is no round.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> losses, switches = jnp.array([2.0, 1.0, 3.0, 0.0]), jnp.array([1, 0, 1, 0], bool)
    >>> candidates = jnp.array([[0.5, 2.0], [0.5, 2.0], [4.0, 1.0], [4.0, 0.0]])
    >>> print(jaxbo.meta.task_averaged_regret(losses, candidates, switches))   # (3 - 1 + 3 - 1) / 2
    2.0

  References:
    Sow, Lin, Liang and Zhang, `Algorithm Design for Online Meta-Learning with Task Boundary
    Detection <https://arxiv.org/abs/2302.00857>`_, 2024.
  """
  played, others = jnp.asarray(losses), jnp.asarray(comparator_losses)
  switches = jnp.asarray(task_switch, bool)
  others = others[:, None] if others.ndim == 1 else others
  fit = played.ndim == switches.ndim == 1 and others.ndim == 2
  fit = fit and len(played) == len(others) == len(switches)
  if not fit or not len(played):
    raise ValueError(
      "losses and task_switch must have the shape [rounds], comparator_losses [rounds] or [rounds, "
      f"candidates], got {played.shape}, {switches.shape} and {jnp.shape(comparator_losses)}"
    )
  dtype = jnp.result_type(played, others, jnp.float32)
  switches = switches.at[0].set(True)
  tasks = jnp.cumsum(switches, dtype=jnp.int32) - 1
  sums = jax.ops.segment_sum(others.astype(dtype), tasks, num_segments=len(played))
  best = jnp.min(sums, axis=1)  # Slots after the last task are zero.
  return (jnp.sum(played.astype(dtype)) - jnp.sum(best)) / jnp.sum(switches, dtype=dtype)
