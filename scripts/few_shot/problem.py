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

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxbo_models.linear_head import cross_entropy, logits, zero_head

import jaxbo
from scripts.few_shot.setting import Draw, Settings, draw_key

LABELS = {
  "esj_through": "ESJ on features",
  "esj_shrunk": "ESJ on features, shrunk",
  "esj": "ESJ on parameters",
  "official": "ESJ, published scaling",
  "itd": "ITD (ANIL)",
  "aid": "AID-CG",
  "first_order": "first order",
  "maml": "MAML",
  "protonet": "ProtoNet",
}


class Backbone(NamedTuple):
  """A model of features: ``init(key, images) -> x`` and ``features(x, images) -> [n, d]``.

  ``features`` is for weights that all tasks share; ``features_of_task`` is the same function, made
  for weights that differ between tasks under ``vmap``.
  """

  init: Callable[[jax.Array, jax.Array], Any]
  features: Callable[[Any, jax.Array], jax.Array]
  features_of_task: Callable[[Any, jax.Array], jax.Array]


class Method(NamedTuple):
  """A method on a backbone; a meta-step is on episodes ``[tasks, ...]``."""

  init: Callable[..., Any]  # init(key, images) -> state
  step: Callable[..., Any]  # step(state, episodes) -> (state, loss)
  predict: Callable[..., jax.Array]  # predict(state, episode) -> logits of its query set


class Learner(NamedTuple):
  """What a task learns from its support set."""

  inner: jaxbo.InnerSolver  # Of one task.
  apply: Callable[[Any, Any, jax.Array], jax.Array]  # apply(x, y, images) -> logits
  init: Callable[[Any, Any], tuple[Any, Any]]  # init(x, head) -> (x, y0), from a head at zero
  average_start: bool  # Starts at the mean over the tasks of the last step, else at zero.


def head_learner(backbone: Backbone, settings: Settings, *, shared: bool) -> Learner:
  """ANIL: SGD on a linear head; it sees the backbone through its features alone.

  ``shared`` says that all runs of a step see the same backbone, which only perturbing it breaks.
  """
  features = backbone.features if shared else backbone.features_of_task

  def loss(z, y, episode):
    fit = cross_entropy(logits(y, z), episode.support_labels)
    return fit + settings.ridge / 2 * optax.tree.norm(y, squared=True)

  inner = jaxbo.inner_solver(
    loss,
    optax.sgd(settings.inner_learning_rate, settings.momentum),
    settings.inner_steps,
    warm_start=False,
    through=lambda x, episode: features(x, episode.support_images),
  )
  apply = lambda x, y, images: logits(y, backbone.features(x, images))
  return Learner(inner, apply, lambda x, head: (x, head), average_start=True)


def maml_learner(backbone: Backbone, settings: Settings) -> Learner:
  """MAML: every task moves all parameters, by an offset that starts at zero."""

  def apply(x, y, images):
    both = optax.tree.add(x, y)
    return logits(both["head"], backbone.features_of_task(both["backbone"], images))

  def loss(x, y, episode):
    return cross_entropy(apply(x, y, episode.support_images), episode.support_labels)

  def init(x, head):
    both = {"backbone": x, "head": head}
    return both, optax.tree.zeros_like(both)

  sgd = optax.sgd(settings.maml_learning_rate)
  inner = jaxbo.inner_solver(loss, sgd, settings.maml_steps, warm_start=False)
  return Learner(inner, apply, init, average_start=False)


def _on_features(inner, s, key, over, scale=1.0):
  law = {"directions": "orthogonal", "per_task": True, "response_scale": scale, **over}
  return jaxbo.add_es_response(inner, s.num_samples, s.smoothing, **law, key=key)


def _on_parameters(inner, s, key, over):
  law = {"perturb_features": False, "sample_batch_size": 1, **over}
  return jaxbo.add_es_response(inner, s.num_samples_plain, s.smoothing_plain, **law, key=key)


def _official(inner, s, key, over):
  """The authors' code: one direction for all tasks, of norm 1 in each tensor of the backbone."""
  del over  # One sample cannot be divided.
  law = {"directions": "official", "perturb_features": False}
  return jaxbo.add_es_response(inner, 1, s.smoothing_official, **law, key=key)


