"""Auto-PGD: gradient ascent with momentum and without step sizes to tune."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbo import _check, _tree
from jaxbo.adversarial import attack as attacks
from jaxbo.adversarial import objectives
from jaxbo.adversarial.attack import Attack, Found, make_attack
from jaxbo.adversarial.box import Box, along, as_image, check_box, make_ball
from jaxbo.adversarial.losses import margin_loss
from jaxbo.adversarial.objectives import Objective

_MOMENTUM = 0.75
_SUCCESS = 0.75  # Steps are halved if at most this share of them climbed.


class _Climb(NamedTuple):
  """The carry of the loop; leaves are ``[batch]`` or shaped like the images."""

  delta: jax.Array
  before: jax.Array  # delta, one step earlier
  ascent: jax.Array  # the gradient at delta
  value: jax.Array
  best_delta: jax.Array
  best_ascent: jax.Array
  best_value: jax.Array
  adversarial: jax.Array  # the misclassified perturbation with the largest objective
  adversarial_value: jax.Array  # minus infinity if there is none yet
  step_size: jax.Array  # in units of epsilon
  num_climbs: jax.Array  # since the last checkpoint
  halved: jax.Array  # at the last checkpoint
  checkpoint_value: jax.Array  # best_value at the last checkpoint
  num_correct: jax.Array
  not_finite: jax.Array


def apgd(
  model: Callable[..., jax.Array],
  box: Box,
  *,
  num_steps: int = 100,
  objective: str | Objective = "cross_entropy",
  num_targets: int = 9,
  restarts: int = 1,
) -> Attack:
  r"""Auto-PGD: gradient ascent with momentum that finds a step size for each example.

  .. math::
    z^{k+1} = \Pi(\delta^k + \eta\, d(\nabla \ell')), \qquad
    \delta^{k+1} = \Pi\big(\delta^k + \tfrac34 (z^{k+1} - \delta^k)
      + \tfrac14 (\delta^k - \delta^{k-1})\big)

  :math:`d` takes the sign for ``linf`` and divides by the norm for ``l2``; :math:`\Pi` projects
  onto the ball and onto the range of pixel values. The step size :math:`\eta` starts at
  :math:`2 \epsilon`. The first checkpoint comes after 22 % of the steps; the intervals between
  later ones shrink from 19 % to 6 %. At a checkpoint, the attack halves :math:`\eta` and returns
  the example to its best point if at most three in four steps climbed, or if neither :math:`\eta`
  nor the best value has changed since the previous checkpoint. The objectives ``"cross_entropy"``
  and ``"targeted_dlr"`` give two of the four attacks of AutoAttack.

  Cost: ``num_steps + 1`` forward and backward passes without gradients of the parameters, from each
  start. ``"targeted_dlr"`` repeats this for each target, one after another, with one more forward
  pass each.

  Args:
    model: ``model(params, images) -> logits``, ``[batch, num_classes]``; the logits of an example
      must not depend on other examples.
    box: the :class:`Box` of the images, say ``Box(8 / 255)`` for pixels from 0 to 1.
    num_steps: the number of steps, at least 1.
    objective: what to maximize: ``"cross_entropy"``, ``"margin"``, ``"kl"``, ``"dlr"`` (needs three
      classes), a function ``(logits, labels, clean_logits) -> [batch]``, or ``"targeted_dlr"``
      (needs four classes), which aims in turn at each of the other classes that are likeliest on
      the clean image.
    num_targets: how many classes ``"targeted_dlr"`` aims at, at least 1; all other classes if there
      are fewer.
    restarts: the number of random starts, at least 1, for each target if there are targets.

  Returns:
    An :class:`Attack`, which always starts at random. For each example it returns the visited point
    with the largest objective, among the misclassified points if there are any.

  Raises:
    ValueError: if an argument is outside its range.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> def model(params, images):
    ...   return jnp.concatenate([images, -images], axis=1) * params
    >>> attack = jaxbo.adversarial.apgd(model, jaxbo.adversarial.Box(0.25), num_steps=5)
    >>> attack(jnp.float32(2.0), (jnp.array([[0.5]]), jnp.array([0])), key=0).tolist()
    [[0.25]]

  References:
    Croce and Hein, `Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse
    Parameter-free Attacks <https://arxiv.org/abs/2003.01690>`_, 2020.
  """
  ball = make_ball(check_box(box))
  num_steps = _check.positive_int("num_steps", num_steps)
  num_targets = _check.positive_int("num_targets", num_targets)
  restarts = _check.positive_int("restarts", restarts)
  targeted = objective == "targeted_dlr"
  value_of, min_classes = (None, 4) if targeted else objectives.find_objective(objective)
  lengths = jnp.asarray(intervals(num_steps), jnp.int32)

  def climb(forward, images, labels, clean, value_of, key):
    evaluate = lambda delta: attacks.gradient(forward, value_of, images + delta, labels, clean)
    delta = ball.random(key, images)
    epsilon = as_image("epsilon", box.epsilon, images)
    first = _start(delta, evaluate(delta))
    first = _tree.vary_alike(first, first, clean, images, labels)

    def step(carry, k_and_length):
      k, length = k_and_length
      each = lambda values: along(values, carry.delta)
      move = each(carry.step_size) * (epsilon * ball.steepest(carry.ascent))
      aim = ball.project(carry.delta + move, images)
      share = jnp.where(k == 0, 1, _MOMENTUM).astype(images.dtype)
      mixed = carry.delta + share * (aim - carry.delta) + (1 - share) * (carry.delta - carry.before)
      delta = ball.project(mixed, images)
      carry = _visit(carry, delta, evaluate(delta))
      return _check_point(carry, length), None

    last, _ = jax.lax.scan(step, first, (jnp.arange(num_steps), lengths))
    wrong = last.adversarial_value > -jnp.inf
    delta = jnp.where(along(wrong, images), last.adversarial, last.best_delta)
    values = jnp.where(wrong, last.adversarial_value, last.best_value)
    return Found(box.clip(images + delta), values, wrong, last.num_correct, last.not_finite)

  def find_for(forward, images, labels, clean, value_of, key):
    run = lambda key: climb(forward, images, labels, clean, value_of, key)
    if restarts == 1:
      return run(key)
    return attacks.best(jax.vmap(run)(jax.random.split(key, restarts)))

  def find(forward, images, labels, key):
    clean = forward(images)
    if value_of is not None:
      return find_for(forward, images, labels, clean, value_of, key)
    targets = objectives.likeliest_others(clean, labels, num_targets)

    def towards(target, key):
      def toward_target(logits, labels, clean_logits):
        return objectives.targeted_dlr(logits, labels, target)

      found = find_for(forward, images, labels, clean, toward_target, key)
      # Margins are comparable between targets; objectives are not.
      return found._replace(values=margin_loss(forward(found.perturbed), labels))

    keys = jax.random.split(key, len(targets))
    # As numbers: jax_debug_key_reuse takes what vmap does with keys of a loop for their use.
    impl, bits = jax.random.key_impl(keys), jax.random.key_data(keys)
    wrapped = lambda pair: towards(pair[0], jax.random.wrap_key_data(pair[1], impl=impl))
    return attacks.best(jax.lax.map(wrapped, (targets, bits)))

  return make_attack(model, find, box, min_classes=min_classes)


def intervals(num_steps: int) -> np.ndarray:
  """Returns, for each step, the steps since the last checkpoint if it ends at one, otherwise 0."""
  lengths = np.zeros(num_steps, np.int32)
  length, smallest = max(int(0.22 * num_steps), 1), max(int(0.06 * num_steps), 1)
  shrink = max(int(0.03 * num_steps), 1)
  end = length
  while end <= num_steps:
    lengths[end - 1] = length
    length = max(length - shrink, smallest)
    end += length
  return lengths


def _start(delta: jax.Array, seen: tuple[jax.Array, ...]) -> _Climb:
  ascent, value, wrong, bad = seen
  value = jnp.where(bad, -jnp.inf, value)
  found = jnp.where(wrong & ~bad, value, -jnp.inf)
  count = jnp.zeros_like(value, jnp.int32)
  return _Climb(
    delta=delta,
    before=delta,
    ascent=ascent,
    value=value,
    best_delta=delta,
    best_ascent=ascent,
    best_value=value,
    adversarial=delta,
    adversarial_value=found,
    step_size=jnp.full_like(value, 2, delta.dtype),
    num_climbs=count,
    halved=jnp.ones_like(value, bool),  # so that the first checkpoint only looks at climbs
    checkpoint_value=value,
    num_correct=count + ~wrong,
    not_finite=bad,
  )


def _visit(carry: _Climb, delta: jax.Array, seen: tuple[jax.Array, ...]) -> _Climb:
  """Moves to ``delta`` if its numbers are finite, and updates the best points."""
  ascent, value, wrong, bad = seen
  each = lambda values: along(values, delta)
  delta = jnp.where(each(bad), carry.delta, delta)
  ascent = jnp.where(each(bad), carry.ascent, ascent)
  value = jnp.where(bad, carry.value, value)
  better = value > carry.best_value
  found = wrong & ~bad & (value > carry.adversarial_value)
  return carry._replace(
    delta=delta,
    before=carry.delta,
    ascent=ascent,
    value=value,
    best_delta=jnp.where(each(better), delta, carry.best_delta),
    best_ascent=jnp.where(each(better), ascent, carry.best_ascent),
    best_value=jnp.where(better, value, carry.best_value),
    adversarial=jnp.where(each(found), delta, carry.adversarial),
    adversarial_value=jnp.where(found, value, carry.adversarial_value),
    num_climbs=carry.num_climbs + (value > carry.value),
    num_correct=carry.num_correct + ~wrong,
    not_finite=carry.not_finite | bad,
  )


def _check_point(carry: _Climb, length: jax.Array) -> _Climb:
  """Halves the steps of examples that do not improve, and returns them to their best point."""
  few = carry.num_climbs <= _SUCCESS * length
  stuck = ~carry.halved & (carry.best_value <= carry.checkpoint_value)
  here = length > 0
  halve = here & (few | stuck)
  each = lambda values: along(values, carry.delta)
  return carry._replace(
    delta=jnp.where(each(halve), carry.best_delta, carry.delta),
    ascent=jnp.where(each(halve), carry.best_ascent, carry.ascent),
    value=jnp.where(halve, carry.best_value, carry.value),
    step_size=jnp.where(halve, carry.step_size / 2, carry.step_size),
    num_climbs=jnp.where(here, 0, carry.num_climbs),
    halved=jnp.where(here, halve, carry.halved),
    checkpoint_value=jnp.where(here, carry.best_value, carry.checkpoint_value),
  )
