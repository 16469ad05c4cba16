"""ESJ and ESJ-S (PZOBO): gradient descent along the response by evolution strategies."""

import jax
import optax

from jaxbo._optimizer import LearningRate, optimizer
from jaxbo._types import Key
from jaxbo.bilevel.es import add_es_response
from jaxbo.bilevel.perturbed_leaves import Perturb
from jaxbo.bilevel.solution import InnerSolver


def esj(
  learning_rate: LearningRate,
  inner: InnerSolver,
  num_samples: int = 16,
  smoothing: float | jax.Array = 1e-2,
  *,
  directions: str = "gaussian",
  difference: str = "forward",
  sample_batch_size: int | None = None,
  redraw: bool = True,
  perturb: Perturb = True,
  perturb_features: bool = True,
  per_task: bool = False,
  response_scale: float | jax.Array = 1.0,
  mesh: jax.sharding.Mesh | None = None,
  axis_name: str | None = None,
  key: Key = 0,
) -> optax.GradientTransformationExtraArgs:
  r"""ESJ (PZOBO): gradient descent along :func:`add_es_response`.

  With a solver built with ``per_step_batches=True`` this is ESJ-S (PZOBO-S).

  Args:
    learning_rate: a float, a schedule, or an optax optimizer to use instead.
    inner: the inner solver.
    num_samples: the number :math:`Q \ge 1` of directions.
    smoothing: the radius :math:`\mu > 0` of the perturbations, per coordinate.
    directions: ``"gaussian"``, ``"sphere"``, ``"rademacher"``, ``"orthogonal"`` or ``"official"``.
    difference: ``"forward"``, ``"central"`` or ``"exact"``.
    sample_batch_size: how many samples run at once; ``None`` for all.
    redraw: whether to draw directions again for the sum instead of keeping them.
    perturb: bools for the leaves of ``x`` to perturb, or a function of ``x`` that returns them.
    perturb_features: for a solver with ``through=``: perturb the features instead of ``x``.
    per_task: for a solver with tasks: give each task its own directions.
    response_scale: a factor :math:`s > 0` on the estimated response.
    mesh: a mesh over which to divide the samples.
    axis_name: the axis of ``mesh``, or of the ``shard_map`` or ``pmap`` around ``update``.
    key: an int, a raw key array or a typed key.

  Returns:
    ``optax.chain(add_es_response(...), optax.scale_by_learning_rate(learning_rate))``.

  Example:
    >>> import jax, jax.numpy as jnp, jaxbo, optax
    >>> inner = jaxbo.inner_solver(lambda x, y, batch: (y - 3 * x) ** 2, optax.sgd(0.25), 20)
    >>> outer_loss = lambda x, y, batch: (y - 6.0) ** 2              # minimal at x = 2
    >>> init, step = jaxbo.bilevel_loop(outer_loss, inner, jaxbo.esj(0.01, inner))
    >>> state = init(jnp.float32(1.0), jnp.float32(0.0))
    >>> for _ in range(50):
    ...   state, info = jax.jit(step)(state, None, None)
    >>> print(state.x.round(2))
    2.0
  """
  return optax.chain(
    add_es_response(
      inner,
      num_samples,
      smoothing,
      directions=directions,
      difference=difference,
      sample_batch_size=sample_batch_size,
      redraw=redraw,
      perturb=perturb,
      perturb_features=perturb_features,
      per_task=per_task,
      response_scale=response_scale,
      mesh=mesh,
      axis_name=axis_name,
      key=key,
    ),
    optimizer(learning_rate),
  )
