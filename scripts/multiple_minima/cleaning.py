r"""Hyper-cleaning with an inner problem that has many minima: a network that can fit all labels.

The problem of :mod:`scripts.common.cleaning` without its ridge, on a perceptron with more
parameters than there are examples. Whatever the weights of the examples are, many parameters fit
the weighted training set, wrong labels included: :math:`\inf_y g(x, y) = 0`, so that the inner loss
itself is the gap. Which of them is found is up to the method.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbo
from scripts.common import cleaning
from scripts.common.cleaning import Batch, CleaningData, Settings
from scripts.common.data import Examples
from scripts.multiple_minima import loops
from scripts.multiple_minima.loops import Loop

DATASETS = {
  "digits": Settings(num_train=500, num_val=100, hidden=(256,), ridge=0.0, inner_learning_rate=0.1),
  "mnist": Settings(
    num_train=5000,
    num_val=500,
    hidden=(300,),
    ridge=0.0,
    batch_size=256,
    inner_learning_rate=0.1,
  ),
}
RETRAINING_STEPS = 500


class Method(NamedTuple):
  """A method of the comparison.

  Attributes:
    label: its name.
    make: ``make(inner_loss, outer_loss, settings, **chosen) -> Loop``.
    grid: what ``scripts/multiple_minima/tune.py`` chooses from, 16 points for each method.
  """

  label: str
  make: Callable[..., Loop]
  grid: Mapping[str, tuple[Any, ...]]


def _sgd(settings: Settings, learning_rate: float | None = None) -> optax.GradientTransformation:
  return optax.sgd(learning_rate or settings.inner_learning_rate, settings.momentum)


def _value_function(make_head: Callable[..., Any], *, scale: bool = True) -> Callable[..., Loop]:
  """A head, SGD for the model and Adam for the logits of the weights."""

  def make(inner_loss, outer_loss, settings, *, outer, num_steps, alternate=None, **chosen):
    head = make_head(inner_loss, num_steps=num_steps, inner_optimizer=_sgd(settings), **chosen)
    if scale:  # A step of y that stays stable as the multiplier grows: 1 / (1 + multiplier).
      head = jaxbo.scale_by_lagrangian_smoothness(
        head, outer_smoothness=1.0, constraint_smoothness=1.0
      )
    tail = loops.levels(optax.adam(outer), _sgd(settings), alternate)
    return loops.value_function_loop(outer_loss, optax.chain(head, tail))

  return make


def _proximal(inner_loss, *, outer_weight, **chosen):
  head = jaxbo.add_primal_dual_penalty(inner_loss, dual_learning_rate=0.1, **chosen)
  return jaxbo.add_proximal_terms(
    head, outer_weight=outer_weight, constraint_weight=outer_weight, period=20
  )


def _v_pbgd(inner_loss, *, multiplier, ramp, **chosen):
  schedule = optax.linear_schedule(0.0, multiplier, ramp)
  return jaxbo.add_value_function_penalty(inner_loss, multiplier=schedule, normalize=True, **chosen)


def _f2sa(inner_loss, *, growth, **chosen):
  """The published multiplier starts at 1 and is raised by ``growth / t^(1/7)``."""
  schedule = lambda t: 1 + growth * 7 / 6 * (jnp.asarray(t, jnp.float32) + 1) ** (6 / 7)
  return jaxbo.add_value_function_penalty(inner_loss, multiplier=schedule, **chosen)


def _response(make_head: Callable[..., Any]) -> Callable[..., Loop]:
  """An inner solver by SGD, a head, and Adam for the logits of the weights."""

  def make(inner_loss, outer_loss, settings, *, outer, inner, num_steps, **chosen):
    per_step = settings.batch_size is not None
    optimizer = _sgd(settings, inner)
    solver = jaxbo.inner_solver(inner_loss, optimizer, num_steps, per_step_batches=per_step)
    tx = optax.chain(make_head(solver, **chosen), optax.adam(outer))
    return loops.response_loop(outer_loss, solver, tx)

  return make


def _train(inner_loss, outer_loss, settings):
  del outer_loss
  return loops.training_loop(inner_loss, _sgd(settings))


_SHORT = {"outer": (0.1, 0.3), "num_steps": (1, 5)}
METHODS = {
  "everything": Method("everything", _train, {}),
  "validation": Method("validation only", _train, {}),
  "oracle": Method("clean (oracle)", _train, {}),
  "oracle_validation": Method("clean + validation", _train, {}),
  "pdbo": Method(
    "PDBO",
    _value_function(jaxbo.add_primal_dual_penalty),
    {**_SHORT, "slack": (0.01, 0.05), "dual_learning_rate": (0.1, 1.0)},
  ),
  "proximal_pdbo": Method(
    "Proximal-PDBO",
    _value_function(_proximal),
    {**_SHORT, "slack": (0.01, 0.05), "outer_weight": (1e-3, 1e-2)},
  ),
  "bome": Method(
    "BOME",
    _value_function(jaxbo.add_dynamic_barrier),
    {**_SHORT, "barrier_rate": (0.1, 0.5), "phi": ("gradient", "value")},
  ),
  "v_pbgd": Method(
    "V-PBGD",
    _value_function(_v_pbgd, scale=False),
    {**_SHORT, "multiplier": (1.0, 5.0), "ramp": (50, 200)},
  ),
  "f2sa": Method(
    "F2SA",
    _value_function(_f2sa),
    {**_SHORT, "growth": (0.01, 0.1), "alternate": (None, 4)},
  ),
  "itd": Method(
    "ITD",
    _response(jaxbo.add_unrolled_response),
    {"outer": (0.03, 0.1, 0.3, 1.0), "inner": (0.03, 0.1), "num_steps": (5, 20)},
  ),
  "aid": Method(
    "AID-CG",
    _response(
      lambda inner, linear_steps, damping: jaxbo.add_implicit_response(
        inner, jaxbo.conjugate_gradient(linear_steps, damping=damping)
      )
    ),
    {**_SHORT, "inner": (0.03, 0.1), "damping": (0.1, 1.0), "linear_steps": (5,)},
  ),
  "esj": Method(
    "ESJ",
    _response(lambda inner, num_samples: jaxbo.add_es_response(inner, num_samples, 1e-2)),
    {"outer": (0.1, 1.0), "inner": (0.03, 0.1), "num_steps": (1, 5), "num_samples": (4, 16)},
  ),
}
BASELINES = ("everything", "validation", "oracle", "oracle_validation")


class Problem(NamedTuple):
  """The data of one seed, on the device.

  Attributes:
    train: what the inner loss sees.
    val: what the outer loss sees.
    test: for reports only.
    x: where the logits of the weights start, ``[num_train]``.
    y: where the model starts.
    corrupted: which of ``train`` have a wrong label, ``[num_train]``.
  """

  train: Examples
  val: Examples
  test: Examples
  x: jax.Array
  y: Any
  corrupted: jax.Array


def make_problem(method: str, data: CleaningData, settings: Settings, seed: int) -> Problem:
  """What a method is given; the baselines have fixed weights, 0 or 1."""
  train, corrupted = data.train, data.corrupted
  if method == "validation":
    train, corrupted = data.val, np.zeros(len(data.val.labels), bool)
  if method == "oracle_validation":
    train = Examples(*(np.concatenate(pair) for pair in zip(data.train, data.val, strict=True)))
    corrupted = np.concatenate([corrupted, np.zeros(len(data.val.labels), bool)])
  x = np.zeros(len(corrupted), np.float32)
  if method in BASELINES:
    x += 30
  if method.startswith("oracle"):
    x[corrupted] = -30
  y = cleaning.init_params(settings, train.images.shape[1], jax.random.key(seed))
  x, corrupted = jnp.asarray(x), jnp.asarray(corrupted)
  return jax.device_put(Problem(train, data.val, data.test, x, y, corrupted))


def make_loop(method: str, settings: Settings, chosen: Mapping[str, Any]) -> Loop:
  """The method with the settings chosen for it."""
  return METHODS[method].make(*cleaning.make_losses(settings), settings, **chosen)


def make_run(loop: Loop, settings: Settings, num_steps: int) -> Callable[..., Any]:
  """``run(state, key, problem) -> state``, ``num_steps`` steps of a method."""

  def step(state, key, problem):
    if settings.batch_size is None:
      return loop.step(state, Batch(problem.train, None), problem.val)
    steps = () if loop.num_batches is None else (loop.num_batches,)
    shape = (*steps, settings.batch_size)
    indices = jax.random.randint(key, shape, 0, len(problem.train.labels))
    return loop.step(state, Batch(problem.train.take(indices), indices), problem.val)

  def run(state, key, problem):
    keys = jax.random.split(key, num_steps)
    return jax.lax.scan(lambda state, key: (step(state, key, problem), None), state, keys)[0]

  return run


def measure(settings: Settings, params: jaxbo.Bilevel, problem: Problem) -> dict[str, jax.Array]:
  """What a point of a curve shows, but for the scores of the weights.

  ``wrong_learnt`` is the share of wrong labels that the model gives back; ``gap`` the inner loss
  on all training examples.
  """
  inner_loss, outer_loss = cleaning.make_losses(settings)
  logits = cleaning.logits(settings, params.inner, problem.train.images)
  fits = jnp.argmax(logits, axis=0) == problem.train.labels
  num_wrong = jnp.sum(problem.corrupted)
  return {
    "accuracy": cleaning.accuracy(settings, params.inner, problem.test),
    "outer_loss": outer_loss(*params, problem.val),
    "gap": inner_loss(*params, Batch(problem.train, None)),
    "wrong_learnt": jnp.sum(fits & problem.corrupted) / num_wrong,
  }


def retrained_accuracy(
  settings: Settings, x: jax.Array, key: jax.Array, problem: Problem
) -> jax.Array:
  """The accuracy of a new model trained with the weights alone, without the validation set."""
  loop = loops.training_loop(cleaning.make_losses(settings)[0], _sgd(settings))
  state = make_run(loop, settings, RETRAINING_STEPS)(loop.init(x, problem.y), key, problem)
  return cleaning.accuracy(settings, loop.params(state).inner, problem.test)
