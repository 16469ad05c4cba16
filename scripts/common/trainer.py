"""Trains a few-shot method: the compiled step, evaluation on fixed episodes, checkpoints."""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxbo.tasks import Episode
from scripts.common import few_shot
from scripts.common.few_shot import Method
from scripts.common.few_shot_setting import Draw, Settings, draw_key, sampler
from scripts.common.fewshot_data import ImageClasses

EVALUATION_BATCH = 20


class Trainer:
  """A method with its state, its compiled step and evaluation, and its checkpoints.

  Step ``t`` depends on the state, the seed and ``t`` alone, so a restored run goes on bit for bit.
  """

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
    self.state = jax.jit(method.init)(first, self.train.images[0, :2])
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
    self.seconds = 0.0
    self.checkpoints = ocp.CheckpointManager(
      checkpoints.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
    )

  def restore(self) -> int:
    """Goes back to the last checkpoint if there is one; returns the steps done."""
    done = self.checkpoints.latest_step()
    if done is None:
      return 0
    like = {"state": jax.tree.map(np.asarray, self.state), "seconds": np.float64(0)}
    restored = self.checkpoints.restore(done, args=ocp.args.StandardRestore(like))
    self.state, self.seconds = jax.device_put(restored["state"]), float(restored["seconds"])
    return done

  def save(self, done: int) -> None:
    """Writes a checkpoint in the background, from a copy: the state will be donated."""
    copy = jax.tree.map(lambda leaf: np.array(leaf, copy=True), self.state)
    tree = {"state": copy, "seconds": np.float64(self.seconds)}
    self.checkpoints.save(done, args=ocp.args.StandardSave(tree))

  def fit(
    self,
    done: int,
    num_steps: int,
    eval_every: int,
    checkpoint_every: int,
    on_step: Callable[[int], None] = lambda done: None,
  ) -> Iterator[tuple[int, float]]:
    """Trains; yields ``(steps done, loss)`` where an evaluation is due.

    ``on_step`` is called with the number of steps that the device has finished.
    A checkpoint of such a step is written afterwards, so that no evaluation is left out when the
    run is stopped in between. ``seconds`` counts the training alone.
    """
    while done < num_steps:
      every = (eval_every, checkpoint_every)
      stop = min(num_steps, *((done // n + 1) * n for n in every))
      start, loss = time.perf_counter(), jnp.nan
      while done < stop:
        before = loss
        self.state, loss = self.compiled(self.state, jnp.int32(done), self.train)
        jax.block_until_ready(before)  # One step waits while another runs.
        on_step(done)
        done += 1
      loss = float(loss)  # Waits for the device.
      self.seconds += time.perf_counter() - start
      if done % eval_every == 0 or done == num_steps:
        yield done, loss
      if done % checkpoint_every == 0 or done == num_steps:
        self.save(done)

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
