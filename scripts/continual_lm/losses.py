"""Losses of the examples of a batch: each on its response, and at several softmax temperatures."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxbo_models import transformer
from jaxbo_models.batch_loss import BatchLoss

Batch = Mapping[str, jax.Array]


def packed_losses(model: nn.Module, places: int) -> BatchLoss:
  """Losses of packed examples, ``[batch * places]``: means over the targets of each.

  A batch has ``tokens``, ``loss_mask`` and ``segment_ids``, the place of each token's example or -1
  for padding, all ``[batch, length]``. A place without a target has loss 0 and does not count.
  """

  def losses(params: Any, batch: Batch) -> jax.Array:
    return _of_examples(_logits(model, params, batch), batch, places)

  def example_mask(batch: Batch) -> jax.Array:
    segments, is_target = batch["segment_ids"], batch["loss_mask"][:, 1:]
    inside = is_target & (segments[:, 1:] == segments[:, :-1])
    return jnp.any(_at_places(segments, places) & inside[:, :, None], axis=1).reshape(-1)

  return BatchLoss(losses, example_mask)


def losses_at(
  model: nn.Module, temperatures: Sequence[float], places: int | None = None
) -> Callable[[Any, Batch], jax.Array]:
  """Losses with the logits divided by each temperature, ``[examples, temperatures]``.

  One forward pass. ``places`` is that of :func:`packed_losses`; ``None`` if each row is an example.
  """

  def losses(params: Any, batch: Batch) -> jax.Array:
    logits = _logits(model, params, batch)
    at = lambda temperature: _of_examples(logits / temperature, batch, places)
    return jax.lax.map(at, jnp.asarray(temperatures, logits.dtype)).T

  return losses


def _logits(model: nn.Module, params: Any, batch: Batch) -> Any:
  packed: dict[str, Any] = {n: batch[n] for n in ("segment_ids",) if n in batch}
  return model.apply({"params": params}, batch["tokens"], **packed)


def _of_examples(logits: jax.Array, batch: Batch, places: int | None) -> jax.Array:
  each, counts = transformer.token_losses(logits, **batch)
  if places is not None:
    here = _at_places(batch["segment_ids"], places)
    each, counts = (jnp.where(here, one[:, :, None], 0) for one in (each, counts))
  return (each.sum(1) / jnp.maximum(counts.sum(1), 1)).reshape(-1)


def _at_places(segment_ids: jax.Array, places: int) -> jax.Array:
  """Whether a target is of the example in each place, ``[batch, length - 1, places]``."""
  return segment_ids[:, 1:, None] == jnp.arange(places)[None, None]
