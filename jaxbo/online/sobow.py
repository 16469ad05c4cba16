"""SOBOW and online gradient descent, from their parts."""

from typing import Any

import jax
import optax

from jaxbo._optimizer import LearningRate, optimizer
from jaxbo.bilevel import linear_solvers
from jaxbo.bilevel.implicit import add_implicit_response
from jaxbo.bilevel.inner import InnerSolver
from jaxbo.bilevel.projection import Projection, project_params
from jaxbo.bilevel.response import drop_response
from jaxbo.online.window import check_window, window_average


def sobow(
  learning_rate: LearningRate,
  inner: InnerSolver,
  *,
  window: int,
  decay: jax.typing.ArrayLike = 1.0,
  linear_solver: linear_solvers.LinearSolver | Any | None = None,
  inner_params: optax.Params | None = None,
  normalization: str = "full",
  storage_dtype: Any = None,
  project: Projection | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""SOBOW: a single loop along the window average of the last hypergradient estimates.

  .. math::
    y_{t+1} &= y_t - \alpha \nabla_y g_t(x_t, y_t) \\
    h_t &= \nabla_x f_t - \nabla^2_{xy} g_t\, v_t, \qquad \nabla^2_{yy} g_t\, v_t \approx \nabla_y
      f_t \qquad \text{at } (x_t, y_{t+1}) \\
    x_{t+1} &= P_X\big(x_t - \beta d_t\big), \qquad
      d_t = \frac1W \sum_{i=0}^{K-1} \eta^i h_{t-i}

  The losses may change in every round, and old ones are never needed: the window keeps gradients,
  where OAGD (:func:`jaxbo.oagd`) keeps data. With ``window=1`` it is plain online AID. The loop
  around it is :func:`jaxbo.online_loop`.

  The single loop is a solver with ``optax.sgd(alpha)``, ``num_steps=1`` and a warm start. More
  steps are allowed: :math:`y` then follows more closely, for as many gradients.

  A round with one inner step costs one gradient of :math:`g`, one of :math:`f`, one linearisation
  of :math:`\nabla_y g` with the products of the linear solver (:math:`M`, and one for the residual
  of a warm start), and one mixed product. Memory: ``window`` copies of ``x``, and :math:`v`.

  What the paper fixes and what is our reading: the window, its constant :math:`W`, the single inner
  step and conjugate gradient with a few steps (five) are stated in the paper or in restatements of
  it. The text of the algorithm was not available to us, so these are readings, each with its
  switch:

  * the hypergradient is taken *after* the inner step; ``jaxbo.online_loop(..., hyper_at="before")``
    takes it at :math:`(x_t, y_t)`;
  * the linear system starts at the last solution; without ``warm_start`` it starts at zero;
  * the number of its steps is constant; a tolerance that falls with time is
    ``optax.inject_hyperparams`` around the response, in place of this alias:

  .. code-block:: python

    def response(tolerance):
      cg = jaxbo.conjugate_gradient(50, tolerance, warm_start=True)
      return jaxbo.add_implicit_response(inner, cg, inner_params=y0)

    outer = optax.chain(
      optax.inject_hyperparams(response)(lambda t: 0.1 * (t + 1.0) ** -0.5),
      jaxbo.window_average(10, decay=0.9),
      optax.scale_by_learning_rate(0.1),
    )

  Where the inner Hessian is not positive definite, conjugate gradient stops at the last good
  iterate and says so (``linear_breakdown`` in the :class:`jaxbo.bilevel.ImplicitInfo` of the
  state); give it ``damping``. What is not finite never enters the window: a response that is not
  counts as zero (``finite``), so that :math:`\nabla_x f_t` enters alone, and a
  :math:`\nabla_x f_t` that is not leaves an empty slot (:func:`jaxbo.window_average`).

  Args:
    learning_rate: :math:`\beta`, a float or a schedule; or an optimizer in its place. Mind the
      delay of the window: see :func:`jaxbo.window_average` for the limits of stability.
    inner: the inner solver.
    window: :math:`K \ge 1`. The regret bound :math:`T / W + V_T + H_{2,T}` needs :math:`W` to grow
      with :math:`T`, so both :math:`K \to \infty` and :math:`\eta \to 1`, say
      :math:`K = \lceil \sqrt T \rceil` and :math:`\eta = 1 - 1 / K`.
    decay: :math:`\eta` in (0, 1].
    linear_solver: as in :func:`jaxbo.add_implicit_response`; ``conjugate_gradient(5,
      warm_start=True)`` if not given.
    inner_params: the inner parameters, as arrays or ``jax.ShapeDtypeStruct``; needed by a linear
      solver with a warm start, and so by the default.
    normalization: as in :func:`jaxbo.window_average`.
    storage_dtype: as there.
    project: the projection :math:`P_X`, or ``None``. The first ``x`` must be inside.

  Returns:
    ``optax.chain(add_implicit_response(...), window_average(...),
    optax.scale_by_learning_rate(learning_rate))``, and :func:`jaxbo.bilevel.project_params` if
    there is a projection. With :math:`\frac12 \|\cdot\|^2` as the mirror map, the step of OBBO is
    the same.

  Raises:
    ValueError: as :func:`jaxbo.add_implicit_response` and :func:`jaxbo.window_average`.

  Example:
    >>> import jax, jax.numpy as jnp, jaxbo, optax
    >>> inner_loss = lambda x, y, batch: 0.5 * (y - x) ** 2
    >>> outer_loss = lambda x, y, batch: 0.5 * (y - batch) ** 2      # follow what drifts
    >>> stream = lambda key, t: (None, 1.0 + 0.001 * t)
    >>> inner = jaxbo.inner_solver(inner_loss, optax.sgd(0.5), num_steps=1)
    >>> y0 = jnp.float32(0.0)
    >>> outer = jaxbo.sobow(0.1, inner, window=5, decay=0.9, inner_params=y0)
    >>> loop = jaxbo.online_loop(outer_loss, inner, outer)
    >>> state = loop.init(jnp.float32(0.0), y0, stream)
    >>> state, history = jax.jit(lambda state: loop.run(state, stream, 500))(state)
    >>> print(state.x.round(2))                                      # 1 + 0.5, and a delay
    1.49

  References:
    Lin, Sow, Ji, Liang and Shroff, `Non-Convex Bilevel Optimization with Time-Varying Objective
    Functions <https://arxiv.org/abs/2308.03811>`_, 2023. Restated, with five steps of conjugate
    gradient, in `2511.01126 <https://arxiv.org/abs/2511.01126>`_. OBBO: Bohne et al., `Online
    Nonconvex Bilevel Optimization with Bregman Divergences <https://arxiv.org/abs/2409.10470>`_,
    2024.
  """
  check_window(window, decay, normalization)
  if linear_solver is None:
    linear_solver = linear_solvers.conjugate_gradient(5, warm_start=True)
  return optax.chain(
    add_implicit_response(inner, linear_solver, inner_params=inner_params),
    window_average(window, decay, normalization=normalization, storage_dtype=storage_dtype),
    *online_tail(learning_rate, project),
  )


def ogd(
  learning_rate: LearningRate, *, project: Projection | None = None
) -> optax.GradientTransformationExtraArgs:
  r"""Online gradient descent: each level follows its own gradient, and the response is dropped.

  .. math:: y_{t+1} = y_t - \alpha \nabla_y g_t, \qquad x_{t+1} = P_X(x_t - \beta \nabla_x f_t)

  The baseline that any online bilevel method has to beat. Where :math:`f` does not depend on
  :math:`x` directly, as in hyperparameter optimisation, :math:`x` stays where it is and what is
  left is single-level descent on :math:`g_t` with fixed hyperparameters, which is the baseline
  "OGD" of the published code of OAGD; a ``learning_rate`` of zero says so for any :math:`f`.

  Args:
    learning_rate: :math:`\beta`, a float or a schedule; or an optimizer in its place. The inner
      step is that of the solver.
    project: the projection :math:`P_X`, or ``None``.

  Returns:
    ``optax.chain(drop_response(), optax.scale_by_learning_rate(learning_rate))``, and
    :func:`jaxbo.bilevel.project_params` if there is a projection.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> tx = jaxbo.ogd(0.5)
    >>> x = jnp.float32(1.0)
    >>> updates, state = tx.update((jnp.float32(2.0), jnp.ones(3)), tx.init(x), x)
    >>> float(updates)
    -1.0

  References:
    Zinkevich, `Online Convex Programming and Generalized Infinitesimal Gradient Ascent
    <https://www.aaai.org/Papers/ICML/2003/ICML03-120.pdf>`_, 2003.
  """
  return optax.chain(drop_response(), *online_tail(learning_rate, project))


def online_tail(
  learning_rate: LearningRate, project: Projection | None
) -> list[optax.GradientTransformation]:
  """A learning rate, and the projection if there is one."""
  tail: list[optax.GradientTransformation] = [optimizer(learning_rate)]
  return tail if project is None else [*tail, project_params(project)]
