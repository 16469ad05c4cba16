"""Few-shot learning by a linear head on features: what ``es_response`` and ``resnet12`` measure."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxbo_models import linear_head

import jaxbo
from jaxbo.tasks import Episode, sample_episode


class Setting(NamedTuple):
  """Sizes of a meta-step.

  Attributes:
    num_ways: classes of an episode.
    num_shots: support images of a class.
    num_queries: query images of a class.
    num_tasks: episodes of a meta-step.
    inner_steps: steps of SGD on the head.
    ridge: the factor of half the squared head.
  """

  num_ways: int = 5
  num_shots: int = 5
  num_queries: int = 5
  num_tasks: int = 4
  inner_steps: int = 50
  ridge: float = 0.2


def sample_episodes(key: jax.Array, images: jax.Array, setting: Setting) -> Episode:
  """The episodes of a meta-step, of ``images`` ``[classes, per_class, ...]``."""
  sizes = {name: getattr(setting, name) for name in ("num_ways", "num_shots", "num_queries")}
  keys = jax.random.split(key, setting.num_tasks)
  return jax.vmap(lambda key: sample_episode(key, images, **sizes))(keys)


def features_of(model: Any) -> Callable[[Any, jax.Array], jax.Array]:
  """``features(x, images)`` of uint8 pixels."""
  return lambda x, images: model.apply(x, images.astype(jnp.float32) / 255)


def logits_of(features: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """``logits(x, head, images)`` of a head on features."""
  return lambda x, head, images: linear_head.logits(head, features(x, images))


def head_solver(features: Callable[..., jax.Array], setting: Setting) -> jaxbo.InnerSolver:
  """SGD on the head of one task; it sees the model through its features alone."""

  def loss(z, y, episode):
    fit = linear_head.cross_entropy(linear_head.logits(y, z), episode.support_labels)
    return fit + setting.ridge / 2 * optax.tree.norm(y, squared=True)

  return jaxbo.inner_solver(
    loss,
    optax.sgd(0.01, 0.9),
    setting.inner_steps,
    warm_start=False,
    through=lambda x, episode: features(x, episode.support_images),
  )


def query_loss(logits: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """The outer loss: the mean over tasks at ``logits(x, y, images)``."""

  def outer_loss(x, ys, episodes):
    of_task = lambda y, episode: linear_head.cross_entropy(
      logits(x, y, episode.query_images), episode.query_labels
    )
    return jnp.mean(jax.vmap(of_task)(ys, episodes))

  return outer_loss
