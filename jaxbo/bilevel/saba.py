"""SABA: a single loop on a finite sum, with a table of what each batch gave last."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check, _schedule, _tree
from jaxbo._optimizer import LearningRate
from jaxbo._types import Loss, PyTree
from jaxbo.bilevel.loop import checked_loss
from jaxbo.bilevel.parameters import Bilevel, check_params, scalar_dtype
from jaxbo.bilevel.projection import Projection, descend
from jaxbo.bilevel.response import MISSING
from jaxbo.bilevel.single_loop import InnerTerms, inner_terms
from jaxbo.bilevel.value_function import check_update


class AveragedResponseInfo(NamedTuple):
  """Diagnostics of :func:`~jaxbo.add_averaged_response`.

  Attributes:
    averaged_norm: norm of the output for both levels, float32 at least.
    finite: whether every result was finite and both indices were in range. If not, the update does
      not count: the output is zero and the rest of the state stays unchanged.
  """

  averaged_norm: jax.Array
  finite: jax.Array


class AverageTable(NamedTuple):
  """What each batch of a finite sum gave last, and the mean.

  Attributes:
    rows: a pytree of numbers for each batch, leaves ``[num_batches, ...]``; zero for a batch that
      was not seen.
    means: the mean over the rows.
  """

  rows: PyTree
  means: PyTree


class AveragedResponseState(NamedTuple):
  r"""State of :func:`~jaxbo.add_averaged_response`; all floats are float32 at least.

  Attributes:
    averaged_linear: the iterate :math:`v` of the linear system, shaped like the inner parameters.
    inner_table: the :class:`AverageTable` of the inner batches, of
      :class:`~jaxbo.bilevel.InnerTerms`.
    outer_table: the :class:`AverageTable` of the outer batches, of gradients in
      :class:`~jaxbo.Bilevel`.
    averaged_count: the number of updates that counted, int32.
    info: the :class:`AveragedResponseInfo` of the last update.
  """

  averaged_linear: optax.Params
  inner_table: AverageTable
  outer_table: AverageTable
  averaged_count: jax.Array
  info: AveragedResponseInfo


def add_averaged_response(
  inner_loss: Loss,
  *,
  linear_learning_rate: optax.ScalarOrSchedule,
  num_batches: int,
  num_outer_batches: int,
) -> optax.GradientTransformationExtraArgs:
  r"""Adds the response on a finite sum, by one step for the linear system and SAGA's averages.

  .. math::
    g = \frac1n \sum_{i=1}^n g_i, \qquad f = \frac1m \sum_{j=1}^m f_j

  .. math::
    d^y = S_i[\nabla_y g], \qquad
    d^v = S_i[\nabla^2_{yy} g\, v] - S_j[\nabla_y f], \qquad
    d^x = S_j[\nabla_x f] - S_i[\nabla^2_{xy} g\, v], \qquad v_{t+1} = v_t - \eta\, d^v

  .. math::
    S_i[\phi] = \phi_i(x_t, y_t, v_t) - T_i + \frac1n \sum_k T_k, \qquad
    \text{then } T_i \leftarrow \phi_i(x_t, y_t, v_t)

  The table :math:`T` holds what each batch gave when it was seen last, for each of the five terms.
  So the directions are unbiased and their noise goes to zero as the iterates come to rest: constant
  rates reach the solution itself, where those of :func:`jaxbo.soba` stay in a ball of noise around
  it.

  A row of the table belongs to one *batch*: :math:`g_i` is the inner loss of the :math:`i`-th of
  ``num_batches`` fixed batches, of one sample or of many, and these stay together.
  :func:`jaxbo.tasks.finite_sum_stream` divides data into such batches and draws them; its rounds
  carry the indices, and :func:`jaxbo.online_loop` hands them over. Batches of unequal sizes need a
  weight in the loss, so that the mean over the batches is the loss of all samples.

  Cost: one gradient of the inner loss, one product with its Jacobian (which gives both products),
  and the caller's gradient of the outer loss, as many as without a table. Memory:
  :math:`n\,(2 d_y + d_x) + m\,(d_y + d_x)` numbers of 4 bytes (8 in float64) for the table, where
  :math:`d_x` and :math:`d_y` are the sizes of ``x`` and ``y``. With batches of 64 from 50,000
  samples for 10,000 parameters, that is 63 MB; batches of one sample take 64 times that. Where it
  is too much, use larger batches or :func:`jaxbo.srba`, which has no table.

  Args:
    inner_loss: the inner loss of one batch, ``inner_loss(x, y, batch) -> scalar``.
    linear_learning_rate: :math:`\eta > 0`, a float or a schedule.
    num_batches: the number :math:`n \ge 1` of batches of the inner loss.
    num_outer_batches: the number :math:`m \ge 1` of batches of the outer loss.

  Returns:
    A transformation from :class:`jaxbo.Bilevel` gradients of :math:`f_j` at :math:`(x, y)` to the
    directions :math:`(d^x, d^y)`, the first in the chain. ``update`` must be given ``params``,
    ``batch=``, the data of :math:`g_i`, ``index=``, the number :math:`i` from 0, and
    ``outer_index=``, the number :math:`j` of the batch of the incoming gradient; both integers.
    The table begins at zero. To fill it first, as the paper does, call ``update`` for each batch at
    the start and drop the updates.

  Raises:
    ValueError: if a number is outside its range; an index too, where it is not traced.
    TypeError: if ``inner_loss`` does not take ``(x, y, batch)``; if parameters or gradients are not
      :class:`jaxbo.Bilevel`; if ``batch=`` or an index is missing, or an index is not one integer.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> tx = jaxbo.add_averaged_response(
    ...   lambda x, y, batch: 0.5 * (y - batch * x) ** 2, linear_learning_rate=0.5,
    ...   num_batches=2, num_outer_batches=1)
    >>> params = jaxbo.Bilevel(outer=jnp.float32(1.0), inner=jnp.float32(0.0))
    >>> grads = jaxbo.Bilevel(outer=jnp.float32(0.0), inner=jnp.float32(-3.0))
    >>> _, state = tx.update(grads, tx.init(params), params, batch=2.0, index=0, outer_index=0)
    >>> direction, state = tx.update(grads, state, params, batch=4.0, index=1, outer_index=0)
    >>> table = state.inner_table
    >>> print(table.rows.gradient, table.means.gradient)                   # y - 2 x, y - 4 x
    [-2. -4.] -3.0
    >>> float(direction.inner)                       # -4, minus its row (0), plus the mean (-1)
    -5.0

  References:
    Dagréou, Ablin, Vaiter and Moreau, `A Framework for Bilevel Optimization that Enables Stochastic
    and Global Variance Reduction Algorithms <https://arxiv.org/abs/2201.13409>`_, 2022, equation
    (9); Defazio, Bach and Lacoste-Julien, `SAGA <https://arxiv.org/abs/1407.0202>`_, 2014.
  """
  name = "add_averaged_response"
  inner_loss = checked_loss("inner_loss", inner_loss)
  _schedule.check("linear_learning_rate", linear_learning_rate, _check.positive)
  num_batches = _check.positive_int("num_batches", num_batches)
  num_outer_batches = _check.positive_int("num_outer_batches", num_outer_batches)

  def init(params):
    check_params(name, params)
    zeros = _tree.zeros_at_least_float32
    terms = lambda: InnerTerms(zeros(params.inner), zeros(params.inner), zeros(params.outer))
    return AveragedResponseState(
      zeros(params.inner),
      AverageTable(_tree.empty_slots(terms(), num_batches), terms()),
      AverageTable(_tree.empty_slots(zeros(params), num_outer_batches), zeros(params)),
      jnp.int32(0),
      AveragedResponseInfo(jnp.zeros((), scalar_dtype(params)), jnp.bool_(True)),
    )

  def update(
    updates,
    state,
    params=None,
    *,
    batch: Any = MISSING,
    index: Any = MISSING,
    outer_index: Any = MISSING,
    **extra_args,
  ):
    grads = check_update(name, updates, params, batch)
    for size_name, size in (("num_batches", num_batches), ("num_outer_batches", num_outer_batches)):
      if (given := extra_args.get(size_name, size)) != size:
        raise ValueError(f"{name}: {size_name} must be {given}, as the stream has it, got {size}")
    index, known = _row_of(name, "index", index, "num_batches", num_batches)
    outer_index, outer_known = _row_of(
      name, "outer_index", outer_index, "num_outer_batches", num_outer_batches
    )
    here: Bilevel = _tree.at_least_float32(params)
    v = state.averaged_linear
    terms = inner_terms(inner_loss, here.outer, here.inner, v, batch)
    grads = _tree.cast_like(grads, here)
    inner, inner_after = _saga(state.inner_table, terms, index)
    outer, outer_after = _saga(state.outer_table, grads, outer_index)

    dtype = state.info.averaged_norm.dtype
    direction = Bilevel(optax.tree.sub(outer.outer, inner.cross), inner.gradient)
    step = _schedule.value_at(linear_learning_rate, state.averaged_count, dtype)
    linear = _tree.add_scaled(v, -step, optax.tree.sub(inner.hessian, outer.inner))
    finite = known & outer_known & _tree.all_finite((terms, grads, direction, linear))
    direction = _tree.where(finite, direction, optax.tree.zeros_like(direction))
    return _tree.cast_like(direction, params), AveragedResponseState(
      _tree.where(finite, linear, v),
      inner_after(finite),
      outer_after(finite),
      jnp.where(finite, _schedule.after(state.averaged_count), state.averaged_count),
      AveragedResponseInfo(_tree.norm(tuple(direction)).astype(dtype), finite),
    )

  return optax.GradientTransformationExtraArgs(init, update)


def _row_of(name, what, index, size_name, size):
  """The index as int32, and whether the table has such a row."""
  if index is MISSING:
    raise TypeError(f"{name}: update must be given {what}=, the number of the batch from 0")
  if jnp.shape(index) != () or not jnp.issubdtype(jnp.result_type(index), jnp.integer):
    raise TypeError(f"{name}: {what} must be one integer, got {index!r}")
  if _check.is_known(index) and not 0 <= int(index) < size:
    raise ValueError(f"{name}: {what} must be from 0 to {size_name} - 1 = {size - 1}, got {index}")
  index = _tree.at_least_int32(index)
  return index, (index >= 0) & (index < size)


def _saga(table, new, index):
  """SAGA's estimate of the mean of ``new`` over all batches, and ``after(finite) -> table``.

  Only one row is touched, so that the table stays in place.
  """
  take = lambda rows: jax.lax.dynamic_index_in_dim(rows, index, keepdims=False)
  old = jax.tree.map(take, table.rows)
  change = optax.tree.sub(new, old)

  def after(finite):
    size = jax.tree.leaves(table.rows)[0].shape[0]
    counted = _tree.where(finite, change, optax.tree.zeros_like(change))
    return AverageTable(
      _tree.put_slot(table.rows, _tree.where(finite, new, old), index),
      _tree.add_scaled(table.means, 1 / size, counted),
    )

  return optax.tree.add(change, table.means), after


def saba(
  outer_learning_rate: LearningRate,
  inner_learning_rate: LearningRate,
  inner_loss: Loss,
  *,
  linear_learning_rate: optax.ScalarOrSchedule,
  num_batches: int,
  num_outer_batches: int,
  project_outer: Projection | None = None,
  project_inner: Projection | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""SABA: descent of both levels along :func:`add_averaged_response`, on a finite sum.

  SABA is SOBA with variance reduction: it reaches the solution with constant rates, at the cost of
  SOBA's steps and of a table. It moves both levels itself, so use ``jaxbo.online_loop(outer_loss,
  None, saba(...))``. The theory has :math:`\rho = \eta \sim 1 / (n + m)^{2/3}` and a fixed ratio
  :math:`\gamma / \rho`; in practice the rates are those of gradient descent on one batch.

  Args:
    outer_learning_rate: :math:`\gamma`, a float or a schedule for :math:`x`, or an optimizer.
    inner_learning_rate: :math:`\rho`, a float or a schedule for :math:`y`, or an optimizer.
    inner_loss: the inner loss of one batch, ``inner_loss(x, y, batch) -> scalar``.
    linear_learning_rate: the step :math:`\eta > 0` for :math:`v`, a float or a schedule; the paper
      uses :math:`\rho`.
    num_batches: the number :math:`n \ge 1` of batches of the inner loss.
    num_outer_batches: the number :math:`m \ge 1` of batches of the outer loss.
    project_outer: the projection on :math:`X`, or ``None``.
    project_inner: the projection on :math:`Y`, or ``None``.

  Returns:
    ``optax.chain(add_averaged_response(...), optax.partition(...), project(project_outer,
    project_inner))``, on :class:`jaxbo.Bilevel` parameters.

  Example:
    >>> import jax, jax.numpy as jnp, jaxbo
    >>> inner_loss = lambda x, y, batch: 0.5 * jnp.mean((y - batch * x) ** 2)
    >>> outer_loss = lambda x, y, batch: 0.5 * jnp.mean((y - batch) ** 2)
    >>> train, val = jnp.array([0.0, 1.0, 2.0, 5.0]), jnp.array([1.0, 3.0])    # y*(x) = 2 x
    >>> stream = jaxbo.tasks.finite_sum_stream(train, val, batch_size=1)
    >>> outer = jaxbo.saba(0.02, 0.2, inner_loss, linear_learning_rate=0.2, num_batches=4,
    ...                    num_outer_batches=2)
    >>> loop = jaxbo.online_loop(outer_loss, None, outer)
    >>> state = loop.init(jnp.float32(0.0), jnp.float32(0.0), stream)
    >>> state, info = jax.jit(loop.run, static_argnums=2)(state, stream, 1000)
    >>> print(state.x.round(4), state.y.round(4))                  # no noise is left
    1.0 2.0

  References:
    Dagréou, Ablin, Vaiter and Moreau, `A Framework for Bilevel Optimization that Enables Stochastic
    and Global Variance Reduction Algorithms <https://arxiv.org/abs/2201.13409>`_, 2022.
  """
  head = add_averaged_response(
    inner_loss,
    linear_learning_rate=linear_learning_rate,
    num_batches=num_batches,
    num_outer_batches=num_outer_batches,
  )
  rates = Bilevel(outer_learning_rate, inner_learning_rate)
  return optax.chain(head, *descend(rates, project_outer, project_inner))
