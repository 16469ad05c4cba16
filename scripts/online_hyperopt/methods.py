r"""Online bilevel methods side by side, each a loop of :func:`jaxbo.online_loop`.

SOBOW, OAGD and online gradient descent share one inner step of plain gradient descent, of which
OAGD takes one on each batch in its window. OAGD's published settings for loss tuning (window 5,
:math:`\gamma = 0.9`, a Neumann series of 5 products with step 0.5, momentum 0.9, weight decay 1e-4,
learning rates 0.1 and 1e-3 with their warm-up and decay, :math:`x` at rest for 80 of 400 rounds)
are a method of their own. Each method that moves :math:`x` stands beside one that does not and has
the same inner steps, so that what :math:`x` contributes can be told from what they do.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

import jaxbo
from scripts.online_hyperopt.problems import Problem

DECAY = 0.9  # of the window, for SOBOW and OAGD alike
LINEAR_STEPS = 5  # of conjugate gradient, and products of the Neumann series
CORRECTION = 0.9  # of SOGD, the least of those that its paper tries
PUBLISHED_ROUNDS = 400  # what the published schedules are made for


class Rates(NamedTuple):
  """What is tuned: the learning rates of both levels, and the damping of conjugate gradient."""

  inner: Any
  outer: Any
  damping: Any = 0.0


class Setting(NamedTuple):
  """What a method is made for; ``y`` are inner parameters or their shapes."""

  problem: Problem
  rates: Rates
  window: int
  y: Any
  rounds: int


class Method(NamedTuple):
  """A method; ``make`` gives the arguments of :func:`jaxbo.online_loop`."""

  label: str
  make: Callable[[Setting], dict[str, Any]]
  window: int | None = None  # the only one that it has, 1 if it has no use for one
  inner_per_window: bool = False  # The window counts for inner steps alone: 1 makes it another.
  responds: bool = False  # It moves x by more than df/dx.
  damped: bool = False  # It has a linear solver to damp.
  published: bool = False  # It has the published settings, and so no rates of its own.
  hypergradients: int = (
    0  # Evaluations in a round, for each batch in the window if ``re_evaluates``.
  )
  re_evaluates: bool = False


class Variant(NamedTuple):
  """A method with a window."""

  method: str
  window: int

  @property
  def label(self) -> str:
    """Its name in tables."""
    method = METHODS[self.method]
    return method.label if method.window == 1 else f"{method.label}, K={self.window}"

  @property
  def hypergradients(self) -> int:
    """How many it evaluates in a round, once its window is full."""
    method = METHODS[self.method]
    return method.hypergradients * (self.window if method.re_evaluates else 1)


def _inner(of: Setting, num_steps: int = 1) -> jaxbo.InnerSolver:
  return jaxbo.inner_solver(of.problem.inner_loss, optax.sgd(of.rates.inner), num_steps)


def _replay(of: Setting) -> dict[str, Any]:
  return {"window": of.window, "replay": True}


def _conjugate_gradient(of: Setting, *, warm_start: bool) -> jaxbo.bilevel.LinearSolver:
  return jaxbo.conjugate_gradient(LINEAR_STEPS, 0.0, of.rates.damping, warm_start=warm_start)


def _ogd(of: Setting) -> dict[str, Any]:
  return {"inner": _inner(of), "outer": jaxbo.ogd(of.rates.outer, project=of.problem.project)}


def _ogd_replay(of: Setting) -> dict[str, Any]:
  return _ogd(of) | _replay(of)


def _sobow(of: Setting, num_steps: int = 1) -> dict[str, Any]:
  inner = _inner(of, num_steps)
  outer = jaxbo.sobow(
    of.rates.outer,
    inner,
    window=of.window,
    decay=DECAY,
    linear_solver=_conjugate_gradient(of, warm_start=True),
    inner_params=of.y,
    project=of.problem.project,
  )
  return {"inner": inner, "outer": outer}


def _sobow_steps(of: Setting) -> dict[str, Any]:
  """As many inner steps as OAGD has, but all on the batch of the round."""
  return _sobow(of, num_steps=of.window)


def _sogd(of: Setting) -> dict[str, Any]:
  """Constant rates, the linear system's that of ``y``, as in the comparison of the paper."""
  outer = jaxbo.sogd(
    of.rates.outer,
    of.rates.inner,
    of.problem.inner_loss,
    of.problem.outer_loss,
    linear_learning_rate=of.rates.inner,
    correction=CORRECTION,
    project_outer=of.problem.project,
  )
  return {"inner": None, "outer": outer}


