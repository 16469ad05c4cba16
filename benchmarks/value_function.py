"""Value-function methods beside implicit differentiation, on random quadratics with known optima.

  PYTHONPATH=.:models python3 -m benchmarks.value_function           (about 5 minutes on 2 cores)
  ... --save benchmarks/results/value_function_cpu                   (writes .md and .json as well)

Two problems, all losses quadratic in (x, y) with cross terms. In *unique* the eigenvalues of the
inner Hessian go from 0.1 to 1; in *flat* every other one is zero, so that the inner minima are an
affine space and the best of them for the outer loss is wanted. All methods start at zero, in
float64 (a slack of 1e-6 is about what float32 resolves in a loss), and have settings from a grid of
32 points: for each accuracy those that reach half of it fastest in the worst of three problems of
other seeds, since a slack or a multiplier says how accurate a method can be.

* *gradients* of an update: evaluations of the gradients of the inner and the outer loss, counted in
  the jaxpr; *products*: those with the inner Hessian and mixed ones.
* *cost* of an update: its operations, counted in the jaxpr, in units of one gradient of the inner
  loss in y.
* *cost* and *ms* to reach an error in x of so much of the initial one, and to stay there until the
  budget is spent: updates times the cost and the time of one; the median over problems. A dash: not
  within the budget, on half of the problems or in the search for settings.

SOBA's single loop is a step on y, one on the linear system and one on x, from the parts of the
library; ``jaxbo.fixed_point`` takes a product more than needed, to see whether the residual grew.
"""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.ad_checkpoint import checkpoint_name

import jaxbo
from benchmarks.report import arguments, hardware, markdown, number, save
from scripts.common import loops, measure
from scripts.common.loops import Loop

ACCURACIES = (1e-1, 1e-2, 1e-3)
BUDGET = 60_000  # in gradients of the inner loss
NUM_OUTER, NUM_INNER = 50, 100
CG_STEPS = 10
TUNING_SEEDS = (100, 101, 102)
MARGIN = 0.5  # Settings must reach this share of an accuracy.


class Quadratic(NamedTuple):
  """A bilevel problem with quadratic losses; what is an array is data, no constant.

  Attributes:
    inner: ``(hessian, coupling, linear)`` of the inner loss.
    outer: ``(hessian, linear)`` of the outer loss in (x, y).
    optimum: the solution's x.
    smoothness: of the outer loss, of the inner loss in y, and of its gap in (x, y).
  """

  inner: tuple[Any, Any, Any]
  outer: tuple[Any, Any]
  optimum: Any
  smoothness: tuple[Any, Any, Any]


def random_quadratic(flat: bool, seed: int) -> Quadratic:
  """Draws a problem, and solves it in NumPy."""
  rng = np.random.default_rng(seed)

  def spd(eigenvalues):
    basis = np.linalg.qr(rng.normal(size=(len(eigenvalues),) * 2))[0]
    return (basis * eigenvalues) @ basis.T

  eigenvalues = np.geomspace(0.1, 1, NUM_INNER)
  if flat:
    eigenvalues[::2] = 0
  hessian = spd(eigenvalues)
  # In the range of the Hessian, so that there is a minimum for every x.
  coupling = hessian @ rng.normal(size=(NUM_INNER, NUM_OUTER)) / np.sqrt(NUM_INNER)
  linear = hessian @ rng.normal(size=NUM_INNER)
  size = NUM_OUTER + NUM_INNER
  outer_hessian, outer_linear = spd(np.geomspace(0.1, 1, size)), rng.normal(size=size)

  # y = response x + offset + basis w: least f over x and w, the coordinates of the flat space.
  inverse = np.linalg.pinv(hessian, rcond=1e-10)
  response, offset = -inverse @ coupling, -inverse @ linear
  null = np.linalg.svd(hessian)[0][:, np.count_nonzero(eigenvalues) :]
  minima = np.block([[np.eye(NUM_OUTER), np.zeros((NUM_OUTER, null.shape[1]))], [response, null]])
  shift = np.concatenate([np.zeros(NUM_OUTER), offset])
  gradient = minima.T @ (outer_hessian @ shift + outer_linear)
  optimum = np.linalg.solve(minima.T @ outer_hessian @ minima, -gradient)[:NUM_OUTER]
  gap = np.hstack([-response, np.eye(NUM_INNER)])  # y - y*(x)
  smoothness = 1.0, 1.0, np.linalg.norm(gap.T @ hessian @ gap, 2)
  return Quadratic((hessian, coupling, linear), (outer_hessian, outer_linear), optimum, smoothness)


