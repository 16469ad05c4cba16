r"""Online bilevel problems on a stream of labelled images or texts.

* Loss tuning: :math:`x` are the temperature and the shift of each class in the inner loss,
  :math:`g_t = \mathrm{CE}(\sigma(d) \odot z(y) + l)`, and :math:`f_t = \mathrm{CE}(z(y))` on
  validation data in which every class counts the same.
* Per-feature ridge: :math:`g_t = \mathrm{CE}(y) + \frac12 \sum_j e^{x_j} \|y_j\|^2`, on data with
  wrong labels; :math:`f_t = \mathrm{CE}(y)` on clean data. :math:`g_t` is strongly convex, so the
  true hypergradient is known.
* Hyper-representation: :math:`x` is a backbone, :math:`y` a linear head with a ridge.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxbo_models import Conv4
from jaxbo_models.linear_head import cross_entropy, logits, zero_head

import jaxbo
from scripts.online_hyperopt.streams import Batch

RIDGE_BOX = (-7.0, -2.0)  # of the logarithms of the ridge


class Features(NamedTuple):
  """A model of features, before a linear head.

  ``apply(params, images, reference) -> [n, width]`` is as in training without a ``reference``, and
  as in evaluation with one: what depends on other images of a batch is taken from there.
  """

  init: Callable[[jax.Array], Any]  # of a key
  apply: Callable[..., jax.Array]
  width: int  # how many features there are


class Problem(NamedTuple):
  """An online bilevel problem, for ``x`` and ``y``."""

  init: Callable[[jax.Array], tuple[Any, Any]]  # of a key
  inner_loss: Callable[[Any, Any, Batch], jax.Array]
  outer_loss: Callable[[Any, Any, Batch], jax.Array]
  predict: Callable[..., jax.Array]  # the logits of (x, y, images, reference), see Features
  project: Callable[[Any], Any] | None = None  # of x
  hypergradient: Callable[[Any, jaxbo.online.OnlineBatch], Any] | None = (
    None  # if it is known: of x
  )


def make_features(model: str, num_inputs: int, width: int) -> Features:
  """The features ``"linear"``, which has no parameters, ``"mlp"`` or ``"conv4"``.

  Raises:
    ValueError: if images are too small for convolutions.
  """
  if model == "linear":
    return Features(lambda key: {}, lambda params, images, reference=None: images, num_inputs)
  if model == "mlp":
    he = jax.nn.initializers.he_normal()
    init = lambda key: {"w": he(key, (num_inputs, width)), "b": jnp.zeros(width)}
    relu = lambda params, images: jax.nn.relu(images @ params["w"] + params["b"][None])
    return Features(init, lambda params, images, reference=None: relu(params, images), width)
  return _conv4(num_inputs, width)


def _conv4(num_inputs: int, width: int) -> Features:
  """Conv4 in training by the statistics of its batch, in evaluation by those of the reference."""
  side = round(num_inputs**0.5)
  if side**2 != num_inputs or not 16 <= side < 32:
    raise ValueError(
      f"model conv4 needs square images of 16 to 31 pixels a side, got {num_inputs} features"
    )
  as_images = lambda rows: rows.reshape(-1, side, side, 1)
  batch_norm = Conv4(width)
  running = Conv4(width, batch_stats="running", momentum=0.0)  # the last batch's, as in PyTorch's 1

  def init(key):
    params: Any = batch_norm.init(key, as_images(jnp.zeros((2, num_inputs))))["params"]
    # As the published code draws them: variance 2 / (9 features).
    he = jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    for i in range(4):
      layer = params[f"Conv_{i}"]
      layer["kernel"] = he(jax.random.fold_in(key, i), layer["kernel"].shape)
    return params

  def apply(params, images, reference=None):
    variables = {"params": params}
    if reference is None:
      return jnp.asarray(batch_norm.apply(variables, as_images(images)))
    move: Any = {"train": True, "mutable": ["batch_stats"]}
    _, stats = running.apply(variables, as_images(reference), **move)
    return jnp.asarray(running.apply({**variables, **stats}, as_images(images)))

  return Features(init, apply, width)


def weighted_cross_entropy(z: jax.Array, batch: Batch) -> jax.Array:
  """The mean over examples, each counting its weight; weights need not sum to one."""
  losses = optax.softmax_cross_entropy_with_integer_labels(z, batch.labels)
  return jnp.sum(batch.weights * losses) / jnp.sum(batch.weights)


def loss_tuning(features: Features, num_classes: int) -> Problem:
  """Temperatures and shifts of the classes, from 1 and 0 as in the published code."""

  def init(key):
    x = {"temperature": jnp.ones(num_classes), "shift": jnp.zeros(num_classes)}
    return x, {"features": features.init(key), "head": zero_head(features.width, num_classes)}

  def predict(x, y, images, reference=None):
    del x  # It matters through y alone.
    return logits(y["head"], features.apply(y["features"], images, reference))

  def inner_loss(x, y, batch):
    scale = jax.nn.sigmoid(x["temperature"])
    adjusted = predict(x, y, batch.images) * scale[None] + x["shift"][None]
    return weighted_cross_entropy(adjusted, batch)

  def outer_loss(x, y, batch):
    return weighted_cross_entropy(predict(x, y, batch.images), batch)

  return Problem(init, inner_loss, outer_loss, predict)


def feature_ridge(num_inputs: int, num_classes: int, log_ridge: float, *, exact: bool) -> Problem:
  """A ridge for each feature; with ``exact`` the true hypergradient is computed too."""

  def init(key):
    del key
    return jnp.full(num_inputs, log_ridge), jnp.zeros((num_inputs, num_classes))

  def inner_loss(x, y, batch):
    return outer_loss(x, y, batch) + 0.5 * jnp.sum(jnp.exp(x)[:, None] * y**2)

  def outer_loss(x, y, batch):
    del x
    return cross_entropy(batch.images @ y, batch.labels)

  def hypergradient(x, batch):
    """At the minimum of the inner loss, which is strongly convex and solved to the end.

    With rows of unit norm its curvature is at most 1/2 + exp(-2), so that steps of 1.2 are safe;
    its condition number is below 700.
    """
    optimizer = optax.sgd(1.2, momentum=0.93, nesterov=True)
    inner = jaxbo.inner_solver(inner_loss, optimizer, num_steps=400)
    response = jaxbo.add_implicit_response(inner, jaxbo.conjugate_gradient(100, 1e-6))
    zeros = jnp.zeros((num_inputs, num_classes))
    solution = inner.solve(x, inner.init(zeros), batch.train)
    grads = jaxbo.outer_grad(outer_loss)(x, solution.params, batch.val)
    return response.update(grads, response.init(x), x, solution=solution, batch=batch.train)[0]

  return Problem(
    init,
    inner_loss,
    outer_loss,
    lambda x, y, images, reference=None: images @ y,
    project=lambda x: optax.projections.projection_box(x, *RIDGE_BOX),
    hypergradient=hypergradient if exact else None,
  )


def representation(features: Features, num_classes: int, ridge: float) -> Problem:
  """A backbone outside, a linear head with a ridge inside."""

  def init(key):
    return features.init(key), zero_head(features.width, num_classes)

  def predict(x, y, images, reference=None):
    return logits(y, features.apply(x, images, reference))

  def outer_loss(x, y, batch):
    return cross_entropy(predict(x, y, batch.images), batch.labels)

  def inner_loss(x, y, batch):
    return outer_loss(x, y, batch) + ridge / 2 * optax.tree.norm(y, squared=True)

  return Problem(init, inner_loss, outer_loss, predict)
