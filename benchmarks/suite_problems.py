"""Bilevel problems on finite sums, for :mod:`benchmarks.bilevel_suite`, and their exact values."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbo import conjugate_gradient


class FiniteSum(NamedTuple):
  """A bilevel problem whose losses are means over examples; what is an array is float32.

  Attributes:
    name: for the table.
    inner_loss: ``inner_loss(x, y, batch)``, the mean over the examples of a batch.
    outer_loss: ``outer_loss(x, y, batch)``, likewise.
    train: examples of the inner loss, leaves ``[n, ...]``.
    val: examples of the outer loss, leaves ``[m, ...]``.
    x: where the outer parameters start.
    y: where the inner parameters start.
    sizes: examples in a minibatch, of either loss.
    averaged: whether the losses are linear in the examples, so that their mean stands for all.
  """

  name: str
  inner_loss: Callable[..., jax.Array]
  outer_loss: Callable[..., jax.Array]
  train: Any
  val: Any
  x: Any
  y: Any
  sizes: tuple[int, int]
  averaged: bool = False


def num_examples(data: Any) -> int:
  """The length of the leading axis."""
  return jax.tree.leaves(data)[0].shape[0]


def quadratic(
  seed: int, n: int = 1024, d: int = 100, p: int = 10, batch_size: int = 64
) -> FiniteSum:
  """Random quadratics: 1,024 samples of either loss, 100 inner and 10 outer variables.

  The Hessian of a sample has rank one; on average the eigenvalues go from 0.1 to 1.
  """
  rng = np.random.default_rng(seed)

  def squares(size, low):
    basis = np.linalg.qr(rng.normal(size=(size, size)))[0]
    root = (basis * np.sqrt(np.geomspace(low, 1, size))) @ basis.T
    rows = rng.normal(size=(n, size)) @ root
    return rows[:, :, None] * rows[:, None, :]

  def coupling():
    left, right = (np.linalg.qr(rng.normal(size=(size, p)))[0] for size in (p, d))
    mix = (right * np.geomspace(0.01, 0.1, p)) @ left.T
    ones = rng.normal(size=(n, p))
    return np.einsum("nd,np->ndp", ones @ mix.T, ones)

  def inner_loss(x, y, batch):
    hessian, cross, linear = batch
    per_sample = 0.5 * jnp.einsum("nde,e->nd", hessian, y) + cross @ x + linear
    return jnp.mean(per_sample @ y)

  def outer_loss(x, y, batch):
    hessian, cross, linear, of_x, linear_x = batch
    per_sample = 0.5 * jnp.einsum("nde,e->nd", hessian, y) + cross @ x + linear
    direct = 0.5 * jnp.einsum("npq,q->np", of_x, x) + linear_x
    return jnp.mean(per_sample @ y + direct @ x)

  train = squares(d, 0.1), coupling(), rng.normal(size=(n, d))
  val = squares(d, 0.1), coupling(), rng.normal(size=(n, d)), squares(p, 0.1)
  train, val = as_float32((train, (*val, rng.normal(size=(n, p)))))
  x, y = as_float32((rng.normal(size=p), rng.normal(size=d)))
  sizes = (batch_size, batch_size)
  return FiniteSum("quadratics", inner_loss, outer_loss, train, val, x, y, sizes, averaged=True)


def as_float32(tree: Any) -> Any:
  """NumPy arrays as float32."""
  return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), tree)


@functools.cache
def images() -> tuple[np.ndarray, np.ndarray]:
  """The images of MNIST, ``[60000, 28, 28]`` in ``[0, 1]``, and their digits."""
  import os

  import tensorflow_datasets as tfds

  source: Any = tfds.data_source("mnist", data_dir=os.environ["TFDS_DATA_DIR"], split="train")
  examples = [source[i] for i in range(len(source))]
  rows = np.stack([one["image"] for one in examples]).reshape(len(examples), 28, 28) / 255.0
  return rows, np.array([one["label"] for one in examples])


def components(rows: np.ndarray, size: int) -> np.ndarray:
  """The leading principal components, each of variance one."""
  flat = rows.reshape(len(rows), -1)
  flat = flat - flat.mean(0)
  vectors = np.linalg.eigh(flat.T @ flat)[1][:, ::-1][:, :size]
  features = flat @ vectors
  return features / features.std(0)


def selection(
  name: str, features: np.ndarray, labels: np.ndarray, seed: int, n: int, m: int, size: int
) -> FiniteSum:
  """Regularisation selection: a penalty for each feature of (multinomial) logistic regression."""
  rng = np.random.default_rng(seed)
  rows = rng.permutation(len(labels))[: n + m]
  num_classes = int(labels.max()) + 1
  # One logit for two classes. Classes lead: with classes behind, CPUs take several times as long.
  num_logits = num_classes if num_classes > 2 else 1

  def loss(y, batch):
    features, labels = batch
    logits = y @ features.T
    if num_logits == 1:
      return jnp.mean(jax.nn.softplus(-(2 * labels - 1) * logits[0]))
    one_hot = jnp.arange(num_classes)[:, None] == labels[None]
    return jnp.mean(jax.nn.logsumexp(logits, axis=0) - jnp.sum(logits * one_hot, axis=0))

  def inner_loss(x, y, batch):
    return loss(y, batch) + 0.5 * jnp.sum(jnp.exp(x)[None] * y**2)

  def outer_loss(x, y, batch):
    del x
    return loss(y, batch)

  data = features[rows], labels[rows]
  train, val = ([leaf[part] for leaf in data] for part in (slice(n), slice(n, n + m)))
  train, val = as_float32((tuple(train), tuple(val)))
  x, y = as_float32((np.full(features.shape[1], -2.0), np.zeros((num_logits, features.shape[1]))))
  return FiniteSum(name, inner_loss, outer_loss, train, val, x, y, (size, size))


def ijcnn1_like(seed: int) -> FiniteSum:
  """22 features, two classes, 49,920 examples: even digits of MNIST, by principal components."""
  rows, labels = images()
  return selection("ijcnn1-like", components(rows, 22), labels % 2, seed, 49_920, 9_984, 64)


def covtype_like(seed: int) -> FiniteSum:
  """54 features, seven classes: MNIST's digits below seven, by principal components."""
  rows, labels = images()
  keep = labels < 7
  features = components(rows[keep], 54)
  return selection("covtype-like", features, labels[keep], seed, 8_192, 2_048, 64)