def inner_loss(x, y, batch):
  """The inner loss, marked for counting."""
  hessian, coupling, linear = batch
  y = checkpoint_name(y, "gradient")
  return 0.5 * jnp.sum(y * (hessian @ y)) + jnp.sum(y * (coupling @ x + linear))


def outer_loss(x, y, batch):
  """The outer loss, marked for counting."""
  hessian, linear = batch
  z = checkpoint_name(jnp.concatenate([x, y]), "gradient")
  return 0.5 * jnp.sum(z * (hessian @ z)) + jnp.sum(z * linear)


class Method(NamedTuple):
  """A method and what it may choose from.

  Attributes:
    make: ``make(smoothness, *static, **traced) -> Loop``.
    static: names and values that the program depends on.
    traced: names and values that are arguments of the program.
    products: second-order products of an update.
  """

  make: Callable[..., Loop]
  static: Mapping[str, tuple[Any, ...]]
  traced: Mapping[str, tuple[float, ...]]
  products: int = 0


def _scaled(head, smoothness, rate):
  """A step of ``rate / (L_f + multiplier L_h)``."""
  smooth_f, _, smooth_h = smoothness
  head = jaxbo.scale_by_lagrangian_smoothness(
    head, outer_smoothness=smooth_f, constraint_smoothness=smooth_h
  )
  return loops.value_function_loop(outer_loss, optax.chain(head, optax.sgd(rate)))


def _lower(smoothness, num_steps):
  return {"num_steps": num_steps, "inner_optimizer": optax.sgd(1 / smoothness[1])}


def _primal_dual(smoothness, num_steps, slack, dual, **options):
  """With a rate for the multiplier, of order slack^(-1/2), in units of multiplier / slack."""
  return jaxbo.add_primal_dual_penalty(
    inner_loss,
    slack=slack,
    dual_learning_rate=dual / slack**1.5,
    extrapolation=1.0,
    **_lower(smoothness, num_steps),
    **options,
  )


def _pdbo(smoothness, num_steps, *, slack, dual, rate):
  return _scaled(_primal_dual(smoothness, num_steps, slack, dual, dual_bound=1e6), smoothness, rate)


def _alternating_pdbo(smoothness, alternate, *, slack, bound, rate):
  """The tail of F2SA behind the head of PDBO; y has the step that suits the bound."""
  smooth_f, smooth_g, _ = smoothness
  bound = bound / slack**0.5
  head = _primal_dual(smoothness, 1, slack, 0.03, dual_bound=bound)
  tail = loops.levels(optax.sgd(rate), optax.sgd(1 / (smooth_f + bound * smooth_g)), alternate)
  return loops.value_function_loop(outer_loss, optax.chain(head, tail))


def _bome(smoothness, num_steps, *, barrier, rate):
  """With a constant rate, as published: divided by its own multiplier it hardly moves."""
  tx = jaxbo.bome(rate, inner_loss, barrier_rate=barrier, **_lower(smoothness, num_steps))
  return loops.value_function_loop(outer_loss, tx)


def _v_pbgd(smoothness, num_steps, *, multiplier, rate):
  head = jaxbo.add_value_function_penalty(
    inner_loss, multiplier=multiplier, **_lower(smoothness, num_steps)
  )
  return _scaled(head, smoothness, rate)


