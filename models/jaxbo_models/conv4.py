"""Conv-4, the small backbone of few-shot learning."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.typing

from jaxbo_models.layers import BatchNorm, check_images, convolution, max_pool


class Conv4(nn.Module):
  """Four times convolution, rectifier, 2 by 2 maximum and batch normalization.

  Images ``[n, height, width, channels]`` of any real dtype are mapped to features ``[n, d]`` in
  float32; height and width are at least 16. Their ``d`` is ``features`` times the pixels that four
  halvings leave: 64 for Omniglot's 28 by 28, 800 for 32 features of 84 by 84. The convolutions are
  3 by 3 with padding 1 and a bias.

  >>> model = Conv4(features=64)
  >>> images = jnp.ones((5, 28, 28, 1))
  >>> variables = model.init(jax.random.key(0), images)
  >>> model.apply(variables, images).shape
  (5, 64)
  >>> sum(leaf.size for leaf in jax.tree.leaves(variables))
  111936

  Parameters are float32: ``params/Conv_i/kernel [3, 3, inputs, features]``, ``params/Conv_i/bias``,
  ``params/BatchNorm_i/scale`` and ``params/BatchNorm_i/bias`` ``[features]``.

  The rectifier and the maximum come before the normalization, as in the few-shot experiments of
  ESJ (https://github.com/sowmaster/esjacobians, ``networks.py``); elsewhere the normalization often
  comes first. Kernels begin with Flax's default, normal with variance 1 / (9 inputs), and biases
  with 0; PyTorch draws both uniformly with a third of that variance.

  Attributes:
    features: the channels of every layer; positive.
    batch_stats: ``"batch"`` normalizes by the batch at hand: a pure function of parameters and
      images, in which an example depends on the others (transductive). ``"running"`` normalizes by
      the collection ``batch_stats``, which ``init`` makes and only
      ``apply(..., train=True, mutable=["batch_stats"])`` moves.
    momentum: what such a step keeps of the running statistics, in [0, 1).
    conv: ``"auto"``, ``"patches"`` or ``"native"``; see :func:`jaxbo_models.layers.convolution`.
    dtype: the dtype of convolutions and activations (``jnp.bfloat16`` halves their memory); None
      takes what images and parameters promote to. Normalization is in float32 at least.
  """

  features: int = 64
  batch_stats: str = "batch"
  momentum: float = 0.9
  conv: str = "auto"
  dtype: jax.typing.DTypeLike | None = None

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
    """Returns the features ``[n, d]`` of ``images``, in float32.

    Args:
      images: ``[n, height, width, channels]``.
      train: moves the running statistics; without effect for ``batch_stats="batch"``.

    Raises:
      ValueError: the images have another rank or are smaller than 16 by 16, an attribute is none of
        the above, or batch statistics would be those of a single value.
    """
    check_images(images, smallest=16)
    x = images
    for _ in range(4):
      x = convolution(self.conv, self.features, 3, padding=1, dtype=self.dtype)(x)
      x = max_pool(nn.relu(x))
      x = BatchNorm(self.batch_stats, self.momentum)(x, train=train)
    return x.reshape(len(x), -1).astype(jnp.float32)
