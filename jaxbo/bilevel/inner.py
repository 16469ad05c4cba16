"""The inner problem: a fixed number of optimizer steps, as a pure function."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check, _tree
from jaxbo._types import Data, Loss, PyTree

Start: TypeAlias = tuple[optax.Params, optax.OptState]
"""Where a run begins or ends: the inner parameters and the state of their optimizer."""


class InnerInfo(NamedTuple):
  """Diagnostics of an inner run.

  Attributes:
    losses: the inner loss *before* each step, ``[num_steps]``, float32 at least.
    finite: whether the run ended at finite numbers; if not, the solution is where the run began.
    aux: the auxiliary outputs of the loss, each leaf ``[num_steps, ...]``; ``None`` without
      ``has_aux``.
  """

  losses: jax.Array
  finite: jax.Array
  aux: PyTree = None


class InnerSolution(NamedTuple):
  """Where an inner run ended and where it began.

  Attributes:
    params: the inner parameters after the last step, :math:`y^N`.
    opt_state: the state of the inner optimizer after the last step.
    start: ``(params, opt_state)`` before the first step. Responses run the inner problem again
      from here, so that runs differ in ``x`` alone.
    info: the :class:`~jaxbo.bilevel.InnerInfo` of the run.
  """

  params: optax.Params
  opt_state: optax.OptState
  start: Start
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
      auxiliary outputs, ``init(y0, x, batch)``; it uses only the shapes and dtypes of ``x`` and
      ``batch``.
    solve: ``solve(x, solution, batch) -> InnerSolution``, ``num_steps`` steps of the optimizer.
    run: ``run(x, start, batch) -> ((params, opt_state), finite)``, the same steps from any start,
      without diagnostics. A run that is not finite returns its start.
    path: ``path(x, start, batch, *, last=None) -> y``, the same run as a pure map from ``x`` to
      the final inner parameters. Responses differentiate this map. With ``last=k`` the gradient
      flows through the last ``k`` steps only.
    loss: ``loss(x, y, batch) -> scalar``, the inner loss on the batch of *one* step.
    num_steps: the number of steps of a run.
    per_step_batches: whether ``batch`` has a leading axis ``num_steps``.
    through: the :class:`~jaxbo.bilevel.FeatureProblem` of a solver built with ``through=``, else
      ``None``.
    task: the solver of one task, if :func:`jaxbo.over_tasks` made this solver; else ``None``.
    num_tasks: the number of tasks, if :func:`jaxbo.over_tasks` made this solver; else ``None``.
  """

  init: Callable[..., InnerSolution]
  solve: Callable[[optax.Params, InnerSolution, Data], InnerSolution]
  run: Callable[[optax.Params, Start, Data], tuple[Start, jax.Array]]
  path: Path
  loss: Callable[[optax.Params, optax.Params, Data], jax.Array]
  num_steps: int
  per_step_batches: bool
  through: FeatureProblem | None
  task: "InnerSolver | None" = None
  num_tasks: int | None = None


