"""Runs of online methods: compiled once for all streams, all seeds side by side."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbo
from scripts.common.study import Compiled, Program, Row, Run, Spent
from scripts.online_hyperopt import config as settings
from scripts.online_hyperopt import methods, streams
from scripts.online_hyperopt.config import NUM_EVALUATIONS, STREAMS, Config
from scripts.online_hyperopt.methods import Rates, Variant
from scripts.online_hyperopt.problems import Problem
from scripts.online_hyperopt.streams import Schedule

TEST_BATCH = 250


class Stream(NamedTuple):
  """A stream for all seeds, on the device.

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


def draw(config: Config, data: settings.Data, name: str, seeds: Sequence[int]) -> Stream:
  """Draws a stream for each seed, from its own pools."""
  kind, examples = STREAMS[config.problem][name], data.examples
  pools = [settings.pools_of(config, data, seed) for seed in seeds]
  schedules = [
    streams.draw(kind, pool, examples, config.rounds, config.batch_size, seed)
    for seed, pool in zip(seeds, pools, strict=True)
  ]
  stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *schedules)
  test_rows = np.stack([pool.test for pool in pools])
  arrays = (examples.images, examples.labels, stacked, test_rows, np.asarray(seeds, np.int32))
  return Stream(*jax.device_put(arrays))


class State(NamedTuple):
  """All seeds of a run so far; losses and breakdowns are zero in rounds that are to come.

  Attributes:
    online: the method's, with an axis of seeds.
    loss: the outer loss of what was played, on the batch of the round, ``[seeds, rounds]``.
    breakdown: 1 where the linear solver met curvature that was not positive, NaN where there is
      none, ``[seeds, rounds]``.
  """

  online: jaxbo.OnlineState
  loss: jax.Array
  breakdown: jax.Array


