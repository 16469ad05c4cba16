"""Bilevel problems with a known hypergradient, for benchmarks."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax


class Problem(NamedTuple):
  """A bilevel problem at the step that is measured.

  Attributes:
    name: for the table.
    inner_loss: ``inner_loss(x, y, batch)``.
    outer_loss: ``outer_loss(x, y, batch)``.
    optimizer: of the inner problem.
    num_steps: inner steps.
    neumann_learning_rate: for the Neumann series and the fixed point.
    x: outer parameters, ``[p]``.
    drift: what ``x`` moved by in each outer step before.
    y0: inner parameters before the first of them.
    train: the batch of the inner loss.
    val: the batch of the outer loss.
  """

  name: str
  inner_loss: Callable[..., jax.Array]
  outer_loss: Callable[..., jax.Array]
  optimizer: optax.GradientTransformation
  num_steps: int
  neumann_learning_rate: float
  x: jax.Array
  drift: jax.Array
  y0: Any
  train: Any
  val: Any


def quadratic(condition: float, size: int = 200, num_outer: int = 100) -> Problem:
  """A quadratic with eigenvalues from 1 / condition to 1, and a bilinear coupling."""
  rng = np.random.default_rng(0)
  basis = np.linalg.qr(rng.normal(size=(size, size)))[0]
  hessian = (basis * np.geomspace(1 / condition, 1, size)) @ basis.T
  hessian = jnp.asarray((hessian + hessian.T) / 2, jnp.float32)
  coupling = jnp.asarray(rng.normal(size=(size, num_outer)) / math.sqrt(num_outer), jnp.float32)
  target, x, drift = (
    jnp.asarray(rng.normal(size=n), jnp.float32) for n in (size, num_outer, num_outer)
  )

  def inner_loss(x, y, batch):
    hessian, coupling = batch
    return 0.5 * jnp.sum(y * (hessian @ y)) - jnp.sum(y * (coupling @ x))

  def outer_loss(x, y, target):
    return 0.5 * jnp.mean((y - target) ** 2) + 0.005 * jnp.sum(x**2)

  return Problem(
    f"quadratic, condition {condition:g}, p = {num_outer}, d = {size}",
    inner_loss,
    outer_loss,
    optax.sgd(1.0),
    50,
    1.0,
    x,
    0.01 * drift,
    jnp.zeros(size),
    (hessian, coupling),
    target,
  )


def digits() -> Problem:
  """Hyper-cleaning of scikit-learn's digits by softmax regression, as ``scripts.hyper_cleaning``.

  ``x`` are the logits of the weights of 1,000 examples, half of which have a wrong label; 300 clean
  examples judge. Batches are ``(images, labels)``.
  """
  from sklearn.datasets import load_digits

  everything: Any = load_digits()
  images = np.asarray(everything.data / 16, np.float32)
  labels = np.asarray(everything.target, np.int32)
  rng = np.random.default_rng(100)
  train, val, _ = np.split(rng.permutation(len(labels)), [1000, 1300])
  wrong = rng.permutation(1000)[:500]
  noisy, shift = labels[train], rng.integers(1, 10, 1000, dtype=np.int32)
  noisy[wrong] = (noisy + shift)[wrong] % 10

  def losses(y, batch):
    images, labels = batch
    logits = y["w"] @ images.T + y["b"][:, None]  # Faster than with the classes behind, on CPUs.
    one_hot = jax.nn.one_hot(labels, 10, axis=0)
    return jax.nn.logsumexp(logits, axis=0) - jnp.sum(logits * one_hot, axis=0)

  def inner_loss(x, y, batch):
    return jnp.mean(jax.nn.sigmoid(x) * losses(y, batch)) + 1e-3 * jnp.sum(y["w"] ** 2)

  def outer_loss(x, y, batch):
    del x  # The weights matter through y alone.
    return jnp.mean(losses(y, batch))

  rng = np.random.default_rng(0)
  x, drift = (jnp.asarray(rng.normal(size=1000), jnp.float32) for _ in range(2))
  return Problem(
    "hyper-cleaning of digits, p = 1000, d = 650",
    inner_loss,
    outer_loss,
    optax.sgd(1.0, 0.9),
    20,
    1.0,
    x,
    0.02 * drift,
    {"w": jnp.zeros((10, 64)), "b": jnp.zeros(10)},
    *jax.device_put(((images[train], noisy), (images[val], labels[val]))),
  )


def exact_hypergradient(problem: Problem) -> np.ndarray:
  """The hypergradient at the inner minimum, by Newton's method and dense least squares in float64.

  Least squares because softmax regression has a flat direction, which the outer loss ignores.
  """
  with jax.enable_x64(True):
    x, y0, train, val = jax.tree.map(
      lambda leaf: leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf,
      (problem.x, problem.y0, problem.train, problem.val),
    )
    flat, unravel = jax.flatten_util.ravel_pytree(y0)
    inner_grad = jax.grad(lambda y, x: problem.inner_loss(x, unravel(y), train))
    newton = jax.jit(lambda y: (inner_grad(y, x), jax.jacfwd(inner_grad)(y, x)))
    for _ in range(30):
      grad, hessian = newton(flat)
      flat = flat - np.linalg.lstsq(hessian, grad, rcond=1e-12)[0]
    if np.linalg.norm(newton(flat)[0]) > 1e-10:
      raise RuntimeError(f"Newton's method did not converge on {problem.name}")
    outer = jax.grad(lambda x, y: problem.outer_loss(x, unravel(y), val), argnums=(0, 1))
    outer_grad, b = outer(x, flat)
    solution = np.linalg.lstsq(newton(flat)[1], b, rcond=1e-12)[0]
    mixed = jax.grad(lambda x: jnp.vdot(inner_grad(flat, x), solution))(x)
    return np.asarray(outer_grad - mixed)
