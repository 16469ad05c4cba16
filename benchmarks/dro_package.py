"""Robust regression beside the package dro: the same optimum, and how long it takes.

dro states the worst case as a convex program and gives it to CVXPY with Clarabel, or with SCS where
Clarabel fails. jaxbo gives the worst case as a function of the losses, ``jaxbo.dro.robust_value``,
and L-BFGS minimizes it, in double precision. Data are those of dro's own example
``regression_DN20_1``, with noise 1, and losses are squared. The gap is our objective minus dro's,
both by one formula at the two solutions, as a share of dro's: where it is negative, ours is lower.
For the Wasserstein ball L-BFGS minimizes over the multiplier of the radius too, and
``wasserstein_loss`` finds where each example moves.

  uv run --isolated --group bench --with dro python -m benchmarks.dro_package
"""

import functools
import importlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbo
from benchmarks.report import arguments, number, show

RADIUS, LEVEL = 0.2, 0.3  # of balls; of CVaR
STEPS = 100  # of L-BFGS


class Problem(NamedTuple):
  """A robust problem: dro's class with its settings, and our objective."""

  name: str
  theirs: str
  settings: dict[str, Any]
  objective: Callable[..., jax.Array]  # objective(params, batch) -> scalar


def squared(params: Any, batch: Any) -> jax.Array:
  """The losses of a linear model, ``[n]``."""
  return (batch["y"] - batch["x"] @ params["theta"] - params["b"]) ** 2


def weighted(weighting: jaxbo.dro.Weighting) -> Callable[..., jax.Array]:
  """The worst case of a weighting."""
  return lambda params, batch: jaxbo.dro.robust_value(squared(params, batch), weighting)


def wasserstein(params: Any, batch: Any) -> jax.Array:
  """The worst case over the Wasserstein ball around the inputs, by its dual."""
  # The dual is finite above half of the curvature of the losses.
  penalty = jnp.sum(params["theta"] ** 2) + jax.nn.softplus(params["penalty"])
  moves = {"x": True, "y": False}
  robust = jaxbo.dro.wasserstein_loss(squared, penalty=penalty, num_steps=200, moves=moves)
  return penalty * RADIUS + jnp.mean(robust(params, batch))


PROBLEMS = (
  Problem("KL ball", "kl_dro.KLDRO", {"eps": RADIUS}, weighted(jaxbo.dro.kl_ball(RADIUS))),
  # dro's divergence is twice ours.
  Problem(
    "chi-square ball",
    "chi2_dro.Chi2DRO",
    {"eps": RADIUS},
    weighted(jaxbo.dro.chi_square_ball(RADIUS / 2)),
  ),
  Problem(
    "total variation ball",
    "tv_dro.TVDRO",
    {"eps": RADIUS},
    weighted(jaxbo.dro.total_variation_ball(RADIUS)),
  ),
  Problem("CVaR", "cvar_dro.CVaRDRO", {"alpha": LEVEL}, weighted(jaxbo.dro.cvar(LEVEL))),
)
BALL = Problem(
  "Wasserstein ball", "wasserstein_dro.WassersteinDRO", {"eps": RADIUS, "p": 2}, wasserstein
)


def minimize(objective: Callable[[Any], jax.Array], params: Any) -> tuple[Any, float, float]:
  """The best parameters on the way of L-BFGS, and seconds: of compilation, and of the run."""
  tx: Any = optax.lbfgs()
  value_and_grad = optax.value_and_grad_from_state(objective)

  @jax.jit
  def run(params):
    def step(carry, _):
      params, state, best, least = carry
      value, gradient = value_and_grad(params, state=state)
      better = value < least
      best = jax.tree.map(lambda new, old: jnp.where(better, new, old), params, best)
      updates, state = tx.update(
        gradient, state, params, value=value, grad=gradient, value_fn=objective
      )
      return (optax.apply_updates(params, updates), state, best, jnp.minimum(value, least)), None

    carry = params, tx.init(params), params, objective(params)
    (_, _, best, _), _ = jax.lax.scan(step, carry, length=STEPS)
    return best

  start = time.perf_counter()
  compiled = run.lower(params).compile()
  middle = time.perf_counter()
  best = jax.block_until_ready(compiled(params))
  return best, middle - start, time.perf_counter() - middle


def measure(problem: Problem, x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
  """A row: the difference of objectives, and seconds."""
  module, name = problem.theirs.split(".")
  model = getattr(importlib.import_module(f"dro.linear_model.{module}"), name)
  for solver in ("CLARABEL", "SCS"):
    fitted = model(input_dim=x.shape[1], model_type="ols", solver=solver)
    fitted.update(problem.settings)
    start = time.perf_counter()
    try:
      fitted.fit(x, y)
      break
    except Exception as error:  # Each class of dro has an error of its own.
      print(f"{problem.name}, {solver}: {error}", flush=True)
  theirs = time.perf_counter() - start
  batch = {"x": jnp.asarray(x), "y": jnp.asarray(y)}
  objective = jax.jit(functools.partial(problem.objective, batch=batch))
  zeros = {"theta": jnp.zeros(x.shape[1]), "b": jnp.zeros(()), "penalty": jnp.zeros(())}
  best, compilation, ours = minimize(objective, zeros)
  theta, b = np.asarray(fitted.theta).reshape(-1), float(np.asarray(fitted.b))
  at_theirs = {"theta": jnp.asarray(theta), "b": jnp.asarray(b), "penalty": best["penalty"]}
  if problem is BALL:  # Its value at the best multiplier for these parameters, in closed form.
    root = np.sqrt(np.mean((y - x @ theta - b) ** 2)) + np.sqrt(RADIUS) * np.linalg.norm(theta)
    value = float(root**2)
  else:
    value = float(objective(at_theirs))
  mine = float(objective(best))
  return {
    "problem": problem.name,
    "examples": len(x),
    "solver": solver,
    "gap": (mine - value) / value,
    "dro, s": theirs,
    "jaxbo, s": ours,
    "compilation, s": compilation,
  }


def main() -> None:
  """Measures, prints, and saves if asked to."""
  read = importlib.import_module("dro.data.dataloader_regression").regression_DN20_1
  args = arguments(__doc__, small=(500, "examples"), large=(2000, "examples"))
  jax.config.update("jax_enable_x64", True)
  rows = []
  for size in (args.small, args.large):
    rows += [measure(problem, *read(size, d=5, noise=1.0)) for problem in (*PROBLEMS, BALL)]
  columns = list(rows[0])
  lines = [
    [
      row["problem"],
      f"{row['examples']:,}",
      row["solver"],
      f"{row['gap']:.0e}",
      *(number(row[name]) for name in columns[4:]),
    ]
    for row in rows
  ]
  show(args.save, columns, lines, rows)


if __name__ == "__main__":
  main()
