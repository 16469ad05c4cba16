"""Features with a linear head as a loss of outer and inner parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxbo_models import Conv4
from jaxbo_models.linear_head import cross_entropy, logits, zero_head

import jaxbo


class Params(NamedTuple):
  """The parameters of a classifier."""

  backbone: Any
  head: Any


class Model(NamedTuple):
  """A classifier whose inner parameters are an offset of all its parameters, or of the head."""

  init: Callable[[jax.Array], Params]  # of a key
  # loss(x, y, (images, labels)) -> (cross entropy, logits)
  loss: Callable[[Params, Any, Any], tuple[jax.Array, jax.Array]]
  start: Callable[[Params], Any]  # start(x) -> y, zeros

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


def _with_head(init_backbone, features_of, size: int, num_ways: int, adapt: str) -> Model:
  def init(key):
    weights = init_backbone(key)
    features = jax.eval_shape(features_of, weights, jnp.zeros((2, size, size, 1)))
    return Params(weights, zero_head(features.shape[-1], num_ways))

  def loss(x, y, batch):
    images, labels = batch
    add = optax.tree.add
    weights, head = add(x, y) if adapt == "all" else Params(x.backbone, add(x.head, y))
    z = logits(head, features_of(weights, images.astype(jnp.float32) / 255))
    return cross_entropy(z, labels), z

  start = lambda x: optax.tree.zeros_like(x if adapt == "all" else x.head)
  return Model(init, loss, start)


def accuracy(logits: jax.Array, batch: Any) -> jax.Array:
  """The share of the images that are classified correctly."""
  return jnp.mean(jnp.argmax(logits, axis=-1) == batch[1], dtype=jnp.float32)
