"""The last few values of a stream and their weighted average: SOBOW's window."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check, _tree
from jaxbo._types import PyTree


class Window(NamedTuple):
  """The last ``size`` values of a stream, in a ring buffer.

  Attributes:
    values: leaves ``[size, ...]``; a new value overwrites the oldest in place.
    present: which slots hold a value, ``[size]`` bool.
    newest: the slot of the newest value, int32.
  """

  values: PyTree
  present: jax.Array
  newest: jax.Array

  @property
  def size(self) -> int:
    """The number of slots."""
    return self.present.shape[0]

  def ages(self) -> jax.Array:
    """How many rounds ago each slot was written, ``[size]`` int32; 0 for the newest."""
    return (self.newest - jnp.arange(self.size, dtype=jnp.int32)) % self.size

  def push(self, value: PyTree, present: jax.typing.ArrayLike = True) -> "Window":
    """Replaces the oldest value; with ``present=False`` the new slot counts as empty."""
    newest = (self.newest + 1) % self.size
    slot = jnp.arange(self.size, dtype=jnp.int32) == newest
    return Window(
      _tree.put_slot(self.values, value, newest), jnp.where(slot, present, self.present), newest
    )

  def get(self, age: jax.typing.ArrayLike) -> tuple[PyTree, jax.Array]:
    """Returns the value of a given age, from 0 to ``size - 1``, and whether the slot holds one."""
    slot = (self.newest - age) % self.size
    take = lambda slots: jax.lax.dynamic_index_in_dim(slots, slot, keepdims=False)
    return jax.tree.map(take, self.values), take(self.present)

  def weights(
    self, decay: jax.typing.ArrayLike, normalization: str, dtype: jax.typing.DTypeLike
  ) -> jax.Array:
    r"""Returns the weights :math:`\eta^i / W` of the slots, ``[size]``; empty slots get zero."""
    weights = jnp.asarray(decay, dtype) ** self.ages().astype(dtype)
    present = jnp.where(self.present, weights, 0)
    total = jnp.sum(weights if normalization == "full" else present)
    return present / jnp.where(total > 0, total, 1)

  def average(self, decay: jax.typing.ArrayLike, normalization: str) -> PyTree:
    """Returns the weighted average of the values, in float32 at least."""

    def one(slots):
      dtype = jnp.promote_types(slots.dtype, jnp.float32)
      weights = self.weights(decay, normalization, dtype)
      # A product and a sum: matrix products round to bfloat16 or TF32 on accelerators.
      return jnp.sum(weights.reshape(-1, *[1] * (slots.ndim - 1)) * slots.astype(dtype), axis=0)

    return jax.tree.map(one, self.values)


def empty_window(like: PyTree, size: int, dtype: jax.typing.DTypeLike | None = None) -> Window:
  """Returns a window without values, for values shaped and sharded like ``like``."""
  return Window(_tree.empty_slots(like, size, dtype), jnp.zeros(size, bool), jnp.int32(size - 1))


def check_window(size: int, decay: jax.typing.ArrayLike, normalization: str) -> int:
  """Returns ``size``; raises if an argument of a window is outside its range."""
  size = _check.positive_int("window", size)
  _check.within("decay", decay, 0, 1, ends="(]")
  _check.one_of("normalization", normalization, ("full", "present"))
  return size


class WindowAverageInfo(NamedTuple):
  r"""Diagnostics of :func:`~jaxbo.window_average`.

  Attributes:
    average_norm: norm of the output, :math:`\|d_t\|`, float32 at least.
    num_present: how many gradients the window holds, int32.
    finite: whether the incoming gradient was finite; if not, its slot is empty.
  """

  average_norm: jax.Array
  num_present: jax.Array
  finite: jax.Array


class WindowAverageState(NamedTuple):
  """State of :func:`~jaxbo.window_average`.

  Attributes:
    gradient_window: the :class:`Window` of the last incoming gradients, leaves
      ``[window, *param_shape]``.
    info: the :class:`WindowAverageInfo` of the last update.
  """

  gradient_window: Window
  info: WindowAverageInfo


def window_average(
  window: int,
  decay: jax.typing.ArrayLike = 1.0,
  *,
  normalization: str = "full",
  storage_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Replaces the gradient by a decayed average of the last ``window`` gradients.

  .. math::
    d_t = \frac1W \sum_{i=0}^{K-1} \eta^i h_{t-i}, \qquad W = \sum_{i=0}^{K-1} \eta^i, \qquad
    h_s = 0 \text{ for } s \le 0

  Each :math:`h_s` is the gradient of round ``s`` at the parameters of round ``s``. The window never
  evaluates a gradient again, so it needs no old data. After a response, this is the step of SOBOW
  (:func:`jaxbo.sobow`); any other gradient works too.

  The average scales the variance of independent noise by :math:`\sum_i \eta^{2i} / W^2`, which is
  :math:`1 / K` without decay. The price is delay. On a quadratic of curvature :math:`h`, the plain
  gradient is stable for learning rates below :math:`2 / h`. The averaged gradient with ``decay=1``
  is stable only below :math:`K (1 - \cos(\pi / K)) / h`, about :math:`\pi^2 / (2 K h)`. A strong
  decay avoids this cost. Without noise the window gains nothing.

  In the loop of :func:`jaxbo.sobow` the delay takes back what the average gives: on a quadratic
  seen through independent noise, no window without decay has less error than a window of 1 at the
  same learning rate. A window pays against noise that comes back, as that of the minibatches of a
  pass does: a window of one pass removes it. ``scripts.online_hyperopt.noise`` measures both beside
  their exact law.

  Each update computes the sum anew, so no error builds up. The sum equals the recursion :math:`d_t
  = h_t / W + \eta d_{t-1} - (\eta^K / W) h_{t-K}`. It becomes the exponential average :math:`(1 -
  \eta) h_t + \eta d_{t-1}` for :math:`K \ge t`, :math:`W = 1 / (1 - \eta)`.

  A gradient that is not finite in any leaf never enters (``info.finite``). Its round leaves an
  empty slot of zeros, the older gradients age as usual, and the output is their average. After
  ``window`` such rounds in a row the output is zero.

  Cost: one pass over the window. Memory: ``window`` copies of the parameters, in ``storage_dtype``.

  Args:
    window: :math:`K \ge 1`, a static int; 1 passes the gradient on.
    decay: :math:`\eta` in (0, 1].
    normalization: ``"full"``: :math:`W` is constant, so the first steps are short. ``"present"``:
      :math:`W` sums over the gradients in the window. The two differ in the first ``window - 1``
      steps and after a gradient that was not finite. Papers that restate SOBOW use ``"full"``.
    storage_dtype: the dtype of the stored gradients, for example ``jnp.bfloat16`` to halve the
      memory; sums are in float32 at least. The default is the dtypes of the parameters.

  Returns:
    A transformation; the output has the dtypes of the input.

  Raises:
    ValueError: if ``window < 1``, ``decay`` is outside (0, 1], or ``normalization`` is neither
      value.
    TypeError: if ``window`` is not a Python int, or ``storage_dtype`` is not a floating-point type.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> tx = jaxbo.window_average(2, decay=0.5)
    >>> x = jnp.float32(0.0)
    >>> state = tx.init(x)
    >>> for h in (3.0, 6.0, 9.0):
    ...   d, state = tx.update(jnp.float32(h), state, x)
    ...   print(d)                                    # (h_t + 0.5 h_{t-1}) / 1.5
    2.0
    5.0
    8.0

  References:
    Lin, Sow, Ji, Liang and Shroff, `Non-Convex Bilevel Optimization with Time-Varying Objective
    Functions <https://arxiv.org/abs/2308.03811>`_, 2023; equations 35 and 36 of the
    restatement in `2511.01126 <https://arxiv.org/abs/2511.01126>`_.
  """
  window = check_window(window, decay, normalization)
  if storage_dtype is not None and not jnp.issubdtype(storage_dtype, jnp.floating):
    raise TypeError(f"storage_dtype must be a floating-point type, got {storage_dtype!r}")

  def init(params):
    _check.floating("params", params)
    norm = jnp.zeros((), jnp.result_type(jnp.float32, *jax.tree.leaves(params)))
    info = WindowAverageInfo(norm, jnp.int32(0), jnp.bool_(True))
    return WindowAverageState(empty_window(params, window, storage_dtype), info)

  def update(updates, state, params=None, **extra_args):
    del params, extra_args
    gradients = state.gradient_window
    slot = lambda slots: jax.ShapeDtypeStruct(slots.shape[1:], slots.dtype)
    like = jax.tree.map(slot, gradients.values)
    _check.same_structure("updates", updates, "the parameters of init", like)
    stored = _tree.cast_like(updates, like)  # Narrow types may overflow here.
    finite = _tree.all_finite(stored)
    stored = _tree.where(finite, stored, optax.tree.zeros_like(stored))
    gradients = gradients.push(stored, finite)
    average = gradients.average(decay, normalization)
    info = WindowAverageInfo(
      average_norm=_tree.norm(average).astype(state.info.average_norm.dtype),
      num_present=jnp.sum(gradients.present, dtype=jnp.int32),
      finite=finite,
    )
    return _tree.cast_like(average, updates), WindowAverageState(gradients, info)

  return optax.GradientTransformationExtraArgs(init, update)
