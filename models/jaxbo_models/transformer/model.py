"""The decoder-only transformer: a scan over its blocks."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxbo_models.rows import rows
from jaxbo_models.transformer.attention import Cache, attention, extend
from jaxbo_models.transformer.config import TransformerConfig
from jaxbo_models.transformer.layers import dense, feed_forward, norm, normal
from jaxbo_models.transformer.rotary import Rotation, find_rotation
from jaxbo_models.transformer.visibility import (
  Sight,
  find_cached_sight,
  find_positions,
  find_sight,
)


class LayerKind(NamedTuple):
  """What differs between layers; each ``[num_layers]``, or a scalar of one layer.

  Attributes:
    has_window: whether the layer sees through the sliding window.
    is_rotated: whether its queries and keys are rotated.
  """

  has_window: jax.Array
  is_rotated: jax.Array


class Transformer(nn.Module):
  r"""A decoder-only transformer with normalization before each layer.

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
    and the biases of these four;
  * with ``norm="rms"`` no ``bias`` of a normalization; with grouped queries, instead of ``qkv``,
    ``query/kernel [width, num_heads, head_dim]`` and
    ``key_value/kernel [width, 2, num_kv_heads, head_dim]``; with ``gated``, ``ffn_gate`` as
    ``ffn_in``; with ``qk_norm``, ``query_norm/scale`` and ``key_norm/scale [head_dim]``.

  Kernels and embeddings are initialized as in GPT-2: normal with standard deviation 0.02, divided
  by ``sqrt(2 num_layers)`` for ``attention_out`` and ``ffn_out``. The other families were
  trained from other initial values.

  Sources: see :func:`gpt2`, :func:`opt`, :func:`pythia` and :func:`llama`; for rotary positions,
  Su et al. (https://arxiv.org/abs/2104.09864); for RMSNorm, Zhang and Sennrich
  (https://arxiv.org/abs/1910.07467); for gates, Shazeer (https://arxiv.org/abs/2002.05202); for
  grouped queries, Ainslie et al. (https://arxiv.org/abs/2305.13245).

  Attributes:
    config: a :class:`TransformerConfig`.
  """

  config: TransformerConfig

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    mask: jax.Array | None = None,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    cache: Cache | None = None,
    return_hidden: bool = False,
  ) -> Any:
    """Returns the logits ``[batch, length, vocab_size]``, in float32 at least.

    Args:
      tokens: ``[batch, length]``, integers in [0, vocab_size); ids at padding are ignored. An id
        outside the vocabulary makes the logits of its sequence NaN.
      mask: ``[batch, length]``, bool: True for real tokens, False for padding, on either side; None
        if all are real. No token attends to padding, and positions count only real tokens. Ignore
        the logits at padding.
      positions: ``[batch, length]``, integers, at least 0; None to count the real tokens of a row,
        or of a segment. Learned positions are below ``max_length``; others make the logits of
        their sequence NaN.
      segment_ids: ``[batch, length]``, integers, for rows in which documents are packed: tokens
        attend only to tokens with the same id. None if each row is one document, and with a cache.
      cache: a cache from :func:`empty_cache`. The first call adds the prompts, which must end in
        the last place; each later call adds one token to each row, with its position.
      return_hidden: whether to return, instead of the logits, the hidden states that the head
        (:func:`head_of`) multiplies: ``[batch, length, width]`` in ``dtype``.

    Returns:
      The logits; with a cache, those of the last token alone, ``[batch, vocab_size]``, and the
      filled cache.

    Raises:
      ValueError: an argument has another shape or dtype, ``tokens`` are longer than ``max_length``,
        or ``dtype`` is float16 on a CPU.
    """
    config = self.config
    _check(config, tokens, mask, positions, segment_ids)
    if mask is not None:
      tokens = jnp.where(mask, tokens, 0)  # An unknown id would give NaN, and 0 * NaN is NaN.
    if positions is None:
      positions = find_positions(tokens, mask, segment_ids)
    elif mask is not None:
      positions = jnp.where(mask, positions, 0)

    embedding = self._table("token_embedding", config.vocab_size)
    x = rows(embedding, tokens)
    rotation = None
    if config.rotary_fraction:
      rotation = find_rotation(
        config.rotary_dim, config.rotary_base, config.rotary_scaling, positions, config.dtype
      )
    else:
      table = self._table("position_embedding", config.position_offset + config.max_length)
      x += rows(table, jnp.where(positions < 0, -1, positions + config.position_offset))

    if cache is None:
      layers, sight = None, find_sight(tokens.shape[1], config.window, mask, segment_ids)
    else:
      start, cache = cache.length, extend(cache, tokens, mask)
      layers = cache.key, cache.value, jnp.full(config.num_layers, start)
      sight = find_cached_sight(start, tokens.shape[1], config.window, cache.real)
    x, layers = _blocks(config)(x.astype(config.dtype), sight, rotation, _kinds(config), layers)
    x = norm(config, "final_norm")(x if cache is None else x[:, -1])
    if return_hidden:
      return x
    if config.tied_head:
      logits = jnp.dot(x, embedding.astype(config.dtype).T)
    else:
      logits = dense(config, "head", config.vocab_size, use_bias=False)(x)
    logits = logits.astype(jnp.promote_types(config.dtype, jnp.float32))
    if cache is None:
      return logits
    return logits, cache._replace(key=layers[0], value=layers[1])

  def _table(self, name: str, num_rows: int) -> jax.Array:
    return self.param(name, normal(), (num_rows, self.config.width), jnp.float32)


def head_of(params: Any) -> jax.Array:
  """The matrix that makes logits of hidden states, ``[width, vocab_size]``, tied or not."""
  return params["head"]["kernel"] if "head" in params else params["token_embedding"].T


class Block(nn.Module):
  """One block of :class:`Transformer`, the body of a scan over blocks.

  Attributes:
    config: the model's :class:`TransformerConfig`.
  """

  config: TransformerConfig

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    sight: Sight | None,
    rotation: Rotation | None,
    kind: LayerKind | None = None,
    cache: tuple[jax.Array, jax.Array, jax.Array] | None = None,
  ) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array] | None]:
    """Returns the residual stream after the block, and the block's part of the cache.

    Args:
      x: the residual stream, ``[batch, length, width]``.
      sight: which tokens each token sees; None for all in the causal order.
      rotation: the rotary positions; None if positions are learned.
      kind: what is special about the layer; None if all layers are alike.
      cache: keys, values and the number of places in use; None without a cache.
    """
    config = self.config
    visible, rotation = _of_layer(sight, rotation, kind)
    attended, cache = attention(config, norm(config, "attention_norm")(x), visible, rotation, cache)
    if config.parallel_residual:
      return x + attended + feed_forward(config, norm(config, "ffn_norm")(x)), cache
    x = x + attended
    return x + feed_forward(config, norm(config, "ffn_norm")(x)), cache


def _blocks(config: TransformerConfig) -> Any:
  """The scan over blocks."""
  block = Block
  if config.remat:
    # In a loop, XLA cannot merge the recomputation with the forward pass; unrolled, it can.
    policy = None if config.remat is True else getattr(jax.checkpoint_policies, str(config.remat))
    block = nn.remat(Block, prevent_cse=config.unroll > 1, policy=policy)
  shared: Any = nn.broadcast
  in_axes: Any = (shared, shared, 0, 0)  # Flax declares an int.
  scanned = nn.scan(
    block,
    variable_axes={"params": 0},
    split_rngs={"params": True},
    in_axes=in_axes,
    length=config.num_layers,
    unroll=config.unroll,
  )
  return scanned(config, name="blocks")


def _kinds(config: TransformerConfig) -> LayerKind | None:
  """The kinds of the layers, or None if all are alike."""
  if not (config.full_attention_layers or config.unrotated_layers):
    return None
  layers = range(config.num_layers)
  return LayerKind(
    has_window=jnp.array([layer not in config.full_attention_layers for layer in layers]),
    is_rotated=jnp.array([layer not in config.unrotated_layers for layer in layers]),
  )


def _of_layer(
  sight: Sight | None, rotation: Rotation | None, kind: LayerKind | None
) -> tuple[jax.Array | None, Rotation | None]:
  """What a layer of this kind sees, and how it rotates."""
  if sight is None:
    return None, rotation
  visible = sight.full if sight.window is None else sight.window
  if kind is None:
    return visible, rotation
  if sight.window is not None:
    full = True if sight.full is None else sight.full
    visible = jnp.where(kind.has_window, sight.window, full)
  if rotation is not None:
    cos, sin = rotation
    rotation = Rotation(jnp.where(kind.is_rotated, cos, 1), jnp.where(kind.is_rotated, sin, 0))
  return visible, rotation


def _check(
  config: TransformerConfig,
  tokens: jax.Array,
  mask: jax.Array | None,
  positions: jax.Array | None,
  segment_ids: jax.Array | None,
) -> None:
  if jnp.dtype(config.dtype) == jnp.float16 and jax.default_backend() == "cpu":
    raise ValueError("dtype must not be float16 on a CPU, which cannot multiply in it; got float16")
  if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise ValueError(
      f"tokens must be integers [batch, length], got {tokens.dtype} of shape {tokens.shape}"
    )
  if tokens.shape[1] > config.max_length:
    raise ValueError(
      f"tokens must be at most max_length = {config.max_length} long, got the shape {tokens.shape}"
    )
  if mask is not None and (mask.shape != tokens.shape or mask.dtype != jnp.bool_):
    raise ValueError(
      f"mask must be bool of the shape of tokens, {tokens.shape}, got {mask.dtype} of shape "
      f"{mask.shape}"
    )
  for name, ids in (("positions", positions), ("segment_ids", segment_ids)):
    if ids is not None and (
      ids.shape != tokens.shape or not jnp.issubdtype(ids.dtype, jnp.integer)
    ):
      raise ValueError(
        f"{name} must be integers of the shape of tokens, {tokens.shape}, got {ids.dtype} of shape "
        f"{ids.shape}"
      )
