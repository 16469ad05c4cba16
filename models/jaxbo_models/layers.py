"""The layers that the convolutional models share: convolution, batch normalization and pooling."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.typing
import numpy as np


def convolution(
  conv: str,
  features: int,
  kernel_size: int,
  *,
  padding: int = 0,
  stride: int = 1,
  use_bias: bool = True,
  kernel_init: nn.initializers.Initializer = nn.linear.default_kernel_init,
  dtype: jax.typing.DTypeLike | None = None,
  name: str | None = None,
) -> nn.Conv:
  """Returns the convolution layer of all models here: square kernels and square strides.

  The parameters are those of :class:`flax.linen.Conv`, ``kernel [size, size, inputs, features]``
  and ``bias [features]``. All values of ``conv`` give the same results up to rounding.

  Inside a compiled loop, XLA's CPU backend does not use its fast convolutions, and a step is 4
  (LeNet-5) to 20 times (ResNet-12) slower than with patches. Outside loops on CPUs, ``"native"`` is
  16 to 25 % faster. ``python -m benchmarks.convolution`` in jaxbo's repository measures both.

  Args:
    conv: ``"native"`` is XLA's convolution. ``"patches"`` concatenates the ``size ** 2`` shifted
      images and multiplies matrices; it needs ``(size / stride) ** 2`` times the memory of the
      input. ``"auto"`` chooses when the model is traced: ``"patches"`` if
      ``jax.default_backend()`` is the CPU, else ``"native"``.
    features: number of output channels.
    kernel_size: side of the kernel in pixels.
    padding: number of zero pixels added on each side.
    stride: stride in pixels.
    use_bias: whether to add a bias.
    kernel_init: initializer of the kernel.
    dtype: dtype of the convolution; None for the dtype to which input and parameters promote.
    name: the layer's name; None for Flax's default.

  Raises:
    ValueError: ``conv`` is unknown.
  """
  if conv not in ("auto", "patches", "native"):
    raise ValueError(f"conv must be 'auto', 'patches' or 'native', got {conv!r}")
  if conv == "auto":
    conv = "patches" if jax.default_backend() == "cpu" else "native"
  return nn.Conv(
    features,
    (kernel_size, kernel_size),
    strides=stride,
    padding=padding,
    use_bias=use_bias,
    kernel_init=kernel_init,
    dtype=dtype,
    conv_general_dilated=_patches_conv if conv == "patches" else None,
    name=name,
  )


def check_sizes(name: str, *sizes: int) -> None:
  """Raises ``ValueError`` unless all of them are integers of at least 1."""
  for size in sizes:
    if not isinstance(size, int | np.integer) or size < 1:
      raise ValueError(f"{name} must be at least 1, an integer, got {size!r}")


def _patches_conv(
  images: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **_: Any
) -> jax.Array:
  """Computes ``lax.conv_general_dilated`` of NHWC images, without dilation, from patches."""
  images = jnp.pad(images, ((0, 0), *padding, (0, 0)))
  height, width, inputs, features = kernel.shape
  rows, columns = images.shape[1] - height + 1, images.shape[2] - width + 1
  down, right = strides
  patches = [
    images[:, i : i + rows : down, j : j + columns : right]
    for i in range(height)
    for j in range(width)
  ]
  return jnp.concatenate(patches, axis=-1) @ kernel.reshape(height * width * inputs, features)


class BatchNorm(nn.Module):
  r"""Batch normalization with an explicit choice of statistics and no hidden state.

  .. math:: y = \gamma (x - m) / \sqrt{v + \epsilon} + \beta

  ``m`` and ``v`` are the mean and the (biased) variance of each channel. The computation is in
  float32 at least; the result has the dtype of ``x``. ``params/scale`` and ``params/bias`` are
  ``[channels]`` in float32.

  >>> x = jnp.arange(6.0).reshape(3, 2)
  >>> norm = BatchNorm("batch")
  >>> variables = norm.init(jax.random.key(0), x)
  >>> list(variables)
  ['params']
  >>> norm.apply(variables, x)[:, 0].round(3)
  Array([-1.225,  0.   ,  1.225], dtype=float32)

  Running statistics change only if the caller keeps the updates that ``apply`` returns:

  >>> norm = BatchNorm("running", momentum=0.5)
  >>> variables = norm.init(jax.random.key(0), x)
  >>> y, updates = norm.apply(variables, x, train=True, mutable=["batch_stats"])
  >>> updates["batch_stats"]["mean"]  # half way from 0 to the batch's
  Array([1. , 1.5], dtype=float32)

  Attributes:
    batch_stats: ``"batch"`` always normalizes by the current batch: ``params`` is the only
      collection, and the result for an example depends on the other examples (*transductive*).
      ``"running"`` normalizes by ``mean`` and ``var``, ``[channels]``, in the collection
      ``batch_stats``.
    momentum: share of the running statistics that a training step keeps, in [0, 1); the batch
      supplies the rest. PyTorch's ``momentum`` is one minus ours.
    epsilon: constant added to the variance; positive.
  """

  batch_stats: str = "batch"
  momentum: float = 0.9
  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    """Returns ``x [..., channels]``, normalized over all axes but the last.

    Args:
      x: the array to normalize.
      train: with ``batch_stats="running"``, normalizes by the batch and moves the running
        statistics towards those of the batch; ``apply`` then needs ``mutable=["batch_stats"]``.
        With ``"batch"``, has no effect.

    Raises:
      ValueError: ``batch_stats``, ``momentum`` or ``epsilon`` is out of its range, ``train=True``
        needs a mutable collection, or the batch has only one value for each channel, which would
        always become ``bias``.
    """
    if self.batch_stats not in ("batch", "running"):
      raise ValueError(f"batch_stats must be 'batch' or 'running', got {self.batch_stats!r}")
    if not 0 <= self.momentum < 1:
      raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")
    if not 0 < self.epsilon < float("inf"):
      raise ValueError(f"epsilon must be positive and finite, got {self.epsilon}")
    num_channels = x.shape[-1]
    scale = self.param("scale", nn.initializers.ones, (num_channels,), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (num_channels,), jnp.float32)
    values = x.astype(jnp.promote_types(x.dtype, jnp.float32)).reshape(-1, num_channels)
    if self.batch_stats == "batch":
      mean, var = self._moments(values)
    else:
      running_mean = self.variable("batch_stats", "mean", jnp.zeros, num_channels, jnp.float32)
      running_var = self.variable("batch_stats", "var", jnp.ones, num_channels, jnp.float32)
      mean, var = running_mean.value, running_var.value
      if train and not self.is_initializing():
        if not self.is_mutable_collection("batch_stats"):
          raise ValueError(
            "train=True moves the running statistics: apply needs mutable=['batch_stats'] "
            "(or train=False, or batch_stats='batch')"
          )
        mean, var = self._moments(values)
        for running, new in ((running_mean, mean), (running_var, var)):
          moved = self.momentum * running.value + (1 - self.momentum) * new
          running.value = jax.lax.stop_gradient(moved).astype(jnp.float32)
    y = (values - mean[None]) * (jax.lax.rsqrt(var + self.epsilon) * scale)[None] + bias[None]
    return y.reshape(x.shape).astype(x.dtype)

  def _moments(self, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    if len(values) == 1 and not self.is_initializing():
      raise ValueError(
        "batch statistics need more than one value for each channel, got one image with one pixel; "
        "give more images at once (and do not vmap over single ones)"
      )
    # The formula E[x^2] - E[x]^2 would cancel.
    return values.mean(axis=0), values.var(axis=0)


def max_pool(x: jax.Array) -> jax.Array:
  """Max pooling over 2 by 2 pixels: ``[n, h, w, c]`` becomes ``[n, h // 2, w // 2, c]``.

  An odd last row or column is dropped. If one of the four pixels is NaN, the maximum is NaN. In a
  tie the first pixel gets the whole gradient. The gradient of ``jnp.max`` is not safe here: it
  divides by the number of entries equal to the maximum. XLA may round the two sides of that
  comparison differently, so that no entry is equal and the gradient is inf or NaN.
  """
  height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
  x = x[:, :height, :width]
  x = _larger(x[:, ::2], x[:, 1::2])
  return _larger(x[:, :, ::2], x[:, :, 1::2])


def _larger(first: jax.Array, second: jax.Array) -> jax.Array:
  """Returns the larger of each pair, or a NaN if there is one; it gets the whole gradient."""
  return jnp.where((first >= second) | jnp.isnan(first), first, second)


def check_images(images: jax.Array, smallest: int) -> None:
  """Raises ``ValueError`` unless images are ``[n >= 1, h, w, c]`` with ``h, w >= smallest``."""
  if images.ndim != 4:
    raise ValueError(f"images must have the shape [n, height, width, channels], got {images.shape}")
  if not images.shape[0]:
    raise ValueError(f"images must be at least one, got the shape {images.shape}")
  if min(images.shape[1:3]) < smallest:
    raise ValueError(
      f"images must be at least {smallest} pixels high and wide, got the shape {images.shape}"
    )
