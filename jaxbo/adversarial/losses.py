"""Per-example losses of adversarial training, computed from logits."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbo import _check, _tree


def cross_entropy_loss(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
  r"""The cross entropy :math:`\log \sum_j e^{z_j} - z_y` of each example.

  Args:
    logits: floats ``[batch, num_classes]``.
    labels: integers ``[batch]``.

  Returns:
    ``[batch]``, at least float32; NaN if a label is not a class.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> logits, labels = jnp.array([[0.0, 0.0]]), jnp.array([1])
    >>> print(jaxbo.adversarial.cross_entropy_loss(logits, labels).round(4))
    [0.6931]
  """
  logits, labels = _checked(logits, labels)
  return jax.nn.logsumexp(logits, axis=-1) - label_logits(logits, labels)


def margin_loss(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
  r"""The margin :math:`\max_{j \ne y} z_j - z_y`, positive if misclassified (Carlini and Wagner).

  Args:
    logits: floats ``[batch, num_classes]``.
    labels: integers ``[batch]``.

  Returns:
    ``[batch]``, at least float32; NaN if a label is not a class.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> print(jaxbo.adversarial.margin_loss(jnp.array([[1.0, 3.0, 2.0]]), jnp.array([1])))
    [-1.]

  References:
    Carlini and Wagner, `Towards Evaluating the Robustness of Neural Networks
    <https://arxiv.org/abs/1608.04644>`_, 2017.
  """
  logits, labels = _checked(logits, labels)
  return jnp.max(other_logits(logits, labels), axis=-1) - label_logits(logits, labels)


def probabilistic_margin(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
  r"""The margin of probabilities :math:`\max_{j \ne y} p_j - p_y`, from -1 to 1.

  Args:
    logits: floats ``[batch, num_classes]``.
    labels: integers ``[batch]``.

  Returns:
    ``[batch]``, at least float32: the scores of :func:`mail`. NaN if a label is not a class.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> print(jaxbo.adversarial.probabilistic_margin(jnp.array([[5.0, 5.0]]), jnp.array([0])))
    [0.]

  References:
    Wang et al., `Probabilistic Margins for Instance Reweighting in Adversarial Training
    <https://arxiv.org/abs/2106.07904>`_, 2021.
  """
  logits, labels = _checked(logits, labels)
  return margin_loss(jax.nn.softmax(logits), labels)


def trades_loss(
  clean_logits: ArrayLike,
  adversarial_logits: ArrayLike,
  labels: ArrayLike,
  beta: float | jax.Array = 6.0,
  *,
  weights: ArrayLike | None = None,
) -> jax.Array:
  r"""TRADES: cross entropy on clean images, plus how far an attack moves the predictions.

  .. math:: \ell_i = \operatorname{CE}(x_i, y_i)
    + \beta w_i \operatorname{KL}\big(p(x_i) \,\|\, p(x_i + \delta_i)\big)

  The attack maximizes the second term: ``objective="kl"``.

  Args:
    clean_logits: logits of the clean images, floats ``[batch, num_classes]``; minus infinity for a
      class that is masked.
    adversarial_logits: logits of the perturbed images, of the same shape.
    labels: integers ``[batch]``.
    beta: :math:`\beta \ge 0`; the default is that of the published script.
    weights: factors :math:`w_i` of the second term, ``[batch]``, 1 by default. MAIL-TRADES passes
      its weights here.

  Returns:
    ``[batch]``, at least float32; NaN if a label is not a class.

  Raises:
    ValueError: if ``beta`` is negative, or shapes differ.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> clean, moved = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 0.0]])
    >>> print(jaxbo.adversarial.trades_loss(clean, moved, jnp.array([0]), beta=1.0).round(4))
    [0.4242]

  References:
    Zhang et al., `Theoretically Principled Trade-off between Robustness and Accuracy
    <https://arxiv.org/abs/1901.08573>`_, 2019.
  """
  _check.non_negative("beta", beta)
  _check_pair(clean_logits, adversarial_logits)
  divergence = kl_divergence(clean_logits, adversarial_logits)
  if weights is not None:
    if jnp.shape(weights) != divergence.shape:
      raise ValueError(f"weights must be {divergence.shape}, got shape {jnp.shape(weights)}")
    divergence = jnp.asarray(weights, divergence.dtype) * divergence
  return cross_entropy_loss(clean_logits, labels) + beta * divergence


def mart_loss(
  clean_logits: ArrayLike,
  adversarial_logits: ArrayLike,
  labels: ArrayLike,
  beta: float | jax.Array = 5.0,
) -> jax.Array:
  r"""MART: a boosted cross entropy, plus a divergence weighted toward misclassified examples.

  .. math::
    \ell_i = \operatorname{CE}(x_i + \delta_i, y_i)
      - \log\Big(1 - \max_{j \ne y_i} p_j(x_i + \delta_i)\Big)
      + \beta \operatorname{KL}\big(p(x_i) \,\|\, p(x_i + \delta_i)\big) (1 - p_{y_i}(x_i))

  The second term is computed as :math:`\log \sum_j e^{z_j} - \log \sum_{j \ne m} e^{z_j}`, where
  :math:`m` is the largest other class (our choice: see Departures from the papers).

  Args:
    clean_logits: logits of the clean images, floats ``[batch, num_classes]``; minus infinity for a
      class that is masked.
    adversarial_logits: logits of the perturbed images, of the same shape.
    labels: integers ``[batch]``.
    beta: :math:`\beta \ge 0`; the default is that of the published script.

  Returns:
    ``[batch]``, at least float32; NaN if a label is not a class.

  Raises:
    ValueError: if ``beta`` is negative, or shapes differ.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> logits = jnp.array([[0.0, 0.0]])                       # 2 log 2: nothing moved
    >>> print(jaxbo.adversarial.mart_loss(logits, logits, jnp.array([0])).round(4))
    [1.3863]

  References:
    Wang et al., `Improving Adversarial Robustness Requires Revisiting Misclassified Examples
    <https://openreview.net/forum?id=rklOg6EFwS>`_, 2020.
  """
  _check.non_negative("beta", beta)
  _check_pair(clean_logits, adversarial_logits)
  clean, labels = _checked(clean_logits, labels)
  logits, labels = _checked(adversarial_logits, labels)
  # No class is as low as the label here, even if all others have a logit of minus infinity.
  lowest = jnp.finfo(logits.dtype).min
  largest = jnp.argmax(other_logits(jnp.maximum(logits, lowest), labels), axis=-1)
  without = jax.nn.logsumexp(other_logits(logits, largest), axis=-1)
  boosted = cross_entropy_loss(logits, labels) + jax.nn.logsumexp(logits, axis=-1) - without
  # 1 - p_y without cancellation.
  missing = jnp.sum(jnp.where(_is_label(clean, labels), 0, jax.nn.softmax(clean)), axis=-1)
  return boosted + beta * kl_divergence(clean, logits) * missing


def kl_divergence(logits: ArrayLike, other: ArrayLike) -> jax.Array:
  """Returns the relative entropy of the predictions of ``logits`` to ``other``'s, ``[batch]``.

  A class whose probability is zero, such as one masked by a logit of minus infinity, adds nothing.
  """
  log_p = jax.nn.log_softmax(_tree.at_least_float32(logits))
  log_q = jax.nn.log_softmax(_tree.at_least_float32(other))
  p = jnp.exp(log_p)
  return jnp.sum(p * jnp.where(p == 0, 0, log_p - log_q), axis=-1)


def label_logits(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Returns the logits of the labels, ``[batch]``; NaN if a label is not a class."""
  is_label = _is_label(logits, labels)
  value = jnp.sum(jnp.where(is_label, logits, 0), axis=-1)
  return jnp.where(jnp.any(is_label, axis=-1), value, jnp.nan)


