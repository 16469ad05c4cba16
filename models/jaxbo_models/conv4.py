"""Conv-4, the small backbone of few-shot learning."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.typing

from jaxbo_models.layers import BatchNorm, check_images, check_sizes, convolution, max_pool


class Conv4(nn.Module):
  """Four layers, each a convolution, a ReLU, 2 by 2 max pooling and batch normalization.

  The model maps images ``[n, height, width, channels]`` of any real dtype, at least 16 by 16, to
  features ``[n, d]`` in float32. Each layer halves height and width (rounded down), and ``d`` is
  ``features`` times the number of pixels after the four halvings: 64 for Omniglot's 28 by 28
  images, 800 for 84 by 84 images with ``features=32``. Convolutions are 3 by 3 with padding 1 and
  a bias.

  >>> model = Conv4(features=64)
  >>> images = jnp.ones((5, 28, 28, 1))
  >>> variables = model.init(jax.random.key(0), images)
  >>> model.apply(variables, images).shape
  (5, 64)
  >>> sum(leaf.size for leaf in jax.tree.leaves(variables))
  111936

  Parameters are float32: ``params/Conv_i/kernel [3, 3, inputs, features]``, ``params/Conv_i/bias``,
  ``params/BatchNorm_i/scale`` and ``params/BatchNorm_i/bias`` ``[features]``.

  ReLU and max pooling come before the normalization, as in the few-shot experiments of ESJ
  (https://github.com/sowmaster/esjacobians, ``networks.py``). Other Conv-4 models often normalize
  first. Kernels are initialized with Flax's default, normal with variance 1 / (9 inputs), and
  biases with 0. PyTorch draws both uniformly with a third of that variance.

  Attributes:
    features: number of channels of every layer; positive.
    batch_stats: ``"batch"`` always normalizes by the current batch: the output is a pure function
      of parameters and images, but the features of each image depend on the other images
      (transductive). ``"running"`` normalizes by the collection ``batch_stats``, which ``init``
      creates. Only ``apply(..., train=True, mutable=["batch_stats"])`` updates the collection, and
      it normalizes by the current batch.
    momentum: share of the running statistics that an update keeps, in [0, 1).
    conv: ``"native"`` for XLA's convolution; ``"patches"`` for matrix products, much faster in
      compiled loops on CPUs; ``"auto"`` for ``"patches"`` on CPUs and ``"native"`` elsewhere.
    dtype: dtype of convolutions and activations (``jnp.bfloat16`` halves their memory); None for
      the dtype to which images and parameters promote. Normalization is in float32 at least.
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
      train: with ``batch_stats="running"``, normalizes by the batch and updates the running
        statistics; with ``"batch"``, has no effect.

    Raises:
      ValueError: the images have another rank or are smaller than 16 by 16, an attribute is out of
        its range, or a channel has a single value, which has no batch statistics.
    """
    check_images(images, smallest=16)
    check_sizes("features", self.features)
    x = images
    for _ in range(4):
      x = convolution(self.conv, self.features, 3, padding=1, dtype=self.dtype)(x)
      x = max_pool(nn.relu(x))
      x = BatchNorm(self.batch_stats, self.momentum)(x, train=train)
    return x.reshape(len(x), -1).astype(jnp.float32)
