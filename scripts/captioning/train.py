"""Captioners at work: a step that all seeds share, and what is measured on the way."""

from typing import Any

import jax
import jax.numpy as jnp

from scripts.captioning.config import Settings
from scripts.captioning.files import Files
from scripts.captioning.model import (
  Asked,
  State,
  Told,
  as_batch,
  init_state,
  make_optimizer,
  make_step,
)
from scripts.captioning.shapes import Shapes
from scripts.common import devices
from scripts.common.devices import Devices
from scripts.common.task import Program, Row, Spent, Task


class Captioner:
  """A captioner of the images of a source, compiled once for all seeds.

  Raises ``ValueError`` if it cannot be trained.

  Attributes:
    source: of images and captions.
    settings: sizes and rates.
    init: ``init(key)``, where training starts.
    program: a step of training.
    ask: what it can be asked.
  """

  def __init__(self, name: str, source: Shapes | Files, settings: Settings, where: Devices):
    devices.check_divides("batch_size", settings.batch_size)
    self.source, self.settings = source, settings
    self.ask = Asked(name, settings, source.vocabulary, source.beam_size, where)
    tx = make_optimizer(settings)
    train = make_step(self.ask.model, tx)

    def step(state, t, key_data, *batch):
      key = jax.random.fold_in(jax.random.wrap_key_data(key_data), t)
      images, tokens, key = source.draw(key, t, *batch)
      images, tokens = jax.lax.with_sharding_constraint((images, tokens), where.rows)
      return train(state, as_batch(images, tokens), key)

    begin = lambda key: init_state(self.ask.model, tx, settings, key)
    self.init = jax.jit(begin, out_shardings=where.everywhere)
    jax.eval_shape(self.init, jax.random.key(0))
    self.program = Program(step, out_shardings=where.everywhere)


class Training(Task):
  """A captioner on one seed."""

  def __init__(self, captioner: Captioner, seed: int):
    self._captioner, self._source = captioner, captioner.source
    self._key = jax.random.key_data(self._source.key(seed))
    self._batch, one_of_each_shape = self._source.batches(seed)
    self.state = captioner.init(jax.random.key(seed))
    for batch in one_of_each_shape:
      captioner.program.compile(self.state, self._key, *batch)

  def step(self, state: State, t: int) -> tuple[State, Told]:
    """Trains on the captions whose turn it is."""
    arguments = self._key, *self._batch(t)
    return self._captioner.program.compile(state, *arguments)(state, jnp.int32(t), *arguments)

  def evaluate(self, state: State, told: list[Any]) -> Row:
    """The last loss, and the largest norm of a gradient since the line before."""
    validation = self._source.validation(self._captioner.ask, state.params)
    norm = max(float(one.grad_norm) for one in told)
    return {"train_loss": float(told[-1].loss), "grad_norm": norm, "validation_nll": validation}

  def result(self, state: State, spent: Spent) -> Row:
    """The scores on the test set."""
    scores = self._source.test(self._captioner.ask, state.params)
    return scores | {"ms_per_step": 1e3 * spent.seconds / self._captioner.settings.steps}
