r"""Hyper-cleaning with an inner problem that has many minima: a network that can fit all labels.

The problem of :mod:`scripts.common.cleaning` without its ridge, on a perceptron with more
parameters than there are examples. Whatever the weights of the examples are, many parameters fit
the weighted training set, wrong labels included: :math:`\inf_y g(x, y) = 0`, so that the inner loss
itself is the gap. Which of them is found is up to the method.

The unit of cost is one gradient of the inner loss in the model's parameters, on one batch: the
operations of a step are counted in its jaxpr, products with Hessians and backward passes through
inner runs included, and divided by those of that gradient.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from scripts.common import cleaning
from scripts.common.cleaning import Batch, CleaningData, Settings
from scripts.common.data import Examples
from scripts.common.study import Run
from scripts.common.task import Compiled, Program, Row, Spent
from scripts.multiple_minima import loops
from scripts.multiple_minima.config import Config
from scripts.multiple_minima.loops import Loop
from scripts.multiple_minima.methods import COMPARED, DATASETS, METHODS, sgd

RETRAINING_STEPS = 500


class Problem(NamedTuple):
  """The data of one seed, on the device."""

  train: Examples  # What the inner loss sees.
  val: Examples  # Clean: what the outer loss sees.
  test: Examples  # What is reported, or what settings are chosen by.
  noisy: Examples  # The training examples, some of which have a wrong label.
  corrupted: jax.Array  # Which ones, [num_train].
  x: jax.Array  # Where the logits of the weights start, one for each of ``train``.
  y: Any  # Where the model starts.


def make_problem(method: str, data: CleaningData, settings: Settings, seed: int) -> Problem:
  """What a method is given; the baselines have fixed weights, 0 or 1."""
  train, x = data.train, np.full(settings.num_train, 0.0 if method in COMPARED else 30.0)
  if method.startswith("oracle"):
    x[data.corrupted] = -30
  if method == "validation":
    train, x = data.val, np.full(settings.num_val, 30.0)
  if method == "oracle_validation":
    train = Examples(*(np.concatenate(pair) for pair in zip(data.train, data.val, strict=True)))
    x = np.concatenate([x, np.full(settings.num_val, 30.0)])
  y = cleaning.init_params(settings, train.images.shape[1], jax.random.key(seed))
  x, corrupted = jnp.asarray(x, jnp.float32), jnp.asarray(data.corrupted)
  return jax.device_put(Problem(train, data.val, data.test, data.train, corrupted, x, y))


def make_run(loop: Loop, settings: Settings, num_steps: int) -> Callable[..., Any]:
  """``run(state, key, problem) -> state``, ``num_steps`` outer steps of a method."""

  def step(state, key, problem):
    if settings.batch_size is None:
      return loop.step(state, Batch(problem.train, None), problem.val)
    steps = () if loop.num_batches is None else (loop.num_batches,)
    shape = (*steps, settings.batch_size)
    indices = jax.random.randint(key, shape, 0, len(problem.train.labels))
    return loop.step(state, Batch(problem.train.take(indices), indices), problem.val)

  def run(state, key, problem):
    keys = jax.random.split(key, num_steps)
    return jax.lax.scan(lambda state, key: (step(state, key, problem), None), state, keys)[0]

  return run


def cost_of_a_step(loop: Loop, linear_steps: int, settings: Settings, problem: Problem) -> float:
  """The operations of an outer step, in units of one gradient of the inner loss on one batch."""
  step = make_run(loop, settings, 1)
  state = jax.eval_shape(loop.init, problem.x, problem.y)
  # Only conjugate gradient has a loop of no fixed length.
  flops = measure.count_flops(step, state, jax.random.key(0), problem, while_steps=linear_steps)
  size = settings.batch_size or settings.num_train
  resized = lambda leaf: jnp.resize(leaf, (size, *leaf.shape[1:]))
  batch = Batch(jax.tree.map(resized, problem.train), None)
  gradient = jax.grad(cleaning.make_losses(settings)[0], argnums=1)
  return flops / measure.count_flops(gradient, jnp.zeros(size), problem.y, batch)


def retrained_accuracy(settings: Settings, key: jax.Array, problem: Problem) -> jax.Array:
  """The accuracy of a new model trained on ``train`` with the weights of ``x`` alone."""
  loop = loops.training_loop(cleaning.make_losses(settings)[0], sgd(settings))
  run = make_run(loop, settings, RETRAINING_STEPS)
  model = loop.params(run(loop.init(problem.x, problem.y), key, problem)).inner
  return cleaning.accuracy(settings, model, problem.test)


class Parts:
  """What all seeds and rates of a method share: a program that spends the budget, and its cost.

  Rates are the settings that are floats; the program takes them, so that a grid compiles little.
  """

  def __init__(
    self,
    method: str,
    static: Mapping[str, Any],
    rates: Mapping[str, float],
    settings: Settings,
    budget: float,
    problem: Problem,
  ):
    inner_loss, outer_loss = losses = cleaning.make_losses(settings)
    make = functools.partial(METHODS[method].make, *losses, settings, **static)
    self.loop = loop = make(**rates)
    self.gradients = cost_of_a_step(loop, static.get("linear_steps", 1), settings, problem)
    self.steps = max(int(budget / self.gradients), 1)

    def spend(state, t, key, rates, problem):
      key = jax.random.fold_in(jax.random.wrap_key_data(key), t)
      return make_run(make(**rates), settings, self.steps)(state, key, problem), ()

    def found(state, problem):
      """Numbers of the end, and the logits of the weights that the training examples get.

      A method without weights keeps the examples of the smaller losses; it is told how many are
      right.
      """
      params = loop.params(state)
      logits = cleaning.logits(settings, params.inner, problem.noisy.images)
      fits = jnp.argmax(logits, axis=0) == problem.noisy.labels
      values = {
        "accuracy": cleaning.accuracy(settings, params.inner, problem.test),
        "outer_loss": outer_loss(*params, problem.val),
        "gap": inner_loss(*params, Batch(problem.train, None)),  # On all that the inner loss sees.
        "wrong_learnt": jnp.sum(fits & problem.corrupted) / jnp.sum(problem.corrupted),
        "dual": loops.dual_of(state),
      }
      if method in COMPARED:
        return values, params.outer, params.outer
      losses = cleaning.cross_entropies(logits, problem.noisy.labels)
      scores = jnp.quantile(losses, 1 - jnp.mean(problem.corrupted)) - losses
      return values, scores, jnp.where(scores >= 0, 30.0, -30.0)

    self.program, self.found = Program(spend), jax.jit(found)
    # A copy: the state will be reused, the problem must stay.
    self.init = jax.jit(lambda problem: jax.tree.map(jnp.copy, loop.init(problem.x, problem.y)))


class Training(Compiled):
  """A method with some settings on one seed; its one step spends the budget."""

  def __init__(self, run: Run[Config], method: str, chosen: Mapping[str, Any], seed: int):
    config, settings = run.config, DATASETS[run.config.dataset]
    split = lambda: cleaning.split(run.data, settings, config.corruption, seed)
    problem = make_problem(method, run.shared(seed, split), settings, seed)
    rates = {name: value for name, value in chosen.items() if isinstance(value, float)}
    static = {name: value for name, value in chosen.items() if name not in rates}
    make = lambda: Parts(method, static, rates, settings, config.budget, problem)
    self.parts: Parts = run.shared((method, *static.items()), make)
    key, rates = jax.random.key(seed), {name: jnp.float32(rates[name]) for name in rates}
    state = self.parts.init(problem)
    super().__init__(self.parts.program, state, jax.random.key_data(key), rates, problem)
    self.method, self.problem, self.key = method, problem, jax.random.fold_in(key, 2**20)
    of_settings = lambda: jax.jit(functools.partial(retrained_accuracy, settings))
    self.retrain = run.shared("retrain", of_settings)

  def evaluate(self, state: Any, told: list[Any]) -> Row:
    """What was reached, and what the weights are worth: a new model, trained with them alone."""
    values, scores, weights = self.parts.found(state, self.problem)
    row = {name: float(value) for name, value in values.items()}
    if self.method.startswith("oracle"):  # It has not found its weights.
      return row
    corrupted, scores = np.asarray(self.problem.corrupted), np.asarray(scores, np.float64)
    again = self.problem._replace(train=self.problem.noisy, x=weights)
    retrained = float(self.retrain(self.key, again))
    return row | {"retrained": retrained, "auc": cleaning.detection_scores(scores, corrupted)[0]}

  def result(self, state: Any, spent: Spent) -> Row:
    """The same, and what it cost."""
    names = ("accuracy", "retrained", "auc", "wrong_learnt", "gap", "outer_loss", "dual")
    return {name: spent.lines[-1].get(name, np.nan) for name in names} | {
      "steps": self.parts.steps,
      "gradients_per_step": self.parts.gradients,
      "seconds_per_step": spent.seconds / self.parts.steps,
    }
