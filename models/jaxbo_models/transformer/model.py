"""The decoder-only transformer: a scan over its blocks."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxbo_models.mesh import dot_general
from jaxbo_models.rows import rows
from jaxbo_models.transformer.config import ACTIVATIONS, TransformerConfig


class Transformer(nn.Module):
  r"""A decoder-only transformer with layer normalization before each layer.

  The model maps tokens ``[batch, length]`` to the logits of the next tokens,
  ``[batch, length, vocab_size]`` in float32. There is no dropout. The first block reads
  :math:`x_0 = E_{token} + P_{position}` (without :math:`P` for rotary positions). A block is

  .. math::
    y = x + \mathrm{attention}(\mathrm{norm}(x)), \qquad x' = y + \mathrm{ffn}(\mathrm{norm}'(y)),

  or :math:`x' = x + \mathrm{attention}(\mathrm{norm}(x)) + \mathrm{ffn}(\mathrm{norm}'(x))` with
  ``parallel_residual``. A final normalization follows the last block. Attention is causal
  :func:`jax.nn.dot_product_attention`.

  >>> from jaxbo_models import transformer
  >>> model = Transformer(transformer.gpt2())
  >>> tokens = jax.ShapeDtypeStruct((8, 100), jnp.int32)
  >>> variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
  >>> jax.eval_shape(model.apply, variables, tokens).shape
  (8, 100, 50257)
  >>> sum(leaf.size for leaf in jax.tree.leaves(variables))
  124439808

  Parameters are float32 at least:

  * ``token_embedding [vocab_size, width]`` and ``final_norm/{scale,bias}``;
  * ``position_embedding [position_offset + max_length, width]`` if positions are learned;
  * ``head/kernel [width, vocab_size]`` if the head is not tied;
  * in ``blocks``, each with a first axis for the layer: ``attention_norm`` and ``ffn_norm``
    ``{scale,bias}``, ``qkv/kernel [width, 3, num_heads, head_dim]``,
    ``attention_out/kernel [num_heads, head_dim, width]``, ``ffn_in/kernel``, ``ffn_out/kernel``,
    and the biases of these four.

  Kernels and embeddings are initialized as in GPT-2: normal with standard deviation 0.02, divided
  by ``sqrt(2 num_layers)`` for ``attention_out`` and ``ffn_out``. OPT and Pythia were trained from
  other initial values.

  Sources: see :func:`gpt2`, :func:`opt` and :func:`pythia`; for rotary positions, Su et al.
  (https://arxiv.org/abs/2104.09864).

  Attributes:
    config: a :class:`TransformerConfig`.
  """

  config: TransformerConfig

  @nn.compact
  def __call__(self, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Returns the logits ``[batch, length, vocab_size]``, in float32 at least.

    Args:
      tokens: ``[batch, length]``, integers in [0, vocab_size); ids at padding are ignored. An id
        outside the vocabulary makes the logits of its sequence NaN.
      mask: ``[batch, length]``, bool: True for real tokens, False for padding, on either side; None
        if all are real. No token attends to padding, and positions count only real tokens. Ignore
        the logits at padding.

    Raises:
      ValueError: ``tokens`` or ``mask`` has another shape or dtype, or is longer than
        ``max_length``.
    """
    config = self.config
    _check_tokens(tokens, mask, config.max_length)
    if mask is None:
      positions = jnp.arange(tokens.shape[1])[None]
    else:
      positions = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
      tokens = jnp.where(mask, tokens, 0)  # An unknown id would give NaN, and 0 * NaN is NaN.

    embedding = self._table("token_embedding", config.vocab_size)
    x = rows(embedding, tokens)
    rotation = None
    if config.rotary_fraction:
      rotation = _rotation(config, positions)
    else:
      num_rows = config.position_offset + config.max_length
      table = self._table("position_embedding", num_rows)
      x += rows(table, positions + config.position_offset)

    block = Block
    if config.remat:
      # In a loop, XLA cannot merge the recomputation with the forward pass; unrolled, it can.
      block = nn.remat(Block, prevent_cse=config.unroll > 1)
    broadcast: Any = nn.broadcast  # Flax declares an int.
    blocks = nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=broadcast,
      length=config.num_layers,
      unroll=config.unroll,
    )
    x, _ = blocks(config, name="blocks")(x.astype(config.dtype), mask, rotation)
    x = _norm(config, "final_norm")(x)
    if config.tied_head:
      logits = jnp.dot(x, embedding.astype(config.dtype).T)
    else:
      logits = nn.Dense(
        config.vocab_size,
        use_bias=False,
        kernel_init=_normal(),
        dtype=config.dtype,
        name="head",
      )(x)
    return logits.astype(jnp.promote_types(config.dtype, jnp.float32))

  def _table(self, name: str, num_rows: int) -> jax.Array:
    return self.param(name, _normal(), (num_rows, self.config.width), jnp.float32)


