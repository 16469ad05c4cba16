"""One form for the loops of all bilevel methods: those with a response and those without."""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jaxbo


class Loop(NamedTuple):
  """A method on a problem; an outer step is on the batches of both losses."""

  init: Callable[[Any, Any], Any]  # init(x, y) -> state
  step: Callable[[Any, Any, Any], Any]  # step(state, train, val) -> state
  params: Callable[[Any], jaxbo.Bilevel]  # params(state)
  num_batches: int | None = None  # The leading axis of ``train`` if each inner step has a batch.


def value_function_loop(
  outer_loss: Callable[..., jax.Array], tx: optax.GradientTransformation
) -> Loop:
  """The loop of a method on :class:`jaxbo.Bilevel` parameters, such as ``jaxbo.pdbo``."""
  tx = optax.with_extra_args_support(tx)

  def init(x, y):
    params = jaxbo.Bilevel(x, y)
    return params, tx.init(params)

  def step(state, train, val):
    params, opt_state = state
    grads = jax.grad(lambda p: outer_loss(p.outer, p.inner, val))(params)
    updates, opt_state = tx.update(grads, opt_state, params, batch=train)
    return optax.apply_updates(params, updates), opt_state

  return Loop(init, step, lambda state: state[0])


def response_loop(
  outer_loss: Callable[..., jax.Array],
  inner: jaxbo.InnerSolver,
  outer: optax.GradientTransformation,
) -> Loop:
  """The loop of a method with a response, such as ``jaxbo.itd``."""
  init, bilevel_step = jaxbo.bilevel_loop(outer_loss, inner, outer)

  def step(state, train, val):
    if not inner.per_step_batches:
      return bilevel_step(state, train, val)[0]
    # The linear system sees all examples of the inner run at once.
    union = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), train)
    return bilevel_step(state, train, val, linear_batch=union)[0]

  params = lambda state: jaxbo.Bilevel(state.x, state.solution.params)
  return Loop(init, step, params, inner.num_steps if inner.per_step_batches else None)


def training_loop(inner_loss: Callable[..., jax.Array], tx: optax.GradientTransformation) -> Loop:
  """Plain training of the inner parameters at fixed outer ones; a step is one gradient."""

  def step(state, train, val):
    del val
    (x, y), opt_state = state
    updates, opt_state = tx.update(jax.grad(inner_loss, 1)(x, y, train), opt_state, y)
    return jaxbo.Bilevel(x, optax.apply_updates(y, updates)), opt_state

  return Loop(lambda x, y: (jaxbo.Bilevel(x, y), tx.init(y)), step, lambda state: state[0])


def best_of(loop: Loop, outer_loss: Callable[..., jax.Array]) -> Loop:
  """The same, but its parameters are those of the least outer loss so far: early stopping."""

  def init(x, y):
    state = loop.init(x, y)
    return state, loop.params(state), jnp.inf

  def step(state, train, val):
    inside, best, least = state
    inside = loop.step(inside, train, val)
    loss = outer_loss(*loop.params(inside), val)
    choose = lambda new, old: jnp.where(loss < least, new, old)
    return inside, jax.tree.map(choose, loop.params(inside), best), choose(loss, least)

  return Loop(init, step, lambda state: state[1])


def levels(
  outer: optax.GradientTransformation,
  inner: optax.GradientTransformation,
  alternate: int | None = None,
) -> optax.GradientTransformation:
  """An optimizer for each level; with ``alternate``, so many steps inside and one outside in turn.

  The tail of ``jaxbo.f2sa``, for any two optimizers.
  """
  if alternate is not None:
    outer_moves = lambda step, **_: jnp.asarray(step) % (alternate + 1) == alternate
    outer = optax.conditionally_mask(outer, outer_moves)
    inner_moves = lambda step, **_: jnp.asarray(step) % (alternate + 1) != alternate
    inner = optax.conditionally_mask(inner, inner_moves)
  of_level: dict[Hashable, optax.GradientTransformation] = {"outer": outer, "inner": inner}
  return optax.partition(of_level, jaxbo.Bilevel("outer", "inner"))


def dual_of(state: Any) -> jax.Array:
  """The multiplier that a state tells of; NaN if its method has none."""
  return jnp.asarray(optax.tree.get(state, "dual", jnp.nan), float)
