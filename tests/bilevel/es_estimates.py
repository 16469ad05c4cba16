"""What the tests of the ES response share: a solved quadratic and estimates with many keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbo
from tests import problems
from tests.problems import Quadratic, flat, tree_of

LEARNING_RATE, NUM_STEPS = 0.9, 5


@functools.cache
def quadratic_setting(outer="tree", inner="tree", double=True):
  outer_shapes = problems.OUTER_SHAPES if outer == "tree" else (outer,)
  inner_shapes = problems.INNER_SHAPES if inner == "tree" else (inner,)
  dtype = jnp.float64 if double else jnp.float32
  problem = Quadratic.make(problems.count(outer_shapes), problems.count(inner_shapes))
  solver = jaxbo.inner_solver(problem.inner_loss, optax.sgd(LEARNING_RATE), NUM_STEPS)
  x, x_flat = tree_of(outer_shapes, dtype, seed=1)
  y0, _ = tree_of(inner_shapes, dtype, seed=2)
  solve = jax.jit(solver.solve)
  first = solve(x, solver.init(y0), None)
  solution = solve(x, first, None)  # A warm start: the start is not y0.
  grads = jax.jit(jax.grad(problem.outer_loss, (0, 1)))(x, solution.params, None)
  exact = problem.unrolled_hypergradient(x_flat, flat(first.params), LEARNING_RATE, NUM_STEPS)
  return problem, solver, x, first, solution, grads, exact


STATIC = (
  "num_samples",
  "directions",
  "difference",
  "redraw",
  "sample_batch_size",
  "per_task",
  "perturb_features",
)


@functools.partial(jax.jit, static_argnames=("solver", *STATIC))
def _estimates(solver, x, solution, grads, keys, batch, **kwargs):
  def one(key):
    head = jaxbo.add_es_response(solver, key=key, **kwargs)
    return head.update(grads, head.init(x), x, solution=solution, batch=batch)[0]

  return jax.vmap(one)(keys)


def estimates(solver, x, solution, grads, num_keys, *, batch=None, **kwargs):
  """Estimates with ``num_keys`` different keys, as float64 ``[num_keys, p]``.

  One program for each solver, whatever the smoothing, the batch and the solution are.
  """
  trees = _estimates(solver, x, solution, grads, jnp.arange(num_keys), batch, **kwargs)
  return np.concatenate([leaf.reshape(num_keys, -1) for leaf in jax.tree.leaves(trees)], axis=1)


def scalar_directions(key, num_samples):
  """The Gaussian directions of a first update of a scalar, drawn anew from the keys of the law."""
  update_key = jax.random.fold_in(jax.random.key(key), 0)
  draw = lambda j: jax.random.normal(jax.random.split(jax.random.fold_in(update_key, j), 1)[0], ())
  with jax.debug_key_reuse(False):  # The samples differ by what is folded in.
    return np.asarray(jax.jit(jax.vmap(draw))(jnp.arange(num_samples)))


def assert_within_standard_errors(samples, expected, num_errors=4.0):
  error = np.std(samples, axis=0, ddof=1) / np.sqrt(len(samples))
  worst = np.max(np.abs(np.mean(samples, axis=0) - expected) / np.maximum(error, 1e-12))
  assert worst < num_errors, f"{worst:.2f} standard errors away"
