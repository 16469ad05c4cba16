"""P3, the drifting quadratic, of which P1, P2, P4 and P8 are instances; in float64.

``g_t = y'Ay/2 - y'(Bx + b_t)`` and ``f_t = |y - c_t|^2/2 + rho |x - e_t|^2/2``. The matrices are
part of the batches, so that one compiled run serves all instances of the same shape.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbo


class Drifting(NamedTuple):
  """An instance; ``b``, ``c`` and ``e`` have a leading axis, the rounds."""

  A: Any
  B: Any
  b: Any
  c: Any
  e: Any
  rho: Any

  def stream(self):
    """The stream of its rounds."""
    return jax.tree_util.Partial(_round, jax.tree.map(jnp.asarray, self))

  def minimum(self, x, t):
    """``y*_t(x)``, in NumPy."""
    return np.linalg.solve(self.A, self.B @ x + self.b[t])

  def gradient(self, x, t):
    """``grad F_t(x)``, in NumPy."""
    v = np.linalg.solve(self.A, self.minimum(x, t) - self.c[t])
    return self.rho * (x - self.e[t]) + self.B.T @ v

  def value(self, x, t):
    """``F_t(x)``, in NumPy."""
    miss, distance = self.minimum(x, t) - self.c[t], x - self.e[t]
    return 0.5 * miss @ miss + 0.5 * self.rho * distance @ distance

  def hessian(self):
    """The Hessian of all ``F_t``."""
    jacobian = np.linalg.solve(self.A, self.B)
    return self.rho * np.eye(self.B.shape[1]) + jacobian.T @ jacobian

  def optimum(self, t):
    """``x*_t``."""
    constant = np.linalg.solve(self.A, self.b[t]) - self.c[t]
    right = self.rho * self.e[t] - np.linalg.solve(self.A, self.B).T @ constant
    return np.linalg.solve(self.hessian(), right)

  def variation(self, radius):
    """``sup |F_t(x) - F_{t-1}(x)|`` over the ball ``|x| <= radius``, exactly, for t >= 1.

    The difference is affine: its slope is that of the gradients, its constant that at zero.
    """
    zero = np.zeros(self.B.shape[1])
    sup = []
    for t in range(1, len(self.b)):
      slope = self.gradient(zero, t) - self.gradient(zero, t - 1)
      constant = self.value(zero, t) - self.value(zero, t - 1)
      sup.append(radius * np.linalg.norm(slope) + abs(constant))
    return np.array(sup)

  def path(self, power):
    """``sup |y*_t(x) - y*_{t-1}(x)|^p`` for t >= 1."""
    change = np.linalg.solve(self.A, np.diff(self.b, axis=0).T)
    return np.linalg.norm(change, axis=0) ** power


def _round(problem, key, t):
  del key
  train = (problem.A, problem.B, problem.b[t])
  return train, (problem.c[t], problem.e[t], problem.rho)


def inner_loss(x, y, batch):
  A, B, b = batch
  return 0.5 * y @ A @ y - y @ (B @ x + b)


def outer_loss(x, y, batch):
  c, e, rho = batch
  return 0.5 * jnp.sum((y - c) ** 2) + 0.5 * rho * jnp.sum((x - e) ** 2)


def hypergradient(x, batch):
  """``grad F_t`` in JAX, for the regret."""
  (A, B, b), (c, e, rho) = batch.train, batch.val
  y = jnp.linalg.solve(A, B @ x + b)
  return rho * (x - e) + B.T @ jnp.linalg.solve(A, y - c)


def trace(round):
  """What the proofs look at, in each round."""
  state = round.after.outer_state
  window = optax.tree.get(state, "gradient_window")
  return {
    "x": round.x,
    "next_x": round.after.x,
    "next_y": round.after.solution.params,
    "h": None if window is None else window.get(0)[0],
    "v": optax.tree.get(state, "linear_solution"),
  }


STATIC = "method window hyper_at normalization cg box num_rounds regret".split()  # noqa: SIM905


@functools.partial(jax.jit, static_argnames=STATIC)
def play(
  stream,
  x,
  y,
  alpha,
  beta,
  decay=1.0,
  *,
  num_rounds,
  method="sobow",
  window=1,
  hyper_at="after",
  normalization="full",
  cg=(1, True),
  box=None,
  regret=None,
):
  """One run of ``num_rounds`` rounds; returns the state and what :func:`trace` saw."""
  inner = jaxbo.inner_solver(inner_loss, optax.sgd(alpha), 1)
  options = {
    "decay": decay,
    "normalization": normalization,
    "linear_solver": jaxbo.conjugate_gradient(cg[0], warm_start=cg[1]),
    "inner_params": y,
    "project": None if box is None else lambda x: jnp.clip(x, -box, box),
  }
  memory = None
  if method == "sobow":
    outer = jaxbo.sobow(beta, inner, window=window, **options)
  else:
    outer, memory = jaxbo.oagd(beta, inner, outer_loss, **options), window
  metrics: dict[str, Any] = {"trace": trace}
  if regret:
    for at in ("own", "current"):
      metrics[at] = jaxbo.online.local_regret(hypergradient, window=regret, decay=decay, at=at)
  loop = jaxbo.online_loop(
    outer_loss, inner, outer, hyper_at=hyper_at, window=memory, metrics=metrics
  )
  state, info = loop.run(loop.init(x, y, stream), stream, num_rounds)
  return state, info.metrics


def p1(num_rounds=6, rho=0.5):
  """The scalar golden trace."""
  t = np.arange(1.0, num_rounds + 1)[:, None]
  a = np.array([[2.0]])
  return Drifting(a, a, 0.2 * t, 1 + 0.2 * t, 0 * t, np.float64(rho))


def p2(num_rounds=6):
  """The golden trace in two dimensions."""
  t = np.arange(1.0, num_rounds + 1)[:, None]
  c = np.hstack([np.ones_like(t), np.cos(0.1 * t)])
  A = np.array([[2.0, 1.0], [1.0, 3.0]])
  return Drifting(A, np.eye(2), np.hstack([0.1 * t, -0.05 * t]), c, 0 * c, np.float64(0.1))


def p4(num_rounds):
  """Example B.11 of 2511.01126."""
  t = np.arange(1.0, num_rounds + 1)[:, None]
  one, a, b = np.eye(1), 1 / t, 1 / np.sqrt(t)
  return Drifting(one, one, -b, b, -2 * a, np.float64(1.0))


def p3(num_rounds, drift=None, *, seed=0, outer=3, inner=5):
  """A random instance; ``drift(t)`` moves ``b`` and ``c``, from t = 1."""
  rng = np.random.default_rng(seed)
  basis, _ = np.linalg.qr(rng.normal(size=(inner, inner)))
  A = basis @ np.diag(np.linspace(0.5, 2.0, inner)) @ basis.T
  B = rng.normal(size=(inner, outer)) / np.sqrt(outer)
  ones, t = np.ones((num_rounds, 1)), np.arange(1.0, num_rounds + 1)[:, None]
  moved = 0 * t if drift is None else drift(t)
  b, c = (ones * rng.normal(size=inner) + moved * rng.normal(size=inner) for _ in range(2))
  return Drifting(A, B, b, c, ones * rng.normal(size=outer), np.float64(0.5))


def p8(c):
  """``F_t = (x - c_t)^2 / 2`` with an inner problem that one step of 1 solves."""
  c, one = np.asarray(c)[:, None], np.eye(1)
  return Drifting(one, one, 0 * c, c, 0 * c, np.float64(0.0))
