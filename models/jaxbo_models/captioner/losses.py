"""Losses of captions, one for each, for ``jaxbo.per_example_grad`` and bilevel solvers."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxbo_models.batch_loss import BatchLoss
from jaxbo_models.cross_entropy import cross_entropies


def caption_losses(
  model: nn.Module,
  reduction: str = "sum",
  *,
  attributes: Sequence[int] = (),
  discriminative_weight: float = 0.0,
  score_penalty: float = 0.0,
  attention_penalty: float = 0.0,
) -> BatchLoss:
  r"""Makes a function that returns one loss for each caption.

  .. math:: \ell = \sum_t -\log p(u_{t+1} \mid u_0, \dots, u_t) \quad \text{(or its mean over t)}
    + \lambda_g \ell_{disc} + \lambda_1 \sum_k \mathrm{huber}(g_k)
    + \alpha_c \sum_i \Big(1 - \sum_t \alpha_{ti}\Big)^2

  The sums over t run over the real tokens u after the first, including the end token. With scores g
  of K frequent words, and P the set of those that occur in the caption, the discriminative term is

  .. math:: \ell_{disc} = \frac{1}{K} \sum_{j \in P} \sum_{i \notin P} \max(0, 1 - (g_j - g_i))

  >>> from jaxbo_models import captioner
  >>> model = captioner.GuidedCaptioner(19, embed_dim=8, hidden_dim=16, attention_dim=8)
  >>> batch = {"features": jnp.zeros((2, 4, 6)), "tokens": jnp.ones((2, 5), int)}
  >>> params = jax.eval_shape(model.init, jax.random.key(0), **batch)["params"]
  >>> jax.eval_shape(caption_losses(model), params, batch).shape
  (2,)

  Sources: the training code of RFN (Jiang et al., https://arxiv.org/abs/1807.09986) sums over time,
  and has the discriminative term (PyTorch's ``MultiLabelMarginLoss``) and the score penalty, with
  weights 1 and 1e-3; RFN sums the score penalty over the batch even where the other terms are
  means. The mean over time is the other published convention (``LanguageModelCriterion``). The
  attention penalty, at :math:`\alpha_c = 1`, is the doubly stochastic penalty of Xu et al.
  (https://arxiv.org/abs/1502.03044).

  Args:
    model: a :class:`GuidedCaptioner`.
    reduction: ``"sum"`` or ``"token_mean"`` over the tokens of a caption.
    attributes: ids of the K words that ``attribute_scores`` scores; K is the model's
      ``num_attributes``.
    discriminative_weight: weight of the discriminative term, :math:`\lambda_g`, at least 0.
    score_penalty: weight of the Huber penalty on the scores, :math:`\lambda_1`, at least 0.
    attention_penalty: weight of the attention penalty, :math:`\alpha_c`, at least 0.

  Returns:
    A function ``(params, batch) -> losses``, ``[batch]`` in float32 at least. The batch holds
    ``"features" [batch, num_cells, dim]`` (or images, if the model has an encoder) and
    ``"tokens" [batch, length]``. It may hold ``"mask" [batch, length]`` (padding at the end),
    ``"cell_mask" [batch, num_cells]`` and ``"key"``, which turns on dropout.

    Each loss depends only on its own caption and image, except that one key draws the dropout masks
    of the whole batch, and that an encoder with batch statistics mixes images. A caption without a
    token after the first has loss 0, and does not count where losses are reweighted
    (``loss_fn.example_mask``). A caption with an unknown token has loss NaN. Find such captions
    with :func:`check_captions`.

  Raises:
    ValueError: ``reduction`` is unknown, a weight is negative, or a weight of the score terms is
      positive and ``attributes`` does not hold ``num_attributes >= 1`` words.
  """
  if reduction not in ("sum", "token_mean"):
    raise ValueError(f"reduction must be 'sum' or 'token_mean', got {reduction!r}")
  weights = {
    "discriminative_weight": discriminative_weight,
    "score_penalty": score_penalty,
    "attention_penalty": attention_penalty,
  }
  for name, value in weights.items():
    if value < 0:
      raise ValueError(f"{name} must not be negative, got {value}")
  wants_scores = bool(discriminative_weight or score_penalty)
  num_attributes = getattr(model, "num_attributes", 0)
  if wants_scores and (not num_attributes or len(attributes) != num_attributes):
    raise ValueError(
      "attributes must be as many words as num_attributes of the model, at least 1, got "
      f"{len(attributes)} and {num_attributes}"
    )
  words = np.asarray(attributes, np.int32)

  def loss_fn(params: Any, batch: Mapping[str, Any]) -> jax.Array:
    tokens, mask, cell_mask = batch["tokens"], batch.get("mask"), batch.get("cell_mask")
    mask = jnp.ones(tokens.shape, bool) if mask is None else mask
    there = mask[:, 1:]
    options: dict[str, Any] = {"cell_mask": cell_mask}
    if "key" in batch:
      options |= {"train": True, "rngs": {"dropout": batch["key"]}}
    captions = tokens[:, :-1], there  # A token without a target is not an input.
    output: Any = model.apply({"params": params}, batch["features"], *captions, **options)
    losses = token_losses(output.logits, tokens[:, 1:], there)
    total = losses.sum(axis=1)
    if reduction == "token_mean":
      total /= jnp.maximum(there.sum(axis=1), 1)
    if wants_scores:
      occurs = (tokens[:, :, None] == words[None, None]) & mask[:, :, None]
      scores = output.attribute_scores
      discriminative = discriminative_losses(scores, occurs.any(axis=1))
      penalty = optax.losses.huber_loss(scores).sum(axis=1)
      extra = discriminative_weight * discriminative + score_penalty * penalty
      total += jnp.where(there.any(axis=1), extra, 0)
    if attention_penalty:
      seen = jnp.where(there[:, :, None], output.attention, 0).sum(axis=1)
      missing = jnp.square(1 - seen)
      if cell_mask is not None:
        missing = jnp.where(cell_mask, missing, 0)
      total += jnp.where(there.any(axis=1), attention_penalty * missing.sum(axis=1), 0)
    return total

  def example_mask(batch: Mapping[str, Any]) -> jax.Array:
    mask = batch.get("mask")
    there = jnp.ones(batch["tokens"].shape, bool) if mask is None else mask
    return jnp.any(there[:, 1:], axis=1)

  return BatchLoss(loss_fn, example_mask)


def token_losses(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
  """Returns the cross-entropies ``[batch, length]`` of targets, 0 where the mask is False.

  Args:
    logits: ``[batch, length, vocab_size]``; values where the mask is False are ignored.
    targets: ``[batch, length]``, integers. The loss of an id outside the vocabulary is NaN.
    mask: ``[batch, length]``, bool: True for targets that count.
  """
  # Mask before the loss, too: masking only after it can make the gradient 0 * NaN.
  logits, targets = jnp.where(mask[:, :, None], logits, 0), jnp.where(mask, targets, 0)
  return jnp.where(mask, cross_entropies(logits, targets), 0)


def discriminative_losses(scores: jax.Array, occurs: jax.Array) -> jax.Array:
  """Returns the margin losses ``[batch]`` between words that occur and words that do not.

  >>> discriminative_losses(jnp.array([[2.0, 1.5, -1.0]]), jnp.array([[True, False, False]]))
  Array([0.16666667], dtype=float32)

  Args:
    scores: ``[batch, K]``: one score for each of K words.
    occurs: ``[batch, K]``, bool: True for words that occur in the caption.
  """
  margins = 1 - (scores[:, :, None] - scores[:, None, :])
  pairs = occurs[:, :, None] & ~occurs[:, None, :]
  return jnp.where(pairs, nn.relu(margins), 0).sum(axis=(1, 2)) / scores.shape[1]
