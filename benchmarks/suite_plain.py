"""Stochastic bilevel methods as their papers write them, in plain JAX on arrays.

The rivals of :mod:`benchmarks.bilevel_suite`: no part of jaxbo but the stream of minibatches. Each
is ``make(problem, rates) -> (init, step)``, with ``init() -> state``, a dictionary with ``x`` and
``y``, and ``step(stream, state) -> state``. ``v`` has the sign of the papers.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.suite_problems import FiniteSum, num_examples


class Rates(NamedTuple):
  """The rates of a run.

  Attributes:
    inner: of y and v.
    outer: of x.
    relative: that of x for an optimizer that measures curvature itself.
  """

  inner: jax.Array
  outer: jax.Array
  relative: jax.Array


NUM_STEPS = 10  # inner steps and products of the double loops
MULTIPLIER_GROWTH = 0.02


def draw(stream: Any, state: dict[str, Any], num: int | None = None):
  """The next round, or the next ``num`` rounds stacked, and the state after it."""
  if num is None:
    stream_state, batch = stream.step(state["stream"])
  else:
    stream_state, batch = jax.lax.scan(lambda s, _: stream.step(s), state["stream"], length=num)
  return {**state, "stream": stream_state}, batch


def inner_terms(problem: FiniteSum, x: Any, y: Any, v: Any, batch: Any):
  """The gradient of the inner loss, and its Hessian's and its mixed product with v."""
  gradient = jax.grad(problem.inner_loss, 1)
  value, pull_back = jax.vjp(lambda x, y: gradient(x, y, batch), x, y)
  cross, hessian = pull_back(v)
  return value, hessian, cross


def directions(problem: FiniteSum, z: Any, train: Any, val: Any):
  """The directions of x, y and v."""
  x, y, v = z
  gradient, hessian, cross = inner_terms(problem, x, y, v, train)
  of_x, of_y = jax.grad(problem.outer_loss, (0, 1))(x, y, val)
  return of_x + cross, gradient, of_y + hessian


def start(problem: FiniteSum, **more: Any) -> dict[str, Any]:
  """x, y and v, and what else a method keeps."""
  return {"x": problem.x, "y": problem.y, "v": jnp.zeros_like(problem.y), **more}


def moved(state: dict[str, Any], d: Any, rates: Rates) -> dict[str, Any]:
  """All three variables after a step."""
  rho, gamma, _ = rates
  new = {"x": state["x"] - gamma * d[0], "y": state["y"] - rho * d[1]}
  return {**state, **new, "v": state["v"] - rho * d[2]}


def soba(problem: FiniteSum, rates: Rates):
  """SOBA (2201.13409)."""

  def step(stream, state):
    state, batch = draw(stream, state)
    z = state["x"], state["y"], state["v"]
    return moved(state, directions(problem, z, batch.train, batch.val), rates)

  return lambda: start(problem), step


def saba(problem: FiniteSum, rates: Rates):
  """SABA (2201.13409)."""
  n, m = (
    num_examples(data) // size
    for data, size in zip((problem.train, problem.val), problem.sizes, strict=True)
  )

  def init():
    x, y = problem.x, problem.y
    zeros = lambda size, leaf: jnp.zeros((size, *leaf.shape), leaf.dtype)
    rows = [zeros(n, y), zeros(n, y), zeros(n, x), zeros(m, x), zeros(m, y)]
    return start(problem, rows=rows, means=[leaf[0] for leaf in rows])

  def step(stream, state):
    state, batch = draw(stream, state)
    x, y, v = state["x"], state["y"], state["v"]
    new = (
      *inner_terms(problem, x, y, v, batch.train),
      *jax.grad(problem.outer_loss, (0, 1))(x, y, batch.val),
    )
    rows, means, estimates = [], [], []
    for k, value in enumerate(new):
      size, index = (n, batch.extra.index) if k < 3 else (m, batch.extra.outer_index)
      change = value - state["rows"][k][index]
      estimates.append(change + state["means"][k])
      rows.append(state["rows"][k].at[index].set(value))
      means.append(state["means"][k] + change / size)
    gradient, hessian, cross, of_x, of_y = estimates
    state = {**state, "rows": rows, "means": means}
    return moved(state, (of_x + cross, gradient, of_y + hessian), rates)

  return init, step


def period(problem: FiniteSum) -> int:
  """Steps from one restart of SRBA to the next: two epochs of minibatches."""
  return 2 * num_examples(problem.train) // problem.sizes[0]


