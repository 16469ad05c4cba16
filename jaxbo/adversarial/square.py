"""The Square attack: random search with squares of one color, without gradients."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbo import _check
from jaxbo.adversarial import attack as attacks
from jaxbo.adversarial.attack import Attack, Found, Objective, make_attack
from jaxbo.adversarial.box import Box, along, as_image, check_box, make_ball

# After each of these shares of the queries, the area of the square is halved.
_HALVINGS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)


def square(
  model: Callable[..., jax.Array],
  box: Box,
  *,
  num_queries: int = 5000,
  area: float = 0.8,
  objective: str | Objective = "margin",
) -> Attack:
  r"""The Square attack: random search in the ``linf`` ball, without gradients.

  The attack starts with vertical stripes of :math:`\pm \epsilon`. Each query sets a random square
  to :math:`\pm \epsilon`, with one sign for each channel, and keeps it if the objective grows. The
  squares shrink by the published schedule. An example stops once it is misclassified. Hidden
  gradients do not stop this attack: if it breaks images that withstand gradient attacks, the model
  may mask its gradients.

  Cost: ``num_queries + 1`` forward passes.

  Args:
    model: ``model(params, images) -> logits``, ``[batch, num_classes]``, for images
      ``[batch, height, width, channels]``; the logits of an example must not depend on other
      examples.
    box: the :class:`Box` of the images, say ``Box(8 / 255)`` for pixels from 0 to 1; its
      norm must be ``"linf"``.
    num_queries: the number of squares to try, at least 1.
    area: the share of the image that the first square covers, in (0, 1].
    objective: what to maximize: ``"margin"``, ``"cross_entropy"``, ``"kl"``, ``"dlr"``, or a
      function ``(logits, labels, clean_logits) -> [batch]``.

  Returns:
    An :class:`Attack`.

  Raises:
    ValueError: if an argument is outside its range, or images do not have four axes.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> def model(params, images):
    ...   mean = jnp.mean(images, axis=(1, 2, 3))
    ...   return params * jnp.stack([mean - 0.5, 0.5 - mean], axis=1)
    >>> attack = jaxbo.adversarial.square(model, jaxbo.adversarial.Box(0.1), num_queries=50)
    >>> images = jnp.full((1, 4, 4, 1), 0.52)
    >>> perturbed = attack(jnp.float32(1.0), (images, jnp.array([0])), key=0)
    >>> print(perturbed.mean() < 0.5)                          # misclassified
    True

  References:
    Andriushchenko et al., `Square Attack: a Query-efficient Black-box Adversarial Attack via Random
    Search <https://arxiv.org/abs/1912.00049>`_, 2020.
  """
  ball = make_ball(check_box(box, norms=("linf",)))
  num_queries = _check.positive_int("num_queries", num_queries)
  _check.within("area", area, 0, 1, ends="(]")
  value_of, min_classes = attacks.find_objective(objective)

  def find(forward, images, labels, key):
    if images.ndim != 4:
      raise ValueError(f"images must be [batch, height, width, channels], got {images.shape}")
    clean = forward(images)
    epsilon = as_image("epsilon", box.epsilon, images)
    first, rest = jax.random.split(key)
    batch, _, width, channels = images.shape
    stripes = jax.random.rademacher(first, (batch, 1, width, channels), images.dtype)

    def look(delta):
      logits = forward(images + delta)
      values = attacks.values_of(value_of, logits, labels, clean)
      wrong = attacks.is_wrong(logits, labels)
      return values, wrong, ~jnp.isfinite(values)

    def query(i, carry):
      delta, value, wrong, num_correct, not_finite = carry
      share = area * _shrunk(i, num_queries)
      moved = _paint(jax.random.fold_in(rest, i), delta, share, epsilon)
      moved = ball.project(moved, images)
      new_value, new_wrong, bad = look(moved)
      better = ~wrong & ~bad & ((new_value > value) | ~jnp.isfinite(value))
      delta = jnp.where(along(better, delta), moved, delta)
      value = jnp.where(better, new_value, value)
      num_correct += ~new_wrong & ~wrong
      return delta, value, jnp.where(better, new_wrong, wrong), num_correct, not_finite | bad

    delta = ball.project(jnp.broadcast_to(epsilon * stripes, images.shape), images)
    value, wrong, bad = look(delta)
    # A point whose objective is not finite does not count as a success.
    carry = (delta, value, wrong & ~bad, jnp.zeros(batch, jnp.int32) + ~wrong, bad)
    carry = attacks.vary_alike(carry, carry, images, clean)
    delta, *found = jax.lax.fori_loop(0, num_queries, query, carry)
    return Found(box.clip(images + delta), *found)

  return make_attack(model, find, box, min_classes=min_classes)


def _shrunk(i: jax.Array | int, num_queries: int) -> jax.Array:
  """Returns the area of the square of query ``i``, relative to that of the first square."""
  return 0.5 ** jnp.sum(i > num_queries * jnp.array(_HALVINGS))


def _paint(key: jax.Array, delta: jax.Array, share: jax.Array, epsilon: ArrayLike):
  """Sets a random square of each example to ``epsilon`` or ``-epsilon``, one sign per channel."""
  batch, height, width, channels = delta.shape
  at_row, at_column, of_sign = jax.random.split(key, 3)
  side = jnp.round(jnp.sqrt(share * height * width)).astype(jnp.int32)
  side = jnp.clip(side, 1, max(min(height, width) - 1, 1))

  def inside(key, length):
    start = jax.random.randint(key, (batch, 1), 0, length - side + 1)
    position = jnp.arange(length, dtype=jnp.int32)[None]
    return (position >= start) & (position < start + side)

  rows, columns = inside(at_row, height), inside(at_column, width)
  where = rows[:, :, None, None] & columns[:, None, :, None]
  signs = jax.random.rademacher(of_sign, (batch, 1, 1, channels), delta.dtype)
  return jnp.where(where, epsilon * signs, delta)
