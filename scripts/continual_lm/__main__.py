"""Continued pre-training with reweighted losses, from one checkpoint.

A small byte-level transformer is trained on a mixture of domains. From its checkpoint, every
reweighting of sequences goes on for a few steps on the same data, in the same batches: IR-DRO, with
and without the compositional normaliser, bands of MidRanking, LinUpper, Quadratic, Extremes, CVaR
and group DRO over domains, beside uniform weights. Then the same with noise in a share of the
sequences.

Claim (3 seeds; docs/experiments/continual_lm.md has the table): on clean data uniform weights have
the best mean loss, and methods that prefer what is hard trade it for the worst domain or the
hardest sequences. With 20 % of the sequences shuffled, IR-DRO gives noise 2.3 times its share and
loses 0.11 nats to uniform weights; MidRanking's band 3 and Quadratic, which give it less than its
share, lose nothing.

The text is what ships with Python: topics of its manual, documentation strings, code, names of
characters. It is the same for one version of Python; losses of two versions do not compare.
Held-out sequences are of other documents, and the same for all methods. Losses are in nats per
token (a byte here), and means over the mixture of domains that is trained on. Tables have the mean
and the standard deviation over seeds; differences are between runs of the same seed. "ESS" is the
effective sample size as a share of the batch, "noise weight" the mean weight of noisy sequences, 1
for uniform weights; "time" is that of a step beside one with uniform weights, in turns.

  python -m scripts.continual_lm                           11 minutes on one core, no download
  python -m scripts.continual_lm --dataset text_domains    WikiText-2, novels, politics, ...
  python -m scripts.continual_lm --init hf --model-dir DIR --dataset text_domains --batch-size 8
                                                           real GPT-2, OPT or Pythia weights
  ... --resume                                             goes on bit for bit where it was stopped
  python -m scripts.continual_lm --smoke                   the smallest run, less than a minute

Batches are divided among all devices.

Several processes, on one machine or many that share output_dir, need --distributed, or where they
cannot find each other:
  ... --coordinator-address HOST:PORT --num-processes 2 --process-id 0      and the same with 1
"""

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

import jaxbo
from benchmarks import measure
from scripts.common import devices, study, table
from scripts.common.devices import Devices
from scripts.common.study import Results, Run, Study
from scripts.common.table import Column, Table
from scripts.common.task import Cell, Program, Row, Spent, Task
from scripts.continual_lm import data as lm_data
from scripts.continual_lm import methods as lm_methods
from scripts.continual_lm import model, plots, report, train
from scripts.continual_lm.config import Config
from scripts.continual_lm.data import HeldOut, LanguageData, Sequences
from scripts.continual_lm.documents import DATASETS
from scripts.continual_lm.methods import BASELINE, LABELS, METHODS, START
from scripts.continual_lm.model import Language
from scripts.continual_lm.train import State


class Given(NamedTuple):
  """What all cells have in common: the model, the text, and where they run."""

  language: Language
  data: LanguageData
  devices: Devices
  evaluate: Callable[[Any, Sequences], np.ndarray]

  def new(self, seed: int) -> Any:
    """The parameters before any training."""
    return jax.device_put(self.language.init(jax.random.key(seed)), self.devices.everywhere)


def program_of(run: Run[Config], method: str) -> tuple[Callable[[Any], State], Program]:
  """The beginning and the step of a method, for all seeds and shares of noise."""
  config, given = run.config, run.data
  if method == START:
    weighting = jaxbo.dro.uniform()
    rate = lm_methods.pretraining_schedule(config.pretrain_learning_rate, config.pretrain_steps)
  else:
    weighting = METHODS[method].weighting(config.rates, len(given.data.domains))
    rate = lm_methods.continual_schedule(config.continual_learning_rate(), config.steps)
  make = lambda: train.make_program(given.language.loss_fn, weighting, rate, given.devices)
  return run.shared(method, make)


