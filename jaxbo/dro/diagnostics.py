"""Diagnostics that a weighting reports about its weights."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxbo.dro.batch import Batch, at_least_tiny


class WeightInfo(NamedTuple):
  r"""Diagnostics of a weighting; scalars over the whole batch, at least float32.

  All of them but ``weight_sum`` describe the weights divided by their sum.

  Attributes:
    effective_sample_size: :math:`1 / \sum_i w_i^2`, from 1 to the number of examples; 0 if no
      example counts.
    kl: the relative entropy :math:`\sum_i w_i \log (w_i / p_i)` to the reference :math:`p`, the
      prior, which is uniform by default; in nats.
    entropy: :math:`-\sum_i w_i \log w_i`, in nats.
    max_weight: the largest weight.
    weight_sum: the sum of the weights: 1, except for :func:`jaxbo.dro.compositional`; 0 if no
      example counts.
    surrogate: :math:`\sum_i w_i \ell_i`, the loss that :func:`jaxbo.reweight` differentiates.
    objective: the robust value, which the weights maximize; the surrogate if the weights do not
      maximize an objective.
    temperature: the temperature used or found; 0 for a weighting without a temperature.
    num_valid: how many examples count, int32.
    num_excluded: how many unmasked examples do not count, int32, because their loss or prior is not
      finite or their group is out of range.
    gradient_finite: whether the weighted gradient was finite, bool. If not, it is zero: a finite
      loss may have a gradient that is not, such as that of the square root at 0.
    aux_finite: whether all floats in ``aux`` of the per-example gradients were finite, bool. If
      not, keep ``grads.aux_or(previous)``: batch statistics that are NaN spoil all later batches.
  """

  effective_sample_size: jax.Array
  kl: jax.Array
  entropy: jax.Array
  max_weight: jax.Array
  weight_sum: jax.Array
  surrogate: jax.Array
  objective: jax.Array
  temperature: jax.Array
  num_valid: jax.Array
  num_excluded: jax.Array
  gradient_finite: jax.Array
  aux_finite: jax.Array

  @property
  def surrogate_gap(self) -> jax.typing.ArrayLike:
    """How far the surrogate is above the objective: the penalty on the weights.

    Monitor the objective, not the surrogate: the surrogate need not fall during training.
    """
    return self.surrogate - self.objective


def diagnose(
  batch: Batch,
  weights: jax.Array,
  objective: jax.Array | None = None,
  temperature: jax.Array | None = None,
) -> WeightInfo:
  """Returns the diagnostics of ``weights``."""
  logs = jnp.log(jnp.maximum(weights, jnp.finfo(weights.dtype).tiny))
  terms = (
    weights,
    weights**2,
    weights * batch.losses,
    weights * logs,
    _entropy_terms(batch, weights),
  )
  # All sums in one reduction and one exchange between devices.
  total, squares, loss, log_weight, divergence = batch.over.sum(jnp.stack(terms), axis=1)
  some, divisor = total > 0, at_least_tiny(total)
  surrogate = loss / divisor
  # For weights that sum to 1 this is the sum of the terms; the rest corrects for other sums.
  kl = (divergence + total - 1) / divisor - jnp.log(divisor)
  return WeightInfo(
    effective_sample_size=jnp.where(some, total * (total / at_least_tiny(squares)), 0),
    kl=jnp.where(some, kl, 0),
    entropy=jnp.where(some, jnp.log(divisor) - log_weight / divisor, 0),
    max_weight=batch.over.max(weights) / divisor,
    weight_sum=total,
    surrogate=surrogate,
    objective=surrogate if objective is None else objective,
    temperature=jnp.zeros_like(total) if temperature is None else temperature,
    num_valid=batch.over.number_of(batch.valid),
    num_excluded=batch.num_excluded,
    gradient_finite=jnp.ones((), bool),
    aux_finite=jnp.ones((), bool),
  )


def zero_info(dtype: jax.typing.DTypeLike) -> WeightInfo:
  """Returns diagnostics before the first batch, each in its own buffer."""
  kinds = {"num_valid": jnp.int32, "num_excluded": jnp.int32}
  info = WeightInfo(*(jnp.zeros((), kinds.get(name, dtype)) for name in WeightInfo._fields))
  return info._replace(gradient_finite=jnp.ones((), bool), aux_finite=jnp.ones((), bool))


def density(batch: Batch, weights: jax.Array) -> jax.Array:
  r"""Returns the ratio :math:`w_i / p_i`, or 1 where the reference has no mass."""
  return jnp.where(batch.valid, weights, 1) / jnp.where(batch.valid, batch.reference, 1)


def relative_entropy(batch: Batch, weights: jax.Array) -> jax.Array:
  """Returns the relative entropy to the reference, non-negative; ``weights`` must sum to 1."""
  return batch.over.sum(_entropy_terms(batch, weights))


def _entropy_terms(batch: Batch, weights: jax.Array) -> jax.Array:
  r"""The terms :math:`p\,(x \log x - (x - 1)) \ge 0` with :math:`x = w / p`.

  Near the reference, ``log1p`` of :math:`x - 1` keeps the terms from canceling.
  """
  x = density(batch, weights)
  far = jnp.log(jnp.maximum(x, jnp.finfo(x.dtype).tiny))
  near = jnp.log1p(jnp.maximum(x - 1, -0.5))
  return batch.reference * (x * jnp.where(x < 0.5, far, near) - (x - 1))
