"""The layers of a block but for attention: normalization, dense layers and the feed-forward."""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax

from jaxbo_models.mesh import dot_general
from jaxbo_models.transformer.config import ACTIVATIONS, TransformerConfig


def normal(num_terms: int = 1) -> nn.initializers.Initializer:
  """GPT-2's initializer for a layer whose output is one of ``num_terms`` in the residual sum."""
  return nn.initializers.normal(0.02 / num_terms**0.5)


def norm(config: TransformerConfig, name: str) -> nn.Module:
  """Normalization over the last axis, of its mean and scale or (``"rms"``) of its scale alone."""
  if config.norm == "rms":
    return nn.RMSNorm(config.epsilon, dtype=config.dtype, name=name)
  # The fast variance, E[x^2] - E[x]^2, cancels.
  return nn.LayerNorm(config.epsilon, dtype=config.dtype, use_fast_variance=False, name=name)


def dense(
  config: TransformerConfig,
  name: str,
  outputs: int | Sequence[int],
  use_bias: bool,
  *,
  num_inputs: int = 1,
  num_terms: int = 1,
) -> nn.Module:
  """A linear layer from the last ``num_inputs`` axes to axes of the sizes ``outputs``."""
  return nn.DenseGeneral(
    outputs,
    axis=tuple(range(-num_inputs, 0)),
    use_bias=use_bias,
    kernel_init=normal(num_terms),
    dtype=config.dtype,
    dot_general=dot_general,
    name=name,
  )


def feed_forward(config: TransformerConfig, x: jax.Array) -> jax.Array:
  """The feed-forward layer, plain or gated, of ``x [batch, length, width]``."""
  hidden_width = config.ffn_width or 4 * config.width
  layer = functools.partial(dense, config, use_bias=config.ffn_bias)
  activation = ACTIVATIONS[config.activation]
  hidden = layer("ffn_in", hidden_width)(x)
  if config.gated:
    hidden = activation(layer("ffn_gate", hidden_width)(x)) * hidden
  else:
    hidden = activation(hidden)
  return layer("ffn_out", config.width, num_terms=2 * config.num_layers)(hidden)
