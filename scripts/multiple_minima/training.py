r"""Hyper-cleaning with an inner problem that has many minima: a network that can fit all labels.

The problem of :mod:`scripts.common.cleaning` without its ridge, on a perceptron with more
parameters than there are examples. Whatever the weights of the examples are, many parameters fit
the weighted training set, wrong labels included: :math:`\inf_y g(x, y) = 0`, so that the inner loss
itself is the gap. Which of them is found is up to the method.

The unit of cost is one gradient of the inner loss in the model's parameters, on one batch: the
operations of a step are counted in its jaxpr, products with Hessians and backward passes through
inner runs included, and divided by those of that gradient.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from scripts.common import cleaning
from scripts.common.cleaning import Batch, CleaningData, Settings
from scripts.common.data import Examples
from scripts.common.task import Compiled, Program
from scripts.multiple_minima import loops
from scripts.multiple_minima.loops import Loop
from scripts.multiple_minima.methods import BASELINES, METHODS, sgd

BUDGETS = {"digits": 1500, "mnist": 2000}
RETRAINING_STEPS = 500


class Problem(NamedTuple):
  """The data of one seed, on the device."""

  train: Examples  # What the inner loss sees.
  val: Examples  # What the outer loss sees.
  test: Examples  # For reports only.
  x: jax.Array  # Where the logits of the weights start, [num_train].
  y: Any  # Where the model starts.
  corrupted: jax.Array  # Which of ``train`` have a wrong label, [num_train].


def make_problem(method: str, data: CleaningData, settings: Settings, seed: int) -> Problem:
  """What a method is given; the baselines have fixed weights, 0 or 1."""
  train, corrupted = data.train, data.corrupted
  if method == "validation":
    train, corrupted = data.val, np.zeros(len(data.val.labels), bool)
  if method == "oracle_validation":
    train = Examples(*(np.concatenate(pair) for pair in zip(data.train, data.val, strict=True)))
    corrupted = np.concatenate([corrupted, np.zeros(len(data.val.labels), bool)])
  x = np.full(len(corrupted), 30.0 if method in BASELINES else 0.0, np.float32)
  if method.startswith("oracle"):
    x[corrupted] = -30
  y = cleaning.init_params(settings, train.images.shape[1], jax.random.key(seed))
  x, corrupted = jnp.asarray(x), jnp.asarray(corrupted)
  return jax.device_put(Problem(train, data.val, data.test, x, y, corrupted))


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


def cost_of_a_step(
  loop: Loop, chosen: Mapping[str, Any], settings: Settings, problem: Problem
) -> float:
  """The operations of an outer step, in units of one gradient of the inner loss on one batch."""
  step = make_run(loop, settings, 1)
  state = jax.eval_shape(loop.init, problem.x, problem.y)
  # Only conjugate gradient has a loop of no fixed length.
  steps = chosen.get("linear_steps", 1)
  flops = measure.count_flops(step, state, jax.random.key(0), problem, while_steps=steps)
  size = settings.batch_size or settings.num_train
  resized = lambda leaf: jnp.resize(leaf, (size, *leaf.shape[1:]))
  batch = Batch(jax.tree.map(resized, problem.train), None)
  gradient = jax.grad(cleaning.make_losses(settings)[0], argnums=1)
  return flops / measure.count_flops(gradient, jnp.zeros(size), problem.y, batch)


def retrained_accuracy(
  settings: Settings, x: jax.Array, key: jax.Array, problem: Problem
) -> jax.Array:
  """The accuracy of a new model trained with the weights alone, without the validation set."""
  loop = loops.training_loop(cleaning.make_losses(settings)[0], sgd(settings))
  state = make_run(loop, settings, RETRAINING_STEPS)(loop.init(x, problem.y), key, problem)
  return cleaning.accuracy(settings, loop.params(state).inner, problem.test)


class Parts:
  """What all seeds of a method share: its loop, its program and what they cost.

  A step of ``program`` is as many outer ``steps``, at least one, as use up a share of the budget of
  ``gradients``; it tells how many of its kind were done.
  """

  def __init__(
    self, method: str, chosen: Mapping[str, Any], settings: Settings, share: float, problem: Problem
  ):
    inner_loss, outer_loss = losses = cleaning.make_losses(settings)
    self.loop = loop = METHODS[method].make(*losses, settings, **chosen)
    self.gradients = cost_of_a_step(loop, chosen, settings, problem)
    self.steps = max(int(share / self.gradients), 1)
    run = make_run(loop, settings, self.steps)

    def some_steps(state, t, key, problem):
      key = jax.random.fold_in(jax.random.wrap_key_data(key), t * self.steps)
      return run(state, key, problem), t + 1

    def measure(state, problem):
      params = loop.params(state)
      logits = cleaning.logits(settings, params.inner, problem.train.images)
      fits = jnp.argmax(logits, axis=0) == problem.train.labels
      return {
        "accuracy": cleaning.accuracy(settings, params.inner, problem.test),
        "outer_loss": outer_loss(*params, problem.val),
        "gap": inner_loss(*params, Batch(problem.train, None)),  # On all training examples.
        # The share of wrong labels that the model gives back.
        "wrong_learnt": jnp.sum(fits & problem.corrupted) / jnp.sum(problem.corrupted),
        "dual": loops.dual_of(state),
      }, jax.nn.sigmoid(params.outer)

    self.program, self.measure = Program(some_steps), jax.jit(measure)
    # A copy: the state will be reused, the problem must stay.
    self.init = jax.jit(lambda problem: jax.tree.map(jnp.copy, loop.init(problem.x, problem.y)))


class Training(Compiled):
  """A method on one seed."""

  def __init__(self, parts: Parts, problem: Problem, seed: int):
    key = jax.random.key_data(jax.random.key(seed))
    super().__init__(parts.program, parts.init(problem), key, problem)
    self.parts, self.problem = parts, problem

  def values(self, state: Any) -> dict[str, float]:
    """What a point of a curve shows."""
    values, weights = self.parts.measure(state, self.problem)
    corrupted = np.asarray(self.problem.corrupted)
    auc, f1 = cleaning.detection_scores(np.asarray(weights, np.float64), corrupted)
    return {name: float(value) for name, value in values.items()} | {"auc": auc, "f1": f1}
