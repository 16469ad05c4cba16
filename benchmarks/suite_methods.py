"""The methods of :mod:`benchmarks.bilevel_suite`: chains of jaxbo, and their rivals."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jaxbo
from benchmarks import suite_plain as plain
from benchmarks.suite_plain import NUM_STEPS, Rates, draw
from benchmarks.suite_problems import FiniteSum, num_examples

CG_STEPS = 5


class Method(NamedTuple):
  """A line of the tables.

  Attributes:
    name: for the table.
    make: ``make(problem, rates) -> (init, step)``, as in :mod:`benchmarks.suite_plain`.
    calls: ``(inner, outer)``: gradients of the losses and products with second derivatives in a
      step, each of a minibatch, or of all examples with ``whole``.
    whole: whether a step takes all examples.
    restarts: whether one step in a period takes all examples, once.
  """

  name: str
  make: Callable[[FiniteSum, Rates], Any]
  calls: tuple[int, int]
  whole: bool = False
  restarts: bool = False

  @property
  def ours(self) -> bool:
    """Whether it is made of jaxbo."""
    return self.name.startswith("jaxbo")

  def passes(self, problem: FiniteSum) -> float:
    """Calls in a step, in those of one gradient of both losses over all examples."""
    both = (problem.train, problem.val)
    n, m = map(num_examples, both)
    sizes = (n, m) if self.whole else problem.sizes
    one = sum(call * size for call, size in zip(self.calls, sizes, strict=True)) / (n + m)
    if not self.restarts:
      return one
    every = plain.period(problem)
    return (one * (every - 1) + (3 * n + m) / (n + m)) / every


def batches_of(problem: FiniteSum) -> dict[str, int]:
  """How many minibatches both losses have."""
  n, m = (num_examples(data) for data in (problem.train, problem.val))
  return {
    "num_batches": n // problem.sizes[0],
    "num_outer_batches": m // problem.sizes[1],
  }


def whole_of(stream: Any) -> Any:
  """All examples of both losses."""
  return stream.step.args[0]


def online(outer: Callable[..., Any], restarts: bool = False):
  """A method that moves both levels; ``outer(problem, rates)``."""

  def make(problem, rates):
    loop = jaxbo.online_loop(problem.outer_loss, None, outer(problem, rates))

    def init():
      like = jaxbo.online.OnlineBatch(None, None)
      state = loop.init(jnp.asarray(problem.x), jnp.asarray(problem.y), batch=like)
      return {"x": state.x, "y": state.y, "loop": state, "t": jnp.int32(0)}

    def step(stream, state):
      state, batch = draw(stream, state)
      play = lambda: loop.step(state["loop"], batch)[0]
      if restarts:
        again = lambda: loop.step(state["loop"], whole_of(stream), restart=True)[0]
        after = jax.lax.cond(state["t"] % plain.period(problem) == 0, again, play)
      else:
        after = play()
      return {**state, "x": after.x, "y": after.y, "loop": after, "t": state["t"] + 1}

    return init, step

  return make


def in_loop(parts: Callable[..., Any], num_steps: int = 1, whole: bool = False):
  """An inner solver and a response; ``parts(problem, rates) -> (inner, outer)``."""

  def make(problem, rates):
    inner, outer = parts(problem, rates)
    begin, play = jaxbo.bilevel_loop(problem.outer_loss, inner, outer)

    def init():
      state = begin(jnp.asarray(problem.x), jnp.asarray(problem.y))
      return {"x": state.x, "y": state.solution.params, "loop": state}

    def step(stream, state):
      if whole:
        after = play(state["loop"], *whole_of(stream))[0]
      elif num_steps == 1:
        state, batch = draw(stream, state)
        after = play(state["loop"], batch.train, batch.val)[0]
      else:
        state, batches = draw(stream, state, num_steps)
        state, last = draw(stream, state)
        after = play(state["loop"], batches.train, last.val, linear_batch=last.train)[0]
      return {**state, "x": after.x, "y": after.solution.params, "loop": after}

    return init, step

  return make


def saba(problem: FiniteSum, rates: Rates):
  """SABA."""
  rho, gamma, _ = rates
  options = {"linear_learning_rate": rho, **batches_of(problem)}
  return jaxbo.saba(gamma, rho, problem.inner_loss, **options)


def srba(problem: FiniteSum, rates: Rates):
  """SRBA."""
  rho, gamma, _ = rates
  losses = problem.inner_loss, problem.outer_loss
  return jaxbo.srba(gamma, rho, *losses, linear_learning_rate=rho)


def f2sa(problem: FiniteSum, rates: Rates):
  """F2SA with the rising multiplier of the plain one."""
  rho, gamma, _ = rates
  multiplier = lambda count: 1 + plain.MULTIPLIER_GROWTH * count
  inner_rate = lambda count: rho / multiplier(count)
  options = {"multiplier": multiplier, "inner_optimizer": optax.sgd(rho)}
  return jaxbo.f2sa(gamma, inner_rate, problem.inner_loss, **options)


def sgd_solver(problem: FiniteSum, rho: Any, num_steps: int, **options: Any):
  """Steps of SGD."""
  return jaxbo.inner_solver(problem.inner_loss, optax.sgd(rho), num_steps, **options)


def soba(problem: FiniteSum, rates: Rates):
  """SOBA."""
  rho, gamma, _ = rates
  inner = sgd_solver(problem, rho, 1)
  return inner, jaxbo.soba(gamma, inner, rho, inner_params=problem.y)


def amigo(problem: FiniteSum, rates: Rates):
  """AmIGO."""
  rho, gamma, _ = rates
  inner = sgd_solver(problem, rho, NUM_STEPS, per_step_batches=True)
  return inner, jaxbo.amigo(gamma, inner, NUM_STEPS, rho, inner_params=problem.y)


def stocbio(problem: FiniteSum, rates: Rates):
  """StocBiO."""
  rho, gamma, _ = rates
  inner = sgd_solver(problem, rho, NUM_STEPS, per_step_batches=True)
  return inner, jaxbo.stocbio(gamma, inner, NUM_STEPS, rho)


def implicit(problem: FiniteSum, inner: Any):
  """The response by warm conjugate gradients."""
  solver = jaxbo.conjugate_gradient(CG_STEPS, warm_start=True)
  return jaxbo.add_implicit_response(inner, solver, inner_params=problem.y)


def quasi_newton(problem: FiniteSum, rates: Rates):
  """AID with CG on all examples, L-BFGS at both levels, without line searches."""
  inner_optimizer = optax.chain(optax.scale_by_lbfgs(), optax.scale_by_learning_rate(1.0))
  inner = jaxbo.inner_solver(problem.inner_loss, inner_optimizer, 5, warm_start="all")
  step = optax.clip_by_global_norm(5.0), optax.scale_by_learning_rate(rates.relative)
  return inner, optax.chain(implicit(problem, inner), optax.scale_by_lbfgs(), *step)


FULL = (5 + 1 + CG_STEPS + 1 + 1, 1)
METHODS = [
  Method("jaxbo SABA", online(saba), (3, 1)),
  Method("jaxbo SRBA", online(srba, restarts=True), (6, 2), restarts=True),
  Method("jaxbo SOBA", in_loop(soba), (5, 1)),
  Method("jaxbo AmIGO", in_loop(amigo, NUM_STEPS), (2 * NUM_STEPS + 3, 1)),
  Method("jaxbo stocBiO", in_loop(stocbio, NUM_STEPS), (2 * NUM_STEPS + 2, 1)),
  Method("jaxbo F2SA", online(f2sa), (3, 1)),
  Method("plain SABA", plain.saba, (3, 1)),
  Method("plain SOBA", plain.soba, (3, 1)),
  Method("plain F2SA", plain.f2sa, (3, 1)),
  Method("plain SRBA", plain.srba, (6, 2), restarts=True),
  Method("plain AmIGO", plain.amigo, (2 * NUM_STEPS + 2, 1)),
  Method("plain stocBiO", plain.stocbio, (2 * NUM_STEPS + 2, 1)),
  Method("jaxbo AID, L-BFGS, all data", in_loop(quasi_newton, whole=True), FULL, whole=True),
]
