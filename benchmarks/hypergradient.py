"""Hypergradients: error, time, operations and memory of every response, and of JAXopt's.

  PYTHONPATH=.:models python3 -m benchmarks.hypergradient            (about 2 minutes on 2 cores)
  ... --save benchmarks/results/hypergradient_cpu                    (writes .md and .json as well)

Problems: random quadratics of two condition numbers, and hyper-cleaning of scikit-learn's digits.
The outer variable first drifts for 20 outer steps, so that warm-started methods have a start; the
next step is measured.

* *error*: relative distance to the exact hypergradient, found in float64 by Newton's method and a
  direct solver. It includes the error of the inner solution.
* *ms*: a whole step, with the inner solve and the gradients of the outer loss: the median over
  rounds in which all programs have a turn. *x inner*: the median over rounds of the ratio to the
  inner solve in the same round.
* *Mflop*: operations counted in the jaxpr, loops included, since XLA counts a loop's body once.
  JAXopt's two nested kinds of ``while`` loop hide their number of steps: no count.
* *temp. KiB*: XLA's temporary memory of the compiled step.

JAXopt (``uv sync --group bench``) gets the same losses, the same optimizer, the same warm start and
as many steps of conjugate gradient, jitted. A step returns all its results: for jaxbo the losses of
the inner steps and the state, for JAXopt the last loss and the gradient norm. If a program does not
use these results, XLA drops the work for them; the targets compare that as well.
"""

import functools
import math
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbo
from benchmarks import measure, problems
from benchmarks.problems import Problem
from benchmarks.report import arguments, hardware, markdown, number, save

NUM_DRIFT = 20
CG_STEPS = 10
AID, WARM_AID = f"AID, CG {CG_STEPS}", f"AID, warm CG {CG_STEPS - 1}"
NUM_SAMPLES = 64
ESJ = f"ESJ, Q = {NUM_SAMPLES}"
JAXOPT_AID, JAXOPT_ITD = f"JAXopt, implicit, CG {CG_STEPS}", "JAXopt, unrolled"