def _f2sa(smoothness, alternate, *, multiplier, rate):
  smooth_f, smooth_g, _ = smoothness
  tx = jaxbo.f2sa(
    rate,
    1 / (smooth_f + multiplier * smooth_g),
    inner_loss,
    multiplier=multiplier,
    alternate=alternate,
    **_lower(smoothness, 1),
  )
  return loops.value_function_loop(outer_loss, tx)


def _response(smoothness, num_steps, linear_solver, rate, inner_rate):
  solver = jaxbo.inner_solver(inner_loss, optax.sgd(inner_rate / smoothness[1]), num_steps)
  tx = jaxbo.aid(rate, solver, linear_solver, inner_params=jnp.zeros(NUM_INNER))
  return loops.response_loop(outer_loss, solver, tx)


def _soba(smoothness, num_steps, *, rate, inner_rate):
  linear_solver = jaxbo.fixed_point(1, 1.0, warm_start=True)
  return _response(smoothness, num_steps, linear_solver, rate, inner_rate)


def _aid(smoothness, num_steps, *, rate, inner_rate):
  linear_solver = jaxbo.conjugate_gradient(CG_STEPS, damping=1e-6)
  return _response(smoothness, num_steps, linear_solver, rate, inner_rate)


_NUM_STEPS = {"num_steps": (1, 5)}
_SLACKS = (1.0, 1e-1, 3e-2, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
_PENALTIES = (10.0, 30.0, 100.0, 200.0, 400.0, 1000.0, 3000.0, 10_000.0)
METHODS = {
  "PDBO": Method(
    _pdbo,
    _NUM_STEPS,
    {"slack": _SLACKS, "dual": (0.01, 0.1), "rate": (1.9,)},
  ),
  "PDBO, alternating": Method(
    _alternating_pdbo,
    {"alternate": (3, 20)},
    {"slack": _SLACKS, "bound": (5.0,), "rate": (0.1, 0.3)},
  ),
  "BOME": Method(
    _bome,
    {"num_steps": (10, 30)},
    {"barrier": (0.1, 0.3, 0.5, 0.9), "rate": (0.003, 0.01, 0.03, 0.1)},
  ),
  "V-PBGD": Method(_v_pbgd, _NUM_STEPS, {"multiplier": _PENALTIES, "rate": (1.0, 1.9)}),
  "F2SA": Method(_f2sa, {"alternate": (3, 20)}, {"multiplier": _PENALTIES, "rate": (0.1, 0.3)}),
  "SOBA-style": Method(
    _soba,
    _NUM_STEPS,
    {"rate": (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0, 1.5), "inner_rate": (1.0, 1.7)},
    products=3,
  ),
  f"AID, CG {CG_STEPS}": Method(
    _aid,
    _NUM_STEPS,
    {"rate": (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0, 1.5), "inner_rate": (1.0, 1.7)},
    products=CG_STEPS + 1,
  ),
}


def points(grid: Mapping[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
  """All combinations."""
  return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def errors(make: Callable[..., Loop], num_updates: int, problem: Any, traced: Any) -> jax.Array:
  """The error in x after each update, of that at the start, ``[num_updates]``."""
  loop = make(problem.smoothness, **traced)

  def body(state, _):
    state = loop.step(state, problem.inner, problem.outer)
    error = jnp.linalg.norm(loop.params(state).outer - problem.optimum)
    return state, error / jnp.linalg.norm(problem.optimum)

  return jax.lax.scan(body, loop.init(*start()), length=num_updates)[1]


def start() -> tuple[jax.Array, jax.Array]:
  """Where all methods start, in the default precision."""
  return jnp.zeros(NUM_OUTER), jnp.zeros(NUM_INNER)


def updates_to_reach(trace: np.ndarray, accuracy: float) -> float:
  """Updates until the error is at most ``accuracy`` for good; infinity if it never is."""
  above = np.flatnonzero(~(trace <= accuracy))  # NaN included.
  last = above[-1] + 1 if len(above) else 0
  return last + 1.0 if last < len(trace) else np.inf


class Variant(NamedTuple):
  """A method with its static settings, compiled.

  Attributes:
    name: of the method.
    static: the settings that the program depends on.
    gradients: of an update.
    cost: of an update.
    temporary_bytes: of an update.
    run: ``run(problem, traced) -> errors``.
  """

  name: str
  static: dict[str, Any]
  gradients: int
  cost: float
  temporary_bytes: int
  run: Callable[..., Any]

  @property
  def label(self) -> str:
    """The name with the static settings."""
    settings = (f"{name.replace('_', ' ')} {value}" for name, value in self.static.items())
    return ", ".join([self.name, *settings])


def make_variant(name: str, static: dict[str, Any], problem: Quadratic, budget: float) -> Variant:
  """Counts and compiles."""
  method = METHODS[name]
  make = functools.partial(method.make, **static)
  traced = points(method.traced)[0]
  state = jax.jit(lambda p, t: make(p.smoothness, **t).init(*start()))(problem, traced)
  step = lambda state, p, t: make(p.smoothness, **t).step(state, p.inner, p.outer)
  args = state, problem, traced
  loop_steps = CG_STEPS if "CG" in name else 1
  unit = measure.count_flops(jax.grad(inner_loss, 1), *start(), problem.inner)
  cost = measure.count_flops(step, *args, while_steps=loop_steps) / unit
  return Variant(
    name,
    static,
    measure.count_marks(step, *args, mark="gradient", while_steps=loop_steps),
    cost,
    measure.temporary_bytes(jax.jit(step).lower(*args).compile()),
    jax.jit(functools.partial(errors, make, int(budget / cost))),
  )


class Reached(NamedTuple):
  """What a method needs for an accuracy; infinite if it is not reached.

  Attributes:
    cost: in gradients of the inner loss, one for each problem.
    variant: the compiled method.
    settings: that were chosen on the tuning problem.
  """

  cost: list[float]
  variant: Variant
  settings: dict[str, Any]


def reach(
  variants: list[Variant], tuning: Any, problems: list[Any], accuracies: tuple[float, ...]
) -> list[Reached]:
  """Chooses settings for each accuracy on stacked problems, and runs them on others."""
  traces: list[tuple[Variant, dict[str, Any], np.ndarray]] = []
  for variant in variants:
    grid = points(METHODS[variant.name].traced)
    stacked = {name: jnp.array([point[name] for point in grid]) for name in grid[0]}
    of_grid = jax.vmap(jax.vmap(variant.run, (0, None)), (None, 0))(tuning, stacked)
    traces += [(variant, *pair) for pair in zip(grid, np.asarray(of_grid), strict=True)]
  results, known = [], {}
  for accuracy in accuracies:
    costs = [
      max(updates_to_reach(trace, MARGIN * accuracy) for trace in of_seeds) * variant.cost
      for variant, _, of_seeds in traces
    ]
    variant, settings, _ = traces[best := int(np.argmin(costs))]
    if best not in known and np.isfinite(costs[best]):
      known[best] = [np.asarray(variant.run(problem, settings)) for problem in problems]
    cost = [updates_to_reach(trace, accuracy) * variant.cost for trace in known.get(best, ())]
    results.append(Reached(cost or [np.inf] * len(problems), variant, settings))
  return results


def as_arrays(problem: Quadratic) -> Quadratic:
  """The problem on the device, in the default precision."""
  return jax.tree.map(lambda leaf: jnp.asarray(leaf, float), problem)


def cell(value: float) -> str:
  """A number, or a dash if it is infinite."""
  return number(value) if np.isfinite(value) else "-"


def seconds_per_update(
  variants: list[Variant], problem: Quadratic, rounds: int
) -> dict[str, float]:
  """Times all variants in turns, over 200 updates each."""
  num_updates, programs = 200, {}
  for variant in variants:
    method = METHODS[variant.name]
    make = functools.partial(method.make, **variant.static)
    run = jax.jit(functools.partial(errors, make, num_updates))
    programs[variant.label] = functools.partial(run, problem, points(method.traced)[0])
  timings = measure.time_together(programs, rounds, 1)
  return {label: timing.seconds / num_updates for label, timing in timings.items()}


def measure_all(args: Any, say: Callable[[str, str], None]) -> dict[str, Any]:
  """Measures everything; returns the data."""
  problem = as_arrays(random_quadratic(False, TUNING_SEEDS[0]))
  variants = [
    make_variant(name, static, problem, args.budget)
    for name, method in METHODS.items()
    for static in points(method.static)
  ]
  seconds = seconds_per_update(variants, problem, args.rounds)
  rows = [
    {
      "method": variant.label,
      "gradients": variant.gradients,
      "products": METHODS[variant.name].products,
      "cost": variant.cost,
      "us": 1e6 * seconds[variant.label],
      "temp. KiB": variant.temporary_bytes / 2**10,
    }
    for variant in variants
  ]
  text = [
    [row["method"], str(row["gradients"]), str(row["products"])]
    + [number(row[name]) for name in ("cost", "us", "temp. KiB")]
    for row in rows
  ]
  say("An update", markdown(list(rows[0]), text))
  data: dict[str, Any] = {"updates": rows}

  for flat, title in ((False, "unique"), (True, "flat")):
    of_seeds = [as_arrays(random_quadratic(flat, seed)) for seed in TUNING_SEEDS]
    tuning = jax.tree.map(lambda *leaves: jnp.stack(leaves), *of_seeds)
    problems = [as_arrays(random_quadratic(flat, seed)) for seed in range(args.problems)]
    text, data[title] = [], {}
    for name in METHODS:
      mine = [variant for variant in variants if variant.name == name]
      reached = reach(mine, tuning, problems, ACCURACIES)
      cost = [float(np.median(row.cost)) for row in reached]
      rates = [seconds[row.variant.label] / row.variant.cost for row in reached]
      time = [c * rate for c, rate in zip(cost, rates, strict=True)]
      text.append([name, *map(cell, cost), *(cell(1e3 * t) for t in time)])
      data[title][name] = [
        {
          "accuracy": accuracy,
          "cost": [c if np.isfinite(c) else None for c in row.cost],
          "seconds": t if np.isfinite(t) else None,
          "settings": row.variant.static | row.settings,
        }
        for accuracy, row, t in zip(ACCURACIES, reached, time, strict=True)
      ]
    columns = ["method", *(f"cost, {a:g}" for a in ACCURACIES), *(f"ms, {a:g}" for a in ACCURACIES)]
    say(f"To reach an accuracy: {title}", markdown(columns, text))
  return data


def main() -> None:
  """Measures, prints, and saves if asked to."""
  args = arguments(
    __doc__,
    rounds=(9, "turns of each program"),
    problems=(5, "problems of each kind, beside the one for the settings"),
    budget=(BUDGET, "gradients that a method may spend"),
  )
  sections = [f"Hardware: {hardware()}."]
  print(sections[0])

  def say(title: str, text: str) -> None:
    sections.append(f"## {title}\n\n{text}")
    print(f"\n{sections[-1]}", flush=True)

  with jax.enable_x64(True):
    data = measure_all(args, say)
  command = "`PYTHONPATH=.:models python3 -m benchmarks.value_function`"
  title = f"# Value-function methods\n\nMade by {command}; the columns are explained there."
  save(args.save, "\n\n".join([title, *sections]) + "\n", {"hardware": hardware(), **data})


if __name__ == "__main__":
  main()