class Block(nn.Module):
  """One block of :class:`Transformer`, the body of a scan over blocks.

  Attributes:
    config: the model's :class:`TransformerConfig`.
  """

  config: TransformerConfig

  @nn.compact
  def __call__(
    self, x: jax.Array, mask: jax.Array | None, rotation: tuple[jax.Array, jax.Array] | None
  ) -> tuple[jax.Array, None]:
    """Returns the residual stream after the block, and None (the scan has no other outputs).

    Args:
      x: the residual stream, ``[batch, length, width]``.
      mask: ``[batch, length]``, bool: True for real tokens, False for padding; None if all are
        real.
      rotation: cosines and sines of rotary positions, ``[batch or 1, length, 1, rotary_dim / 2]``;
        None if positions are learned.
    """
    attended = self._attention(_norm(self.config, "attention_norm")(x), mask, rotation)
    if self.config.parallel_residual:
      return x + attended + self._ffn(_norm(self.config, "ffn_norm")(x)), None
    x = x + attended
    return x + self._ffn(_norm(self.config, "ffn_norm")(x)), None

  def _attention(
    self, x: jax.Array, mask: jax.Array | None, rotation: tuple[jax.Array, jax.Array] | None
  ) -> jax.Array:
    config = self.config
    qkv = nn.DenseGeneral(
      (3, config.num_heads, config.head_dim), kernel_init=_normal(), dtype=config.dtype, name="qkv"
    )(x)
    query, key, value = (qkv[:, :, i] for i in range(3))
    if rotation is not None:
      query, key = _rotate(query, *rotation), _rotate(key, *rotation)
    implementation: Any = config.attention
    attended = jax.nn.dot_product_attention(
      query,
      key,
      value,
      mask=None if mask is None else mask[:, None, None, :],
      is_causal=True,
      implementation=implementation,
    )
    return nn.DenseGeneral(
      config.width,
      axis=(-2, -1),
      kernel_init=_normal(2 * config.num_layers),
      dtype=config.dtype,
      dot_general=dot_general,
      name="attention_out",
    )(attended)

  def _ffn(self, x: jax.Array) -> jax.Array:
    config = self.config
    hidden = nn.Dense(
      config.ffn_width or 4 * config.width,
      kernel_init=_normal(),
      dtype=config.dtype,
      name="ffn_in",
    )(x)
    return nn.Dense(
      config.width,
      kernel_init=_normal(2 * config.num_layers),
      dtype=config.dtype,
      dot_general=dot_general,
      name="ffn_out",
    )(ACTIVATIONS[config.activation](hidden))


def _normal(num_terms: int = 1) -> nn.initializers.Initializer:
  """GPT-2's initializer for a layer whose output is one of ``num_terms`` in the residual sum."""
  return nn.initializers.normal(0.02 / num_terms**0.5)


def _norm(config: TransformerConfig, name: str) -> nn.LayerNorm:
  # The fast variance, E[x^2] - E[x]^2, cancels.
  return nn.LayerNorm(config.epsilon, dtype=config.dtype, use_fast_variance=False, name=name)


def _rotation(config: TransformerConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns cosines and sines ``[batch or 1, length, 1, rotary_dim / 2]`` for ``positions``."""
  exponents = np.arange(0, config.rotary_dim, 2) / config.rotary_dim
  dtype = jnp.promote_types(config.dtype, jnp.float32)
  frequencies = jnp.asarray(config.rotary_base**-exponents, dtype)
  angles = positions[:, :, None, None].astype(dtype) * frequencies[None, None, None]
  return jnp.cos(angles), jnp.sin(angles)


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates the pairs ``(x_i, x_{i + half})`` of ``x [batch, length, heads, head_dim]``."""
  half = cos.shape[-1]
  first, second, rest = jnp.split(x, (half, 2 * half), axis=-1)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return jnp.concatenate([rotated.astype(x.dtype), rest], axis=-1)


def _check_tokens(tokens: jax.Array, mask: jax.Array | None, max_length: int) -> None:
  if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise ValueError(
      f"tokens must be integers [batch, length], got {tokens.dtype} of shape {tokens.shape}"
    )
  if tokens.shape[1] > max_length:
    raise ValueError(
      f"tokens must be at most max_length = {max_length} long, got the shape {tokens.shape}"
    )
  if mask is not None and (mask.shape != tokens.shape or mask.dtype != jnp.bool_):
    raise ValueError(
      f"mask must be bool of the shape of tokens, {tokens.shape}, got {mask.dtype} of shape "
      f"{mask.shape}"
    )
