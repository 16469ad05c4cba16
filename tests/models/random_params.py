"""Parameters of a transformer none of which is special: scales are not 1 and biases not 0."""

import jax
import jax.numpy as jnp
import numpy as np


def random_params(model, seed=1):
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    centre = 1.0 if path[-1].key == "scale" else 0.0
    return jnp.asarray(rng.normal(centre, 0.2, leaf.shape), jnp.float32)

  return jax.tree.map_with_path(draw, shapes)
