"""Adversarial training with every method, training set and seed, and what comes of it."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import Progress

from scripts.adversarial_training import data as adv_data
from scripts.adversarial_training.config import Config
from scripts.adversarial_training.data import SETS, AdversarialData, Images
from scripts.adversarial_training.evaluate import Evaluator
from scripts.adversarial_training.methods import METHODS, Setting
from scripts.adversarial_training.report import Row
from scripts.adversarial_training.train import Program, Trainer
from scripts.common import checkpoints, devices


@dataclasses.dataclass
class Outcome:
  """What runs gave, as far as they came.

  Attributes:
    lines: a line for each epoch.
    rows: a row for each finished run.
    params: those of the first seed's finished runs, by training set and method.
  """

  lines: list[Row]
  rows: list[Row] = dataclasses.field(default_factory=list)
  params: dict[tuple[str, str], Any] = dataclasses.field(default_factory=dict)


class Runner:
  """All runs of a configuration; programs are compiled once, for all seeds and training sets."""

  def __init__(
    self,
    config: Config,
    data: AdversarialData,
    outcome: Outcome,
    write: Callable[..., None],
    progress: Progress,
  ):
    self.outcome = outcome
    self._config = config
    self._data = data
    self._write = write
    self._progress = progress
    self._devices = devices.all_devices()
    self._pool = Images(*jax.device_put(tuple(data.pool), self._devices.everywhere))
    model = config.make_model(len(data.names))
    shape = (1, *data.pool.images.shape[1:])
    self._init = jax.jit(
      lambda key: model.init(key, jnp.zeros(shape)), out_shardings=self._devices.everywhere
    )
    self.model: Any = model.apply
    self.evaluator = Evaluator(self.model, config)
    self._programs: dict[Any, Program] = {}
    total = config.seeds * len(config.sets) * len(config.methods) * config.epochs
    self._bar = progress.add_task("", total=total, loss="")

  def run_all(self) -> None:
    """Runs what there is to run; fills ``outcome`` as it goes."""
    for seed in self._config.all_seeds():
      for kind in self._config.sets:
        for method in self._config.methods:
          self._run(kind, method, seed)

  def _run(self, kind: str, method: str, seed: int) -> None:
    config, label = self._config, METHODS[method].label
    show = functools.partial(self._progress.update, self._bar)
    show(description=f"seed {seed}, {SETS[kind]}, {label}")
    trainer = self.trainer(kind, method, seed)
    run = {"set": kind, "method": method, "seed": seed}
    with contextlib.closing(trainer):  # Waits for checkpoints, also after Ctrl-C.
      done = trainer.restore() if config.resume else 0
      self._progress.advance(self._bar, done)
      for epoch, told in trainer.fit(done, config.epochs):
        clean = self.evaluator.accuracy(trainer.state.params, self._data.validation)
        line = run | {
          "epoch": epoch,
          "seconds": trainer.seconds,
          "train_loss": float(told.loss),
          "ess": float(told.ess),
          "validation_clean": clean,
        }
        self.outcome.lines.append(line)
        self._write(**line)
        self._progress.advance(self._bar)
        show(loss=f"loss {told.loss:.3f}, {clean:.1f} %")
    params = trainer.state.params
    if seed == config.first_seed:
      self.outcome.params[kind, method] = params
    row = self.evaluator.of_test(params, self._data.test, self._data.names)
    row["seconds_per_epoch"] = trainer.seconds / config.epochs
    self.outcome.rows.append(run | row)

  def trainer(
    self, kind: str, method: str, seed: int, config: Config | None = None, name: str = ""
  ) -> Trainer:
    """A run that has not begun; ``config`` may have other rates, and then needs a ``name``."""
    used = config or self._config
    rows = adv_data.training_rows(self._data, kind, used.largest, used.ratio, seed)
    num_steps = used.epochs * (len(rows) // used.batch_size)
    key = (method, name, num_steps)
    if key not in self._programs:
      setting = Setting(self.model, used.largest_change(), used.attack_steps, used.rates)
      self._programs[key] = Program(
        METHODS[method],
        setting,
        used.epsilon_rise,
        used.optimizer(num_steps),
        num_steps,
        used.augment(),
        self._devices,
      )
    return Trainer(
      self._programs[key],
      self._init(jax.random.key(seed)),
      self._pool,
      rows,
      used.batch_size,
      (seed, list(SETS).index(kind)),
      None if used.tune else checkpoint_folder(used, kind, method, seed),
      self._devices,
    )


def checkpoint_folder(config: Config, kind: str, method: str, seed: int) -> Path:
  """Where the checkpoints of a run are."""
  return config.output_dir / "checkpoints" / f"{method}_{kind}_seed{seed}"


def lines_to_keep(config: Config, lines: list[Row]) -> list[Row]:
  """The lines of an earlier run up to the checkpoints that it goes on from."""
  of_run = lambda line: (line["set"], line["method"], line["seed"])
  done = {
    run: checkpoints.latest_step(checkpoint_folder(config, *run)) for run in map(of_run, lines)
  }
  return [line for line in lines if line["epoch"] <= done[of_run(line)]]


def counts_of_sets(config: Config, data: AdversarialData) -> dict[str, np.ndarray]:
  """How many images of each class each training set has."""
  num_classes = len(data.names)
  return {
    kind: adv_data.counts_of(kind, num_classes, config.largest, config.ratio)
    for kind in config.sets
  }


def first_rows(config: Config, data: AdversarialData, number: int) -> np.ndarray:
  """So many rows of the last training set of the first seed, in random order."""
  rows = adv_data.training_rows(
    data, config.sets[-1], config.largest, config.ratio, config.first_seed
  )
  return np.random.default_rng(0).permutation(rows)[:number]
