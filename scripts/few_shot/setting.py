"""The setting of few-shot learning: sizes and rates, episodes, and keys for all that is random."""

import dataclasses
import enum
from collections.abc import Callable

import jax

from jaxbo.tasks import Episode, sample_episode


class Draw(enum.IntEnum):
  """What a run draws at random; each has a stream of keys of its own."""

  PARAMETERS = 0
  DIRECTIONS = 1
  TRAINING = 2
  VALIDATION = 3
  TEST = 4


def draw_key(draw: Draw, seed: int = 0) -> jax.Array:
  """The root of the stream of keys for ``draw``: no two of them share a key."""
  return jax.random.fold_in(jax.random.key(seed), draw)


@dataclasses.dataclass(frozen=True)
class Settings:
  """Sizes and rates; the defaults are for Omniglot.

  Attributes:
    num_ways: classes of an episode.
    num_shots: support images of a class.
    num_queries: query images of a class.
    num_rotations: quarter turns that make classes of their own.
    num_tasks: tasks of a meta-step.
    inner_steps: steps of SGD on the head.
    inner_learning_rate: of them.
    momentum: of them.
    ridge: the factor of half the squared head.
    outer_learning_rate: of Adam, on the backbone; it falls to a tenth along a cosine.
    num_samples: directions of ESJ on features, for each task.
    num_samples_plain: directions of ESJ on all parameters.
    smoothing: radius of ESJ on features.
    smoothing_plain: radius of ESJ on all parameters.
    response_scale: of the shrunk ESJ on features; the best is about ``num_samples`` over the number
      of features of a support set.
    linear_steps: of conjugate gradient.
    maml_steps: inner steps of MAML, on all parameters.
    maml_learning_rate: of them.
  """

  num_ways: int = 5
  num_shots: int = 5
  num_queries: int = 5
  num_rotations: int = 4
  num_tasks: int = 4
  inner_steps: int = 50
  inner_learning_rate: float = 0.01
  momentum: float = 0.9
  ridge: float = 0.2
  outer_learning_rate: float = 3e-3
  num_samples: int = 256
  num_samples_plain: int = 8
  smoothing: float = 1e-2
  smoothing_plain: float = 1e-2
  response_scale: float = 0.16
  linear_steps: int = 10
  maml_steps: int = 1
  maml_learning_rate: float = 0.4


def sampler(settings: Settings, num_rotations: int, batch: int) -> Callable[..., Episode]:
  """``sample(key, classes) -> episodes``, a batch of them."""

  def sample(key, classes):
    def one(key):
      return sample_episode(
        key,
        classes.images,
        counts=classes.counts,
        num_ways=settings.num_ways,
        num_shots=settings.num_shots,
        num_queries=settings.num_queries,
        num_rotations=num_rotations,
      )

    return jax.vmap(one)(jax.random.split(key, batch))

  return sample
