"""C-MAML with its prolonged adaptation phase: one model for as long as a task lasts."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check, _tree
from jaxbo._types import Data, Loss, PyTree
from jaxbo.bilevel.loop import outer_gradients
from jaxbo.bilevel.solution import InnerSolver
from jaxbo.bilevel.unrolled import add_unrolled_response
from jaxbo.meta.cmaml import check_parts, modulate_by_loss
from jaxbo.meta.detection import threshold_detector
from jaxbo.meta.play import Policy, from_meta_model, play
from jaxbo.meta.rounds import OnlineMetaLearner


class SupportBuffer(NamedTuple):
  """The rounds that :func:`c_maml_pap` collects; ``last_support`` in the learner's state.

  Attributes:
    supports: the data of the rounds, leaves ``[buffer_size, ...]``.
    num_supports: the number of rounds in the buffer, int32.
    after_boundary: whether a boundary was detected in the last round, bool.
  """

  supports: Data
  num_supports: jax.Array
  after_boundary: jax.Array

  def push(self, support: Data) -> "SupportBuffer":
    """Adds the data of one round."""
    supports = _tree.put_slot(self.supports, support, self.num_supports)
    return self._replace(supports=supports, num_supports=self.num_supports + 1)

  def get(self, index: jax.Array) -> PyTree:
    """Returns the data of one round."""
    take = lambda slots: jax.lax.dynamic_index_in_dim(slots, index, keepdims=False)
    return jax.tree.map(take, self.supports)


def c_maml_pap(
  outer_loss: Loss,
  inner: InnerSolver,
  optimizer: optax.GradientTransformation,
  *,
  drop_threshold: jax.typing.ArrayLike,
  buffer_size: int = 101,
  modulation: jax.typing.ArrayLike | None = None,
  response: optax.GradientTransformation | None = None,
  start: Callable[[optax.Params], optax.Params] = optax.tree.zeros_like,
  shift_score: str | Callable[[PyTree], jax.Array] = "energy",
  metric: Callable[[PyTree, Data], PyTree] | None = None,
) -> OnlineMetaLearner:
  r"""C-MAML with its prolonged adaptation phase (PAP): the whole published method.

  The task's model continues from round to round, and a buffer collects the rounds. If the
  adaptation of a round lowers the loss by more than :math:`\gamma`, the round is a boundary:

  .. math::
    \phi_t = U(\phi_{t-1}; S_t), \quad \text{or } U(\theta_t; S_t) \text{ if there was a boundary
    in round } t - 1; \qquad
    L(\phi_{t-1}; S_t) - L(\phi_t; S_t) > \gamma

  At a boundary, or when the buffer is full, its :math:`n` rounds form one meta-batch. The first
  half are supports, the second half queries:

  .. math::
    \theta_{t+1} = \theta_t - \beta \frac1{\lfloor n / 2 \rfloor} \sum_{i=1}^{\lfloor n / 2 \rfloor}
      \nabla_\theta L\big(U(\theta_t; S_i); S_{\lceil n / 2 \rceil + i}\big),

  A single round is both support and query. Then the buffer is emptied, and the data of the round
  that triggered the meta-update are dropped.

  As in the published code, the model restarts one round *after* the boundary: the round that shows
  a boundary still adapts the old model. If the loss of the task's model overflows while that of the
  meta-model is finite, the round counts as a boundary (our addition: see Departures from the
  papers).

  Cost: one inner run in each round; :math:`\lfloor n / 2 \rfloor` inner runs and responses in a
  meta-update. Memory: the meta-model, the task's model, and ``buffer_size`` rounds of data.

  Args:
    outer_loss: :math:`L`, ``outer_loss(x, y, batch) -> (scalar, logits)``, the mean loss of a model
      on labeled data.
    inner: the inner solver.
    optimizer: the optimizer of the meta-model; the published code uses Adam.
    drop_threshold: :math:`\gamma`; with infinity only a full buffer triggers meta-updates.
    buffer_size: the number of rounds in the buffer, at least 1. When the buffer is full, the next
      round triggers a meta-update. The published 101 is ``2 * 10 * 5 + 1`` for 10 ways and 5 shots.
    modulation: :math:`\lambda > 0` of :func:`jaxbo.modulate_by_loss`, applied to the mean loss, or
      ``None`` for no modulation.
    response: the transformation that estimates the meta-gradient;
      :func:`jaxbo.add_unrolled_response` by default.
    start: ``start(x) -> y``, where an adaptation begins; by default zeros shaped like ``x``.
    shift_score: ``"energy"``, ``"entropy"``, ``"max_softmax"``, or a function from the logits to
      scores ``[batch]``. The learner logs the mean; nothing depends on it.
    metric: ``metric(logits, batch)``, a quantity to report with the loss.

  Returns:
    An :class:`jaxbo.meta.OnlineMetaLearner`, whose state keeps a :class:`SupportBuffer` in
    ``last_support``. ``info.meta_updated`` marks the rounds with a meta-update, and
    ``info.outer_loss`` is the mean loss of its pairs.

  Raises:
    ValueError: if ``drop_threshold`` is NaN, ``buffer_size < 1`` or ``modulation`` is not positive.
    TypeError: if ``optimizer`` or ``response`` is not a transformation.

  Example:
    >>> import jax.numpy as jnp, jaxbo, optax
    >>> loss = lambda x, y, u: (0.5 * jnp.sum((x + y - u) ** 2), x + y)
    >>> inner = jaxbo.inner_solver(lambda *args: loss(*args)[0], optax.sgd(0.5), 1)
    >>> learner = jaxbo.meta.c_maml_pap(loss, inner, optax.sgd(1.0), drop_threshold=1.0)
    >>> state = learner.init(jnp.zeros(1), batch=(jnp.ones(1), jnp.ones(1)))
    >>> for u in (1.0, 1.0, 9.0):                                     # the last is another task
    ...   state, info = learner.step(state, (jnp.full(1, u), jnp.ones(1)))
    ...   print(state.meta_params, state.task.y)
    [0.] [0.5]
    [0.] [0.75]
    [0.25] [4.875]

  References:
    Caccia et al., `Online Fast Adaptation and Knowledge Accumulation
    <https://arxiv.org/abs/2003.05856>`_, 2020; ``observe_accumulate`` in the branch
    ``camera_ready`` of https://github.com/ServiceNow/osaka.
  """
  _check.transformation("optimizer", optimizer)
  buffer_size = _check.positive_int("buffer_size", buffer_size)
  check_parts(drop_threshold, modulation, response)
  response = add_unrolled_response(inner) if response is None else response
  tail = optax.chain(*([] if modulation is None else [modulate_by_loss(modulation)]), optimizer)
  return play(
    outer_loss,
    inner,
    threshold_detector(drop_threshold, float("inf")),
    _buffered_pairs(outer_loss, inner, response, tail, start, buffer_size),
    start=start,
    judge_by_query=False,
    switch_score="drop",
    shift_score=shift_score,
    shift_model="adapted",
    metric=metric,
  )


def _buffered_pairs(outer_loss, inner, response, tail, start, buffer_size: int) -> Policy:
  """Descends the mean over the pairs of a buffer, at a boundary or when the buffer is full."""
  solve_anew = from_meta_model(inner, start)
  differentiate = outer_gradients(outer_loss, response, has_aux=True)

  def init(x, support):
    slots = _tree.empty_slots(support, buffer_size)
    buffer = SupportBuffer(slots, jnp.int32(0), jnp.bool_(False))
    return (response.init(x), tail.init(x)), buffer

  def is_open(state, detection):
    count = state.last_support.num_supports
    return (detection.switch & (count > 0)) | (count == buffer_size)

  def update(state, played, **extra_args):
    meta, buffer = state.meta_params, state.last_support
    count = buffer.num_supports
    half, num_pairs = (count + 1) // 2, jnp.maximum(count // 2, 1)

    def add(i, carry):
      total, response_state, loss = carry
      support, judged = buffer.get(i), buffer.get(jnp.minimum(half + i, count - 1))
      solution = solve_anew(meta, support)
      grads, response_state, value, _ = differentiate(
        meta, solution.params, response_state, judged, solution=solution, batch=support
      )
      return optax.tree.add(total, _tree.at_least_float32(grads)), response_state, loss + value

    zero = jnp.zeros_like(played.detection.scores.switch)
    carry = (_tree.zeros_at_least_float32(meta), state.meta_state[0], zero)
    total, response_state, value = jax.lax.fori_loop(0, num_pairs, add, carry)
    grads, value = jax.tree.map(lambda leaf: leaf / num_pairs, (total, value))
    updates, tail_state = tail.update(
      _tree.cast_like(grads, meta), state.meta_state[1], meta, value=value, **extra_args
    )
    return optax.apply_updates(meta, updates), (response_state, tail_state), value

  def keep(state, played, is_open):
    buffer = state.last_support
    emptied = buffer._replace(num_supports=jnp.zeros_like(buffer.num_supports))
    buffer = jax.lax.cond(is_open, lambda: emptied, lambda: buffer.push(played.support))
    # The first round is a switch, with nothing before it.
    return buffer._replace(after_boundary=played.detection.switch & state.has_support)

  restarts = lambda state: state.last_support.after_boundary | ~state.has_support
  return Policy(init, restarts, is_open, update, keep)
