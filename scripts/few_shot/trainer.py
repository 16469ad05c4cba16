"""Trains a few-shot method: the compiled step, evaluation on fixed episodes, checkpoints."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbo.tasks import Episode
from scripts.common.fewshot_data import ImageClasses
from scripts.common.resumable import Resumable
from scripts.few_shot import problem as few_shot
from scripts.few_shot.problem import Method
from scripts.few_shot.setting import Draw, Settings, draw_key, sampler

EVALUATION_BATCH = 20


class Trainer(Resumable):
  """A method with its state, its compiled step and evaluation, and its checkpoints."""

  def __init__(
    self, method: Method, settings: Settings, train: ImageClasses, seed: int, checkpoints: Path
  ):
    self.method = method
    self.train = jax.device_put(train)
    sample = sampler(settings, settings.num_rotations, settings.num_tasks)
    train_key = jax.random.key_data(draw_key(Draw.TRAINING, seed))

    def step(state, t, classes):
      key = jax.random.fold_in(jax.random.wrap_key_data(train_key), t)
      return method.step(state, sample(key, classes))

    first = draw_key(Draw.PARAMETERS, seed)
    super().__init__(jax.jit(method.init)(first, self.train.images[0, :2]), checkpoints)
    self.compiled = (
      jax.jit(step, donate_argnums=0).lower(self.state, jnp.int32(0), self.train).compile()
    )
    sample_evaluation = sampler(settings, 1, EVALUATION_BATCH)

    def evaluate(state, key, classes):
      episodes = sample_evaluation(key, classes)
      # One at a time: the activations of 20 episodes of ResNet-12 do not fit into 24 GiB.
      return jax.lax.map(lambda episode: few_shot.accuracy(method, state, episode), episodes)

    self._evaluate = jax.jit(evaluate)
    self._sample_evaluation = jax.jit(sample_evaluation)

  def advance(self, t: int) -> jax.Array:
    """Does meta-step ``t``; returns its loss."""
    self.state, loss = self.compiled(self.state, jnp.int32(t), self.train)
    return loss

  def first_episode(self, classes: Any, draw: Draw) -> Episode:
    """The first of the episodes that :meth:`accuracy` averages over."""
    episodes = self._sample_evaluation(evaluation_key(draw, 0), classes)
    return jax.tree.map(lambda leaf: leaf[0], episodes)

  def accuracy(self, classes: Any, num_episodes: int, draw: Draw) -> tuple[float, float]:
    """Mean accuracy over the episodes of ``draw``, and its 95 % confidence interval's half."""
    parts = [
      self._evaluate(self.state, evaluation_key(draw, i), classes)
      for i in range(-(-num_episodes // EVALUATION_BATCH))
    ]
    return interval(np.concatenate(parts)[:num_episodes])


def evaluation_key(draw: Draw, batch: int) -> jax.Array:
  """The key of a batch of evaluation episodes, the same in every run."""
  return jax.random.fold_in(draw_key(draw), batch)


def interval(accuracies: np.ndarray) -> tuple[float, float]:
  """The mean, and half the width of its 95 % confidence interval."""
  half = 1.96 * accuracies.std(ddof=1) / math.sqrt(len(accuracies)) if len(accuracies) > 1 else 0.0
  return float(accuracies.mean()), float(half)
