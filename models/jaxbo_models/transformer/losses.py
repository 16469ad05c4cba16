"""Next-token losses of tokens and of sequences."""

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxbo_models.batch_loss import BatchLoss
from jaxbo_models.cross_entropy import cross_entropies
from jaxbo_models.transformer.chunked import chunked_cross_entropy
from jaxbo_models.transformer.model import Transformer, head_of

IGNORED = -100  # The label of what is not a target, as in PyTorch and transformers.
# What transformers calls the keys of a batch: refused, not ignored.
_THEIR_NAMES = {
  "input_ids": "tokens",
  "attention_mask": "mask",
  "position_ids": "positions",
  "seq_idx": "segment_ids",
}


def token_losses(
  logits: jax.Array,
  tokens: jax.Array,
  mask: jax.Array | None = None,
  *,
  loss_mask: jax.Array | None = None,
  labels: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  r"""The cross-entropy of each token given the tokens before it.

  .. math:: \ell_t = -\log \mathrm{softmax}(z_t)_{u_{t + 1}}, \qquad t = 0, \dots, T - 2

  A target counts if both it and the token before it are real. So the first real token never counts,
  with or without padding on the left. In a packed row, the token before it must also be of the same
  segment. ``loss_mask`` or ``labels`` choose among these targets.

  >>> logits, tokens = jnp.zeros((1, 4, 8)), jnp.array([[3, 1, 4, 0]])
  >>> losses, weights = token_losses(logits, tokens, jnp.array([[True, True, True, False]]))
  >>> losses.round(4)  # log 8
  Array([[2.0794, 2.0794, 0.    ]], dtype=float32)
  >>> weights
  Array([[1., 1., 0.]], dtype=float32)

  The loss on a response of two tokens, given a prompt of two:

  >>> response = jnp.array([[False, False, True, True]])
  >>> token_losses(logits, tokens, loss_mask=response)[1]
  Array([[0., 1., 1.]], dtype=float32)

  Args:
    logits: ``[batch, length, vocab_size]``; values at padding are ignored.
    tokens: ``[batch, length]``, integers.
    mask: ``[batch, length]``, bool: True for real tokens, False for padding; None if all are real.
    loss_mask: ``[batch, length]``, bool: True for tokens that are targets. None if all are.
    labels: ``[batch, length]``, integers as in transformers, instead of ``loss_mask``: the target
      in each place, or -100 for no target. The labels are not shifted: ``labels[:, t]`` is what
      ``tokens[:, t]`` should be. A label outside the vocabulary makes a loss NaN.
    segment_ids: ``[batch, length]``, integers: the document of each token in a packed row. None if
      each row is one document.

  Returns:
    The losses and their weights, both ``[batch, length - 1]`` in float32 at least. Targets that
    count have weight 1; the others have weight 0 and loss 0.

  Raises:
    ValueError: both ``loss_mask`` and ``labels`` are given, or an argument has another shape or
      dtype.
  """
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  counts = _targets(tokens, mask, loss_mask, labels, segment_ids)
  return _counted(cross_entropies, logits, tokens if labels is None else labels, counts)


def _counted(
  cross_entropy: Callable[[jax.Array, jax.Array], jax.Array],
  outputs: jax.Array,
  targets: jax.Array,
  counts: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """The losses of outputs that predict the next target, and their weights."""
  outputs, targets = outputs[:, :-1], targets[:, 1:]
  if counts is None:
    losses = cross_entropy(outputs, targets)
    return losses, jnp.ones_like(losses)
  # Mask before the loss, too: masking only after it can make the gradient 0 * NaN.
  outputs, targets = jnp.where(counts[:, :, None], outputs, 0), jnp.where(counts, targets, 0)
  losses = cross_entropy(outputs, targets)
  return jnp.where(counts, losses, 0), counts.astype(losses.dtype)


def sequence_losses(
  model: nn.Module, reduction: str = "mean", *, chunk_length: int | None = None
) -> BatchLoss:
  """Makes a function that returns one loss for each sequence, for ``jaxbo.per_example_grad``.

  >>> from jaxbo_models import transformer
  >>> config = transformer.gpt2(vocab_size=257, max_length=16, num_layers=2, width=32, num_heads=4)
  >>> model = transformer.Transformer(config)
  >>> tokens = jnp.arange(24).reshape(2, 12)
  >>> params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
  >>> jax.eval_shape(sequence_losses(model), params, {"tokens": tokens}).shape
  (2,)

  Args:
    model: a :class:`Transformer`, or any module that maps tokens and a mask to logits (and takes
      ``positions`` and ``segment_ids`` by name, if the batch has them).
    reduction: ``"mean"`` or ``"sum"`` over the targets that count. With the mean, long sequences do
      not get large losses because of their length.
    chunk_length: the number of positions, in all sequences, whose logits exist at a time; None for
      all. With a large vocabulary, a few hundred save most of the memory of a step, at the cost of
      one more product with the head. Needs a :class:`Transformer`; such losses have no forward-mode
      derivatives.

  Returns:
    A function ``(params, batch) -> losses``, ``[batch]`` in float32 at least. The batch holds
    ``"tokens" [batch, length]``. These optional entries have the same shape: ``"mask"``, False at
    padding; ``"loss_mask"`` or ``"labels"``, the targets (see :func:`token_losses`);
    ``"segment_ids"`` and ``"positions"`` of packed rows (see :class:`Transformer`). Other keys are
    ignored. A sequence without a target has loss 0, and does not count where losses are reweighted
    (``loss_fn.example_mask``).

  Raises:
    TypeError: ``chunk_length`` is given, but the model is not a :class:`Transformer`.
    ValueError: ``reduction`` is unknown, or ``chunk_length`` is below 1. The returned function
      raises it for a batch with both ``"loss_mask"`` and ``"labels"``, or with the key names of
      transformers.
  """
  if reduction not in ("mean", "sum"):
    raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
  is_count = isinstance(chunk_length, int) and not isinstance(chunk_length, bool)
  if chunk_length is not None and not (is_count and chunk_length >= 1):
    raise ValueError(f"chunk_length must be an integer of at least 1, got {chunk_length!r}")
  if chunk_length is not None and not isinstance(model, Transformer):
    raise TypeError(f"model must be a Transformer with chunk_length, got {type(model).__name__}")

  def loss_fn(params: Any, batch: Mapping[str, Any]) -> jax.Array:
    tokens, mask = batch["tokens"], batch.get("mask")
    packed = {name: batch[name] for name in ("positions", "segment_ids") if name in batch}
    apply: Any = functools.partial(model.apply, {"params": params}, tokens, mask, **packed)
    if chunk_length is None:
      losses, weights = token_losses(apply(), tokens, mask, **_choice(batch))
    else:
      counts = _targets(tokens, mask, **_choice(batch))
      hidden = apply(return_hidden=True)
      head = head_of(params).astype(hidden.dtype)
      chunked = functools.partial(chunked_cross_entropy, chunk_length=chunk_length)
      cross_entropy = lambda h, targets: chunked(h, head, targets)
      losses, weights = _counted(cross_entropy, hidden, batch.get("labels", tokens), counts)
    total = jnp.sum(losses, axis=1)
    return total if reduction == "sum" else total / jnp.maximum(jnp.sum(weights, axis=1), 1)

  def example_mask(batch: Mapping[str, Any]) -> jax.Array:
    tokens = batch["tokens"]
    counts = _targets(tokens, batch.get("mask"), **_choice(batch))
    return jnp.any(jnp.ones_like(tokens[:, 1:], bool) if counts is None else counts, axis=1)

  return BatchLoss(loss_fn, example_mask)


def _choice(batch: Mapping[str, Any]) -> dict[str, Any]:
  """What chooses the targets of a batch."""
  for theirs, ours in _THEIR_NAMES.items():
    if theirs in batch:
      raise ValueError(f"batch must have {ours!r} instead of {theirs!r}, got {list(batch)}")
  return {name: batch.get(name) for name in ("loss_mask", "labels", "segment_ids")}


def _targets(
  tokens: jax.Array,
  mask: jax.Array | None,
  loss_mask: jax.Array | None,
  labels: jax.Array | None,
  segment_ids: jax.Array | None,
) -> jax.Array | None:
  """Which tokens after the first are targets, ``[batch, length - 1]``; None if all are."""
  if loss_mask is not None and labels is not None:
    raise ValueError("loss_mask and labels must not both be given: each says what the targets are")
  for name, value, kind in (
    ("loss_mask", loss_mask, jnp.bool_),
    ("labels", labels, jnp.integer),
    ("segment_ids", segment_ids, jnp.integer),
  ):
    if value is not None and (value.shape != tokens.shape or not jnp.issubdtype(value.dtype, kind)):
      raise ValueError(
        f"{name} must be {'bool' if kind is jnp.bool_ else 'integers'} of the shape of tokens, "
        f"{tokens.shape}, got {value.dtype} of shape {value.shape}"
      )
  conditions: list[jax.Array] = []
  if mask is not None:
    conditions.append(mask[:, 1:] & mask[:, :-1])
  if loss_mask is not None:
    conditions.append(loss_mask[:, 1:])
  if labels is not None:
    conditions.append(labels[:, 1:] != IGNORED)
  if segment_ids is not None:
    conditions.append(segment_ids[:, 1:] == segment_ids[:, :-1])
  return functools.reduce(operator.and_, conditions) if conditions else None
