"""The memory of the ES response: what XLA plans for the compiled update, in directions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbo

pytestmark = pytest.mark.slow  # All together, not each.

P = 100_000
SOLVER = jaxbo.inner_solver(  # Every step needs all of x.
  lambda x, y, batch: jnp.mean((x.reshape(100, -1) @ y - 1) ** 2), optax.sgd(0.1), 3
)


@functools.cache
def temporary_directions(directions, num_samples, chunk, redraw=True):
  """Temporary memory of an update, in vectors of the size of ``x``."""
  head = jaxbo.add_es_response(
    SOLVER, num_samples, directions=directions, sample_batch_size=chunk, redraw=redraw
  )
  x, solution = jnp.zeros(P), SOLVER.init(jnp.zeros(P // 100))
  update = lambda grads, state, x, y: head.update(grads, state, x, solution=y, batch=None)
  compiled = jax.jit(update).lower((x, solution.params), head.init(x), x, solution).compile()
  return compiled.memory_analysis().temp_size_in_bytes / x.nbytes


@pytest.mark.parametrize("directions", ["gaussian", "sphere", "rademacher", "orthogonal"])
def test_memory_does_not_grow_with_the_number_of_samples(directions):
  """At a fixed chunk only the scalar products grow: one number a sample."""
  few, many = (temporary_directions(directions, q, 2) for q in (4, 256))
  np.testing.assert_allclose(many, few, rtol=0.02)


def test_keeping_directions_costs_one_more_for_each_sample_that_runs_at_once():
  """And nothing for the other samples."""
  plans = (4, 2), (256, 4)
  kept = [temporary_directions("gaussian", *plan, redraw=False) for plan in plans]
  drawn_again = [temporary_directions("gaussian", *plan) for plan in plans]
  np.testing.assert_allclose(np.diff(kept) - np.diff(drawn_again), 4 - 2, rtol=0.1)