class Training(Task):
  """A method on one seed at a share of noise, or the training before it, ``START``."""

  def __init__(
    self, run: Run[Config], start: State | None = None, *, corruption: float, method: str, seed: int
  ):
    self.run, self.method, self.given = run, method, run.data
    config, given = run.config, run.data
    noise = corruption, config.corruption_kind, given.language.tokenizer.vocab_size, seed
    self.sequences = lm_data.corrupt(given.data.train, *noise)
    self.stream = (seed, int(method != START))  # The phases have batches of their own.
    self.state = State(given.new(seed) if start is None else start.params, ())
    if config.steps_of(method):
      init, program = program_of(run, method)
      self.state = init(self.state.params)
      self._step = program.compile(self.state, self.batch(0)[1])

  def batch(self, t: int) -> tuple[np.ndarray, dict[str, jax.Array]]:
    """The rows of step ``t``, and what it takes of them."""
    size, num = self.run.config.batch_size, len(self.sequences.tokens)
    rows = lm_data.rows_of_batch(num, size, self.stream, t)
    return rows, train.batch_of(self.sequences, rows, self.given.devices)

  def step(self, state: State, t: int) -> tuple[State, Any]:
    """Does step ``t``; tells what it shows, and of which sequences."""
    rows, batch = self.batch(t)
    state, shown = self._step(state, np.int32(t), batch)
    return state, (shown, rows)

  def held_out(self, state: State, part: HeldOut) -> Row:
    """Losses on sequences that are not trained on."""
    losses = self.given.evaluate(state.params, part.sequences)
    return report.of_held_out(losses, part, self.given.data.domains)

  def evaluate(self, state: State, told: list[Any]) -> Row:
    """The means of the steps since the last evaluation, and the losses for validation."""
    shown, rows = jax.tree.map(lambda *leaves: np.stack([*map(np.asarray, leaves)]), *told)
    window = report.of_window(shown, rows, self.sequences, self.given.data.domains)
    validation = self.held_out(state, self.given.data.validation)
    return window | {f"validation_{name}": value for name, value in validation.items()}

  def result(self, state: State, spent: Spent) -> Row:
    """The losses for testing, and what the weights were like."""
    config, data = self.run.config, self.given.data
    row = self.held_out(state, data.test)
    if self.method != START:
      return row | report.of_run(spent.lines, config.batch_size * config.sequence_length())
    losses = self.given.evaluate(state.params, data.validation.sequences)
    self.run.note("start_losses", losses.tolist)  # Of the first seed.
    return row | {"validation_loss": float(data.validation.weights @ losses)}


def time_steps(run: Run[Config]) -> dict[str, measure.Timing]:
  """Times steps of all methods in turns, so that what slows the machine slows all of them."""
  given, config = run.data, run.config
  batch = train.batch_of(given.data.train, np.arange(config.batch_size), given.devices)
  params, states, steps = given.new(config.first_seed), {}, {}
  for method in sorted(config.methods, key=lambda name: name != BASELINE):  # The baseline first.
    init, program = program_of(run, method)
    states[method] = init(params)
    steps[method] = program.compile(states[method], batch)

  def call(name):
    states[name], _ = steps[name](states[name], np.int32(0), batch)
    return states[name]

  calls = {name: functools.partial(call, name) for name in steps}
  return measure.time_together(calls, num_rounds=config.timing_rounds, calls=2)


