"""Losses of captions, one for each: what ``jaxbo.per_example_grad`` and bilevel solvers take."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax


def caption_losses(
  model: nn.Module,
  reduction: str = "sum",
  *,
  attributes: Sequence[int] = (),
  discriminative_weight: float = 0.0,
  score_penalty: float = 0.0,
  attention_penalty: float = 0.0,
) -> Callable[[Any, Mapping[str, Any]], jax.Array]:
  r"""The loss of each caption.

  .. math:: \ell = \sum_t -\log p(u_{t+1} \mid u_0, \dots, u_t) \quad \text{(or its mean over t)}
    + \lambda_g \ell_{disc} + \lambda_1 \sum_k \mathrm{huber}(g_k)
    + \alpha_c \sum_i \Big(1 - \sum_t \alpha_{ti}\Big)^2

  over the tokens u after the first that are there, the one for the end among them. With the scores
  g of K frequent words, of which those in P occur in the caption, the discriminative term is

  .. math:: \ell_{disc} = \frac{1}{K} \sum_{j \in P} \sum_{i \notin P} \max(0, 1 - (g_j - g_i))

  >>> from jaxbo_models import captioner
  >>> model = captioner.GuidedCaptioner(19, embed_dim=8, hidden_dim=16, attention_dim=8)
  >>> batch = {"features": jnp.zeros((2, 4, 6)), "tokens": jnp.ones((2, 5), int)}
  >>> params = jax.eval_shape(model.init, jax.random.key(0), **batch)["params"]
  >>> jax.eval_shape(caption_losses(model), params, batch).shape
  (2,)

  Sources: the sum over time is that of RFN's training code, and so are the discriminative term
  (PyTorch's ``MultiLabelMarginLoss``) and the penalty of its scores, there with the weights 1 and
  1e-3 (there the penalty is summed over the batch, also where the rest is a mean); the mean is the
  other published convention (``LanguageModelCriterion``). The penalty of attention, at
  :math:`\alpha_c = 1`, is the doubly stochastic one of Xu et al.
  (https://arxiv.org/abs/1502.03044).

  Args:
    model: a :class:`GuidedCaptioner`.
    reduction: ``"sum"`` over tokens, or ``"token_mean"``, over those of the caption.
    attributes: the ids of the K words that ``attribute_scores`` are about, as many as the model's
      ``num_attributes``.
    discriminative_weight: :math:`\lambda_g`, at least 0.
    score_penalty: :math:`\lambda_1`, at least 0.
    attention_penalty: :math:`\alpha_c`, at least 0.

  Returns:
    A function ``(params, batch) -> losses``, ``[batch]`` in float32 at least. The batch holds
    ``"features" [batch, num_cells, dim]`` (or images, if the model has an encoder), ``"tokens"
    [batch, length]``, and, if there are, ``"mask" [batch, length]`` (padding at the end),
    ``"cell_mask" [batch, num_cells]`` and ``"key"``, for dropout. The loss of a caption depends on
    no other one, if the encoder's features do not, but for the masks that the key draws. A caption
    without a token after the first has the loss 0, and one with an unknown token NaN; both are
    found by :func:`check_captions`.

  Raises:
    ValueError: an unknown reduction, a negative weight, or a term of scores without attributes.
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
    captions = tokens[:, :-1], there  # What has no target is no input.
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

  return loss_fn


def token_losses(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
  """The cross-entropies ``[batch, length]`` of targets, 0 where the mask is false.

  Args:
    logits: ``[batch, length, vocab_size]``; what lies at padding may be anything.
    targets: ``[batch, length]``, integers. An id that is none makes its loss NaN.
    mask: ``[batch, length]``, bool: which targets count.
  """
  # Before the loss too, since the gradient of what is masked after it alone may be 0 * NaN.
  logits, targets = jnp.where(mask[:, :, None], logits, 0), jnp.where(mask, targets, 0)
  losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets)
  known = (targets >= 0) & (targets < logits.shape[-1])
  return jnp.where(mask, jnp.where(known, losses, jnp.nan), 0)


def discriminative_losses(scores: jax.Array, occurs: jax.Array) -> jax.Array:
  """The margin losses ``[batch]`` between words that occur and words that do not.

  >>> discriminative_losses(jnp.array([[2.0, 1.5, -1.0]]), jnp.array([[True, False, False]]))
  Array([0.16666667], dtype=float32)

  Args:
    scores: ``[batch, K]``.
    occurs: ``[batch, K]``, bool: which of the K words occur in the caption.
  """
  margins = 1 - (scores[:, :, None] - scores[:, None, :])
  pairs = occurs[:, :, None] & ~occurs[:, None, :]
  return jnp.where(pairs, nn.relu(margins), 0).sum(axis=(1, 2)) / scores.shape[1]
