"""What chooses the weights of sources: responses, full ES, and searches.

All keep the best ``x`` by the outer loss, the *incumbent*, which the report judges.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbo
from scripts.es_regime import problem
from scripts.es_regime.problem import Data, Settings

RUNS = {
  "smooth": "a smooth run of 1,000 steps",
  "quantised": "a quantised run of 1,000 steps",
  "svm": "scikit-learn's support vector machines",
}
NUM_SAMPLES = 16  # Directions of ES at most.
LINEAR_STEPS = 10  # Of conjugate gradient.
SMOOTHING = {"smooth": 0.05, "quantised": 0.5, "svm": 0.5}  # Jumps want a wide one.
IN_JAX, SMOOTH = ("smooth", "quantised"), ("smooth",)


@dataclasses.dataclass(frozen=True)
class Method:
  """A row."""

  label: str
  cost: Callable[[int], int]  # Of a step for so many sources, in inner runs.
  runs: tuple[str, ...] = tuple(RUNS)
  grid: tuple[float, ...] = (0.3, 1.0, 3.0)  # Rates of Adam, or half the width of the box.
  rate_of: str | None = None  # The method that has the same hypergradient.


of_es = lambda p: min(p, NUM_SAMPLES) + 1
BOX = (2.0, 4.0, 8.0)
METHODS = {
  "alike": Method("all sources alike (first order)", lambda p: 1, grid=()),
  "oracle": Method("oracle", lambda p: 1, grid=()),
  "itd": Method("ITD", lambda p: 3, SMOOTH),
  "itd_remat": Method("ITD, remat", lambda p: 4, SMOOTH, rate_of="itd"),
  "itd_through": Method("ITD, straight-through", lambda p: 4, ("quantised",)),
  "aid": Method("AID-CG, not converged", lambda p: 1, IN_JAX),
  "esj": Method("ESJ", of_es),
  "official": Method("ESJ, published scaling", lambda p: 2),
  "full_es": Method("full ES", of_es),
  "random": Method("random search", lambda p: 1, grid=BOX),
  "tpe": Method("TPE (Optuna)", lambda p: 1, grid=BOX),
}
SEARCHES = ("random", "tpe")
REFERENCES = ("alike", "oracle")  # They have a choice, and no steps.


def optuna() -> ModuleType:
  """The library of TPE.

  Raises:
    ValueError: if it is not installed.
  """
  try:
    module = importlib.import_module("optuna")
  except ImportError:
    raise ValueError(
      "tpe needs Optuna, which is in the group bench: uv run --group bench python -m "
      "scripts.es_regime, or leave tpe out of --methods"
    ) from None
  module.logging.set_verbosity(module.logging.ERROR)
  return module


class Incumbent(NamedTuple):
  """The best ``x`` so far."""

  x: Any  # [sources].
  loss: Any  # The outer loss there.

  def or_better(self, x: Any, loss: Any) -> "Incumbent":
    """Of this one and another; what is not finite is never better."""
    better = loss < self.loss
    return Incumbent(jnp.where(better, x, self.x), jnp.where(better, loss, self.loss))


def descent(
  method: str, run: str, settings: Settings, num_sources: int, rate: float, seed: int
) -> tuple[Any, Callable[..., tuple[Any, jax.Array]]]:
  """``(state, step)`` of a method that goes down a hypergradient by Adam.

  ``step(state, t, data) -> (state, outer loss)``; ``state`` ends with the incumbent.
  """
  solver = functools.partial(problem.solver, settings, quantised=run == "quantised")
  inner, loss, y0 = solver(), problem.outer_loss, problem.init_params()
  if run == "svm":
    fit = lambda x, data: problem.svm_logits(settings, x, data.train, data.val.images)
    inner = jaxbo.black_box(fit, host=True)
    loss = lambda x, y, data: problem.cross_entropies(y, data.val.labels).mean()
    y0 = jnp.zeros((problem.NUM_CLASSES, settings.num_val))
  if method == "full_es":  # The result of a run is its outer loss.
    path, loss_of, start = inner.path, loss, (y0, inner.init(y0).opt_state)
    inner = jaxbo.black_box(lambda x, data: loss_of(x, path(x, start, data), data))
    loss, y0 = (lambda x, y, data: y), jnp.zeros(())

  es = functools.partial(jaxbo.add_es_response, smoothing=SMOOTHING[run], key=seed)
  if method in ("esj", "full_es"):
    head = es(inner, min(num_sources, NUM_SAMPLES), directions="orthogonal")
  elif method == "official":
    head = es(inner, 1, directions="official")
  elif method == "aid":
    head = jaxbo.add_implicit_response(inner, jaxbo.conjugate_gradient(LINEAR_STEPS))
  else:
    through = {"straight_through": True} if method == "itd_through" else {}
    inner = solver(remat=method == "itd_remat", **through)
    head = jaxbo.add_unrolled_response(inner)
  # A rate in the state: one program for all rates.
  adam = optax.inject_hyperparams(optax.adam)(rate)
  init, step_loop = jaxbo.bilevel_loop(loss, inner, optax.chain(head, adam))

  def step(state, t, data):
    del t
    loop, incumbent = state
    after, info = step_loop(loop, data, data)
    return (after, incumbent.or_better(loop.x, info.outer_loss)), info.outer_loss

  x = jnp.zeros(num_sources)
  return (init(x, y0), Incumbent(x, jnp.float32(jnp.inf))), step


def losses(run: str, settings: Settings) -> Callable[[Any, Data], Any]:
  """``of(xs [k, sources], data) -> [k]``, the outer losses."""
  if run == "svm":

    def on_host(xs, data):
      fits = (problem.svm_logits(settings, x, data.train, data.val.images) for x in np.asarray(xs))
      return np.array([problem.cross_entropies(fit, data.val.labels).mean() for fit in fits])

    return on_host
  inner = problem.solver(settings, quantised=run == "quantised")

  def of_one(x, data):
    y = inner.solve(x, inner.init(problem.init_params()), data).params
    return problem.outer_loss(x, y, data)

  return jax.vmap(of_one, (0, None))


class Tried(NamedTuple):
  """What a search has tried: arrays for all that it will try."""

  xs: np.ndarray  # [trials, sources].
  losses: np.ndarray  # [trials], infinite where a run was not finite.


def propose_at_random(tried: Tried, done: int, number: int, radius: float, seed: int) -> np.ndarray:
  """Uniform in the box."""
  rng = np.random.default_rng((seed, done))
  return rng.uniform(-radius, radius, (number, tried.xs.shape[1]))


class Tpe:
  """Optuna's TPE. Its proposals depend on the trials alone, so that others can go on with them."""

  def __init__(self):
    self._study: Any = None
    self._asked: list[Any] = []  # Trials that it has not been told of.

  def __call__(self, tried: Tried, done: int, number: int, radius: float, seed: int) -> np.ndarray:
    """The next trials; Optuna is told what came of the last ones."""
    lib, p = optuna(), tried.xs.shape[1]
    box = {f"{i}": lib.distributions.FloatDistribution(-radius, radius) for i in range(p)}
    values = [float(min(value, 1e3)) for value in tried.losses[:done]]  # No infinite ones.
    if self._study is None or len(self._study.trials) != done:
      self._study, self._asked = lib.create_study(), []
      for x, value in zip(tried.xs, values, strict=False):
        params = {f"{i}": float(v) for i, v in enumerate(x)}
        trial = lib.trial.create_trial(params=params, distributions=box, value=value)
        self._study.add_trial(trial)
    for trial in self._asked:
      self._study.tell(trial, values[trial.number])
    self._study.sampler = lib.samplers.TPESampler(
      multivariate=True, constant_liar=True, seed=seed * 10**6 + done
    )
    self._asked = [self._study.ask(box) for _ in range(number)]
    return np.array([[trial.params[f"{i}"] for i in range(p)] for trial in self._asked])
