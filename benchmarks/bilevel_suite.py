"""Bilevel problems on finite sums, the classes of the standard benchmark: seconds to an accuracy.

  PYTHONPATH=.:models python3 -m benchmarks.bilevel_suite   (10 minutes of CPU; --problems for some)
  ... --save benchmarks/results/bilevel_suite_cpu           (writes .md and .json as well)

A run that was stopped goes on with the methods that its files lack.

The problems have the classes and shapes of the standard bilevel benchmark (benchopt), and none of
its code or data: random quadratics; regularisation selection on data shaped like ijcnn1 and like
covtype, which are principal components of MNIST; data cleaning on MNIST. MNIST is read from
TFDS_DATA_DIR. All methods have the same losses, the same stream of minibatches, which come once an
epoch in a random order, and float32. *jaxbo* are chains of the library; *plain* are the methods as
their papers write them, in plain JAX (``benchmarks/suite_plain.py``). Rates are constant.

* *rates*: of y and v, and of x, in units of the inverse curvatures at the start: for each method,
  of the same twelve on a problem of another seed, the first at the highest accuracy that one
  reaches in a quarter of the time. L-BFGS takes the second as it is.
* *us a step*: CPU time.
* *s to 1e-4*: CPU time of the pinned process until the squared norm of the exact hypergradient, by
  Newton's method in float64, is that part of its start. It is the true clock of an idle core: each
  call waits for its result. Compilation and looking at x do not count. Looked at whenever the time
  has grown by 15 per cent. The worse of the seeds; a dash: not in all of them.
* *passes*: gradients and products until then, in gradients of both losses over all examples.
* *end*: the value when the time was up, the worse of the seeds.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxbo
from benchmarks.report import save
from benchmarks.suite_methods import METHODS, Method
from benchmarks.suite_plain import Rates
from benchmarks.suite_problems import PROBLEMS, FiniteSum, curvature, exact
from benchmarks.suite_table import ACCURACIES, cells, page

GRID = [(rho, gamma) for rho in (0.05, 0.2, 0.5) for gamma in (0.03, 0.1, 0.3, 0.9)]


GROWTH = 0.15  # of the time between two looks at x


class Setup(NamedTuple):
  """A problem of one seed, with what is known about it.

  Attributes:
    problem: the problem.
    stream: of its minibatches.
    at: ``at(x, y) -> (hypergradient, inner solution, F)``, exact.
    units: the rates of which the grid has multiples.
    begin: the squared norm of the hypergradient at the start, and F there.
  """

  problem: FiniteSum
  stream: Any
  at: Callable[..., Any]
  units: tuple[float, float]
  begin: tuple[float, float]


def set_up(name: str, seed: int) -> Setup:
  """Draws a problem and measures its curvatures."""
  problem = PROBLEMS[name](seed)
  at = exact(problem)
  units = curvature(problem, at)
  stream = jaxbo.tasks.finite_sum_stream(
    problem.train, problem.val, problem.sizes[0], val_batch_size=problem.sizes[1]
  )
  slope, _, value = at(problem.x, problem.y)
  begin = float(np.sum(slope**2)), float(value)
  return Setup(problem, stream, at, (1 / units[0], 1 / units[1]), begin)


class Trace(NamedTuple):
  """A run.

  Attributes:
    seconds: true clock of the steps alone, ``[times]``.
    steps: how many steps, ``[times]``.
    xs: where the run was.
  """

  seconds: np.ndarray
  steps: np.ndarray
  xs: list[np.ndarray]


class Program(NamedTuple):
  """A method on a problem, compiled for all rates.

  Attributes:
    init: ``init(stream, rates, key) -> state``.
    run: ``run(stream, state, rates, num_steps) -> state``.
    seconds: that compilation took.
  """

  init: Callable[..., Any]
  run: Callable[..., Any]
  seconds: float


def init_of(method: Method, setup: Setup) -> Callable[..., Any]:
  """``init(stream, rates, key) -> state``, where the problem says."""

  @jax.jit
  def init(stream, rates, key):
    return {**method.make(setup.problem, rates)[0](), "stream": stream.init(key)}

  return init


def compile_method(method: Method, setup: Setup) -> Program:
  """Compiles ahead, so that no run waits for it."""

  @functools.partial(jax.jit, donate_argnums=1)
  def run(stream, state, rates, num_steps):
    step = method.make(setup.problem, rates)[1]
    return jax.lax.fori_loop(0, num_steps, lambda _, state: step(stream, state), state)

  init, begin = init_of(method, setup), time.process_time()
  state = jax.block_until_ready(init(setup.stream, rates_of(setup, GRID[0]), jnp.uint32(0)))
  compiled = run.lower(setup.stream, state, rates_of(setup, GRID[0]), jnp.int32(1)).compile()
  return Program(init, compiled, time.process_time() - begin)


def rates_of(setup: Setup, point: tuple[float, float]) -> Any:
  """The rates of a point of the grid."""
  scaled = [part * unit for part, unit in zip(point, setup.units, strict=True)]
  return Rates(*map(jnp.float32, (*scaled, point[1])))


def trace(
  program: Program, setup: Setup, point: tuple[float, float], seconds: float, seed: int
) -> Trace:
  """Runs for so long, and keeps x at times that grow geometrically."""
  rates = rates_of(setup, point)
  state = jax.block_until_ready(program.init(setup.stream, rates, jnp.uint32(seed)))
  elapsed, done, num_steps = 0.0, 0, 1
  times, steps, xs = [0.0], [0], [np.asarray(state["x"])]
  while elapsed < seconds:
    begin = time.process_time()
    state = jax.block_until_ready(program.run(setup.stream, state, rates, jnp.int32(num_steps)))
    last = time.process_time() - begin
    elapsed, done = elapsed + last, done + num_steps
    times.append(elapsed)
    steps.append(done)
    xs.append(np.asarray(state["x"]))
    if not np.all(np.isfinite(xs[-1])):
      break
    num_steps = max(1, int(min(GROWTH * elapsed, seconds - elapsed) * num_steps / last))
  return Trace(np.array(times), np.array(steps), xs)


def values(setup: Setup, xs: list[np.ndarray]) -> np.ndarray:
  """The squared norm of the exact hypergradient, in that of the start.

  NaN where F is above its start: there the slope may vanish because y does.
  """
  y, results = setup.problem.y, []
  for x in xs:
    value = np.nan
    if np.all(np.isfinite(x)) and np.max(np.abs(x)) < 1e3:
      slope, solution, loss = setup.at(x, y)
      value = float(np.sum(slope**2)) / setup.begin[0]
      y = solution if np.isfinite(value) else y
      value = value if loss <= setup.begin[1] else np.nan
    results.append(value)
  return np.array(results)


def first_below(series: np.ndarray, accuracy: float) -> int | None:
  """Where a run first has an accuracy."""
  below = np.flatnonzero(series <= accuracy)
  return int(below[0]) if len(below) else None


def reach(program: Program, setup: Setup, point: Any, seconds: float, seed: int) -> Any:
  """A run and the exact value of each time."""
  run = trace(program, setup, point, seconds, seed)
  return run, values(setup, run.xs)


def choose(program: Program, setup: Setup, seconds: float) -> tuple[float, float]:
  """The point of the grid that is first at the highest accuracy that one reaches, or is lowest."""

  def score(point):
    run, series = reach(program, setup, point, seconds, 0)
    hits = [first_below(series, accuracy) for accuracy in reversed(ACCURACIES)]
    rank = next((i for i, hit in enumerate(hits) if hit is not None), len(hits))
    end = series[-1] if np.isfinite(series[-1]) else np.inf
    return rank, run.seconds[hits[rank]] if rank < len(hits) else end

  return min(GRID, key=score)


def measure_method(
  method: Method, tuning: Setup, setups: list[Setup], seconds: float
) -> dict[str, Any]:
  """Compiles, chooses rates on the seed for tuning, and runs on the others."""
  program = compile_method(method, tuning)
  structure = jax.tree.structure(tuning.stream)
  point = choose(program, tuning, seconds / 4)
  rows: dict[str, Any] = {
    "method": method.name,
    "rates": point,
    "compile": program.seconds,
    "passes": method.passes(tuning.problem),
    "runs": [],
  }
  for seed, setup in enumerate(setups):
    # A stream of the same sizes is another type, and the program is compiled for one.
    setup = setup._replace(stream=structure.unflatten(jax.tree.leaves(setup.stream)))
    program = program._replace(init=init_of(method, setup))
    run, series = reach(program, setup, point, seconds, seed)
    hits = [first_below(series, accuracy) for accuracy in ACCURACIES]
    at = lambda column, hits=hits: [None if i is None else float(column[i]) for i in hits]
    rows["runs"].append(
      {
        "seconds": at(run.seconds),
        "steps": at(run.steps),
        "end": float(series[-1]),
        "microseconds": 1e6 * float(run.seconds[-1] / run.steps[-1]),
        "trace": [run.seconds.tolist(), run.steps.tolist(), series.tolist()],
      }
    )
  return rows


def main() -> None:
  """Runs the benchmark, or goes on with one that was stopped."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--problems", choices=PROBLEMS, nargs="+", default=list(PROBLEMS))
  parser.add_argument("--seeds", type=int, default=2, help="problems of the table")
  parser.add_argument("--seconds", type=float, default=1.0, help="of a run")
  parser.add_argument("--save", type=Path, help="path without suffix, for .md and .json")
  args = parser.parse_args()
  given = {"seeds": args.seeds, "seconds": args.seconds}
  results: dict[str, Any] = {"given": given, "problems": {}}
  if args.save and (kept := args.save.with_suffix(".json")).exists():
    before = json.loads(kept.read_text())
    if before["given"] != given:
      parser.error(f"{kept} is of {before['given']}, not of {given}: remove it first")
    results = before
  text = lambda: page(results, PROBLEMS, [method.name for method in METHODS])
  for name in args.problems:
    rows = results["problems"].get(name, {}).get("rows", [])
    missing = [method for method in METHODS if method.name not in {row["method"] for row in rows}]
    if not missing:
      continue
    tuning, *setups = (set_up(name, seed) for seed in (100, *range(args.seeds)))
    doc = " ".join((PROBLEMS[name].__doc__ or "").split())
    begins = [setup.begin[0] for setup in setups]
    results["problems"][name] = {"about": doc, "begins": begins, "rows": rows}
    for method in missing:
      rows.append(measure_method(method, tuning, setups, args.seconds))
      print(cells(rows[-1]), flush=True)
      save(args.save, text(), results)
  print(text())


if __name__ == "__main__":
  main()
