"""Running batch statistics across inner steps, of models of Flax Linen and NNX."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import jaxbo

INPUTS = np.random.default_rng(0).normal(1.0, 2.0, (20, 4)).astype(np.float32)
TARGETS = np.sin(INPUTS @ np.ones(4))[:, None]
NUM_STEPS, MOMENTUM = 5, 0.9


class LinenModel(nn.Module):
  @nn.compact
  def __call__(self, inputs, train):
    hidden = nn.Dense(3)(inputs)
    return nn.Dense(1)(nn.BatchNorm(not train, momentum=MOMENTUM)(hidden))


class NnxModel(nnx.Module):
  def __init__(self, rngs):
    self.first, self.last = nnx.Linear(4, 3, rngs=rngs), nnx.Linear(3, 1, rngs=rngs)
    self.norm = nnx.BatchNorm(3, momentum=MOMENTUM, rngs=rngs)

  def __call__(self, inputs):
    return self.last(self.norm(self.first(inputs)))


def linen():
  """``(y0, apply(y, inputs) -> (outputs, stats), mean of the statistics)``."""
  variables = LinenModel().init(jax.random.key(0), INPUTS, train=True)
  y0 = {"params": variables["params"], "stats": variables["batch_stats"]}

  def apply(y, inputs):
    variables = {"params": y["params"], "batch_stats": y["stats"]}
    outputs, new = LinenModel().apply(variables, inputs, train=True, mutable="batch_stats")
    return outputs, new["batch_stats"]

  return y0, apply, lambda stats: stats["BatchNorm_0"]["mean"]


def from_nnx():
  graph, params, stats = nnx.split(NnxModel(nnx.Rngs(0)), nnx.Param, nnx.BatchStat)
  y0 = {"params": nnx.to_pure_dict(params), "stats": nnx.to_pure_dict(stats)}

  def apply(y, inputs):
    module = nnx.merge(graph, nnx.State(y["params"]), nnx.State(y["stats"]), copy=True)
    outputs = module(inputs)
    return outputs, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))

  return y0, apply, lambda stats: stats["norm"]["mean"]


@pytest.mark.parametrize("make", [linen, from_nnx])
def test_running_statistics_are_those_of_a_loop(make):
  """``x`` scales the targets; the statistics of all steps are averaged as the model does it."""
  y0, apply, mean_of = make()

  def inner_loss(x, y, batch):
    outputs, stats = apply(y, batch[0])
    return jnp.mean((outputs - x * batch[1]) ** 2), stats

  optimizer = optax.partition(
    {"params": optax.sgd(0.1, momentum=0.5), "stats": optax.set_to_zero()},
    {"params": "params", "stats": "stats"},
  )
  keep = lambda y, stats: y | {"stats": stats}
  inner = jaxbo.inner_solver(inner_loss, optimizer, NUM_STEPS, has_aux=True, keep=keep)
  x, batch = jnp.float32(0.7), (INPUTS, TARGETS)
  solution = jax.jit(inner.solve)(x, inner.init(y0, x, batch), batch)

  y, trace = y0, jax.tree.map(jnp.zeros_like, y0["params"])
  loss = lambda params, stats: inner_loss(x, {"params": params, "stats": stats}, batch)
  gradient = jax.jit(jax.grad(loss, has_aux=True))
  for _ in range(NUM_STEPS):
    grads, stats = gradient(y["params"], y["stats"])
    trace = jax.tree.map(lambda t, g: 0.5 * t + g, trace, grads)
    params = jax.tree.map(lambda p, t: p - 0.1 * t, y["params"], trace)
    y = {"params": params, "stats": stats}
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), solution.params, y
  )
  assert np.all(np.abs(mean_of(solution.params["stats"]) - mean_of(y0["stats"])) > 1e-3)

  # Responses take the statistics along: ITD differentiates them, AID holds them constant.
  outer_loss = lambda x, y, batch: jnp.mean((apply(y, batch[0])[0] - batch[1]) ** 2)
  for head in (
    jaxbo.add_unrolled_response(inner),
    jaxbo.add_implicit_response(inner, jaxbo.conjugate_gradient(5, damping=0.1)),
  ):
    init, step = jaxbo.bilevel_loop(outer_loss, inner, optax.chain(head, optax.sgd(0.1)))
    state, info = jax.jit(step)(init(x, y0, batch), batch, batch)
    assert info.response_finite
    assert state.x != x


def test_what_is_kept_must_look_like_y():
  loss = lambda x, y, batch: (jnp.sum((y - x) ** 2), y)
  inner = jaxbo.inner_solver(loss, optax.sgd(0.1), 2, has_aux=True, keep=lambda y, aux: aux[:1])
  with pytest.raises(ValueError, match="what keep returns must have the structure and shapes of y"):
    inner.init(jnp.ones(3), jnp.ones(3), None)