ON_PARAMETERS = ("esj", "official")  # Their runs see a backbone each.
RESPONSES: dict[str, Callable[[jaxbo.InnerSolver, Settings, Any, Mapping[str, Any]], Any]] = {
  "esj_through": _on_features,
  "esj_shrunk": lambda inner, s, key, over: _on_features(inner, s, key, over, s.response_scale),
  "esj": _on_parameters,
  "official": _official,
  "itd": lambda inner, s, key, over: jaxbo.add_unrolled_response(inner),
  "aid": lambda inner, s, key, over: jaxbo.add_implicit_response(
    inner, jaxbo.conjugate_gradient(s.linear_steps)
  ),
  "first_order": lambda inner, s, key, over: jaxbo.drop_response(),
  "maml": lambda inner, s, key, over: jaxbo.add_unrolled_response(inner),
}


def optimizer(settings: Settings, num_steps: int) -> optax.GradientTransformation:
  """Adam whose rate falls to a tenth."""
  return optax.adam(optax.cosine_decay_schedule(settings.outer_learning_rate, num_steps, alpha=0.1))


def make_method(
  name: str,
  backbone: Backbone,
  settings: Settings,
  num_steps: int,
  seed: int,
  over: Mapping[str, Any] = MappingProxyType({}),
) -> Method:
  """The method of that name; ``step`` and ``predict`` are the same functions for every seed.

  ``over`` says among which devices ES divides its samples.
  """
  tx = optimizer(settings, num_steps)
  if name == "protonet":
    return protonet(backbone, settings, tx)
  if name == "maml":
    one = maml_learner(backbone, settings)
  else:
    one = head_learner(backbone, settings, shared=name not in ON_PARAMETERS)
  inner = jaxbo.over_tasks(one.inner, settings.num_tasks, average_start=one.average_start)
  response = RESPONSES[name](inner, settings, draw_key(Draw.DIRECTIONS, seed), over)

  def outer_loss(x, ys, episodes):
    of_task = lambda y, e: cross_entropy(one.apply(x, y, e.query_images), e.query_labels)
    return jnp.mean(jax.vmap(of_task)(ys, episodes))

  init_loop, step_loop = jaxbo.bilevel_loop(outer_loss, inner, optax.chain(response, tx))

  def init(key, images):
    x = backbone.init(key, images)
    features = jax.eval_shape(backbone.features, x, images)
    return init_loop(*one.init(x, zero_head(features.shape[-1], settings.num_ways)))

  def step(state, episodes):
    state, info = step_loop(state, episodes, episodes)
    return state, info.outer_loss

  def predict(state, episode):
    of_start = lambda y: jnp.mean(y, axis=0) if one.average_start else jnp.zeros_like(y[0])
    start = one.inner.init(jax.tree.map(of_start, state.solution.params))
    y = one.inner.solve(state.x, start, episode).params
    return one.apply(state.x, y, episode.query_images)

  return Method(init, step, predict)


def protonet(backbone: Backbone, settings: Settings, tx: optax.GradientTransformation) -> Method:
  """Prototypical networks, the reference point: nearest class mean, no inner problem."""

  def of_task(x, episode):
    z = backbone.features(x, episode.support_images)
    members = jax.nn.one_hot(episode.support_labels, settings.num_ways)
    prototypes = members.T @ z / settings.num_shots
    queries = backbone.features(x, episode.query_images)
    return -jnp.sum((queries[:, None] - prototypes[None]) ** 2, axis=-1)

  def init(key, images):
    x = backbone.init(key, images)
    return x, tx.init(x)

  def step(state, episodes):
    x, opt_state = state

    def loss(x):
      of_one = lambda episode: cross_entropy(of_task(x, episode), episode.query_labels)
      return jnp.mean(jax.vmap(of_one)(episodes))

    value, grads = jax.value_and_grad(loss)(x)
    updates, opt_state = tx.update(grads, opt_state, x)
    return (optax.apply_updates(x, updates), opt_state), value

  return Method(init, step, lambda state, episode: of_task(state[0], episode))
