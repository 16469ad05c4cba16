"""Runs of online methods: compiled once, all seeds side by side, measured as they go."""

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbo
from scripts.common.data import Examples
from scripts.online_hyperopt import methods as online_methods
from scripts.online_hyperopt import streams as online_streams
from scripts.online_hyperopt.methods import Rates
from scripts.online_hyperopt.problems import Problem
from scripts.online_hyperopt.streams import Schedule

TEST_BATCH = 250


class Run(NamedTuple):
  """A method on a stream, all seeds, as far as it came; NaN where a number is not defined.

  Attributes:
    rounds: the rounds before which the test accuracy was measured, ``[evaluations]``.
    accuracy: balanced accuracy on fresh data, ``[evaluations, seeds]``.
    loss: the outer loss of what was played, on the batch of the round, ``[rounds, seeds]``.
    regret: the local regret of window 1 up to each round, ``[rounds, seeds]``.
    breakdown: 1 where the linear solver met curvature that was not positive, ``[rounds, seeds]``.
    distance: how far ``x`` is from where it began, ``[seeds]``.
    seconds: of all rounds and seeds, without compilation and evaluation.
    state_bytes: of the state of one seed that is neither ``x`` nor the inner parameters.
  """

  rounds: list[int]
  accuracy: np.ndarray
  loss: np.ndarray
  regret: np.ndarray
  breakdown: np.ndarray
  distance: np.ndarray
  seconds: float
  state_bytes: int


class Program(NamedTuple):
  """A method on a problem, compiled for a number of seeds.

  Attributes:
    init: ``init(rates, features, schedules, seeds) -> states``.
    step: ``step(states, rates, features, schedules) -> (states, metrics)``, some rounds.
    evaluate: ``evaluate(states, features, labels, schedules, test_rows) -> [seeds]``.
    distance: ``distance(states, start) -> [seeds]``.
    losses: ``losses(rates, features, schedules, seeds)``, the mean over seeds of the sum over all
      rounds of the outer loss, for each of the candidates in ``rates``, side by side.
  """

  init: Any
  step: Any
  evaluate: Any
  distance: Any
  losses: Any


def balanced_accuracy(predicted: jax.Array, labels: jax.Array, num_classes: int) -> jax.Array:
  """The mean over classes of the share of their examples that are classified correctly."""
  members = jax.nn.one_hot(labels, num_classes, axis=0)
  counts = members.sum(axis=1)
  correct = members @ (predicted == labels)
  # A class without examples does not count.
  return jnp.sum(correct / jnp.maximum(counts, 1)) / jnp.sum(counts > 0)


def make_program(
  method: str,
  problem: Problem,
  window: int,
  rounds: int,
  rounds_per_call: int,
  num_classes: int,
) -> Program:
  """Compiles nothing yet: rates and streams are arguments, so that one program serves all."""
  shapes = jax.eval_shape(problem.init, jax.random.key(0))
  metrics: dict[str, Any] = {
    "loss": lambda round: problem.outer_loss(round.x, round.y, round.batch.val),
    "breakdown": lambda round: jnp.float32(
      optax.tree.get(round.after.outer_state, "linear_breakdown", jnp.nan)
    ),
  }
  if problem.hypergradient is not None:
    metrics["regret"] = jaxbo.local_regret(problem.hypergradient)

  def loop(rates: Rates, names: Sequence[str] = tuple(metrics)) -> jaxbo.Online:
    wanted = {name: metrics[name] for name in names}
    return online_methods.make_loop(method, problem, rates, window, shapes[1], rounds, wanted)

  def init(rates, features, schedule, seed):
    x, y = problem.init(jax.random.key(seed))
    return loop(rates).init(x, y, online_streams.stream_of(features, schedule))

  def step(state, rates, features, schedule):
    stream = online_streams.stream_of(features, schedule)
    state, history = loop(rates).run(state, stream, rounds_per_call)
    return state, history.metrics

  def evaluate(state, features, labels, schedule, test_rows):
    stream = online_streams.stream_of(features, schedule)
    reference = stream(jax.random.key(0), state.round_count).val.images

    def classify(rows):
      return jnp.argmax(problem.predict(state.x, state.y, features[rows], reference), axis=-1)

    predicted = jax.lax.map(lambda row: classify(row[None])[0], test_rows, batch_size=TEST_BATCH)
    return balanced_accuracy(predicted, labels[test_rows], num_classes)

  def cumulative_loss(rates, features, schedule, seed):
    stream = online_streams.stream_of(features, schedule)
    to_tune = loop(rates, ("loss",))
    _, history = to_tune.run(
      to_tune.init(*problem.init(jax.random.key(seed)), stream), stream, rounds
    )
    return jnp.sum(history.metrics["loss"])

  def losses(rates, *data):
    of_seeds = jax.vmap(cumulative_loss, in_axes=(None, None, 0, 0))
    return jax.vmap(lambda rates: jnp.mean(of_seeds(rates, *data)))(rates)

  over_seeds = jax.vmap
  return Program(
    init=jax.jit(over_seeds(init, in_axes=(None, None, 0, 0))),
    step=jax.jit(over_seeds(step, in_axes=(0, None, None, 0)), donate_argnums=0),
    evaluate=jax.jit(over_seeds(evaluate, in_axes=(0, None, None, 0, 0))),
    distance=jax.jit(over_seeds(lambda state, x: optax.tree.norm(optax.tree.sub(state.x, x)))),
    losses=jax.jit(losses),
  )


