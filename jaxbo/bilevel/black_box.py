"""Any run as an inner solver: a function from ``x`` to ``y`` that need not be differentiable."""

from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from jaxbo import _check, _tree
from jaxbo._types import Data, PyTree
from jaxbo.bilevel.response import refuse_black_box
from jaxbo.bilevel.solution import InnerInfo, InnerSolution, InnerSolver

VMAP_METHODS = ("sequential", "expand_dims", "broadcast_all")


def black_box(
  path: Callable[[PyTree, Data], PyTree], *, host: bool = False, vmap_method: str = "sequential"
) -> InnerSolver:
  r"""Turns any run into an inner solver: quantized training, a simulator, scikit-learn.

  The run is :math:`y = \text{path}(x, \xi)`. It has no inner loss and is not differentiated, so use
  :func:`jaxbo.add_es_response` with forward or central differences. That response follows the run
  smoothed by a Gaussian of width ``smoothing``:

  .. math:: F_\mu(x) = \mathbb E\, y(x + \mu u), \qquad
    \nabla F_\mu(x)^\top b = \tfrac1\mu\, \mathbb E\, \langle y(x + \mu u) - y(x), b \rangle\, u

  If the run has jumps, choose ``smoothing`` about as large as the distance between jumps; a smaller
  value has a larger variance. :func:`jaxbo.add_implicit_response` works too, if you pass as
  ``condition=`` a function that is zero at :math:`y`. All other responses refuse a black box.

  Args:
    path: ``path(x, batch) -> y``. It must give the same ``y`` for the same arguments: randomness
      comes from a key or a seed in the batch. A run that fails may return NaN; the response leaves
      it out.
    host: ``False``: ``path`` is a JAX function. ``True``: it runs on the host, outside of compiled
      programs, through ``jax.pure_callback``, with pytrees of NumPy arrays; the response calls it
      for each sample. On an accelerator each call waits for the host.
    vmap_method: with ``host``: how to call ``path`` for several runs at once: the samples of
      ``sample_batch_size``, the pairs of central differences, and the tasks of
      :func:`jaxbo.over_tasks`. ``"sequential"`` calls it for each run. ``"expand_dims"`` and
      ``"broadcast_all"`` call it once, with one more leading axis for each of these three; ``y``
      must have these axes in full. In arrays that all runs share, the axes have size 1, or the full
      size with ``"broadcast_all"``.

  Returns:
    An :class:`InnerSolver` of ``num_steps=0``. ``init(y0)`` and the ``y0`` of
    :func:`jaxbo.bilevel_loop` say the structure, the shapes and the dtypes of what ``path``
    returns; their values are used only if the first run is not finite. ``info.losses`` is ``None``.

  Raises:
    TypeError: if ``path`` does not take ``(x, batch)``; if ``y0`` has leaves that are not floats.
    ValueError: if ``vmap_method`` is unknown, or given without ``host``; if ``path`` does not
      return what ``y0`` looks like.

  Example:
    >>> import jax, jax.numpy as jnp, jaxbo, optax
    >>> inner = jaxbo.black_box(lambda x, batch: jnp.round(4 * x) / 4)   # steps of 1 / 4
    >>> outer = jaxbo.esj(0.2, inner, 64, smoothing=0.25, difference="central")
    >>> init, step = jaxbo.bilevel_loop(lambda x, y, batch: (y - 1.5) ** 2, inner, outer)
    >>> state = init(jnp.float32(0.0), jnp.float32(0.0))
    >>> for _ in range(20):
    ...   state, info = jax.jit(step)(state, None, None)
    >>> float(state.solution.params)
    1.5
  """
  _check.takes_arguments("path", path, "x", "batch")
  _check.one_of("vmap_method", vmap_method, VMAP_METHODS)
  if vmap_method != "sequential" and not host:
    raise ValueError(f"vmap_method must be 'sequential' without host=True, got {vmap_method!r}")

  def on_host(like: PyTree, x: PyTree, batch: Data) -> PyTree:
    def call(x, batch):
      y = path(*jax.tree.map(np.asarray, (x, batch)))
      if (found := jax.tree.structure(y)) != (wanted := jax.tree.structure(like)):
        raise ValueError(f"path must return the structure of y0, {wanted}, got {found}")
      return jax.tree.map(lambda leaf, to: np.asarray(leaf, to.dtype), y, like)

    shapes = jax.eval_shape(lambda: like)
    return jax.pure_callback(call, shapes, x, batch, vmap_method=vmap_method)

  def run_path(x: PyTree, start: tuple[PyTree, Any], batch: Data, *, last: int | None = None):
    del last  # A black box has no steps.
    like = start[0]
    if host:
      return on_host(like, x, batch)
    y = path(x, batch)
    _check.same_structure("what path returns", y, "y0", like)
    return jax.tree.map(lambda leaf, to: jnp.asarray(leaf, to.dtype), y, like)

  def run(x: PyTree, start: tuple[PyTree, Any], batch: Data) -> InnerSolution:
    y = run_path(x, start, batch)
    finite = _tree.all_finite(y)
    return InnerSolution(_tree.where(finite, y, start[0]), (), start, InnerInfo(None, finite))

  def init(y0: PyTree, x: PyTree = None, batch: Data = None) -> InnerSolution:
    del x, batch
    _check.floating("y0", y0)
    y0 = _tree.copy(y0)
    return InnerSolution(y0, (), (_tree.copy(y0), ()), InnerInfo(None, jnp.bool_(True)))

  def solve(x: PyTree, solution: InnerSolution, batch: Data) -> InnerSolution:
    _check.floating("x", x)
    return run(x, (solution.params, ()), batch)

  def no_loss(*arguments: Any, **options: Any) -> NoReturn:
    del arguments, options
    refuse_black_box("what needs the inner loss or its optimizer")

  return InnerSolver(
    init=init,
    solve=solve,
    run=run,
    path=run_path,
    loss=no_loss,
    descend=no_loss,
    num_steps=0,
    per_step_batches=False,
    stops_early=False,
    start=None,
    through=None,
  )
