"""A finite sum of quadratics, and SABA and SRBA as their papers write them, in NumPy."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

P, D, N, M = 2, 3, 6, 4  # sizes of x and y, and the batches of both losses


class Sums(NamedTuple):
  """One quadratic for each batch; leading axes ``[N]`` and ``[M]``.

  Attributes:
    inner: ``(A, B, b)`` of :math:`g_i = y'A_i y/2 + y'(B_i x + b_i)`.
    outer: ``(C, c, e)`` of :math:`f_j = y'C_j y/2 + c_j'y + |x - e_j|^2/2`.
  """

  inner: tuple
  outer: tuple

  def solution(self):
    """The x of the least F, its y and the v of the papers."""
    A, B, b, C, c, e = (leaf.mean(0) for leaf in (*self.inner, *self.outer))
    slope, offset = -np.linalg.solve(A, B), -np.linalg.solve(A, b)
    hessian = slope.T @ C @ slope + np.eye(P)
    x = np.linalg.solve(hessian, e - slope.T @ (C @ offset + c))
    y = slope @ x + offset
    return x, y, -np.linalg.solve(A, C @ y + c)


def sums(seed=0):
  """Positive definite on average and in each batch."""
  rng = np.random.default_rng(seed)

  def spd(n):
    roots = rng.normal(size=(n, D, D)) / 2
    return roots @ roots.transpose(0, 2, 1) + 0.5 * np.eye(D)

  inner = spd(N), rng.normal(size=(N, D, P)), rng.normal(size=(N, D))
  return Sums(inner, (spd(M), rng.normal(size=(M, D)), rng.normal(size=(M, P))))


def inner_loss(x, y, batch):
  """The mean over the batches that it is given."""
  A, B, b = batch
  return jnp.mean(0.5 * jnp.einsum("d,nde,e->n", y, A, y) + (B @ x + b) @ y)


def outer_loss(x, y, batch):
  """Likewise."""
  C, c, e = batch
  return jnp.mean(
    0.5 * jnp.einsum("d,nde,e->n", y, C, y) + c @ y + 0.5 * jnp.sum((x[None] - e) ** 2, 1)
  )


def terms(problem, z, i, j):
  r"""What batches i and j give: of the inner loss three terms, of the outer loss two.

  With the signs of the papers: theirs is :math:`v^* = -(\nabla^2 g)^{-1} \nabla_y f`.
  """
  (x, y, v), (A, B, b), (C, c, e) = (
    z,
    *(
      [leaf[k].mean(0) for leaf in leaves] for leaves, k in ((problem.inner, i), (problem.outer, j))
    ),
  )
  return [A @ y + B @ x + b, A @ v, B.T @ v], [C @ y + c, x - e]


def assemble(inner, outer):
  """The directions of x, y and v."""
  (gradient, hessian, cross), (outer_y, outer_x) = inner, outer
  return [cross + outer_x, gradient, hessian + outer_y]


def step(z, rates, directions):
  """One step of all three."""
  return [u - rate * d for u, rate, d in zip(z, rates, directions, strict=True)]


def saba_in_numpy(problem, order, rates, tables, z):
  """Equation (9) of 2201.13409 with every mean taken over all rows: all iterates, the tables."""
  path, tables = [], [[rows.copy() for rows in side] for side in tables]
  for i, j in order:
    new = terms(problem, z, [i], [j])
    estimates = []
    for side, k, values in zip(tables, (i, j), new, strict=True):
      pairs = list(zip(side, values, strict=True))
      estimates.append([value - rows[k] + rows.mean(0) for rows, value in pairs])
      for rows, value in pairs:
        rows[k] = value
    z = step(z, rates, assemble(*estimates))
    path.append(np.concatenate(z))
  return np.array(path), tables


def srba_in_numpy(problem, order, rates, period, radius, z):
  """Algorithm 1 of 2302.08766: the directions over all batches every ``period`` steps."""
  path, last, d = [], None, None
  for t, (i, j) in enumerate(order):
    if t % period == 0:
      d = assemble(*terms(problem, z, list(range(N)), list(range(M))))
    else:
      now, then = (assemble(*terms(problem, at, [i], [j])) for at in (z, last))
      d = [a - b + old for a, b, old in zip(now, then, d, strict=True)]
    last, z = z, step(z, rates, d)
    z[2] = z[2] * min(1, radius / np.linalg.norm(z[2]))
    path.append(np.concatenate(z))
  return np.array(path)
