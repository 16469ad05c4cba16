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
  first = solver.solve(x, solver.init(y0), None)
  solution = solver.solve(x, first, None)  # A warm start: the start is not y0.
  grads = jax.grad(problem.outer_loss, (0, 1))(x, solution.params, None)
  exact = problem.unrolled_hypergradient(x_flat, flat(first.params), LEARNING_RATE, NUM_STEPS)
  return problem, solver, x, first, solution, grads, exact


def estimates(solver, x, solution, grads, num_keys, *, batch=None, **kwargs):
  """Estimates with ``num_keys`` different keys, as float64 ``[num_keys, p]``."""

  def one(key):
    head = jaxbo.add_es_response(solver, key=key, **kwargs)
    return head.update(grads, head.init(x), x, solution=solution, batch=batch)[0]

  trees = jax.jit(jax.vmap(one))(jnp.arange(num_keys))
  return np.concatenate([leaf.reshape(num_keys, -1) for leaf in jax.tree.leaves(trees)], axis=1)


def assert_within_standard_errors(samples, expected, num_errors=4.0):
  error = np.std(samples, axis=0, ddof=1) / np.sqrt(len(samples))
  worst = np.max(np.abs(np.mean(samples, axis=0) - expected) / np.maximum(error, 1e-12))
  assert worst < num_errors, f"{worst:.2f} standard errors away"
