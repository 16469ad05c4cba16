"""Rotary positions and how their frequencies are scaled for longer texts."""

import dataclasses
import math
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import jax.typing
import numpy as np


@runtime_checkable
class RotaryScaling(Protocol):
  """How the frequencies of rotary positions are scaled.

  Attributes:
    attention_factor: the factor of queries and keys.
  """

  @property
  def attention_factor(self) -> float:
    """The factor of queries and keys."""
    ...

  def scale(self, frequencies: np.ndarray, base: float) -> np.ndarray:
    """Returns the scaled frequencies, in radians for each position, ``[rotary_dim / 2]``."""
    ...


@dataclasses.dataclass(frozen=True)
class LinearScaling:
  """Divides all frequencies by ``factor``: positions are interpolated.

  Source: Chen et al. (https://arxiv.org/abs/2306.15595).
  """

  factor: float

  @property
  def attention_factor(self) -> float:
    """1."""
    return 1.0

  def scale(self, frequencies: np.ndarray, base: float) -> np.ndarray:
    """Returns the scaled frequencies."""
    return frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class DynamicScaling:
  """Scales nothing in texts of up to ``length`` tokens; longer ones are refused.

  For longer texts, the scaling of transformers depends on the longest text of a batch.

  Attributes:
    factor: how steeply the scaling begins; not used here.
    length: the length that the model was trained on, in tokens: the largest ``max_length``.
  """

  factor: float
  length: int

  @property
  def attention_factor(self) -> float:
    """1."""
    return 1.0

  def scale(self, frequencies: np.ndarray, base: float) -> np.ndarray:
    """Returns the frequencies."""
    return frequencies


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
  """Divides low frequencies by ``factor``, keeps high ones, and interpolates between the two.

  Source: Llama 3.1 (https://arxiv.org/abs/2407.21783), in the form of Hugging Face's transformers.

  Attributes:
    factor: the divisor of low frequencies.
    low_frequency: frequencies that make fewer turns than this in ``length`` tokens are low.
    high_frequency: frequencies that make more turns than this are high.
    length: the length that the model was first trained on, in tokens.
  """

  factor: float
  low_frequency: float
  high_frequency: float
  length: int

  @property
  def attention_factor(self) -> float:
    """1."""
    return 1.0

  def scale(self, frequencies: np.ndarray, base: float) -> np.ndarray:
    """Returns the scaled frequencies."""
    turns = self.length * frequencies / (2 * math.pi)
    kept = np.clip(
      (turns - self.low_frequency) / (self.high_frequency - self.low_frequency), 0.0, 1.0
    )
    return (1 - kept) * frequencies / self.factor + kept * frequencies


@dataclasses.dataclass(frozen=True)
class YarnScaling:
  """YaRN: interpolates low frequencies, keeps high ones, and sharpens attention.

  Source: Peng et al. (https://arxiv.org/abs/2309.00071), in the form of transformers.

  Attributes:
    factor: the divisor of low frequencies.
    length: the length that the model was first trained on, in tokens.
    attention_factor: the factor of queries and keys.
    beta_fast: dimensions that turn more often than this in ``length`` tokens are kept.
    beta_slow: dimensions that turn less often than this are interpolated.
    truncate: round the borders to whole dimensions.
  """

  factor: float
  length: int
  attention_factor: float
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  truncate: bool = True

  def scale(self, frequencies: np.ndarray, base: float) -> np.ndarray:
    """Returns the scaled frequencies."""
    dim = 2 * len(frequencies)

    def border(turns: float) -> float:
      """The dimension that makes so many turns in the first length."""
      return dim * math.log(self.length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = border(self.beta_fast), border(self.beta_slow)
    if self.truncate:
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
      high += 0.001
    interpolated = np.clip((np.arange(dim // 2) - low) / (high - low), 0.0, 1.0)
    return frequencies / self.factor * interpolated + frequencies * (1 - interpolated)


class Rotation(NamedTuple):
  """Cosines and sines of rotary positions, ``[batch or 1, length, 1, rotary_dim / 2]``."""

  cos: jax.Array
  sin: jax.Array


def find_rotation(
  rotary_dim: int,
  base: float,
  scaling: RotaryScaling | None,
  positions: jax.Array,
  dtype: jax.typing.DTypeLike,
) -> Rotation:
  """Returns the rotation of ``positions [batch or 1, length]``, in float32 at least."""
  frequencies = base ** -(np.arange(0, rotary_dim, 2) / rotary_dim)
  if scaling is not None:
    frequencies = scaling.scale(frequencies, base)
  dtype = jnp.promote_types(dtype, jnp.float32)
  angles = (
    positions[:, :, None, None].astype(dtype) * jnp.asarray(frequencies, dtype)[None, None, None]
  )
  rotation = Rotation(jnp.cos(angles), jnp.sin(angles))
  if scaling is None or scaling.attention_factor == 1:
    return rotation
  return Rotation(*(scaling.attention_factor * x for x in rotation))


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
  """Rotates the pairs ``(x_i, x_{i + half})`` of ``x [batch, length, heads, head_dim]``."""
  cos, sin = rotation
  half = cos.shape[-1]
  first, second, rest = jnp.split(x, (half, 2 * half), axis=-1)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return jnp.concatenate([rotated.astype(x.dtype), rest], axis=-1)
