"""Trains a classifier by an adversarial method, on all devices; an epoch is one program.

Images and parameters are on every device, a batch is divided among them. Weights are those of the
whole batch: under ``jit``, sums over a divided batch are global.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxbo_models import SmallCNN

import jaxbo
from scripts.adversarial_training import augmentation, data
from scripts.adversarial_training.config import Config
from scripts.adversarial_training.data import SETS, Images
from scripts.adversarial_training.evaluate import Evaluator
from scripts.adversarial_training.methods import METHODS, Method, Rates, Setting
from scripts.common import devices
from scripts.common.devices import Devices
from scripts.common.study import Run
from scripts.common.task import Compiled, Program, Row, Spent


class State(NamedTuple):
  """What an epoch takes over from the last one."""

  params: Any
  opt_state: Any


class Told(NamedTuple):
  """Means over an epoch: losses of adversarial examples, and effective shares of the batch.

  ``clipped`` is the share of the images that are not in [0, 1], where attacks look for them.
  """

  loss: Any
  ess: Any
  clipped: Any


class Workplace:
  """What all runs share: images, the network, and what attacks it for the report."""

  def __init__(self, config: Config):
    self.config = config
    self.images = data.read(
      config.dataset, config.data_dir, config.validation_per_class, config.test_per_class
    )
    devices.check_divides("batch_size", size := config.batch_size)
    fewest = min(len(self.rows(kind, config.first_seed)) for kind in config.sets)
    if fewest < size:
      raise ValueError(f"batch_size must be at most {fewest}, the images for training; got {size}")
    self.devices = devices.all_devices()
    self.pool: Images = jax.device_put(self.images.pool, self.devices.everywhere)
    network = SmallCNN(len(self.images.names), config.widths, config.num_hidden)
    image = jnp.zeros((1, *self.pool.images.shape[1:]))
    self.init = jax.jit(lambda key: network.init(key, image), out_shardings=self.devices.everywhere)
    self.model: Any = network.apply
    self.evaluator = Evaluator(self.model, config, self.devices)

  def rows(self, kind: str, seed: int) -> np.ndarray:
    """Which rows of the pool a training set has."""
    return data.training_rows(self.images, kind, self.config.largest, self.config.ratio, seed)

  def setting(self, rates: Rates) -> Setting:
    """What methods are made from."""
    config = self.config
    return Setting(self.model, config.largest_change(), config.attack_steps, rates)


def make_program(
  method: Method, setting: Setting, config: Config, num_steps: int, everything: Devices
) -> tuple[Any, Program]:
  """The optimizer, and an epoch on ``(order, pool, stream)``.

  ``order`` has the rows of the pool in each batch, and ``stream`` is raw key data.
  """
  tx: Any = optax.chain(jaxbo.reweight(method.make(setting).weighting), config.optimizer(num_steps))
  num_rising = max(1.0, config.epsilon_rise * num_steps)

  def epoch(state, t, order, pool, stream):
    def step(state, numbered):
      num_done, rows = numbered
      batch_key = jax.random.fold_in(jax.random.wrap_key_data(stream), num_done)
      crop_key, flip_key, key = jax.random.split(batch_key, 3)
      images, labels = pool.take(rows)
      if config.augment():
        images = augmentation.random_flip(flip_key, augmentation.random_crop(crop_key, images))
      batch = jax.lax.with_sharding_constraint((data.as_floats(images), labels), everything.rows)
      risen = jnp.minimum((num_done + 1) / num_rising, 1)
      parts = method.make(setting._replace(epsilon=setting.epsilon * risen))
      grads, extra = parts.gradients(state.params, batch, key, num_done / num_steps)
      updates, opt_state = tx.update(grads, state.opt_state, state.params, **extra)
      ess = opt_state[0].info.effective_sample_size / rows.size
      told = Told(jnp.mean(grads.losses), ess, jnp.mean(setting.box.outside(batch[0])))
      return State(optax.apply_updates(state.params, updates), opt_state), told

    numbers = t * len(order) + jnp.arange(len(order), dtype=jnp.int32)
    state, told = jax.lax.scan(step, state, (numbers, order))
    return state, jax.tree.map(jnp.mean, told)

  return tx, Program(epoch, out_shardings=everything.everywhere)


class Training(Compiled):
  """A method on a training set of a seed; a step is an epoch."""

  def __init__(self, run: Run[Config], kind: str, method: str, seed: int, rates: Rates):
    place, config = run.data, run.config
    self.config, self.place = config, place
    self._rows, self._stream = place.rows(kind, seed), (seed, list(SETS).index(kind))
    num_steps = config.epochs * (len(self._rows) // config.batch_size)
    tx, program = run.shared(
      (method, rates, num_steps),
      lambda: make_program(METHODS[method], place.setting(rates), config, num_steps, place.devices),
    )
    params = place.init(jax.random.key(seed))
    stream = jax.random.key_data(jax.random.fold_in(jax.random.key(seed), self._stream[1]))
    state, where = State(params, tx.init(params)), place.devices.everywhere
    super().__init__(program, state, self._order(0), place.pool, stream, where=where)

  def _order(self, t: int) -> jax.Array:
    order = data.order_of_epoch(self._rows, self.config.batch_size, self._stream, t)
    return jax.device_put(order.astype(np.int32), self.place.devices.everywhere)

  def step(self, state: State, t: int) -> tuple[State, Told]:
    """Trains for epoch ``t``, in an order of its own."""
    self.data = (self._order(t), *self.data[1:])
    return super().step(state, t)

  def evaluate(self, state: State, told: list[Told]) -> Row:
    """How the epoch went, and accuracy on clean images."""
    clean = self.place.evaluator.accuracy(state.params, self.place.images.validation)
    loss, ess, clipped = map(float, told[-1])
    return {"train_loss": loss, "ess": ess, "clipped": clipped, "validation_clean": clean}

  def result(self, state: State, spent: Spent) -> Row:
    """What the network withstands."""
    images, evaluator = self.place.images, self.place.evaluator
    row = evaluator.of_test(state.params, images.test, images.names)
    row |= evaluator.of_losses(state.params, images.test, images.validation)
    return row | {"seconds_per_epoch": spent.seconds / self.config.epochs}


class Trial(Training):
  """A candidate; nothing is seen of the test set."""

  def result(self, state: State, spent: Spent) -> Row:
    """What it is chosen by."""
    images = self.place.images
    return self.place.evaluator.of_test(state.params, images.validation, images.names)
