r"""Four small bilevel problems with closed forms, and every method on them.

T1 and T2 have a flat inner direction, T3 has many outer minima, T4 many inner minima:

* T1: :math:`g = \frac12 y_1^2 - x y_1` is minimal at :math:`y_1 = x` whatever :math:`y_2` is;
  :math:`f = \frac12 (x - y_2)^2 + \frac12 (y_1 - 1)^2` is zero at
  :math:`x = y_1 = y_2 = 1`.
* T2: the same :math:`g`, and :math:`\frac12 (x - 3)^2` more in :math:`f`. Now the constraint
  pushes back: :math:`x = y_1 = y_2 = 2`, and without slack no finite multiplier exists.
* T3: :math:`y = -x` is the only inner minimum, and :math:`f(x, -x)` has three minima.
* T4: :math:`g = \sin(x + y - 2)` is minimal on the lines :math:`x + y = \frac32 \pi + 2 + 2 \pi k`,
  of which the one with :math:`k = 0` passes nearest to the minimum (2, 4) of
  :math:`f = (x - 2)^2 + (y - 4)^2`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd

import jaxbo
from scripts.common.table import Table
from scripts.common.task import Cell, Row, Spent, Task
from scripts.multiple_minima import loops
from scripts.multiple_minima.loops import Loop
from scripts.multiple_minima.methods import LABELS, RESPONSES


class Toy(NamedTuple):
  r"""A problem and how it is run.

  The rates were chosen by hand while looking at the runs: they show what can happen. Primal steps
  are from the smoothness. What was changed after a first look: the starts of T3 (from (1.6, 0),
  V-PBGD, F2SA and BOME went to another minimum), PDBO's steps (plain ones diverged on T2 and T3),
  its rate of the multiplier on T4 (at 20 it stayed in the nearest valley), and V-PBGD's multiplier
  (constant, it stayed there too). BOME has the published rate and was not changed.
  """

  title: str
  inner_loss: Callable[[Any, Any], jax.Array]  # All three are of (x, y).
  outer_loss: Callable[[Any, Any], jax.Array]
  gap: Callable[[Any, Any], jax.Array]  # The inner loss above its least value, exactly.
  start: tuple[Any, Any]
  optimum: tuple[Any, Any]
  inner: float  # SGD's rate for the lower value and for inner runs, about 1 / L_g.
  num_steps: int  # SGD's steps in one update; methods with a response have RESPONSE_STEPS.
  smoothness: tuple[float, float]  # (L_f, L_h) of jaxbo.scale_by_lagrangian_smoothness, for PDBO.
  dual: float  # The rate of PDBO's multiplier. A slow multiplier lets f pull first.
  slack: float = 1e-3  # Of PDBO.
  num_updates: int = 8000
  box: tuple[float, float] = (-10.0, 10.0)  # Where x stays.


RESPONSE_STEPS, RESPONSE_RATE = 20, 0.05
MULTIPLIER = 10.0  # Where the penalties of V-PBGD and F2SA end.
_FLAT = Toy(
  "T1: a flat inner direction",
  inner_loss=lambda x, y: 0.5 * y[0] ** 2 - x * y[0],
  outer_loss=lambda x, y: 0.5 * (x - y[1]) ** 2 + 0.5 * (y[0] - 1) ** 2,
  gap=lambda x, y: 0.5 * (y[0] - x) ** 2,
  start=(3.0, (0.0, 0.0)),
  optimum=(1.0, (1.0, 1.0)),
  inner=1.0,
  num_steps=1,
  smoothness=(3.0, 2.0),
  dual=1.0,
  num_updates=4000,
)
_many_outer = lambda x, y: (y + x) ** 2 + x * jnp.sin(y + x) ** 2  # Zero where it is least.
TOYS = {
  "T1": _FLAT,
  "T2": _FLAT._replace(
    title="T2: the constraint is active",
    outer_loss=lambda x, y: _FLAT.outer_loss(x, y) + 0.5 * (x - 3) ** 2,
    optimum=(2.0, (2.0, 2.0)),
    dual=2.0,
    slack=5e-3,
    num_updates=8000,
  ),
  "T3": Toy(
    "T3: many outer minima",
    inner_loss=_many_outer,
    outer_loss=lambda x, y: (
      jnp.cos(4 * y + 2) / (1 + jnp.exp(2 - 4 * x)) + 0.5 * jnp.log((4 * x - 2) ** 2 + 1)
    ),
    gap=_many_outer,
    start=(1.8, -1.8),
    optimum=(1.215145, -1.215145),
    inner=0.1,
    num_steps=5,
    smoothness=(20.0, 20.0),
    dual=2.0,
    box=(0.0, 3.0),
  ),
  "T4": Toy(
    "T4: many inner minima",
    inner_loss=lambda x, y: jnp.sin(x + y - 2),
    outer_loss=lambda x, y: (x - 2) ** 2 + (y - 4) ** 2,
    gap=lambda x, y: jnp.sin(x + y - 2) + 1,
    start=(6.0, 6.0),
    optimum=(2.356194, 4.356194),
    inner=0.5,
    num_steps=2,
    smoothness=(4.0, 4.0),
    dual=0.5,
  ),
}


def make_loop(method: str, toy: Toy) -> Loop:
  """The method on the toy."""
  loss = lambda x, y, batch: toy.inner_loss(x, y)
  outer_loss = lambda x, y, batch: toy.outer_loss(x, y)
  box = lambda x: optax.projections.projection_box(x, *toy.box)
  sgd = optax.sgd(toy.inner)
  if method in RESPONSES:
    inner = jaxbo.inner_solver(loss, sgd, RESPONSE_STEPS)
    head = {
      "itd": lambda: jaxbo.add_unrolled_response(inner),
      # Without damping, conjugate gradient stops at a flat direction and says so.
      "aid": lambda: jaxbo.add_implicit_response(inner, jaxbo.conjugate_gradient(10, damping=1e-3)),
      # With one outer parameter a random sign has no variance.
      "esj": lambda: jaxbo.add_es_response(inner, 1, 1e-3, directions="rademacher"),
    }[method]()
    return loops.response_loop(outer_loss, inner, optax.chain(head, optax.sgd(RESPONSE_RATE)))
  common: dict[str, Any] = {"inner_optimizer": sgd, "project_outer": box}
  ramp = lambda start: optax.linear_schedule(start, MULTIPLIER, toy.num_updates // 4)
  if method == "bome":
    tx = jaxbo.bome(0.01, loss, num_steps=10, **common)
  elif method == "v_pbgd":
    tx = jaxbo.v_pbgd(0.1, loss, num_steps=toy.num_steps, multiplier=ramp(0.0), **common)
  elif method == "f2sa":
    common |= {"num_steps": toy.num_steps, "multiplier": ramp(1.0), "alternate": 4}
    tx = jaxbo.f2sa(0.2 / MULTIPLIER, 0.2 / MULTIPLIER, loss, **common)
  else:
    common |= {"num_steps": toy.num_steps, "slack": toy.slack, "dual_learning_rate": toy.dual}
    head = jaxbo.add_primal_dual_penalty(loss, extrapolation=1.0, **common)
    if method == "proximal_pdbo":
      head = jaxbo.add_proximal_terms(head, outer_weight=0.5, constraint_weight=0.1, period=20)
    f, h = toy.smoothness
    head = jaxbo.scale_by_lagrangian_smoothness(head, outer_smoothness=f, constraint_smoothness=h)
    tx = optax.chain(head, optax.sgd(1.0), jaxbo.project(outer=box))
  return loops.value_function_loop(outer_loss, tx)


class Trajectory(NamedTuple):
  """Where a method went before every update and at the end, in float64."""

  params: jaxbo.Bilevel  # [num_updates + 1, ...].
  gap: Any  # [num_updates + 1].
  dual: Any  # The multiplier of every update, [num_updates]; NaN for methods without one.


def run(method: str, toy: Toy) -> Trajectory:
  """Runs a method from the toy's start."""
  with jax.enable_x64(True):
    loop = make_loop(method, toy)

    def update(state, _):
      new = loop.step(state, None, None)
      return new, (loop.params(state), toy.gap(*loop.params(state)), loops.dual_of(new))

    @jax.jit
    def whole(start):
      state, (params, gap, dual) = jax.lax.scan(update, loop.init(*start), length=toy.num_updates)
      end = loop.params(state)
      append = lambda a, b: jnp.concatenate([a, b[None]])
      return Trajectory(jax.tree.map(append, params, end), append(gap, toy.gap(*end)), dual)

    start = jax.tree.map(jnp.float64, (toy.start[0], jnp.asarray(toy.start[1])))
    return jax.tree.map(np.asarray, whole(start))


