"""The Square attack: random search with squares of one color, or with hills, without gradients."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbo import _check, _tree
from jaxbo.adversarial import attack as attacks
from jaxbo.adversarial import objectives
from jaxbo.adversarial.attack import Attack, Found, make_attack
from jaxbo.adversarial.box import Box, along, as_image, check_box, make_ball, norms, unit
from jaxbo.adversarial.objectives import Objective

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
  r"""The Square attack: random search in the ball, without gradients.

  For ``linf``, the attack starts with vertical stripes of :math:`\pm \epsilon`. Each query sets a
  random square to :math:`\pm \epsilon`, with one sign for each channel, and keeps it if the
  objective grows.

  For ``l2``, the attack starts with a grid of hills, whose sides are a fifth of the image's. Each
  query empties one random square and adds a hill to another one, with a random sign for each
  channel. The second square gets the squared norm that both squares had, plus an equal part for
  each channel of the squared norm that the image's change lacks to :math:`\epsilon`; then the whole
  change is scaled to :math:`\epsilon`. A hill of side :math:`s` has one half up and one half down;
  each half is :math:`\sum_{k > m} k^{-2}` up to :math:`k = \lfloor s / 2 \rfloor + 1`, at the
  distance :math:`m` (the larger of rows and columns) from its center.

  The squares shrink by the published schedule, stretched to ``num_queries``. An example stops once
  it is misclassified. Hidden gradients do not stop this attack: if it breaks images that withstand
  gradient attacks, the model may mask its gradients.

  Cost: ``num_queries + 1`` forward passes.

  Args:
    model: ``model(params, images) -> logits``, ``[batch, num_classes]``, for images
      ``[batch, height, width, channels]``; the logits of an example must not depend on other
      examples.
    box: the :class:`Box` of the images, say ``Box(8 / 255)`` for pixels from 0 to 1.
    num_queries: the number of squares to try, at least 1.
    area: the share of the image that the first square covers, in (0, 1]. The default is that of
      AutoAttack for both norms; the paper takes 0.1 for ``l2``.
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
  ball = make_ball(check_box(box))
  start, change = (_hills, _move_hill) if box.norm == "l2" else (_stripes, _paint)
  num_queries = _check.positive_int("num_queries", num_queries)
  _check.within("area", area, 0, 1, ends="(]")
  value_of, min_classes = objectives.find_objective(objective)

  def find(forward, images, labels, key):
    if images.ndim != 4:
      raise ValueError(f"images must be [batch, height, width, channels], got {images.shape}")
    clean = forward(images)
    epsilon = as_image("epsilon", box.epsilon, images)
    first, rest = jax.random.split(key)

    def look(delta):
      logits = forward(images + delta)
      values = objectives.values_of(value_of, logits, labels, clean)
      wrong = attacks.is_wrong(logits, labels)
      return values, wrong, ~jnp.isfinite(values)

    def query(i, carry):
      delta, value, wrong, num_correct, not_finite = carry
      share = area * _shrunk(i, num_queries)
      moved = change(jax.random.fold_in(rest, i), delta, share, epsilon)
      moved = ball.project(moved, images)
      new_value, new_wrong, bad = look(moved)
      better = ~wrong & ~bad & ((new_value > value) | ~jnp.isfinite(value))
      delta = jnp.where(along(better, delta), moved, delta)
      value = jnp.where(better, new_value, value)
      num_correct += ~new_wrong & ~wrong
      return delta, value, jnp.where(better, new_wrong, wrong), num_correct, not_finite | bad

    delta = ball.project(jnp.broadcast_to(start(first, images, epsilon), images.shape), images)
    value, wrong, bad = look(delta)
    # A point whose objective is not finite does not count as a success.
    carry = (delta, value, wrong & ~bad, jnp.zeros(labels.shape, jnp.int32) + ~wrong, bad)
    carry = _tree.vary_alike(carry, carry, images, clean)
    delta, *found = jax.lax.fori_loop(0, num_queries, query, carry)
    return Found(box.clip(images + delta), *found)

  return make_attack(model, find, box, min_classes=min_classes)


def _shrunk(i: jax.Array | int, num_queries: int) -> jax.Array:
  """Returns the area of the square of query ``i``, relative to that of the first square."""
  return 0.5 ** jnp.sum(i > num_queries * jnp.array(_HALVINGS))


def _stripes(key: jax.Array, images: jax.Array, epsilon: Any) -> jax.Array:
  """Vertical stripes of ``epsilon`` or ``-epsilon``, one sign for each column and channel."""
  batch, _, width, channels = images.shape
  return epsilon * jax.random.rademacher(key, (batch, 1, width, channels), images.dtype)


def _paint(key: jax.Array, delta: jax.Array, share: jax.Array, epsilon: Any) -> jax.Array:
  """Sets a random square of each example to ``epsilon`` or ``-epsilon``, one sign per channel."""
  batch, height, width, channels = delta.shape
  at_row, at_column, of_sign = jax.random.split(key, 3)
  side = jnp.round(jnp.sqrt(share * height * width)).astype(jnp.int32)
  side = jnp.clip(side, 1, max(min(height, width) - 1, 1))
  where = _square(at_row, at_column, delta, side)[2]
  signs = jax.random.rademacher(of_sign, (batch, 1, 1, channels), delta.dtype)
  return jnp.where(where[..., None], epsilon * signs, delta)


