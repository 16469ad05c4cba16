"""Bilevel problems with closed forms, in float64 NumPy."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

OUTER_SHAPES = {"a": (), "b": [(3, 4), (2, 3, 5)]}
INNER_SHAPES = [(2, 2), {"c": (3,), "d": ()}]


class Quadratic(NamedTuple):
  """T0: ``g = y'Ay/2 - y'(Bx + c)`` and ``f = |y - t|^2/2 + r|x - s|^2/2``."""

  A: np.ndarray
  B: np.ndarray
  c: np.ndarray
  t: np.ndarray
  s: np.ndarray
  r: float

  @classmethod
  def make(cls, p: int, q: int, *, seed: int = 0, condition: float = 10.0) -> "Quadratic":
    """A random instance whose inner Hessian has eigenvalues from 1 / condition to 1."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(q, q)))
    eigenvalues = np.geomspace(1 / condition, 1, q)
    return cls(
      basis @ np.diag(eigenvalues) @ basis.T,
      rng.normal(size=(q, p)) / np.sqrt(p),
      rng.normal(size=q),
      rng.normal(size=q),
      rng.normal(size=p),
      0.5,
    )

  def inner_loss(self, x, y, batch):
    """The inner loss on pytrees of any structure; ``batch`` scales the linear term if given."""
    x, y = ravel_pytree(x)[0], ravel_pytree(y)[0]
    matrix, cross, offset = (jnp.asarray(v, y.dtype) for v in (self.A, self.B, self.c))
    linear = cross @ x + offset
    if batch is not None:
      linear = batch * linear
    return 0.5 * y @ matrix @ y - y @ linear

  def outer_loss(self, x, y, batch):
    """The outer loss on pytrees of any structure."""
    del batch
    x, y = ravel_pytree(x)[0], ravel_pytree(y)[0]
    miss = y - jnp.asarray(self.t, y.dtype)
    distance = x - jnp.asarray(self.s, x.dtype)
    return 0.5 * miss @ miss + 0.5 * self.r * distance @ distance

  def solution(self, x):
    """The inner minimum."""
    return np.linalg.solve(self.A, self.B @ x + self.c)

  def jacobian(self):
    """The response Jacobian of the inner minimum."""
    return np.linalg.solve(self.A, self.B)

  def contraction(self, learning_rate, num_steps):
    """``(I - lr A)^N``, what gradient descent leaves of the distance to the minimum."""
    return np.linalg.matrix_power(np.eye(len(self.A)) - learning_rate * self.A, num_steps)

  def run(self, x, y0, learning_rate, num_steps):
    """The end of ``num_steps`` steps of gradient descent."""
    left = self.contraction(learning_rate, num_steps)
    return self.solution(x) + left @ (y0 - self.solution(x))

  def run_jacobian(self, learning_rate, num_steps):
    """The Jacobian of :meth:`run` in ``x``."""
    return self.jacobian() - self.contraction(learning_rate, num_steps) @ self.jacobian()

  def outer_grads(self, x, y):
    """``(df/dx, df/dy)``."""
    return self.r * (x - self.s), y - self.t

  def implicit_hypergradient(self, x, y):
    """The hypergradient by the implicit function theorem at ``(x, y)``."""
    outer, inner = self.outer_grads(x, y)
    return outer + self.jacobian().T @ inner

  def unrolled_hypergradient(self, x, y0, learning_rate, num_steps):
    """The gradient in ``x`` of the outer loss after ``num_steps`` steps from ``y0``."""
    outer, inner = self.outer_grads(x, self.run(x, y0, learning_rate, num_steps))
    return outer + self.run_jacobian(learning_rate, num_steps).T @ inner

  def optimum(self):
    """The bilevel optimum."""
    jacobian = self.jacobian()
    constant = np.linalg.solve(self.A, self.c) - self.t
    return np.linalg.solve(
      self.r * np.eye(len(self.s)) + jacobian.T @ jacobian, self.r * self.s - jacobian.T @ constant
    )


def unflatten(vector, shapes, dtype):
  """Cuts a vector into a pytree of the given shapes, leaves in the order of ``jax.tree``."""
  if isinstance(shapes, tuple):
    size = int(np.prod(shapes))
    return jnp.asarray(np.reshape(vector[:size], shapes), dtype), vector[size:]
  if isinstance(shapes, list):
    parts = []
    for shape in shapes:
      part, vector = unflatten(vector, shape, dtype)
      parts.append(part)
    return parts, vector
  tree = {}
  for name in sorted(shapes):
    tree[name], vector = unflatten(vector, shapes[name], dtype)
  return tree, vector


def tree_of(shapes, dtype, *, seed=0):
  """Random normal pytree of the given shapes, and the same numbers as a float64 vector."""
  size = count(shapes)
  vector = np.random.default_rng(seed).normal(size=size)
  tree, _ = unflatten(vector, shapes, dtype)
  return tree, np.asarray(ravel_pytree(tree)[0], np.float64)


def count(shapes) -> int:
  """The number of entries of a pytree of shapes."""
  if isinstance(shapes, tuple):
    return int(np.prod(shapes))
  return sum(count(s) for s in (shapes if isinstance(shapes, list) else shapes.values()))


def flat(tree) -> np.ndarray:
  """A pytree as one float64 vector."""
  return np.asarray(ravel_pytree(tree)[0], np.float64)
