"""Encoders from images to a grid of features: separate patches, or a backbone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.typing

from jaxbo_models.layers import check_images


class PatchEncoder(nn.Module):
  r"""Splits images into patches and encodes each patch separately.

  The encoder is a convolution whose stride equals its kernel size, followed by 1 by 1 convolutions.
  It maps images ``[n, height, width, channels]`` of any real dtype to features
  ``[n, cells, features]``, with the cells in reading order. With :math:`x_i` the pixels of patch i,

  .. math:: y_i = \mathrm{relu}(W_1 x_i + b_1), \quad
    y_i \leftarrow \mathrm{relu}(W_l y_i + b_l), \quad a_i = y_i + p_i

  Each cell sees only its own patch, so attention on a cell is attention on what the patch shows;
  with ordinary convolutions that need not hold. A patch does not know its place in the image, so
  the encoder adds a learned position :math:`p_i`.

  >>> encoder = PatchEncoder(image_shape=(32, 32, 3), patch_size=8, features=64)
  >>> images = jax.ShapeDtypeStruct((5, 32, 32, 3), jnp.uint8)
  >>> variables = jax.eval_shape(encoder.init, jax.random.key(0), images)
  >>> jax.eval_shape(encoder.apply, variables, images).shape
  (5, 16, 64)

  Parameters are float32: ``Dense_i/{kernel,bias}``, and ``position [cells, features]``, which is
  initially normal with standard deviation 1 / sqrt(features).

  Attributes:
    image_shape: height, width and channels; height and width are multiples of ``patch_size``.
    patch_size: the side of a patch in pixels.
    features: number of features for each cell, at least 1.
    num_layers: number of layers, at least 1.
    positions: whether to add the learned positions.
    dtype: dtype of products and activations.

  Raises:
    ValueError: an attribute is out of its range.
  """

  image_shape: tuple[int, int, int] = (32, 32, 3)
  patch_size: int = 8
  features: int = 128
  num_layers: int = 2
  positions: bool = True
  dtype: jax.typing.DTypeLike = jnp.float32

  def __post_init__(self):
    for name in ("patch_size", "features", "num_layers"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
    if len(self.image_shape) != 3 or any(side % self.patch_size for side in self.image_shape[:2]):
      raise ValueError(
        "image_shape must be (height, width, channels), height and width being multiples of "
        f"patch_size = {self.patch_size}, got {self.image_shape}"
      )
    super().__post_init__()

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    """Returns the features ``[n, cells, features]`` of ``images``.

    Raises:
      ValueError: the images do not have the shape ``[n, *image_shape]``.
    """
    if images.ndim != 4 or images.shape[1:] != tuple(self.image_shape):
      raise ValueError(
        f"images must have the shape [n, {', '.join(map(str, self.image_shape))}], got "
        f"{images.shape}"
      )
    height, width, channels = self.image_shape
    size = self.patch_size
    rows, columns = height // size, width // size
    x = images.astype(self.dtype).reshape(-1, rows, size, columns, size, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, rows * columns, size * size * channels)
    for _ in range(self.num_layers):
      x = nn.relu(nn.Dense(self.features, dtype=self.dtype)(x))
    if self.positions:
      init = nn.initializers.normal(self.features**-0.5)
      table = self.param("position", init, (rows * columns, self.features), jnp.float32)
      x += table.astype(self.dtype)[None]
    return x


class GridEncoder(nn.Module):
  """Turns each pixel of a backbone's last feature map into a cell; the backbone is trained, too.

  >>> from jaxbo_models import ResNet12
  >>> encoder = GridEncoder(ResNet12(pool=False))
  >>> images = jax.ShapeDtypeStruct((5, 84, 84, 3), jnp.float32)
  >>> variables = jax.eval_shape(encoder.init, jax.random.key(0), images)
  >>> jax.eval_shape(encoder.apply, variables, images).shape
  (5, 25, 640)

  If you do not train the backbone, compute its features once and store them: a
  :class:`GuidedCaptioner` without an encoder reads features. If the backbone normalizes by batch
  statistics, the features and the loss of an image depend on the other images in the batch.

  Attributes:
    backbone: a module that maps images ``[n, height, width, channels]`` to
      ``[n, rows, columns, dim]`` and whose only collection is ``params``, such as
      ``ResNet12(pool=False)``.
  """

  backbone: nn.Module

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    """Returns the features ``[n, rows * columns, dim]`` of ``images``.

    Raises:
      ValueError: the images or the backbone's features do not have rank 4.
    """
    check_images(images, smallest=1)
    grid: jax.Array = self.backbone(images)  # pyright: ignore[reportCallIssue]
    if grid.ndim != 4:
      raise ValueError(
        "backbone must return [n, rows, columns, dim] (ResNet12 does with pool=False), got the "
        f"shape {grid.shape}"
      )
    return grid.reshape(len(grid), -1, grid.shape[-1])