def cleaning(seed: int, wrong: float = 0.5) -> FiniteSum:
  """Data cleaning: a weight for each of 2,048 digits of MNIST, half of which have a random label.

  Softmax regression on images of 14 x 14 pixels, with the penalty of the standard benchmark.
  """
  rng = np.random.default_rng(seed)
  rows, labels = images()
  n, m = 2_048, 1_024
  which = rng.permutation(len(rows))[: n + m]
  features = rows[which].reshape(n + m, 14, 2, 14, 2).mean((2, 4)).reshape(n + m, -1)
  features = (features - features[:n].mean(0)) / (features[:n].std(0) + 0.1)
  classes = labels[which]
  noisy = rng.random(n) < wrong
  classes[:n][noisy] = rng.integers(0, 10, np.count_nonzero(noisy))

  def losses(y, features, labels):
    logits = y @ features.T
    one_hot = jnp.arange(10)[:, None] == labels[None]
    return jax.nn.logsumexp(logits, axis=0) - jnp.sum(logits * one_hot, axis=0)

  def inner_loss(x, y, batch):
    features, labels, number = batch
    weights = jax.nn.sigmoid(jnp.asarray(x)[number])
    return jnp.mean(weights * losses(y, features, labels)) + 0.2 * jnp.sum(y**2)

  def outer_loss(x, y, batch):
    del x
    return jnp.mean(losses(y, *batch))

  train = *as_float32((features[:n], classes[:n])), np.arange(n, dtype=np.int32)
  val = as_float32((features[n:], classes[n:]))
  x, y = as_float32((np.zeros(n), np.zeros((10, features.shape[1]))))
  return FiniteSum("data cleaning", inner_loss, outer_loss, train, val, x, y, (64, 64))