class OnToy(Task):
  """A method on a toy, in one step; its state is where the method went, in single precision."""

  def __init__(self, method: str, toy: str):
    self.method, self.toy = method, TOYS[toy]
    num, zeros = self.toy.num_updates, lambda *shape: jnp.zeros(shape, jnp.float32)
    params = jaxbo.Bilevel(*(zeros(num + 1, *np.shape(part)) for part in self.toy.start))
    self.state = Trajectory(params, gap=zeros(num + 1), dual=zeros(num))

  def step(self, state: Any, t: int) -> tuple[Any, Any]:
    """Does all updates."""
    trajectory = run(self.method, self.toy)
    return jax.tree.map(jnp.float32, trajectory), trajectory

  def evaluate(self, state: Any, told: list[Any]) -> Row:
    """The distance to the solution, and the gap, at the end."""
    params, gap, _ = told[-1]
    flat = lambda parts: np.concatenate([np.ravel(part) for part in parts])
    miss = flat(leaf[-1] for leaf in params) - flat(self.toy.optimum)
    return {"distance": float(np.linalg.norm(miss)), "gap": float(gap[-1])}

  def result(self, state: Any, spent: Spent) -> Row:
    """The same."""
    return {name: spent.lines[-1][name] for name in ("distance", "gap")}


def cell(toy: str, method: str) -> Cell:
  """A method on a toy."""
  make = functools.partial(OnToy, method, toy)
  return Cell({"toy": toy, "method": method}, make, 1, f"{toy}, {LABELS[method]}")


def table(rows: pd.DataFrame) -> Table:
  """For each method: the distance to the solution and the gap at the end, toy by toy."""
  names = list(dict.fromkeys(rows["toy"]))
  columns = ["method", *(f"{toy} {what}" for toy in names for what in ("distance", "gap"))]
  body = []
  for method, mine in rows.groupby("method", sort=False):
    ends = zip(mine["toy"], mine["distance"], mine["gap"], strict=True)
    cells = {toy: [f"{distance:.3f}", f"{gap:.1e}"] for toy, distance, gap in ends}
    body.append([LABELS[str(method)], *(text for toy in names for text in cells.get(toy, "--"))])
  title = "Toys: distance to the solution, and gap g(x, y) - g*(x), at the end"
  return Table(title, columns, body)
