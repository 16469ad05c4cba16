"""Features with a linear head as a loss of outer and inner parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxbo_models import Conv4

import jaxbo


class Params(NamedTuple):
  """The parameters of a classifier."""

  backbone: Any
  head: Any


class Model(NamedTuple):
  """A classifier whose inner parameters are an offset of all its parameters, or of the head.

  Attributes:
    init: ``init(key) -> Params``, not trained.
    loss: ``loss(x, y, (images, labels)) -> (cross entropy, logits)``.
    start: ``start(x) -> y``, zeros.
  """

  init: Callable[[jax.Array], Params]
  loss: Callable[[Params, Any, Any], tuple[jax.Array, jax.Array]]
  start: Callable[[Params], Any]

  def inner(self, optimizer: optax.GradientTransformation, num_steps: int) -> jaxbo.InnerSolver:
    """The steps of a round."""
    return jaxbo.inner_solver(lambda x, y, batch: self.loss(x, y, batch)[0], optimizer, num_steps)


def conv4(width: int, size: int, num_ways: int, adapt: str = "all") -> Model:
  """Conv4 of ``width`` channels for images of ``size`` pixels; adapts all or the ``"head"``."""
  backbone = Conv4(width)
  init = lambda key: backbone.init(key, jnp.zeros((2, size, size, 1)))
  features = lambda weights, images: jnp.asarray(backbone.apply(weights, images))
  return _with_head(init, features, size, num_ways, adapt)


def stripes(size: int, num_ways: int, adapt: str = "all") -> Model:
  """Four numbers from the brightness of four stripes: says little, but compiles in no time."""
  init = lambda key: jax.random.normal(key, (4, 4))
  means = lambda images: images.reshape(len(images), 4, -1).mean(axis=2)
  features = lambda weights, images: jnp.tanh(means(images) @ weights)
  return _with_head(init, features, size, num_ways, adapt)


def _with_head(
  init_backbone: Callable[[jax.Array], Any],
  features_of: Callable[[Any, jax.Array], jax.Array],
  size: int,
  num_ways: int,
  adapt: str,
) -> Model:
  def init(key):
    weights = init_backbone(key)
    features = jax.eval_shape(features_of, weights, jnp.zeros((2, size, size, 1)))
    head = {"w": jnp.zeros((features.shape[-1], num_ways)), "b": jnp.zeros(num_ways)}
    return Params(weights, head)

  def loss(x, y, batch):
    images, labels = batch
    weights, head = (
      optax.tree.add(x, y) if adapt == "all" else Params(x.backbone, optax.tree.add(x.head, y))
    )
    features = features_of(weights, images.astype(jnp.float32) / 255)
    logits = features @ head["w"] + head["b"][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits

  start = lambda x: optax.tree.zeros_like(x if adapt == "all" else x.head)
  return Model(init, loss, start)


def accuracy(logits: jax.Array, batch: Any) -> jax.Array:
  """The share of the images that are classified correctly."""
  return jnp.mean(jnp.argmax(logits, axis=-1) == batch[1], dtype=jnp.float32)
