"""Runs methods of hyper-cleaning for an equal number of gradients and an equal number of seconds.

The unit of cost is one gradient of the inner loss in the model's parameters, on one batch: the
operations of a step are counted in its jaxpr, products with Hessians and backward passes through
inner runs included, and divided by those of that gradient.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import Progress

from benchmarks import measure
from scripts.common import cleaning, report
from scripts.common.cleaning import Batch, CleaningData, Settings
from scripts.multiple_minima import cleaning as minima_cleaning
from scripts.multiple_minima import loops
from scripts.multiple_minima.cleaning import BASELINES, METHODS, Problem

BUDGETS = {"digits": 1500, "mnist": 2000}
NUM_POINTS = 15
UNIT = "everything"  # A step of it is one gradient.
Point = dict[str, Any]
Cells = dict[tuple[str, int], list[Point]]  # the points of a curve by method and seed


class Program(NamedTuple):
  """A method, compiled once for all seeds.

  Attributes:
    init: ``init(problem) -> state``.
    run: ``run(state, key, problem) -> state``, ``steps`` outer steps.
    outer: ``outer(state) -> x``.
    measure: ``measure(state, problem) -> Point``, what stands in a point of a curve.
    steps: outer steps of ``run``.
    gradients: what one of them costs.
  """

  init: Callable[[Problem], Any]
  run: jax.stages.Compiled
  outer: Callable[[Any], jax.Array]
  measure: Callable[..., Point]
  steps: int
  gradients: float


class Cost(NamedTuple):
  """What a step of a method costs: seconds, and the bytes of XLA's temporary memory or -1."""

  seconds: float
  temporary_bytes: int


def make_program(
  method: str,
  chosen: Mapping[str, Any],
  settings: Settings,
  budget: float,
  data: CleaningData,
  num_points: int = NUM_POINTS,
) -> Program:
  """Compiles a method; ``run`` uses up a share of the budget, at least one step."""
  loop = minima_cleaning.make_loop(method, settings, chosen)
  problem = minima_cleaning.make_problem(method, data, settings, 0)
  init = jax.jit(lambda problem: loop.init(problem.x, problem.y))
  state, key = init(problem), jax.random.key(0)
  gradients = cost_of_a_step(loop, chosen, settings, problem)
  steps = max(int(budget / num_points / gradients), 1)
  run = jax.jit(minima_cleaning.make_run(loop, settings, steps))
  compiled = run.lower(state, key, problem).compile()

  @jax.jit
  def measure_state(state, problem):
    params = loop.params(state)
    point = minima_cleaning.measure(settings, params, problem)
    return point | {"dual": loops.dual_of(state)}, jax.nn.sigmoid(params.outer)

  def measured(state, problem):
    point, weights = measure_state(state, problem)
    weights = np.asarray(weights, np.float64)
    point = {name: float(value) for name, value in point.items()}
    corrupted = np.asarray(problem.corrupted)
    point["auc"], point["f1"] = cleaning.detection_scores(weights, corrupted)
    return point

  outer = lambda state: loop.params(state).outer
  return Program(init, compiled, outer, measured, steps, gradients)


def cost_of_a_step(
  loop: loops.Loop, chosen: Mapping[str, Any], settings: Settings, problem: Problem
) -> float:
  """The operations of an outer step, in units of one gradient of the inner loss on one batch."""
  step = minima_cleaning.make_run(loop, settings, 1)
  state = jax.eval_shape(loop.init, problem.x, problem.y)
  # Only conjugate gradient has a loop of no fixed length.
  steps = chosen.get("linear_steps", 1)
  flops = measure.count_flops(step, state, jax.random.key(0), problem, while_steps=steps)
  size = settings.batch_size or settings.num_train
  batch = Batch(
    jax.tree.map(lambda leaf: jnp.resize(leaf, (size, *leaf.shape[1:])), problem.train), None
  )
  gradient = jax.grad(cleaning.make_losses(settings)[0], argnums=1)
  return flops / measure.count_flops(gradient, jnp.zeros(size), problem.y, batch)


