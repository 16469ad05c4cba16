"""The types of the inner problem: a solver, its solution and its report."""

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import optax

from jaxbo._types import Data, PyTree

Start: TypeAlias = tuple[optax.Params, optax.OptState]
"""Where a run begins or ends: the inner parameters and the state of their optimizer."""


class InnerInfo(NamedTuple):
  """Diagnostics of an inner run.

  Attributes:
    losses: the inner loss *before* each step, ``[num_steps]``, float32 at least; ``None`` without a
      loss: no solver, or a :func:`jaxbo.black_box`, made the solution.
    finite: whether the run ended at finite numbers; if not, the solution is where the run began.
    aux: the auxiliary outputs of the loss, each leaf ``[num_steps, ...]``; ``None`` without
      ``has_aux``.
  """

  losses: jax.Array | None
  finite: jax.Array
  aux: PyTree = None


class InnerSolution(NamedTuple):
  """Where an inner run ended and where it began.

  Attributes:
    params: the inner parameters after the last step, :math:`y^N`.
    opt_state: the state of the inner optimizer after the last step.
    start: ``(params, opt_state)`` before the first step. Responses run the inner problem again
      from here, so that runs differ in ``x`` alone. ``None`` where no run led to ``params``;
      implicit responses do not need it.
    info: the :class:`~jaxbo.bilevel.InnerInfo` of the run.
  """

  params: optax.Params
  opt_state: optax.OptState
  start: Start | None
  info: InnerInfo


@runtime_checkable
class Path(Protocol):
  """The type of ``InnerSolver.path``."""

  def __call__(
    self,
    x: PyTree,
    start: Start,
    batch: Data,
    /,
    *,
    last: int | None = None,
  ) -> optax.Params:
    """Returns :math:`y^N(x)`; with ``last=k``, ``x`` is constant before the last ``k`` steps."""
    ...


class FeatureProblem(NamedTuple):
  """An inner problem that sees ``x`` only through ``z = features(x, batch)``.

  Attributes:
    features: maps ``(x, batch)`` to ``z``; with per-step batches every leaf of ``z`` has the
      leading axis ``num_steps``.
    path: maps ``(z, start, batch)`` to the inner parameters after the last step.
  """

  features: Callable[[PyTree, Data], PyTree]
  path: Path


class InnerSolver(NamedTuple):
  """A solver of the inner problem, made by :func:`inner_solver`.

  Attributes:
    init: ``init(y0) -> InnerSolution``, the state before the first solve. If the loss has
      auxiliary outputs, or the optimizer or the start is a function of ``x``, ``init(y0, x,
      batch)``; of ``batch`` it uses only the shapes and dtypes.
    solve: ``solve(x, solution, batch) -> InnerSolution``, ``num_steps`` steps of the optimizer.
    run: ``run(x, start, batch) -> InnerSolution``, the same steps from any start ``(params,
      opt_state)``. A run that is not finite returns its start.
    path: ``path(x, start, batch, *, last=None) -> y``, the same run as a pure map from ``x`` to
      the final inner parameters. Responses differentiate this map. With ``last=k`` the gradient
      flows through the last ``k`` steps only.
    loss: ``loss(x, y, batch) -> scalar``, the inner loss on the batch of *one* step.
    descend: ``descend(x, y, grads, batch, *, opt_state=None, with_loss=True) -> updates``, the
      optimizer's update for given gradients in one step on the batch of *one* step. The step starts
      from ``opt_state``; without ``opt_state``, the optimizer is in the middle of a run with these
      gradients, with its momentum at rest. With ``with_loss=False``, optimizers that need the loss
      see zero.
    num_steps: the number of steps of a run; 0 for a :func:`jaxbo.black_box`, which has no loss.
    per_step_batches: whether ``batch`` has a leading axis ``num_steps``.
    start: the function ``start=`` of the solver, else ``None``.
    through: the :class:`~jaxbo.bilevel.FeatureProblem` of a solver built with ``through=``, else
      ``None``.
    task: the solver of one task, if :func:`jaxbo.over_tasks` made this solver; else ``None``.
    num_tasks: the number of tasks, if :func:`jaxbo.over_tasks` made this solver; else ``None``.
    after: ``after(x, y, updates, batch) -> updates``, the whole change of a step, including that of
      ``keep=``; ``None`` without ``keep=``.
    stops_early: whether a run may end before ``num_steps``, by ``tolerance=``.
  """

  init: Callable[..., InnerSolution]
  solve: Callable[[optax.Params, InnerSolution, Data], InnerSolution]
  run: Callable[[optax.Params, Start, Data], InnerSolution]
  path: Path
  loss: Callable[[optax.Params, optax.Params, Data], jax.Array]
  descend: Callable[..., optax.Updates]
  num_steps: int
  per_step_batches: bool
  start: Callable[[PyTree], PyTree] | None
  through: FeatureProblem | None
  task: "InnerSolver | None" = None
  num_tasks: int | None = None
  after: Callable[..., optax.Updates] | None = None
  stops_early: bool = False
