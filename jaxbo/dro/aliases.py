"""Complete methods of distributionally robust training, under their papers' names."""

from collections.abc import Sequence

import jax
import optax

from jaxbo._optimizer import LearningRate, optimizer
from jaxbo.dro.batch import AxisName
from jaxbo.dro.chi_square import chi_square_ball
from jaxbo.dro.cvar import cvar
from jaxbo.dro.group import group
from jaxbo.dro.kl import kl, tilted
from jaxbo.dro.reweight import reweight
from jaxbo.dro.temperature import Temperature
from jaxbo.dro.weighting import Weighting


def descent(
  learning_rate: LearningRate, weighting: Weighting, axis_name: AxisName
) -> optax.GradientTransformationExtraArgs:
  """Chains reweighting with SGD, or with the optimizer that ``learning_rate`` is."""
  behind = optimizer(learning_rate, optax.sgd)
  return optax.chain(reweight(weighting, axis_name=axis_name), behind)


def ir_dro(
  learning_rate: LearningRate,
  temperature: Temperature = 1.0,
  *,
  axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
  """IR-DRO: exponential weights (:func:`~jaxbo.dro.kl`) before AdamW, for continual training.

  The weights are those of the whole batch over all devices (see Departures from the papers).

  Args:
    learning_rate: the learning rate of AdamW, a float or a schedule (published runs use 2e-6); or
      an optimizer to use instead of AdamW.
    temperature: positive, in units of the loss: a number, a schedule of the number of batches so
      far, or :func:`~jaxbo.dro.target_ess`. The default is the published one.
    axis_name: the ``shard_map`` axis, or axes, over which the batch is divided.

  Returns:
    ``optax.chain(reweight(kl(temperature)), optax.adamw(learning_rate))``.

  Example:
    >>> import jax, jax.numpy as jnp, jaxbo, optax
    >>> tx = jaxbo.ir_dro(0.1, temperature=0.5)
    >>> params, batch = jnp.float32(0.0), jnp.array([1.0, 3.0])
    >>> grads = jaxbo.per_example_grad(lambda p, batch: (p - batch) ** 2)(params, batch)
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> print(optax.apply_updates(params, updates).round(3))
    0.1

  References:
    Chen et al., `Take the Bull by the Horns: Hard Sample-Reweighted Continual Training Improves LLM
    Generalization <https://arxiv.org/abs/2402.14270>`_, 2024.
  """
  behind = optimizer(learning_rate, optax.adamw)
  return optax.chain(reweight(kl(temperature), axis_name=axis_name), behind)


def group_dro(
  learning_rate: LearningRate,
  num_groups: int,
  group_learning_rate: float | jax.Array = 0.01,
  *,
  adjustment: float | jax.Array | None = None,
  group_sizes: Sequence[int] | None = None,
  axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
  """Group DRO: descends on the worst group, with :func:`~jaxbo.dro.group` weights before SGD.

  ``update`` needs ``groups=``, the group of each example.

  Args:
    learning_rate: the learning rate of SGD, a float or a schedule; or an optimizer to use instead
      of SGD.
    num_groups: the number of groups, at least 1.
    group_learning_rate: the step size of the groups' weights, positive; the default is published.
    adjustment: the generalization adjustment ``C >= 0``, which favors groups of few training
      examples; ``None`` for zero.
    group_sizes: how many training examples each group has; needed for ``adjustment``.
    axis_name: the ``shard_map`` axis, or axes, over which the batch is divided.

  Returns:
    ``optax.chain(reweight(group(...)), optax.sgd(learning_rate))``.

  Example:
    >>> import jax, jax.numpy as jnp, jaxbo, optax
    >>> tx = jaxbo.group_dro(0.1, num_groups=2, group_learning_rate=1.0)
    >>> params, batch, groups = jnp.float32(0.0), jnp.array([1.0, 1.0, 3.0]), jnp.array([0, 0, 1])
    >>> @jax.jit
    ... def step(params, state):
    ...   grads = jaxbo.per_example_grad(lambda p, batch: (p - batch) ** 2)(params, batch)
    ...   updates, state = tx.update(grads, state, params, groups=groups)
    ...   return optax.apply_updates(params, updates), state
    >>> state = tx.init(params)
    >>> for _ in range(300):
    ...   params, state = step(params, state)
    >>> print(params.round(1))                         # where both groups are equally bad
    2.0

  References:
    Sagawa et al., `Distributionally Robust Neural Networks for Group Shifts
    <https://arxiv.org/abs/1911.08731>`_, 2020.
  """
  weighting = group(num_groups, group_learning_rate, adjustment=adjustment, group_sizes=group_sizes)
  return descent(learning_rate, weighting, axis_name)


def cvar_dro(
  learning_rate: LearningRate,
  level: float | jax.Array,
  *,
  axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
  """CVaR-DRO: descends on the mean of the worst losses, :func:`~jaxbo.dro.cvar` before SGD.

  Args:
    learning_rate: the learning rate of SGD, a float or a schedule; or an optimizer to use instead
      of SGD.
    level: the fraction of the batch that counts as worst, in (0, 1]; 1 gives the mean loss.
    axis_name: the ``shard_map`` axis, or axes, over which the batch is divided.

  Returns:
    ``optax.chain(reweight(cvar(level)), optax.sgd(learning_rate))``.

  Example:
    >>> import jax, jax.numpy as jnp, jaxbo, optax
    >>> tx = jaxbo.cvar_dro(0.1, level=0.5)
    >>> params, batch = jnp.float32(0.0), jnp.array([1.0, 3.0])
    >>> grads = jaxbo.per_example_grad(lambda p, batch: (p - batch) ** 2)(params, batch)
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> print(updates.round(3))                        # -0.1 * 2 * (0 - 3)
    0.6

  References:
    Levy et al., `Large-Scale Methods for Distributionally Robust Optimization
    <https://arxiv.org/abs/2010.05893>`_, 2020.
  """
  return descent(learning_rate, cvar(level), axis_name)


def chi2_dro(
  learning_rate: LearningRate,
  radius: float | jax.Array,
  *,
  axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
  """Chi-square DRO: descends on the worst case in a :func:`~jaxbo.dro.chi_square_ball`, by SGD.

  Args:
    learning_rate: the learning rate of SGD, a float or a schedule; or an optimizer to use instead
      of SGD.
    radius: the largest chi-square divergence of the weights from the reference, positive.
    axis_name: the ``shard_map`` axis, or axes, over which the batch is divided.

  Returns:
    ``optax.chain(reweight(chi_square_ball(radius)), optax.sgd(learning_rate))``.

  Example:
    >>> import jax, jax.numpy as jnp, jaxbo, optax
    >>> tx = jaxbo.chi2_dro(0.1, radius=0.125)
    >>> params, batch = jnp.float32(0.0), jnp.array([1.0, 3.0])
    >>> grads = jaxbo.per_example_grad(lambda p, batch: (p - batch) ** 2)(params, batch)
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> print(updates.round(3))                        # weights 0.25 and 0.75
    0.5

  References:
    Namkoong and Duchi, `Variance-based Regularization with Convex Objectives
    <https://arxiv.org/abs/1610.02581>`_, 2017.
  """
  return descent(learning_rate, chi_square_ball(radius), axis_name)


def term(
  learning_rate: LearningRate,
  tilt: float | jax.Array | optax.Schedule,
  *,
  axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
  """TERM: tilted empirical risk minimization, :func:`~jaxbo.dro.tilted` weights before SGD.

  Args:
    learning_rate: the learning rate of SGD, a float or a schedule; or an optimizer to use instead
      of SGD.
    tilt: :math:`t`, finite, in units of 1 / loss: positive for fairness, negative for robustness to
      outliers. A number, or a schedule of the number of batches so far.
    axis_name: the ``shard_map`` axis, or axes, over which the batch is divided.

  Returns:
    ``optax.chain(reweight(tilted(tilt)), optax.sgd(learning_rate))``.

  Example:
    >>> import jax, jax.numpy as jnp, jaxbo, optax
    >>> tx = jaxbo.term(0.1, tilt=-10.0)
    >>> params, batch = jnp.float32(0.0), jnp.array([1.0, 1.2, 50.0])  # the last is an outlier
    >>> @jax.jit
    ... def step(params, state):
    ...   grads = jaxbo.per_example_grad(lambda p, batch: (p - batch) ** 2)(params, batch)
    ...   updates, state = tx.update(grads, state, params)
    ...   return optax.apply_updates(params, updates), state
    >>> state = tx.init(params)
    >>> for _ in range(100):
    ...   params, state = step(params, state)
    >>> print(params.round(2))
    1.1

  References:
    Li et al., `Tilted Empirical Risk Minimization <https://arxiv.org/abs/2007.01162>`_, 2021.
  """
  return descent(learning_rate, tilted(tilt), axis_name)
