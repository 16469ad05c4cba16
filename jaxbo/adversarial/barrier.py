r"""DONE's lower level: a perturbation kept in its box by a log-barrier, and its derivative.

.. math:: \hat\delta_i(\theta) = \arg\min_\delta\; \varphi_i(\theta, \delta),
  \qquad \varphi_i(\theta, \delta) := \ell'_i(\theta, \delta)
  - c \sum_k \big[\log(b^+_k - \delta_k) + \log(\delta_k - b^-_k)\big]

The minimizer is a smooth function of the parameters. With :math:`D = \operatorname{diag}
\big((b^+ - \delta)^{-2} + (\delta - b^-)^{-2}\big)`, its derivative is

.. math:: \frac{\partial \hat\delta}{\partial \theta}
  = -\big[\nabla^2_{\delta\delta} \ell' + c D\big]^{-1} \nabla^2_{\delta\theta} \ell'
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check, _tree
from jaxbo._types import PyTree, SolveLinear
from jaxbo.adversarial.box import Bounds, along

# A step goes at most this fraction of the way to a wall.
_TO_THE_WALL = 0.9


class Minimum(NamedTuple):
  """The result of :func:`minimize`.

  Attributes:
    delta: the perturbation, shaped like the images, strictly inside the box.
    last_step: the largest change of a pixel in the last step, ``[batch]``; zero at convergence.
    not_finite: whether a gradient was not finite, ``[batch]``; the example then did not move.
  """

  delta: jax.Array
  last_step: jax.Array
  not_finite: jax.Array


def barrier_gradient(delta: jax.Array, box: Bounds) -> jax.Array:
  r"""The barrier's derivative at :math:`c = 1`: :math:`1/(b^+-\delta) - 1/(\delta-b^-)`."""
  below, above = box.room(delta)
  return 1 / above - 1 / below


def barrier_curvature(delta: jax.Array, box: Bounds) -> jax.Array:
  r"""The barrier's second derivative: :math:`1/(b^+ - \delta)^2 + 1/(\delta - b^-)^2`."""
  below, above = box.room(delta)
  return above**-2 + below**-2


def minimize(
  attack_loss: Callable[[jax.Array], jax.Array],
  images: jax.Array,
  box: Bounds,
  start: jax.Array,
  *,
  barrier: float | jax.Array,
  num_steps: int,
  step_size: float | jax.Array,
  direction: str = "gradient",
  margin: float = 1e-4,
) -> Minimum:
  r"""Minimizes :math:`\varphi` from ``start``, with one gradient of the attack loss for each step.

  .. math:: \delta \leftarrow \delta - \Big(\frac{1}{\alpha} + c D\Big)^{-1} \nabla_\delta \varphi

  This is gradient descent whose step includes the known curvature of the barrier. It converges if
  :math:`\alpha` is below the reciprocal of the largest curvature of :math:`\ell'`, at any distance
  to the wall. Plain descent :math:`\delta - \alpha \nabla \varphi` has the same fixed points, but
  bounces between the walls unless :math:`\alpha < d^2 / c`, where :math:`d` is the distance to the
  wall.

  ``direction="adam"`` takes Adam's steps on :math:`\varphi`, which end within about ``step_size``
  of the minimum. Every step goes at most nine tenths of the way to a wall, and never closer to it
  than ``margin`` times the width of the box.
  """
  _check.one_of("direction", direction, ("gradient", "adam"))
  inside = box.shrink(margin)
  adam = optax.adam(step_size)

  def gradient(delta):
    losses, pullback = jax.vjp(lambda delta: attack_loss(images + delta), delta)
    (slope,) = pullback(jnp.ones_like(losses))
    slope = slope.astype(delta.dtype)
    axes = tuple(range(1, delta.ndim))
    bad = ~jnp.isfinite(losses) | ~jnp.all(jnp.isfinite(slope), axis=axes)
    return jnp.where(jnp.expand_dims(bad, axes), 0, slope), bad

  def step(_, carry):
    minimum, state = carry
    delta = minimum.delta
    slope, bad = gradient(delta)
    slope += barrier * barrier_gradient(delta, box)
    if direction == "adam":
      updates, state = adam.update(slope, state)
      move = jnp.asarray(updates)
    else:
      move = -slope / (1 / step_size + barrier * barrier_curvature(delta, box))
    below, above = box.room(delta)
    move = jnp.clip(move, -_TO_THE_WALL * below, _TO_THE_WALL * above)
    moved = jnp.where(along(bad, delta), delta, inside.project(delta + move))
    last_step = jnp.max(jnp.abs(moved - delta), axis=tuple(range(1, delta.ndim)))
    return Minimum(moved, last_step, minimum.not_finite | bad), state

  delta = inside.project(start)
  losses = attack_loss(images)
  last_step, not_finite = (jnp.zeros_like(losses, dtype) for dtype in (delta.dtype, bool))
  state = adam.init(delta) if direction == "adam" else ()
  carry = (Minimum(delta, last_step, not_finite), state)
  carry = _tree.vary_alike(carry, images, box, delta, losses)
  return jax.lax.fori_loop(0, num_steps, step, carry)[0]


def solve_diagonal(
  v: jax.Array,
  delta: jax.Array,
  box: Bounds,
  barrier: float | jax.Array,
  curvature: float | jax.Array = 0.0,
) -> jax.Array:
  r"""Solves :math:`(\lambda I + c D)\, q = v`, element by element.

  The solution is exact if the attack loss has the Hessian :math:`\lambda I`, as the linearized and
  regularized attack loss of Fast-BAT does. For piecewise linear networks it is an approximation.
  """
  return v / (curvature + barrier * barrier_curvature(delta, box))


def solve_active_set(
  v: jax.Array,
  delta: jax.Array,
  box: Bounds,
  curvature: float | jax.Array,
  tolerance: float = 1e-7,
) -> jax.Array:
  r"""The limit :math:`c \to 0` of :func:`solve_diagonal`: :math:`v / \lambda` off the walls.

  Pixels within ``tolerance`` of a wall do not move with the parameters; this is Fast-BAT's mask.
  """
  below, above = box.room(delta)
  return jnp.where((below > tolerance) & (above > tolerance), v / curvature, 0)


def solve_full(
  attack_loss: Callable[..., jax.Array],
  perturbed: jax.Array,
  labels: jax.Array,
  v: jax.Array,
  diagonal: jax.Array,
  solver: SolveLinear,
) -> tuple[jax.Array, PyTree]:
  r"""Solves :math:`(\nabla^2_{\delta\delta} \ell' + \operatorname{diag}(\text{diagonal}))\, q = v`.

  Each example has its own system. The square root of the diagonal, which spans orders of magnitude
  near the walls, scales the system from both sides. ``attack_loss(images, labels)`` returns
  ``[batch]``.

  Returns:
    ``q`` and the report of ``solver``, for each example.
  """

  def solve_one(x, label, v, diagonal):
    slope = jax.grad(lambda x: attack_loss(x[None], label[None])[0])
    scale = jax.lax.rsqrt(diagonal)

    def product(u):
      along_u = jax.jvp(slope, (x,), (scale * u,))[1]
      return scale * along_u + u

    solution, info = solver(product, scale * v, jnp.zeros_like(v))
    return scale * solution, info

  return jax.vmap(solve_one)(perturbed, labels, v, diagonal)
