"""A small regression whose reweighted gradients are known in float64 NumPy."""

import jax.numpy as jnp
import numpy as np

N, DIM = 24, 3


def loss_fn(params, batch):
  """Half the squared error; the parameters are a vector and a scalar."""
  # A product of matrices would not do under an explicit mesh in jax 0.10.0.
  slope = jnp.broadcast_to(params["w"], batch["x"].shape)
  prediction = jnp.sum(batch["x"] * slope, axis=-1) + params["b"]
  return 0.5 * (prediction - batch["y"]) ** 2


def params():
  return {"w": jnp.array([0.5, -1.0, 2.0]), "b": jnp.float32(0.3)}


def batch(n=N, seed=0):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(n, DIM))
  y = x @ [1.0, 1.0, 1.0] + rng.normal(size=n)
  return {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y, jnp.float32)}


def per_example(batch):
  """Losses and gradients of each example, in float64."""
  w, b = (np.asarray(params()[name], np.float64) for name in ("w", "b"))
  x, y = (np.asarray(batch[name], np.float64) for name in ("x", "y"))
  residual = x @ w + b - y
  return 0.5 * residual**2, {"w": residual[:, None] * x, "b": residual}


def weighted(batch, weights):
  """The weighted gradient, where the weights are not zero."""
  used = np.asarray(weights) != 0
  _, grads = per_example(batch)
  return {name: np.asarray(weights, np.float64)[used] @ g[used] for name, g in grads.items()}
