"""FAB: the smallest change that fools a model, by projections onto its linearized boundary."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbo import _check, _tree
from jaxbo.adversarial import attack as attacks
from jaxbo.adversarial import objectives
from jaxbo.adversarial.attack import Attack, Found, make_attack
from jaxbo.adversarial.box import Box, along, as_image, check_box, norms
from jaxbo.adversarial.losses import label_logits

# Shorter ways to the boundary count as this long, in units of the images; as in AutoAttack.
_SHORTEST = 1e-8


class _Search(NamedTuple):
  """The carry of the loop; leaves are ``[batch]`` or shaped like the images."""

  delta: jax.Array
  best_delta: jax.Array  # the shortest change that fools the model
  distance: jax.Array  # its norm; infinite if there is none yet
  num_correct: jax.Array
  not_finite: jax.Array


def fab(
  model: Callable[..., jax.Array],
  box: Box,
  *,
  num_steps: int = 100,
  num_targets: int = 9,
  overshoot: float = 1.05,
  backward: float = 0.9,
  bias: float = 0.1,
) -> Attack:
  r"""FAB-T, the targeted Fast Adaptive Boundary attack: minimizes the change, not the margin.

  .. math::
    x^{k+1} = \Pi\big((1 - \alpha)(x^k + \eta\, d(x^k)) + \alpha\,(x + \eta\, d(x))\big), \qquad
    \alpha = \min\Big(\frac{\|d(x^k)\|}{\|d(x^k)\| + \|d(x)\|},\, \alpha_{max}\Big)

  :math:`d(u)` is the shortest change that takes :math:`u`, within the range of pixel values, onto
  the hyperplane :math:`\{v : f(x^k) + \langle \nabla f(x^k), v - x^k \rangle = 0\}`, or as near to
  it as the range allows; :math:`f = z_t - z_y` leads to the target :math:`t`. If a point fools the
  model, the search continues at :math:`x + \beta (x^{k+1} - x)`, and the attack keeps the point if
  it is nearer to the image :math:`x` than all earlier ones. The targets are, in turn, the classes
  that are likeliest on the clean image.

  The search does not depend on ``epsilon``, which only decides whether the result counts: in a
  large box, the attack returns the smallest change that it found. With an array ``epsilon``, the
  search measures changes in units of ``epsilon``. The attack is not random, so it takes no key. It
  is the version of AutoAttack: it starts at the image, without random restarts and without a final
  search on the line to the image.

  Cost, for each target, one after another: ``num_steps`` times two forward passes and one backward
  pass without gradients of the parameters.

  Args:
    model: ``model(params, images) -> logits``, ``[batch, num_classes]``; the logits of an example
      must not depend on other examples.
    box: the :class:`Box` of the images, say ``Box(8 / 255)`` for pixels from 0 to 1.
    num_steps: the number of steps toward each target, at least 1.
    num_targets: how many classes to aim at, at least 1; all other classes if there are fewer.
    overshoot: :math:`\eta \ge 1`: how far to go, in units of the way to the hyperplane.
    backward: :math:`\beta`, in (0, 1).
    bias: :math:`\alpha_{max}`, the largest pull toward the clean image, in [0, 1].

  Returns:
    An :class:`Attack`. It does not change an example that the model already misclassifies, or for
    which it finds no misclassified point in the box. ``num_correct`` counts points of the search
    for the target that was reached.

  Raises:
    ValueError: if an argument is outside its range.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> def model(params, images):                               # the boundary is at 0.25
    ...   return jnp.concatenate([images - 0.25, 0.25 - images], axis=1) * params
    >>> attack = jaxbo.adversarial.fab(model, jaxbo.adversarial.Box(1.0), num_steps=20)
    >>> print(attack(jnp.float32(2.0), (jnp.array([[0.5]]), jnp.array([0]))).round(2))
    [[0.25]]

  References:
    Croce and Hein, `Minimally Distorted Adversarial Examples with a Fast Adaptive Boundary Attack
    <https://arxiv.org/abs/1907.02044>`_, 2020; the targeted version and its budget: Croce and Hein,
    `Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free
    Attacks <https://arxiv.org/abs/2003.01690>`_, 2020.
  """
  check_box(box)
  num_steps = _check.positive_int("num_steps", num_steps)
  num_targets = _check.positive_int("num_targets", num_targets)
  _check.within("overshoot", overshoot, 1, float("inf"), ends="[)")
  _check.within("backward", backward, 0, 1, ends="()")
  _check.within("bias", bias, 0, 1)

  def search(forward, images, labels, clean, target):
    radius, scale = _radius_and_scale(box, images)
    size = lambda delta: _size(box.norm, delta, scale)
    each = lambda values: along(values, images)

    def lead(logits, labels, clean):
      return label_logits(logits, target) - label_logits(logits, labels)

    def step(_, carry):
      delta = carry.delta
      slope, value, wrong, bad = attacks.gradient(forward, lead, images + delta, labels, clean)
      value = jnp.where(bad, 0, value)
      # From the point, and from the image, onto the same hyperplane.
      gap = -value + jnp.sum(slope * delta, axis=tuple(range(1, delta.ndim)))
      to_plane = lambda at, gap: to_hyperplane(box, at, slope, gap, scale)
      here, there = to_plane(images + delta, -value), to_plane(images, gap)
      short, long = (jnp.maximum(size(d), _SHORTEST) for d in (here, there))
      pull = each(jnp.minimum(short / (short + long), bias))
      moved = (1 - pull) * (delta + overshoot * here) + pull * (overshoot * there)
      moved = box.clip(images + moved) - images

      logits = forward(images + moved)
      lost = bad | ~jnp.isfinite(objectives.values_of(lead, logits, labels, clean))
      fools = attacks.is_wrong(logits, labels) & ~lost
      better = fools & (size(moved) < carry.distance)
      onward = jnp.where(each(fools), backward * moved, moved)
      return _Search(
        jnp.where(each(lost), delta, onward),
        jnp.where(each(better), moved, carry.best_delta),
        jnp.where(better, size(moved), carry.distance),
        carry.num_correct + ~wrong,
        carry.not_finite | lost,
      )

    nothing = jnp.zeros_like(images)
    # What the model misclassifies is at a distance of zero, which no step beats.
    distance = jnp.where(attacks.is_wrong(clean, labels), 0, jnp.inf).astype(images.dtype)
    count, not_finite = (jnp.zeros_like(distance, dtype) for dtype in (jnp.int32, bool))
    first = _Search(nothing, nothing, distance, count, not_finite)
    first = _tree.vary_alike(first, images, labels, clean)
    last = jax.lax.fori_loop(0, num_steps, step, first)
    inside = last.distance <= radius
    delta = jnp.where(each(inside), last.best_delta, 0)
    # Among targets the shortest way is the best.
    values = -jnp.where(inside, last.distance, 0)
    return Found(box.clip(images + delta), values, inside, last.num_correct, last.not_finite)

  def find(forward, images, labels, key):
    del key
    clean = forward(images)
    targets = objectives.likeliest_others(clean, labels, num_targets)
    towards = lambda target: search(forward, images, labels, clean, target)
    return attacks.best(jax.lax.map(towards, targets))

  return make_attack(model, find, box, needs_key=False)


def to_hyperplane(
  box: Box, images: jax.Array, slope: jax.Array, gap: jax.Array, scale: ArrayLike = 1.0
) -> jax.Array:
  r"""The shortest change within the range of pixel values that raises the slope by ``gap``.

  .. math:: \min_d \|d\| \quad\text{with}\quad \langle w, d \rangle = g,\; low \le x + d \le high

  Every pixel goes in its own direction until its wall, by :math:`\min(\lambda v_i, r_i)`: at equal
  speeds :math:`v_i = 1` for ``linf`` (or ``scale``, in whose units changes are measured), and
  :math:`v_i = |w_i|` for ``l2``. The gain :math:`\sum_i |w_i| \min(\lambda v_i, r_i)` is concave
  and piecewise linear in :math:`\lambda`, so Newton's steps from zero rise to :math:`|g|` and
  arrive: a few passes over the pixels, where a sort would take most of the attack's time on a CPU.
  If all pixels at their walls do not reach :math:`g`, that is where they end.

  Args:
    box: the space of the pixels; ``epsilon`` plays no part.
    images: :math:`x`, ``[batch, ...]``.
    slope: :math:`w`, shaped like the images; pixels without a slope do not move.
    gap: :math:`g`, ``[batch]``.
    scale: the unit of each pixel for ``linf``.
  """
  rows = lambda values: jnp.reshape(values, (images.shape[0], -1))
  low, high = (as_image(name, getattr(box, name), images) for name in ("low", "high"))
  largest = jnp.max(jnp.abs(rows(slope)), axis=1)
  # In these units neither the slope nor its squares underflow.
  slope = slope / along(jnp.where(largest > 0, largest, 1), images)
  gain = jnp.abs(gap) / jnp.where(largest > 0, largest, 1)
  toward = along(jnp.sign(gap), images) * jnp.sign(slope)
  steep = jnp.abs(slope)
  room = jnp.maximum(jnp.where(toward > 0, high - images, images - low), 0)
  speed = steep if box.norm == "l2" else jnp.broadcast_to(scale, images.shape)
  time = along(_time_to_gain(gain, *map(rows, (steep, speed, room))), images)
  return jnp.where(toward != 0, toward * jnp.minimum(time * speed, room), 0)


def _time_to_gain(gain: jax.Array, steep: jax.Array, speed: jax.Array, room: jax.Array):
  """Returns when ``sum(steep * min(time * speed, room))`` of each row reaches ``gain``."""

  def step(times):
    time, _ = times
    at_wall = time[:, None] * speed >= room
    gained = jnp.sum(jnp.where(at_wall, steep * room, 0), axis=1)
    rate = jnp.sum(jnp.where(at_wall, 0, steep * speed), axis=1)
    onward = (gain - gained) / jnp.where(rate > 0, rate, 1)
    return jnp.where(rate > 0, jnp.maximum(onward, time), time), time

  times = jnp.zeros_like(gain), jnp.full_like(gain, -1)
  times = _tree.vary_alike(times, gain, steep, speed, room)
  return jax.lax.while_loop(lambda times: jnp.any(times[0] > times[1]), step, times)[0]


def _radius_and_scale(box: Box, images: jax.Array) -> tuple[ArrayLike, ArrayLike]:
  """The radius, and the units of pixels in which it is the same for all."""
  epsilon = as_image("epsilon", box.epsilon, images)
  if not jnp.ndim(box.epsilon):
    return epsilon, 1.0
  radius = jnp.max(epsilon)
  # A pixel that must not move does so by a millionth, so that no unit is zero.
  return radius, jnp.maximum(epsilon / jnp.where(radius > 0, radius, 1), 1e-6)


def _size(norm: str, delta: jax.Array, scale: ArrayLike) -> jax.Array:
  if norm == "l2":
    return norms(delta)
  return jnp.max(jnp.abs(delta / scale), axis=tuple(range(1, delta.ndim)))
