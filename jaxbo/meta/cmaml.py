"""C-MAML: meta-updates along pairs of rounds, skipped where the task seems to change."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check, _tree
from jaxbo._types import Data, Loss, PyTree
from jaxbo.bilevel.response import MISSING
from jaxbo.bilevel.solution import InnerSolver
from jaxbo.bilevel.unrolled import add_unrolled_response
from jaxbo.meta.detection import threshold_detector
from jaxbo.meta.gate import gate_by_detection
from jaxbo.meta.learner import online_meta_learner
from jaxbo.meta.rounds import OnlineMetaLearner


class ModulationInfo(NamedTuple):
  """Diagnostics of :func:`~jaxbo.modulate_by_loss`.

  Attributes:
    modulation: the factor on the last gradient, float32.
  """

  modulation: jax.Array


class ModulationState(NamedTuple):
  """State of :func:`~jaxbo.modulate_by_loss`.

  Attributes:
    info: the :class:`ModulationInfo` of the last update.
  """

  info: ModulationInfo


def modulate_by_loss(modulation: jax.typing.ArrayLike) -> optax.GradientTransformationExtraArgs:
  r"""Scales the gradient down where the loss is small: C-MAML's update modulation.

  .. math:: g \leftarrow (1 - e^{-\lambda L})\, g

  Put it after the response and before the optimizer; the published code scales the loss. Adam
  adapts to a constant scale, so after modulation Adam only reacts to *changes* of the scale.

  Args:
    modulation: :math:`\lambda > 0`; large values leave the gradient almost unchanged.

  Returns:
    A transformation whose ``update`` requires ``value=``, the loss. A negative loss counts as zero,
    a NaN loss as infinite.

  Raises:
    ValueError: if ``modulation`` is not positive.
    TypeError: if ``value`` is missing.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> tx = jaxbo.modulate_by_loss(1.0)
    >>> x = jnp.float32(0.0)
    >>> g, state = tx.update(jnp.float32(2.0), tx.init(x), x, value=jnp.log(2.0))
    >>> print(g)
    1.0

  References:
    Caccia et al., `Online Fast Adaptation and Knowledge Accumulation
    <https://arxiv.org/abs/2003.05856>`_, 2020.
  """
  _check.positive("modulation", modulation)

  def init(params):
    del params
    return ModulationState(ModulationInfo(jnp.float32(1.0)))

  def update(updates, state, params=None, *, value: Any = MISSING, **extra_args):
    del state, params, extra_args
    if value is MISSING:
      raise TypeError("modulate_by_loss: update must be given value=, the loss")
    value = jnp.asarray(value, jnp.float32)
    value = jnp.where(jnp.isnan(value), jnp.inf, jnp.maximum(value, 0))
    scale = -jnp.expm1(-jnp.asarray(modulation, jnp.float32) * value)
    return _tree.scaled(scale, updates), ModulationState(ModulationInfo(scale))

  return optax.GradientTransformationExtraArgs(init, update)


def c_maml(
  outer_loss: Loss,
  inner: InnerSolver,
  optimizer: optax.GradientTransformation,
  *,
  drop_threshold: jax.typing.ArrayLike,
  modulation: jax.typing.ArrayLike | None = None,
  response: optax.GradientTransformation | None = None,
  start: Callable[[optax.Params], optax.Params] = optax.tree.zeros_like,
  shift_score: str | Callable[[PyTree], jax.Array] = "energy",
  metric: Callable[[PyTree, Data], PyTree] | None = None,
) -> OnlineMetaLearner:
  r"""C-MAML: adapts to the last round, judges on this one; no meta-update if the task changed.

  .. math::
    \theta_{t+1} = \theta_t - \beta \nabla_\theta L\big(U(\theta_t; S_{t-1}); S_t\big)
    \quad \text{unless} \quad L(\phi_{t-1}; S_t) - L(U(\theta_t; S_t); S_t) > \gamma

  and :math:`\phi_t = U(\theta_t; S_t)` in every round. The learner keeps :math:`S_{t-1}` and adapts
  to it again from :math:`\theta_t`, so the gradient and the step are at the same point (the
  published code differs: see Departures from the papers).

  Args:
    outer_loss: :math:`L`, ``outer_loss(x, y, batch) -> (scalar, logits)``, the mean loss of a model
      on labeled data.
    inner: the inner solver.
    optimizer: the optimizer of the meta-model; the published code uses Adam.
    drop_threshold: :math:`\gamma`; with infinity every pair of rounds gives a meta-update.
    modulation: :math:`\lambda > 0` of :func:`~jaxbo.modulate_by_loss`, or ``None`` for no
      modulation.
    response: the transformation that estimates the meta-gradient;
      :func:`jaxbo.add_unrolled_response` by default.
    start: ``start(x) -> y``, where an adaptation begins; by default zeros shaped like ``x``.
    shift_score: ``"energy"``, ``"entropy"``, ``"max_softmax"``, or a function from the logits to
      scores ``[batch]``. The learner logs the mean; nothing depends on it.
    metric: ``metric(logits, batch)``, a quantity to report with the loss.

  Returns:
    An :class:`jaxbo.meta.OnlineMetaLearner`. :func:`jaxbo.meta.c_maml_pap` adds the prolonged
    adaptation phase, a buffer of rounds.

  Raises:
    ValueError: if ``drop_threshold`` is NaN or ``modulation`` is not positive.
    TypeError: if ``optimizer`` or ``response`` is not a transformation.

  Example:
    >>> import jax.numpy as jnp, jaxbo, optax
    >>> loss = lambda x, y, u: (0.5 * jnp.sum((x + y - u) ** 2), x + y)
    >>> inner = jaxbo.inner_solver(lambda *args: loss(*args)[0], optax.sgd(0.5), 1)
    >>> learner = jaxbo.meta.c_maml(loss, inner, optax.sgd(1.0), drop_threshold=1.0)
    >>> state = learner.init(jnp.zeros(1), batch=(jnp.ones(1), jnp.ones(1)))
    >>> for u in (1.0, 1.0, 9.0):                                     # the last is another task
    ...   state, info = learner.step(state, (jnp.full(1, u), jnp.ones(1)))
    ...   print(state.meta_params)
    [0.]
    [0.25]
    [0.25]

  References:
    Caccia et al., `Online Fast Adaptation and Knowledge Accumulation
    <https://arxiv.org/abs/2003.05856>`_, 2020; its code is https://github.com/ServiceNow/osaka.
  """
  check_parts(drop_threshold, modulation, response)
  gate = gate_by_detection(optimizer, 0.0, 0.0, no_switch_scale=1.0)
  parts = [add_unrolled_response(inner) if response is None else response]
  parts += [] if modulation is None else [modulate_by_loss(modulation)]
  return online_meta_learner(
    outer_loss,
    inner,
    optax.chain(*parts, gate),
    threshold_detector(drop_threshold, float("inf")),
    restart="always",
    query="next",
    switch_score="drop",
    start=start,
    shift_score=shift_score,
    metric=metric,
  )


def check_parts(
  drop_threshold: jax.typing.ArrayLike, modulation: jax.typing.ArrayLike | None, response: object
) -> None:
  """Checks the arguments that both kinds of C-MAML share; errors name those arguments."""
  _check.not_nan("drop_threshold", drop_threshold)
  if modulation is not None:
    _check.positive("modulation", modulation)
  if response is not None:
    _check.transformation("response", response)
