"""Value-function methods beside implicit differentiation, on random quadratics with known optima.

  PYTHONPATH=.:models python3 -m benchmarks.value_function           (about 5 minutes on 2 cores)
  ... --save benchmarks/results/value_function_cpu                   (writes .md and .json as well)

There are two problems; all losses are quadratic in (x, y) with cross terms. In *unique*, the
eigenvalues of the inner Hessian go from 0.1 to 1. In *flat*, every other eigenvalue is zero, so the
inner minima form an affine space, and the task is to find the minimum that is best for the outer
loss. All methods start at zero, in float64 (float32 resolves a loss only to about 1e-6, the size of
a small slack).

A slack or a multiplier limits how accurate a method can be, so each accuracy has its own settings,
from a grid of 32 points: those that reach half the error fastest in the worst of three problems of
other seeds. (We revised grids, this rule and "stay there" twice after runs that reported seeds 0 to
4: the rule had chosen settings at the edge of stability for SOBA and a slack just too large for
PDBO, and BOME had poor grids.)

* *gradients* of an update: evaluations of the gradients of the inner and the outer loss, counted in
  the jaxpr; *products*: those with the inner Hessian and the mixed ones.
* *cost* of an update: its operations, counted in the jaxpr, in units of one gradient of the inner
  loss in y.
* *cost* and *ms* to bring the error in x to this fraction of the initial error, and to keep it
  there until the budget is spent: the number of updates times the cost and the time of one; the
  median over problems. A dash: not within the budget, on half of the problems or in the search for
  settings.

SOBA's single loop takes a step on y, one on the linear system and one on x, from the parts of the
library; ``jaxbo.fixed_point`` takes one extra product, to see whether the residual grew.
"""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from benchmarks.bilevel_quadratic import (
  Quadratic,
  as_arrays,
  inner_loss,
  random_quadratic,
  start,
)
from benchmarks.report import arguments, hardware, markdown, number, save
from benchmarks.value_methods import CG_STEPS, METHODS

ACCURACIES = (1e-1, 1e-2, 1e-3)
BUDGET = 60_000  # in gradients of the inner loss
TUNING_SEEDS = (100, 101, 102)
MARGIN = 0.5  # Settings must reach this share of an accuracy.


def points(grid: Mapping[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
  """All combinations."""
  return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def errors(make: Callable[..., Any], num_updates: int, problem: Any, traced: Any) -> jax.Array:
  """The error in x after each update, of that at the start, ``[num_updates]``."""
  init, step = make(problem.smoothness, **traced)

  def body(state, _):
    state, _ = step(state, problem.inner, problem.outer)
    error = jnp.linalg.norm(state.x - problem.optimum)
    return state, error / jnp.linalg.norm(problem.optimum)

  return jax.lax.scan(body, init(*start()), length=num_updates)[1]


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
  state = jax.jit(lambda p, t: make(p.smoothness, **t)[0](*start()))(problem, traced)
  step = lambda state, p, t: make(p.smoothness, **t)[1](state, p.inner, p.outer)[0]
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
