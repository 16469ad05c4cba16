"""Runs of online meta-learners: a stream is one compiled scan, for one seed or for several."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbo
from scripts.online_meta.methods import METHODS, Rates, Switches, state_bytes
from scripts.online_meta.model import Model


class Trace(NamedTuple):
  """What happened in every round, leaves ``[seeds, rounds]``.

  Attributes:
    before: accuracy of the last task's model on the new images, before their labels are used.
    after: that of the adapted model.
    loss: the loss that belongs to ``before``.
    switch: whether a task switch was detected.
    shift: whether a distribution shift was.
    switch_score: the score behind the first.
    shift_score: the score behind the second.
    meta_updated: whether the meta-model was updated.
    domain: the true domain.
    task_switch: the true switches.
  """

  before: Any
  after: Any
  loss: Any
  switch: Any
  shift: Any
  switch_score: Any
  shift_score: Any
  meta_updated: Any
  domain: Any
  task_switch: Any


class Run(NamedTuple):
  """The trace of a method on a stream.

  Attributes:
    trace: the :class:`Trace`.
    seconds: of all rounds and seeds, without compilation.
    state_bytes: what one seed keeps beside the meta-model.
  """

  trace: Trace
  seconds: float
  state_bytes: int


class Program(NamedTuple):
  """A method; rates, parameters and streams are arguments, so that one program serves all.

  Attributes:
    run: ``run(rates, xs, stream, keys) -> Trace``; ``xs`` and ``keys`` have an axis of seeds.
    state_bytes: as in :class:`Run`.
  """

  run: Callable[..., Trace]
  state_bytes: int


def make_program(
  name: str, model: Model, switches: Switches, rounds: int, x: Any, stream: Any, seeds: Any
) -> Program:
  """Compiles a method for parameters and streams like these, and as many seeds."""
  method = METHODS[name]

  def one(rates, x, stream, key):
    learner = method.make(model, rates, switches)
    state = learner.init(x, stream=stream, key=key)
    return trace_of(learner.run(state, stream, rounds)[1])

  numbers = Rates(*jnp.ones(len(Rates._fields)))
  arguments = (numbers, repeat(x, seeds), stream, keys_of(seeds))
  learner = method.make(model, numbers, switches)
  shapes = jax.eval_shape(lambda x: learner.init(x, stream=stream, key=0), x)
  compiled = jax.jit(over_seeds(one)).lower(*arguments).compile()
  return Program(compiled, state_bytes(shapes, x))


def over_seeds(one: Callable[..., Any]) -> Callable[..., Any]:
  """Seeds side by side; a single one is not batched, so that closed gates save their work."""

  def run(rates, xs, stream, keys):
    if len(keys) > 1:
      return jax.vmap(one, in_axes=(None, 0, None, 0))(rates, xs, stream, keys)
    result = one(rates, jax.tree.map(lambda leaf: leaf[0], xs), stream, keys[0])
    return jax.tree.map(lambda leaf: leaf[None], result)

  return run


def trace_of(info: jaxbo.OnlineMetaInfo) -> Trace:
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


def keys_of(seeds: Any) -> jax.Array:
  """The keys of streams."""
  return jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))


def repeat(x: Any, seeds: Any) -> Any:
  """The same parameters for every seed."""
  return jax.tree.map(lambda leaf: jnp.repeat(leaf[None], len(seeds), axis=0), x)


def initial(model: Model, begins: str, trained: dict[str, Any], seeds: Any) -> Any:
  """What a method starts from, with an axis of seeds."""
  if begins == "random":
    return jax.vmap(lambda key: model.init(jax.random.fold_in(key, 1)))(keys_of(seeds))
  return repeat(trained[begins], seeds)


def play(program: Program, rates: Rates, xs: Any, stream: Any, seeds: Any) -> Run:
  """Plays a stream."""
  arguments = (Rates(*map(jnp.float32, rates)), xs, stream, keys_of(seeds))
  begin = time.perf_counter()
  trace = jax.block_until_ready(program.run(*arguments))
  seconds = time.perf_counter() - begin
  return Run(jax.tree.map(np.asarray, trace), seconds, program.state_bytes)


def best_losses(
  model: Model,
  x: Any,
  stream: Any,
  keys: jax.Array,
  rounds: int,
  passes: int = 4,
  rate: float = 0.01,
) -> jax.Array:
  """The losses of the best fixed model of each task, ``[seeds, rounds]``.

  For each task a copy of ``x`` is trained by Adam on the task's rounds, ``passes`` times each and
  40 steps at least, then judged on them. That is an upper bound of the minimum.
  """

  def one(rates, x, stream, key):
    del rates

    def advance(state, _):
      new, batch = stream.step(state)
      return new, (state, batch.task_switch)

    _, (states, switches) = jax.lax.scan(advance, stream.init(key), length=rounds)
    lengths = lengths_of_tasks(switches)
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

  run = over_seeds(one)
  return run(None, repeat(x, keys), stream, keys)


def lengths_of_tasks(switches: jax.Array) -> jax.Array:
  """How many rounds the task has that each round belongs to."""
  tasks = jnp.cumsum(switches, dtype=jnp.int32) - 1
  ones = jnp.ones_like(tasks)
  return jax.ops.segment_sum(ones, tasks, num_segments=len(switches))[tasks]


def save(path: Path, **arrays: Any) -> None:
  """Writes arrays at once or not at all."""
  new = path.with_name(path.name + ".new")
  with new.open("wb") as file:
    np.savez(file, **arrays)
  new.replace(path)


def save_run(path: Path, run: Run) -> None:
  """Keeps a run for ``--resume``."""
  save(path, **run.trace._asdict(), seconds=run.seconds, state_bytes=run.state_bytes)


def load_run(path: Path) -> Run:
  """A run that was kept."""
  with np.load(path) as arrays:
    trace = Trace(*(arrays[name] for name in Trace._fields))
    return Run(trace, float(arrays["seconds"]), int(arrays["state_bytes"]))


def save_params(path: Path, params: Any) -> None:
  """Keeps pre-trained parameters."""
  save(path, **{str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(params))})


def load_params(path: Path, like: Any) -> Any:
  """Parameters that were kept."""
  with np.load(path) as arrays:
    leaves = [jnp.asarray(arrays[str(i)]) for i in range(len(arrays.files))]
  return jax.tree.unflatten(jax.tree.structure(like), leaves)
