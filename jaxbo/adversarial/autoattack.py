"""Ensembles of attacks: AutoAttack, and the attacks of the papers on adversarial training."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxbo.adversarial.apgd import apgd
from jaxbo.adversarial.attack import Attack
from jaxbo.adversarial.box import Box, check_box
from jaxbo.adversarial.fab import fab
from jaxbo.adversarial.pgd import pgd
from jaxbo.adversarial.square import square


def autoattack(
  model: Callable[..., jax.Array],
  box: Box,
  *,
  num_steps: int = 100,
  num_targets: int = 9,
  num_queries: int = 5000,
  num_classes: int | None = None,
) -> dict[str, Attack]:
  """AutoAttack's standard ensemble, in its order and with its budgets.

  An image counts as robust only if it withstands all four attacks. Give them to
  :func:`evaluate_robustness` with ``drop_broken=True``, as AutoAttack does: each attack then runs
  only on the images that withstood the attacks before it, and most images fall to the first attack.

  One thing differs: the squares of :func:`square` shrink as in its paper, by shares of the queries;
  AutoAttack's code shrinks the squares as if there were 10,000 queries, whatever the budget.

  Cost, in forward and backward passes for each image that is left: about ``num_steps`` for
  ``apgd_ce``, ``num_targets * num_steps`` for ``apgd_t``, one and a half times as many for
  ``fab_t``, and ``num_queries`` forward passes for ``square``.

  Args:
    model: ``model(params, images) -> logits``, ``[batch, num_classes]``; the logits of an example
      must not depend on other examples.
    box: the :class:`Box` of the images, say ``Box(8 / 255)`` for pixels from 0 to 1.
    num_steps: the number of steps of ``apgd_ce``, ``apgd_t`` and ``fab_t``, at least 1.
    num_targets: how many classes ``apgd_t`` and ``fab_t`` aim at, at least 1; all other classes if
      there are fewer.
    num_queries: the number of queries of ``square``, which needs images with four axes; 0 leaves
      this attack out.
    num_classes: the number of classes; ``None`` for at least four. With fewer than four, ``apgd_t``
      uses the margin, because targeted DLR needs four.

  Returns:
    ``{"apgd_ce": ..., "apgd_t": ..., "fab_t": ..., "square": ...}``: :func:`apgd` on the cross
    entropy and on targeted DLR, :func:`fab`, and :func:`square`.

  Raises:
    ValueError: if an argument is outside its range.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> def model(params, images):
    ...   return images.reshape(len(images), -1) @ params
    >>> attacks = jaxbo.adversarial.autoattack(
    ...   model, jaxbo.adversarial.Box(0.1), num_steps=5, num_queries=20)
    >>> images, params = jnp.eye(4).reshape(4, 2, 2, 1), 3 * jnp.eye(4)
    >>> report = jaxbo.adversarial.evaluate_robustness(
    ...   model, params, (images, jnp.arange(4)), 0, attacks, drop_broken=True)
    >>> list(report.accuracies())
    ['clean', 'apgd_ce', 'apgd_t', 'fab_t', 'square', 'worst_case']

  References:
    Croce and Hein, `Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse
    Parameter-free Attacks <https://arxiv.org/abs/2003.01690>`_, 2020.
  """
  targeted = apgd(
    model, box, num_steps=num_steps, num_targets=num_targets, objective=_aim(num_classes)
  )
  found = {
    "apgd_ce": apgd(model, box, num_steps=num_steps),
    "apgd_t": targeted,
    "fab_t": fab(model, box, num_steps=num_steps, num_targets=num_targets),
  }
  if num_queries:
    found["square"] = square(model, box, num_queries=num_queries)
  return found


def standard_attacks(
  model: Callable[..., jax.Array],
  box: Box,
  *,
  num_steps: int = 100,
  num_queries: int = 5000,
  num_classes: int | None = None,
) -> dict[str, Attack]:
  """The attacks that papers on adversarial training report one by one.

  For the robust accuracy that papers quote, use :func:`autoattack`.

  Args:
    model: ``model(params, images) -> logits``, ``[batch, num_classes]``; the logits of an example
      must not depend on other examples.
    box: the :class:`Box` of the images, say ``Box(8 / 255)`` for pixels from 0 to 1.
    num_steps: the number of steps of the longer attacks, at least 1.
    num_queries: the number of queries of :func:`square`, which needs images with four axes; 0
      leaves this attack out.
    num_classes: the number of classes; ``None`` for at least four. With fewer than four, the attack
      ``"apgd_t"`` uses the margin, because targeted DLR needs four.

  Returns:
    ``{"pgd_20": ..., "pgd": ..., "apgd_ce": ..., "apgd_t": ..., "square": ...}``: PGD with 20 steps
    and with ``num_steps`` steps of ``epsilon / 4``, :func:`apgd` on the cross entropy and on
    targeted DLR, and :func:`square`.

  Raises:
    ValueError: if an argument is outside its range.

  Example:
    >>> import jaxbo
    >>> def model(params, images):
    ...   return images @ params
    >>> attacks = jaxbo.adversarial.standard_attacks(model, jaxbo.adversarial.Box(8 / 255))
    >>> list(attacks)
    ['pgd_20', 'pgd', 'apgd_ce', 'apgd_t', 'square']
  """
  epsilon = jnp.asarray(check_box(box).epsilon)
  size = jnp.maximum(epsilon / 4, jnp.finfo(jnp.float32).tiny)
  found = {
    "pgd_20": pgd(model, box, step_size=size, num_steps=20),
    "pgd": pgd(model, box, step_size=size, num_steps=num_steps),
    "apgd_ce": apgd(model, box, num_steps=num_steps),
    "apgd_t": apgd(model, box, num_steps=num_steps, objective=_aim(num_classes)),
  }
  if num_queries:
    found["square"] = square(model, box, num_queries=num_queries)
  return found


def _aim(num_classes: int | None) -> str:
  return "targeted_dlr" if num_classes is None or num_classes > 3 else "margin"
