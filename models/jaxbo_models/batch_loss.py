"""Losses that say which examples of a batch have one."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class BatchLoss:
  """A loss function ``(params, batch) -> losses [batch]`` that knows which examples count.

  >>> import jax.numpy as jnp
  >>> loss_fn = BatchLoss(lambda params, batch: params * batch["x"], lambda batch: batch["x"] > 0)
  >>> batch = {"x": jnp.array([1.0, 0.0])}
  >>> loss_fn(2.0, batch), loss_fn.example_mask(batch)
  (Array([2., 0.], dtype=float32), Array([ True, False], dtype=bool))

  Attributes:
    losses: the function.
    example_mask: ``example_mask(batch)`` returns bool ``[batch]``, False for examples without a
      target, whose loss is 0. ``jaxbo.per_example_grad`` and ``jaxbo.streaming_grad`` use it to
      leave these examples out.
  """

  losses: Callable[[Any, Mapping[str, Any]], jax.Array]
  example_mask: Callable[[Mapping[str, Any]], jax.Array]

  def __call__(self, params: Any, batch: Mapping[str, Any]) -> jax.Array:
    """The losses of a batch."""
    return self.losses(params, batch)
