"""Random quadratic bilevel problems with known optima, with and without flat inner directions."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

NUM_OUTER, NUM_INNER = 50, 100


class Quadratic(NamedTuple):
  """A bilevel problem with quadratic losses; what is an array is data, no constant.

  Attributes:
    inner: ``(hessian, coupling, linear)`` of the inner loss.
    outer: ``(hessian, linear)`` of the outer loss in (x, y).
    optimum: the solution's x.
    smoothness: of the outer loss, of the inner loss in y, and of its gap in (x, y).
  """

  inner: tuple[Any, Any, Any]
  outer: tuple[Any, Any]
  optimum: Any
  smoothness: tuple[Any, Any, Any]


def random_quadratic(flat: bool, seed: int) -> Quadratic:
  """Draws a problem, and solves it in NumPy."""
  rng = np.random.default_rng(seed)

  def spd(eigenvalues):
    basis = np.linalg.qr(rng.normal(size=(len(eigenvalues),) * 2))[0]
    return (basis * eigenvalues) @ basis.T

  eigenvalues = np.geomspace(0.1, 1, NUM_INNER)
  if flat:
    eigenvalues[::2] = 0
  hessian = spd(eigenvalues)
  # In the range of the Hessian, so that there is a minimum for every x.
  coupling = hessian @ rng.normal(size=(NUM_INNER, NUM_OUTER)) / np.sqrt(NUM_INNER)
  linear = hessian @ rng.normal(size=NUM_INNER)
  size = NUM_OUTER + NUM_INNER
  outer_hessian, outer_linear = spd(np.geomspace(0.1, 1, size)), rng.normal(size=size)

  # y = response x + offset + basis w: least f over x and w, the coordinates of the flat space.
  inverse = np.linalg.pinv(hessian, rcond=1e-10)
  response, offset = -inverse @ coupling, -inverse @ linear
  null = np.linalg.svd(hessian)[0][:, np.count_nonzero(eigenvalues) :]
  minima = np.block([[np.eye(NUM_OUTER), np.zeros((NUM_OUTER, null.shape[1]))], [response, null]])
  shift = np.concatenate([np.zeros(NUM_OUTER), offset])
  gradient = minima.T @ (outer_hessian @ shift + outer_linear)
  optimum = np.linalg.solve(minima.T @ outer_hessian @ minima, -gradient)[:NUM_OUTER]
  gap = np.hstack([-response, np.eye(NUM_INNER)])  # y - y*(x)
  smoothness = 1.0, 1.0, np.linalg.norm(gap.T @ hessian @ gap, 2)
  return Quadratic((hessian, coupling, linear), (outer_hessian, outer_linear), optimum, smoothness)


def inner_loss(x, y, batch):
  """The inner loss, marked for counting."""
  hessian, coupling, linear = batch
  y = checkpoint_name(y, "gradient")
  return 0.5 * jnp.sum(y * (hessian @ y)) + jnp.sum(y * (coupling @ x + linear))


def outer_loss(x, y, batch):
  """The outer loss, marked for counting."""
  hessian, linear = batch
  z = checkpoint_name(jnp.concatenate([x, y]), "gradient")
  return 0.5 * jnp.sum(z * (hessian @ z)) + jnp.sum(z * linear)


def start() -> tuple[jax.Array, jax.Array]:
  """Where all methods start, in the default precision."""
  return jnp.zeros(NUM_OUTER), jnp.zeros(NUM_INNER)


def as_arrays(problem: Quadratic) -> Quadratic:
  """The problem on the device, in the default precision."""
  return jax.tree.map(lambda leaf: jnp.asarray(leaf, float), problem)
