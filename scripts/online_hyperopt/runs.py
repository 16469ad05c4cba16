"""Runs of online methods: compiled once for all streams, all seeds side by side."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd

import jaxbo
from scripts.common.study import Run
from scripts.common.task import Compiled, Program, Row, Spent
from scripts.online_hyperopt import config as settings
from scripts.online_hyperopt import measures, streams
from scripts.online_hyperopt.config import NUM_EVALUATIONS, STREAMS, Config
from scripts.online_hyperopt.methods import METHODS, Rates, Setting, Variant
from scripts.online_hyperopt.problems import Problem
from scripts.online_hyperopt.streams import Schedule

TEST_BATCH = 250


class Stream(NamedTuple):
  """A stream on the device, for all seeds or, without the axis of seeds, for one of them.

  ``features [rows, features]`` and ``labels [rows]`` are shared by all seeds; the others are a
  ``schedule`` with leaves ``[seeds, rounds, batch]``, ``test_rows [seeds, rows]``, and the ``seed``
  of the initial parameters, ``[seeds]``.
  """

  features: Any
  labels: Any
  schedule: Schedule
  test_rows: Any
  seed: Any

  def rounds(self) -> Any:
    """What :func:`jaxbo.online_loop` plays, for one seed."""
    return streams.stream_of(self.features, self.schedule)


EACH = Stream(None, None, 0, 0, 0)  # type: ignore[arg-type]  # The axes of seeds.


def draw(config: Config, data: settings.Data, name: str, seeds: Sequence[int]) -> Stream:
  """Draws a stream for each seed, from its own pools."""
  kind, examples = STREAMS[config.problem][name], data.examples
  pools = [settings.pools_of(config, data, seed) for seed in seeds]
  schedules = [
    kind.draw(
      np.random.default_rng([seed, 1]), pool, examples.labels, config.rounds, config.batch_size
    )
    for seed, pool in zip(seeds, pools, strict=True)
  ]
  stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *schedules)
  test_rows = np.stack([pool.test for pool in pools])
  arrays = (examples.images, examples.labels, stacked, test_rows, np.asarray(seeds, np.int32))
  return Stream(*jax.device_put(arrays))


class State(NamedTuple):
  """All seeds of a run so far; ``[seeds, rounds, ...]`` are zero in rounds that are to come.

  A breakdown is 1 where the linear solver met curvature that was not positive, NaN without one.
  """

  online: jaxbo.online.OnlineState  # of the method, with an axis of seeds
  loss: jax.Array  # the outer loss of what was played, on the batch of the round
  breakdown: jax.Array
  logits: jax.Array  # of what was played, on the same batch


def first_state(
  online: jaxbo.online.OnlineState, seeds: int, rounds: int, batch_size: int, num_classes: int
) -> State:
  """The state before the first round."""
  nothing = lambda *shape: jnp.zeros((seeds, rounds, *shape))
  return State(online, nothing(), nothing(), nothing(batch_size, num_classes))


class Player:
  """A method on a problem; rates and streams are arguments, so that one program serves all."""

  def __init__(self, variant: Variant, problem: Problem, rounds: int, num_classes: int):
    shapes = jax.eval_shape(problem.init, jax.random.key(0))
    metrics: dict[str, Any] = {
      "loss": lambda round: problem.outer_loss(round.x, round.y, round.batch.val),
      "logits": lambda round: problem.predict(round.x, round.y, round.batch.val.images),
      "breakdown": lambda round: jnp.float32(
        optax.tree.get(round.after.outer_state, "linear_breakdown", jnp.nan)
      ),
    }
    if problem.hypergradient is not None:
      metrics["regret"] = jaxbo.online.local_regret(problem.hypergradient)

    def loop(rates: Rates, names: Sequence[str] = tuple(metrics)) -> jaxbo.online.Online:
      of = Setting(problem, rates, variant.window, shapes[1], rounds)
      wanted = {name: metrics[name] for name in names}
      return jaxbo.online_loop(
        problem.outer_loss, **METHODS[variant.method].make(of), metrics=wanted
      )

    def init(rates, stream):
      return loop(rates).init(*problem.init(jax.random.key(stream.seed)), stream.rounds())

    def play(online, rates, stream):
      online, history = loop(rates).run(online, stream.rounds(), rounds // NUM_EVALUATIONS)
      return online, history.metrics

    def step(state, t, rates, stream):
      online, new = jax.vmap(play, in_axes=(0, None, EACH))(state.online, rates, stream)
      start = t * (rounds // NUM_EVALUATIONS)
      put = lambda kept, new: jax.lax.dynamic_update_slice_in_dim(kept, new, start, axis=1)
      _, *kept = state
      kept = [put(of, new[name]) for of, name in zip(kept, State._fields[1:], strict=True)]
      told = None
      if "regret" in new:
        sums = new["regret"]
        told = {"regret": sums.total[:, -1], "left_out": sums.left_out[:, -1]}
      return State(online, *kept), told

    def evaluate(online, stream):
      reference = stream.rounds()(jax.random.key(0), online.round_count).val.images

      def classify(row):
        rows = stream.features[row[None]]
        return jnp.argmax(problem.predict(online.x, online.y, rows, reference), axis=-1)[0]

      predicted = jax.lax.map(classify, stream.test_rows, batch_size=TEST_BATCH)
      return measures.balanced_accuracy(predicted, stream.labels[stream.test_rows], num_classes)

    def loss(rates, stream):
      to_tune = loop(rates, ("loss",))
      online = to_tune.init(*problem.init(jax.random.key(stream.seed)), stream.rounds())
      return jnp.sum(to_tune.run(online, stream.rounds(), rounds)[1].metrics["loss"])

    # The first state for (rates, stream).
    self.init = jax.jit(jax.vmap(init, in_axes=(None, EACH)))
    # The rounds between two evaluations, on (rates, stream). It tells the local regret of window 1
    # so far and how many rounds it leaves out, [seeds], where the true hypergradient is known.
    self.program = Program(step)
    # Balanced accuracy on fresh data for (state, stream), [seeds].
    self.evaluate = jax.jit(jax.vmap(evaluate, in_axes=(0, EACH)))
    # The cumulative outer loss, a mean over seeds, of each of the candidates in (rates, stream).
    mean_loss = lambda *on: jnp.mean(jax.vmap(loss, in_axes=(None, EACH))(*on))
    self.losses = jax.jit(jax.vmap(mean_loss, in_axes=(0, None)))


def player_of(run: Run[Config], variant: Variant) -> Player:
  """The programs of a method, shared by all streams."""
  num_classes = int(run.data.examples.labels.max()) + 1
  make = lambda: Player(variant, run.data.problem, run.config.rounds, num_classes)
  return run.shared(variant, make)


@jax.jit
@jax.vmap
def distance(x: Any, start: Any) -> jax.Array:
  """How far ``x`` is from where it began, ``[seeds]``."""
  return optax.tree.norm(optax.tree.sub(x, start))


class Play(Compiled):
  """A method on a stream, all seeds; a step is the rounds between two evaluations."""

  def __init__(self, run: Run[Config], name: str, variant: Variant):
    self.seeds, self.rounds = list(run.config.all_seeds()), run.config.rounds
    draw_it = lambda: draw(run.config, run.data, name, self.seeds)
    stream = run.shared(("stream", name), draw_it)
    self.variant = variant
    self.rates, player = run.config.rates_of(variant), player_of(run, variant)
    rates = Rates(*map(jnp.float32, self.rates))  # Other rates do not compile again.
    online = player.init(rates, stream)
    self.start = jax.tree.map(jnp.copy, online.x)
    self.accuracy = lambda online: player.evaluate(online, stream)
    self.accuracy_at_start = self.accuracy(online)
    num_classes = int(run.data.examples.labels.max()) + 1
    sizes = len(self.seeds), self.rounds, run.config.batch_size, num_classes
    start, self.batches = first_state(online, *sizes), stream.schedule.val
    super().__init__(player.program, start, rates, stream)

  def evaluate(self, state: State, told: list[Any]) -> list[Row]:
    """A line for each seed, two the first time: there is one before the first round too."""
    done = int(state.online.round_count[0])
    loss = np.cumsum(np.asarray(state.loss)[:, :done], axis=1)[:, -1]
    unknown = {"regret": math.nan, "left_out": 0}
    lines = self._lines(done, self.accuracy(state.online), loss, told[-1] or unknown)
    if done > self.rounds // NUM_EVALUATIONS:
      return lines
    return self._lines(0, self.accuracy_at_start, 0.0, {"regret": 0.0, "left_out": 0}) + lines

  def _lines(self, done: int, accuracy: Any, loss: Any, regret: Row) -> list[Row]:
    line = {"round": done, "balanced_accuracy": accuracy, "cumulative_loss": loss}
    return self._each({**line, **regret})

  def result(self, state: State, spent: Spent) -> list[Row]:
    """A row for each seed."""
    loss, lines = np.asarray(state.loss), pd.DataFrame(spent.lines)
    of_seed = lambda name: lines.pivot(index="seed", columns="round", values=name).to_numpy()
    accuracy = of_seed("balanced_accuracy").astype(np.float32)
    scaled, temperature = measures.held_out(state.logits, self.batches)
    return self._each(
      {
        "cumulative_loss": loss.sum(axis=1),
        "scaled_loss": scaled,
        "temperature": temperature,
        "played_accuracy": measures.played_accuracy(state.logits, self.batches),
        "mean_accuracy": np.ascontiguousarray(accuracy).mean(axis=1),
        "final_accuracy": accuracy[:, -1],
        "distance": distance(state.online.x, self.start),
        "regret": of_seed("regret")[:, -1],
        "left_out": of_seed("left_out")[:, -1],
        "breakdown_share": np.asarray(state.breakdown).mean(axis=1),
        "hypergradients": self.variant.hypergradients,
        "seconds_per_round": spent.seconds / loss.size,
        "state_bytes": kept_bytes(state.online) // len(loss),
        "inner_learning_rate": self.rates.inner,
        "outer_learning_rate": self.rates.outer,
        "damping": self.rates.damping,
      }
    )

  def _each(self, values: Row) -> list[Row]:
    """A row for each seed, of numbers that are its own, ``[seeds]``, or the same for all."""
    columns = {name: jax.device_get(value) for name, value in values.items()}
    rows: Any = pd.DataFrame({"seed": self.seeds, **columns})
    return rows.to_dict("records")


def kept_bytes(online: jaxbo.online.OnlineState) -> int:
  """The bytes of what a method keeps beside both levels' parameters and their optimizers.

  That is the window of gradients, the last linear solution, and the memory of batches.
  """
  kept = jax.tree.leaves((online.loop.outer_state, online.window))
  return sum(leaf.size * leaf.dtype.itemsize for leaf in kept)