def curve(
  program: Program, problem: Problem, seed: int, budget: float, limit: float, seconds: float
) -> Iterator[tuple[Point, Any]]:
  """Runs until both budgets are spent; yields points and states.

  Args:
    program: the method.
    problem: the data of the seed.
    seed: of the batches.
    budget: in gradients.
    limit: in seconds.
    seconds: of one step.
  """
  state, steps = program.init(problem), 0
  while steps * program.gradients < budget or steps * seconds < limit:
    key = jax.random.fold_in(jax.random.key(seed), steps)
    state = program.run(state, key, problem)
    steps += program.steps
    spent = {"steps": steps, "gradients": steps * program.gradients, "seconds": steps * seconds}
    yield spent | program.measure(state, problem), state


def measure_costs(
  programs: Mapping[str, Program], problems: Mapping[str, Problem]
) -> dict[str, Cost]:
  """Times all methods in turns, so that what slows the machine slows all of them."""
  calls = {}
  for name, program in programs.items():
    arguments = program.init(problems[name]), jax.random.key(0), problems[name]
    calls[name] = lambda run=program.run, arguments=arguments: run(*arguments)
  timings = measure.time_together(calls, num_rounds=5, calls=1)
  return {
    name: Cost(timings[name].seconds / program.steps, measure.temporary_bytes(program.run))
    for name, program in programs.items()
  }


def compare(
  chosen: Mapping[str, Mapping[str, Any]],
  settings: Settings,
  budget: float,
  data: Mapping[int, CleaningData],
  cells: Cells,
  costs: dict[str, Cost],
  costs_path: Path,
  log: report.MetricsLog,
  progress: Progress,
) -> None:
  """Runs what is missing in ``cells``, and fills it and ``costs`` as it goes.

  Args:
    chosen: the settings of each method.
    settings: of the problem.
    budget: gradients of each method.
    data: of each seed.
    cells: what is there already, by method and seed.
    costs: the same; measured unless complete.
    costs_path: where to keep them for a run that resumes this one.
    log: where points go.
    progress: where to show them.
  """
  bar = progress.add_task("", total=len(chosen) * (1 + len(data)), loss="")
  first = next(iter(data))
  missing = [name for name in chosen if any((name, seed) not in cells for seed in data)]
  if not chosen.keys() <= costs.keys():
    missing = list(chosen)
  programs = {}
  for name in missing:
    progress.update(bar, description=f"compiling {METHODS[name].label}")
    programs[name] = make_program(name, chosen[name], settings, budget, data[first])
    progress.advance(bar)
  if not chosen.keys() <= costs.keys():
    progress.update(bar, description="timing")
    problems = {
      name: minima_cleaning.make_problem(name, data[first], settings, first) for name in chosen
    }
    costs |= measure_costs(programs, problems)
    costs_path.write_text(json.dumps({name: cost._asdict() for name, cost in costs.items()}) + "\n")
  limit = budget * costs[UNIT].seconds
  retrain = jax.jit(
    lambda x, key, problem: minima_cleaning.retrained_accuracy(settings, x, key, problem)
  )
  for seed, of_seed in data.items():
    for name in chosen:
      progress.update(bar, description=f"seed {seed}, {METHODS[name].label}")
      if (name, seed) not in cells:
        problem, points = minima_cleaning.make_problem(name, of_seed, settings, seed), []
        state = None
        runs = curve(programs[name], problem, seed, budget, limit, costs[name].seconds)
        for point, state in runs:  # noqa: B007
          points.append({"method": name, "seed": seed, **point})
          progress.update(bar, loss=f"accuracy {point['accuracy']:.3f}")
        points[-1]["retrained"] = math.nan
        if name not in BASELINES:  # Their weights are given.
          key, x = jax.random.fold_in(jax.random.key(seed), 2**20), programs[name].outer(state)
          points[-1]["retrained"] = float(retrain(x, key, problem))
        for point in points:
          log.write(**point)
        cells[name, seed] = points
      progress.advance(bar)


def finished(lines: Sequence[Point]) -> Cells:
  """The curves that ended, from the lines of a log."""
  cells: Cells = {}
  for line in lines:
    point: Point = {name: math.nan if value is None else value for name, value in line.items()}
    cells.setdefault((point["method"], point["seed"]), []).append(point)
  return {key: points for key, points in cells.items() if "retrained" in points[-1]}


def within(points: Sequence[Point], name: str, most: float) -> Point:
  """The last point that spent no more than that; NaN if even the first did."""
  allowed = [point for point in points if point[name] <= most * (1 + 1e-9)]
  return allowed[-1] if allowed else dict.fromkeys(points[0], math.nan)
