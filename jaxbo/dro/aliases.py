"""Whole methods of distributionally robust training, under their papers' names."""

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
  """Reweighting before SGD, or before the optimizer that was given."""
  behind = optimizer(learning_rate, optax.sgd)
  return optax.chain(reweight(weighting, axis_name=axis_name), behind)


def ir_dro(
  learning_rate: LearningRate,
  temperature: Temperature = 1.0,
  *,
  axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
  """IR-DRO: instance reweighting for continual training, :func:`~jaxbo.dro.kl` before AdamW.

  The published code weighs each device's examples among themselves; here weights are those of the
  whole batch.

  Args:
    learning_rate: of AdamW, a float or a schedule; published runs use 2e-6. Or another optimizer
      in its place.
    temperature: as in :func:`~jaxbo.dro.kl`; the default is the published one.
    axis_name: as in :func:`reweight`.

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
  """Group DRO: descent on the worst group, :func:`~jaxbo.dro.group` weights before SGD.

  Args:
    learning_rate: of SGD, a float or a schedule; or another optimizer in its place.
    num_groups: as in :func:`~jaxbo.dro.group`; ``update`` needs ``groups=``.
    group_learning_rate: as in :func:`~jaxbo.dro.group`; the default is the published one.
    adjustment: as in :func:`~jaxbo.dro.group`.
    group_sizes: as in :func:`~jaxbo.dro.group`.
    axis_name: as in :func:`reweight`.

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
  """CVaR-DRO: descent on the mean of the worst losses, :func:`~jaxbo.dro.cvar` weights before SGD.

  Args:
    learning_rate: of SGD, a float or a schedule; or another optimizer in its place.
    level: as in :func:`~jaxbo.dro.cvar`.
    axis_name: as in :func:`reweight`.

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
  """Chi-square DRO: descent on the worst case over :func:`~jaxbo.dro.chi_square_ball`, before SGD.

  Args:
    learning_rate: of SGD, a float or a schedule; or another optimizer in its place.
    radius: as in :func:`~jaxbo.dro.chi_square_ball`.
    axis_name: as in :func:`reweight`.

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
  """TERM: tilted empirical risk minimisation, :func:`~jaxbo.dro.tilted` weights before SGD.

  Args:
    learning_rate: of SGD, a float or a schedule; or another optimizer in its place.
    tilt: :math:`t`, as in :func:`~jaxbo.dro.tilted`: positive for fairness, negative for robustness
      to outliers.
    axis_name: as in :func:`reweight`.

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
