"""Robust training in the catalogue (tests/catalogue.py)."""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

import jaxbo
from jaxbo.adversarial import Box
from tests.adversarial import problem
from tests.catalogue import Program, alias, robust

FALLING = optax.linear_schedule(5.0, 0.5, 4)
GROUPS = {"adjustment": 0.3, "group_sizes": [3, 1]}
COMPOSITIONAL = jaxbo.dro.compositional(jaxbo.dro.kl(FALLING), 0.3)
# Without memory, with one that grows with groups, and balls that are searched for.
OTHERS = (
  jaxbo.dro.uniform(),
  jaxbo.dro.group(2, 0.1),
  jaxbo.dro.cvar(0.7),
  jaxbo.dro.chi_square_ball(0.5),
)


def together(*parts: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """The sum of what several transformations make of the same gradients."""

  def update(updates, states, params=None, **extra):
    each = zip(parts, states, strict=True)
    results = [tx.update(updates, state, params, **extra) for tx, state in each]
    directions, states = zip(*results, strict=True)
    return jax.tree.map(lambda *leaves: sum(leaves), *directions), states

  return optax.GradientTransformationExtraArgs(
    lambda params: tuple(tx.init(params) for tx in parts), update
  )


ENTRIES = [
  robust("reweight_compositional", jaxbo.reweight(COMPOSITIONAL), repair=True),
  robust("reweight_others", together(*map(jaxbo.reweight, OTHERS))),
  robust(
    "reweight_stored",
    jaxbo.reweight(jaxbo.dro.tilted(optax.linear_schedule(0.0, -2.0, 4)), scale="sum"),
    stored=True,
  ),
]


def method(name, of_method, weighting, optimizer=optax.sgd):
  """An alias with its default optimizer, before which the weighting stands."""
  return alias(robust, name, of_method, optax.chain(jaxbo.reweight(weighting), optimizer(0.1)))


ALIASES = [
  method("ir_dro", jaxbo.ir_dro(0.1, FALLING), jaxbo.dro.kl(FALLING), optax.adamw),
  method("ir_dro_with_adam", jaxbo.ir_dro(optax.adam(0.1)), jaxbo.dro.kl(1.0), optax.adam),
  method("group_dro", jaxbo.group_dro(0.1, 2, 0.2, **GROUPS), jaxbo.dro.group(2, 0.2, **GROUPS)),
  method(
    "group_dro_with_adam",
    jaxbo.group_dro(optax.adam(0.1), 2),
    jaxbo.dro.group(2, 0.01),
    optax.adam,
  ),
  method("cvar_dro", jaxbo.cvar_dro(0.1, 0.7), jaxbo.dro.cvar(0.7)),
  method(
    "cvar_dro_with_adam",
    jaxbo.cvar_dro(optax.adam(0.1), 0.7),
    jaxbo.dro.cvar(0.7),
    optax.adam,
  ),
  method("chi2_dro", jaxbo.chi2_dro(0.1, 0.5), jaxbo.dro.chi_square_ball(0.5)),
  method(
    "chi2_dro_with_adam",
    jaxbo.chi2_dro(optax.adam(0.1), 0.5),
    jaxbo.dro.chi_square_ball(0.5),
    optax.adam,
  ),
  method("term", jaxbo.term(0.1, FALLING), jaxbo.dro.tilted(FALLING)),
  method(
    "term_with_adam",
    jaxbo.term(optax.adam(0.1), -0.5),
    jaxbo.dro.tilted(-0.5),
    optax.adam,
  ),
  method(
    "done", jaxbo.done(0.1, FALLING, rate=0.3), jaxbo.dro.compositional(jaxbo.dro.kl(FALLING), 0.3)
  ),
  method(
    "done_with_adam",
    jaxbo.done(optax.adam(0.1)),
    jaxbo.dro.compositional(jaxbo.dro.kl(1.0), 0.1),
    optax.adam,
  ),
]


def attacked(run):
  """``run(params, images, labels)`` where images and a weight are divided among devices."""
  divided, whole = PartitionSpec("d"), PartitionSpec()
  specs = {"w": divided, "b": whole, "v": whole}, divided, divided
  return lambda: (run, (problem.params(), *problem.batch()), specs)


def _autoattack(params, images, labels):
  box = Box(problem.EPSILON)
  short = {"num_steps": 2, "num_targets": 2, "num_queries": 3}
  attacks = jaxbo.adversarial.autoattack(problem.model, box, **short)
  attacks["fgsm"] = jaxbo.adversarial.fgsm(problem.model, box)
  return [attack.run(params, (images, labels), 0) for attack in attacks.values()]


def _fast_bat(params, images, labels):
  losses = problem.loss, problem.margin_attack_loss
  grad = jaxbo.adversarial.fast_bat_grad(*losses, Box(problem.EPSILON), step_size=0.1)
  grads = grad(params, (images, labels), 0)
  return grads.losses, grads.pullback(jnp.ones_like(grads.losses))


PROGRAMS = [
  Program("autoattack", attacked(_autoattack)),
  Program("fast_bat", attacked(_fast_bat)),
]