class Data(NamedTuple):
  """A stream for all seeds.

  Attributes:
    features: ``[rows, features]``, shared by all seeds.
    labels: ``[rows]``.
    schedules: leaves ``[seeds, rounds, batch]``.
    test_rows: ``[seeds, rows]``.
    seeds: of the initial parameters, ``[seeds]``.
  """

  features: Any
  labels: Any
  schedules: Schedule
  test_rows: Any
  seeds: Any


def draw_data(
  kind: online_streams.StreamKind,
  examples: Examples,
  pools: Sequence[online_streams.Pools],
  seeds: Sequence[int],
  rounds: int,
  batch_size: int,
) -> Data:
  """Draws a stream for each seed, from its own pools."""
  schedules = [
    online_streams.draw(kind, pool, examples, rounds, batch_size, seed)
    for seed, pool in zip(seeds, pools, strict=True)
  ]
  test_rows = np.stack([pool.test for pool in pools])
  stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *schedules)
  arrays = (examples.images, examples.labels, stacked, test_rows, np.asarray(seeds, np.int32))
  return Data(*jax.device_put(arrays))


def compile_step(program: Program, rates: Rates, data: Data) -> Program:
  """Compiles ``step`` before it is timed; streams of the same shapes share it."""
  states = program.init(rates, data.features, data.schedules, data.seeds)
  compiled = program.step.lower(states, rates, data.features, data.schedules).compile()
  return program._replace(step=compiled)


def play(
  program: Program, rates: Rates, data: Data, num_calls: int
) -> Iterator[tuple[float, Run | None]]:
  """Plays a stream; yields ``(mean accuracy, None)`` at each evaluation and the run at the end."""
  states = program.init(rates, data.features, data.schedules, data.seeds)
  start = jax.tree.map(jnp.copy, states.x)
  evaluate = lambda: np.asarray(
    program.evaluate(states, data.features, data.labels, data.schedules, data.test_rows)
  )
  accuracy, history, seconds = [evaluate()], [], 0.0
  for _ in range(num_calls):
    begin = time.perf_counter()
    states, metrics = jax.block_until_ready(
      program.step(states, rates, data.features, data.schedules)
    )
    seconds += time.perf_counter() - begin
    history.append(jax.tree.map(np.asarray, metrics))
    accuracy.append(evaluate())
    yield float(np.mean(accuracy[-1])), None
  joined = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1).T, *history)
  num_rounds = len(joined["loss"])
  regret = joined["regret"].total if "regret" in joined else np.full_like(joined["loss"], np.nan)
  run = Run(
    rounds=np.linspace(0, num_rounds, num_calls + 1).round().astype(int).tolist(),
    accuracy=np.stack(accuracy),
    loss=joined["loss"],
    regret=regret,
    breakdown=joined["breakdown"],
    distance=np.asarray(program.distance(states, start)),
    seconds=seconds,
    state_bytes=kept_bytes(states) // len(data.seeds),
  )
  yield float(np.mean(accuracy[-1])), run


def kept_bytes(states: jaxbo.OnlineState) -> int:
  """The bytes of what a method keeps beside both levels' parameters and their optimizers.

  That is the window of gradients, the last linear solution, and the memory of batches.
  """
  kept = jax.tree.leaves((states.loop.outer_state, states.memory))
  return sum(leaf.size * leaf.dtype.itemsize for leaf in kept)