class Player:
  """A method on a problem; rates and streams are arguments, so that one program serves all.

  Attributes:
    init: ``init(rates, stream) -> state``.
    program: the :class:`Program` of the rounds between two evaluations, on
      ``(rates, features, schedules)``; it tells the local regret of window 1, ``[seeds]``.
    evaluate: ``evaluate(states, stream)``, balanced accuracy on fresh data, ``[seeds]``.
    losses: ``losses(rates, stream)``, the mean over seeds of the sum over all rounds of the outer
      loss, for each of the candidates in ``rates``, side by side.
  """

  def __init__(self, variant: Variant, problem: Problem, rounds: int, num_classes: int):
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
      return methods.make_loop(variant, problem, rates, shapes[1], rounds, wanted)

    def init_one(rates, features, schedule, seed):
      x, y = problem.init(jax.random.key(seed))
      return loop(rates).init(x, y, streams.stream_of(features, schedule))

    def init(rates, stream):
      each = jax.vmap(init_one, in_axes=(None, None, 0, 0))
      online = each(rates, stream.features, stream.schedules, stream.seeds)
      nothing = lambda: jnp.zeros((len(stream.seeds), rounds))
      return State(online, nothing(), nothing())

    def play_one(online, rates, features, schedule):
      stream = streams.stream_of(features, schedule)
      online, history = loop(rates).run(online, stream, rounds // NUM_EVALUATIONS)
      return online, history.metrics

    def step(state, t, rates, features, schedules):
      each = jax.vmap(play_one, in_axes=(0, None, None, 0))
      online, new = each(state.online, rates, features, schedules)
      start = t * (rounds // NUM_EVALUATIONS)
      put = lambda kept, new: jax.lax.dynamic_update_slice_in_dim(kept, new, start, axis=1)
      regret = new["regret"].total[:, -1] if "regret" in new else None
      return State(
        online, put(state.loss, new["loss"]), put(state.breakdown, new["breakdown"])
      ), regret

    def evaluate_one(online, schedule, test_rows, features, labels):
      stream = streams.stream_of(features, schedule)
      reference = stream(jax.random.key(0), online.round_count).val.images

      def classify(row):
        rows = features[row[None]]
        return jnp.argmax(problem.predict(online.x, online.y, rows, reference), axis=-1)[0]

      predicted = jax.lax.map(classify, test_rows, batch_size=TEST_BATCH)
      return balanced_accuracy(predicted, labels[test_rows], num_classes)

    def evaluate(online, stream):
      each = jax.vmap(evaluate_one, in_axes=(0, 0, 0, None, None))
      return each(online, stream.schedules, stream.test_rows, stream.features, stream.labels)

    def sum_of_losses(rates, features, schedule, seed):
      to_tune, stream = loop(rates, ("loss",)), streams.stream_of(features, schedule)
      state = to_tune.init(*problem.init(jax.random.key(seed)), stream)
      return jnp.sum(to_tune.run(state, stream, rounds)[1].metrics["loss"])

    def losses(rates, stream):
      each = jax.vmap(sum_of_losses, in_axes=(None, None, 0, 0))
      mean = lambda rates: jnp.mean(each(rates, stream.features, stream.schedules, stream.seeds))
      return jax.vmap(mean)(rates)

    self.init, self.evaluate, self.losses = map(jax.jit, (init, evaluate, losses))
    self.program = Program(step)


def player_of(run: Run[Config], variant: Variant) -> Player:
  """The programs of a method, shared by all streams."""
  num_classes = int(run.data.examples.labels.max()) + 1
  make = lambda: Player(variant, run.data.problem, run.config.rounds, num_classes)
  return run.shared(variant, make)


def balanced_accuracy(predicted: jax.Array, labels: jax.Array, num_classes: int) -> jax.Array:
  """The mean over classes of the share of their examples that are classified correctly."""
  members = jax.nn.one_hot(labels, num_classes, axis=0)
  counts = members.sum(axis=1)
  correct = members @ (predicted == labels)
  # A class without examples does not count.
  return jnp.sum(correct / jnp.maximum(counts, 1)) / jnp.sum(counts > 0)


@jax.jit
@jax.vmap
def distance(x: Any, start: Any) -> jax.Array:
  """How far ``x`` is from where it began, ``[seeds]``."""
  return optax.tree.norm(optax.tree.sub(x, start))


class Play(Compiled):
  """A method on a stream, all seeds; a step is the rounds between two evaluations."""

  def __init__(self, run: Run[Config], name: str, variant: Variant):
    self.config, self.player = run.config, player_of(run, variant)
    seeds = self.config.all_seeds()
    draw_it = lambda: draw(self.config, run.data, name, seeds)
    self.stream = run.shared(("stream", name), draw_it)
    self.rates = self.config.rates_of(variant)
    rates = Rates(*map(jnp.float32, self.rates))  # Other rates do not compile again.
    state = self.player.init(rates, self.stream)
    self.start = jax.tree.map(jnp.copy, state.online.x)
    self.at_start = self.player.evaluate(state.online, self.stream)
    super().__init__(self.player.program, state, rates, self.stream.features, self.stream.schedules)

  def evaluate(self, state: State, told: list[Any]) -> list[Row]:
    """A line for each seed, two the first time: there is one before the first round too."""
    done, online = int(state.online.round_count[0]), state.online
    sums = np.cumsum(np.asarray(state.loss)[:, :done], axis=1)[:, -1]
    regret = np.full(len(sums), np.nan) if told[-1] is None else told[-1]
    found = (self.player.evaluate(online, self.stream), sums, regret)
    lines = self._lines(done, *found)
    if done > self.config.rounds // NUM_EVALUATIONS:
      return lines
    nothing = np.zeros(len(sums))
    return self._lines(0, self.at_start, nothing, nothing) + lines

  def _lines(self, done: int, accuracy: Any, loss: Any, regret: Any) -> list[Row]:
    return [
      {
        "seed": seed,
        "round": done,
        "balanced_accuracy": float(accuracy[i]),
        "cumulative_loss": float(loss[i]),
        "regret": float(regret[i]),
      }
      for i, seed in enumerate(self.config.all_seeds())
    ]

  def result(self, state: State, spent: Spent) -> list[Row]:
    """A row for each seed."""
    rows, moved = list[Row](), distance(state.online.x, self.start)
    loss, breakdown = np.asarray(state.loss), np.asarray(state.breakdown)
    for i, seed in enumerate(self.config.all_seeds()):
      lines = [line for line in spent.lines if line["seed"] == seed]
      accuracy = np.array([line["balanced_accuracy"] for line in lines], np.float32)
      rows.append(
        {
          "seed": seed,
          "cumulative_loss": float(loss[i].sum()),
          "mean_accuracy": float(accuracy.mean()),
          "final_accuracy": float(accuracy[-1]),
          "distance": float(moved[i]),
          "regret": lines[-1]["regret"],
          "breakdown_share": float(breakdown[i].mean()),
          "seconds_per_round": spent.seconds / loss.size,
          "state_bytes": kept_bytes(state.online) // len(loss),
          "inner_learning_rate": self.rates.inner,
          "outer_learning_rate": self.rates.outer,
          "damping": self.rates.damping,
        }
      )
    return rows


def kept_bytes(online: jaxbo.OnlineState) -> int:
  """The bytes of what a method keeps beside both levels' parameters and their optimizers.

  That is the window of gradients, the last linear solution, and the memory of batches.
  """
  kept = jax.tree.leaves((online.loop.outer_state, online.memory))
  return sum(leaf.size * leaf.dtype.itemsize for leaf in kept)
