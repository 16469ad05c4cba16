r"""Few-shot meta-learning: the methods side by side, as bilevel problems on episodes.

A backbone with parameters :math:`x` gives features; a linear head :math:`y_t` is learnt for each
task from its support set, and judged by its query set:

.. math::
  \min_x \frac1T \sum_t \mathrm{CE}(y_t^N(x);\, \phi_x(Q_t)), \qquad
  y_t^N \approx \arg\min_y \mathrm{CE}(y;\, \phi_x(S_t)) + \frac\lambda2 \|y\|^2

Batch statistics are those of the set that is seen (transductive): support and query sets are
normalised by themselves, in training and in evaluation alike.

References: Raghu et al., `Rapid Learning or Feature Reuse? <https://arxiv.org/abs/1909.09157>`_
(ANIL); Finn et al., `Model-Agnostic Meta-Learning <https://arxiv.org/abs/1703.03400>`_ (MAML);
Snell et al., `Prototypical Networks <https://arxiv.org/abs/1703.05175>`_.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxbo_models.linear_head import cross_entropy, logits, zero_head

import jaxbo
from jaxbo.tasks import Episode
from scripts.few_shot.setting import Draw, Settings, draw_key


class Backbone(NamedTuple):
  """A model of features.

  Attributes:
    init: ``init(key, images) -> x``.
    features: ``features(x, images) -> [n, d]``, for weights that all tasks share.
    features_of_task: the same function, made for weights that differ between tasks under ``vmap``.
  """

  init: Callable[[jax.Array, jax.Array], Any]
  features: Callable[[Any, jax.Array], jax.Array]
  features_of_task: Callable[[Any, jax.Array], jax.Array]


def scale_pixels(images: jax.Array) -> jax.Array:
  """uint8 pixels as float32 in [0, 1]; floats as they are."""
  return images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images


class Method(NamedTuple):
  """A method on a backbone.

  Attributes:
    init: ``init(key, images) -> state``, from a few images; ``state.x`` is the backbone.
    step: ``step(state, episodes) -> (state, loss)``, a meta-step on episodes ``[tasks, ...]``.
    predict: ``predict(state, episode) -> logits`` of the query set of one episode.
  """

  init: Callable[..., Any]
  step: Callable[..., Any]
  predict: Callable[..., jax.Array]


def optimizer(settings: Settings, num_steps: int) -> optax.GradientTransformation:
  """Adam whose rate falls to a tenth."""
  return optax.adam(optax.cosine_decay_schedule(settings.outer_learning_rate, num_steps, alpha=0.1))


def head_solver(backbone: Backbone, settings: Settings, *, shared: bool) -> jaxbo.InnerSolver:
  """SGD on the head of one task; it sees the backbone through its features alone."""
  features = backbone.features if shared else backbone.features_of_task

  def loss(z, y, episode):
    fit = cross_entropy(logits(y, z), episode.support_labels)
    return fit + settings.ridge / 2 * optax.tree.norm(y, squared=True)

  return jaxbo.inner_solver(
    loss,
    optax.sgd(settings.inner_learning_rate, settings.momentum),
    settings.inner_steps,
    warm_start=False,
    through=lambda x, episode: features(x, scale_pixels(episode.support_images)),
  )


def head_method(
  make_response: Callable[[jaxbo.InnerSolver, Settings, Any], Any],
  backbone: Backbone,
  settings: Settings,
  num_steps: int,
  seed: int,
  *,
  shared: bool = True,
) -> Method:
  """A method that learns heads: ANIL with the response that is given.

  Every head starts at the mean of the heads of the last step, the first ones at zero.
  ``shared`` says that all runs of a step see the same backbone, which only perturbing it breaks.
  """
  one = head_solver(backbone, settings, shared=shared)
  inner = jaxbo.over_tasks(one, settings.num_tasks, average_start=True)
  key = draw_key(Draw.DIRECTIONS, seed)
  outer = optax.chain(make_response(inner, settings, key), optimizer(settings, num_steps))

  def outer_loss(x, heads, episodes):
    def of_task(head, episode):
      z = backbone.features(x, scale_pixels(episode.query_images))
      return cross_entropy(logits(head, z), episode.query_labels)

    return jnp.mean(jax.vmap(of_task)(heads, episodes))

  init_loop, step_loop = jaxbo.bilevel(outer_loss, inner, outer)

  def init(key, images):
    x = backbone.init(key, scale_pixels(images))
    num_features = jax.eval_shape(backbone.features, x, scale_pixels(images)).shape[-1]
    return init_loop(x, zero_head(num_features, settings.num_ways))

  def step(state, episodes):
    state, info = step_loop(state, episodes, episodes)
    return state, info.outer_loss

  def predict(state, episode):
    x = state.x
    start = jax.tree.map(lambda heads: jnp.mean(heads, axis=0), state.solution.params)
    head = one.solve(x, one.init(start), episode).params
    return logits(head, backbone.features(x, scale_pixels(episode.query_images)))

  return Method(init, step, predict)


def maml(backbone: Backbone, settings: Settings, num_steps: int) -> Method:
  """MAML: every task moves all parameters, by an offset that starts at zero."""
  features = backbone.features_of_task

  def apply(x, y, images):
    both = optax.tree.add(x, y)
    return logits(both["head"], features(both["backbone"], scale_pixels(images)))

  def loss(x, y, episode):
    return cross_entropy(apply(x, y, episode.support_images), episode.support_labels)

  one = jaxbo.inner_solver(
    loss, optax.sgd(settings.maml_learning_rate), settings.maml_steps, warm_start=False
  )
  inner = jaxbo.over_tasks(one, settings.num_tasks)
  outer = optax.chain(jaxbo.add_unrolled_response(inner), optimizer(settings, num_steps))

  def outer_loss(x, offsets, episodes):
    of_task = lambda y, e: cross_entropy(apply(x, y, e.query_images), e.query_labels)
    return jnp.mean(jax.vmap(of_task)(offsets, episodes))

  init_loop, step_loop = jaxbo.bilevel(outer_loss, inner, outer)

  def init(key, images):
    x = backbone.init(key, scale_pixels(images))
    num_features = jax.eval_shape(features, x, scale_pixels(images)).shape[-1]
    x = {"backbone": x, "head": zero_head(num_features, settings.num_ways)}
    return init_loop(x, optax.tree.zeros_like(x))

  def step(state, episodes):
    state, info = step_loop(state, episodes, episodes)
    return state, info.outer_loss

  def predict(state, episode):
    offset = one.solve(state.x, one.init(optax.tree.zeros_like(state.x)), episode).params
    return apply(state.x, offset, episode.query_images)

  return Method(init, step, predict)


class ProtoState(NamedTuple):
  """State of :func:`protonet`."""

  x: Any
  opt_state: Any


def protonet(backbone: Backbone, settings: Settings, num_steps: int) -> Method:
  """Prototypical networks, the reference point: nearest class mean, no inner problem."""
  tx = optimizer(settings, num_steps)

  def of_task(x, episode):
    z = backbone.features(x, scale_pixels(episode.support_images))
    members = jax.nn.one_hot(episode.support_labels, settings.num_ways)
    prototypes = members.T @ z / settings.num_shots
    queries = backbone.features(x, scale_pixels(episode.query_images))
    return -jnp.sum((queries[:, None] - prototypes[None]) ** 2, axis=-1)

  def init(key, images):
    x = backbone.init(key, scale_pixels(images))
    return ProtoState(x, tx.init(x))

  def step(state, episodes):
    def loss(x):
      of_one = lambda episode: cross_entropy(of_task(x, episode), episode.query_labels)
      return jnp.mean(jax.vmap(of_one)(episodes))

    value, grads = jax.value_and_grad(loss)(state.x)
    updates, opt_state = tx.update(grads, state.opt_state, state.x)
    return ProtoState(optax.apply_updates(state.x, updates), opt_state), value

  return Method(init, step, lambda state, episode: of_task(state.x, episode))


RESPONSES: dict[str, Callable[[jaxbo.InnerSolver, Settings, Any], Any]] = {
  "esj_through": lambda inner, s, key: jaxbo.add_es_response(
    inner, s.num_samples, s.smoothing, directions="orthogonal", per_task=True, key=key
  ),
  "esj_shrunk": lambda inner, s, key: jaxbo.add_es_response(
    inner,
    s.num_samples,
    s.smoothing,
    directions="orthogonal",
    per_task=True,
    response_scale=s.response_scale,
    key=key,
  ),
  "esj": lambda inner, s, key: jaxbo.add_es_response(
    inner,
    s.num_samples_plain,
    s.smoothing_plain,
    perturb_features=False,
    sample_batch_size=1,
    key=key,
  ),
  "itd": lambda inner, s, key: jaxbo.add_unrolled_response(inner),
  "aid": lambda inner, s, key: jaxbo.add_implicit_response(
    inner, jaxbo.conjugate_gradient(s.linear_steps)
  ),
  "first_order": lambda inner, s, key: jaxbo.drop_response(),
}

LABELS = {
  "esj_through": "ESJ on features",
  "esj_shrunk": "ESJ on features, shrunk",
  "esj": "ESJ on parameters",
  "itd": "ITD (ANIL)",
  "aid": "AID-CG",
  "first_order": "first order",
  "maml": "MAML",
  "protonet": "ProtoNet",
}


def make_method(
  name: str, backbone: Backbone, settings: Settings, num_steps: int, seed: int
) -> Method:
  """The method of that name."""
  if name == "maml":
    return maml(backbone, settings, num_steps)
  if name == "protonet":
    return protonet(backbone, settings, num_steps)
  return head_method(RESPONSES[name], backbone, settings, num_steps, seed, shared=name != "esj")


def accuracy(method: Method, state: Any, episode: Episode) -> jax.Array:
  """The share of query images that are classified correctly after adapting."""
  predicted = jnp.argmax(method.predict(state, episode), axis=-1)
  return jnp.mean(predicted == episode.query_labels)
