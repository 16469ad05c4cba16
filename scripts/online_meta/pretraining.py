"""Pre-training by MAML or ANIL, until the accuracy on other classes no longer rises."""

import copy
import functools
from collections.abc import Iterable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbo
from jaxbo.tasks import sample_episode
from scripts.common.fewshot_data import ImageClasses
from scripts.common.study import Run
from scripts.common.task import Cell, Row, Task
from scripts.online_meta.config import Config
from scripts.online_meta.model import Model, Params, accuracy

EPOCH_STEPS, EVAL_TASKS = 50, 50  # meta-steps of an epoch, tasks of an evaluation


class State(NamedTuple):
  """Pre-training so far."""

  x: Params
  outer: Any  # the state of Adam and the response
  best: Params  # after the best epoch
  history: Any  # the accuracy after each epoch, on other classes after adaptation; NaN before


class Pretraining(Task):
  """Second-order MAML; a step is an epoch, and none does anything once there is no more gain."""

  def __init__(self, config: Config, model: Model, train: ImageClasses, early: ImageClasses):
    self.patience, self.key = config.pretrain_patience, jax.random.key(0)
    inner_sgd = optax.sgd(config.pretrain_inner_rate)
    one = model.inner(inner_sgd, config.inner_steps)
    inner = jaxbo.over_tasks(one, config.pretrain_tasks)
    outer = optax.chain(
      jaxbo.add_unrolled_response(inner), optax.scale_by_adam(), optax.scale(-config.pretrain_rate)
    )
    shots = config.num_shots
    sizes = {"num_ways": config.num_ways, "num_shots": shots, "num_queries": shots}

    def episode(key, images):
      drawn = sample_episode(key, images, **sizes)
      support = (drawn.support_images, drawn.support_labels)
      return support, (drawn.query_images, drawn.query_labels)

    def outer_loss(x, y, batches):
      losses, _ = jax.vmap(lambda y, batch: model.loss(x, y, batch))(y, batches)
      return jnp.mean(losses)

    @functools.partial(jax.jit, donate_argnums=1)
    def train_epoch(x, state, key, images):
      def step(carry, key):
        x, state = carry
        keys = jax.random.split(key, config.pretrain_tasks)
        support, query = jax.vmap(lambda key: episode(key, images))(keys)
        solution = inner.solve(x, inner.init(model.start(x), x, support), support)
        grads = jaxbo.outer_grad(outer_loss)(x, solution.params, query)
        updates, state = outer.update(grads, state, x, solution=solution, batch=support)
        return (optax.apply_updates(x, updates), state), None

      return jax.lax.scan(step, (x, state), jax.random.split(key, EPOCH_STEPS))[0]

    @jax.jit
    def judge(x, images):
      def one_task(key):
        support, query = episode(key, images)
        y = one.solve(x, one.init(model.start(x), x, support), support).params
        return accuracy(model.loss(x, y, query)[1], query)

      return jnp.mean(jax.lax.map(one_task, jax.random.split(jax.random.key(7), EVAL_TASKS)))

    images = jax.device_put((train.images, early.images))
    self.train = lambda x, state, key: train_epoch(x, state, key, images[0])
    self.judge = lambda x: judge(x, images[1])
    nothing = jnp.full(config.pretrain_epochs, jnp.nan)
    self.begin = lambda x: State(x, outer.init(x), x, nothing)
    self.init = model.init

  def of(self, seed: int) -> Self:
    """The pre-training of a seed; seeds share what is compiled."""
    mine = copy.copy(self)
    init_key, mine.key = jax.random.split(jax.random.key(seed))
    mine.state = self.begin(self.init(init_key))
    return mine

  def step(self, state: State, t: int) -> tuple[State, float | None]:
    """Does an epoch, or nothing."""
    history = [float(value) for value in np.asarray(state.history)[:t]]
    if history and t - 1 - history.index(max(history)) >= self.patience:
      return state, None
    x, outer = self.train(state.x, state.outer, jax.random.fold_in(self.key, t))
    history.append(float(self.judge(x)))
    best = x if history[-1] == max(history) else state.best
    return State(x, outer, best, state.history.at[t].set(history[-1])), history[-1]

  def evaluate(self, state: State, told: list[float | None]) -> list[Row]:
    """The accuracy after an epoch."""
    del state
    return [{"accuracy": value} for value in told if value is not None]


def cell(run: Run[Config], begins: str, seed: int) -> Cell:
  """The pre-training of a kind, ``"maml"`` or ``"anil"``."""
  config, data = run.config, run.data
  once = lambda: Pretraining(config, config.model(begins), data.train, data.early)
  make = lambda: run.shared(("pretraining", begins), once).of(seed)
  key = {"method": f"{begins}_pretraining", "seed": seed}
  label = f"pre-training, {begins.upper()}, seed {seed}"
  return Cell(key, make, config.pretrain_epochs, label, every=1, checkpoint_every=1)


def trained(run: Run[Config], begins: str, seeds: Iterable[int]) -> Params:
  """The pre-trained parameters of a kind, leaves ``[seeds, ...]``."""
  of = lambda seed: run.shared(
    ("trained", begins, seed), lambda: run.state(cell(run, begins, seed)).best
  )
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(of(int(seed)) for seed in seeds))
