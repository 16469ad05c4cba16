"""A loop that moves both levels at once, for methods on :class:`jaxbo.Bilevel` parameters."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from jaxbo import _check, _tree
from jaxbo._types import Loss
from jaxbo.bilevel.loop import BilevelInfo, BilevelState, outer_gradients, report
from jaxbo.bilevel.parameters import Bilevel
from jaxbo.bilevel.response import response_info
from jaxbo.bilevel.solution import InnerInfo, InnerSolution


def joint(
  outer_loss: Loss, outer: optax.GradientTransformation, *, has_aux: bool = False
) -> tuple[Callable[..., BilevelState], Callable[..., tuple[BilevelState, BilevelInfo]]]:
  """``(init, step)`` like :func:`jaxbo.bilevel_loop`, for a method that moves both levels itself.

  ``outer`` receives the gradients of the outer loss as a :class:`jaxbo.Bilevel`, the batch of the
  inner loss as ``batch=``, and the batch of the outer loss as ``outer_batch=``. The inner solution
  holds only parameters, and the inner losses in the report are ``None``.
  """
  differentiate = outer_gradients(outer_loss, outer, has_aux=has_aux, moves_both=True)

  def init(x, y0, train=None):
    del train
    params = _tree.copy(Bilevel(x, y0))
    _check.floating("x", x)
    _check.floating("y0", y0)
    solution = InnerSolution(params.inner, (), None, InnerInfo(None, jnp.bool_(True)))
    return BilevelState(params.outer, solution, _tree.copy(outer.init(params)))

  def step(state, train, val, **extra_args):
    params = Bilevel(state.x, state.solution.params)
    given = {"batch": train, "outer_batch": val, **extra_args}
    updates, outer_state, loss, aux = differentiate(*params, state.outer_state, val, **given)
    new: Any = optax.apply_updates(params, updates)
    solution = state.solution._replace(params=new.inner)
    info = report(loss, aux, solution.info, response_info(outer_state, "finite"))
    return BilevelState(new.outer, solution, outer_state), info

  return init, step
