"""PreAct ResNet-18, the usual network of adversarial training on CIFAR-10."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.typing

from jaxbo_models.layers import BatchNorm, check_images, check_sizes, convolution


class PreActResNet18(nn.Module):
  """A convolution, eight residual blocks of two more, the mean over the pixels and a dense layer.

  The model maps images ``[n, height, width, channels]`` of any real dtype, at least 8 by 8, to
  logits ``[n, num_classes]`` in float32. Convolutions are 3 by 3 with padding 1 and without bias.
  In the blocks, normalization and ReLU come before each convolution. The first block of each of the
  last three widths halves height and width; its shortcut is a 1 by 1 convolution of the normalized
  and rectified input. The other shortcuts are the identity.

  >>> model = PreActResNet18()
  >>> images = jax.ShapeDtypeStruct((5, 32, 32, 3), jnp.float32)
  >>> variables = jax.eval_shape(model.init, jax.random.key(0), images)
  >>> jax.eval_shape(model.apply, variables, images).shape
  (5, 10)
  >>> sum(leaf.size for leaf in jax.tree.leaves(variables))
  11172170

  Parameters are float32: ``params/Conv_0/kernel``;
  ``params/PreActBlock_i/Conv_j/kernel [3, 3, inputs, width]``, and
  ``shortcut/kernel [1, 1, inputs, width]`` in blocks whose shortcut is a convolution; ``scale`` and
  ``bias`` of ``BatchNorm_j`` in each block and of ``BatchNorm_0``; ``params/Dense_0``. Kernels are
  initially normal with variance 2 / (width times kernel size squared) (He et al., 2015, fan-out);
  the dense layer has Flax's default initializers.

  For adversarial training use running statistics, ``PreActResNet18(batch_stats="running")``. With
  batch statistics the attack on one example can use the other examples.

  >>> model = PreActResNet18(batch_stats="running")
  >>> variables = jax.eval_shape(model.init, jax.random.key(0), images)
  >>> sorted(variables)
  ['batch_stats', 'params']
  >>> step = lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"])
  >>> logits, moved = jax.eval_shape(step, variables, images)

  Source: He, Zhang, Ren and Sun, *Identity mappings in deep residual networks*
  (https://arxiv.org/abs/1603.05027), with the widths of ResNet-18 but without its first halvings,
  as is usual for 32 by 32 images. Fast-AT and Fast-BAT use this network.

  Attributes:
    num_classes: number of classes, one logit each.
    widths: number of channels of each of the four pairs of blocks.
    final_norm: whether a normalization and a ReLU come before the mean, as in the paper. A common
      implementation (https://github.com/kuangliu/pytorch-cifar) omits them and has 11,171,146
      parameters.
    batch_stats: ``"batch"`` always normalizes by the current batch: the output is a pure function
      of parameters and images, but the logits of each image depend on the other images
      (transductive). ``"running"`` normalizes by the collection ``batch_stats``, which ``init``
      creates. Only ``apply(..., train=True, mutable=["batch_stats"])`` updates the collection, and
      it normalizes by the current batch.
    momentum: share of the running statistics that an update keeps, in [0, 1).
    conv: ``"native"`` for XLA's convolution; ``"patches"`` for matrix products, much faster in
      compiled loops on CPUs; ``"auto"`` for ``"patches"`` on CPUs and ``"native"`` elsewhere.
    dtype: dtype of convolutions and activations (``jnp.bfloat16`` halves their memory); None for
      the dtype to which images and parameters promote. Normalization is in float32 at least.
  """

  num_classes: int = 10
  widths: Sequence[int] = (64, 128, 256, 512)
  final_norm: bool = True
  batch_stats: str = "batch"
  momentum: float = 0.9
  conv: str = "auto"
  dtype: jax.typing.DTypeLike | None = None

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
    """Returns the logits ``[n, num_classes]`` of ``images``, in float32.

    Args:
      images: ``[n, height, width, channels]``.
      train: with ``batch_stats="running"``, normalizes by the batch and updates the running
        statistics; with ``"batch"``, has no effect.

    Raises:
      ValueError: the images have another rank or are smaller than 8 by 8, an attribute is out of
        its range, or a channel has a single value, which has no batch statistics.
    """
    check_images(images, smallest=8)
    if len(self.widths) != 4:
      raise ValueError(f"widths must be four numbers, got {self.widths}")
    check_sizes("widths", *self.widths)
    check_sizes("num_classes", self.num_classes)
    x = convolution(
      self.conv,
      self.widths[0],
      3,
      padding=1,
      use_bias=False,
      kernel_init=_FAN_OUT,
      dtype=self.dtype,
    )(images)
    for i, width in enumerate(self.widths):
      for stride in (1 if i == 0 else 2, 1):
        x = PreActBlock(width, stride, self.batch_stats, self.momentum, self.conv, self.dtype)(
          x, train=train
        )
    if self.final_norm:
      x = nn.relu(BatchNorm(self.batch_stats, self.momentum)(x, train=train))
    x = x.astype(jnp.float32).mean(axis=(1, 2))
    return nn.Dense(self.num_classes)(x)


_FAN_OUT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class PreActBlock(nn.Module):
  """One block of :class:`PreActResNet18`.

  With stride s the block maps ``[n, h, w, c]`` to ``[n, ceil(h / s), ceil(w / s), width]``.

  Attributes:
    width: number of channels of the output.
    stride: stride of the first convolution and of the shortcut.
    batch_stats: ``"batch"`` or ``"running"``, the statistics that normalize.
    momentum: share of the running statistics that an update keeps, in [0, 1).
    conv: ``"auto"``, ``"patches"`` or ``"native"``, the implementation of convolutions.
    dtype: dtype of convolutions and activations; None for the dtype to which ``x`` and the
      parameters promote.
  """

  width: int
  stride: int
  batch_stats: str
  momentum: float
  conv: str
  dtype: jax.typing.DTypeLike | None

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Returns the output of the block, in the dtype of its convolutions."""

    def conv(x: jax.Array, size: int, stride: int, name: str | None = None) -> jax.Array:
      return convolution(
        self.conv,
        self.width,
        size,
        padding=size // 2,
        stride=stride,
        use_bias=False,
        kernel_init=_FAN_OUT,
        dtype=self.dtype,
        name=name,
      )(x)

    def activate(x: jax.Array) -> jax.Array:
      return nn.relu(BatchNorm(self.batch_stats, self.momentum)(x, train=train))

    active = activate(x)
    if self.stride != 1 or x.shape[-1] != self.width:
      x = conv(active, 1, self.stride, "shortcut")
    return conv(activate(conv(active, 3, self.stride)), 3, 1) + x