def _square(
  at_row: jax.Array, at_column: jax.Array, delta: jax.Array, side: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Draws a square for each example: rows and columns from its corner, and what is inside.

  Rows and columns are integers ``[batch, height, width]``.
  """
  batch, height, width, _ = delta.shape

  def from_corner(key, length):
    start = jax.random.randint(key, (batch, 1), 0, length - side + 1)
    return jnp.arange(length, dtype=jnp.int32)[None] - start

  rows, columns = from_corner(at_row, height), from_corner(at_column, width)
  rows, columns = (
    jnp.broadcast_to(x, (batch, height, width)) for x in (rows[:, :, None], columns[:, None, :])
  )
  within = lambda position: (position >= 0) & (position < side)
  return rows, columns, within(rows) & within(columns)


def _hills(key: jax.Array, images: jax.Array, epsilon: Any) -> jax.Array:
  """A grid of hills in the ``l2`` ball, with random signs for each of them and channel."""
  batch, height, width, channels = images.shape
  side = max(min(height, width) // 5, 1)
  num_rows, num_columns = height // side, width // side
  of_sign, of_turn = jax.random.split(key)

  def cells(length, number):
    position = np.arange(length) - (length - number * side) // 2
    return position // side, position % side, (position >= 0) & (position < number * side)

  row, from_top, in_rows = cells(height, num_rows)
  column, from_left, in_columns = cells(width, num_columns)
  row, column = row.clip(0, num_rows - 1), column.clip(0, num_columns - 1)
  of_cell = lambda values: values[:, row][:, :, column]
  turned = of_cell(jax.random.bernoulli(of_turn, shape=(batch, num_rows, num_columns)))
  shape = (batch, num_rows, num_columns, channels)
  signs = of_cell(jax.random.rademacher(of_sign, shape, images.dtype))
  inside = jnp.asarray(in_rows[:, None] & in_columns[None])[None]
  hills = _hill(from_top[None, :, None], from_left[None, None, :], side, inside, turned)
  return epsilon * unit(hills[..., None].astype(images.dtype) * signs)


def _move_hill(key: jax.Array, delta: jax.Array, share: jax.Array, epsilon: Any) -> jax.Array:
  """Empties a random square of each example, and adds a hill to another one."""
  batch, height, width, channels = delta.shape
  at_row, at_column, from_row, from_column, of_sign, of_turn = jax.random.split(key, 6)
  side = jnp.maximum(jnp.round(jnp.sqrt(share * height * width)).astype(jnp.int32), 3)
  side = jnp.clip(side + 1 - side % 2, 1, min(height, width))  # Odd, as published.
  rows, columns, filled = _square(at_row, at_column, delta, side)
  emptied = _square(from_row, from_column, delta, side)[2]
  turned = jax.random.bernoulli(of_turn, shape=(batch, 1, 1))
  signs = jax.random.rademacher(of_sign, (batch, 1, 1, channels), delta.dtype)
  hill = _hill(rows, columns, side, filled, turned)[..., None].astype(delta.dtype) * signs
  everywhere = jnp.ones_like(delta[..., :1], bool)  # On an explicit mesh, divided as images are.
  filled, emptied = filled[..., None] & everywhere, emptied[..., None] & everywhere

  def of_channel(values):
    size = jnp.sqrt(jnp.sum(values**2, axis=(1, 2), keepdims=True))
    return values / jnp.where(size > 0, size, 1)

  shape = of_channel(hill + of_channel(jnp.where(filled, delta, 0)))
  had = norms(jnp.where(filled | emptied, delta, 0)) ** 2
  lacks = jnp.maximum(epsilon**2 - norms(delta) ** 2, 0) / channels
  kept = jnp.where(emptied, 0, delta)
  return epsilon * unit(jnp.where(filled, along(jnp.sqrt(lacks + had), delta) * shape, kept))


def _hill(
  rows: jax.Array | np.ndarray,
  columns: jax.Array | np.ndarray,
  side: jax.Array | int,
  inside: jax.Array,
  turned: jax.Array,
) -> jax.Array:
  """Hills of norm 1 where ``inside``, turned by a right angle where ``turned``.

  ``rows`` and ``columns`` count from a corner and broadcast to ``[batch, height, width]``.
  """
  across, beside = jnp.where(turned, columns, rows), jnp.where(turned, rows, columns)
  half = side // 2
  low = across >= half
  center = jnp.where(low, half + (side - half) // 2, half // 2)
  distance = jnp.maximum(jnp.abs(across - center), jnp.abs(beside - half))
  # Sums of 1 / k^2 from the distance to the side, as a difference of two from 1.
  sums = np.append(0, np.cumsum(1 / np.arange(1, max(inside.shape[1:]) + 2) ** 2))
  sums = jnp.asarray(sums, jnp.float32)
  heights = sums[half + 1] - sums[jnp.clip(distance, 0, half + 1)]

  def normed(where):
    part = jnp.where(inside & where, heights, 0)
    size = jnp.sqrt(jnp.sum(part**2, axis=(1, 2), keepdims=True))
    return part / jnp.where(size > 0, size, 1)

  return (normed(~low) - normed(low)) / math.sqrt(2)
