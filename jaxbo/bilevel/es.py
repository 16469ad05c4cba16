"""ESJ (PZOBO): the response Jacobian by evolution strategies."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check, _random, _schedule, _tree
from jaxbo._types import Key
from jaxbo.bilevel.directions import FAMILIES
from jaxbo.bilevel.perturbation import Run, Sampling, estimate, start_for, where_finite
from jaxbo.bilevel.perturbed_leaves import Perturb, chosen_leaves, directions_for, part_of
from jaxbo.bilevel.response import (
  check_differentiable,
  check_run,
  check_solver,
  response_transformation,
  zero_norm,
)
from jaxbo.bilevel.solution import InnerSolver


class EsInfo(NamedTuple):
  """Diagnostics of :func:`~jaxbo.add_es_response`.

  Attributes:
    hypergradient_norm: norm of the hypergradient, float32 at least.
    response_norm: norm of the estimated response alone.
    num_finite: number of samples with a finite inner run, which are the samples averaged, int32;
      with ``per_task``, summed over tasks.
  """

  hypergradient_norm: jax.Array
  response_norm: jax.Array
  num_finite: jax.Array


class EsResponseState(NamedTuple):
  """State of :func:`~jaxbo.add_es_response`.

  Attributes:
    es_key: the constant base key, as raw key data.
    es_count: the number of updates so far, int32; each update folds it into the key.
    info: the :class:`EsInfo` of the last update.
  """

  es_key: jax.Array
  es_count: jax.Array
  info: EsInfo


def add_es_response(
  inner: InnerSolver,
  num_samples: int = 16,
  smoothing: float | jax.Array = 1e-2,
  *,
  directions: str = "gaussian",
  difference: str = "forward",
  sample_batch_size: int | None = None,
  redraw: bool = True,
  perturb: Perturb = True,
  perturb_features: bool = True,
  per_task: bool = False,
  response_scale: float | jax.Array = 1.0,
  mesh: jax.sharding.Mesh | None = None,
  axis_name: str | None = None,
  key: Key = 0,
) -> optax.GradientTransformationExtraArgs:
  r"""Adds the response, with its Jacobian estimated from perturbed inner runs (ESJ, PZOBO).

  .. math::
    h = \nabla_x f + \frac{1}{Q} \sum_{j=1}^{Q} \langle \delta_j, \nabla_y f \rangle\, u_j, \qquad
    \delta_j = \frac{y^N(x + \mu u_j) - y^N(x)}{\mu}, \qquad \mathbb E[u_j u_j^\top] = I_p

  Only the Jacobian is estimated; :math:`\nabla_x f` and :math:`\nabla_y f` are exact. Every run
  starts at ``solution.start`` and shares everything except ``x``: optimizer state, minibatches and
  randomness in the batch. Only ``difference="exact"`` takes second derivatives.

  If :math:`y^N` is affine in :math:`x`, the mean of the estimate is the unrolled hypergradient at
  every smoothing. Otherwise, for an :math:`L_J`-Lipschitz Jacobian, its bias is at most
  :math:`\mu L_J \sqrt p \|\nabla_y f\|` with Gaussian directions or the sphere (Stein's identity),
  and :math:`\frac12 \mu L_J p \|\nabla_y f\|` with the other directions of norm :math:`\sqrt p`.
  The squared relative error is about :math:`p / Q` for :math:`p` outer parameters. If :math:`p` is
  large, use a small learning rate, momentum, or a solver with ``through=``: :math:`p` is then the
  number of features.

  Directions are scaled as in the paper, not as in its code: see Departures from the papers.

  Cost: :math:`Q` inner runs, :math:`2Q` for central differences. Memory: ``sample_batch_size``
  inner runs and directions, independent of :math:`Q`, because no direction is stored.

  Args:
    inner: the inner solver that made the solution.
    num_samples: the number :math:`Q \ge 1` of directions.
    smoothing: the radius :math:`\mu > 0` per coordinate; a perturbation has norm
      :math:`\mu \sqrt p`. In float32 with well-scaled inner SGD, use about 1e-3 for forward
      differences and 1e-2 for central differences; below 1e-4 rounding dominates. An inner Adam
      needs a far smaller value, because its steps hardly depend on the size of a gradient.
    directions: the family of directions. Their squared relative errors, for affine runs, are:
      ``"gaussian"`` :math:`(p + 1) / Q`; ``"sphere"`` (radius :math:`\sqrt p`) and
      ``"rademacher"`` (random signs, the cheapest to draw) :math:`(p - 1) / Q`; ``"orthogonal"``
      :math:`p / Q - 1` for :math:`Q \le p`, exact at :math:`Q = p` and cheap at any size (our
      choice: see Departures from the papers). ``"official"`` is the scaling of the published code,
      for replication only: it shrinks the response of each tensor by the size of the tensor.
    difference: ``"forward"`` is the formula above. ``"central"`` is
      :math:`\delta_j = (y^N(x + \mu u_j) - y^N(x - \mu u_j)) / 2 \mu` (antithetic pairs): two runs
      for each sample, and a bias of :math:`O(\mu^2)`. ``"exact"`` is the directional derivative
      :math:`\delta_j = J_N u_j` by ``jax.jvp`` through the run: no bias and no smoothing, but
      second derivatives in forward mode.
    sample_batch_size: how many samples run at once under ``vmap``; ``None`` for all. It changes
      the estimate only by rounding.
    redraw: whether to draw directions again for the sum. ``False`` keeps them during the inner runs
      of their chunk: half the random numbers, but up to one more direction of memory for each
      sample that runs at once. With :math:`10^7` parameters, drawing may cost more than the runs.
    perturb: which leaves of ``x`` to perturb: Python bools in the structure of ``x`` or of its
      upper levels, ``{"ridge": True, "backbone": False}``, or a function ``x -> bools``. Other
      leaves get a response of zero, and :math:`p` counts only the perturbed leaves, so frozen
      leaves add no noise. With ``through=``, the features that depend on the chosen leaves are
      perturbed.
    perturb_features: for a solver with ``through=``. ``True`` perturbs the features and pulls the
      response back to ``x`` once; ``False`` perturbs ``x`` itself, as if there were no features.
    per_task: for a solver made by :func:`jaxbo.over_tasks`: whether each task gets its own
      directions and scalar products, for the same number of inner runs. For responses :math:`v_t`
      the squared error is then :math:`\frac{p + 1}{Q} \sum_t \|v_t\|^2` instead of
      :math:`\frac{p + 1}{Q} \|\sum_t v_t\|^2`: better where tasks agree, worse where they cancel.
      It draws :math:`T` times as many directions. With ``through=`` it always pays, because
      :math:`p` is then the number of features of one task.
    response_scale: a factor :math:`s > 0` on the estimated response; 1 is unbiased. With the
      squared relative error :math:`c` of the family, :math:`s = 1 / (1 + c)` (orthogonal:
      :math:`Q / p`) has the least mean squared error, :math:`c / (1 + c)` of the squared response:
      never worse than dropping the response, but biased towards zero.
    mesh: a mesh that divides the samples over its axis ``axis_name``, whose size must divide
      ``num_samples``. Devices exchange only the :math:`Q` scalar products (per task, with
      ``per_task``); each draws all directions for the sum. Parameters and data may be sharded over
      other axes.
    axis_name: the axis of ``mesh``; without ``mesh``, an axis of the ``shard_map`` or ``pmap``
      around ``update``. Needs ``redraw=True``.
    key: an int, a raw key array or a typed key. Update ``t`` uses ``fold_in(key, t)``; sample
      ``j`` then folds in ``j``, and each leaf gets its own key. With ``per_task``, task ``i`` folds
      in ``i`` before the sample.

  Returns:
    A transformation from the pair ``(df/dx, df/dy)`` to the hypergradient. ``update`` must be
    given ``solution=`` and ``batch=``, the batch that ``inner.solve`` saw. The average leaves out
    samples whose inner run is not finite, and ``info.num_finite`` counts the others. If the run
    that led to the solution was not finite, the response is zero (with tasks: the part of that
    task).

  Note:
    With ``optax.inject_hyperparams``, put every argument except ``smoothing`` and
    ``response_scale`` in ``static_args``.
    Parameters narrower than float32 are run in float32, which costs one more inner run.

  Raises:
    ValueError: if ``num_samples < 1``, ``sample_batch_size < 1``, ``smoothing <= 0`` or
      ``response_scale <= 0``; if ``directions`` or ``difference`` is unknown; if ``num_samples``
      exceeds the number of perturbed parameters for orthogonal directions, or is not a multiple of
      the size of the axis; if ``axis_name`` is not such an axis, or comes with ``redraw=False``;
      if an argument of ``update`` varies over that axis (with the replication check of
      ``shard_map`` on);
      if ``per_task`` is set for a solver without tasks; if ``perturb`` has another structure than
      ``x``; if the inner run does not depend on ``x``, or on the leaves that ``perturb`` chooses;
      if ``difference="exact"`` meets a black box, or L-BFGS or a line search in the optimizer.
    TypeError: if ``key`` is not a key, ``inner`` is not an inner solver, or ``mesh`` is not a mesh.

  Example:
    >>> import jax, jax.numpy as jnp, jaxbo, optax
    >>> inner = jaxbo.inner_solver(lambda x, y, batch: (y - 3 * x) ** 2, optax.sgd(0.25), 30)
    >>> tx = jaxbo.add_es_response(inner, num_samples=2000, smoothing=1e-2)
    >>> x = jnp.float32(1.0)
    >>> y = inner.solve(x, inner.init(jnp.float32(0.0)), None)      # y = 3 x
    >>> grads = jaxbo.outer_grad(lambda x, y: y)(x, y.params)       # f = y
    >>> hypergradient, _ = tx.update(grads, tx.init(x), x, solution=y, batch=None)
    >>> abs(float(hypergradient) - 3.0) < 4 * 3.0 * (2 / 2000) ** 0.5   # (p + 1) / Q
    True

  References:
    Sow, Ji and Liang, `On the Convergence Theory for Hessian-Free Bilevel Algorithms
    <https://arxiv.org/abs/2110.07004>`_, 2022.
  """
  exact = difference == "exact"
  check_solver(inner, "add_es_response with difference='exact'" if exact else "")
  num_samples = _check.positive_int("num_samples", num_samples)
  if sample_batch_size is not None:
    sample_batch_size = _check.positive_int("sample_batch_size", sample_batch_size)
  _check.positive("smoothing", smoothing)
  _check.positive("response_scale", response_scale)
  _check.one_of("directions", directions, FAMILIES)
  _check.one_of("difference", difference, ("forward", "central", "exact"))
  task = inner.task if per_task else None
  if per_task and task is None:
    raise ValueError("per_task=True needs a solver with tasks, made by jaxbo.over_tasks")
  if mesh is not None:
    if not isinstance(mesh, (jax.sharding.Mesh, jax.sharding.AbstractMesh)):
      raise TypeError(f"mesh must be a jax.sharding.Mesh, got {mesh!r}")
    _check.one_of("axis_name", axis_name, mesh.axis_names)
  if axis_name is not None and not redraw:
    raise ValueError("redraw must be True with axis_name: devices do not exchange directions")
  impl = _random.key_impl("key", key)

  sampling = Sampling(
    family=FAMILIES[directions],
    difference=difference,
    num_samples=num_samples,
    smoothing=smoothing,
    chunk=sample_batch_size or num_samples,
    redraw=redraw,
    mesh=mesh,
    axis_name=axis_name,
  )

  def per_task_estimate(sampling, path, run, key, together):
    """The estimates of all tasks: stacked if each has an ``x`` (``together``), else summed."""
    if inner.per_step_batches:
      run = run._replace(batch=jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), run.batch))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(inner.num_tasks))
    if together:
      one = lambda run, key: estimate(sampling, path, run, key)
      response, num_finite = jax.vmap(one)(run, keys)
      return response, jnp.sum(num_finite, dtype=jnp.int32)

    def add_task(carry, run_and_key):
      run_of_task, key = run_and_key
      one = estimate(sampling, path, run_of_task._replace(x=run.x), key)
      return optax.tree.add(carry, one), None

    first = optax.tree.zeros_like(run.x), jnp.int32(0)
    return jax.lax.scan(add_task, first, (run._replace(x=None), keys))[0]

  def init(params):
    info = EsInfo(zero_norm(params), zero_norm(params), jnp.int32(0))
    return EsResponseState(_random.key_data(key), jnp.int32(0), info)

  def respond(params, solution, inner_grad, batch, state, **extra_args):
    del extra_args
    if axis_name is not None and mesh is None:
      _check.manual_axis("axis_name", axis_name)
      given = {"params": params, "solution": solution, "batch": batch, "df/dy": inner_grad}
      for name, tree in given.items():
        _check.not_varying(name, tree, axis_name)
    x, y, b = _tree.at_least_float32((params, solution.params, inner_grad))
    if exact:
      check_differentiable("add_es_response with difference='exact'", solution.opt_state)
    wide = solution._replace(params=y)
    check_run("add_es_response", inner, x, wide, batch, by_derivative=exact)
    start = start_for(inner, solution.start, x, batch)
    chosen = chosen_leaves(perturb, params)
    part, merge = part_of(x, chosen)
    run_of_part = lambda part: inner.path(merge(part), start, batch)
    if not (all(chosen) or _check.depends(run_of_part, part)):
      raise ValueError("perturb must choose a leaf of x on which the inner run depends")
    path, pull_back = inner.path, lambda response: response
    low_precision = _tree.has_low_precision((params, solution.params))
    through = inner.through if perturb_features else None
    if through is not None:
      path = through.path
      of_part = lambda part: through.features(merge(part), batch)
      features, vjp = jax.vjp(of_part, part)
      try:
        _check.floating("the output of through", features)
      except TypeError as error:
        raise TypeError(f"{error}; ES perturbs it: keys and integers belong in batch") from None
      low_precision |= _tree.has_low_precision(features)
      _, with_zeros = part_of(optax.tree.zeros_like(x), chosen)
      pull_back = lambda response: with_zeros(vjp(_tree.cast_like(response, features))[0])
      if not all(chosen):
        chosen = _check.depends_by_leaf(of_part, part)
      x = _tree.at_least_float32(features)
    if low_precision:  # The base run must be as precise as the perturbed ones.
      y = path(x, start, batch)
    # A difference to a base run that is not finite means nothing.
    base_finite = solution.info.finite
    b = jax.tree.map(lambda leaf: where_finite(base_finite, leaf), b)
    run = Run(x, start, batch, y, b)
    of_chosen = sampling._replace(family=directions_for(sampling.family, chosen))

    update_key = jax.random.fold_in(
      jax.random.wrap_key_data(state.es_key, impl=impl), state.es_count
    )
    if task is not None:
      path = task.through.path if through is not None and task.through else task.path
      together = through is not None
      response, num_finite = per_task_estimate(of_chosen, path, run, update_key, together)
    else:
      if inner.task is not None:
        run = run._replace(counts=base_finite)
      response, num_finite = estimate(of_chosen, path, run, update_key)

    def new_state(hypergradient_norm, response_norm, finite):
      good = jnp.where(finite & jnp.any(base_finite), num_finite, 0)
      count = _schedule.after(state.es_count)
      info = EsInfo(hypergradient_norm, response_norm, good)
      return EsResponseState(state.es_key, count, info)

    return pull_back(optax.tree.scale(response_scale, response)), new_state

  return response_transformation("add_es_response", init, respond)
