"""What is not finite behind finite losses never reaches parameters or statistics, and is told."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import jaxbo

# The square root has a value at 0 and no slope.
ROOTS = np.array([1.0, 4.0, 0.0, 9.0, 16.0, 1.0, 1.0, 1.0], np.float32)
GOOD = np.where(ROOTS == 0, 1, ROOTS)
PARAMS = jnp.float32(1.0)


def loss_fn(params, batch):
  return jnp.sqrt(params * batch)


def update(grads, **options):
  tx = jaxbo.reweight(jaxbo.dro.uniform(), **options.pop("of", {}))
  return tx.update(grads, tx.init(PARAMS), PARAMS, **options)


@pytest.mark.parametrize("repair", [False, True])
@pytest.mark.parametrize("size", [None, 4])
def test_a_finite_loss_with_a_gradient_that_is_not_gives_zero_and_is_told(size, repair):
  lazy = jaxbo.per_example_grad(loss_fn, microbatch_size=size, repair=repair)
  step = jax.jit(lambda batch: update(lazy(PARAMS, batch)))
  gradient, state = step(ROOTS)
  assert gradient == 0
  assert not state.info.gradient_finite
  assert state.info.num_excluded == 0
  gradient, state = step(GOOD)
  np.testing.assert_allclose(gradient, np.sqrt(GOOD).mean() / 2, rtol=1e-6)
  assert state.info.gradient_finite


@pytest.mark.parametrize("weighting", [jaxbo.dro.uniform(), jaxbo.dro.cvar(1.0)], ids=[1, 2])
def test_streams_tell_it_too(weighting):
  step = jax.jit(jaxbo.streaming_grad(loss_fn, weighting, microbatch_size=4))
  gradient, info = step(PARAMS, ROOTS)
  assert gradient == 0
  assert not info.gradient_finite
  gradient, info = step(PARAMS, GOOD)
  np.testing.assert_allclose(gradient, np.sqrt(GOOD).mean() / 2, rtol=1e-6)
  assert info.gradient_finite


@pytest.mark.parametrize("size", [None, 4])
def test_a_masked_example_is_replaced_if_its_gradient_alone_is_not_finite(size):
  """The rows that fill a batch up have finite losses, and slopes that are not."""
  lazy = jaxbo.per_example_grad(loss_fn, microbatch_size=size, repair=True)
  streamed = jaxbo.streaming_grad(loss_fn, jaxbo.dro.uniform(), microbatch_size=4, repair=True)
  there = ROOTS > 0

  @jax.jit
  def both(batch):
    gradient, state = update(lazy(PARAMS, batch), mask=there)
    return (gradient, state.info), streamed(PARAMS, batch, mask=there)

  for gradient, info in both(ROOTS):
    np.testing.assert_allclose(gradient, np.sqrt(ROOTS).sum() / 7 / 2, rtol=1e-6)
    assert info.gradient_finite
    assert info.num_excluded == 0


def test_stored_gradients_that_are_not_finite_are_left_out():
  losses, grads = jax.vmap(jax.value_and_grad(loss_fn), in_axes=(None, 0))(PARAMS, ROOTS)
  assert np.flatnonzero(~np.isfinite(grads)).tolist() == [2]
  gradient, state = update(grads, losses=losses)
  np.testing.assert_allclose(gradient, np.sqrt(ROOTS).sum() / 7 / 2, rtol=1e-6)
  assert state.info.num_excluded == 1
  assert state.info.gradient_finite
  assert update(grads, losses=losses, mask=ROOTS > 0)[1].info.num_excluded == 0


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])
def test_all_devices_agree(check_vma):
  """The bad example is on one of eight, and parameters may differ along another axis."""
  both = jaxbo.streaming_grad(loss_fn, jaxbo.dro.kl(1.0), microbatch_size=1, axis_name="d")

  def step(batch):
    lazy = jaxbo.per_example_grad(loss_fn, has_aux=False)(PARAMS, batch)
    return update(lazy, of={"axis_name": "d"}), both(PARAMS, batch)

  mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
  spec = {"in_specs": PartitionSpec("d"), "out_specs": PartitionSpec()}
  sharded = jax.jit(jax.shard_map(step, mesh=mesh, check_vma=check_vma, **spec))
  for batch, finite in (ROOTS, False), (GOOD, True):
    (gradient, state), (streamed, info) = sharded(batch)
    assert state.info.gradient_finite == info.gradient_finite == finite
    assert (gradient != 0) == (streamed != 0) == finite


@pytest.mark.slow
def test_parameters_divided_by_hand_along_another_axis_agree_too():
  def step(params, batch):
    tx = jaxbo.reweight(jaxbo.dro.uniform(), axis_name="d")
    of_all = lambda params, batch: jnp.sqrt(jax.lax.psum(params, "m") * batch) + batch
    updates, state = tx.update(jaxbo.per_example_grad(of_all)(params, batch), tx.init(params))
    return updates, state.info

  mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  sharded = jax.shard_map(
    step,
    mesh=mesh,
    in_specs=(PartitionSpec("m"), PartitionSpec("d")),
    out_specs=(PartitionSpec("m"), PartitionSpec()),
  )
  for batch, finite in (ROOTS, False), (GOOD, True):
    updates, info = jax.jit(sharded)(jnp.array([0.5, 0.5]), batch)
    assert info.gradient_finite == finite
    assert np.all((updates != 0) == finite)


class Normalized(nn.Module):
  """Batch statistics in front of a linear layer."""

  @nn.compact
  def __call__(self, images):
    return nn.Dense(1)(nn.BatchNorm(use_running_average=False)(images))[:, 0]


def test_statistics_of_a_batch_with_a_bad_image_are_not_carried_on():
  model, images = Normalized(), jnp.arange(12.0).reshape(4, 3)
  variables = jax.jit(model.init)(jax.random.key(0), images)
  params, before = variables["params"], variables["batch_stats"]

  def loss_fn(params, batch):
    images, stats = batch
    variables = {"params": params, "batch_stats": stats}
    output, new = model.apply(variables, images, mutable=["batch_stats"])
    return output**2, new["batch_stats"]

  @jax.jit
  def step(images):
    grads = jaxbo.per_example_grad(loss_fn, has_aux=True)(params, (images, before))
    tx = jaxbo.reweight(jaxbo.dro.uniform())
    updates, state = tx.update(grads, tx.init(params), params)
    return updates, state.info, grads.aux, grads.aux_or(before)

  updates, info, aux, kept = step(images.at[1].set(jnp.nan))
  assert not info.aux_finite
  assert not np.any(np.isfinite(aux["BatchNorm_0"]["mean"]))
  chex.assert_trees_all_equal(kept, before)
  assert optax.tree.norm(updates) == 0
  _, info, aux, kept = step(images)
  assert info.aux_finite
  chex.assert_trees_all_equal(kept, aux)
  with pytest.raises(ValueError, match="previous must have the structure and shapes of aux"):
    jaxbo.dro.PerExampleGrads(PARAMS, lambda w: w, {"mean": PARAMS}).aux_or(PARAMS)


def test_microbatches_refuse_statistics():
  """Also those with as many features as a microbatch has examples."""
  for num_features in (1, 4, 8):
    for statistic in (jnp.mean, functools.partial(jnp.mean, axis=0)):

      def with_statistics(params, batch, statistic=statistic):
        return params * batch.sum(1), {"mean": statistic(batch), "rows": batch}

      grads = jaxbo.per_example_grad(with_statistics, has_aux=True, microbatch_size=4)
      with pytest.raises(ValueError, match=r"aux\['mean'\] must be \[batch, \.\.\.\] with micro"):
        grads(PARAMS, jnp.ones((8, num_features)))
