"""The methods of adversarial training: their gradients, their weights, and their rates.

What a paper or its code says was taken, with its epochs as shares of the training. One rate of each
method that has any is chosen on images for validation, among four values (``--tune``).
"""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from pydantic import Field, model_validator

import jaxbo
from jaxbo.adversarial import Box
from scripts.common.config import Checked, NonNegative, Positive

BASELINE, DONE = "at", "done"
Part = Annotated[float, Field(ge=0, le=1)]


class Rates(Checked):
  """The hyperparameters of the methods."""

  trades_beta: NonNegative = 6.0
  """The weight of the divergence in TRADES; the published value is 6."""
  mart_beta: NonNegative = 5.0
  """The weight of the divergence in MART; the published value is 5."""
  fat_steps: tuple[Part, Part] = (0.42, 0.75)
  """The shares of training after which FAT takes one, then two more steps after the first
  misclassification; published: after 50 and 90 of 120 epochs."""
  gairat_begin: Part = 0.5
  """GAIRAT: the share of training with uniform weights; published: 60 of 120 epochs."""
  gairat_shift: float = -1.0
  """GAIRAT's lambda; the published value is -1."""
  mail_begin: Part = 0.63
  """MAIL: the share of training with uniform weights; published: 76 of 120 epochs."""
  mail_slope: NonNegative = 10.0
  """The slope of MAIL's sigmoid; the published value is 10."""
  mail_bias: float = -0.5
  """The bias of MAIL's sigmoid; the published value is -0.5."""
  fast_bat_step_size: Positive = 5000 / 255
  """The step size of Fast-BAT's attack; the published value is 5000 / 255."""
  fast_bat_curvature: Positive = 10.0
  """Fast-BAT's lambda; the published value is 10."""
  temperature: Positive = 3.0
  """The temperature of KL weights, in nats; lower values put more weight on hard examples."""
  compositional_rate: Annotated[float, Field(gt=0, le=1)] = 0.1
  """DONE: the share of a new batch in the moving average of the weights' normalizer."""
  barrier: Positive = 1e-5
  """DONE: the weight c of the barrier."""
  curvature: NonNegative = 10.0
  """DONE: the lambda that replaces the Hessian of the attack loss."""
  step_size: Positive = 5.0
  """DONE: the step size of the attack by gradient descent."""
  adam_step_size: Positive = 0.25
  """DONE: the step size of the attack by Adam, in units of epsilon."""

  @model_validator(mode="after")
  def _shares_do_not_fall(self) -> Self:
    if self.fat_steps[0] > self.fat_steps[1]:
      raise ValueError(f"fat_steps must be two shares that do not fall, got {self.fat_steps}")
    return self


class Setting(NamedTuple):
  """What methods are made from."""

  model: Callable[..., Any]  # model(params, images) -> logits
  epsilon: float | jax.Array  # The largest change of a pixel.
  num_steps: int  # Of the attack, K.
  rates: Rates

  @property
  def box(self) -> Box:
    """Pixels in [0, 1]."""
    return Box(self.epsilon)


class Parts(NamedTuple):
  """A method: ``gradients(params, (images, labels), key, progress) -> (grads, extra)``, weighed.

  They are lazy gradients of each example, and further arguments of :func:`jaxbo.reweight`;
  ``progress`` is the share of the training that is done.
  """

  gradients: Callable[..., tuple[jaxbo.dro.PerExampleGrads, dict[str, jax.Array]]]
  weighting: jaxbo.dro.Weighting


class Method(NamedTuple):
  """The name of a method in tables, what makes it, and the rate that ``--tune`` chooses."""

  label: str
  make: Callable[[Setting], Parts]
  rate: str | None = None
  values: tuple[float, ...] = ()


def sign_attack(setting: Setting, **options: Any) -> jaxbo.adversarial.Attack:
  """PGD with signed steps of a quarter of epsilon: the attack of most methods."""
  model, epsilon, num_steps, _ = setting
  options |= {"step_size": epsilon / 4, "num_steps": num_steps}
  return jaxbo.adversarial.pgd(model, setting.box, **options)


def cross_entropy(setting: Setting) -> Callable[..., jax.Array]:
  """``loss(params, images, labels) -> [batch]``."""
  return lambda params, x, y: jaxbo.adversarial.cross_entropy_loss(setting.model(params, x), y)


def lazy(
  loss: Callable[..., jax.Array], params: Any, *batch: jax.Array
) -> jaxbo.dro.PerExampleGrads:
  """The gradients of ``loss(params, *batch)``."""
  # Without the loop for losses that are not finite, which would double the time of compilation: a
  # batch with one is skipped.
  return jaxbo.per_example_grad(lambda p, b: loss(p, *b))(params, batch)


def _plain(
  setting: Setting, weighting: jaxbo.dro.Weighting, find: Any = None, score: Any = None
) -> Parts:
  """Weighted cross-entropy of what ``find(params, batch, key, progress)`` finds, or else PGD.

  Weights are by ``score(params, attacked, labels, info, progress)``, or else by the losses.
  """
  attack = sign_attack(setting)
  find = find or (lambda params, batch, key, progress: attack.run(params, batch, key))

  def gradients(params, batch, key, progress):
    attacked, info = find(params, batch, key, progress)
    extra = {"scores": score(params, attacked, batch[1], info, progress)} if score else {}
    return lazy(cross_entropy(setting), params, attacked, batch[1]), extra

  return Parts(gradients, weighting)


