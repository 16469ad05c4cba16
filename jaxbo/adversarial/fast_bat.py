"""Fast-BAT: one linearized attack step, differentiated for pixels off the walls of their box."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check, _random, _tree
from jaxbo._types import Data, Key
from jaxbo.adversarial.attack import check_batch
from jaxbo.adversarial.barrier import solve_active_set
from jaxbo.adversarial.box import Box, along, check_box, check_each
from jaxbo.adversarial.implicit import DoneInfo, PerturbedLoss, corrected_losses, image_gradient
from jaxbo.dro.per_example import PerExampleGrads, per_example_grad


def fast_bat_grad(
  loss_fn: PerturbedLoss,
  attack_loss: PerturbedLoss,
  box: Box,
  *,
  step_size: float | jax.Array,
  curvature: float | jax.Array = 10.0,
  tolerance: float = 1e-7,
  microbatch_size: int | None = None,
  repair: bool = False,
) -> Callable[..., PerExampleGrads]:
  r"""Per-example gradients of Fast-BAT: a linearized attack with an active-set implicit term.

  .. math:: \delta = \Pi\big(z - \alpha \nabla_\delta \ell'(\theta, z)\big), \qquad
    g = \nabla_\theta \ell(\theta, \delta) - \nabla_\theta \big\langle \nabla_\delta
      \ell'(\theta, z), \tfrac{1}{\lambda}\, 1[\delta \text{ off the walls}] \odot
      \nabla_\delta \ell(\theta, \delta) \big\rangle

  :math:`\Pi` projects onto the box of each image, and :math:`z` is the result of one such step from
  a random start. The gradient is the limit of :func:`done_grad`, as its barrier vanishes, for the
  lower level :math:`\langle \nabla \ell'(z), \delta - z \rangle + \frac{\lambda}{2}
  \|\delta - z\|^2`. For :math:`\lambda = 1 / \alpha`, :math:`\delta` minimizes that lower level;
  the published code sets :math:`\alpha` and :math:`\lambda` separately, as this function does.

  Cost: three forward and backward passes for the images, and one pass for the parameters at about
  three times the cost of an ordinary one, because its two terms use different images and the
  implicit term is a second derivative. Within one ``jit``, XLA reuses two forward passes of the
  attack. Memory: more than twice that of ordinary training.

  Args:
    loss_fn: ``loss_fn(params, perturbed_images, labels) -> losses``, real floats ``[batch]``: the
      training loss. The loss of an example must not depend on other examples.
    attack_loss: the loss that the attack *minimizes* over the perturbation, with the arguments and
      shape of ``loss_fn``, such as minus the cross entropy.
    box: the :class:`Box` of the images, say ``Box(8 / 255)`` for pixels from 0 to 1; its
      norm must be ``"linf"`` and its epsilon positive.
    step_size: :math:`\alpha > 0`. The published code takes 5000 / 255 if :math:`\epsilon` is at
      most 8 / 255, and 2000 / 255 otherwise, for minus the cross entropy.
    curvature: :math:`\lambda > 0`; the default is the published one.
    tolerance: a pixel this close to a wall counts as on it; at least 0, in units of the images.
    microbatch_size: how many examples go at once through the pass for the parameters; it must
      divide the batch. ``None`` for all.
    repair: what to do if a loss is not finite. ``False`` gives the whole batch a zero gradient;
      ``True`` recomputes the gradient without the bad examples (see
      :func:`~jaxbo.per_example_grad` for the cost).

  Returns:
    A function ``(params, (images, labels), key) -> PerExampleGrads``. Images are floats
    ``[batch, ...]`` in the box; labels are integers ``[batch]``; ``aux`` is a
    :class:`DoneInfo`, whose ``last_step`` is the change from :math:`z` to :math:`\delta`. Images
    out of range raise ``ValueError``; under ``jit``, where values are not known, they are clipped
    and counted in ``aux.num_clipped``.

  Raises:
    ValueError: if an argument is outside its range, or losses are not ``[batch]``.
    TypeError: if a loss does not take three arguments, or if images or losses are not floats.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> def loss(params, images, labels):
    ...   return (images @ params) * (1.0 - 2.0 * labels)
    >>> def attack_loss(params, images, labels):
    ...   return -loss(params, images, labels)
    >>> grad = jaxbo.adversarial.fast_bat_grad(
    ...   loss, attack_loss, jaxbo.adversarial.Box(0.1), step_size=1.0)
    >>> params, batch = jnp.array([2.0, -1.0]), (jnp.array([[0.5, 0.0]]), jnp.array([0]))
    >>> print(grad(params, batch, key=0).pullback(jnp.ones(1)).round(3))     # at the walls
    [0.6 0. ]

  References:
    Zhang et al., `Revisiting and Advancing Fast Adversarial Training through the Lens of Bi-level
    Optimization <https://arxiv.org/abs/2112.12376>`_, 2022.
  """
  _check.takes_arguments("loss_fn", loss_fn, "params", "images", "labels")
  _check.takes_arguments("attack_loss", attack_loss, "params", "images", "labels")
  check_each(_check.positive, "epsilon", check_box(box, norms=("linf",)).epsilon)
  _check.positive("step_size", step_size)
  _check.positive("curvature", curvature)
  _check.non_negative("tolerance", tolerance)

  @jax.jit
  def attack(params, images, labels, key):
    clipped = box.outside(images)
    params, images = jax.lax.stop_gradient((params, _tree.at_least_float32(images)))
    images = box.clip(images)
    bounds = box.bounds(images)

    def step(delta):
      slope, bad = image_gradient("attack_loss", attack_loss, params, images + delta, labels)
      moved = bounds.project(delta - step_size * slope)
      return jnp.where(along(bad, delta), delta, moved), bad

    z, bad_start = step(bounds.random(key))
    delta, bad_end = step(z)
    v, bad = image_gradient("loss_fn", loss_fn, params, images + delta, labels)
    q = solve_active_set(v, delta, bounds, curvature, tolerance)
    last_step = jnp.max(jnp.abs(delta - z), axis=tuple(range(1, z.ndim)))
    bad |= bad_start | bad_end
    solved = jnp.zeros_like(last_step)
    return images + z, q, DoneInfo(images + delta, last_step, solved, bad, clipped)

  def corrected(params, batch):
    return corrected_losses(loss_fn, attack_loss, params, *batch)

  lazy = per_example_grad(corrected, microbatch_size=microbatch_size, repair=repair)

  def gradients(params: optax.Params, batch: Data, key: Key) -> PerExampleGrads:
    images, labels = check_batch(batch, box)
    linearised, q, info = attack(params, images, labels, _random.typed_key(key))
    return lazy(params, (info.perturbed, linearised, labels, q)).replace(aux=info)

  return gradients
