"""LeNet-5 without its last layer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.typing

from jaxbo_models.layers import check_images, convolution, max_pool


class LeNet5(nn.Module):
  """Three 5 by 5 convolutions and a dense layer, with rectifiers.

  Images ``[n, height, width, channels]`` of any real dtype, at least 32 by 32 (28 by 28 digits need
  a border of 2), are mapped to features ``[n, 84]`` in float32. The convolutions have 6, 16 and 120
  channels and no padding; 2 by 2 maxima follow the first two.

  >>> model = LeNet5()
  >>> images = jnp.ones((5, 32, 32, 1))
  >>> variables = model.init(jax.random.key(0), images)
  >>> model.apply(variables, images).shape
  (5, 84)
  >>> sum(leaf.size for leaf in jax.tree.leaves(variables))
  60856

  Parameters are float32: ``params/Conv_i/kernel [5, 5, inputs, outputs]``, ``params/Conv_i/bias
  [outputs]``, ``params/Dense_0/kernel [120, 84]`` and ``params/Dense_0/bias [84]``.

  As in the experiments of ESJ (https://github.com/sowmaster/esjacobians, ``networks.py``); LeCun et
  al. (1998) have averages, tanh and sparse connections instead. The first parameters are Flax's
  default.

  Attributes:
    conv: ``"auto"``, ``"patches"`` or ``"native"``; see :func:`jaxbo_models.layers.convolution`.
    dtype: the dtype of products and activations; None takes what images and parameters promote to.
  """

  conv: str = "auto"
  dtype: jax.typing.DTypeLike | None = None

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    """Returns the features ``[n, 84]`` of ``images``, in float32.

    Raises ``ValueError`` for images of another rank or smaller than 32 by 32, or an unknown
    ``conv``.
    """
    check_images(images, smallest=32)
    x = images
    for i, features in enumerate((6, 16, 120)):
      x = nn.relu(convolution(self.conv, features, 5, dtype=self.dtype)(x))
      x = max_pool(x) if i < 2 else x
    x = nn.Dense(84, dtype=self.dtype)(x.reshape(len(x), -1))
    return nn.relu(x).astype(jnp.float32)
