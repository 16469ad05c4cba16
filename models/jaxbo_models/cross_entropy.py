"""The cross-entropy of integer targets, on any mesh."""

import jax
import jax.numpy as jnp
import optax

from jaxbo_models.mesh import explicit_sharding


def cross_entropies(logits: jax.Array, targets: jax.Array) -> jax.Array:
  r"""Returns :math:`-\log \mathrm{softmax}(z)_u` for each target; NaN outside the vocabulary.

  On a mesh with explicit axes a comparison finds the logit of the target, because there the gather
  of optax is refused: for a divided vocabulary, and by JAX 0.12 in every gradient without
  ``jax.set_mesh``.

  >>> cross_entropies(jnp.zeros((3, 8)), jnp.array([0, 7, 8])).round(4)  # log 8
  Array([2.0794, 2.0794,    nan], dtype=float32)

  Args:
    logits: ``[..., vocab_size]``, floats.
    targets: ``[...]``, integers.

  Returns:
    ``[...]``, in the dtype of ``logits``.
  """
  vocab_size = logits.shape[-1]
  if explicit_sharding(logits):
    is_target = jax.nn.one_hot(targets, vocab_size, dtype=bool)
    picked = jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
    losses = jax.nn.logsumexp(logits, axis=-1) - picked
  else:
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets)
  return jnp.where((targets >= 0) & (targets < vocab_size), losses, jnp.nan)