def inner_solver(
  inner_loss: Loss,
  optimizer: optax.GradientTransformation,
  num_steps: int,
  *,
  per_step_batches: bool = False,
  has_aux: bool = False,
  warm_start: bool = True,
  remat: bool | int = False,
  through: Callable[[PyTree, Data], PyTree] | None = None,
) -> InnerSolver:
  r"""Builds a solver of the inner problem from a loss and any optax optimizer.

  .. math:: y^{n+1} = y^n + \mathrm{optimizer}(\nabla_y g(x, y^n, \xi_n)), \qquad n = 0, \dots, N-1

  The whole run is one ``lax.scan``. The solution holds the optimizer's state. Optimizers that need
  the loss (``optax.lbfgs``, line searches) get ``value``, ``grad`` and ``value_fn``.

  Args:
    inner_loss: :math:`g`, ``inner_loss(x, y, batch) -> scalar``, where ``x`` and ``y`` are
      pytrees of floats. Include any regularization.
    optimizer: any optax optimizer for ``y``. To differentiate the run (ITD), its update must be
      differentiable: for Adam set ``eps_root > 0``, because the derivative of its square root is
      infinite at a gradient of exactly zero.
    num_steps: the number :math:`N \ge 1` of steps.
    per_step_batches: ``False``: every step sees the whole ``batch``. ``True``: every leaf of
      ``batch`` has a leading axis ``num_steps`` and step ``n`` sees slice ``n``. All runs of one
      update (base, perturbed, unrolled) see the same slices.
    has_aux: whether the loss returns ``(scalar, aux)``.
    warm_start: ``True``: a solve continues from the last solution and its optimizer state.
      ``False``: every solve begins at ``y0``.
    remat: what ``path`` stores for reverse-mode differentiation. ``False``: every
      step, memory :math:`O(N)`. ``True``: the start of each of about :math:`\sqrt N` segments; the
      backward pass runs the segments again, so memory is :math:`O(\sqrt N)` for one more forward
      run. An int sets the length of a segment.
    through: ``features(x, batch) -> z``, for an inner loss that sees ``x`` only through ``z`` (a
      backbone under a head). The loss is then ``inner_loss(z, y, batch)``. Each solve computes
      ``z`` once, and zeroth-order responses perturb ``z`` instead of ``x``. With per-step batches,
      one ``vmap`` computes the features of all steps.

  Returns:
    An :class:`InnerSolver`.

  Raises:
    ValueError: if ``num_steps`` or ``remat`` is below 1; if the leading axis of a per-step batch is
      not ``num_steps``; if the loss is not a scalar.
    TypeError: if ``inner_loss`` or ``through`` does not take its arguments; if a parameter is not
      a float.

  Example:
    >>> import jax.numpy as jnp, jaxbo, optax
    >>> def inner_loss(x, y, batch):
    ...   return 0.5 * jnp.sum((y - x * batch) ** 2)
    >>> inner = jaxbo.inner_solver(inner_loss, optax.sgd(0.5), num_steps=20)
    >>> y = inner.init(jnp.zeros(2))
    >>> y = inner.solve(jnp.float32(3.0), y, jnp.array([1.0, 2.0]))
    >>> bool(jnp.allclose(y.params, jnp.array([3.0, 6.0])))
    True
    >>> y.info.losses.shape
    (20,)
  """
  num_steps = _check.positive_int("num_steps", num_steps)
  if not isinstance(remat, bool):
    remat = _check.positive_int("remat", remat)
  _check.takes_arguments("inner_loss", inner_loss, "x" if through is None else "z", "y", "batch")
  if through is not None:
    _check.takes_arguments("through", through, "x", "batch")
  _check.transformation("optimizer", optimizer)
  optimizer = optax.with_extra_args_support(optimizer)

  def loss_and_aux(z, y, batch):
    value: PyTree = inner_loss(z, y, batch)
    aux = None
    if has_aux:
      if not isinstance(value, tuple) or len(value) != 2:
        raise TypeError(f"inner_loss must return (scalar, aux) with has_aux=True, got {value!r}")
      value, aux = value
      aux = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), aux)
    _check.scalar_loss("inner_loss", value)
    return value, aux

  def step(z, carry, batch):
    y, opt_state = carry
    if through is not None:
      _check.uses("the output of through", lambda z: loss_and_aux(z, y, batch)[0], z)
    (value, aux), grads = jax.value_and_grad(loss_and_aux, argnums=1, has_aux=True)(z, y, batch)
    value_fn = lambda y: loss_and_aux(z, y, batch)[0]
    updates, opt_state = optimizer.update(
      grads, opt_state, y, value=value, grad=grads, value_fn=value_fn
    )
    return (optax.apply_updates(y, updates), opt_state), (value, aux)

  def steps(z, carry, batch, scan, begin=0, end=num_steps):
    """Runs steps ``begin`` to ``end``, scanning over per-step batches and their features."""
    if per_step_batches:
      check_per_step(batch, num_steps)
    slices = (z if through is not None else None, batch) if per_step_batches else (None, None)

    def body(carry, slices):
      step_z, step_batch = slices
      return step(
        z if step_z is None else step_z, carry, batch if step_batch is None else step_batch
      )

    return scan(body, carry, jax.tree.map(lambda leaf: leaf[begin:end], slices), end - begin)

  def path_from_features(z, start, batch, *, last=None):
    if last is not None and _check.positive_int("last", last) > num_steps:
      raise ValueError(f"last must be at most num_steps={num_steps}, got {last}")
    scan = functools.partial(_final_carry, remat=remat)
    begin = 0 if last is None else num_steps - last
    carry = start
    if begin:
      carry = steps(jax.lax.stop_gradient(z), carry, batch, scan, 0, begin)
    return steps(z, carry, batch, scan, begin)[0]

  def features(x, batch):
    if through is None:
      return x
    if not per_step_batches:
      return through(x, batch)
    check_per_step(batch, num_steps)
    return jax.vmap(through, in_axes=(None, 0))(x, batch)

  def solve_from(x, start, batch):
    end, told = steps(features(x, batch), start, batch, jax.lax.scan)
    finite = _tree.all_finite(end)
    return _tree.where(finite, end, start), finite, told

  def run(x, start, batch):
    return solve_from(x, start, batch)[:2]

  def init(y0, x=None, batch=None):
    _check.floating("y0", y0)
    y0 = _tree.copy(y0)
    start = (y0, _tree.copy(optimizer.init(y0)))
    aux = None
    if has_aux:
      if x is None:
        raise ValueError("init must be given x and batch with has_aux=True: init(y0, x, batch)")
      _, _, (_, aux) = jax.eval_shape(solve_from, x, start, batch)
      aux = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), aux)
    info = InnerInfo(jnp.zeros(num_steps, _loss_dtype(y0)), jnp.bool_(True), aux)
    return InnerSolution(*start, _tree.copy(start), info)

  def solve(x, solution, batch):
    _check.floating("x", x)
    if not isinstance(solution, InnerSolution):
      got = type(solution).__name__
      raise TypeError(f"solution must be an InnerSolution, say from init(y0), got {got}")
    start = (solution.params, solution.opt_state) if warm_start else solution.start
    (y, opt_state), finite, (losses, aux) = solve_from(x, start, batch)
    return InnerSolution(y, opt_state, start, InnerInfo(losses.astype(_loss_dtype(y)), finite, aux))

  def path(x, start, batch, *, last=None):
    return path_from_features(features(x, batch), start, batch, last=last)

  def one_step_loss(x, y, batch):
    return loss_and_aux(x if through is None else through(x, batch), y, batch)[0]

  factors = None if through is None else FeatureProblem(features, path_from_features)
  return InnerSolver(init, solve, run, path, one_step_loss, num_steps, per_step_batches, factors)