class ContinualLM(Study[Config]):
  """The experiment."""

  config = Config

  def prepare(self, config: Config) -> Given:
    """The model, and the sequences that it is trained and tested on."""
    devices.check_divides("batch_size", config.batch_size)
    for method in config.methods:  # The last band must begin inside of the batch.
      METHODS[method].weighting(config.rates, 1)
    corpus, language = DATASETS[config.dataset](config.data_dir), model.make(config)
    sizes = config.sequence_length(), config.validation_sequences, config.test_sequences
    data = lm_data.make(corpus, language.tokenizer, *sizes)
    if config.batch_size > len(data.train.tokens):
      raise ValueError(
        f"batch_size must be at most {len(data.train.tokens)}, the sequences for training; got "
        f"{config.batch_size}"
      )
    everywhere = devices.all_devices()
    evaluate = train.make_evaluate(language.loss_fn, config.batch_size, everywhere)
    return Given(language, data, everywhere, evaluate)

  def cells(self, run: Run[Config]) -> Iterable[Cell]:
    """The checkpoint of every seed, and all methods from there at every share of noise."""
    config = run.config
    for seed in config.all_seeds():
      runs, start = itertools.product(config.corruptions, config.methods), ()
      for corruption, method in ((0.0, START), *runs):
        key = {"corruption": corruption, "method": method, "seed": seed}
        make, steps = functools.partial(Training, run, **key), config.steps_of(method)
        noise = f", {corruption:.0%} noise" if corruption else ""
        label = f"seed {seed}{noise}, {LABELS[method]}"
        cell = Cell(key, make, steps, label, config.eval_every, config.eval_every, needs=start)
        start = start or (cell,)
        yield cell

  def finish(self, run: Run[Config]) -> None:
    """Times the steps of methods whose time is not known yet."""
    config = run.config
    if config.timing_rounds and BASELINE in config.methods:
      times = functools.cache(lambda: time_steps(run))
      for method in config.methods:
        run.note(f"time/{method}", lambda m=method: times()[m]._asdict())

  def tables(self, results: Results[Config]) -> Iterable[Table]:
    """For each share of noise losses and differences of them; and what a step costs."""
    config, rows = results.config, results.rows
    domains = [name.removeprefix("loss/") for name in map(str, rows) if name.startswith("loss/")]
    losses = {"loss": Column("loss"), "worst": Column("worst domain")}
    quantiles = {name: Column(name) for name in report.QUANTILES}
    weights = {
      "ess": Column("ESS", 2),
      **{f"weight/{name}": Column(name, 2) for name in domains},
      "weight_noise": Column("noise weight", 2),
      "tokens_per_second": Column("tokens/s", 0, mean_only=True),
    }
    for corruption in report.shares_of_noise(rows):
      title = (
        f"{config.dataset}, {plots.arm_title(corruption, config.corruption_kind)}: {config.steps} "
        f"steps of {config.batch_size} sequences of {config.sequence_length()} tokens"
      )
      arm = report.of_arm(rows, corruption)
      of_domains = {f"loss/{name}": Column(name) for name in domains}
      yield table.spread(f"{title}; test loss", arm, "method", LABELS, losses | of_domains)
      if BASELINE in set(arm["method"]):
        minus = f"{title}; test loss minus that of uniform weights"
        yield table.paired(minus, arm, "method", BASELINE, LABELS, losses | quantiles)
      trained = arm[arm["method"] != START]
      told = table.spread(f"{title}; mean weights", trained, "method", LABELS, weights)
      yield told.without_dashes()
    times = {name: results.notes.get(f"time/{name}") for name in METHODS}
    ratio = lambda time: f"{time['ratio']:.2f} ± {time['spread']:.2f}"
    steps = [[LABELS[n], f"{1e3 * t['seconds']:.1f}", ratio(t)] for n, t in times.items() if t]
    if steps:
      yield Table("time beside uniform weights, in turns", ["method", "ms/step", "time"], steps)

  def draw(self, run: Run[Config]) -> None:
    """Losses, weights, and their ESS; curves, and what weights look at by batch size."""
    results, domains, kind = run.results(), run.data.data.domains, run.config.corruption_kind
    rows, lines = results.rows, results.lines
    if set(rows["method"]) - {START}:
      plots.draw_overview(rows, lines, domains, kind, run.path / "continual_lm.png")
      losses = np.array(results.notes["start_losses"], np.float32)
      looked_at = report.looked_at(run.config.rates, losses)
      start = rows[rows["method"] == START].set_index("seed")["validation_loss"]
      plots.draw_curves(lines, start, looked_at, kind, run.path / "curves.png")


if __name__ == "__main__":
  study.main(Config, functools.partial(study.run, ContinualLM()), __doc__)
