r"""Bilevel streams with closed forms: what moves, by how much, and how methods play them.

.. math::
  g_t(x, y) = \tfrac12 y^\top \mathrm{diag}(a)\, y - y^\top (B x + b_t), \qquad
  f_t(y) = \sum_j \ell(y_j - c_{t,j} - \epsilon_{t,j})

so :math:`y_t^*(x) = (B x + b_t) / a` and :math:`\nabla F_t(x) = B^\top (\ell'(y_t^*(x) - c_t) / a)`
with the noise :math:`\epsilon` left out. The loss :math:`\ell(u) = 1 - \cos u` is not convex; since
:math:`B` is invertible, :math:`|F_t - F_{t-1}|` has its largest value over :math:`x` in each
coordinate by itself, :math:`2 |\sin(\delta_j / 2)|` with :math:`\delta` the change of
:math:`c_t - b_t / a`. With :math:`\ell(u) = u^2 / 2` methods are linear filters (``noise.py``).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbo

SIZE = 4  # of x and of y
LEAST, LARGEST = 0.5, 2.0  # entries of a: the curvature of the inner losses
STEP = 2 / (LEAST + LARGEST)  # of y, the best one for a constant target
PERIOD = 100  # of the sine, in rounds


class Drifting(NamedTuple):
  """Streams; ``a [..., size]``, ``B [..., size, size]``, the others ``[..., rounds, size]``."""

  a: Any
  B: Any
  b: Any
  c: Any
  noise: Any

  def variation(self) -> np.ndarray:
    r""":math:`\sup_x |F_t(x) - F_{t-1}(x)|` of the cosine, ``[..., rounds]``, 0 in the first."""
    change = np.diff(self.c - self.b / self.a[..., None, :], axis=-2)
    return _from_second(2 * np.abs(np.sin(change / 2)).sum(axis=-1))

  def path(self) -> np.ndarray:
    r""":math:`\sup_x \|y_t^*(x) - y_{t-1}^*(x)\|^2`, ``[..., rounds]``, 0 in the first round."""
    change = np.diff(self.b / self.a[..., None, :], axis=-2)
    return _from_second((change**2).sum(axis=-1))


def _from_second(values: np.ndarray) -> np.ndarray:
  return np.concatenate([np.zeros_like(values[..., :1]), values], axis=-1)


def _slowing(rng: np.random.Generator, t: np.ndarray) -> np.ndarray:
  del rng
  return np.cumsum(t**-0.5)


def _jumps(rng: np.random.Generator, t: np.ndarray) -> np.ndarray:
  return np.cumsum((rng.random(len(t)) < t**-0.5) * rng.normal(size=len(t)))


# How far along a direction the stream is in round t = 1, 2, ...
DRIFTS: Mapping[str, Callable[[np.random.Generator, np.ndarray], np.ndarray]] = {
  "static": lambda rng, t: 0 * t,
  "fading": lambda rng, t: t**-0.5,
  "slowing": _slowing,
  "jumps": _jumps,
  "sine": lambda rng, t: np.sin(2 * np.pi * t / PERIOD),
}
DESCRIPTIONS = {
  "static": "nothing moves",
  "fading": "at 1/√t from the end",
  "slowing": "steps of 1/√t",
  "jumps": "jumps, with probability 1/√t",
  "sine": f"sine, period {PERIOD}",
}


def draw(drift: str, seed: int, rounds: int) -> Drifting:
  """A stream without noise; both levels move, each in its own direction of length 1."""
  rng = np.random.default_rng([seed, 7])
  direction = lambda: (lambda v: v / np.linalg.norm(v))(rng.normal(size=SIZE))
  rotation = lambda: np.linalg.qr(rng.normal(size=(SIZE, SIZE)))[0]
  a = rng.permutation(np.linspace(LEAST, LARGEST, SIZE))
  B = rotation() @ np.diag(np.linspace(0.7, 1.4, SIZE)) @ rotation()
  start, of_b, of_c = rng.normal(size=SIZE), direction(), direction()
  along = DRIFTS[drift](rng, np.arange(1.0, rounds + 1))[:, None]
  return Drifting(a, B, along * of_b, start + along * of_c, np.zeros((rounds, SIZE)))


def stack(streams: Any) -> Drifting:
  """Streams side by side, in float32."""
  return Drifting(*(np.stack(leaves).astype(np.float32) for leaves in zip(*streams, strict=True)))


COSINE: tuple[Callable[..., Any], Callable[..., Any]] = (lambda u: 1 - jnp.cos(u), jnp.sin)
SQUARE: tuple[Callable[..., Any], Callable[..., Any]] = (lambda u: u**2 / 2, lambda u: u)


def make_loop(
  method: str,
  stream: Drifting,
  rate: Any,
  *,
  window: int,
  decay: float,
  step: float = STEP,
  loss: tuple[Callable[..., Any], Callable[..., Any]] = COSINE,
  metrics: Callable[[Callable[..., Any]], Mapping[str, Any]],
) -> jaxbo.online.Online:
  """The loop of ``"ogd"``, ``"sobow"`` or ``"oagd"``, all with one inner step a round.

  ``metrics(hypergradient)`` gives the metrics of the loop, of the true hypergradient.
  """
  a, B = stream.a, stream.B
  times = lambda matrix, vector: jnp.sum(matrix * vector[None], axis=1)  # Faster than a dot here.
  value, slope = loss

  def hypergradient(x, batch):
    return times(B.T, slope((times(B, x) + batch.train) / a - batch.extra) / a)

  inner_loss = lambda x, y, b: jnp.sum(a * y**2 / 2 - y * (times(B, x) + b))
  outer_loss = lambda x, y, c: jnp.sum(value(y - c)) + 0 * x[0]
  inner = jaxbo.inner_solver(inner_loss, optax.sgd(step), num_steps=1)
  cg = jaxbo.conjugate_gradient(len(a), warm_start=True)
  options: Any = {"decay": decay, "linear_solver": cg, "inner_params": jnp.zeros_like(a)}
  outer = {
    "ogd": lambda: jaxbo.ogd(rate),
    "sobow": lambda: jaxbo.sobow(rate, inner, window=window, **options),
    "oagd": lambda: jaxbo.oagd(rate, inner, outer_loss, **options),
  }[method]()
  memory = window if method == "oagd" else None
  told = metrics(hypergradient)
  return jaxbo.online_loop(outer_loss, inner, outer, window=memory, metrics=told)


def play(method: str, stream: Drifting, rate: Any, *, rounds: int, **settings: Any) -> Any:
  """The metrics of all rounds of one run from zero, leaves ``[rounds, ...]``."""
  loop = make_loop(method, stream, rate, **settings)
  rows = jax.tree_util.Partial(_round, stream)
  state = loop.init(jnp.zeros_like(stream.a), jnp.zeros_like(stream.a), rows)
  return loop.run(state, rows, rounds)[1].metrics


def _round(stream: Drifting, key: Any, t: Any) -> jaxbo.online.OnlineBatch:
  del key
  c = stream.c[t]
  return jaxbo.online.OnlineBatch(stream.b[t], c + stream.noise[t], c)
