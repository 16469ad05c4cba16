"""Projected gradient ascent on the images: PGD, FGSM, and FAT's early-stopped PGD."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxbo import _check, _tree
from jaxbo.adversarial import attack as attacks
from jaxbo.adversarial import objectives
from jaxbo.adversarial.attack import Attack, Found, make_attack
from jaxbo.adversarial.box import (
  Ball,
  Box,
  along,
  as_image,
  check_box,
  check_each,
  make_ball,
)
from jaxbo.adversarial.objectives import Objective


def pgd(
  model: Callable[..., jax.Array],
  box: Box,
  *,
  step_size: ArrayLike,
  num_steps: int,
  random_start: bool | float = True,
  objective: str | Objective = "cross_entropy",
  direction: str = "steepest",
  restarts: int = 1,
  stop_after: int | None = None,
) -> Attack:
  r"""Projected gradient ascent (PGD) on an objective, within a ball around each image.

  .. math:: \delta \leftarrow \Pi\big(\delta + \alpha\, d(\nabla_\delta\, \ell'(x + \delta, y))\big)

  :math:`d` takes the sign for ``linf`` and divides by the norm for ``l2``. :math:`\Pi` projects
  onto the ball and onto the range of pixel values.

  Cost: ``num_steps`` forward and backward passes from each start, without gradients of the
  parameters. Several restarts add one forward pass each; an objective that uses clean logits adds
  one.

  Args:
    model: ``model(params, images) -> logits``, ``[batch, num_classes]``. The logits of an example
      must not depend on other examples; the caller decides how batch normalization and dropout
      behave.
    box: the :class:`Box` of the images, say ``Box(8 / 255)`` for pixels from 0 to 1.
    step_size: :math:`\alpha > 0`, in units of the images unless ``direction="gradient"``; a number,
      or an array that broadcasts over one image.
    num_steps: the number of steps, at least 1.
    random_start: ``True`` starts at a uniform draw from the ball; for ``linf``, from the part of
      the ball within the range of pixel values. ``False`` starts at the image. A number starts at
      Gaussian noise of that standard deviation, projected onto the ball, as TRADES does.
    objective: what to maximize: ``"cross_entropy"``, ``"margin"`` (:func:`margin_loss`), ``"kl"``
      (the divergence from clean predictions, TRADES), ``"dlr"`` (the difference of logits ratio),
      or a function ``(logits, labels, clean_logits) -> [batch]``.
    direction: ``"steepest"``: :math:`d` as above; ``"gradient"``: the gradient itself, which needs
      far larger steps; ``"adam"``: Adam's direction.
    restarts: the number of random starts, at least 1, run side by side under ``vmap``. The attack
      keeps, for each example, the result with the largest objective, among the misclassified ones
      if there are any.
    stop_after: :math:`\tau \ge 0`: an example stops moving once it was misclassified at
      :math:`\tau + 1` of its points (FAT's early stop). ``None`` never stops.

  Returns:
    An :class:`Attack`. Under ``jit`` it clips images outside the range of pixels without an error;
    ``attack.run`` also returns the info, which marks them in ``clipped``.

  Raises:
    ValueError: if an argument is outside its range; if ``"kl"`` would start at the image, where its
      gradient is zero; if several restarts would all start at the image.
    TypeError: if ``model`` does not take ``(params, images)``.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> def model(params, images):                              # two classes, one pixel
    ...   return jnp.concatenate([images, -images], axis=1) * params
    >>> attack = jaxbo.adversarial.pgd(
    ...   model, jaxbo.adversarial.Box(0.25), step_size=0.1, num_steps=6)
    >>> attack(jnp.float32(2.0), (jnp.array([[0.5]]), jnp.array([0])), key=0).tolist()
    [[0.25]]

  References:
    Madry et al., `Towards Deep Learning Models Resistant to Adversarial Attacks
    <https://arxiv.org/abs/1706.06083>`_, 2018; Zhang et al., `Attacks Which Do Not Kill Training
    Make Adversarial Learning Stronger <https://arxiv.org/abs/2002.11242>`_, 2020 (FAT).
  """
  ball = make_ball(check_box(box))
  check_each(_check.positive, "step_size", step_size)
  num_steps = _check.positive_int("num_steps", num_steps)
  restarts = _check.positive_int("restarts", restarts)
  value_of, min_classes = objectives.find_objective(objective)
  start = find_start(ball, random_start)
  if random_start is False:
    if objective == "kl":
      raise ValueError(
        "random_start must not be False with objective='kl', whose gradient is zero at the image; "
        "TRADES uses random_start=0.001"
      )
    if restarts > 1:
      raise ValueError(f"random_start must not be False with restarts={restarts}")
  if stop_after is not None:
    stop_after = _check.non_negative_int("stop_after", stop_after)
  optimizer = _ascent(direction, ball, step_size)

  def climb(forward, images, labels, clean, key):
    delta = start(key, images)
    wrong = attacks.is_wrong(clean, labels)  # On an explicit mesh, what is counted is divided so.
    patience = jnp.full_like(wrong, -1 if stop_after is None else stop_after, dtype=jnp.int32)
    count, nothing = jnp.zeros_like(wrong, jnp.int32), jnp.zeros_like(wrong)
    carry = (delta, optimizer.init(delta), nothing, patience, count, nothing)
    carry = _tree.vary_alike(carry, clean, images, labels, delta)

    def step(_, carry):
      delta, state, stopped, patience, num_correct, not_finite = carry
      ascent, _, wrong, bad = attacks.gradient(forward, value_of, images + delta, labels, clean)
      stopped |= wrong & (patience == 0)
      patience -= (wrong & ~stopped).astype(jnp.int32)
      updates, state = optimizer.update(-ascent, state)
      moved = ball.project(delta + updates, images)
      delta = jnp.where(along(stopped | bad, delta), delta, moved)
      return delta, state, stopped, patience, num_correct + ~wrong, not_finite | bad

    delta, _, _, _, num_correct, not_finite = jax.lax.fori_loop(0, num_steps, step, carry)
    not_judged = jnp.zeros(labels.shape), nothing
    return Found(box.clip(images + delta), *not_judged, num_correct, not_finite)

  def find(forward, images, labels, key):
    clean = forward(images)
    if restarts == 1:
      return climb(forward, images, labels, clean, key)

    def run(key):
      found = climb(forward, images, labels, clean, key)
      logits = forward(found.perturbed)  # Which of the last points is the best?
      values = objectives.values_of(value_of, logits, labels, clean)
      return found._replace(values=values, wrong=attacks.is_wrong(logits, labels))

    return attacks.best(jax.vmap(run)(jax.random.split(key, restarts)))

  needs_key = random_start is not False
  return make_attack(model, find, box, needs_key=needs_key, min_classes=min_classes)


def fgsm(
  model: Callable[..., jax.Array],
  box: Box,
  *,
  step_size: ArrayLike | None = None,
  random_start: bool | float = True,
  objective: str | Objective = "cross_entropy",
) -> Attack:
  r"""The fast gradient sign method: one step of :func:`pgd`.

  Cost: one forward and one backward pass.

  Args:
    model: ``model(params, images) -> logits``, ``[batch, num_classes]``; the logits of an example
      must not depend on other examples.
    box: the :class:`Box` of the images, say ``Box(8 / 255)`` for pixels from 0 to 1.
    step_size: positive, in units of the images. ``None`` (default) is :math:`1.25\, \epsilon` with
      a random start, as published, and :math:`\epsilon` without.
    random_start: ``True`` starts at a uniform draw from the ball, ``False`` at the image; a number
      is the standard deviation of Gaussian noise to start at.
    objective: what to maximize: ``"cross_entropy"``, ``"margin"``, ``"kl"``, ``"dlr"``, or a
      function ``(logits, labels, clean_logits) -> [batch]``.

  Returns:
    An :class:`Attack`. Under ``jit`` it clips images outside the range of pixels without an error;
    ``attack.run`` also returns the info, which marks them in ``clipped``.

  Raises:
    ValueError: if an argument is outside its range; if ``"kl"`` would start at the image, where its
      gradient is zero.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> def model(params, images):
    ...   return jnp.concatenate([images, -images], axis=1) * params
    >>> attack = jaxbo.adversarial.fgsm(model, jaxbo.adversarial.Box(0.25), random_start=False)
    >>> attack(jnp.float32(2.0), (jnp.array([[0.5]]), jnp.array([0]))).tolist()
    [[0.25]]

  References:
    Goodfellow, Shlens and Szegedy, `Explaining and Harnessing Adversarial Examples
    <https://arxiv.org/abs/1412.6572>`_, 2015; Wong, Rice and Kolter, `Fast Is Better than Free
    <https://arxiv.org/abs/2001.03994>`_, 2020.
  """
  if step_size is None:
    epsilon = check_box(box).epsilon
    size = epsilon if random_start is False else 1.25 * jnp.asarray(epsilon)
    step_size = jnp.maximum(size, jnp.finfo(jnp.float32).tiny)
  return pgd(
    model,
    box,
    step_size=step_size,
    num_steps=1,
    random_start=random_start,
    objective=objective,
  )


def find_start(ball: Ball, random_start: bool | float) -> Callable[..., jax.Array]:
  """Returns the function ``(key, images) -> delta`` that ``random_start`` stands for."""
  if isinstance(random_start, bool):
    if random_start:
      return ball.random
    return lambda key, images: jnp.zeros_like(images)
  _check.positive("random_start", random_start)
  noise = lambda key, images: jax.random.normal(key, images.shape, images.dtype)
  return lambda key, images: ball.project(random_start * noise(key, images), images)


def _ascent(direction: str, ball: Ball, step_size: ArrayLike) -> optax.GradientTransformation:
  """Returns the optimizer of the perturbation, which descends on minus the objective."""
  _check.one_of("direction", direction, ("steepest", "gradient", "adam"))
  steepest = optax.stateless(lambda gradient, params: ball.steepest(jnp.asarray(gradient)))
  parts = {"steepest": [steepest], "gradient": [], "adam": [optax.scale_by_adam()]}
  size_of = lambda images: as_image("step_size", step_size, images)
  scale = optax.stateless(lambda move, params: -size_of(jnp.asarray(move)) * jnp.asarray(move))
  return optax.chain(*parts[direction], scale)
