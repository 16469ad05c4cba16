"""The robust loss over a Wasserstein ball, by a penalty on how far each example moves."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxbo import _check
from jaxbo._types import BatchLoss, Data, PyTree
from jaxbo.dro.moving import losses_of, squared_distances, take_apart
from jaxbo.dro.per_example import example_mask


@dataclasses.dataclass(frozen=True)
class WassersteinLoss:
  """What :func:`wasserstein_loss` returns: a loss that :func:`~jaxbo.per_example_grad` takes.

  Attributes:
    loss_fn: the losses of a batch.
    penalty: on squared distances.
    num_steps: of the search.
    moves: which leaves of the batch move.
  """

  loss_fn: BatchLoss
  penalty: float | jax.Array
  num_steps: int
  moves: PyTree = True

  def __call__(self, params: PyTree, batch: Data, /) -> jax.Array:
    """The robust losses, ``[batch]``."""
    return self._at(self._worst(params, batch), params, batch)

  def perturb(self, params: PyTree, batch: Data) -> Data:
    """The batch with each example where the search ends."""
    return take_apart(batch, self.moves)[1](self._worst(params, batch))

  def example_mask(self, batch: Data) -> jax.Array | None:
    """Which examples have a loss at all, if ``loss_fn`` says so."""
    return example_mask(self.loss_fn, batch)

  def _worst(self, params: PyTree, batch: Data) -> list[jax.Array]:
    start, join = take_apart(batch, self.moves)
    params, batch = jax.lax.stop_gradient((params, batch))
    gradient = jax.grad(lambda moved: jnp.sum(losses_of(self.loss_fn, params, join(moved))))

    def step(_, moved):
      slopes = gradient(moved)
      return [x + slope / (2 * self.penalty) for x, slope in zip(start, slopes, strict=True)]

    return jax.lax.stop_gradient(jax.lax.fori_loop(0, self.num_steps, step, start))

  def _at(self, moved: list[jax.Array], params: PyTree, batch: Data) -> jax.Array:
    start, join = take_apart(batch, self.moves)
    losses = losses_of(self.loss_fn, params, join(moved))
    return losses - self.penalty * squared_distances(moved, start)


def wasserstein_loss(
  loss_fn: BatchLoss,
  *,
  penalty: float | jax.Array,
  num_steps: int,
  moves: PyTree = True,
) -> WassersteinLoss:
  r"""Losses of examples that may move, at a price: distributional robustness in the input (WRM).

  .. math::
    \varphi_\gamma(\theta; z) = \max_{z'} \ell(\theta; z') - \gamma \|z' - z\|^2, \qquad
    \max_{W_2^2(Q, P) \le \rho} \mathbb E_Q\, \ell(\theta; z)
      = \min_{\gamma \ge 0} \gamma \rho + \mathbb E_P\, \varphi_\gamma(\theta; z)

  So the mean of these losses is, up to a constant, the worst case over all distributions within a
  Wasserstein ball, whose radius belongs to the penalty: it is the root of the mean squared distance
  that the examples move. The search is the fixed-point iteration :math:`z' \leftarrow z + \nabla_z
  \ell(\theta; z') / 2 \gamma`. It finds the maximum where :math:`\gamma` is above half of the
  largest curvature of the loss in :math:`z`, of either sign. Below, the search may diverge, and the
  maximum may be infinite; a loss that is not finite does not count in :func:`~jaxbo.reweight`. The
  gradient by the parameters is that at the points found, by Danskin's theorem: no second
  derivatives.

  Compose it with a weighting for robustness in both, the input and the share of examples:
  ``per_example_grad(wasserstein_loss(...))`` in front of ``reweight(kl(...))``.

  Cost: ``num_steps`` forward and backward passes for the inputs, beside that of ``loss_fn``.

  Args:
    loss_fn: ``loss_fn(params, batch) -> losses``, real floats ``[batch]``. The loss of an example
      must not depend on other examples.
    penalty: :math:`\gamma > 0`, in units of the loss by squared units of the input.
    num_steps: steps of the search, at least 1; the error falls by the curvature over
      :math:`2 \gamma` in each.
    moves: which leaves of the batch may move: booleans, a prefix of the batch, such as ``{"x":
      True, "y": False}``. Leaves of integers never do. By default all floats move, labels of a
      regression too.

  Returns:
    A :class:`WassersteinLoss`: the robust losses as a function ``(params, batch)``, and
    ``perturb(params, batch)``, the batch at the points found.

  Raises:
    ValueError: if an argument is outside its range, or ``moves`` does not fit the batch.
    TypeError: if ``loss_fn`` does not take ``(params, batch)``.

  Example:
    >>> import jax.numpy as jnp, jaxbo
    >>> loss_fn = lambda params, batch: (batch["x"] @ params - batch["y"]) ** 2
    >>> robust = jaxbo.dro.wasserstein_loss(
    ...   loss_fn, penalty=2.0, num_steps=60, moves={"x": True, "y": False})
    >>> batch = {"x": jnp.array([[1.0, 0.0]]), "y": jnp.array([2.0])}
    >>> params = jnp.array([1.0, 0.0])
    >>> print(robust(params, batch))            # penalty loss / (penalty - |params|^2)
    [2.]
    >>> print(robust.perturb(params, batch)["x"].round(4))
    [[0. 0.]]

  References:
    Sinha, Namkoong, Volpi and Duchi, `Certifying Some Distributional Robustness with Principled
    Adversarial Training <https://arxiv.org/abs/1710.10571>`_, 2018.
  """
  _check.takes_arguments("loss_fn", loss_fn, "params", "batch")
  _check.positive("penalty", penalty)
  return WassersteinLoss(loss_fn, penalty, _check.positive_int("num_steps", num_steps), moves)