def srba(problem: FiniteSum, rates: Rates):
  """SRBA (2302.08766)."""

  def init():
    z = problem.x, problem.y, jnp.zeros_like(problem.y)
    return start(problem, last=z, d=tuple(map(jnp.zeros_like, z)), t=jnp.int32(0))

  def step(stream, state):
    state, batch = draw(stream, state)
    z = state["x"], state["y"], state["v"]
    train, val = stream.step.args[0]
    whole = lambda: directions(problem, z, train, val)

    def difference():
      now = directions(problem, z, batch.train, batch.val)
      then = directions(problem, state["last"], batch.train, batch.val)
      return tuple(a - b + c for a, b, c in zip(now, then, state["d"], strict=True))

    d = jax.lax.cond(state["t"] % period(problem) == 0, whole, difference)
    return moved({**state, "last": z, "d": d, "t": state["t"] + 1}, d, rates)

  return init, step


def inner_steps(problem: FiniteSum, x: Any, y: Any, batches: Any, rho: Any):
  """SGD, a batch a step."""
  gradient = jax.grad(problem.inner_loss, 1)
  body = lambda y, batch: (y - rho * gradient(x, y, batch), None)
  return jax.lax.scan(body, y, batches)[0]


def amigo(problem: FiniteSum, rates: Rates):
  """AmIGO (2111.14580) with gradient steps for the linear system."""

  def step(stream, state):
    rho, gamma, _ = rates
    state, batches = draw(stream, state, NUM_STEPS)
    y = inner_steps(problem, state["x"], state["y"], batches.train, rho)
    state, batches = draw(stream, state, NUM_STEPS)
    state, last = draw(stream, state)
    of_x, of_y = jax.grad(problem.outer_loss, (0, 1))(state["x"], y, last.val)

    def linear(v, batch):
      gradient = lambda y: jax.grad(problem.inner_loss, 1)(state["x"], y, batch)
      return v - rho * (jax.jvp(gradient, (y,), (v,))[1] + of_y), None

    v = jax.lax.scan(linear, state["v"], batches.train)[0]
    cross = inner_terms(problem, state["x"], y, v, last.train)[2]
    return {**state, "x": state["x"] - gamma * (of_x + cross), "y": y, "v": v}

  return lambda: start(problem), step


def stocbio(problem: FiniteSum, rates: Rates):
  """StocBiO (2010.07962): its Neumann series draws a batch for each product."""

  def step(stream, state):
    rho, gamma, _ = rates
    state, batches = draw(stream, state, NUM_STEPS)
    y = inner_steps(problem, state["x"], state["y"], batches.train, rho)
    state, batches = draw(stream, state, NUM_STEPS)
    state, last = draw(stream, state)
    of_x, of_y = jax.grad(problem.outer_loss, (0, 1))(state["x"], y, last.val)

    def series(carry, batch):
      term, total = carry
      gradient = lambda y: jax.grad(problem.inner_loss, 1)(state["x"], y, batch)
      term = term - rho * jax.jvp(gradient, (y,), (term,))[1]
      return (term, total + term), None

    (_, total), _ = jax.lax.scan(series, (of_y, of_y), batches.train)
    cross = inner_terms(problem, state["x"], y, -rho * total, last.train)[2]
    return {**state, "x": state["x"] - gamma * (of_x + cross), "y": y}

  return lambda: start(problem), step


def f2sa(problem: FiniteSum, rates: Rates):
  """F2SA (2301.10945), whose multiplier grows with the steps."""

  def init():
    return start(problem, z=jnp.array(problem.y), t=jnp.float32(0))

  def step(stream, state):
    rho, gamma, _ = rates
    state, batch = draw(stream, state)
    x, y, z = state["x"], state["y"], state["z"]
    multiplier = 1 + MULTIPLIER_GROWTH * state["t"]
    inner = jax.grad(problem.inner_loss, (0, 1))
    of_x, of_y = jax.grad(problem.outer_loss, (0, 1))(x, y, batch.val)
    lower = z - rho * inner(x, z, batch.train)[1]
    (at_y, down), at_z = inner(x, y, batch.train), inner(x, lower, batch.train)[0]
    return {
      **state,
      "x": x - gamma * (of_x + multiplier * (at_y - at_z)),
      "y": y - rho / multiplier * (of_y + multiplier * down),
      "z": lower,
      "t": state["t"] + 1,
    }

  return init, step
