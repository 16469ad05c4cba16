"""ResNet-12, the large backbone of few-shot learning, and DropBlock."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.core
import jax.numpy as jnp
import jax.typing

from jaxbo_models.layers import BatchNorm, check_images, check_sizes, convolution, max_pool


class ResNet12(nn.Module):
  """Four residual blocks of three 3 by 3 convolutions, then the mean over the pixels.

  The model maps images ``[n, height, width, channels]`` of any real dtype, at least 16 by 16, to
  features ``[n, widths[-1]]`` in float32. A block applies convolution, normalization and leaky ReLU
  twice, then convolution and normalization. It adds the shortcut, a 1 by 1 convolution and
  normalization of the block's input, and ends with leaky ReLU and 2 by 2 max pooling. The negative
  slope of each leaky ReLU is 0.1. Only the normalizations have biases.

  >>> model = ResNet12()
  >>> images = jax.ShapeDtypeStruct((5, 84, 84, 3), jnp.float32)
  >>> variables = jax.eval_shape(model.init, jax.random.key(0), images)
  >>> jax.eval_shape(model.apply, variables, images).shape
  (5, 640)
  >>> sum(leaf.size for leaf in jax.tree.leaves(variables))
  12424320

  Parameters are float32, in ``params/ResidualBlock_i``: ``Conv_j/kernel [3, 3, inputs, width]``,
  ``shortcut/kernel [1, 1, inputs, width]``, and ``scale`` and ``bias`` ``[width]`` of
  ``BatchNorm_j`` and ``shortcut_norm``. Kernels are initially normal with variance 2 / (width times
  kernel size squared) (He et al., 2015, fan-out).

  With a nonzero ``drop_rate`` and ``train=True``, :func:`drop_block` follows each block. The key in
  ``rngs`` alone determines what is dropped, so equal keys give equal features. For a rate that
  grows during training (Lee et al. use ``0.1 * min(1, step / 40_000)``), build the model in the
  jitted function:

  >>> @jax.jit
  ... def features(variables, images, step, key):
  ...   model = ResNet12(widths=(4, 4, 8, 8), drop_rate=0.1 * jnp.minimum(1, step / 40_000))
  ...   return model.apply(variables, images, train=True, rngs={"dropout": key})

  Source: Lee, Maji, Ravichandran and Soatto, *Meta-learning with differentiable convex
  optimization* (https://arxiv.org/abs/1904.03758; ``ResNet12_embedding.py`` in their code). They
  flatten the last pixels; we take the mean, as in the experiments of ESJ. They scale dropout
  (``block_size`` 1) by ``1 / (1 - drop_rate)``; we scale by one over the share really kept.

  Attributes:
    widths: number of channels of each of the four blocks. ``(64, 128, 256, 512)`` is common, too.
    batch_stats: ``"batch"`` always normalizes by the current batch: the output is a pure function
      of parameters and images, but the features of each image depend on the other images
      (transductive). ``"running"`` normalizes by the collection ``batch_stats``, which ``init``
      creates. Only ``apply(..., train=True, mutable=["batch_stats"])`` updates the collection, and
      it normalizes by the current batch.
    momentum: share of the running statistics that an update keeps, in [0, 1).
    drop_rate: probability of dropping an entry, in [0, 1); may be traced.
    block_sizes: side in pixels of the squares dropped after each of the four blocks; 1 is dropout.
    conv: ``"native"`` for XLA's convolution; ``"patches"`` for matrix products, much faster in
      compiled loops on CPUs; ``"auto"`` for ``"patches"`` on CPUs and ``"native"`` elsewhere.
    dtype: dtype of convolutions and activations (``jnp.bfloat16`` halves their memory); None for
      the dtype to which images and parameters promote. Normalization is in float32 at least.
    pool: whether to take the mean over the pixels; with False the features are
      ``[n, height // 16, width // 16, widths[-1]]``, for attention.
  """

  widths: Sequence[int] = (64, 160, 320, 640)
  batch_stats: str = "batch"
  momentum: float = 0.9
  drop_rate: float | jax.Array = 0.0
  block_sizes: Sequence[int] = (1, 1, 5, 5)
  conv: str = "auto"
  dtype: jax.typing.DTypeLike | None = None
  pool: bool = True

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
    """Returns the features ``[n, widths[-1]]`` (or a grid) of ``images``, in float32.

    Args:
      images: ``[n, height, width, channels]``.
      train: drops entries (``apply`` needs ``rngs={"dropout": key}`` unless ``drop_rate`` is 0).
        With ``batch_stats="running"``, also normalizes by the batch and updates the running
        statistics.

    Raises:
      ValueError: the images have another rank or are smaller than 16 by 16, an attribute is out of
        its range, or a channel has a single value, which has no batch statistics.
    """
    check_images(images, smallest=16)
    for name in ("widths", "block_sizes"):
      if len(getattr(self, name)) != 4:
        raise ValueError(f"{name} must be four numbers, got {getattr(self, name)}")
    check_sizes("widths", *self.widths)
    _check_rate("drop_rate", self.drop_rate)
    drop = isinstance(self.drop_rate, jax.core.Tracer) or self.drop_rate != 0
    x = images
    for width, block_size in zip(self.widths, self.block_sizes, strict=True):
      x = ResidualBlock(width, self.batch_stats, self.momentum, self.conv, self.dtype)(
        x, train=train
      )
      if train and drop:
        x = drop_block(x, self.make_rng("dropout"), self.drop_rate, block_size)
    x = x.astype(jnp.float32)
    return x.mean(axis=(1, 2)) if self.pool else x


class ResidualBlock(nn.Module):
  """One block of :class:`ResNet12`, from ``[n, h, w, c]`` to ``[n, h // 2, w // 2, width]``.

  Attributes:
    width: number of channels of the output.
    batch_stats: ``"batch"`` or ``"running"``, the statistics that normalize.
    momentum: share of the running statistics that an update keeps, in [0, 1).
    conv: ``"auto"``, ``"patches"`` or ``"native"``, the implementation of convolutions.
    dtype: dtype of convolutions and activations; None for the dtype to which ``x`` and the
      parameters promote.
  """

  width: int
  batch_stats: str
  momentum: float
  conv: str
  dtype: jax.typing.DTypeLike | None

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Returns the output of the block, in the dtype of its convolutions."""

    def normalized_conv(x: jax.Array, size: int, name: str | None, norm: str | None) -> jax.Array:
      x = convolution(
        self.conv,
        self.width,
        size,
        padding=size // 2,
        use_bias=False,
        kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
        dtype=self.dtype,
        name=name,
      )(x)
      return BatchNorm(self.batch_stats, self.momentum, name=norm)(x, train=train)

    shortcut = normalized_conv(x, 1, "shortcut", "shortcut_norm")
    for _ in range(2):
      x = nn.leaky_relu(normalized_conv(x, 3, None, None), 0.1)
    x = normalized_conv(x, 3, None, None) + shortcut
    return max_pool(nn.leaky_relu(x, 0.1))


def drop_block(x: jax.Array, key: jax.Array, rate: float | jax.Array, block_size: int) -> jax.Array:
  r"""Sets random squares of each channel of each image to 0 and rescales the rest.

  Each of the ``(h - b + 1)(w - b + 1)`` squares of side ``b`` is dropped with probability

  .. math:: \gamma = \frac{rate}{b^2} \cdot \frac{h w}{(h - b + 1)(w - b + 1)}

  The rest is divided by the share of entries kept in the whole array. Squares overlap, so on
  average a little less than ``rate`` is dropped; exactly ``rate`` if ``block_size`` is 1 (dropout)
  or covers the image (whole channels).

  >>> y = drop_block(jnp.ones((1, 4, 5, 1)), jax.random.key(3), rate=0.2, block_size=2)
  >>> (y[0, :, :, 0] > 0).astype(int)
  Array([[0, 0, 1, 1, 1],
         [0, 0, 1, 1, 1],
         [1, 1, 1, 1, 1],
         [1, 1, 1, 1, 1]], dtype=int32)

  Source: Ghiasi, Lin and Le, *DropBlock* (https://arxiv.org/abs/1810.12890), algorithm 1.

  Args:
    x: ``[n, h, w, c]``.
    key: the random key; it alone determines where the squares are.
    rate: share of entries to drop, in [0, 1); may be traced. At 0 the result is ``x``.
    block_size: side of the squares in pixels, at least 1; cut to the height and width of ``x``.

  Returns:
    An array with the shape and dtype of ``x``; all 0 in the rare case that every entry is dropped.

  Raises:
    ValueError: ``rate`` or ``block_size`` is out of range.
  """
  _check_rate("rate", rate)
  if block_size < 1:
    raise ValueError(f"block_size must be at least 1, got {block_size}")
  n, height, width, channels = x.shape
  rows, columns = min(block_size, height), min(block_size, width)
  corners = (n, height - rows + 1, width - columns + 1, channels)
  gamma = rate * height * width / (rows * columns * corners[1] * corners[2])
  seeds = jax.random.bernoulli(key, gamma, corners).astype(jnp.float32)
  border = ((0, 0), (rows - 1, rows - 1), (columns - 1, columns - 1), (0, 0))
  kept = nn.max_pool(jnp.pad(seeds, border), (rows, columns)) == 0
  scale = kept.size / jnp.maximum(kept.sum(dtype=jnp.int32), 1)
  return jnp.where(kept, x * scale.astype(x.dtype), 0)


def _check_rate(name: str, rate: float | jax.Array) -> None:
  if not isinstance(rate, jax.core.Tracer) and not 0 <= rate < 1:
    raise ValueError(f"{name} must be in [0, 1), got {rate}")