def other_logits(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Returns the logits, with those of the labels set to minus infinity."""
  return jnp.where(_is_label(logits, labels), -jnp.inf, logits)


def _is_label(logits: jax.Array, labels: jax.Array) -> jax.Array:
  classes = jnp.arange(logits.shape[-1], dtype=jnp.int32)
  return labels.astype(jnp.int32)[:, None] == classes[None]


def _checked(logits: ArrayLike, labels: ArrayLike) -> tuple[jax.Array, jax.Array]:
  if jnp.ndim(logits) != 2 or jnp.shape(labels) != jnp.shape(logits)[:1]:
    raise ValueError(
      "logits must be [batch, num_classes] and labels [batch], got shapes "
      f"{jnp.shape(logits)} and {jnp.shape(labels)}"
    )
  if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
    raise TypeError(f"labels must be integers, got dtype {jnp.result_type(labels)}")
  return _tree.at_least_float32(logits), jnp.asarray(labels)


def _check_pair(clean_logits: ArrayLike, adversarial_logits: ArrayLike) -> None:
  if jnp.shape(clean_logits) != jnp.shape(adversarial_logits):
    raise ValueError(
      "adversarial_logits must have the shape of clean_logits, "
      f"{jnp.shape(clean_logits)}, got {jnp.shape(adversarial_logits)}"
    )
