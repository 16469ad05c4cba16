"""A small convolutional network for robust classification."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.typing

from jaxbo_models.layers import check_images, check_sizes, convolution


class SmallCNN(nn.Module):
  """Two 4 by 4 convolutions of stride 2 and two dense layers, with ReLUs between them.

  The model maps images ``[n, height, width, channels]`` of any real dtype, at least 8 by 8, to
  logits ``[n, num_classes]`` in float32. Strides replace max pooling: they cost less, and only the
  ReLUs make the loss non-smooth in the images. There is no normalization, so the logits of an image
  do not depend on other images.

  >>> model = SmallCNN()
  >>> images = jax.ShapeDtypeStruct((5, 28, 28, 1), jnp.float32)
  >>> variables = jax.eval_shape(model.init, jax.random.key(0), images)
  >>> jax.eval_shape(model.apply, variables, images).shape
  (5, 10)
  >>> sum(leaf.size for leaf in jax.tree.leaves(variables))
  166406

  Parameters are float32: ``params/Conv_i/kernel [4, 4, inputs, widths[i]]``, ``params/Conv_i/bias
  [widths[i]]``, ``params/Dense_i/kernel`` and ``params/Dense_i/bias``.

  Source: Wong and Kolter, *Provable defenses against adversarial examples via the convex outer
  adversarial polytope* (https://arxiv.org/abs/1711.00851), their network for MNIST. Parameters have
  Flax's default initializers.

  Attributes:
    num_classes: number of classes, one logit each.
    widths: number of channels of each of the two convolutions.
    num_hidden: width of the first dense layer.
    conv: ``"native"`` for XLA's convolution; ``"patches"`` for matrix products, much faster in
      compiled loops on CPUs; ``"auto"`` for ``"patches"`` on CPUs and ``"native"`` elsewhere.
    dtype: dtype of products and activations; None for the dtype to which images and parameters
      promote.
  """

  num_classes: int = 10
  widths: Sequence[int] = (16, 32)
  num_hidden: int = 100
  conv: str = "auto"
  dtype: jax.typing.DTypeLike | None = None

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    """Returns the logits ``[n, num_classes]`` of ``images``, in float32.

    Raises:
      ValueError: the images have another rank or are smaller than 8 by 8, ``widths`` does not hold
        two numbers, a size is not positive, or ``conv`` is unknown.
    """
    check_images(images, smallest=8)
    if len(self.widths) != 2:
      raise ValueError(f"widths must be two numbers, got {self.widths}")
    check_sizes("widths", *self.widths)
    check_sizes("num_hidden", self.num_hidden)
    check_sizes("num_classes", self.num_classes)
    x = images
    for width in self.widths:
      x = nn.relu(convolution(self.conv, width, 4, padding=1, stride=2, dtype=self.dtype)(x))
    x = nn.relu(nn.Dense(self.num_hidden, dtype=self.dtype)(x.reshape(len(x), -1)))
    return nn.Dense(self.num_classes, dtype=self.dtype)(x).astype(jnp.float32)
