"""A small captioner, parameters none of which is special, and a batch, for all of its tests."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxbo_models import captioner

BOS, EOS = 1, 2
SMALL = {"vocab_size": 11, "embed_dim": 5, "hidden_dim": 6, "attention_dim": 4}
FEATURES = np.random.default_rng(0).normal(size=(3, 4, 7))
TOKENS = np.concatenate(
  [np.full((3, 1), BOS), np.random.default_rng(1).integers(2, 11, size=(3, 5))], axis=1
).astype(np.int32)


def make(**flags):
  return captioner.GuidedCaptioner(**(SMALL | flags))


def draw_params(model, features=FEATURES, seed=2, dtype=np.float32):
  """Normal parameters for every shape that the model asks for."""
  features = jax.ShapeDtypeStruct(features.shape, jnp.float32)
  tokens = jax.ShapeDtypeStruct(TOKENS.shape, jnp.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), features, tokens)
  assert set(shapes) == {"params"}
  rng = np.random.default_rng(seed)
  draw = lambda leaf: jnp.asarray(rng.normal(0, 0.6, leaf.shape), dtype)
  return jax.tree.map(draw, shapes["params"])


def batch(**more):
  return {"features": jnp.asarray(FEATURES, jnp.float32), "tokens": jnp.asarray(TOKENS)} | more
