"""Scores of logits that tell known inputs from unknown ones."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxbo import _check, _tree
from jaxbo._types import PyTree


def energy_score(
  logits: jax.typing.ArrayLike, temperature: jax.typing.ArrayLike = 1.0
) -> jax.Array:
  r"""The free energy of logits; high where the model knows little.

  .. math:: E(m) = -T \log \sum_c \exp(m_c / T)

  :math:`E` lies between :math:`-\max_c m_c - T \log C` and :math:`-\max_c m_c`. If all logits rise
  by :math:`c`, :math:`E` falls by :math:`c`, while the softmax does not change. At :math:`T = 1`,
  :math:`-\log p_y = -m_y - E`. The scale of :math:`E` is that of the logits, so it depends on the
  inner learning rate and number of steps. Calibrate a threshold for each setting
  (:func:`jaxbo.meta.calibrate`).

  Args:
    logits: ``[batch, classes]`` floats, or any shape with the classes last.
    temperature: :math:`T > 0`.

  Returns:
    ``[batch]``, float32 at least.

  Raises:
    ValueError: if ``temperature`` is not positive, or ``logits`` have no class.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> print(jaxbo.meta.energy_score(jnp.array([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])).round(4))
    [-3.4076 -1.0986]

  References:
    Liu, Wang, Owens and Li, `Energy-based Out-of-distribution Detection
    <https://arxiv.org/abs/2010.03759>`_, 2020.
  """
  _check.positive("temperature", temperature)
  logits = _checked(logits)
  temperature = jnp.asarray(temperature, logits.dtype)
  return -temperature * jax.nn.logsumexp(logits / temperature, axis=-1)


def max_softmax_score(logits: jax.typing.ArrayLike) -> jax.Array:
  """The largest softmax probability; *low* where the model knows little.

  Args:
    logits: ``[batch, classes]`` floats, or any shape with the classes last.

  Returns:
    ``[batch]`` in [1 / classes, 1], float32 at least.

  Raises:
    ValueError: if ``logits`` have no class.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> print(jaxbo.meta.max_softmax_score(jnp.array([[1.0, 2.0, 3.0]])).round(4))
    [0.6652]

  References:
    Hendrycks and Gimpel, `A Baseline for Detecting Misclassified and Out-of-Distribution Examples
    <https://arxiv.org/abs/1610.02136>`_, 2017.
  """
  logits = _checked(logits)
  return jnp.exp(jnp.max(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1))


def entropy_score(logits: jax.typing.ArrayLike) -> jax.Array:
  r"""The entropy of the softmax, :math:`-\sum_c p_c \log p_c`; high where the model knows little.

  Args:
    logits: ``[batch, classes]`` floats, or any shape with the classes last.

  Returns:
    ``[batch]`` in [0, log(classes)], float32 at least.

  Raises:
    ValueError: if ``logits`` have no class.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> print(f"{jaxbo.meta.entropy_score(jnp.array([1.0, 2.0, 3.0])):.4f}")
    0.8324
  """
  log_p = jax.nn.log_softmax(_checked(logits), axis=-1)
  # A class of probability zero adds nothing: 0 * -inf would be NaN.
  return -jnp.sum(jnp.where(log_p > -jnp.inf, jnp.exp(log_p) * log_p, 0), axis=-1)


def _checked(logits: jax.typing.ArrayLike) -> jax.Array:
  array = jnp.asarray(logits)
  _check.floating("logits", array)
  if array.ndim == 0 or array.shape[-1] == 0:
    raise ValueError(f"logits must have shape [batch, classes], got shape {array.shape}")
  return _tree.at_least_float32(array)


SHIFT_SCORES: dict[str, Callable[[PyTree], jax.Array]] = {
  "energy": energy_score,
  "entropy": entropy_score,
  "max_softmax": lambda logits: 1 - max_softmax_score(logits),
}


def mean_score(
  name: str, score: str | Callable[[PyTree], jax.Array]
) -> Callable[[PyTree], jax.Array]:
  """Returns the batch mean of a score, named or given as a function; high for unknown data."""
  if isinstance(score, str):
    score = SHIFT_SCORES[_check.one_of(name, score, SHIFT_SCORES)]
  _check.takes_arguments(name, score, "logits")
  return lambda logits: jnp.mean(_tree.at_least_float32(jnp.asarray(score(logits))))
