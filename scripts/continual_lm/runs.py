"""Training of a language model: what all runs have in common, and each run as a task."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxbo_models import transformer
from jaxbo_models.tokenizers import BPETokenizer

import jaxbo
from benchmarks import measure
from scripts.common import devices, folder
from scripts.common.devices import Devices
from scripts.common.files import writing
from scripts.common.study import Run
from scripts.common.task import Cell, Program, Row, Spent, Task
from scripts.continual_lm import data as lm_data
from scripts.continual_lm import documents, instructions, losses, model, packing, report, train
from scripts.continual_lm import methods as lm_methods
from scripts.continual_lm.config import Config
from scripts.continual_lm.data import HeldOut, LanguageData, Sequences
from scripts.continual_lm.methods import BASELINE, LABELS, METHODS, START, START_KEY, Chosen
from scripts.continual_lm.model import Language
from scripts.continual_lm.train import LossFn, State

# The first half of the first phase sees so many tokens at once: after 480 steps of 1,024 bytes each
# the default model is at 1.97 nats per byte, instead of at 2.6 where rows are whole from the start.
SHORT = 64
Evaluate = Callable[[Any, Sequences], np.ndarray]  # evaluate(params, sequences) -> [examples, ...]


class Given(NamedTuple):
  """What all cells have in common: the model, the data of both phases, and where they run."""

  language: Language
  devices: Devices
  text: LanguageData  # Of the first phase.
  data: LanguageData  # Of the continual phase, and of all reports.
  left_out: int  # Examples of it that were too long.
  noisy: Callable[[float, int], Sequences]  # noisy(share, seed) is what it trains on.
  loss_fn: LossFn  # Of it.
  evaluate: Evaluate
  evaluate_at: Evaluate  # At all temperatures of the softmax.

  def new(self, seed: int) -> Any:
    """The parameters before any training."""
    return jax.device_put(self.language.init(jax.random.key(seed)), self.devices.everywhere)


def prepare(config: Config) -> Given:
  """The model, and the sequences that it is trained and tested on."""
  size = config.rows_of_batch()
  devices.check_divides("batch_size", size)
  for method in config.methods:  # The last band must begin inside of the batch.
    METHODS[method].weighting(config.rates, 1)
  language, length = model.make(config), config.sequence_length()
  tokenizer, held_out = language.tokenizer, (config.validation_sequences, config.test_sequences)
  read = lambda: lm_data.make(
    documents.read(config.dataset, config.data_dir), tokenizer, length, *held_out
  )
  kind, places, left_out = config.corruption_kind, None, 0
  if config.task == "pretrain":
    text = data = read()
    vocab_size, loss_fn = tokenizer.vocab_size, language.loss_fn
    noisy = lambda share, seed: lm_data.corrupt(data.train, share, kind, vocab_size, seed)
  else:
    corpus, places = (
      instructions.read(config.instructions, config.data_dir),
      packing.places_in(length),
    )
    data, pack_noisy, left_out = packing.make(corpus, tokenizer, config.template, length, *held_out)
    text = read() if config.steps_of(START) else data
    loss_fn = losses.packed_losses(language.model, places)
    noisy = lambda share, seed: pack_noisy(share, kind, seed)
  for part in (text, data):
    if size > len(part.train.tokens):
      raise ValueError(
        f"batch_size must be at most {len(part.train.tokens)}, the sequences for training; got "
        f"{size}"
      )
  everywhere = devices.all_devices()
  at_temperatures = losses.losses_at(language.model, report.TEMPERATURES, places)
  evaluate, evaluate_at = (
    train.make_evaluate(one, size, everywhere) for one in (loss_fn, at_temperatures)
  )
  return Given(language, everywhere, text, data, left_out, noisy, loss_fn, evaluate, evaluate_at)


def program_of(
  run: Run[Config], method: str, chosen: Chosen
) -> tuple[Callable[[Any], State], Program]:
  """The beginning and the step of a method, for all seeds and shares of noise."""
  config, given = run.config, run.data
  if method == START:
    weighting, loss_fn = jaxbo.dro.uniform(), given.language.loss_fn
    rate = lm_methods.pretraining_schedule(config.pretrain_learning_rate, config.pretrain_steps)
  else:
    rates = config.rates
    if chosen.temperature is not None:
      rates = rates.but(temperature=chosen.temperature)
    weighting, loss_fn = METHODS[method].weighting(rates, len(given.data.domains)), given.loss_fn
    rate = lm_methods.continual_schedule(chosen.learning_rate, config.steps_of(method))
  make = lambda: train.make_program(loss_fn, weighting, rate, given.devices)
  return run.shared((method, chosen.learning_rate, chosen.temperature), make)


class Training(Task):
  """A method on one seed at a share of noise, or the training before it, ``START``."""

  def __init__(
    self,
    run: Run[Config],
    start: State | None = None,
    *,
    corruption: float,
    method: str,
    seed: int,
    chosen: Chosen | None = None,
  ):
    self.run, self.method, self.given = run, method, run.data
    config, given, is_first = run.config, run.data, method == START
    self.chosen = chosen or config.chosen(method, corruption)
    self.sequences = self.first = given.text.train if is_first else given.noisy(corruption, seed)
    if is_first:
      self.first, self.sequences = (
        lm_data.in_pieces(self.sequences, size) for size in (SHORT, config.sequence_length())
      )
    self.domains = (given.text if is_first else given.data).domains
    self.stream = (seed, int(not is_first))  # The phases have batches of their own.
    self.state = State(given.new(seed) if start is None else start.params, ())
    if config.steps_of(method):
      init, program = program_of(run, method, self.chosen)
      self.state = init(self.state.params)
      self._step = program.compile(self.state, self.batch(0)[1])

  def batch(self, t: int) -> tuple[np.ndarray, dict[str, jax.Array]]:
    """The rows of step ``t``, and what it takes of them."""
    size, num = self.run.config.rows_of_batch(), len(self.sequences.tokens)
    rows = lm_data.rows_of_batch(num, size, self.stream, t)
    begins = 2 * t < self.run.config.steps_of(self.method)
    sequences = self.first if begins else self.sequences
    return rows, train.batch_of(sequences, rows, self.given.devices)

  def step(self, state: State, t: int) -> tuple[State, Any]:
    """Does step ``t``; tells what it shows, and of which sequences."""
    rows, batch = self.batch(t)
    state, shown = self._step(state, np.int32(t), batch)
    return state, (shown, rows)

  def evaluate(self, state: State, told: list[Any]) -> Row:
    """The means of the steps since the last evaluation, and the losses for validation."""
    shown, rows = jax.tree.map(lambda *leaves: np.stack([*map(np.asarray, leaves)]), *told)
    window = report.of_window(shown, rows, self.sequences, self.domains)
    validation = self.held_out(state, self.given.data.validation)
    return window | {f"validation_{name}": value for name, value in validation.items()}

  def keep(self, params: Any) -> None:
    """Writes the model of the first phase, for other runs."""
    path, language = self.run.path / folder.MODEL, self.given.language
    if self.run.config.steps_of(START) and not jax.process_index():
      with writing(path):
        transformer.save_safetensors(path, language.model, params)
        (path / model.TOKENS).write_text(model.fingerprint(language.tokenizer))
        if isinstance(language.tokenizer, BPETokenizer):
          language.tokenizer.save(path)

  def held_out(self, state: State, part: HeldOut) -> Row:
    """Losses on sequences that are not trained on."""
    found = self.given.evaluate(state.params, part.sequences)
    return report.of_held_out(found, part, self.given.data.domains)

  def result(self, state: State, spent: Spent) -> Row:
    """The losses for testing, and what the weights were like."""
    config, data, params = self.run.config, self.given.data, state.params
    found = self.given.evaluate(params, data.test.sequences)
    row = report.of_held_out(found, data.test, data.domains)
    at = lambda part: self.given.evaluate_at(params, part.sequences)
    row |= report.calibrated(at(data.validation), at(data.test), data)
    if data.choices is not None:
      others, alone = (self.given.evaluate(params, part) for part in data.choices[2:])
      row |= report.accuracies(found, others, alone, data)
    if self.method != START:
      tokens = config.rows_of_batch() * config.sequence_length()
      return row | report.of_run(spent.lines, tokens) | self.chosen._asdict()
    self.keep(params)
    found = self.given.evaluate(params, data.validation.sequences)
    self.run.note("start_losses", found.tolist)
    return row | {"validation_loss": float(data.validation.weights @ found)}


def start(run: Run[Config], task: type[Training]) -> Cell:
  """The training that all others go on from, evaluated ten times."""
  steps = run.config.steps_of(START)
  every = max(run.config.eval_every, steps // 10)
  make = functools.partial(task, run, **START_KEY)
  return Cell(START_KEY, make, steps, LABELS[START], every, every)


def time_steps(run: Run[Config]) -> dict[str, measure.Timing]:
  """Times steps of all methods in turns, so that what slows the machine slows all of them."""
  given, config = run.data, run.config
  batch = train.batch_of(given.data.train, np.arange(config.rows_of_batch()), given.devices)
  params, states, steps = given.new(config.first_seed), {}, {}
  for method in sorted(methods_of(run), key=lambda name: name != BASELINE):  # The baseline first.
    init, program = program_of(run, method, config.chosen(method, config.corruptions[0]))
    states[method] = init(params)
    steps[method] = program.compile(states[method], batch)

  def call(name):
    states[name], _ = steps[name](states[name], np.int32(0), batch)
    return states[name]

  calls = {name: functools.partial(call, name) for name in steps}
  return measure.time_together(calls, num_rounds=config.timing_rounds, calls=2)


def methods_of(run: Run[Config]) -> list[str]:
  """The methods to run: there must be two domains for group DRO."""
  return [m for m in run.config.methods if m != "group_dro" or len(run.data.data.domains) > 1]
