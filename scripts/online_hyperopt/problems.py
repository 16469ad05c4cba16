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

MODELS = ("linear", "mlp", "conv4")
RIDGE_BOX = (-7.0, -2.0)  # of the logarithms of the ridge
EXACT_STEPS = (
  400,
  100,
)  # of the inner solver and of conjugate gradient, for the true hypergradient


class Features(NamedTuple):
  """A model of features, before a linear head.

  Attributes:
    init: ``init(key) -> params``.
    apply: ``apply(params, images) -> [n, width]``, as in training.
    frozen: ``frozen(params, images, reference)``: as in evaluation. What depends on other images of
      a batch is taken from ``reference``.
    width: how many features there are.
  """

  init: Callable[[jax.Array], Any]
  apply: Callable[[Any, jax.Array], jax.Array]
  frozen: Callable[[Any, jax.Array, jax.Array], jax.Array]
  width: int


class Problem(NamedTuple):
  """An online bilevel problem.

  Attributes:
    init: ``init(key) -> (x, y)``.
    inner_loss: ``inner_loss(x, y, batch)``.
    outer_loss: ``outer_loss(x, y, batch)``.
    predict: ``predict(x, y, images, reference) -> logits``, for reports; see :class:`Features`.
    project: the projection of ``x``, or ``None``.
    hypergradient: ``hypergradient(x, batch)``, the true one, or ``None`` where it is not known.
  """

  init: Callable[[jax.Array], tuple[Any, Any]]
  inner_loss: Callable[[Any, Any, Batch], jax.Array]
  outer_loss: Callable[[Any, Any, Batch], jax.Array]
  predict: Callable[[Any, Any, jax.Array, jax.Array], jax.Array]
  project: Callable[[Any], Any] | None = None
  hypergradient: Callable[[Any, jaxbo.OnlineBatch], Any] | None = None


def make_features(model: str, num_inputs: int, width: int) -> Features:
  """The features of that name; ``"linear"`` has no parameters.

  Raises:
    ValueError: for another name, or images too small for convolutions.
  """
  if model == "linear":
    apply = lambda params, images: images
    return Features(lambda key: {}, apply, lambda p, images, _: images, num_inputs)
  if model == "mlp":
    he = jax.nn.initializers.he_normal()
    init = lambda key: {"w": he(key, (num_inputs, width)), "b": jnp.zeros(width)}
    apply = lambda params, images: jax.nn.relu(images @ params["w"] + params["b"][None])
    return Features(init, apply, lambda params, images, _: apply(params, images), width)
  if model == "conv4":
    return _conv4(num_inputs, width)
  raise ValueError(f"model must be one of {', '.join(MODELS)}; got {model!r}")


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
    params = batch_norm.init(key, as_images(jnp.zeros((2, num_inputs))))["params"]
    # As the published code draws them: variance 2 / (9 features).
    he = jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal")

    def draw(path, leaf):
      layer, name = (part.key for part in path)
      if name != "kernel":
        return leaf
      return he(jax.random.fold_in(key, int(layer.removeprefix("Conv_"))), leaf.shape)

    return jax.tree_util.tree_map_with_path(draw, params)

  def apply(params, images):
    return jnp.asarray(batch_norm.apply({"params": params}, as_images(images)))

  def frozen(params, images, reference):
    shapes = jax.eval_shape(running.init, jax.random.key(0), as_images(reference))
    empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes["batch_stats"])
    _, stats = running.apply(
      {"params": params, "batch_stats": empty},
      as_images(reference),
      train=True,
      mutable=["batch_stats"],
    )
    return jnp.asarray(running.apply({"params": params, **stats}, as_images(images)))

  return Features(init, apply, frozen, width)


def weighted_cross_entropy(z: jax.Array, batch: Batch) -> jax.Array:
  """The mean over examples, each counting its weight; weights need not sum to one."""
  losses = optax.softmax_cross_entropy_with_integer_labels(z, batch.labels)
  return jnp.sum(batch.weights * losses) / jnp.sum(batch.weights)


