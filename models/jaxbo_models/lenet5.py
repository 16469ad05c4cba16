"""LeNet-5 without its last layer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.typing

from jaxbo_models.layers import check_images, convolution, max_pool


class LeNet5(nn.Module):
  """Three 5 by 5 convolutions and a dense layer, each followed by a ReLU.

  The model maps images ``[n, height, width, channels]`` of any real dtype, at least 32 by 32 (pad
  28 by 28 digits with a border of 2), to features ``[n, 84]`` in float32. The convolutions have 6,
  16 and 120 channels and no padding; 2 by 2 max pooling follows the first two.

  >>> model = LeNet5()
  >>> images = jnp.ones((5, 32, 32, 1))
  >>> variables = model.init(jax.random.key(0), images)
  >>> model.apply(variables, images).shape
  (5, 84)
  >>> sum(leaf.size for leaf in jax.tree.leaves(variables))
  60856

  Parameters are float32: ``params/Conv_i/kernel [5, 5, inputs, outputs]``, ``params/Conv_i/bias
  [outputs]``, ``params/Dense_0/kernel [120, 84]`` and ``params/Dense_0/bias [84]``.

  The architecture follows the experiments of ESJ (https://github.com/sowmaster/esjacobians,
  ``networks.py``). LeCun et al. (1998) use average pooling, tanh and sparse connections instead.
  Parameters have Flax's default initializers.

  Attributes:
    conv: ``"native"`` for XLA's convolution; ``"patches"`` for matrix products, much faster in
      compiled loops on CPUs; ``"auto"`` for ``"patches"`` on CPUs and ``"native"`` elsewhere.
    dtype: dtype of products and activations; None for the dtype to which images and parameters
      promote.
  """

  conv: str = "auto"
  dtype: jax.typing.DTypeLike | None = None

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    """Returns the features ``[n, 84]`` of ``images``, in float32.

    Raises:
      ValueError: the images have another rank or are smaller than 32 by 32, or ``conv`` is unknown.
    """
    check_images(images, smallest=32)
    x = images
    for i, features in enumerate((6, 16, 120)):
      x = nn.relu(convolution(self.conv, features, 5, dtype=self.dtype)(x))
      x = max_pool(x) if i < 2 else x
    x = nn.Dense(84, dtype=self.dtype)(x.reshape(len(x), -1))
    return nn.relu(x).astype(jnp.float32)