def _final_carry(body, carry, slices, length: int, *, remat: bool | int):
  """``lax.scan`` without outputs; with ``remat``, it stores only the start of each segment."""

  def steps(length, carry, slices):
    return jax.lax.scan(lambda c, s: (body(c, s)[0], None), carry, slices, length=length)[0]

  def segments(count, length, carry, slices):
    segment = jax.checkpoint(functools.partial(steps, length), prevent_cse=False)
    slices = jax.tree.map(lambda leaf: leaf.reshape(count, length, *leaf.shape[1:]), slices)
    return jax.lax.scan(lambda c, s: (segment(c, s), None), carry, slices, length=count)[0]

  if not remat:
    return steps(length, carry, slices)
  segment = min(length, math.isqrt(length) if remat is True else remat)
  count, rest = divmod(length, segment)
  carry = segments(count, segment, carry, jax.tree.map(lambda leaf: leaf[: length - rest], slices))
  if rest:
    carry = segments(1, rest, carry, jax.tree.map(lambda leaf: leaf[length - rest :], slices))
  return carry


def check_per_step(batch: Data, num_steps: int) -> None:
  """Raises ``ValueError`` unless every leaf of ``batch`` has the leading axis ``num_steps``."""
  leaves = jax.tree.leaves(batch)
  if not leaves:
    raise ValueError(f"batch must have leaves [num_steps={num_steps}, ...] with per_step_batches")
  for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
    shape = jnp.shape(leaf)
    if not shape or shape[0] != num_steps:
      raise ValueError(
        f"batch{jax.tree_util.keystr(path)} must have the leading axis num_steps={num_steps} with "
        f"per_step_batches, got shape {shape}"
      )


def _loss_dtype(params: optax.Params) -> jnp.dtype:
  return jnp.result_type(jnp.float32, *jax.tree.leaves(params))
