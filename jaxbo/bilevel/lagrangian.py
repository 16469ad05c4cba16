"""The rule for the primal step size of a Lagrangian."""

import jax
import jax.numpy as jnp
import optax

from jaxbo import _check, _tree


def scale_by_lagrangian_smoothness(
  head: optax.GradientTransformation,
  *,
  outer_smoothness: float | jax.Array,
  constraint_smoothness: float | jax.Array,
) -> optax.GradientTransformationExtraArgs:
  r"""Divides the output of a head by the smoothness of its Lagrangian, so steps stay stable.

  .. math:: u = \frac{\nabla L}{L_f + \lambda L_h}

  A learning rate of at most 1 is then stable for every multiplier. Proof: the gradients of
  :math:`f` and :math:`h` have the Lipschitz constants :math:`L_f` and :math:`L_h`, so the gradient
  of :math:`L = f + \lambda h` has a Lipschitz constant of at most :math:`M = L_f + \lambda L_h`. A
  step of :math:`\eta / M` then gives

  .. math::
    L(z - \tfrac \eta M \nabla L) \le L(z) - \tfrac \eta M (1 - \tfrac \eta 2) \|\nabla L\|^2
    \le L(z) - \tfrac{\eta}{2M} \|\nabla L\|^2 \quad \text{for } \eta \le 1.

  Wrap this transformation around the head; do not chain it after the head. A link of
  ``optax.chain`` does not see the state of another link, and the rule needs the multiplier of
  *this* update, which may jump by :math:`\tau h`. The state and the diagnostics are those of the
  head. A tail that is invariant to scale, such as Adam, undoes the scaling.

  Cost and memory: none.

  Args:
    head: :func:`add_primal_dual_penalty`, :func:`add_value_function_penalty`,
      :func:`add_dynamic_barrier`, or :func:`add_proximal_terms` around one of them.
    outer_smoothness: :math:`L_f > 0`, the Lipschitz constant of the gradient of :math:`f` in
      :math:`(x, y)` jointly. Proximal terms add :math:`2 \rho_f`.
    constraint_smoothness: :math:`L_h > 0`, the Lipschitz constant of the gradient of
      :math:`g(x, y) - \tilde g^*(x)`. It is at most :math:`2 L_g + L_g^2 / \mu` if
      :math:`g(x, \cdot)` with its regularizer has the curvature :math:`\mu`. Proximal terms add
      :math:`2 \rho_h`.

  Returns:
    A transformation like ``head``; put it first in the chain, instead of ``head``.

  Raises:
    ValueError: if a constant is not positive, or the state of ``head`` has no ``dual``.
    TypeError: if ``head`` is not a transformation.

  Example:
    >>> import jax.numpy as jnp, jaxbo, optax
    >>> head = jaxbo.add_value_function_penalty(lambda x, y, batch: 0.5 * (y - x) ** 2,
    ...                                         multiplier=10.0, num_steps=1,
    ...                                         inner_optimizer=optax.sgd(1.0))
    >>> tx = optax.chain(jaxbo.scale_by_lagrangian_smoothness(head, outer_smoothness=5.0,
    ...                                                       constraint_smoothness=2.0),
    ...                  optax.sgd(1.0))
    >>> params = jaxbo.Bilevel(outer=jnp.float32(0.0), inner=jnp.float32(2.0))
    >>> grads = jaxbo.Bilevel(outer=jnp.float32(0.0), inner=jnp.float32(0.0))
    >>> updates, _ = tx.update(grads, tx.init(params), params, batch=None)
    >>> print(updates.inner.round(3))                          # -10 * 2 / (5 + 10 * 2)
    -0.8
  """
  _check.transformation("head", head)
  _check.positive("outer_smoothness", outer_smoothness)
  _check.positive("constraint_smoothness", constraint_smoothness)
  head = optax.with_extra_args_support(head)

  def update(updates, state, params=None, **extra_args):
    direction, state = head.update(updates, state, params, **extra_args)
    dual = optax.tree.get(state, "dual")
    if dual is None:
      raise ValueError(
        "head must report its multiplier as dual, as jaxbo.add_primal_dual_penalty does, got the "
        f"state {type(state).__name__}"
      )
    smoothness = jnp.asarray(outer_smoothness, dual.dtype) + dual * constraint_smoothness
    return _tree.scaled(1 / smoothness, direction), state

  return optax.GradientTransformationExtraArgs(head.init, update)