def fat(setting: Setting) -> Parts:
  """FAT: an example is attacked for a few steps more than it takes to misclassify it."""
  runs = [sign_attack(setting, stop_after=steps).run for steps in range(3)]
  begins = jnp.asarray(setting.rates.fat_steps)

  def find(params, batch, key, progress):
    phase = jnp.sum(progress >= begins, dtype=jnp.int32)
    return jax.lax.switch(phase, runs, params, batch, key)

  return _plain(setting, jaxbo.dro.uniform(), find)


def gairat(setting: Setting) -> Parts:
  """GAIRAT: weights by the number of steps until an example is misclassified; uniform at first."""

  def score(params, attacked, labels, info, progress):
    begun = progress >= setting.rates.gairat_begin
    return jnp.where(begun, info.num_correct.astype(jnp.float32), 0)

  weighting = jaxbo.adversarial.gairat(setting.num_steps, shift=setting.rates.gairat_shift)
  return _plain(setting, weighting, score=score)


def mail(setting: Setting) -> Parts:
  """MAIL: weights by the margin of probabilities; uniform at first."""

  def score(params, attacked, labels, info, progress):
    margin = jaxbo.adversarial.probabilistic_margin(setting.model(params, attacked), labels)
    return jnp.where(progress >= setting.rates.mail_begin, margin, 0)

  return _plain(
    setting, jaxbo.adversarial.mail(setting.rates.mail_slope, setting.rates.mail_bias), score=score
  )


def _with_clean_logits(
  setting: Setting, attack: jaxbo.adversarial.Attack, loss: Any, **options: Any
) -> Parts:
  """A loss of clean and adversarial logits."""

  def both(params, images, attacked, labels):
    return loss(setting.model(params, images), setting.model(params, attacked), labels, **options)

  def gradients(params, batch, key, progress):
    return lazy(both, params, batch[0], attack(params, batch, key), batch[1]), {}

  return Parts(gradients, jaxbo.dro.uniform())


def trades(setting: Setting) -> Parts:
  """TRADES; its attack starts at small Gaussian noise and maximizes the divergence."""
  attack = sign_attack(setting, objective="kl", random_start=1e-3)
  return _with_clean_logits(
    setting, attack, jaxbo.adversarial.trades_loss, beta=setting.rates.trades_beta
  )


def mart(setting: Setting) -> Parts:
  """MART."""
  attack = sign_attack(setting)
  return _with_clean_logits(
    setting, attack, jaxbo.adversarial.mart_loss, beta=setting.rates.mart_beta
  )


def _implicit(
  of_batch: Callable[..., jaxbo.dro.PerExampleGrads], weighting: jaxbo.dro.Weighting
) -> Parts:
  """A gradient of the library that has an attack of its own."""
  return Parts(lambda params, batch, key, progress: (of_batch(params, batch, key), {}), weighting)


def fast_bat(setting: Setting) -> Parts:
  """Fast-BAT: two steps of the attack, whatever K is, and their implicit gradient."""
  loss = cross_entropy(setting)
  of_batch = jaxbo.adversarial.fast_bat_grad(
    loss,
    lambda *arguments: -loss(*arguments),
    setting.box,
    step_size=setting.rates.fast_bat_step_size,
    curvature=setting.rates.fast_bat_curvature,
  )
  return _implicit(of_batch, jaxbo.dro.uniform())


def kl_weights(rates: Rates) -> jaxbo.dro.Weighting:
  """The weights of DONE."""
  return jaxbo.dro.compositional(jaxbo.dro.kl(rates.temperature), rates.compositional_rate)


def done(setting: Setting, direction: str) -> Parts:
  """DONE: KL weights, and the implicit gradient of an attack on the margin of logits."""
  rates = setting.rates
  of_adam = rates.adam_step_size * setting.epsilon
  of_batch = jaxbo.adversarial.done_grad(
    cross_entropy(setting),
    lambda params, images, labels: (
      -jaxbo.adversarial.margin_loss(setting.model(params, images), labels)
    ),
    setting.box,
    barrier=rates.barrier,
    num_steps=setting.num_steps,
    step_size=of_adam if direction == "adam" else rates.step_size,
    inverse="diagonal",
    curvature=rates.curvature,
    direction=direction,
  )
  return _implicit(of_batch, kl_weights(rates))


TEMPERATURES = (1.0, 3.0, 10.0, 30.0)
METHODS = {
  "at": Method("AT", lambda setting: _plain(setting, jaxbo.dro.uniform())),
  "trades": Method("TRADES", trades, "trades_beta", (1.0, 3.0, 6.0, 10.0)),
  "mart": Method("MART", mart, "mart_beta", (1.0, 2.5, 5.0, 10.0)),
  "fat": Method("FAT", fat),
  "gairat": Method("GAIRAT", gairat, "gairat_shift", (-1.0, 0.0, 1.0, 2.0)),
  "mail": Method("MAIL", mail, "mail_bias", (-0.5, -0.25, 0.0, 0.25)),
  "fast_bat": Method("Fast-BAT", fast_bat, "fast_bat_step_size", (1.0, 5.0, 5000 / 255, 80.0)),
  "at_kl": Method(
    "AT + KL weights",
    lambda setting: _plain(setting, kl_weights(setting.rates)),
    "temperature",
    TEMPERATURES,
  ),
  "done": Method(
    "DONE, GD", lambda setting: done(setting, "gradient"), "temperature", TEMPERATURES
  ),
  "done_adam": Method(
    "DONE, Adam", lambda setting: done(setting, "adam"), "temperature", TEMPERATURES
  ),
}
LABELS = {name: method.label for name, method in METHODS.items()}
