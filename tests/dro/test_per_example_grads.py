"""Per-example gradients refuse what takes them for gradients, and serve inside every trace."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxbo
from tests.cases import cases
from tests.dro import problem

PARAMS, BATCH = problem.params(), problem.batch()
MEAN = np.full(problem.N, 1 / problem.N)
ALL, SOME = {"w": True, "b": True}, {"w": True, "b": False}
refused = functools.partial(
  pytest.raises, TypeError, match=r"put jaxbo.reweight first in the chain, and clipping.* after it"
)


def head():
  return optax.chain(jaxbo.reweight(jaxbo.dro.uniform()), optax.sgd(1.0))


def update(tx, params=PARAMS, loss_fn=problem.loss_fn, batch=BATCH):
  grads = jaxbo.per_example_grad(loss_fn)(params, batch)
  return tx.update(grads, tx.init(params), params)[0]


@cases(
  "before",
  [
    optax.clip_by_global_norm(1.0),
    optax.clip(1.0),
    optax.clip_by_block_rms(1.0),
    optax.scale(2.0),
    optax.zero_nans(),
    optax.centralize(),
    optax.normalize_by_update_norm(),
    optax.add_noise(0.1, 0.5, 0),
    optax.trace(0.9),
    optax.scale_by_adam(),
    optax.add_decayed_weights(0.1),
    optax.stateless(lambda updates, _: jax.tree.map(jnp.asarray, updates)),
  ],
)
def test_nothing_may_stand_before_the_head(before):
  tx = optax.chain(before, head())
  for compile_or_not in (lambda f: f, jax.jit):
    with refused():
      compile_or_not(functools.partial(update, tx))()
    # A single leaf matches any tree.
    with refused():
      compile_or_not(functools.partial(update, tx, jnp.float32(1.0), lambda p, x: p * x, MEAN))()


def test_a_map_over_parameters_refuses_them_too():
  grads = jaxbo.per_example_grad(lambda p, x: p * x)(1.0, jnp.ones(2))
  for combine in (
    lambda p, g: p + g,
    lambda p, g: 0.1 * g - p,
    lambda p, g: g / 2.0,
    lambda p, g: -g,
    lambda p, g: g**2,
    lambda p, g: np.asarray(g),
    lambda p, g: jnp.where(p > 0, g, 0.0),
  ):
    with refused():
      jax.tree.map(combine, jnp.float32(1.0), grads)
  with pytest.raises(ValueError, match=r"different type(.|\n)*PerExampleGrads"):
    optax.keep_params_nonnegative().update(grads, optax.EmptyState(), PARAMS)


@cases(
  "wrap",
  [
    lambda tx: optax.MultiSteps(tx, 2),
    lambda tx: optax.MultiSteps(tx, 2, should_skip_update_fn=optax.skip_not_finite),
    lambda tx: optax.apply_if_finite(tx, 3),
    lambda tx: optax.masked(tx, SOME),
    lambda tx: optax.masked(tx, lambda params: jax.tree.map(lambda _: True, params)),
    lambda tx: optax.partition({"a": tx}, {"w": "a", "b": "a"}),
    lambda tx: optax.partition({"a": tx}, lambda params: jax.tree.map(lambda _: "a", params)),
    lambda tx: optax.conditionally_mask(tx, lambda step: step > 0),
    lambda tx: optax.conditionally_transform(tx, lambda step: step > 0),
    optax.flatten,
  ],
)
def test_wrappers_go_around_what_follows_the_head(wrap):
  for compile_or_not in (lambda f: f, jax.jit):
    with refused():
      compile_or_not(functools.partial(update, wrap(head())))()


def test_wrappers_work_behind_the_head():
  right = problem.weighted(BATCH, MEAN)
  step = jax.tree.map(lambda leaf: -leaf, right)
  head = jaxbo.reweight(jaxbo.dro.uniform())
  for tx, expected in (
    (optax.clip_by_global_norm(1.0), jax.tree.map(lambda g: g / optax.tree.norm(right), right)),
    (optax.MultiSteps(optax.sgd(1.0), 1).gradient_transformation(), step),
    (optax.apply_if_finite(optax.sgd(1.0), 3), step),
    (optax.masked(optax.sgd(1.0), ALL), step),
    (optax.partition({"a": optax.sgd(1.0)}, {"w": "a", "b": "a"}), step),
  ):
    chex.assert_trees_all_close(
      jax.jit(update, static_argnums=0)(optax.chain(head, tx)), expected, rtol=1e-5
    )


def test_the_optimizer_of_nnx_takes_the_gradient_of_the_head():
  model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
  graph, params = nnx.split(model)
  loss_fn = lambda params, batch: (nnx.merge(graph, params)(batch["x"])[:, 0] - batch["y"]) ** 2
  grads = jaxbo.per_example_grad(loss_fn)(params, BATCH)
  with refused():
    nnx.Optimizer(model, head(), wrt=nnx.Param).update(model, grads)
  tx = jaxbo.reweight(jaxbo.dro.uniform())
  gradient, _ = tx.update(grads, tx.init(params), params)
  slope = jax.grad(lambda p: loss_fn(p, BATCH).mean())(params)
  expected = np.asarray(params["kernel"][...] - slope["kernel"][...])
  nnx.Optimizer(model, optax.sgd(1.0), wrt=nnx.Param).update(model, gradient)
  np.testing.assert_allclose(model.kernel[...], expected, rtol=1e-5)


def test_they_do_not_cross_the_boundary_of_a_trace():
  gradients = jaxbo.per_example_grad(problem.loss_fn)
  for crossing in (
    lambda: jax.jit(gradients)(PARAMS, BATCH),
    lambda: jax.jit(lambda grads: grads.losses)(gradients(PARAMS, BATCH)),
    lambda: jax.lax.scan(lambda grads, _: (grads, None), gradients(PARAMS, BATCH), length=2),
    lambda: jax.lax.cond(
      True, lambda grads: grads.losses, lambda _: MEAN, gradients(PARAMS, BATCH)
    ),
  ):
    with pytest.raises(TypeError, match="in the function that makes them, under the same jit"):
      crossing()


def test_they_serve_inside_scan_cond_vmap_and_with_donation():
  tx = head()

  def step(params, state):
    grads = jaxbo.per_example_grad(problem.loss_fn)(params, BATCH)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  def scanned(params):
    body = lambda carry, _: (jax.lax.cond(True, step, lambda *carry: carry, *carry), None)
    return jax.lax.scan(body, (params, tx.init(params)), length=2)[0][0]

  expected = PARAMS
  state = tx.init(PARAMS)
  donated = jax.jit(step, donate_argnums=(0, 1))
  once = donated(jax.tree.map(jnp.copy, PARAMS), tx.init(PARAMS))
  for _ in range(2):
    expected, state = step(expected, state)
  close = functools.partial(chex.assert_trees_all_close, rtol=1e-5)
  close(donated(*once)[0], expected)
  close(jax.jit(scanned)(PARAMS), expected)
  two = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), PARAMS)
  close(jax.jit(jax.vmap(scanned))(two), jax.tree.map(lambda x: jnp.stack([x, x]), expected))
