r"""The product of the transposed Jacobian of a run with a vector, from perturbed runs.

:func:`jaxbo.add_es_response` estimates, for a run :math:`y(x)` and a vector :math:`b`,

.. math:: J^\top b \approx \frac1Q \sum_{j=1}^Q \langle \delta_j, b \rangle\, u_j

with differences :math:`\delta_j` of the run along directions :math:`u_j`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from jaxbo import _tree
from jaxbo._types import Data, PyTree
from jaxbo.bilevel.directions import Draw, Family
from jaxbo.bilevel.solution import InnerSolver, Path, Start


class Run(NamedTuple):
  """A run to perturb, and the vector for the products with its end.

  Attributes:
    x: the parameters to perturb.
    start: the start of the run.
    batch: the batch of the run.
    y: the end of the run, ``path(x, start, batch)``.
    b: the vector, shaped like ``y``.
    counts: for each task, whether its run ended at finite numbers, ``[num_tasks]``; products leave
      out the other tasks. ``None`` if there is one task.
  """

  x: PyTree
  start: Start
  batch: Data
  y: PyTree
  b: PyTree
  counts: jax.Array | None = None


class Sampling(NamedTuple):
  """How to sample, from the arguments of :func:`jaxbo.add_es_response`."""

  family: Family
  difference: str
  num_samples: int
  smoothing: float | jax.Array
  chunk: int
  redraw: bool
  mesh: jax.sharding.Mesh | None
  axis_name: str | None


def where_finite(finite: jax.Array, leaf: jax.Array) -> jax.Array:
  """``leaf``, or zeros where ``finite`` is false; ``finite`` has the leading axes of ``leaf``."""
  return jnp.where(jnp.reshape(finite, finite.shape + (1,) * (leaf.ndim - finite.ndim)), leaf, 0)


def start_for(inner: InnerSolver, start: Start, x: PyTree, batch: Data) -> Start:
  """``start`` in float32 at least, except optimizer states that are narrower by design."""
  params, opt_state = start
  if not _tree.has_low_precision(params):
    return start
  params = _tree.at_least_float32(params)
  of_one = params if inner.task is None else jax.tree.map(lambda leaf: leaf[0], params)
  types = jax.eval_shape(inner.init, None if inner.start else of_one, x, batch)
  return params, _tree.cast_like(opt_state, types.opt_state)


def estimate(sampling: Sampling, path: Path, run: Run, key: jax.Array) -> tuple[PyTree, jax.Array]:
  """Estimates the response, shaped like ``run.x``, and counts the finite samples.

  ``path(x, start, batch)`` computes the run; ``key`` is a typed key.
  """
  draw = sampling.family(key, run.x, sampling.num_samples)
  if sampling.redraw:
    products = _all_products(sampling, path, run, key)
    finite = jnp.isfinite(products)
    num_finite = jnp.sum(finite, dtype=jnp.int32)
    weights = jnp.where(finite, products, 0) / jnp.maximum(num_finite, 1)
    return _weighted_sum(sampling, draw, weights, run.x), num_finite

  def add_chunk(carry, samples):
    total, num_finite = carry
    directions = jax.vmap(draw)(samples)
    products = jax.vmap(functools.partial(_product, sampling, path, run))(directions)
    finite = jnp.isfinite(products) & (samples < sampling.num_samples)
    total = optax.tree.add(total, _combine(jnp.where(finite, products, 0), directions))
    return (total, num_finite + jnp.sum(finite, dtype=jnp.int32)), None

  first = optax.tree.zeros_like(run.x), jnp.int32(0)
  (total, num_finite), _ = jax.lax.scan(add_chunk, first, _chunks(sampling))
  count = jnp.maximum(num_finite, 1)
  return jax.tree.map(lambda leaf: leaf / count.astype(leaf.dtype), total), num_finite


def _product(sampling: Sampling, path: Path, run: Run, direction: PyTree) -> jax.Array:
  """``<delta, b>`` along one direction."""
  end = lambda x: path(x, run.start, run.batch)
  moved = lambda scale: end(_tree.add_scaled(run.x, scale, direction))
  smoothing, length = sampling.smoothing, 1
  if sampling.difference == "exact":
    change = jax.jvp(end, (run.x,), (direction,))[1]
  elif sampling.difference == "forward":
    change, length = optax.tree.sub(moved(smoothing), run.y), smoothing
  else:
    pair = jax.vmap(moved)(jnp.stack([jnp.asarray(smoothing), -jnp.asarray(smoothing)]))
    change, length = jax.tree.map(lambda leaf: leaf[0] - leaf[1], pair), 2 * smoothing
  if (counts := run.counts) is not None:
    change = jax.tree.map(lambda leaf: where_finite(counts, leaf), change)
  return _tree.vdot(change, run.b) / length


def _products(
  sampling: Sampling, path: Path, run: Run, draw: Draw, samples: jax.Array
) -> jax.Array:
  """``<delta_j, b>`` for the given samples, ``chunk`` at a time."""
  product = lambda sample: _product(sampling, path, run, draw(sample))
  return jax.lax.map(product, samples, batch_size=min(sampling.chunk, len(samples)))


def _all_products(sampling: Sampling, path: Path, run: Run, key: jax.Array) -> jax.Array:
  """``<delta_j, b>`` for all samples, ``[num_samples]``; devices share the work over an axis."""
  num_samples, axis_name = sampling.num_samples, sampling.axis_name
  if axis_name is None:
    draw = sampling.family(key, run.x, num_samples)
    return _products(sampling, path, run, draw, jnp.arange(num_samples))
  impl, name = jax.random.key_impl(key), axis_name

  def on_a_device(run, key_data):
    # Mark values that differ between devices as varying: JAX sums the derivative by a value that
    # is the same on all devices over the devices.
    run, key_data = jax.lax.pcast((run, key_data), name, to="varying")
    draw = sampling.family(jax.random.wrap_key_data(key_data, impl=impl), run.x, num_samples)
    share, rest = divmod(num_samples, jax.lax.axis_size(name))
    if rest:
      raise ValueError(
        f"num_samples must be a multiple of the size {jax.lax.axis_size(name)} of the axis "
        f"{name!r}, got {num_samples}"
      )
    first = share * jax.lax.axis_index(name)
    mine = _products(sampling, path, run, draw, first + jnp.arange(share))
    samples = jnp.arange(num_samples)
    is_mine = (samples >= first) & (samples < first + share)
    return jax.lax.psum(jnp.where(is_mine, mine[(samples - first) % share], 0), name)

  arguments = run, jax.random.key_data(key)
  if sampling.mesh is None:
    return on_a_device(*arguments)
  spec = PartitionSpec()
  sharded = jax.shard_map(
    on_a_device, mesh=sampling.mesh, in_specs=spec, out_specs=spec, axis_names={name}
  )
  return sharded(*arguments)


def _weighted_sum(sampling: Sampling, draw: Draw, weights: jax.Array, like: PyTree) -> PyTree:
  """``sum_j weights_j u_j``; draws the directions again, ``chunk`` at a time."""
  samples = _chunks(sampling)
  weights = jnp.pad(weights, (0, samples.size - len(weights))).reshape(samples.shape)

  def add_chunk(total, chunk):
    weights, samples = chunk
    return optax.tree.add(total, _combine(weights, jax.vmap(draw)(samples))), None

  return jax.lax.scan(add_chunk, optax.tree.zeros_like(like), (weights, jnp.asarray(samples)))[0]


def _chunks(sampling: Sampling) -> np.ndarray:
  """The indices of all samples, ``[chunks, chunk]``; from ``num_samples`` on they are padding."""
  size = min(sampling.chunk, sampling.num_samples)
  return np.arange(-(-sampling.num_samples // size) * size, dtype=np.int32).reshape(-1, size)


def _combine(weights: jax.Array, directions: PyTree) -> PyTree:
  return jax.tree.map(
    lambda u: jnp.einsum("j,j...", weights.astype(u.dtype), u, precision="highest"), directions
  )
