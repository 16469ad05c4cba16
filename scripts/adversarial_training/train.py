"""Trains one classifier by one adversarial method, on all devices; an epoch is one program.

Images and parameters are on every device, a batch is divided among them. Weights are those of the
whole batch: under ``jit``, sums over a divided batch are global.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbo
from scripts.adversarial_training import augmentation
from scripts.adversarial_training import data as adv_data
from scripts.adversarial_training.data import Images
from scripts.adversarial_training.methods import Method, Setting
from scripts.common.checkpoints import Checkpoints
from scripts.common.devices import Devices


class State(NamedTuple):
  """What a step takes over from the last one.

  Attributes:
    params: of the model.
    opt_state: of the weighting and the optimizer.
    num_done: the steps so far, int32.
  """

  params: Any
  opt_state: Any
  num_done: Any


class Told(NamedTuple):
  """What an epoch tells: means over its steps.

  Attributes:
    loss: of adversarial examples, unweighted.
    ess: the effective sample size, as a share of the batch.
  """

  loss: Any
  ess: Any


def as_floats(images: jax.Array) -> jax.Array:
  """Pixels in [0, 1]."""
  return images.astype(jnp.float32) / 255


class Program:
  """A method, compiled once for all seeds and training sets, when the first of them wants an epoch.

  Attributes:
    init: ``init(params) -> State``, from a copy of ``params``.
  """

  def __init__(
    self,
    method: Method,
    setting: Setting,
    epsilon_rise: float,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    augment: bool,
    devices: Devices,
  ):
    weighting = method.make(setting).weighting
    tx: Any = optax.chain(jaxbo.reweight(weighting), optimizer)
    num_rising = max(1.0, epsilon_rise * num_steps)

    def init(params):
      return State(jax.tree.map(jnp.copy, params), tx.init(params), jnp.int32(0))

    def step(state, rows, pool, stream):
      batch_key = jax.random.fold_in(jax.random.wrap_key_data(stream), state.num_done)
      crop_key, flip_key, key = jax.random.split(batch_key, 3)
      images, labels = pool.images[rows], pool.labels[rows]
      if augment:
        images = augmentation.random_flip(flip_key, augmentation.random_crop(crop_key, images))
      batch = jax.lax.with_sharding_constraint((as_floats(images), labels), devices.rows)
      risen = jnp.minimum((state.num_done + 1) / num_rising, 1)
      parts = method.make(setting._replace(epsilon=setting.epsilon * risen))
      progress = state.num_done / num_steps
      grads, extra = parts.gradients(state.params, batch, key, progress)
      updates, opt_state = tx.update(grads, state.opt_state, state.params, **extra)
      told = Told(jnp.mean(grads.losses), opt_state[0].info.effective_sample_size / rows.size)
      params = optax.apply_updates(state.params, updates)
      return State(params, opt_state, state.num_done + 1), told

    def epoch(state, order, pool, stream):
      state, told = jax.lax.scan(lambda state, rows: step(state, rows, pool, stream), state, order)
      return state, jax.tree.map(jnp.mean, told)

    self.init = jax.jit(init, out_shardings=devices.everywhere)
    self._epoch = jax.jit(epoch, donate_argnums=0, out_shardings=devices.everywhere)
    self._compiled: dict[tuple[int, ...], Any] = {}

  def compile(self, state: State, order: jax.Array, pool: Images, stream: jax.Array) -> Any:
    """Returns ``epoch(state, order, pool, stream) -> (state, told)``, which takes the state over.

    ``pool`` holds the images, ``order`` the rows of the pool in each batch, and ``stream`` is raw
    key data.
    """
    if order.shape not in self._compiled:
      self._compiled[order.shape] = self._epoch.lower(state, order, pool, stream).compile()
    return self._compiled[order.shape]


class Trainer:
  """A run of a method: its state, its order of images, its checkpoints.

  Epoch ``e`` depends on the state, the stream and ``e`` alone: a restored run goes on bit for bit.
  Without a ``folder`` there are no checkpoints.
  """

  def __init__(
    self,
    program: Program,
    params: Any,
    pool: Images,
    rows: np.ndarray,
    batch_size: int,
    stream: tuple[int, int],
    folder: Path | None,
    devices: Devices,
  ):
    self.state = program.init(params)
    self.seconds = 0.0
    self._program = program
    self._pool = pool
    self._rows = rows
    self._batch_size = batch_size
    self._stream = stream
    self._devices = devices
    self.checkpoints = Checkpoints(folder)

  def restore(self) -> int:
    """Goes back to the last checkpoint if there is one; returns the epochs done."""
    self.state, self.seconds, done = self.checkpoints.restore(self.state)
    return done

  def close(self) -> None:
    """Waits until all checkpoints are written."""
    self.checkpoints.close()

  def fit(self, done: int, num_epochs: int) -> Iterator[tuple[int, Told]]:
    """Trains from epoch ``done`` on; yields the epochs done and what the last of them told.

    A checkpoint is written after what the caller does with it, so that nothing is left out when the
    run is stopped in between. ``seconds`` counts neither compilation nor what the caller does.
    """
    seed, of_set = self._stream
    stream = jax.random.key_data(jax.random.fold_in(jax.random.key(seed), of_set))
    stream = jax.device_put(stream, self._devices.everywhere)
    while done < num_epochs:
      order = adv_data.order_of_epoch(self._rows, self._batch_size, self._stream, done)
      order = jax.device_put(order.astype(np.int32), self._devices.everywhere)
      epoch = self._program.compile(self.state, order, self._pool, stream)
      start = time.perf_counter()
      self.state, told = epoch(self.state, order, self._pool, stream)
      jax.block_until_ready(self.state)
      self.seconds += time.perf_counter() - start
      done += 1
      yield done, jax.device_get(told)
      self.checkpoints.save(done, self.state, self.seconds)