PROBLEMS = {
  "quadratics": quadratic,
  "ijcnn1-like": ijcnn1_like,
  "covtype-like": covtype_like,
  "data cleaning": cleaning,
}


def exact(problem: FiniteSum) -> Callable[..., tuple[Any, Any, Any]]:
  """``at(x, y) -> (gradient of F, inner solution, F)`` in float64, by Newton's method.

  ``y`` is where Newton's method begins.
  """
  mean = lambda leaf: np.mean(leaf, 0, np.float64, keepdims=True) if problem.averaged else leaf
  wide = lambda leaf: leaf if np.issubdtype(leaf.dtype, np.integer) else leaf.astype(np.float64)
  train, val = jax.tree.map(lambda leaf: wide(mean(leaf)), (problem.train, problem.val))
  solve = conjugate_gradient(300, tolerance=1e-9)

  @jax.jit
  def hypergradient(x, y, train, val):
    gradient = lambda y: jax.grad(problem.inner_loss, 1)(x, y, train)
    norm = lambda tree: jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)))
    scale = norm(gradient(jax.tree.map(jnp.zeros_like, y)))

    def newton(carry):
      y, slope, count = carry
      product = jax.linearize(gradient, y)[1]
      step, _ = solve(product, slope, jax.tree.map(jnp.zeros_like, y))
      # A short first step where Newton's model is far off: halved until the gradient falls.
      tries = [jax.tree.map(lambda a, b, s=s: a - s * b, y, step) for s in (1.0, 0.3, 0.1)]
      norms = jnp.stack([norm(gradient(one)) for one in tries])
      y = jax.tree.map(lambda *leaves: jnp.stack(leaves)[jnp.nanargmin(norms)], *tries)
      return y, gradient(y), count + 1

    goes_on = lambda carry: (norm(carry[1]) > 1e-10 * scale) & (carry[2] < 30)
    y = jax.lax.while_loop(goes_on, newton, (y, gradient(y), 0))[0]
    value, (of_x, of_y) = jax.value_and_grad(problem.outer_loss, (0, 1))(x, y, val)
    product = jax.linearize(gradient, y)[1]
    v, _ = solve(product, of_y, jax.tree.map(jnp.zeros_like, y))
    cross = jax.vjp(lambda x: jax.grad(problem.inner_loss, 1)(x, y, train), x)[1](v)[0]
    return jax.tree.map(jnp.subtract, of_x, cross), y, value

  def in_float64(x, y):
    with jax.enable_x64(True):
      x, y = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (x, y))
      return jax.device_get(hypergradient(x, y, train, val))

  return in_float64


def curvature(problem: FiniteSum, at: Callable[..., Any]) -> tuple[float, float]:
  """The largest curvatures at the start: of the inner loss in y, and of F in x by differences.

  ``at`` is :func:`exact` of the problem.
  """
  x, y = problem.x, problem.y

  @jax.jit
  def product(v, train):
    return jax.jvp(lambda y: jax.grad(problem.inner_loss, 1)(x, y, train), (y,), (v,))[1]

  rng = np.random.default_rng(0)
  v = rng.normal(size=y.shape).astype(np.float32)
  for _ in range(30):
    v = np.asarray(product(v / np.linalg.norm(v), problem.train))
  inner = float(np.linalg.norm(v))
  base, y, _ = at(x, y)
  v = rng.normal(size=x.shape)
  for _ in range(5):
    v = v / np.linalg.norm(v)
    v = (at(x + 1e-3 * v, y)[0] - base) / 1e-3
  return inner, float(np.linalg.norm(v))
