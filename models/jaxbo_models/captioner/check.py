"""Checks of a captioner's attributes, arrays, captions and parameters."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

_CHOICES = {
  "guide": ("sequential", "static", "none"),
  "attention_query": ("guide", "hidden", "hidden_word"),
  "context_gates": ("all", "candidate"),
  "candidate": ("tanh", "maxout"),
  "init_state": ("zeros", "pooled"),
}


def check_flags(model: Any) -> None:
  """Raises ``ValueError`` if an attribute of a :class:`GuidedCaptioner` is out of its range."""
  for name in ("vocab_size", "embed_dim", "hidden_dim", "attention_dim", "unroll"):
    if getattr(model, name) < 1:
      raise ValueError(f"{name} must be at least 1, got {getattr(model, name)}")
  for name, allowed in _CHOICES.items():
    if getattr(model, name) not in allowed:
      raise ValueError(f"{name} must be one of {allowed}, got {getattr(model, name)!r}")
  if model.num_attributes < 0:
    raise ValueError(f"num_attributes must not be negative, got {model.num_attributes}")
  if not 0 <= model.dropout < 1:
    raise ValueError(f"dropout must be in [0, 1), got {model.dropout}")
  if not jnp.issubdtype(model.dtype, jnp.floating):
    raise ValueError(f"dtype must be a floating-point type, got {model.dtype}")
  if model.guide == "none":
    if model.attention_query == "guide":
      raise ValueError(
        "attention_query must be 'hidden' or 'hidden_word' with guide='none', got 'guide'"
      )
    if model.num_attributes:
      raise ValueError(f"num_attributes must be 0 with guide='none', got {model.num_attributes}")
  if not model.decoder_word and model.guide != "sequential":
    raise ValueError(
      f"decoder_word=False needs guide='sequential', which reads the words, got {model.guide!r}"
    )


def check_tokens(tokens: jax.Array, mask: jax.Array | None) -> None:
  """Raises ``ValueError`` unless tokens and mask have the shapes and dtypes of captions."""
  if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise ValueError(
      f"tokens must be integers [batch, length], got {tokens.dtype} of shape {tokens.shape}"
    )
  if tokens.shape[1] < 1:
    raise ValueError(
      f"tokens must have a first token in each caption, got the shape {tokens.shape}"
    )
  _check_mask("mask", mask, "tokens", tokens.shape)


def check_features(features: jax.Array, cell_mask: jax.Array | None, made_for: int | None) -> None:
  """Raises ``ValueError`` unless features are floats ``[batch, num_cells, made_for]``."""
  width = "dim" if made_for is None else made_for
  expected = f"features must be floats [batch, num_cells, {width}]"
  got = f"got {features.dtype} of shape {features.shape}"
  if features.ndim != 3 or not jnp.issubdtype(features.dtype, jnp.floating):
    raise ValueError(f"{expected}, {got}; images need an encoder")
  if features.shape[1] < 1:
    raise ValueError(f"{expected} with at least one cell, {got}")
  if made_for is not None and features.shape[2] != made_for:
    raise ValueError(f"{expected} as the parameters were made for, {got}")
  _check_mask("cell_mask", cell_mask, "features", features.shape[:2])


def check_captions(tokens: Any, mask: Any = None, *, vocab_size: int) -> None:
  """Raises ``ValueError`` for captions that give NaN or meaningless losses.

  Jitted code cannot raise: a loss is NaN if its caption has an unknown token, and 0 if its caption
  has no target. So call this function where you load the data.

  >>> check_captions([[1, 5, 2], [1, 7, 2]], vocab_size=6)
  Traceback (most recent call last):
    ...
  ValueError: tokens must be in [0, vocab_size = 6), got 7 in caption 1 at position 1

  Args:
    tokens: ``[batch, length]``, integers; each caption starts with its beginning token.
    mask: ``[batch, length]``, bool: True for real tokens, False for padding; None if all are real.
    vocab_size: the model's number of tokens; ids are in [0, vocab_size).

  Raises:
    ValueError: a token is unknown, a caption is empty (it has no token after the first), or the
      padding in a mask is not at the end. The message names the caption, counted from 0. Also if
      ``tokens`` or ``mask`` has another shape or dtype.
  """
  tokens = np.asarray(tokens)
  if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
    raise ValueError(
      f"tokens must be integers [batch, length], got {tokens.dtype} of shape {tokens.shape}"
    )
  mask = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask)
  _check_mask("mask", mask, "tokens", tokens.shape)
  late = mask[:, 1:] & ~mask[:, :-1]
  if late.any():
    raise ValueError(f"mask must have its padding at the end, got caption {late.any(1).argmax()}")
  empty = mask.sum(axis=1) < 2
  if empty.any():
    raise ValueError(
      "tokens must have a token after the first in each caption, got an empty caption "
      f"{empty.argmax()}"
    )
  unknown = mask & ((tokens < 0) | (tokens >= vocab_size))
  if unknown.any():
    row, column = np.argwhere(unknown)[0]
    raise ValueError(
      f"tokens must be in [0, vocab_size = {vocab_size}), got {tokens[row, column]} in caption "
      f"{row} at position {column}"
    )


def check_params(model: nn.Module, params: Any, features: Any, tokens: Any) -> None:
  """Raises ``ValueError`` unless ``params`` fit this configuration of the model.

  Call this after loading a checkpoint. Without the check, parameters of another configuration fail
  later with a message from Flax, or never fail if their shapes happen to agree. The check runs no
  model computation.

  >>> from jaxbo_models import captioner
  >>> small, large = captioner.GuidedCaptioner(9, 4, 8, 8), captioner.GuidedCaptioner(9, 4, 16, 8)
  >>> features, tokens = jnp.zeros((2, 3, 5)), jnp.zeros((2, 4), int)
  >>> params = jax.eval_shape(small.init, jax.random.key(0), features, tokens)["params"]
  >>> check_params(small, params, features, tokens)
  >>> check_params(large, params, features, tokens)
  Traceback (most recent call last):
    ...
  ValueError: params must be those of this configuration: ['attention']['query'] must be (16, 8) \
of float32, got (8, 8) of float32

  Args:
    model: the :class:`GuidedCaptioner`, or any module that takes features and tokens.
    params: the parameters: ``"params"`` of what ``init`` returns, or a loaded checkpoint.
    features: ``[batch, num_cells, dim]`` floats (or images, if the model has an encoder), or their
      :class:`jax.ShapeDtypeStruct`.
    tokens: ``[batch, length]``, integers, or their :class:`jax.ShapeDtypeStruct`.

  Raises:
    ValueError: a parameter is missing, unexpected, or of another shape or dtype.
  """
  made = jax.eval_shape(model.init, jax.random.key(0), features, tokens)["params"]
  named = lambda tree: {
    jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
  expected, got = named(made), named(params)
  describe = lambda leaf: "none" if leaf is None else f"{leaf.shape} of {leaf.dtype}"
  for name in sorted(expected | got):
    want, have = describe(expected.get(name)), describe(got.get(name))
    if want != have:
      raise ValueError(
        f"params must be those of this configuration: {name} must be {want}, got {have}"
      )


def _check_mask(name: str, mask: Any, of: str, shape: tuple[int, ...]) -> None:
  if mask is not None and (mask.shape != shape or mask.dtype != np.bool_):
    raise ValueError(
      f"{name} must be bool, one for each of {of}, {shape}, got {mask.dtype} of shape {mask.shape}"
    )
