"""Continual training with every method, seed and share of noise, from one checkpoint each."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxbo_models import tokenizers, transformer
from rich.progress import Progress

import jaxbo
from benchmarks import measure
from scripts.common import checkpoints, devices
from scripts.continual_lm import data as lm_data
from scripts.continual_lm import methods as lm_methods
from scripts.continual_lm import report as lm_report
from scripts.continual_lm import train as lm_train
from scripts.continual_lm.config import Config
from scripts.continual_lm.data import LanguageData, Sequences, Tokenizer
from scripts.continual_lm.methods import BASELINE, METHODS
from scripts.continual_lm.report import START, Row
from scripts.continual_lm.train import LossFn, Program, Trainer

PRETRAINING = "pretraining"
_PRETRAINING_BATCHES, _CONTINUAL_BATCHES = 0, 1  # Streams of batches, beside the seed.


class Language(NamedTuple):
  """A model of language.

  Attributes:
    tokenizer: what makes its tokens.
    loss_fn: the loss of each sequence.
    init: ``init(key) -> params``, of a new model or of the one that was read.
    max_length: the longest sequence.
  """

  tokenizer: Tokenizer
  loss_fn: LossFn
  init: Callable[[jax.Array], Any]
  max_length: int


def make_language(config: Config) -> Language:
  """A small model of bytes, or one that was read from a folder."""
  if config.model_dir is not None:
    model, params = transformer.from_safetensors(config.model_dir)
    tokenizer = tokenizers.BPETokenizer(config.model_dir, _end_of_text(config.model_dir))
    if tokenizer.vocab_size > model.config.vocab_size:  # What is beyond has the loss NaN.
      raise ValueError(
        f"the tokenizer in model_dir must have at most the model's {model.config.vocab_size} "
        f"tokens, got {tokenizer.vocab_size} in {config.model_dir}"
      )
    init = lambda key: params
  else:
    tokenizer = tokenizers.ByteTokenizer()
    settings = transformer.gpt2(
      vocab_size=tokenizer.vocab_size,
      max_length=config.sequence_length(),
      num_layers=config.num_layers,
      width=config.width,
      num_heads=config.num_heads,
    )
    model = transformer.Transformer(settings)
    init = jax.jit(lambda key: model.init(key, jnp.zeros((1, 2), jnp.int32))["params"])
  return Language(tokenizer, transformer.sequence_losses(model), init, model.config.max_length)


def _end_of_text(model_dir: Path) -> str:
  """The token that ends a text, by the family of the model."""
  settings = json.loads((model_dir / "config.json").read_text())
  return "</s>" if settings["model_type"] == "opt" else "<|endoftext|>"


@dataclasses.dataclass
class Outcome:
  """What runs gave, as far as they came.

  Attributes:
    lines: a line for each evaluation.
    rows: a row for each finished run.
    start: the validation loss of each seed's checkpoint.
    start_losses: the losses of the first checkpoint on the sequences for validation.
    timings: what a step of each method costs.
  """

  lines: list[Row]
  rows: list[Row] = dataclasses.field(default_factory=list)
  start: dict[int, float] = dataclasses.field(default_factory=dict)
  start_losses: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
  timings: dict[str, measure.Timing] = dataclasses.field(default_factory=dict)


class Runner:
  """All runs of a configuration; programs are compiled once, for all seeds and shares of noise."""

  def __init__(
    self,
    config: Config,
    language: Language,
    data: LanguageData,
    outcome: Outcome,
    write: Callable[..., None],
    progress: Progress,
  ):
    self.config = config
    self.outcome = outcome
    self._language = language
    self._data = data
    self._write = write
    self._devices = devices.all_devices()
    self._evaluate = lm_train.make_evaluate(language.loss_fn, config.batch_size, self._devices)
    self._programs: dict[str, Program] = {}
    self._progress = progress
    num_runs = len(config.corruptions) * len(config.methods)
    first_phase = config.pretrain_steps if config.init == "scratch" else 0
    total = config.seeds * (first_phase + num_runs * config.steps)
    self._bar = progress.add_task("", total=total, loss="")

  def run_all(self) -> None:
    """Runs what there is to run; fills ``outcome`` as it goes."""
    config, params = self.config, None
    for seed in config.all_seeds():
      params = self._start(seed)
      for corruption in config.corruptions:
        train = lm_data.corrupt(
          self._data.train,
          corruption,
          config.corruption_kind,
          self._language.tokenizer.vocab_size,
          seed,
        )
        for method in config.methods:
          self._run(corruption, method, seed, params, train)
    if config.timing_rounds and BASELINE in config.methods:
      self._progress.update(self._bar, description="timing", loss="")
      self.outcome.timings = self._time_steps(params)

  def _start(self, seed: int) -> Any:
    """The parameters that all methods of a seed start from."""
    params = jax.device_put(self._language.init(jax.random.key(seed)), self._devices.everywhere)
    if self.config.init == "scratch":
      params = self._train(0.0, PRETRAINING, seed, params, self._data.train)
    losses = self._evaluate(params, self._data.validation.sequences)
    self.outcome.start[seed] = float(self._data.validation.weights @ losses)
    if not len(self.outcome.start_losses):
      self.outcome.start_losses = losses
    self.outcome.rows.append(
      {"corruption": 0.0, "method": START, "seed": seed} | self._test(params)
    )
    return params

  def _run(self, corruption: float, method: str, seed: int, params: Any, train: Sequences) -> None:
    """The continual phase of a method."""
    params = self._train(corruption, method, seed, params, train)
    run = {"corruption": corruption, "method": method, "seed": seed}
    lines = [line for line in self.outcome.lines if run.items() <= line.items()]
    tokens = self.config.batch_size * self.config.sequence_length()
    of_run = lm_report.of_run(lines, self.config.steps, tokens)
    self.outcome.rows.append(run | self._test(params) | of_run)

  def _test(self, params: Any) -> Row:
    losses = self._evaluate(params, self._data.test.sequences)
    return lm_report.of_held_out(losses, self._data.test, self._data.domains)

  def _train(self, corruption: float, method: str, seed: int, params: Any, train: Sequences) -> Any:
    """Trains, evaluates and writes lines as it goes; returns the parameters at the end."""
    config, data = self.config, self._data
    first = method == PRETRAINING
    steps = config.pretrain_steps if first else config.steps
    noise = f", {corruption:.0%} noise" if corruption else ""
    label = PRETRAINING if first else METHODS[method].label
    show = functools.partial(self._progress.update, self._bar)
    show(description=f"seed {seed}{noise}, {label}")
    trainer = Trainer(
      self._program(method),
      params,
      train,
      config.batch_size,
      (seed, _PRETRAINING_BATCHES if first else _CONTINUAL_BATCHES),
      checkpoint_folder(config, corruption, method, seed),
      self._devices,
    )
    with contextlib.closing(trainer):  # Waits for checkpoints, also after Ctrl-C.
      done = trainer.restore() if config.resume else 0
      self._progress.advance(self._bar, done)
      advance = lambda step: self._progress.advance(self._bar)
      for window in trainer.fit(done, steps, config.eval_every, advance):
        losses = self._evaluate(trainer.state.params, data.validation.sequences)
        validation = lm_report.of_held_out(losses, data.validation, data.domains)
        line = {
          "corruption": corruption,
          "method": method,
          "seed": seed,
          "step": window.done,
          "seconds": window.seconds,
          **lm_report.of_window(window, train, data.domains),
          **{f"validation_{name}": value for name, value in validation.items()},
        }
        self.outcome.lines.append(line)
        self._write(**line)
        show(loss=f"loss {validation['loss']:.3f}")
    return trainer.state.params

  def _program(self, method: str) -> Program:
    """The method, compiled once."""
    if method not in self._programs:
      config = self.config
      if method == PRETRAINING:
        weighting = jaxbo.uniform()
        rate = lm_methods.pretraining_schedule(config.pretrain_learning_rate, config.pretrain_steps)
      else:
        weighting = METHODS[method].weighting(config.rates, len(self._data.domains))
        rate = lm_methods.continual_schedule(config.continual_learning_rate(), config.steps)
      self._programs[method] = Program(self._language.loss_fn, weighting, rate, self._devices)
    return self._programs[method]

  def _time_steps(self, params: Any) -> dict[str, measure.Timing]:
    """Times steps of all methods in turns, so that what slows the machine slows all of them."""
    names = [BASELINE, *(name for name in self.config.methods if name != BASELINE)]
    rows = np.arange(self.config.batch_size)
    batch = lm_train.batch_of(self._data.train, rows, self._devices)
    states = {name: self._program(name).init(params) for name in names}
    steps = {name: self._program(name).compile(states[name], batch) for name in names}

    def call(name):
      states[name], _ = steps[name](states[name], batch)
      return states[name]

    calls = {name: functools.partial(call, name) for name in names}
    return measure.time_together(calls, num_rounds=self.config.timing_rounds, calls=2)


def checkpoint_folder(config: Config, corruption: float, method: str, seed: int) -> Path:
  """Where the checkpoints of a run are."""
  return config.output_dir / "checkpoints" / f"{method}_seed{seed}_noise{corruption:g}"


def lines_to_keep(config: Config, lines: list[Row]) -> list[Row]:
  """The lines of an earlier run up to the checkpoints that it goes on from."""
  of_run = lambda line: (line["corruption"], line["method"], line["seed"])
  done = {of_run(line): 0 for line in lines}
  for run in done:
    done[run] = checkpoints.latest_step(checkpoint_folder(config, *run))
  return [line for line in lines if line["step"] <= done[of_run(line)]]
