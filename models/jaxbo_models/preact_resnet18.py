"""PreAct ResNet-18, the usual network of adversarial training on CIFAR-10."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.typing

from jaxbo_models.layers import BatchNorm, check_images, convolution


class PreActResNet18(nn.Module):
  """A convolution, eight residual blocks of two, the mean over the pixels and a dense layer.

  Images ``[n, height, width, channels]`` of any real dtype, height and width at least 8, are mapped
  to logits ``[n, num_classes]`` in float32. Convolutions are 3 by 3 with padding 1 and without
  bias; normalization and rectifier come before each of them. The first block of each of the last
  three widths halves height and width, and there its input goes through a 1 by 1 convolution of the
  normalized and rectified input instead of past the block.

  >>> model = PreActResNet18()
  >>> images = jax.ShapeDtypeStruct((5, 32, 32, 3), jnp.float32)
  >>> variables = jax.eval_shape(model.init, jax.random.key(0), images)
  >>> jax.eval_shape(model.apply, variables, images).shape
  (5, 10)
  >>> sum(leaf.size for leaf in jax.tree.leaves(variables))
  11172170

  Parameters are float32: ``params/Conv_0/kernel``, ``params/PreActBlock_i/Conv_j/kernel
  [3, 3, inputs, width]`` and, where the width changes, ``shortcut/kernel [1, 1, inputs, width]``;
  ``scale`` and ``bias`` of ``BatchNorm_j`` in each block and of ``BatchNorm_0``;
  ``params/Dense_0``. Kernels begin normal with variance 2 / (width times kernel size squared) (He
  et al., 2015, fan-out), the dense layer with Flax's default.

  Adversarial training wants running statistics, or the attack on an example can use the others:
  ``PreActResNet18(batch_stats="running")``.

  >>> model = PreActResNet18(batch_stats="running")
  >>> variables = jax.eval_shape(model.init, jax.random.key(0), images)
  >>> sorted(variables)
  ['batch_stats', 'params']
  >>> step = lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"])
  >>> logits, moved = jax.eval_shape(step, variables, images)

  Source: He, Zhang, Ren and Sun, *Identity mappings in deep residual networks*
  (https://arxiv.org/abs/1603.05027), with the widths of ResNet-18 and without its first halvings,
  as is usual for images of 32 by 32; the networks of Fast-AT and Fast-BAT.

  Attributes:
    num_classes: how many logits.
    widths: the channels of the four pairs of blocks.
    final_norm: whether a normalization and a rectifier come before the mean, as in the paper. A
      common implementation (https://github.com/kuangliu/pytorch-cifar) has none there: 11,171,146
      parameters.
    batch_stats: ``"batch"`` normalizes by the batch at hand: a pure function of parameters and
      images, in which an example depends on the others (transductive). ``"running"`` normalizes by
      the collection ``batch_stats``, which ``init`` makes and only
      ``apply(..., train=True, mutable=["batch_stats"])`` moves.
    momentum: what such a step keeps of the running statistics, in [0, 1).
    conv: ``"auto"``, ``"patches"`` or ``"native"``; see :func:`jaxbo_models.layers.convolution`.
    dtype: the dtype of convolutions and activations (``jnp.bfloat16`` halves their memory); None
      takes what images and parameters promote to. Normalization is in float32 at least.
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
      train: moves the running statistics; without effect for ``batch_stats="batch"``.

    Raises:
      ValueError: the images have another rank or are smaller than 8 by 8, an attribute is none of
        the above, or batch statistics would be those of a single value.
    """
    check_images(images, smallest=8)
    if len(self.widths) != 4:
      raise ValueError(f"widths must be four numbers, got {self.widths}")
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
  """One block of :class:`PreActResNet18`, from ``[n, h, w, c]`` to about ``[n, h/s, w/s, width]``.

  Attributes:
    width: the channels.
    stride: of the first convolution.
    batch_stats: as in the model, like all that follow.
    momentum: see there.
    conv: see there.
    dtype: see there.
  """

  width: int
  stride: int
  batch_stats: str
  momentum: float
  conv: str
  dtype: jax.typing.DTypeLike | None

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Returns the block's output, of the dtype of its convolutions."""

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
