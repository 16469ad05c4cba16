"""The methods of ``benchmarks/adversarial.py``, each a few calls of the library."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

import jaxbo

LABELS = {
  "at": "AT",
  "trades": "TRADES",
  "mart": "MART",
  "fat": "FAT",
  "gairat": "GAIRAT",
  "mail": "MAIL",
  "fast_bat": "Fast-BAT",
  "at_kl": "AT + KL weights",
  "done": "DONE, GD",
  "done_adam": "DONE, Adam",
}


class Method(NamedTuple):
  """A method on a model.

  Attributes:
    gradients: ``gradients(params, (images, labels), key) -> (grads, extra)``: lazy gradients of
      each example, and further arguments of :func:`jaxbo.reweight`.
    weighting: what weighs them.
  """

  gradients: Callable[..., tuple[jaxbo.dro.PerExampleGrads, dict[str, Any]]]
  weighting: jaxbo.dro.Weighting


def make_methods(model: Callable[..., Any], epsilon: float, num_steps: int) -> dict[str, Method]:
  """All methods as at the end of a training, on ``model(params, images)``; attacks take K steps.

  Rates hardly matter here.
  """
  box = jaxbo.adversarial.Box(epsilon)
  uniform, kl_weights = jaxbo.dro.uniform(), jaxbo.dro.compositional(jaxbo.dro.kl(3.0), 0.1)

  def plain(params, images, labels):
    return jaxbo.adversarial.cross_entropy_loss(model(params, images), labels)

  def margin(params, images, labels):
    return jaxbo.adversarial.margin_loss(model(params, images), labels)

  def at_attacked(params, images, attacked, labels):
    del images
    return plain(params, attacked, labels)

  def with_clean(loss, **options):
    return lambda params, images, attacked, labels: loss(
      model(params, images), model(params, attacked), labels, **options
    )

  def attack(**options):
    return jaxbo.adversarial.pgd(model, box, step_size=epsilon / 4, num_steps=num_steps, **options)

  def attacked(loss, attack, score=None):
    of_batch = jaxbo.per_example_grad(lambda params, batch: loss(params, *batch))

    def gradients(params, batch, key):
      images, labels = batch
      found, info = attack.run(params, batch, key)
      extra = {} if score is None else {"scores": score(params, found, labels, info)}
      return of_batch(params, (images, found, labels)), extra

    return gradients

  def implicit(make, inner_loss, **options):
    of_batch = make(plain, inner_loss, box, curvature=10.0, **options)
    return lambda *arguments: (of_batch(*arguments), {})

  negative = lambda loss: lambda *arguments: -loss(*arguments)
  done = functools.partial(
    implicit, jaxbo.adversarial.done_grad, negative(margin), barrier=1e-5, num_steps=num_steps
  )
  kl_start = attack(objective="kl", random_start=1e-3)
  steps_taken = lambda params, found, labels, info: info.num_correct.astype(jnp.float32)
  of_margin = lambda params, found, labels, info: jaxbo.adversarial.probabilistic_margin(
    model(params, found), labels
  )
  return {
    "at": Method(attacked(at_attacked, attack()), uniform),
    "trades": Method(
      attacked(with_clean(jaxbo.adversarial.trades_loss, beta=6.0), kl_start), uniform
    ),
    "mart": Method(attacked(with_clean(jaxbo.adversarial.mart_loss, beta=5.0), attack()), uniform),
    "fat": Method(attacked(at_attacked, attack(stop_after=2)), uniform),
    "gairat": Method(
      attacked(at_attacked, attack(), steps_taken), jaxbo.adversarial.gairat(num_steps, shift=-1.0)
    ),
    "mail": Method(attacked(at_attacked, attack(), of_margin), jaxbo.adversarial.mail(10.0, -0.5)),
    "fast_bat": Method(
      implicit(jaxbo.adversarial.fast_bat_grad, negative(plain), step_size=5000 / 255), uniform
    ),
    "at_kl": Method(attacked(at_attacked, attack()), kl_weights),
    "done": Method(done(step_size=5.0), kl_weights),
    "done_adam": Method(done(step_size=epsilon / 4, direction="adam"), kl_weights),
  }
