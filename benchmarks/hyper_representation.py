"""Shallow hyper-representation: what the published scaling of ESJ does to the response.

  PYTHONPATH=.:models python3 -m benchmarks.hyper_representation      (about 2 minutes on 2 cores)
  ... --save benchmarks/results/hyper_representation                  (writes .md and .json as well)

The problem of the authors' notebook: a linear embedding H (outer, 64 x 128) under a regression head
w (inner, 128), 500 examples, 20 steps of gradient descent from one fixed start, and an outer Adam
with rate 0.05. The direct gradient is large here, so dropping the response altogether works. The
published code nearly does that: its directions have norm 1, and it leaves out the factor of the
8,192 dimensions. So the loss cannot rank estimators, but the column *response* can: it is the
estimated response projected on the exact one, 1 if the estimate is right on average.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxbo
from benchmarks.report import arguments, hardware, markdown, number, save

STEPS, SHOWN = 100, (10, 30, 50, 99)
NUM_FEATURES, NUM_HIDDEN, NUM_EXAMPLES = 64, 128, 500

HEADS = {
  "published scaling, Q = 1": {"directions": "official"},
  "no response (first order)": None,
  "exact (ITD)": "itd",
  "Gaussian, Q = 1": {},
  "sphere, Q = 1": {"directions": "sphere"},
  "Gaussian, Q = 20": {"num_samples": 20, "smoothing": 1e-4},
  "orthogonal, exact, Q = 20": {
    "num_samples": 20,
    "directions": "orthogonal",
    "difference": "exact",
  },
  "orthogonal, exact, Q = 512": {
    "num_samples": 512,
    "directions": "orthogonal",
    "difference": "exact",
    "sample_batch_size": 64,
  },
}


def fit(H: Any, w: Any, batch: Any) -> jax.Array:
  """Half the mean squared error."""
  X, y = batch
  return 0.5 * jnp.mean((X @ (H @ w) - y) ** 2)


def inner_loss(H: Any, w: Any, batch: Any) -> jax.Array:
  """With the ridge of the notebook."""
  return fit(H, w, batch) + 0.05 * jnp.sum(w**2)


def make_head(options: Any, inner: jaxbo.InnerSolver, key: Any) -> Any:
  """The response that ``options`` stand for."""
  if options is None:
    return jaxbo.drop_response()
  if options == "itd":
    return jaxbo.add_unrolled_response(inner)
  return jaxbo.add_es_response(inner, **({"num_samples": 1, "smoothing": 0.01} | options), key=key)


def run(options: Any, steps: int, seed: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """``(losses [steps], norm of the first hypergradient, its response projected on the exact)``."""
  key, head_key = jax.random.split(jax.random.key(seed))
  keys = jax.random.split(key, 6)
  normal = jax.random.normal
  truth, w_true = normal(keys[0], (NUM_FEATURES, NUM_HIDDEN)), normal(keys[1], (NUM_HIDDEN,))

  def data(key):
    X = normal(key, (NUM_EXAMPLES, NUM_FEATURES))
    noise = normal(jax.random.fold_in(key, 1), (NUM_EXAMPLES,))
    return X, X @ (truth @ w_true) + 0.1 * noise

  train, val = data(keys[2]), data(keys[3])
  H, w0 = normal(keys[4], (NUM_FEATURES, NUM_HIDDEN)), normal(keys[5], (NUM_HIDDEN,))
  inner = jaxbo.inner_solver(inner_loss, optax.sgd(1e-3), 20, warm_start=False)
  head = make_head(options, inner, head_key)
  init, step = jaxbo.bilevel_loop(fit, inner, optax.chain(head, optax.adam(0.05)))

  w = inner.solve(H, inner.init(w0), train)
  grads = jax.grad(fit, (0, 1))(H, w.params, val)
  response = lambda tx: tx.update(grads, tx.init(H), H, solution=w, batch=train)[0] - grads[0]
  estimated, exact = response(head), response(jaxbo.add_unrolled_response(inner))
  norm = jnp.linalg.norm(grads[0] + estimated)
  projected = jnp.sum(estimated * exact) / jnp.sum(exact**2)

  def body(state, _):
    state, info = step(state, train, val)
    return state, info.outer_loss

  return jax.lax.scan(body, init(H, w0), length=steps)[1], norm, projected


def main() -> None:
  """Runs all rows over all seeds, prints, and saves if asked to."""
  args = arguments(__doc__, seeds=(5, "how many seeds"))
  columns = ["method", *(f"loss at {k}" for k in SHOWN), "|h| at 0", "response"]
  rows, data = [], {"hardware": hardware(), "seeds": args.seeds}
  for name, options in HEADS.items():
    program = jax.jit(functools.partial(run, options, STEPS))
    losses, norms, projected = jax.tree.map(
      lambda *leaves: jnp.stack(leaves), *[program(seed) for seed in jnp.arange(args.seeds)]
    )
    spread = lambda values: f"{number(float(jnp.min(values)))} to {number(float(jnp.max(values)))}"
    rows.append([name, *(spread(losses[:, k]) for k in SHOWN), spread(norms), spread(projected)])
    results = {"losses": losses[:, jnp.array(SHOWN)], "norms": norms, "response": projected}
    data[name] = {key: values.tolist() for key, values in results.items()}
    print(f"{name}: done", flush=True)
  title = f"# Hyper-representation\n\n{args.seeds} seeds, least to greatest. {hardware()}."
  text = f"{title}\n\n{markdown(columns, rows)}\n"
  print(text)
  save(args.save, text, data)


if __name__ == "__main__":
  main()
