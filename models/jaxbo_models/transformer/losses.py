"""Next-token losses of tokens and of sequences."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxbo_models.batch_loss import BatchLoss


def token_losses(
  logits: jax.Array, tokens: jax.Array, mask: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
  r"""The cross-entropy of each token given the tokens before it.

  .. math:: \ell_t = -\log \mathrm{softmax}(z_t)_{u_{t + 1}}, \qquad t = 0, \dots, T - 2

  A target counts if it is a real token and the token before it is real, too. So the first real
  token never counts, with or without padding on the left.

  >>> logits, tokens = jnp.zeros((1, 4, 8)), jnp.array([[3, 1, 4, 0]])
  >>> losses, weights = token_losses(logits, tokens, jnp.array([[True, True, True, False]]))
  >>> losses.round(4)  # log 8
  Array([[2.0794, 2.0794, 0.    ]], dtype=float32)
  >>> weights
  Array([[1., 1., 0.]], dtype=float32)

  Args:
    logits: ``[batch, length, vocab_size]``; values at padding are ignored.
    tokens: ``[batch, length]``, integers.
    mask: ``[batch, length]``, bool: True for real tokens, False for padding; None if all are real.

  Returns:
    The losses and their weights, both ``[batch, length - 1]`` in float32 at least. Targets that
    count have weight 1; the others have weight 0 and loss 0.
  """
  logits, targets = logits[:, :-1], tokens[:, 1:]
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  counts = _targets(tokens, mask)
  if mask is not None:
    # Mask before the loss, too: masking only after it can make the gradient 0 * NaN.
    logits, targets = jnp.where(counts[:, :, None], logits, 0), jnp.where(counts, targets, 0)
  losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets)
  return jnp.where(counts, losses, 0), counts.astype(losses.dtype)


def sequence_losses(model: nn.Module, reduction: str = "mean") -> BatchLoss:
  """Makes a function that returns one loss for each sequence, for ``jaxbo.per_example_grad``.

  >>> from jaxbo_models import transformer
  >>> config = transformer.gpt2(vocab_size=257, max_length=16, num_layers=2, width=32, num_heads=4)
  >>> model = transformer.Transformer(config)
  >>> tokens = jnp.arange(24).reshape(2, 12)
  >>> params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
  >>> jax.eval_shape(sequence_losses(model), params, {"tokens": tokens}).shape
  (2,)

  Args:
    model: a :class:`Transformer`, or any module that maps tokens and a mask to logits.
    reduction: ``"mean"`` or ``"sum"`` over the real tokens that follow a real token. With the mean,
      long sequences do not get large losses because of their length.

  Returns:
    A function ``(params, batch) -> losses``, ``[batch]`` in float32 at least. The batch holds
    ``"tokens" [batch, length]`` and, if there is padding, ``"mask" [batch, length]``. A sequence
    without a target has loss 0, and does not count where losses are reweighted
    (``loss_fn.example_mask``).

  Raises:
    ValueError: ``reduction`` is unknown.
  """
  if reduction not in ("mean", "sum"):
    raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")

  def loss_fn(params: Any, batch: Mapping[str, Any]) -> jax.Array:
    tokens, mask = batch["tokens"], batch.get("mask")
    logits: Any = model.apply({"params": params}, tokens, mask)
    losses, weights = token_losses(logits, tokens, mask)
    total = jnp.sum(losses, axis=1)
    return total if reduction == "sum" else total / jnp.maximum(jnp.sum(weights, axis=1), 1)

  def example_mask(batch: Mapping[str, Any]) -> jax.Array:
    return jnp.any(_targets(batch["tokens"], batch.get("mask")), axis=1)

  return BatchLoss(loss_fn, example_mask)


def _targets(tokens: jax.Array, mask: jax.Array | None) -> jax.Array:
  """Which tokens after the first are targets, ``[batch, length - 1]``."""
  if mask is None:
    return jnp.ones_like(tokens[:, 1:], bool)
  return mask[:, 1:] & mask[:, :-1]
