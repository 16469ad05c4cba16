"""The setting of few-shot learning: sizes and rates, episodes, and keys for all that is random."""

import dataclasses
import enum
import functools
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
  """Sizes and rates; the defaults are for Omniglot."""

  num_ways: int = 5  # Classes of an episode.
  num_shots: int = 5  # Support images of a class.
  num_queries: int = 5  # Query images of a class.
  num_rotations: int = 4  # Quarter turns that make classes of their own.
  num_tasks: int = 4  # Of a meta-step.
  inner_steps: int = 50  # Steps of SGD on the head.
  inner_learning_rate: float = 0.01
  momentum: float = 0.9
  ridge: float = 0.2  # The factor of half the squared head.
  outer_learning_rate: float = 3e-3  # Of Adam; it falls to a tenth along a cosine.
  num_samples: int = 256  # Directions of ESJ on features, for each task.
  num_samples_plain: int = 8  # Directions of ESJ on all parameters.
  smoothing: float = 1e-2  # Radius of ESJ on features.
  smoothing_plain: float = 1e-2  # Radius of ESJ on all parameters.
  smoothing_official: float = 0.1  # Radius of the published code, for each tensor.
  # Of the shrunk ESJ; the best is about num_samples over the features of a support set.
  response_scale: float = 0.16
  linear_steps: int = 10  # Of conjugate gradient.
  maml_steps: int = 1  # Inner steps of MAML, on all parameters.
  maml_learning_rate: float = 0.4


def sampler(settings: Settings, num_rotations: int, batch: int) -> Callable[..., Episode]:
  """``sample(key, classes) -> episodes``, a batch of them."""
  sizes = {name: getattr(settings, name) for name in ("num_ways", "num_shots", "num_queries")}
  one = functools.partial(sample_episode, **sizes, num_rotations=num_rotations)

  def sample(key, classes):
    of_key = lambda key: one(key, classes.images, counts=classes.counts)
    return jax.vmap(of_key)(jax.random.split(key, batch))

  return sample