def _oagd(of: Setting) -> dict[str, Any]:
  inner = _inner(of)
  outer = jaxbo.oagd(
    of.rates.outer,
    inner,
    of.problem.outer_loss,
    decay=DECAY,
    linear_solver=_conjugate_gradient(of, warm_start=False),
    project=of.problem.project,
  )
  return {"inner": inner, "outer": outer, **_replay(of)}


# -- The published code of OAGD.


def published_rates(rounds: int) -> tuple[np.ndarray, np.ndarray, int]:
  """The learning rates of each round inside and outside, and the first round that moves ``x``.

  For 400 rounds: 0.1, from a fifth of it in 5 rounds, divided by 10 in rounds 220 and 260; 1e-3
  from round 80, from a tenth of it in 10 rounds, divided by 10 in rounds 180 and 220. For another
  number of rounds the milestones move with it.
  """
  at = lambda milestone: milestone * rounds // PUBLISHED_ROUNDS
  t, start = np.arange(rounds), at(80)

  def rate(largest, first, warm_up, milestones):
    falls = sum((t >= at(milestone)).astype(int) for milestone in milestones)
    age = t - first
    return largest * np.where(age < warm_up, (age + 1) / warm_up, 0.1**falls)

  inner, outer = rate(0.1, 0, 5, (220, 260)), rate(1e-3, start, 10, (180, 220))
  return inner, np.where(t < start, 0.0, outer), start


def _sgd(rates: np.ndarray) -> optax.GradientTransformation:
  """With momentum and weight decay; the rates are those of its steps."""
  table = lambda count: jnp.asarray(rates, jnp.float32)[jnp.minimum(count, len(rates) - 1)]
  return optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(table, momentum=0.9))


def _published_inner(of: Setting) -> jaxbo.InnerSolver:
  rates, _, _ = published_rates(of.rounds)
  # The optimizer counts steps, of which a round has as many as there are batches in the window.
  by_step = np.repeat(rates, np.minimum(np.arange(of.rounds) + 1, of.window))
  return jaxbo.inner_solver(of.problem.inner_loss, _sgd(by_step), 1)


def _published_series(matvec, b, x0):
  """The Neumann series to its end: :func:`jaxbo.neumann` stops where it begins to diverge."""
  del x0
  term = total = b
  for _ in range(LINEAR_STEPS):
    term = optax.tree.sub(term, optax.tree.scale(0.5, matvec(term)))
    total = optax.tree.add(total, term)
  return optax.tree.scale(0.5, total), None


def _ogd_published(of: Setting) -> dict[str, Any]:
  return {"inner": _published_inner(of), "outer": jaxbo.ogd(0.0)}


def _ogd_replay_published(of: Setting) -> dict[str, Any]:
  return _ogd_published(of) | _replay(of)


def _oagd_published(of: Setting) -> dict[str, Any]:
  inner = _published_inner(of)
  _, by_round, start = published_rates(of.rounds)
  started: Any = lambda step, **_: step >= start
  response = jaxbo.add_implicit_response(inner, _published_series, condition="gradient")
  outer = optax.chain(
    jaxbo.average_over_batches(response, of.problem.outer_loss, decay=DECAY),
    optax.conditionally_mask(_sgd(by_round[start:]), started),
  )
  return {"inner": inner, "outer": outer, **_replay(of)}


METHODS = {
  "ogd": Method("OGD", _ogd, window=1),
  "sobow": Method("SOBOW", _sobow, responds=True, damped=True, hypergradients=1),
  "sobow_steps": Method(
    "SOBOW, K steps", _sobow_steps, inner_per_window=True, responds=True, damped=True,
    hypergradients=1,
  ),
  "sogd": Method("SOGD", _sogd, window=1, responds=True, hypergradients=2),
  "ogd_replay": Method("OGD, replay", _ogd_replay, inner_per_window=True),
  "oagd": Method(
    "OAGD", _oagd, responds=True, damped=True, hypergradients=1, re_evaluates=True
  ),
  "ogd_published": Method("OGD, published", _ogd_published, window=1, published=True),
  "ogd_replay_published": Method(
    "OGD, published, replay", _ogd_replay_published, window=5, published=True
  ),
  "oagd_published": Method(
    "OAGD, published", _oagd_published, window=5, responds=True, published=True,
    hypergradients=1, re_evaluates=True,
  ),
}  # fmt: skip
