"""Conv4 with a linear head as a pair of losses, and its pre-training by MAML or ANIL."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxbo_models import Conv4

import jaxbo
from jaxbo.tasks import sample_episode
from scripts.common.fewshot_data import ImageClasses


class Params(NamedTuple):
  """The parameters of a classifier."""

  backbone: Any
  head: Any


class Model(NamedTuple):
  """A classifier whose inner parameters are an offset of all its parameters, or of the head.

  Attributes:
    init: ``init(key) -> Params``, not trained.
    loss: ``loss(x, y, (images, labels)) -> (cross entropy, logits)``.
    start: ``start(x) -> y``, zeros.
  """

  init: Callable[[jax.Array], Params]
  loss: Callable[[Params, Any, Any], tuple[jax.Array, jax.Array]]
  start: Callable[[Params], Any]

  def inner(self, optimizer: optax.GradientTransformation, num_steps: int) -> jaxbo.InnerSolver:
    """The steps of a round."""
    return jaxbo.inner_solver(lambda x, y, batch: self.loss(x, y, batch)[0], optimizer, num_steps)


def conv4(width: int, size: int, num_ways: int, adapt: str = "all") -> Model:
  """Conv4 of ``width`` channels for images of ``size`` pixels; adapts all or the ``"head"``."""
  backbone = Conv4(width)

  def init(key):
    images = jnp.zeros((2, size, size, 1))
    variables = backbone.init(key, images)
    features = jax.eval_shape(backbone.apply, variables, images)
    head = {"w": jnp.zeros((features.shape[-1], num_ways)), "b": jnp.zeros(num_ways)}
    return Params(variables, head)

  def loss(x, y, batch):
    images, labels = batch
    weights, head = (
      optax.tree.add(x, y) if adapt == "all" else Params(x.backbone, optax.tree.add(x.head, y))
    )
    features = jnp.asarray(backbone.apply(weights, images.astype(jnp.float32) / 255))
    logits = features @ head["w"] + head["b"][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits

  start = lambda x: optax.tree.zeros_like(x if adapt == "all" else x.head)
  return Model(init, loss, start)


def accuracy(logits: jax.Array, batch: Any) -> jax.Array:
  """The share of the images that are classified correctly."""
  return jnp.mean(jnp.argmax(logits, axis=-1) == batch[1], dtype=jnp.float32)


class Pretraining(NamedTuple):
  """How a model is trained before the stream.

  Attributes:
    num_ways: classes of a task.
    num_shots: support images of a class.
    num_queries: query images of a class.
    num_tasks: tasks of a meta-step.
    inner_steps: inner steps.
    inner_learning_rate: of them.
    learning_rate: of Adam.
    steps_per_epoch: meta-steps between evaluations.
    max_epochs: when to stop at the latest.
    patience: evaluations without a better one after which to stop.
    eval_tasks: tasks of an evaluation.
  """

  num_ways: int
  num_shots: int
  num_queries: int
  num_tasks: int
  inner_steps: int
  inner_learning_rate: float
  learning_rate: float
  steps_per_epoch: int
  max_epochs: int
  patience: int
  eval_tasks: int = 50


def pretrain(
  model: Model,
  setting: Pretraining,
  train: ImageClasses,
  early: ImageClasses,
  key: jax.Array,
  on_epoch: Callable[[int, float], None] = lambda epoch, accuracy: None,
) -> tuple[Params, list[float]]:
  """Second-order MAML until the accuracy on other classes, after adaptation, no longer rises.

  Returns:
    The best parameters, and the accuracy after each epoch.
  """
  one = model.inner(optax.sgd(setting.inner_learning_rate), setting.inner_steps)
  inner = jaxbo.over_tasks(one, setting.num_tasks)
  outer = optax.chain(
    jaxbo.add_unrolled_response(inner), optax.scale_by_adam(), optax.scale(-setting.learning_rate)
  )

  def episode(key, images):
    episode = sample_episode(
      key,
      images,
      num_ways=setting.num_ways,
      num_shots=setting.num_shots,
      num_queries=setting.num_queries,
    )
    support = (episode.support_images, episode.support_labels)
    return support, (episode.query_images, episode.query_labels)

  def outer_loss(x, y, batches):
    losses, _ = jax.vmap(lambda y, batch: model.loss(x, y, batch))(y, batches)
    return jnp.mean(losses)

  @functools.partial(jax.jit, donate_argnums=1)
  def train_epoch(x, state, key, images):
    def step(carry, key):
      x, state = carry
      keys = jax.random.split(key, setting.num_tasks)
      support, query = jax.vmap(lambda key: episode(key, images))(keys)
      solution = inner.solve(x, inner.init(model.start(x), x, support), support)
      grads = jax.grad(outer_loss, argnums=(0, 1))(x, solution.params, query)
      updates, state = outer.update(grads, state, x, solution=solution, batch=support)
      return (optax.apply_updates(x, updates), state), None

    keys = jax.random.split(key, setting.steps_per_epoch)
    return jax.lax.scan(step, (x, state), keys)[0]

  @jax.jit
  def evaluate(x, images):
    def one_task(key):
      support, query = episode(key, images)
      y = one.solve(x, one.init(model.start(x), x, support), support).params
      return accuracy(model.loss(x, y, query)[1], query)

    return jnp.mean(jax.lax.map(one_task, jax.random.split(jax.random.key(7), setting.eval_tasks)))

  init_key, train_key = jax.random.split(key)
  x = model.init(init_key)
  state, best, history = outer.init(x), x, []
  images = jax.device_put((train.images, early.images))
  for epoch in range(setting.max_epochs):
    x, state = train_epoch(x, state, jax.random.fold_in(train_key, epoch), images[0])
    history.append(float(evaluate(x, images[1])))
    on_epoch(epoch, history[-1])
    if history[-1] == max(history):
      best = x
    if epoch - history.index(max(history)) >= setting.patience:
      break
  return best, history
