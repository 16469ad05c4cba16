"""SOBOW and online gradient descent, built from their parts."""

import jax
import optax

from jaxbo._optimizer import LearningRate, optimizer
from jaxbo._types import SolveLinear
from jaxbo.bilevel import linear_solvers
from jaxbo.bilevel.implicit import add_implicit_response
from jaxbo.bilevel.projection import Projection, project_params
from jaxbo.bilevel.response import drop_response
from jaxbo.bilevel.solution import InnerSolver
from jaxbo.online.window import check_window, window_average


def sobow(
  learning_rate: LearningRate,
  inner: InnerSolver,
  *,
  window: int,
  decay: jax.typing.ArrayLike = 1.0,
  linear_solver: SolveLinear | None = None,
  inner_params: optax.Params | None = None,
  normalization: str = "full",
  storage_dtype: jax.typing.DTypeLike | None = None,
  project: Projection | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""SOBOW: a single loop along the window average of the last hypergradient estimates.

  .. math::
    y_{t+1} &= y_t - \alpha \nabla_y g_t(x_t, y_t) \\
    h_t &= \nabla_x f_t - \nabla^2_{xy} g_t\, v_t, \qquad \nabla^2_{yy} g_t\, v_t \approx \nabla_y
      f_t \qquad \text{at } (x_t, y_{t+1}) \\
    x_{t+1} &= P_X\big(x_t - \beta d_t\big), \qquad
      d_t = \frac1W \sum_{i=0}^{K-1} \eta^i h_{t-i}

  The losses may change in every round. SOBOW never needs old losses: its window keeps gradients,
  where OAGD (:func:`jaxbo.oagd`) keeps data. With ``window=1`` it is plain online AID. Run it in
  the loop of :func:`jaxbo.online_loop`.

  For the single loop, give the inner solver ``optax.sgd(alpha)``, ``num_steps=1`` and a warm start.
  More inner steps make :math:`y` follow more closely; each costs one more gradient.

  Cost of a round with one inner step: one gradient of :math:`g`, one of :math:`f`, one
  linearization of :math:`\nabla_y g`, the :math:`M` products of the linear solver (and one for the
  residual of a warm start), and one mixed product. Memory: ``window`` copies of ``x``, and
  :math:`v`.

  Three details are our reading, and each can be changed; see Departures from the papers:

  * the hypergradient is taken *after* the inner step; ``jaxbo.online_loop(..., hyper_at="before")``
    takes it at :math:`(x_t, y_t)`;
  * the linear system starts at the last solution; a linear solver without ``warm_start`` starts at
    zero;
  * the number of linear steps is constant. For a tolerance that falls with time, replace this alias
    by its parts, with ``optax.inject_hyperparams`` around the response:

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
  iterate and sets ``linear_breakdown`` in the :class:`jaxbo.bilevel.ImplicitInfo` of the state. The
  remedy is ``damping``. Numbers that are not finite never enter the window. A response that is not
  finite counts as zero (``finite``), so :math:`\nabla_x f_t` enters alone. A :math:`\nabla_x f_t`
  that is not finite leaves an empty slot.

  Args:
    learning_rate: :math:`\beta`, a float or a schedule; or an optimizer in its place. The window
      adds delay; :func:`jaxbo.window_average` gives the limits of stability.
    inner: the inner solver.
    window: :math:`K \ge 1`. The regret bound :math:`T / W + V_T + H_{2,T}` needs :math:`W` to grow
      with :math:`T`, so both :math:`K \to \infty` and :math:`\eta \to 1`, for example :math:`K =
      \lceil \sqrt T \rceil` and :math:`\eta = 1 - 1 / K`.
    decay: :math:`\eta` in (0, 1].
    linear_solver: solves for :math:`v_t`: a solver such as :func:`jaxbo.conjugate_gradient`, or any
      callable ``(matvec, b, x0) -> (x, info)``. The default is ``conjugate_gradient(5,
      warm_start=True)``.
    inner_params: the inner parameters, as arrays or ``jax.ShapeDtypeStruct``. A linear solver with
      a warm start needs them, and the default is one.
    normalization: ``"full"``: :math:`W` is constant, so the first steps are short. ``"present"``:
      :math:`W` sums over the gradients in the window.
    storage_dtype: the floating-point dtype of the stored gradients; by default that of the
      parameters.
    project: the projection :math:`P_X`, or ``None``. The first ``x`` must lie in :math:`X`.

  Returns:
    ``optax.chain(add_implicit_response(...), window_average(...),
    optax.scale_by_learning_rate(learning_rate))``, followed by :func:`jaxbo.bilevel.project_params`
    if ``project`` is given. OBBO with the mirror map :math:`\frac12 \|\cdot\|^2` takes the same
    step.

  Raises:
    ValueError: if ``window < 1``, ``decay`` is outside (0, 1] or ``normalization`` is neither
      value; if the linear solver warm-starts and ``inner_params`` is missing.
    TypeError: if ``linear_solver`` does not take ``(matvec, b, x0)``; if ``window`` is not an int
      or ``storage_dtype`` is not a floating-point type.

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
  r"""Online gradient descent: each level follows its own gradient and drops the response.

  .. math:: y_{t+1} = y_t - \alpha \nabla_y g_t, \qquad x_{t+1} = P_X(x_t - \beta \nabla_x f_t)

  Every online bilevel method has to beat this baseline. In hyperparameter optimization :math:`f`
  often does not depend on :math:`x` directly. Then :math:`x` never moves, and the method is
  single-level descent on :math:`g_t` with fixed hyperparameters: the baseline "OGD" in the
  published code of OAGD. A ``learning_rate`` of zero gives that baseline for any :math:`f`.

  Args:
    learning_rate: :math:`\beta`, a float or a schedule; or an optimizer in its place. The inner
      solver sets the inner step :math:`\alpha`.
    project: the projection :math:`P_X`, or ``None``.

  Returns:
    ``optax.chain(drop_response(), optax.scale_by_learning_rate(learning_rate))``, followed by
    :func:`jaxbo.bilevel.project_params` if ``project`` is given.

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
  """Returns a learning rate, and the projection if there is one."""
  tail: list[optax.GradientTransformation] = [optimizer(learning_rate)]
  return tail if project is None else [*tail, project_params(project)]
