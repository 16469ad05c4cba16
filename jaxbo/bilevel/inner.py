"""The inner problem: a fixed number of optimizer steps, as a pure function."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check, _tree
from jaxbo._types import Data, Loss, PyTree
from jaxbo.bilevel.scan import final_carry, scan_until
from jaxbo.bilevel.solution import FeatureProblem, InnerInfo, InnerSolution, InnerSolver
from jaxbo.bilevel.steady_step import steady_updates


def inner_solver(
  inner_loss: Loss,
  optimizer: optax.GradientTransformation | Callable[[PyTree], optax.GradientTransformation],
  num_steps: int,
  *,
  tolerance: float | jax.Array | None = None,
  per_step_batches: bool = False,
  has_aux: bool = False,
  keep: Callable[[PyTree, PyTree], PyTree] | None = None,
  warm_start: str | bool | None = None,
  start: Callable[[PyTree], PyTree] | None = None,
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
    optimizer: any optax optimizer for ``y``, or a function of ``x`` that returns one: its learning
      rates, weight decay or momentum are then outer variables, ``lambda x:
      optax.sgd(jnp.exp(x["log_rate"]))``. To differentiate the run (ITD), its update must be
      differentiable: for Adam set ``eps_root > 0``, because the derivative of its square root is
      infinite at a gradient of exactly zero.
    num_steps: the number :math:`N \ge 1` of steps.
    tolerance: stop early, once :math:`\|y^{n+1} - y^n\| \le \text{tolerance}\, \|y^{n+1}\|`. A
      step that changes nothing does not stop the run. ``info.losses`` repeats the last loss for the
      steps that were not taken. Such a run has no reverse mode: ITD refuses it.
    per_step_batches: ``False``: every step sees the whole ``batch``. ``True``: every leaf of
      ``batch`` has a leading axis ``num_steps`` and step ``n`` sees slice ``n``. All runs of one
      update (base, perturbed, unrolled) see the same slices.
    has_aux: whether the loss returns ``(scalar, aux)``.
    keep: ``keep(y, aux) -> y``, called after each step, for values that live across steps, such as
      running batch statistics. They are leaves of ``y`` that the optimizer does not move
      (``optax.partition`` with ``optax.set_to_zero``); the loss returns their new values in
      ``aux``. Needs ``has_aux``. Random numbers need no state: put a key for each step into the
      batch, with ``per_step_batches``.
    warm_start: ``"params"``: a solve starts at the last solution, with a fresh optimizer state.
      ``"all"``: a solve also keeps the optimizer's state, so schedules count over all solves, and
      the curvature that L-BFGS remembers belongs to an earlier ``x``. ``False``: every solve starts
      at ``y0``. ``None``: ``"all"`` if ``num_steps`` is 1, where the solves together are one run
      (a single loop), ``"params"`` otherwise.
    start: ``start(x) -> y``, where every solve starts (MAML: ``start=lambda x: x``); pass
      ``y0=None`` to ``init`` then. Responses that run the problem again differentiate ``start``.
    remat: what ``path`` stores for reverse-mode differentiation. ``False``: every step, memory
      :math:`O(N)`. ``True``: the start of each of about :math:`\sqrt N` segments; the
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
      not ``num_steps``; if the loss is not a scalar; if ``warm_start`` is not one of the values
      above, or is given with ``start``; if ``keep`` is given without ``has_aux``, or ``remat`` with
      ``tolerance``; if ``through`` is given with a ``start`` or an optimizer that depends on ``x``.
    TypeError: if ``inner_loss``, ``through`` or ``start`` does not take its arguments; if
      ``optimizer`` is neither an optimizer nor a function that returns one; if a parameter is not a
      float.

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
  early = None
  if tolerance is not None:
    if remat:
      raise ValueError("remat must be False with tolerance: such a run has no reverse mode")
    early = functools.partial(scan_until, tolerance=_check.non_negative("tolerance", tolerance))
  if not isinstance(remat, bool):
    remat = _check.positive_int("remat", remat)
  _check.takes_arguments("inner_loss", inner_loss, "x" if through is None else "z", "y", "batch")
  if through is not None:
    _check.takes_arguments("through", through, "x", "batch")
  if keep is not None:
    _check.takes_arguments("keep", keep, "y", "aux")
    if not has_aux:
      raise ValueError("has_aux must be True with keep, which reads the auxiliary output")
  if start is not None:
    _check.takes_arguments("start", start, "x")
    if warm_start:
      raise ValueError(f"warm_start must not be given with start, got {warm_start!r}")
  elif warm_start is None:
    warm_start = "all" if num_steps == 1 else "params"
  else:
    _check.one_of("warm_start", warm_start, ("params", "all", False))
  depends_on_x = callable(optimizer)
  if not depends_on_x:
    _check.transformation("optimizer", optimizer)
  elif str(getattr(optimizer, "__module__", "")).startswith("optax"):  # It was not called.
    raise TypeError(
      "optimizer must be an optax transformation, say optax.sgd(0.1), or a function of x, got "
      f"{optimizer!r}"
    )
  else:
    _check.takes_arguments("optimizer", optimizer, "x")
  if through is not None and (depends_on_x or start is not None):
    what = "start" if start is not None else "an optimizer that depends on x"
    raise ValueError(f"through must be None with {what}, which sees x itself")

  def optimizer_for(x):
    tx = optimizer
    if callable(tx):
      tx = tx(x)
      _check.transformation("optimizer(x)", tx)
    return optax.with_extra_args_support(tx)

  def fresh(x, y):
    """The state of the optimizer before the first step."""
    init = lambda x: optimizer_for(x).init(y)
    if depends_on_x and _check.depends(init, x):
      raise ValueError(
        "optimizer must not keep numbers that depend on x in its state, as inject_hyperparams does"
      )
    return init(x)

  def loss_and_aux(z, y, batch):
    value: PyTree = inner_loss(z, y, batch)
    aux = None
    if has_aux:
      if not isinstance(value, tuple) or len(value) != 2:
        raise TypeError(f"inner_loss must return (scalar, aux) with has_aux=True, got {value!r}")
      value, aux = value
      aux = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), aux)
    _check.scalar_loss("inner_loss", value, y)
    return value, aux

  def step(z, carry, batch):
    y, opt_state = carry
    if through is not None:
      _check.uses("the output of through", lambda z: loss_and_aux(z, y, batch)[0], z)
    (value, aux), grads = jax.value_and_grad(loss_and_aux, argnums=1, has_aux=True)(z, y, batch)
    value_fn = lambda y: loss_and_aux(z, y, batch)[0]
    updates, opt_state = optimizer_for(z).update(
      grads, opt_state, y, value=value, grad=grads, value_fn=value_fn
    )
    y = optax.apply_updates(y, updates)
    if keep is not None:
      kept = keep(y, aux)
      _check.same_structure("what keep returns", kept, "y", y)
      y = _tree.cast_like(kept, y)
    return (y, opt_state), (value, aux)

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

  def path_from_features(z, begin_at, batch, *, last=None):
    y, opt_state = begin_at
    found, wanted = map(jax.tree.structure, (opt_state, jax.eval_shape(fresh, z, y)))
    if found != wanted:
      raise ValueError(
        f"solution must come from this inner solver, got another optimizer's state, {found}"
      )
    if last is not None and _check.positive_int("last", last) > num_steps:
      raise ValueError(f"last must be at most num_steps={num_steps}, got {last}")
    scan = functools.partial(final_carry, remat=remat, scan=early or jax.lax.scan)
    begin = 0 if last is None else num_steps - last
    carry = begin_at
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

  def run_steps(x, begin_at, batch):
    end, told = steps(features(x, batch), begin_at, batch, early or jax.lax.scan)
    finite = _tree.all_finite(end)
    return _tree.where(finite, end, begin_at), finite, told

  def run(x, begin_at, batch):
    (y, opt_state), finite, (losses, aux) = run_steps(x, begin_at, batch)
    info = InnerInfo(losses.astype(_loss_dtype(y)), finite, aux)
    return InnerSolution(y, opt_state, begin_at, info)

  def init(y0, x=None, batch=None):
    if x is None and (has_aux or depends_on_x or start is not None):
      raise ValueError(
        "init must be given x and batch, init(y0, x, batch), with has_aux=True, with start, and "
        "with an optimizer that depends on x"
      )
    if start is not None:
      if y0 is not None:
        raise ValueError("y0 must be None with start, which says where a run begins")
      y0 = start(x)
    _check.floating("y0", y0)
    y0 = _tree.copy(y0)
    begin_at = (y0, _tree.copy(fresh(x, y0)))
    aux = None
    if has_aux:
      _, _, (_, aux) = jax.eval_shape(run_steps, x, begin_at, batch)
      aux = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), aux)
    info = InnerInfo(jnp.zeros(num_steps, _loss_dtype(y0)), jnp.bool_(True), aux)
    return InnerSolution(*begin_at, _tree.copy(begin_at), info)

  def solve(x, solution, batch):
    _check.floating("x", x)
    if not isinstance(solution, InnerSolution):
      got = type(solution).__name__
      raise TypeError(f"solution must be an InnerSolution, say from init(y0), got {got}")
    if start is not None:
      y = start(x)
      return run(x, (y, fresh(x, y)), batch)
    if warm_start == "params":
      return run(x, (solution.params, fresh(x, solution.params)), batch)
    begin_at = (solution.params, solution.opt_state) if warm_start else solution.start
    return run(x, begin_at, batch)

  def path(x, begin_at, batch, *, last=None):
    if start is not None:
      y = _tree.cast_like(start(x if last is None else jax.lax.stop_gradient(x)), begin_at[0])
      begin_at = (y, _tree.cast_like(fresh(x, y), begin_at[1]))
    return path_from_features(features(x, batch), begin_at, batch, last=last)

  def one_step_loss(x, y, batch):
    return loss_and_aux(x if through is None else through(x, batch), y, batch)[0]

  def descend(x, y, grads, batch, *, opt_state=None, with_loss=True):
    value_fn = lambda y: one_step_loss(x, y, batch) if with_loss else jnp.zeros((), _loss_dtype(y))
    given = {"value": value_fn(y), "grad": grads, "value_fn": value_fn}
    tx = optimizer_for(x)
    if opt_state is None:
      return steady_updates(tx, fresh(x, y), grads, y, num_steps, given)
    return tx.update(grads, opt_state, y, **given)[0]

  def after(x, y, updates, batch):
    """What a step changes in all, with ``keep``."""
    z = x if through is None else through(x, batch)
    moved = optax.apply_updates(y, updates)
    kept = moved if keep is None else keep(moved, loss_and_aux(z, y, batch)[1])
    return optax.tree.sub(_tree.cast_like(kept, y), y)

  return InnerSolver(
    init=init,
    solve=solve,
    run=run,
    path=path,
    loss=one_step_loss,
    descend=descend,
    num_steps=num_steps,
    per_step_batches=per_step_batches,
    stops_early=tolerance is not None,
    after=None if keep is None else after,
    start=start,
    through=None if through is None else FeatureProblem(features, path_from_features),
  )


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
