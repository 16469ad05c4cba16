"""Bilevel problems whose inner problem may have many minima, with closed forms; and their loop."""

import jax
import jax.numpy as jnp
import optax

import jaxbo


def flat_inner(x, y, batch):
  """T1 and T2: least where y[0] is x, whatever y[1] is."""
  del batch
  return 0.5 * y[0] ** 2 - x * y[0]


def flat_gap(p):
  """The inner loss of T1 and T2 above its least value."""
  return 0.5 * (p.inner[0] - p.outer) ** 2


def flat_outer(p):
  """T1: least at x = y[0] = y[1] = 1."""
  return 0.5 * (p.outer - p.inner[1]) ** 2 + 0.5 * (p.inner[0] - 1) ** 2


def active_outer(p):
  """T2: with the inner problem least at x = y[0] = y[1] = 2; the constraint pushes back."""
  return flat_outer(p) + 0.5 * (p.outer - 3) ** 2


def pbgd_inner(x, y, batch):
  """T3: least where y = -x."""
  del batch
  return (y + x) ** 2 + x * jnp.sin(y + x) ** 2


def pbgd_outer(p):
  """T3: with y = -x it has three minima."""
  x, y = p
  return jnp.cos(4 * y + 2) / (1 + jnp.exp(2 - 4 * x)) + 0.5 * jnp.log((4 * x - 2) ** 2 + 1)


def sine_inner(x, y, batch):
  """T4, with any number of inner dimensions: least on many lines x + y = const."""
  del batch
  return jnp.sum(jnp.sin(x + y - 2))


def sine_outer(p):
  """T4."""
  return (p.outer - 2) ** 2 + jnp.sum((p.inner - 4) ** 2)


POINTS = ((1.0, 3.0), (3.0, 1.0), (-2.0, 2.0), (-3.0, -2.0))


def coreset_outer(p):
  """T8."""
  return 0.1 * jnp.sum((p.inner - jnp.array([3.0, -2.0])) ** 2)


def coreset_inner(x, y, batch):
  """T8: the inner solution is the mean of four points with the weights softmax(x)."""
  del batch
  return jnp.sum((y - jax.nn.softmax(x) @ jnp.array(POINTS)) ** 2)


# T3: three minima of f(x, -x): a start in the basin, x, and the value.
PBGD_MINIMA = [(0.2, 0.382360, 0.442706), (1.3, 1.215145, 0.199911), (2.6, 2.829642, 1.243458)]


def box(low, high):
  """The projection on a box."""
  return lambda tree: optax.projections.projection_box(tree, low, high)


def descend(tx, outer_loss, params, num_steps, batch=None):
  """``(params, state)`` after so many steps, and what each step saw: ``(params, dual)``."""

  def step(carry, _):
    params, state = carry
    grads = jax.grad(outer_loss)(params)
    updates, state = tx.update(grads, state, params, batch=batch)
    seen = params, optax.tree.get(state, "dual")
    return (optax.apply_updates(params, updates), state), seen

  run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=num_steps))
  return run((params, tx.init(params)))


def start(x, y):
  """Parameters of both levels, in the default precision."""
  return jaxbo.Bilevel(outer=jnp.array(x, float), inner=jnp.array(y, float))


def heads(loss, num_steps, **options):
  """Every head on an inner loss."""
  options = {"num_steps": num_steps, "inner_optimizer": optax.sgd(0.1), **options}
  return {
    "pdbo": jaxbo.add_primal_dual_penalty(loss, slack=0.1, dual_learning_rate=0.5, **options),
    "pdbo_regularized": jaxbo.add_primal_dual_penalty(
      loss,
      slack=0.1,
      dual_learning_rate=0.5,
      value_regularizer=0.1,
      extrapolation=1.0,
      **options,
    ),
    "bome": jaxbo.add_dynamic_barrier(loss, barrier_rate=0.5, **options),
    "penalty": jaxbo.add_value_function_penalty(loss, multiplier=2.0, **options),
  }


HEADS = list(heads(lambda x, y, batch: y, 1))