def responses(problem: Problem, inner: jaxbo.InnerSolver) -> dict[str, Any]:
  """The responses to compare."""
  rate, aid = problem.neumann_learning_rate, functools.partial(jaxbo.add_implicit_response, inner)
  cg = jaxbo.conjugate_gradient
  return {
    "first order": jaxbo.drop_response(),
    "ITD": jaxbo.add_unrolled_response(inner),
    f"ITD, last {inner.num_steps // 2}": jaxbo.add_unrolled_response(inner, inner.num_steps // 2),
    "ITD, remat": jaxbo.add_unrolled_response(
      jaxbo.inner_solver(problem.inner_loss, problem.optimizer, problem.num_steps, remat=True)
    ),
    AID: aid(cg(CG_STEPS)),
    # The residual of a warm start costs a product: one step less, so that the cost is the same.
    WARM_AID: aid(cg(CG_STEPS - 1, warm_start=True), inner_params=problem.y0),
    f"AID, Neumann {CG_STEPS}": aid(jaxbo.neumann(CG_STEPS, rate)),
    f"AID, warm fixed point {CG_STEPS - 1}": aid(
      jaxbo.fixed_point(CG_STEPS - 1, rate, warm_start=True), inner_params=problem.y0
    ),
    "ESJ, Q = 16": jaxbo.add_es_response(inner, 16, 1e-2),
    ESJ: jaxbo.add_es_response(inner, NUM_SAMPLES, 1e-2),
  }


class Step(NamedTuple):
  """A step of an outer method, before the outer optimizer.

  Attributes:
    fn: ``fn(*args) -> (hypergradient, solution, ...)``, jitted.
    args: everything it depends on.
  """

  fn: Any
  args: tuple[Any, ...]

  def __call__(self) -> Any:
    """Takes the step."""
    return self.fn(*self.args)


def without_diagnostics(step: Step) -> Step:
  """The same step, of which only the hypergradient and the inner parameters are wanted."""

  def lean(*args):
    hypergradient, solution, *_ = step.fn(*args)
    return hypergradient, solution.params

  return Step(jax.jit(lean), step.args)


def jaxbo_step(problem: Problem, inner: jaxbo.InnerSolver, head: Any) -> Step:
  """Lets ``x`` drift for a while, and returns the step after that."""

  def step(x, solution, state, train, val):
    solution = inner.solve(x, solution, train)
    _, grads = jax.value_and_grad(problem.outer_loss, (0, 1))(x, solution.params, val)
    hypergradient, state = head.update(grads, state, x, solution=solution, batch=train)
    return hypergradient, solution, state

  def drift(start, train, val):
    def body(carry, steps_left):
      x = problem.x - steps_left * problem.drift
      solution, state = carry
      _, solution, state = step(x, solution, state, train, val)
      return (solution, state), None

    return jax.lax.scan(body, start, jnp.arange(NUM_DRIFT, 0, -1.0))[0]

  start = inner.init(problem.y0), head.init(problem.x)
  start = jax.jit(drift)(start, problem.train, problem.val)
  return Step(jax.jit(step), (problem.x, *start, problem.train, problem.val))


def jaxopt_steps(problem: Problem, y: Any) -> dict[str, Step]:
  """JAXopt's implicit differentiation and unrolling, from the inner parameters ``y``."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", DeprecationWarning)  # "JAXopt is no longer maintained."
      from jaxopt import OptaxSolver, linear_solve
  except ImportError:
    print("JAXopt is not installed, its rows are left out (uv sync --group bench).")
    return {}

  solver = functools.partial(
    OptaxSolver,
    lambda y, x, batch: problem.inner_loss(x, y, batch),
    problem.optimizer,
    maxiter=problem.num_steps,
    tol=0,
  )
  cg = functools.partial(linear_solve.solve_cg, maxiter=CG_STEPS, tol=0.0)

  def make(solver):
    def step(x, y, train, val):
      def outer_loss(x):
        solution = solver.run(y, x, train)
        return problem.outer_loss(x, solution.params, val), solution

      return jax.grad(outer_loss, has_aux=True)(x)

    return Step(jax.jit(step), (problem.x, y, problem.train, problem.val))

  return {
    JAXOPT_AID: make(solver(implicit_diff=True, implicit_diff_solve=cg)),
    JAXOPT_ITD: make(solver(implicit_diff=False, unroll=True)),
  }


class Row(NamedTuple):
  """A row of a table. Numbers that do not exist are NaN."""

  name: str
  error: float
  ms: float
  ratio: float
  mflop: float
  temporary_kib: float


class Target(NamedTuple):
  """Something that should hold: ``measured <= limit``."""

  claim: str
  measured: float
  limit: float

  @property
  def verdict(self) -> str:
    """Whether it holds."""
    return "PASS" if self.measured <= self.limit else "MISSED"


def make_steps(problem: Problem) -> dict[str, Step]:
  """The inner solve alone, all responses, and JAXopt's if it is there."""
  inner = jaxbo.inner_solver(problem.inner_loss, problem.optimizer, problem.num_steps)
  steps = {
    name: jaxbo_step(problem, inner, head) for name, head in responses(problem, inner).items()
  }
  x, solution, _, train, _ = steps["ITD"].args
  solve = {"inner solve": Step(jax.jit(inner.solve), (x, solution, train))}
  return solve | steps | jaxopt_steps(problem, solution.params)


def linear_steps(state: Any) -> int:
  """The steps of the linear solver that ``state`` tells of, at least 1."""
  return max(int(optax.tree.get(state, "linear_steps", 1)), 1)


def table(problem: Problem, steps: dict[str, Step], num_rounds: int, calls: int) -> list[Row]:
  """Measures all steps."""
  exact = problems.exact_hypergradient(problem)
  timings = measure.time_together(steps, num_rounds, calls)
  rows = []
  for name, step in steps.items():
    error = flops = float("nan")
    if name != "inner solve":
      error = float(np.linalg.norm(step()[0] - exact) / np.linalg.norm(exact))
    if "JAXopt" not in name:
      while_steps = 1 if name == "inner solve" else linear_steps(step()[2])
      flops = measure.count_flops(step.fn, *step.args, while_steps=while_steps)
    memory = measure.temporary_bytes(step.fn.lower(*step.args).compile())
    time = timings[name]
    rows.append(Row(name, error, 1e3 * time.seconds, time.ratio, flops / 1e6, memory / 2**10))
  return rows


def remat_memory(num_steps: int = 1000, size: int = 4096) -> dict[str, int]:
  """Temporary bytes of unrolling Adam on ``size`` parameters; keys are plain, remat, parameters."""
  x, y = jnp.zeros(size), jnp.ones(size)
  result = {"parameters": x.nbytes + y.nbytes}
  for name, remat in (("plain", False), ("remat", True)):
    inner = jaxbo.inner_solver(
      lambda x, y, batch: jnp.mean((y - jnp.tanh(x)) ** 2),
      optax.adam(1e-2, eps_root=1e-12),
      num_steps,
      remat=remat,
    )
    head, solution = jaxbo.add_unrolled_response(inner), inner.init(y)

    def step(x, solution, state, inner=inner, head=head):
      solution = inner.solve(x, solution, None)
      grads = (jnp.zeros_like(x), optax.tree.scale(2, solution.params))
      return head.update(grads, state, x, solution=solution, batch=None), solution

    compiled = jax.jit(step).lower(x, solution, head.init(x)).compile()
    result[name] = measure.temporary_bytes(compiled)
  return result


def targets(
  rows: list[Row], steps: dict[str, Step], memory: dict[str, int], num_rounds: int, calls: int
) -> list[Target]:
  """Compares with what is wanted, on the problem of ``rows`` and ``steps``."""

  def ratio(ours: str, theirs: str, adapt=lambda step: step) -> float:
    pair = {theirs: adapt(steps[theirs]), ours: adapt(steps[ours])}
    return measure.time_together(pair, 2 * num_rounds, calls)[ours].ratio

  by_name = {row.name: row for row in rows}
  num_steps, plain = 1000, memory["plain"]
  result = [
    Target(f"{WARM_AID}: error at most that of {AID}", by_name[WARM_AID].error, by_name[AID].error),
    Target(
      f"{WARM_AID}: operations at most 1.01 of {AID}",
      by_name[WARM_AID].mflop / by_name[AID].mflop,
      1.01,
    ),
    Target(
      "ITD, remat, N = 1,000: bytes at most 2 sqrt(N) / N of plain, plus parameters",
      memory["remat"],
      2 / math.sqrt(num_steps) * plain + memory["parameters"],
    ),
    Target(
      f"{ESJ}: time at most 0.45 (Q + 1) inner solves",
      ratio(ESJ, "inner solve"),
      0.45 * (NUM_SAMPLES + 1),
    ),
  ]
  if JAXOPT_AID in steps:
    for ours, theirs, limit in ((AID, JAXOPT_AID, 1.03), ("ITD", JAXOPT_ITD, 0.75)):
      claim = f"{ours}: time at most {limit} of {theirs}"
      result += [
        Target(f"{claim}, both with all they return", ratio(ours, theirs), limit),
        Target(
          f"{claim}, both without diagnostics", ratio(ours, theirs, without_diagnostics), limit
        ),
      ]
  return result


def main() -> None:
  """Measures, prints, and saves if asked to."""
  args = arguments(__doc__, rounds=(15, "turns of each program"), calls=(10, "calls in a turn"))
  sections = [f"Hardware: {hardware()}."]
  data: dict[str, Any] = {"hardware": hardware()}
  print(sections[0])

  def say(title: str, text: str) -> None:
    sections.append(f"## {title}\n\n{text}")
    print(f"\n{sections[-1]}", flush=True)

  columns = ["response", "error", "ms", "x inner", "Mflop", "temp. KiB"]
  rows, steps = [], {}
  for problem in (problems.quadratic(10.0), problems.quadratic(1000.0), problems.digits()):
    steps = make_steps(problem)
    rows = table(problem, steps, args.rounds, args.calls)
    data[problem.name] = [row._asdict() for row in rows]
    text = [[row.name, *(number(value) for value in row[1:])] for row in rows]
    say(f"{problem.name}, {problem.num_steps} inner steps", markdown(columns, text))

  memory = remat_memory()
  wanted = targets(rows, steps, memory, args.rounds, args.calls)
  data["remat"] = memory
  data["targets"] = [target._asdict() | {"verdict": target.verdict} for target in wanted]
  text = [
    [target.claim, number(target.measured), number(target.limit), target.verdict]
    for target in wanted
  ]
  say("Targets, on the digits", markdown(["claim", "measured", "limit", "verdict"], text))
  command = "`PYTHONPATH=.:models python3 -m benchmarks.hypergradient`"
  title = f"# Hypergradients\n\nMade by {command}; the columns are explained there."
  save(args.save, "\n\n".join([title, *sections]) + "\n", data)


if __name__ == "__main__":
  main()
