"""The robust loss over a Sinkhorn ball: the entropic relative of Wasserstein's."""

import jax
import jax.numpy as jnp

from jaxbo import _check, _random
from jaxbo._types import BatchLoss, Data, Key, PyTree
from jaxbo.dro.moving import RobustLoss, losses_of, take_apart


def sinkhorn_loss(
  loss_fn: BatchLoss,
  *,
  temperature: float | jax.Array,
  scale: float | jax.Array,
  num_samples: int,
  key: Key,
  moves: PyTree = True,
) -> RobustLoss:
  r"""Losses of examples that are smeared out, with more weight where the loss is high.

  .. math::
    \tau \log \mathbb E_{z' \sim \mathcal N(z, \sigma^2 I)} e^{\ell(\theta; z') / \tau}

  The mean of these losses is, up to a constant, the worst case over all distributions within a
  Sinkhorn ball with the cost :math:`\frac{1}{2} \|z' - z\|^2`, the entropic regularization
  :math:`\epsilon = \sigma^2` and the multiplier :math:`\lambda = \tau / \epsilon` that belongs to
  its radius. Unlike that of a Wasserstein ball, the worst case has a density, and no search is
  needed: the estimate averages over draws of the noise. A high temperature gives the mean over the
  noise (data augmentation), a low one the largest loss among the draws. With :math:`K` draws the
  estimate is too low, by about :math:`\tau \operatorname{Var}(e^{\ell / \tau}) /
  (2 K (\mathbb E\, e^{\ell / \tau})^2)`.

  Cost: ``num_samples`` times that of ``loss_fn``, in compute and, for its gradient, in memory.

  Args:
    loss_fn: ``loss_fn(params, batch) -> losses``, real floats ``[batch]``. The loss of an example
      must not depend on other examples.
    temperature: :math:`\tau > 0`, in units of the loss.
    scale: :math:`\sigma > 0`, in units of the input.
    num_samples: draws for each example, at least 1.
    key: an int, a raw key array or a typed key: a new one for each step. Microbatches, and devices
      of ``shard_map``, draw the same noise; on devices fold in the index of the device.
    moves: which leaves of the batch move, as in :func:`wasserstein_loss`: booleans, a prefix of the
      batch; leaves of integers never do.

  Returns:
    A function ``(params, batch) -> losses``, ``[batch]``, for :func:`~jaxbo.per_example_grad`. Make
    it inside the step, with the key of the step.

  Raises:
    ValueError: if an argument is outside its range, or ``moves`` does not fit the batch.
    TypeError: if ``loss_fn`` does not take ``(params, batch)``, or ``key`` is not a key.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> robust = jaxbo.dro.sinkhorn_loss(
    ...   lambda params, x: x @ params, temperature=1.0, scale=1.0, num_samples=10_000, key=0)
    >>> params, x = jnp.array([1.0, 0.0]), jnp.zeros((1, 2))
    >>> print(robust(params, x).round(1))                   # scale^2 |params|^2 / 2 temperature
    [0.5]

  References:
    Wang, Gao and Xie, `Sinkhorn Distributionally Robust Optimization
    <https://arxiv.org/abs/2109.11926>`_, 2021.
  """
  _check.takes_arguments("loss_fn", loss_fn, "params", "batch")
  _check.positive("temperature", temperature)
  _check.positive("scale", scale)
  num_samples = _check.positive_int("num_samples", num_samples)

  key = _random.typed_key(key)

  def robust(params: PyTree, batch: Data) -> jax.Array:
    center, join = take_apart(batch, moves)

    def draw(key):
      keys = jax.random.split(key, len(center))
      noise = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, center, strict=True)]
      moved = [x + scale * n for x, n in zip(center, noise, strict=True)]
      return losses_of(loss_fn, params, join(moved))

    losses = jax.vmap(draw)(jax.random.split(key, num_samples))
    mean = jnp.mean(losses, axis=0, keepdims=True)
    scores = (losses - mean) / temperature
    # At high temperatures the logarithm cancels; log1p does not.
    near = jnp.all(jnp.abs(scores) < 1, axis=0)
    small = jnp.log1p(jnp.mean(jnp.expm1(jnp.clip(scores, -1, 1)), axis=0))
    large = jax.nn.logsumexp(scores, axis=0) - jnp.log(num_samples)
    return mean[0] + temperature * jnp.where(near, small, large)

  return RobustLoss(robust, loss_fn)