def loss_tuning(features: Features, num_classes: int) -> Problem:
  """Temperatures and shifts of the classes, from 1 and 0 as in the published code."""

  def init(key):
    x = {"temperature": jnp.ones(num_classes), "shift": jnp.zeros(num_classes)}
    return x, {"features": features.init(key), "head": zero_head(features.width, num_classes)}

  def apply(y, images):
    return logits(y["head"], features.apply(y["features"], images))

  def inner_loss(x, y, batch):
    scale = jax.nn.sigmoid(x["temperature"])
    adjusted = apply(y, batch.images) * scale[None] + x["shift"][None]
    return weighted_cross_entropy(adjusted, batch)

  def outer_loss(x, y, batch):
    del x  # It matters through y alone.
    return weighted_cross_entropy(apply(y, batch.images), batch)

  def predict(x, y, images, reference):
    del x
    return logits(y["head"], features.frozen(y["features"], images, reference))

  return Problem(init, inner_loss, outer_loss, predict)


def feature_ridge(num_inputs: int, num_classes: int, log_ridge: float, *, exact: bool) -> Problem:
  """A ridge for each feature; with ``exact`` the true hypergradient is computed too.

  Raises:
    ValueError: if ``log_ridge``, where all of them begin, is outside the box.
  """
  low, high = RIDGE_BOX
  if not low <= log_ridge <= high:
    raise ValueError(f"log_ridge must be in [{low:g}, {high:g}], got {log_ridge}")

  def init(key):
    del key
    return jnp.full(num_inputs, log_ridge), jnp.zeros((num_inputs, num_classes))

  def inner_loss(x, y, batch):
    fit = cross_entropy(batch.images @ y, batch.labels)
    return fit + 0.5 * jnp.sum(jnp.exp(x)[:, None] * y**2)

  def outer_loss(x, y, batch):
    del x
    return cross_entropy(batch.images @ y, batch.labels)

  def hypergradient(x, batch):
    return exact_hypergradient(
      inner_loss, outer_loss, x, jnp.zeros((num_inputs, num_classes)), batch
    )

  return Problem(
    init,
    inner_loss,
    outer_loss,
    lambda x, y, images, _: images @ y,
    project=lambda x: optax.projections.projection_box(x, low, high),
    hypergradient=hypergradient if exact else None,
  )


def exact_hypergradient(inner_loss, outer_loss, x, y0, batch):
  """The hypergradient at the minimum of a strongly convex inner loss, solved to the end.

  With rows of unit norm the curvature of the inner loss is at most 1/2 + exp(-2), so that steps of
  1.2 are safe; its condition number is below 700.
  """
  num_steps, linear_steps = EXACT_STEPS
  optimizer = optax.sgd(1.2, momentum=0.93, nesterov=True)
  inner = jaxbo.inner_solver(inner_loss, optimizer, num_steps)
  response = jaxbo.add_implicit_response(inner, jaxbo.conjugate_gradient(linear_steps, 1e-6))
  solution = inner.solve(x, inner.init(y0), batch.train)
  grads = jax.grad(outer_loss, argnums=(0, 1))(x, solution.params, batch.val)
  return response.update(grads, response.init(x), x, solution=solution, batch=batch.train)[0]


def representation(features: Features, num_classes: int, ridge: float) -> Problem:
  """A backbone outside, a linear head with a ridge inside."""

  def init(key):
    return features.init(key), zero_head(features.width, num_classes)

  def outer_loss(x, y, batch):
    return cross_entropy(logits(y, features.apply(x, batch.images)), batch.labels)

  def inner_loss(x, y, batch):
    return outer_loss(x, y, batch) + ridge / 2 * optax.tree.norm(y, squared=True)

  def predict(x, y, images, reference):
    return logits(y, features.frozen(x, images, reference))

  return Problem(init, inner_loss, outer_loss, predict)
