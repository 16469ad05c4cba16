"""DONE: instance-reweighted adversarial training, and the implicit gradients that it uses."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check, _random, _tree
from jaxbo._optimizer import LearningRate
from jaxbo._types import Data, Key
from jaxbo.adversarial import barrier as lower_level
from jaxbo.adversarial.attack import check_batch
from jaxbo.adversarial.box import Box, check_box, check_each
from jaxbo.adversarial.implicit import (
  DoneInfo,
  PerturbedLoss,
  checked,
  corrected_losses,
  image_gradient,
)
from jaxbo.bilevel.linear_solvers import conjugate_gradient
from jaxbo.bilevel.linear_system import LinearSolver
from jaxbo.dro.aliases import descent
from jaxbo.dro.batch import AxisName
from jaxbo.dro.compositional import compositional
from jaxbo.dro.kl import kl
from jaxbo.dro.per_example import PerExampleGrads, per_example_grad
from jaxbo.dro.temperature import Temperature


def done_grad(
  loss_fn: PerturbedLoss,
  attack_loss: PerturbedLoss,
  box: Box,
  *,
  barrier: float | jax.Array,
  num_steps: int,
  step_size: float | jax.Array,
  inverse: str | LinearSolver = "diagonal",
  curvature: float | jax.Array = 0.0,
  direction: str = "gradient",
  margin: float = 1e-4,
  has_aux: bool = False,
  microbatch_size: int | None = None,
  repair: bool = False,
) -> Callable[..., PerExampleGrads]:
  r"""Lazy per-example gradients through the attack, for :func:`~jaxbo.reweight` (DONE).

  An attack perturbs each example. A log-barrier smooths it and keeps the perturbation in the box
  :math:`[b^-, b^+] = [\max(-\epsilon, low - x), \min(\epsilon, high - x)]`:

  .. math:: \hat\delta_i(\theta) = \arg\min_\delta\; \varphi_i(\theta, \delta),
    \qquad \varphi_i(\theta, \delta) := \ell'_i(\theta, \delta)
    - c \sum_k \big[\log(b^+_k - \delta_k) + \log(\delta_k - b^-_k)\big]

  The gradient of :math:`\ell_i(\theta, \hat\delta_i(\theta))` has a direct and an implicit term:

  .. math:: g_i = \nabla_\theta \ell_i
    - \nabla_\theta \big\langle \nabla_\delta \ell'_i(\theta, \hat\delta_i), q_i \big\rangle, \qquad
    q_i = \big[\nabla^2_{\delta\delta} \ell'_i + c D_i\big]^{-1} \nabla_\delta \ell_i

  with :math:`D = \operatorname{diag}((b^+ - \delta)^{-2} + (\delta - b^-)^{-2})`. If the attack
  loss is minus the loss, the implicit term vanishes as :math:`c \to 0`; it matters for attacks with
  another objective.

  *The attack* starts at the middle of the box, or at a random point if you give a key. It steps
  :math:`\delta \leftarrow \delta - (1/\alpha + c D)^{-1} \nabla \varphi`, at most nine tenths of
  the way to a wall (our choice: see Departures from the papers). The steps are safe if
  :math:`\alpha` is below the reciprocal of the largest curvature of the attack loss. Image
  gradients are small, so useful step sizes are far larger than those of sign steps.

  Cost: with :math:`K` steps, :math:`K + 1` forward and backward passes for the images, and one pass
  for the parameters at about twice the cost of an ordinary one. Each step of CG adds two passes for
  the images. Memory: about twice that of ordinary training, because of the implicit term.

  Args:
    loss_fn: ``loss_fn(params, perturbed_images, labels) -> losses``, real floats ``[batch]``: the
      training loss. The loss of an example must not depend on other examples.
    attack_loss: the loss that the attack *minimizes* over the perturbation, with the arguments and
      shape of ``loss_fn``: minus a margin, minus the cross entropy. It must be twice
      differentiable, at least piecewise.
    box: the :class:`Box` of the images, say ``Box(8 / 255)`` for pixels from 0 to 1; its
      norm must be ``"linf"`` and its epsilon positive.
    barrier: :math:`c > 0`, in units of the loss. Where the attack pushes a pixel with slope
      :math:`s`, the pixel stops :math:`c / s` before the wall.
    num_steps: :math:`K`, at least 1.
    step_size: :math:`\alpha > 0`; with ``direction="adam"``, Adam's learning rate in units of the
      images.
    inverse: how to find :math:`q`. ``"diagonal"`` replaces the Hessian of the attack loss by
      :math:`\lambda I`; ``"cg"`` solves the full system with ten steps of conjugate gradients for
      each example; a :class:`~jaxbo.bilevel.LinearSolver` solves it as you choose; ``"none"`` drops
      the implicit term, which gives ordinary adversarial training. In every case the loss is NaN,
      and :func:`~jaxbo.reweight` excludes the example, if a gradient of the attack is not finite.
    curvature: :math:`\lambda \ge 0`, for ``"diagonal"``.
    direction: ``"gradient"`` for the steps above, or ``"adam"`` for Adam's steps on
      :math:`\varphi`, which end within about ``step_size`` of the minimum.
    margin: how close to a wall a pixel may come, as a fraction of the width of its box, in
      (0, 0.5).
    has_aux: whether ``loss_fn`` returns ``(losses, aux)``, where ``aux`` may be new batch
      statistics. The result has it as ``aux.aux``, at the perturbed images.
    microbatch_size: how many examples go at once through the pass for the parameters; it must
      divide the batch. ``None`` for all.
    repair: what to do if a loss is not finite. ``False`` gives the whole batch a zero gradient;
      ``True`` recomputes the gradient without the bad examples (see
      :func:`~jaxbo.per_example_grad` for the cost).

  Returns:
    A function ``(params, (images, labels), key=None) -> PerExampleGrads``; call it inside a jitted
    function. Images are floats ``[batch, ...]`` in the box; labels are integers ``[batch]``;
    ``aux`` is a :class:`DoneInfo`. Images out of range raise ``ValueError``; under ``jit``, where
    values are not known, they are clipped and counted in ``aux.num_clipped``.

  Raises:
    ValueError: if an argument is outside its range, or losses are not ``[batch]``.
    TypeError: if a loss does not take three arguments, or if images or losses are not floats.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> def loss(params, images, labels):
    ...   return (images @ params) * (1.0 - 2.0 * labels)
    >>> def attack_loss(params, images, labels):
    ...   return -loss(params, images, labels)
    >>> grad = jaxbo.adversarial.done_grad(
    ...   loss, attack_loss, jaxbo.adversarial.Box(0.1), barrier=0.01, num_steps=30, step_size=1.0)
    >>> params, batch = jnp.array([2.0, -1.0]), (jnp.array([[0.5, 0.0]]), jnp.array([0]))
    >>> grads = grad(params, batch)
    >>> print(grads.aux.perturbed.round(3))     # c / s before the walls 0.6 and 0
    [[0.595 0.009]]
    >>> print(grads.pullback(jnp.ones(1)).round(3))
    [0.6   0.001]

  References:
    Sow, Lin, Wang and Liang, `Doubly Robust Instance-Reweighted Adversarial Training
    <https://arxiv.org/abs/2308.00311>`_, 2024.
  """
  _check.takes_arguments("loss_fn", loss_fn, "params", "images", "labels")
  _check.takes_arguments("attack_loss", attack_loss, "params", "images", "labels")
  check_each(_check.positive, "epsilon", check_box(box, norms=("linf",)).epsilon)
  _check.positive("barrier", barrier)
  _check.positive("step_size", step_size)
  _check.non_negative("curvature", curvature)
  _check.within("margin", margin, 0, 0.5, ends="()")
  num_steps = _check.positive_int("num_steps", num_steps)
  if not isinstance(inverse, LinearSolver):
    _check.one_of("inverse", inverse, ("diagonal", "cg", "none"))
  solver = conjugate_gradient(10) if inverse == "cg" else inverse
  losses_of = (lambda *arguments: loss_fn(*arguments)[0]) if has_aux else loss_fn
  _check.one_of("direction", direction, ("gradient", "adam"))

  @jax.jit
  def attack(params, images, labels, key):
    clipped = box.outside(images)
    params, images = jax.lax.stop_gradient((params, _tree.at_least_float32(images)))
    images = box.clip(images)
    bounds = box.bounds(images)
    start = bounds.center if key is None else bounds.random(key)
    minimum = lower_level.minimize(
      lambda perturbed: checked("attack_loss", attack_loss(params, perturbed, labels), labels),
      images,
      bounds,
      start,
      barrier=barrier,
      num_steps=num_steps,
      step_size=step_size,
      direction=direction,
      margin=margin,
    )
    perturbed = images + minimum.delta
    last_step, not_finite = minimum.last_step, minimum.not_finite
    info = DoneInfo(perturbed, last_step, jnp.zeros_like(last_step), not_finite, clipped)
    if inverse == "none":
      return None, info
    v, bad = image_gradient("loss_fn", losses_of, params, perturbed, labels)
    if isinstance(solver, LinearSolver):
      diagonal = barrier * lower_level.barrier_curvature(minimum.delta, bounds)
      of_images = lambda images, labels: attack_loss(params, images, labels)
      q, linear = lower_level.solve_full(of_images, perturbed, labels, v, diagonal, solver)
      info = info._replace(residual=linear.residual)
    else:
      q = lower_level.solve_diagonal(v, minimum.delta, bounds, barrier, curvature)
    return q, info._replace(not_finite=info.not_finite | bad)

  def corrected(params, batch):
    perturbed, labels, q, not_finite = batch
    value = loss_fn(params, perturbed, labels)
    losses, aux = value if has_aux else (value, None)
    known = lambda *_: losses
    losses = corrected_losses(known, attack_loss, params, perturbed, perturbed, labels, q)
    losses = jnp.where(not_finite, jnp.nan, losses) if q is None else losses
    return (losses, aux) if has_aux else losses

  lazy = per_example_grad(
    corrected, has_aux=has_aux, microbatch_size=microbatch_size, repair=repair
  )

  def gradients(params: optax.Params, batch: Data, key: Key | None = None) -> PerExampleGrads:
    images, labels = check_batch(batch, box)
    q, info = attack(params, images, labels, None if key is None else _random.typed_key(key))
    grads = lazy(params, (info.perturbed, labels, q, info.not_finite))
    return grads.replace(aux=info._replace(aux=grads.aux))

  return gradients


def done(
  learning_rate: LearningRate,
  temperature: Temperature = 1.0,
  *,
  rate: optax.ScalarOrSchedule = 0.1,
  axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
  r"""DONE: :func:`~jaxbo.dro.kl` weights with a moving average of their normalizer, then SGD.

  .. math:: \min_\theta\; r \log \mathbb E_i\, e^{\ell_i(\theta, \hat\delta_i(\theta)) / r}

  ``update`` takes the per-example gradients of :func:`~jaxbo.adversarial.done_grad`. The weights
  are those of :func:`~jaxbo.dro.compositional`.

  Args:
    learning_rate: the learning rate of SGD, a float or a schedule; or an optimizer to use instead
      of SGD.
    temperature: :math:`r > 0`, in units of the loss: a number, or a schedule of the number of
      batches so far. The default is our choice: see Departures from the papers.
    rate: the rate of the moving average, in (0, 1], or a schedule of the number of batches so far;
      1 takes the weights from each batch alone. The default is our choice.
    axis_name: the ``shard_map`` axis, or axes, over which the batch is divided.

  Returns:
    ``optax.chain(reweight(compositional(kl(temperature), rate)), optax.sgd(learning_rate))``.

  Example:
    >>> import jax, jax.numpy as jnp, jaxbo, optax
    >>> def loss(params, images, labels):
    ...   return jax.nn.softplus((images @ params) * (1.0 - 2.0 * labels))
    >>> def attack_loss(params, images, labels):
    ...   return -loss(params, images, labels)
    >>> grad = jaxbo.adversarial.done_grad(
    ...   loss, attack_loss, jaxbo.adversarial.Box(0.1), barrier=1e-3, num_steps=5, step_size=1.0)
    >>> tx = jaxbo.done(0.5, temperature=0.5)
    >>> @jax.jit
    ... def step(params, state, batch):
    ...   grads = grad(params, batch)
    ...   updates, state = tx.update(grads, state, params)
    ...   return optax.apply_updates(params, updates), state, grads.losses
    >>> params = jnp.zeros(2)
    >>> batch = jnp.array([[0.9, 0.1], [0.2, 0.8]]), jnp.array([1, 0])
    >>> params, state, losses = step(params, tx.init(params), batch)
    >>> params, state, lower = step(params, state, batch)
    >>> bool(jnp.all(lower < losses))
    True

  References:
    Sow, Lin, Wang and Liang, `Doubly Robust Instance-Reweighted Adversarial Training
    <https://arxiv.org/abs/2308.00311>`_, 2024.
  """
  return descent(learning_rate, compositional(kl(temperature), rate), axis_name)
