"""The methods of adversarial training: their gradients, their weights, and their rates.

What a paper or its code says was taken, with its epochs as shares of the training; what DONE's
paper does not say was chosen on images for validation (``--tune``).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxbo

BASELINE, DONE = "at", "done"


@dataclasses.dataclass(frozen=True)
class Rates:
  """What the methods take.

  Attributes:
    trades_beta: of the divergence in TRADES; 6 is published.
    mart_beta: of the divergence in MART; 5 is published.
    fat_steps: shares of the training after which FAT goes on for one, and for two more steps behind
      the first misclassification; 50 and 90 of 120 epochs are published.
    gairat_begin: the share of the training with uniform weights; 60 of 120 epochs are published.
    gairat_shift: Lambda of GAIRAT; -1 is published.
    mail_begin: the share of the training with uniform weights; 76 of 120 epochs are published.
    mail_slope: of MAIL's sigmoid; 10 is published.
    mail_bias: of MAIL's sigmoid; -0.5 is published.
    fast_bat_step_size: of Fast-BAT's attack; 5000 / 255 is published.
    fast_bat_curvature: lambda of Fast-BAT; 10 is published.
    temperature: of KL weights, in nats; the lower, the more weight on what is hard.
    compositional_rate: the share of a new batch in the moving average of their normaliser.
    barrier: c of DONE's lower level.
    curvature: lambda of its diagonal inverse, in place of the Hessian of the attack's loss.
    step_size: of its gradient descent.
    adam_step_size: of its Adam, in units of epsilon.
  """

  trades_beta: float = 6.0
  mart_beta: float = 5.0
  fat_steps: tuple[float, float] = (0.42, 0.75)
  gairat_begin: float = 0.5
  gairat_shift: float = -1.0
  mail_begin: float = 0.63
  mail_slope: float = 10.0
  mail_bias: float = -0.5
  fast_bat_step_size: float = 5000 / 255
  fast_bat_curvature: float = 10.0
  temperature: float = 3.0
  compositional_rate: float = 0.1
  barrier: float = 1e-5
  curvature: float = 10.0
  step_size: float = 5.0
  adam_step_size: float = 0.25

  def check(self) -> None:
    """Raises ``ValueError`` for what no method can take."""
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if not np.all(np.isfinite(value)):
        raise ValueError(f"{field.name} must be finite, got {value}")
      if field.name == "fat_steps":
        if not 0 <= value[0] <= value[1] <= 1:
          raise ValueError(f"fat_steps must be two shares that do not fall, got {value}")
      elif field.name.endswith("_begin") and not 0 <= value <= 1:
        raise ValueError(f"{field.name} must be in [0, 1], got {value}")
      elif field.name == "compositional_rate" and not 0 < value <= 1:
        raise ValueError(f"compositional_rate must be in (0, 1], got {value}")
      elif field.name.endswith(("temperature", "barrier", "step_size", "fast_bat_curvature")):
        if not value > 0:
          raise ValueError(f"{field.name} must be positive, got {value}")
      elif field.name.endswith(("beta", "curvature", "slope")) and not value >= 0:
        raise ValueError(f"{field.name} must be at least 0, got {value}")


class Setting(NamedTuple):
  """What methods are made from.

  Attributes:
    model: ``model(params, images) -> logits``.
    epsilon: the largest change of a pixel.
    num_steps: of the attack, K.
    rates: of the methods.
  """

  model: Callable[..., Any]
  epsilon: float | jax.Array
  num_steps: int
  rates: Rates


class Parts(NamedTuple):
  """A method.

  Attributes:
    gradients: ``gradients(params, (images, labels), key, progress) -> (grads, extra)``: lazy
      gradients of each example, and further arguments of :func:`jaxbo.reweight`. ``progress`` is
      the share of the training that is done.
    weighting: what weighs them.
  """

  gradients: Callable[..., tuple[jaxbo.PerExampleGrads, dict[str, jax.Array]]]
  weighting: jaxbo.Weighting


class Method(NamedTuple):
  """A method and its name.

  Attributes:
    label: its name in tables.
    make: ``make(setting) -> Parts``.
  """

  label: str
  make: Callable[[Setting], Parts]


def sign_attack(setting: Setting, **options: Any) -> jaxbo.Attack:
  """PGD with signed steps of a quarter of epsilon: the attack of most methods."""
  return jaxbo.pgd(
    setting.model,
    epsilon=setting.epsilon,
    step_size=setting.epsilon / 4,
    num_steps=setting.num_steps,
    **options,
  )


def cross_entropy(setting: Setting) -> Callable[..., jax.Array]:
  """``loss(params, images, labels) -> [batch]``."""
  return lambda params, images, labels: jaxbo.cross_entropy_loss(
    setting.model(params, images), labels
  )


def lazy(loss: Callable[..., jax.Array], params: Any, *batch: jax.Array) -> jaxbo.PerExampleGrads:
  """The gradients of ``loss(params, *batch)``."""
  # Without the loop for losses that are not finite, which would double the time of compilation: a
  # batch with one is skipped.
  return jaxbo.per_example_grad(lambda p, b: loss(p, *b), repair=False)(params, batch)


def adversarial_training(setting: Setting, weighting: jaxbo.Weighting | None = None) -> Parts:
  """Madry et al.: the cross-entropy at what PGD finds; or its weighted mean."""
  attack = sign_attack(setting)

  def gradients(params, batch, key, progress):
    del progress
    return lazy(cross_entropy(setting), params, attack(params, batch, key), batch[1]), {}

  return Parts(gradients, weighting or jaxbo.uniform())


def _with_clean_logits(setting: Setting, attack: jaxbo.Attack, loss: Callable[..., Any]) -> Parts:
  """A loss of clean and adversarial logits."""

  def both(params, images, attacked, labels):
    return loss(setting.model(params, images), setting.model(params, attacked), labels)

  def gradients(params, batch, key, progress):
    del progress
    return lazy(both, params, batch[0], attack(params, batch, key), batch[1]), {}

  return Parts(gradients, jaxbo.uniform())


def trades(setting: Setting) -> Parts:
  """TRADES; its attack starts at small Gaussian noise and maximises the divergence."""
  attack = sign_attack(setting, objective="kl", random_start=1e-3)
  loss = functools.partial(jaxbo.trades_loss, beta=setting.rates.trades_beta)
  return _with_clean_logits(setting, attack, loss)


def mart(setting: Setting) -> Parts:
  """MART."""
  loss = functools.partial(jaxbo.mart_loss, beta=setting.rates.mart_beta)
  return _with_clean_logits(setting, sign_attack(setting), loss)


def fat(setting: Setting) -> Parts:
  """FAT: an example is attacked for a few steps more than it takes to misclassify it."""
  runs = [sign_attack(setting, stop_after=steps).run for steps in range(3)]
  begins = jnp.asarray(setting.rates.fat_steps)

  def gradients(params, batch, key, progress):
    phase = jnp.sum(progress >= begins, dtype=jnp.int32)
    attacked, _ = jax.lax.switch(phase, runs, params, batch, key)
    return lazy(cross_entropy(setting), params, attacked, batch[1]), {}

  return Parts(gradients, jaxbo.uniform())


def _scored(
  setting: Setting, weighting: jaxbo.Weighting, begin: float, score: Callable[..., jax.Array]
) -> Parts:
  """Cross-entropy weighted by ``score(params, attacked, labels, info)``; uniformly at first."""
  attack = sign_attack(setting)

  def gradients(params, batch, key, progress):
    attacked, info = attack.run(params, batch, key)
    scores = score(params, attacked, batch[1], info)
    scores = jnp.where(progress >= begin, scores, 0)  # Equal scores have equal weights.
    return lazy(cross_entropy(setting), params, attacked, batch[1]), {"scores": scores}

  return Parts(gradients, weighting)


def gairat(setting: Setting) -> Parts:
  """GAIRAT: weights by the number of steps until an example is misclassified."""
  weighting = jaxbo.gairat(setting.num_steps, shift=setting.rates.gairat_shift)
  score = lambda params, attacked, labels, info: info.num_correct.astype(jnp.float32)
  return _scored(setting, weighting, setting.rates.gairat_begin, score)


def mail(setting: Setting) -> Parts:
  """MAIL: weights by the margin of probabilities."""
  weighting = jaxbo.mail(setting.rates.mail_slope, setting.rates.mail_bias)

  def score(params, attacked, labels, info):
    del info
    return jaxbo.probabilistic_margin(setting.model(params, attacked), labels)

  return _scored(setting, weighting, setting.rates.mail_begin, score)


def fast_bat(setting: Setting) -> Parts:
  """Fast-BAT: two steps of the attack, whatever K is, and their implicit gradient."""
  loss = cross_entropy(setting)
  of_batch = jaxbo.fast_bat_grad(
    loss,
    lambda *arguments: -loss(*arguments),
    epsilon=setting.epsilon,
    step_size=setting.rates.fast_bat_step_size,
    curvature=setting.rates.fast_bat_curvature,
    repair=False,
  )

  def gradients(params, batch, key, progress):
    del progress
    return of_batch(params, batch, key), {}

  return Parts(gradients, jaxbo.uniform())


def kl_weights(rates: Rates) -> jaxbo.Weighting:
  """The weights of DONE."""
  return jaxbo.compositional(jaxbo.kl(rates.temperature), rates.compositional_rate)


def done(setting: Setting, direction: str = "gradient", inverse: str = "diagonal") -> Parts:
  """DONE: KL weights, and the implicit gradient of an attack on the margin of logits."""
  rates = setting.rates
  of_batch = jaxbo.done_grad(
    cross_entropy(setting),
    lambda params, images, labels: -jaxbo.margin_loss(setting.model(params, images), labels),
    epsilon=setting.epsilon,
    barrier=rates.barrier,
    num_steps=setting.num_steps,
    step_size=rates.step_size
    if direction == "gradient"
    else rates.adam_step_size * setting.epsilon,
    inverse=inverse,
    curvature=rates.curvature,
    direction=direction,
    repair=False,
  )

  def gradients(params, batch, key, progress):
    del progress
    return of_batch(params, batch, key), {}

  return Parts(gradients, kl_weights(rates))


METHODS = {
  "at": Method("AT", adversarial_training),
  "trades": Method("TRADES", trades),
  "mart": Method("MART", mart),
  "fat": Method("FAT", fat),
  "gairat": Method("GAIRAT", gairat),
  "mail": Method("MAIL", mail),
  "fast_bat": Method("Fast-BAT", fast_bat),
  "at_kl": Method("AT + KL weights", lambda s: adversarial_training(s, kl_weights(s.rates))),
  "done": Method("DONE, GD", done),
  "done_adam": Method("DONE, Adam", functools.partial(done, direction="adam")),
}

# What --tune varies of each method, one at a time.
GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
  "trades": {"trades_beta": (1.0, 3.0, 6.0)},
  "mart": {"mart_beta": (1.0, 5.0)},
  "mail": {"mail_bias": (-0.5, 0.0)},
  "gairat": {"gairat_shift": (-1.0, 0.0, 2.0)},
  "fast_bat": {"fast_bat_step_size": (1.0, 5.0, 20.0)},
  "at_kl": {"temperature": (1.0, 3.0, 10.0)},
  "done": {
    "temperature": (1.0, 3.0, 10.0),
    "compositional_rate": (0.02, 0.1, 1.0),
    "barrier": (1e-5, 1e-4, 1e-3),
    "step_size": (1.0, 5.0, 20.0),
    "curvature": (1.0, 10.0, 1e6),
  },
  "done_adam": {"adam_step_size": (0.1, 0.25, 0.5)},
}
