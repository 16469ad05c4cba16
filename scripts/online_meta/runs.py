"""Runs of online meta-learners: a stream is one compiled scan, for one seed or for several."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbo
from scripts.common.study import Run
from scripts.common.task import Row, Spent, Task
from scripts.online_meta import pretraining, report
from scripts.online_meta.config import Config
from scripts.online_meta.methods import METHODS, Rates, state_bytes
from scripts.online_meta.model import Model
from scripts.online_meta.report import Trace


def trace_of(info: jaxbo.meta.OnlineMetaInfo) -> Trace:
  """What is kept of the history."""
  return Trace(
    before=info.before.metric,
    after=info.after.metric,
    loss=info.before.loss,
    switch=info.detection.switch,
    shift=info.detection.shift,
    switch_score=info.detection.scores.switch,
    shift_score=info.detection.scores.shift,
    meta_updated=info.meta_updated,
    domain=info.extra.domain,
    task_switch=info.extra.task_switch,
  )


def over_seeds(one: Callable[..., Any]) -> Callable[..., Any]:
  """Seeds side by side; a single one is not batched, so that closed gates save their work."""

  def run(rates, xs, stream, keys):
    if len(keys) > 1:
      return jax.vmap(one, in_axes=(0, 0, None, 0))(rates, xs, stream, keys)
    result = one(*jax.tree.map(lambda leaf: leaf[0], (rates, xs)), stream, keys[0])
    return jax.tree.map(lambda leaf: leaf[None], result)

  return run


def keys_of(seeds: Any) -> jax.Array:
  """The keys of streams."""
  return jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))


VALIDATION_KEYS = 1000  # The first of the keys that no report uses.


class Streams(NamedTuple):
  """A model and a stream for each of the seeds; of images that are reported, or that are not."""

  stay_probability: float
  seeds: np.ndarray
  reported: bool = True
  in_distribution: bool = False  # Whether the streams stay in the domain of the pre-training.

  def keys(self) -> jax.Array:
    """The keys of the streams."""
    return keys_of(self.seeds + (0 if self.reported else VALIDATION_KEYS))

  def of(self, run: Run[Config]) -> Any:
    """The stream that keys make."""
    domains, config = run.data, run.config
    parts = domains.validation, domains.validation if config.validation else domains.test
    arrays = run.shared("images", lambda: jax.device_put(parts))[self.reported]
    return config.stream(arrays, self.stay_probability, self.in_distribution)


def of_seeds(rates: Rates, keys: jax.Array) -> Rates:
  """Rates ``[seeds]``, of numbers that all seeds share or that each has its own of."""
  return Rates(*(jnp.broadcast_to(jnp.float32(rate), keys.shape) for rate in rates))


class Program:
  """A method; rates, parameters and streams are arguments, so that one program serves all.

  ``play(rates, xs, stream, keys)`` gives a trace of ``shapes``; ``rates``, ``xs`` and ``keys`` have
  an axis of seeds, and one seed keeps ``state_bytes`` beside the meta-model.
  """

  def __init__(self, config: Config, name: str, rounds: int, xs: Any, stream: Any, keys: Any):
    method = METHODS[name]
    model = config.model(method.begins)

    def one(rates, x, stream, key):
      learner = method.make(model, rates, config)
      return trace_of(learner.run(learner.init(x, stream=stream, key=key), stream, rounds)[1])

    numbers = Rates(*jnp.ones(len(Rates._fields)))
    lowered = jax.jit(over_seeds(one)).lower(of_seeds(numbers, keys), xs, stream, keys)
    self.play, self.shapes = lowered.compile(), lowered.out_info
    learner, x = method.make(model, numbers, config), jax.tree.map(lambda leaf: leaf[0], xs)
    init = lambda x: learner.init(x, stream=stream, key=0)
    self.state_bytes = state_bytes(jax.eval_shape(init, x), x)


def prepared(
  run: Run[Config], name: str, streams: Streams
) -> tuple[Program, Callable[[Rates], Trace]]:
  """The program of a method, and what plays streams with it."""
  config, begins, keys = run.config, METHODS[name].begins, streams.keys()
  if begins == "random":
    model = config.model()
    xs = jax.vmap(lambda key: model.init(jax.random.fold_in(key, 1)))(keys)
  else:
    xs = pretraining.trained(run, begins, streams.seeds)
  stream, rounds = streams.of(run), config.rounds if streams.reported else config.tune_rounds
  make = lambda: Program(config, name, rounds, xs, stream, keys)
  program = run.shared(("program", name, streams.reported), make)
  return program, lambda rates: program.play(of_seeds(rates, keys), xs, stream, keys)


def play(run: Run[Config], name: str, rates: Rates, streams: Streams) -> Trace:
  """What a method did on streams, as NumPy arrays."""
  _, play_it = prepared(run, name, streams)
  return jax.tree.map(np.asarray, play_it(rates))


class Play(Task):
  """A method on streams; its one step is all of them, for ``rates()``."""

  def __init__(
    self, run: Run[Config], name: str, rates: Callable[[], Rates], streams: Streams, best: jax.Array
  ):
    self.name, self.seeds, self.best = name, streams.seeds.tolist(), best
    self.program, self.play = prepared(run, name, streams)
    self.rates = rates()
    empty = lambda leaf: jnp.zeros(leaf.shape, leaf.dtype)
    self.state = jax.tree.map(empty, self.program.shapes)

  def step(self, state: Trace, t: int) -> tuple[Trace, None]:
    """Plays the stream."""
    del state, t
    return self.play(self.rates), None

  def evaluate(self, state: Trace, told: list[None]) -> list[Row]:
    """The accuracy of every seed."""
    del told
    accuracy = np.mean(np.asarray(state.before), axis=1).tolist()
    both = zip(self.seeds, accuracy, strict=True)
    return [{"seed": seed, "accuracy": value} for seed, value in both]

  def result(self, state: Trace, spent: Spent) -> list[Row]:
    """A row for each seed."""
    cost = {
      "seconds_per_round": spent.seconds / state.before.size,
      "state_bytes": self.program.state_bytes,
    }
    traces, best = jax.tree.map(np.asarray, state), np.asarray(self.best)
    return [
      {"seed": seed, **report.numbers(self.name, traces.of(i), best[i]), **cost}
      for i, seed in enumerate(self.seeds)
    ]


class Best(Task):
  """The losses of the best fixed model of each task of streams."""

  def __init__(self, run: Run[Config], streams: Streams):
    self.run, self.streams = run, streams
    self.state = jnp.zeros((len(streams.seeds), run.config.rounds))

  def step(self, state: jax.Array, t: int) -> tuple[jax.Array, None]:
    """Finds them."""
    del state, t
    run, streams = self.run, self.streams
    find = functools.partial(best_losses, run.config.model(), rounds=run.config.rounds)
    find = run.shared("best", lambda: jax.jit(find))
    xs = pretraining.trained(run, "maml", streams.seeds)
    return find(xs, streams.of(run), streams.keys()), None


def best_losses(
  model: Model, xs: Any, stream: Any, keys: jax.Array, rounds: int, passes=4, rate=0.01
) -> jax.Array:
  """The losses of the best fixed model of each task, ``[seeds, rounds]``.

  For each task a copy of the seed's ``x`` is trained by Adam on the task's rounds, ``passes`` times
  each and 40 steps at least, then judged on them. That is an upper bound of the minimum.
  """

  def one(rates, x, stream, key):
    del rates

    def advance(state, _):
      new, batch = stream.step(state)
      return new, (state, batch.task_switch)

    _, (states, switches) = jax.lax.scan(advance, stream.init(key), length=rounds)
    tasks = jnp.cumsum(switches, dtype=jnp.int32) - 1
    lengths = jax.ops.segment_sum(jnp.ones_like(tasks), tasks, num_segments=rounds)[tasks]
    batch_of = lambda t: stream.step(jax.tree.map(lambda leaf: leaf[t], states))[1].train
    zeros, adam = model.start(x), optax.adam(rate)

    def train(t):
      def step(i, carry):
        y, opt_state = carry
        batch = batch_of(t + i % lengths[t])
        grads = jax.grad(lambda y: model.loss(x, y, batch)[0])(y)
        updates, opt_state = adam.update(grads, opt_state, y)
        return optax.apply_updates(y, updates), opt_state

      steps = jnp.maximum(passes * lengths[t], 40)
      return jax.lax.fori_loop(0, steps, step, (zeros, adam.init(zeros)))[0]

    def judge(y, t):
      y = jax.lax.cond(switches[t], lambda: train(t), lambda: y)
      return y, model.loss(x, y, batch_of(t))[0]

    return jax.lax.scan(judge, zeros, jnp.arange(rounds))[1]

  return over_seeds(one)(jnp.zeros(keys.shape), xs, stream, keys)
