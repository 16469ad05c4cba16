r"""The problem: which sources of labels to trust, for three kinds of inner runs.

Training labels come from :math:`p` sources, each with as many examples. Half of the sources confuse
each class with the next one. A source has one outer variable, the logit of its weight; a model is
trained on the weighted examples, and judged on others that are clean:

.. math::
  \min_x \frac{1}{|V|} \sum_{j \in V} \ell_j(y^N(x)), \qquad
  g(x, y) = \frac1n \sum_{i=1}^n \sigma(x_{k(i)})\, \ell_i(y) + \frac\rho2 \|W_y\|^2

*smooth*: 1,000 steps of gradient descent with momentum on softmax regression, from zero; they do
not converge. *quantised*: the same, but every step ends with all weights on a grid, rounded up or
down at random so that the mean is right. The derivative of that is zero wherever there is one.
*svm*: scikit-learn's support vector machines, one for each class, on the host.

Reference for rounding: Gupta et al., `Deep Learning with Limited Numerical Precision
<https://arxiv.org/abs/1502.02551>`_, 2015.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbo
from scripts.common.data import Examples

NUM_PIXELS, NUM_CLASSES = 64, 10


@dataclasses.dataclass(frozen=True)
class Settings:
  """Sizes and rates."""

  num_train: int = 192
  num_val: int = 200
  wrong: float = 0.9  # The share of wrong labels in a bad source.
  ridge: float = 1e-3
  inner_steps: int = 1000
  inner_learning_rate: float = 0.02
  momentum: float = 0.9
  grid: float = 2.0**-6  # The distance of quantised weights.
  svm_cost: float = 10.0  # C.
  svm_gamma: float = 0.1
  svm_slope: float = 4.0  # Logits are this times the margins.


class Data(NamedTuple):
  """The digits of one seed."""

  train: Examples  # From sources of equal size, one after the other.
  val: Examples  # Clean, of the outer loss.
  test: Examples  # Clean, for reports alone.


def split(digits: Examples, settings: Settings, num_sources: int, seed: int) -> Data:
  """Draws who is in which part, which sources are bad, and which of their labels are wrong."""
  rng = np.random.default_rng(seed)
  ends = [settings.num_train, settings.num_train + settings.num_val]
  order = np.split(rng.permutation(len(digits.labels)), ends)
  train, val, test = (digits.take(part) for part in order)
  bad = sources(bad_sources(num_sources, seed), settings.num_train)
  wrong = bad & (rng.random(settings.num_train) < settings.wrong)
  labels = ((train.labels + wrong) % NUM_CLASSES).astype(np.int32)
  return Data(train._replace(labels=labels), val, test)


def bad_sources(num_sources: int, seed: int) -> np.ndarray:
  """Which sources are bad, bool ``[num_sources]``: half of them."""
  return np.random.default_rng((seed, 1)).permutation(num_sources) < num_sources // 2


def sources(values: Any, num_train: int) -> Any:
  """What each source has, for each of its examples."""
  return values[np.arange(num_train) * len(values) // num_train]


def logits(y: Any, images: Any) -> jax.Array:
  """Of softmax regression, ``[10, n]``: classes first, which CPUs want."""
  return y["w"] @ images.T + y["b"][:, None]


def cross_entropies(logits: Any, labels: Any) -> jax.Array:
  """Of logits ``[10, n]``, ``[n]``."""
  right = jnp.sum(jnp.where(jnp.arange(NUM_CLASSES)[:, None] == labels[None], logits, 0), axis=0)
  return jax.nn.logsumexp(logits, axis=0) - right


def init_params() -> Any:
  """Where training starts."""
  return {"w": jnp.zeros((NUM_CLASSES, NUM_PIXELS)), "b": jnp.zeros(NUM_CLASSES)}


def outer_loss(x: Any, y: Any, data: Data) -> jax.Array:
  """The mean on clean examples."""
  del x
  return cross_entropies(logits(y, data.val.images), data.val.labels).mean()


def stochastic_rounding(
  grid: float, *, straight_through: bool = False
) -> optax.GradientTransformation:
  """Moves what was updated to a multiple of ``grid``: up or down at random, right in the mean.

  ``straight_through`` differentiates as if nothing was rounded.
  """

  def init(params):
    del params
    return jnp.int32(0)

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    moved = optax.apply_updates(params, updates)
    shift = optax.tree.random_like(jax.random.key(state), params, jax.random.uniform)
    rounded = jax.tree.map(lambda v, s: jnp.floor(v / grid + s) * grid, moved, shift)
    if straight_through:
      rounded = jax.tree.map(lambda r, v: v + jax.lax.stop_gradient(r - v), rounded, moved)
    return optax.tree.sub(rounded, params), state + 1

  return optax.GradientTransformation(init, update)


def solver(
  settings: Settings, *, quantised: bool, straight_through: bool = False, remat: bool = False
) -> jaxbo.InnerSolver:
  """Training from where it starts, the whole of it for each outer step."""

  def inner_loss(x, y, data):
    images, labels = data.train
    weights = sources(jax.nn.sigmoid(x), settings.num_train)
    fit = jnp.mean(weights * cross_entropies(logits(y, images), labels))
    return fit + settings.ridge / 2 * jnp.sum(y["w"] ** 2)

  optimizer = optax.sgd(settings.inner_learning_rate, settings.momentum)
  if quantised:
    rounding = stochastic_rounding(settings.grid, straight_through=straight_through)
    optimizer = optax.chain(optimizer, rounding)
  return jaxbo.inner_solver(
    inner_loss, optimizer, settings.inner_steps, warm_start=False, remat=remat
  )


def svm_logits(settings: Settings, x: Any, train: Examples, images: np.ndarray) -> np.ndarray:
  """Logits ``[10, n]`` of ``images`` by scikit-learn, trained on ``train``."""
  from sklearn.metrics.pairwise import rbf_kernel
  from sklearn.svm import SVC

  weights = sources(1 / (1 + np.exp(-np.asarray(x, np.float64))), settings.num_train)
  of = lambda images: rbf_kernel(images, train.images, gamma=settings.svm_gamma)
  inside, outside = of(train.images), of(images)
  machine = SVC(C=settings.svm_cost, kernel="precomputed")
  fit = lambda k: machine.fit(inside, train.labels == k, weights).decision_function(outside)
  margins = np.stack([fit(k) for k in range(NUM_CLASSES)])
  return (settings.svm_slope * margins).astype(np.float32)
