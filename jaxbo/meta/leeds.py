"""LEEDS, built from its parts."""

import jax
import optax

from jaxbo import _check
from jaxbo._optimizer import LearningRate, optimizer
from jaxbo.bilevel.response import check_solver
from jaxbo.bilevel.solution import InnerSolver
from jaxbo.bilevel.unrolled import add_unrolled_response
from jaxbo.meta.gate import gate_by_detection


def leeds(
  learning_rate: LearningRate,
  inner: InnerSolver,
  *,
  in_distribution_scale: jax.typing.ArrayLike = 0.1,
  out_of_distribution_scale: jax.typing.ArrayLike = 1.0,
  no_switch_scale: jax.typing.ArrayLike = 0.0,
  response: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""LEEDS: the detected case sets the size of each meta-update.

  .. math::
    \theta_{t+1} = \theta_t - \beta_t \nabla_\theta L\big(U(\theta_t; S_t); Q_t\big), \qquad
    \beta_t = \begin{cases}
      0 & \text{no switch} \\
      \beta c_{\text{in}} & \text{a switch, in distribution: keep what is known} \\
      \beta c_{\text{out}} & \text{a switch, out of distribution: learn fast}
    \end{cases}

  Run it in the loop of :func:`jaxbo.meta.online_meta_learner`, which keeps adapting the task's own
  model until a switch is detected. The rule of the three cases is our reading; see Departures from
  the papers.

  Args:
    learning_rate: :math:`\beta` of SGD: a float, a schedule that counts the meta-updates made, or
      another optimizer to use instead of SGD.
    inner: the inner solver.
    in_distribution_scale: :math:`c_{\text{in}} \ge 0`.
    out_of_distribution_scale: :math:`c_{\text{out}} \ge 0`.
    no_switch_scale: the scale without a switch, non-negative; zero saves the meta-gradient in those
      rounds.
    response: the transformation that estimates the meta-gradient. The default is
      :func:`jaxbo.add_unrolled_response` (second order, as in MAML). :func:`jaxbo.drop_response`
      gives the first-order approximation; :func:`jaxbo.add_implicit_response` and
      :func:`jaxbo.add_es_response` also work.

  Returns:
    ``optax.chain(response, gate_by_detection(optax.sgd(learning_rate), ...))``.

  Raises:
    ValueError: if a scale is negative or not finite.
    TypeError: if ``inner`` is not a :class:`jaxbo.InnerSolver`, or ``response`` is not a
      transformation.

  Example:
    >>> import jax.numpy as jnp, jaxbo, optax
    >>> inner = jaxbo.inner_solver(lambda x, y, u: 0.5 * (x + y - u) ** 2, optax.sgd(0.5), 1)
    >>> tx = jaxbo.leeds(1.0, inner)
    >>> x, y = jnp.float32(0.0), inner.init(jnp.float32(0.0))
    >>> y = inner.solve(x, y, 4.0)                                   # phi = 2
    >>> scores = jaxbo.meta.Scores(jnp.float32(0.0), jnp.float32(0.0))
    >>> detection = jaxbo.meta.Detection(jnp.bool_(True), jnp.bool_(True), scores)
    >>> grads = (jnp.float32(-2.0), jnp.float32(-2.0))               # of (phi - 4) ** 2 / 2
    >>> update, _ = tx.update(grads, tx.init(x), x, solution=y, batch=4.0, detection=detection)
    >>> print(update)                                                # (1 - 0.5) * 2
    1.0

  References:
    Sow, Lin, Liang and Zhang, `Algorithm Design for Online Meta-Learning with Task Boundary
    Detection <https://arxiv.org/abs/2302.00857>`_, 2024.
  """
  check_solver(inner)
  if response is not None:
    _check.transformation("response", response)
  gate = gate_by_detection(
    optimizer(learning_rate, optax.sgd),
    in_distribution_scale,
    out_of_distribution_scale,
    no_switch_scale,
  )
  return optax.chain(add_unrolled_response(inner) if response is None else response, gate)
