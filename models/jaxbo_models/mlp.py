"""The multilayer perceptron."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.typing

from jaxbo_models.layers import check_sizes


class MLP(nn.Module):
  """Dense layers with ReLUs between them.

  The model maps inputs ``[..., num_inputs]`` of any real dtype to logits ``[..., features[-1]]`` in
  float32. Parameters are float32: ``params/Dense_i/kernel [inputs of layer i, features[i]]`` and
  ``params/Dense_i/bias [features[i]]``.

  >>> import jax, jax.numpy as jnp
  >>> model = MLP(features=(16, 10))
  >>> x = jnp.ones((4, 64))
  >>> variables = model.init(jax.random.key(0), x)
  >>> model.apply(variables, x).shape
  (4, 10)
  >>> sum(leaf.size for leaf in jax.tree.leaves(variables))
  1210

  Attributes:
    features: width of each layer, at least one; the last is the number of classes.
    dtype: dtype of matrix products and activations (``jnp.bfloat16`` halves their memory); None for
      the dtype to which the input and the float32 parameters promote.
  """

  features: Sequence[int]
  dtype: jax.typing.DTypeLike | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns the logits ``[..., features[-1]]`` of ``x``, in float32.

    Raises:
      ValueError: ``features`` is empty, or a width is not positive.
    """
    if not self.features:
      raise ValueError(f"features must be at least one width, got {self.features}")
    check_sizes("features", *self.features)
    *hidden, num_outputs = self.features
    for width in hidden:
      x = nn.relu(nn.Dense(width, dtype=self.dtype)(x))
    return nn.Dense(num_outputs, dtype=self.dtype)(x).astype(jnp.float32)
