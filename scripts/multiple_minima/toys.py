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

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbo
from scripts.multiple_minima import loops
from scripts.multiple_minima.loops import Loop

LABELS = {
  "pdbo": "PDBO",
  "proximal_pdbo": "Proximal-PDBO",
  "bome": "BOME",
  "v_pbgd": "V-PBGD",
  "f2sa": "F2SA",
  "itd": "ITD",
  "aid": "AID-CG",
  "esj": "ESJ",
}
RESPONSES = ("itd", "aid", "esj")


def flat_inner(x, y, batch):
  """T1 and T2."""
  del batch
  return 0.5 * y[0] ** 2 - x * y[0]


def flat_outer(p):
  """T1."""
  return 0.5 * (p.outer - p.inner[1]) ** 2 + 0.5 * (p.inner[0] - 1) ** 2


def active_outer(p):
  """T2."""
  return flat_outer(p) + 0.5 * (p.outer - 3) ** 2


def flat_gap(p):
  """The gap of T1 and T2, exactly."""
  return 0.5 * (p.inner[0] - p.outer) ** 2


def pbgd_inner(x, y, batch):
  """T3."""
  del batch
  return (y + x) ** 2 + x * jnp.sin(y + x) ** 2


def pbgd_outer(p):
  """T3."""
  x, y = p
  return jnp.cos(4 * y + 2) / (1 + jnp.exp(2 - 4 * x)) + 0.5 * jnp.log((4 * x - 2) ** 2 + 1)


def sine_inner(x, y, batch):
  """T4, with any number of inner dimensions."""
  del batch
  return jnp.sum(jnp.sin(x + y - 2))


def sine_outer(p):
  """T4."""
  return (p.outer - 2) ** 2 + jnp.sum((p.inner - 4) ** 2)


class Toy(NamedTuple):
  r"""A problem and how it is run.

  The rates were chosen by hand while looking at the runs: they show what can happen. Primal steps
  are from the smoothness. What was changed after a first look: the starts of T3 (from (1.6, 0),
  V-PBGD, F2SA and BOME went to another minimum), PDBO's steps (plain ones diverged on T2 and T3),
  its rate of the multiplier on T4 (at 20 it stayed in the nearest valley), and V-PBGD's multiplier
  (constant, it stayed there too). BOME has the published rate and was not changed.

  Attributes:
    title: what is to be seen.
    inner_loss: ``inner_loss(x, y, batch)``.
    outer_loss: ``outer_loss(params)``.
    gap: ``gap(params)``, the inner loss above its least value, exactly.
    start: ``(x, y)`` at the start.
    optimum: ``(x, y)`` at the solution.
    num_updates: of every method.
    inner: learning rate of SGD for the lower value and for inner runs, about :math:`1 / L_g`.
    num_steps: its steps in one update; methods with a response get :data:`RESPONSE_STEPS`.
    smoothness: :math:`(L_f, L_h)` for the step of PDBO, see
      ``jaxbo.scale_by_lagrangian_smoothness``.
    slack: of PDBO.
    dual: learning rate of its multiplier. A slow multiplier lets :math:`f` pull first.
    box: the projection of ``x``.
  """

  title: str
  inner_loss: Callable[..., jax.Array]
  outer_loss: Callable[[jaxbo.Bilevel], jax.Array]
  gap: Callable[[jaxbo.Bilevel], jax.Array]
  start: tuple[Any, Any]
  optimum: tuple[Any, Any]
  num_updates: int
  inner: float
  num_steps: int
  smoothness: tuple[float, float]
  slack: float
  dual: float
  box: tuple[float, float] = (-10.0, 10.0)


RESPONSE_STEPS, RESPONSE_RATE = 20, 0.05
MULTIPLIER = 10.0  # Where the penalties of V-PBGD and F2SA end.
_FLAT = Toy(
  "T1: a flat inner direction",
  flat_inner,
  flat_outer,
  flat_gap,
  start=(3.0, (0.0, 0.0)),
  optimum=(1.0, (1.0, 1.0)),
  num_updates=4000,
  inner=1.0,
  num_steps=1,
  smoothness=(3.0, 2.0),
  slack=1e-3,
  dual=1.0,
)
TOYS = {
  "T1": _FLAT,
  "T2": _FLAT._replace(
    title="T2: the constraint is active",
    outer_loss=active_outer,
    optimum=(2.0, (2.0, 2.0)),
    num_updates=8000,
    slack=5e-3,
    dual=2.0,
  ),
  "T3": Toy(
    "T3: many outer minima",
    pbgd_inner,
    pbgd_outer,
    lambda p: pbgd_inner(p.outer, p.inner, None),
    start=(1.8, -1.8),
    optimum=(1.215145, -1.215145),
    num_updates=8000,
    inner=0.1,
    num_steps=5,
    smoothness=(20.0, 20.0),
    slack=1e-3,
    dual=2.0,
    box=(0.0, 3.0),
  ),
  "T4": Toy(
    "T4: many inner minima",
    sine_inner,
    sine_outer,
    lambda p: sine_inner(p.outer, p.inner, None) + 1,
    start=(6.0, 6.0),
    optimum=(2.356194, 4.356194),
    num_updates=8000,
    inner=0.5,
    num_steps=2,
    smoothness=(4.0, 4.0),
    slack=1e-3,
    dual=0.5,
  ),
}


def make_loop(method: str, toy: Toy) -> Loop:
  """The method on the toy."""
  outer_loss = lambda x, y, batch: toy.outer_loss(jaxbo.Bilevel(x, y))
  box = lambda x: optax.projections.projection_box(x, *toy.box)
  loss, sgd = toy.inner_loss, optax.sgd(toy.inner)
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
    smooth_f, smooth_h = toy.smoothness
    head = jaxbo.scale_by_lagrangian_smoothness(
      head, outer_smoothness=smooth_f, constraint_smoothness=smooth_h
    )
    tx = optax.chain(head, optax.sgd(1.0), jaxbo.project(outer=box))
  return loops.value_function_loop(outer_loss, tx)


class Trajectory(NamedTuple):
  """Where a method went, ``[num_updates + 1, ...]`` in float64.

  Attributes:
    params: the parameters before every update and after the last.
    gap: the inner loss above its least value.
    dual: the multiplier of every update, ``[num_updates]``; NaN if there is none.
  """

  params: jaxbo.Bilevel
  gap: Any
  dual: Any


def run(method: str, toy: Toy) -> Trajectory:
  """Runs a method from the toy's start."""
  with jax.enable_x64(True):
    loop = make_loop(method, toy)

    def body(state, _):
      new = loop.step(state, None, None)
      return new, (loop.params(new), toy.gap(loop.params(new)), loops.dual_of(new))

    @jax.jit
    def whole(start):
      params, gap, dual = jax.lax.scan(body, loop.init(*start), length=toy.num_updates)[1]
      first = jaxbo.Bilevel(*start)
      join = lambda a, b: jnp.concatenate([jnp.asarray(a)[None], b])
      return jax.tree.map(join, first, params), join(toy.gap(first), gap), dual

    start = jax.tree.map(jnp.float64, (toy.start[0], jnp.asarray(toy.start[1])))
    return Trajectory(*jax.tree.map(np.asarray, whole(start)))
