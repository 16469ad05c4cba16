"""ESJ (PZOBO): the response Jacobian by evolution strategies."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check, _random, _tree
from jaxbo.bilevel.inner import InnerSolver
from jaxbo.bilevel.response import MISSING, add, check_update, zero_norm


class EsInfo(NamedTuple):
  """Diagnostics of :func:`add_es_response`.

  Attributes:
    hypergradient_norm: norm of what came out, float32 at least.
    response_norm: norm of the estimated response alone.
    num_finite: how many samples had a finite inner run and count in the average, int32.
  """

  hypergradient_norm: jax.Array
  response_norm: jax.Array
  num_finite: jax.Array


class EsResponseState(NamedTuple):
  """State of :func:`add_es_response`.

  Attributes:
    es_key: the constant base key, as raw key data.
    es_count: the number of updates so far, int32; folded into the key.
    info: the :class:`EsInfo` of the last update.
  """

  es_key: jax.Array
  es_count: jax.Array
  info: EsInfo


def add_es_response(
  solver: InnerSolver,
  num_samples: int = 16,
  smoothing: float | jax.Array = 1e-2,
  *,
  sample_batch_size: int | None = None,
  key: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
  r"""Adds the response, its Jacobian estimated from perturbed inner runs (ESJ, PZOBO).

  .. math::
    h = \nabla_x f + \frac{1}{Q} \sum_{j=1}^{Q} \langle \delta_j, \nabla_y f \rangle\, u_j, \qquad
    \delta_j = \frac{y^N(x + \mu u_j) - y^N(x)}{\mu}, \qquad u_j \sim \mathcal N(0, I_p)

  All runs begin at ``solution.start`` and share everything but ``x``: optimizer state, minibatches
  and what randomness the batch holds. Only the Jacobian is estimated; :math:`\nabla_x f` and
  :math:`\nabla_y f` are exact, and nothing is differentiated twice. If :math:`y^N` is affine in
  :math:`x` the mean of the estimate is exactly the unrolled hypergradient at every smoothing;
  else its bias is at most :math:`\mu L_J \sqrt p \|\nabla_y f\|` for an :math:`L_J`-Lipschitz
  Jacobian. Its relative variance is :math:`(p + 1) / Q` around the response: with many outer
  parameters, use a small learning rate or momentum, or the solver's ``through=``, for which
  directions live in the space of the features and :math:`p` is their number.

  The published code divides each direction by its norm without multiplying by the dimension, which
  shrinks the response of every tensor by its size; this is the estimator of the paper instead.

  Cost: :math:`Q` inner runs. Memory: ``sample_batch_size`` inner runs and directions. Directions
  are drawn twice from their keys (first for the scalar products, then for the sum) and not kept.

  Args:
    solver: the inner solver that made the solution.
    num_samples: the number :math:`Q \ge 1` of directions.
    smoothing: the radius :math:`\mu > 0` per coordinate; a perturbation has norm
      :math:`\mu \sqrt p`. In float32, 1e-3 is about the best for an inner run of well-scaled
      SGD; below 1e-4 rounding dominates. An inner Adam needs far smaller ones, since its steps
      hardly depend on the size of a gradient.
    sample_batch_size: how many samples run at once under ``vmap``; ``None`` for all. The sum of
      samples is the same up to rounding.
    key: an int, a raw key array or a typed key. Update ``t`` uses ``fold_in(key, t)``, its sample
      ``j`` folds in ``j``, and every leaf gets a key of its own.

  Returns:
    A transformation from the pair ``(df/dx, df/dy)`` to the hypergradient. ``update`` must be
    given ``solution=`` and ``batch=``, the batch that ``solver.solve`` saw. A sample whose inner
    run is not finite is left out of the average and missing in ``info.num_finite``.

  Note:
    With ``optax.inject_hyperparams``, everything but ``smoothing`` belongs in ``static_args``.
    Parameters narrower than float32 are perturbed and run in float32, for one inner run more.

  Raises:
    ValueError: if ``num_samples < 1``, ``sample_batch_size < 1`` or ``smoothing <= 0``.
    TypeError: if the key is none.

  Example:
    >>> import jax, jax.numpy as jnp, jaxbo, optax
    >>> inner = jaxbo.inner_solver(lambda x, y, batch: (y - 3 * x) ** 2, optax.sgd(0.25), 30)
    >>> tx = jaxbo.add_es_response(inner, num_samples=2000, smoothing=1e-2)
    >>> x = jnp.float32(1.0)
    >>> y = inner.solve(x, inner.init(jnp.float32(0.0)), None)      # y = 3 x
    >>> grads = jax.grad(lambda x, y: y, (0, 1))(x, y.params)       # f = y
    >>> hypergradient, _ = tx.update(grads, tx.init(x), x, solution=y, batch=None)
    >>> abs(float(hypergradient) - 3.0) < 4 * 3.0 * (2 / 2000) ** 0.5   # (p + 1) / Q
    True

  References:
    Sow, Ji and Liang, `On the Convergence Theory for Hessian-Free Bilevel Algorithms
    <https://arxiv.org/abs/2110.07004>`_, 2022.
  """
  num_samples = _check.positive_int("num_samples", num_samples)
  if sample_batch_size is not None:
    sample_batch_size = min(
      _check.positive_int("sample_batch_size", sample_batch_size), num_samples
    )
  _check.positive("smoothing", smoothing)
  impl = _random.key_impl("key", key)
  chunk = sample_batch_size or num_samples

  def draw(key, sample, x):
    return optax.tree.random_like(jax.random.fold_in(key, sample), x)

  def scalar_products(path, x, y, b, key):
    """``<y(x + mu u_j) - y(x), b> / mu`` for every sample, ``[num_samples]``."""

    def product(sample):
      perturbed = path(_tree.add_scaled(x, smoothing, draw(key, sample, x)))
      return _tree.vdot(optax.tree.sub(perturbed, y), b) / smoothing

    return jax.lax.map(product, jnp.arange(num_samples), batch_size=chunk)

  def weighted_sum(weights, x, key):
    """``sum_j weights_j u_j``, the directions drawn again, ``chunk`` at a time."""
    padded = -(-num_samples // chunk) * chunk
    weights = jnp.pad(weights, (0, padded - num_samples)).reshape(-1, chunk)
    samples = jnp.arange(padded).reshape(-1, chunk)

    def add_chunk(total, chunk):
      weights, samples = chunk
      directions = jax.vmap(draw, in_axes=(None, 0, None))(key, samples, x)
      chunk_sum = jax.tree.map(
        lambda u: jnp.einsum("j,j...", weights, u, precision="highest"), directions
      )
      return optax.tree.add(total, chunk_sum), None

    return jax.lax.scan(add_chunk, optax.tree.zeros_like(x), (weights, samples))[0]

  def init(params):
    info = EsInfo(zero_norm(params), zero_norm(params), jnp.int32(0))
    return EsResponseState(_random.key_data(key), jnp.int32(0), info)

  def update(
    updates, state, params=None, *, solution: Any = MISSING, batch: Any = MISSING, **extra_args
  ):
    del extra_args
    outer_grad, inner_grad = check_update("add_es_response", updates, params, solution, batch)
    x, start, y, b = _tree.at_least_float32((params, solution.start, solution.params, inner_grad))
    path, pull_back = solver.path, lambda response: response
    low_precision = _tree.has_low_precision((params, solution.params))
    through = solver.through
    if through is not None:
      path = through.path
      features, vjp = jax.vjp(lambda x: through.features(x, batch), x)
      _check.floating("the output of through", features)
      low_precision |= _tree.has_low_precision(features)
      x = _tree.at_least_float32(features)
      pull_back = lambda response: vjp(_tree.cast_like(response, features))[0]
    run = lambda x: path(x, start, batch)
    if low_precision:  # The base run must be as precise as the perturbed ones.
      y = run(x)

    sample_key = jax.random.fold_in(
      jax.random.wrap_key_data(state.es_key, impl=impl), state.es_count
    )
    products = scalar_products(run, x, y, b, sample_key)
    finite = jnp.isfinite(products)
    num_finite = jnp.sum(finite, dtype=jnp.int32)
    weights = jnp.where(finite, products, 0) / jnp.maximum(num_finite, 1)
    response = pull_back(weighted_sum(weights, x, sample_key))
    hypergradient = add(outer_grad, response)
    info = EsInfo(_tree.norm(hypergradient), _tree.norm(response), num_finite)
    count = jnp.asarray(optax.safe_increment(state.es_count))
    return hypergradient, EsResponseState(state.es_key, count, info)

  return optax.GradientTransformationExtraArgs(init, update)


def esj(
  learning_rate: optax.ScalarOrSchedule,
  solver: InnerSolver,
  num_samples: int = 16,
  smoothing: float | jax.Array = 1e-2,
  *,
  sample_batch_size: int | None = None,
  key: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
  """ESJ (PZOBO): gradient descent along :func:`add_es_response`.

  With a solver whose ``per_step_batches`` is true it is ESJ-S (PZOBO-S).

  Args:
    learning_rate: a float or a schedule.
    solver: the inner solver.
    num_samples: as in :func:`add_es_response`.
    smoothing: as in :func:`add_es_response`.
    sample_batch_size: as in :func:`add_es_response`.
    key: as in :func:`add_es_response`.

  Returns:
    ``optax.chain(add_es_response(...), optax.scale_by_learning_rate(learning_rate))``.

  Example:
    >>> import jax, jax.numpy as jnp, jaxbo, optax
    >>> inner = jaxbo.inner_solver(lambda x, y, batch: (y - 3 * x) ** 2, optax.sgd(0.25), 20)
    >>> outer_loss = lambda x, y, batch: (y - 6.0) ** 2              # minimal at x = 2
    >>> init, step = jaxbo.bilevel(outer_loss, inner, jaxbo.esj(0.01, inner))
    >>> state = init(jnp.float32(1.0), jnp.float32(0.0))
    >>> for _ in range(50):
    ...   state, info = jax.jit(step)(state, None, None)
    >>> print(state.x.round(2))
    2.0
  """
  return optax.chain(
    add_es_response(solver, num_samples, smoothing, sample_batch_size=sample_batch_size, key=key),
    optax.scale_by_learning_rate(learning_rate),
  )
