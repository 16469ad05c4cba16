"""The layers in float64 NumPy, written anew, and parameters to compare them at."""

import jax
import numpy as np


def conv(x, kernel, bias=0.0, padding=0):
  x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
  windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2], axis=(1, 2))
  return np.einsum("nyxcij,ijco->nyxo", windows, kernel) + bias


def normalize(x, p, mean=None, var=None):
  if mean is None:
    mean, var = x.mean((0, 1, 2)), ((x - x.mean((0, 1, 2))) ** 2).mean((0, 1, 2))
  return (x - mean) / np.sqrt(var + 1e-5) * p["scale"] + p["bias"]


def pool(x):
  y = np.empty((len(x), x.shape[1] // 2, x.shape[2] // 2, x.shape[3]))
  for i, j in np.ndindex(y.shape[1:3]):
    y[:, i, j] = x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].max((1, 2))
  return y


def relu(x, slope=0.0):
  return np.where(x > 0, x, slope * x)


def perturbed(variables, seed=0):
  """Variables in float64 none of which is special: no bias is 0, no scale or variance 1."""
  rng = np.random.default_rng(seed)

  def perturb(leaf):
    is_vector = leaf.ndim == 1
    noise = rng.uniform(-0.3, 0.3, leaf.shape) if is_vector else rng.normal(0, 0.05, leaf.shape)
    return np.asarray(leaf, float) + noise

  return jax.tree.map(perturb, variables)


def draw_variables(model, images):
  """As :func:`perturbed`, but from shapes alone: to compile ``init`` takes a second or more."""
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    if leaf.ndim == 1:
      return rng.uniform(-0.3, 0.3, leaf.shape) + (path[-1].key in ("scale", "var"))
    return rng.normal(0, np.prod(leaf.shape[:-1]) ** -0.5, leaf.shape)

  shapes = jax.eval_shape(model.init, jax.random.key(0), images)
  return jax.tree.map_with_path(draw, shapes)


def images(*shape, seed=1):
  return np.random.default_rng(seed).normal(size=shape)
