"""Eight virtual devices give the gradient of one: under jit, and inside shard_map either way."""

import contextlib
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxbo
from jaxbo.dro.batch import over
from tests.dro import problem

pytestmark = pytest.mark.slow

PARAMS, BATCH = problem.params(), problem.batch(16)
GROUPS, PRIOR = jnp.arange(16) % 3, jnp.linspace(0.5, 1.5, 16)
WEIGHTINGS = {
  "kl": jaxbo.dro.compositional(jaxbo.dro.kl(0.5), 0.3),
  "target": jaxbo.dro.kl(jaxbo.dro.target_ess(0.6)),
  "cvar": jaxbo.dro.cvar(0.3),
  "kl_cvar": jaxbo.dro.kl_cvar(0.3, 0.5),
  "chi_square_ball": jaxbo.dro.chi_square_ball(0.3),
  "cressie_read_ball": jaxbo.dro.cressie_read_ball(0.3, 1.5),
  "total_variation_ball": jaxbo.dro.total_variation_ball(0.3),
  "group": jaxbo.dro.group(3, 0.5),
  "doro": jaxbo.dro.doro(jaxbo.dro.top_k(4), 0.1),
  "lin_upper": jaxbo.dro.lin_upper(0.4, jaxbo.dro.quantile_range(0.1, 0.8)),
}
ROWS = PartitionSpec("d")


def mesh(axis_type=AxisType.Auto):
  return jax.make_mesh((8,), ("d",), axis_types=(axis_type,))


def gradients(batch, groups, prior, axis_name=None, stored=False, microbatch_size=None):
  """``{name: (gradient, info)}`` of two weightings, for one forward pass."""
  results = {}
  lazy = jaxbo.per_example_grad(problem.loss_fn, microbatch_size=microbatch_size, repair=True)(
    PARAMS, batch
  )
  names = ["kl"] if stored or microbatch_size else ["kl", "cvar"]
  for name in names:
    tx = jaxbo.reweight(WEIGHTINGS[name], axis_name=axis_name)
    options = {"groups": groups, "prior": prior}
    grads = lazy
    if stored:
      params = jax.lax.pcast(PARAMS, axis_name, to="varying")
      one = jax.vmap(jax.grad(problem.loss_fn), in_axes=(None, 0))
      grads, options["losses"] = one(params, batch), lazy.losses
    gradient, state = tx.update(grads, tx.init(PARAMS), PARAMS, **options)
    results[name] = gradient, state.info
  return results


@functools.cache
def alone(bad=False):
  return jax.device_get(jax.jit(gradients)(data(bad), GROUPS, PRIOR))


def data(bad):
  """All losses of the second device are bad, and one of the last."""
  rows = jnp.array([2, 3, 14])
  return {**BATCH, "y": BATCH["y"].at[rows].set(jnp.nan)} if bad else BATCH


def close(a, b):
  chex.assert_trees_all_close(jax.device_get(a), b, rtol=2e-4, atol=2e-5)


def in_shard_map(function, check_vma):
  sharded = jax.shard_map(
    function, mesh=mesh(), in_specs=ROWS, out_specs=PartitionSpec(), check_vma=check_vma
  )
  return jax.jit(sharded)


def test_a_sharded_global_batch_needs_nothing():
  arguments = jax.device_put((data(True), GROUPS, PRIOR), NamedSharding(mesh(), ROWS))
  close(jax.jit(gradients)(*arguments), alone(True))


@pytest.mark.parametrize("inside", [True, False], ids=["set_mesh", "no_set_mesh"])
def test_an_explicit_mesh_needs_nothing_either(inside):
  """Microbatches are divided as the batch is; fewer rows than devices go to all of them."""
  devices = mesh(AxisType.Explicit)

  def step(batch, groups, prior):
    cut = [gradients(batch, groups, prior, microbatch_size=size)["kl"] for size in (8, 4)]
    stream = jaxbo.streaming_grad(
      problem.loss_fn, jaxbo.dro.kl(0.5), microbatch_size=8, repair=True
    )
    streamed, _ = stream(PARAMS, batch, prior=prior)
    return gradients(batch, groups, prior), cut, streamed

  with jax.set_mesh(devices) if inside else contextlib.nullcontext():
    arguments = jax.device_put((data(True), GROUPS, PRIOR), NamedSharding(devices, ROWS))
    whole, cut, streamed = jax.jit(step)(*arguments)
  close(whole, alone(True))
  for result in cut:
    close(result, alone(True)["kl"])
  close(streamed, alone(True)["kl"][0])


@pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])
def test_inside_shard_map_the_gradient_is_global(check_vma):
  function = in_shard_map(functools.partial(gradients, axis_name="d"), check_vma)
  close(function(data(True), GROUPS, PRIOR), alone(True))
  close(function(data(False), GROUPS, PRIOR), alone(False))
  assert alone(True)["kl"][1].num_excluded == 3


def weigh_all(losses, groups, prior, axis_name=None):
  results = {}
  for name, weighting in WEIGHTINGS.items():
    options = {"groups": groups, "prior": prior, "axis_name": axis_name}
    weights, state, info = weighting.weigh(losses, weighting.init(), **options)
    results[name] = weights, (state, info)
  return results


def test_every_weighting_is_global():
  losses = problem.loss_fn(PARAMS, data(True))
  function = jax.shard_map(
    functools.partial(weigh_all, axis_name="d"),
    mesh=mesh(),
    in_specs=ROWS,
    out_specs={name: (ROWS, PartitionSpec()) for name in WEIGHTINGS},
  )
  close(jax.jit(function)(losses, GROUPS, PRIOR), jax.jit(weigh_all)(losses, GROUPS, PRIOR))
  # Nothing in them is refused by an explicit mesh.
  devices = mesh(AxisType.Explicit)
  with jax.set_mesh(devices):
    arguments = jax.device_put((losses, GROUPS, PRIOR), NamedSharding(devices, ROWS))
    assert jax.eval_shape(weigh_all, *arguments)["kl"][0].sharding.spec == ROWS


@pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])
def test_stored_gradients_microbatches_and_streams_are_global_too(check_vma):
  def function(batch, groups, prior):
    make = functools.partial(gradients, batch, groups, prior, "d")
    options = {"microbatch_size": 1, "axis_name": "d", "repair": True}
    one, two = (
      jaxbo.streaming_grad(problem.loss_fn, weighting, **options)(PARAMS, batch, prior=prior)[0]
      for weighting in (jaxbo.dro.kl(0.5), WEIGHTINGS["cvar"])
    )
    return make(stored=True)["kl"], make(microbatch_size=2)["kl"], one, two

  stored, cut, one, two = in_shard_map(function, check_vma)(data(True), GROUPS, PRIOR)
  close(stored, alone(True)["kl"])
  close(cut, alone(True)["kl"])
  close(one, alone(True)["kl"][0])
  close(two, alone(True)["cvar"][0])


def test_local_weights_would_be_something_else():
  """What the published code does: a softmax on each device, then the mean of the gradients."""

  def local(batch):
    grads = jaxbo.per_example_grad(problem.loss_fn)(PARAMS, batch)
    tx = jaxbo.reweight(jaxbo.dro.kl(0.5))
    return jax.lax.pmean(tx.update(grads, tx.init(PARAMS), PARAMS)[0], "d")

  wrong = in_shard_map(local, check_vma=False)(BATCH)
  right, _ = alone()["kl"]
  assert np.linalg.norm(wrong["w"] - right["w"]) > 0.3 * np.linalg.norm(right["w"])


def test_the_first_of_a_batch_is_one_on_all_devices():
  some = jnp.zeros(16, bool).at[jnp.array([5, 6, 7, 14])].set(True)
  first = lambda x: over("d", x).first(x)
  function = jax.shard_map(first, mesh=mesh(), in_specs=ROWS, out_specs=ROWS)
  assert np.flatnonzero(function(some)).tolist() == [5]


def test_a_replicated_batch_counts_once():
  """With the check on, what does not vary over the axis is known not to."""

  def replicated(batch, groups, prior):
    return {name: r for name, r in gradients(batch, groups, prior, "d").items() if name == "kl"}

  function = jax.shard_map(
    replicated, mesh=mesh(), in_specs=PartitionSpec(), out_specs=PartitionSpec()
  )
  close(jax.jit(function)(BATCH, GROUPS, PRIOR)["kl"], alone()["kl"])


def test_devices_exchange_scalars_and_one_gradient():
  """No loss travels: all-reduces of scalars, of 7 in a search, and of the parameters' shapes."""

  def loss_fn(params, batch):
    return (batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2

  def step(batch):
    grads = jaxbo.per_example_grad(loss_fn)(PARAMS, batch)
    tx = jaxbo.reweight(WEIGHTINGS["cvar"], axis_name="d")
    return tx.update(grads, tx.init(PARAMS), PARAMS)[0]

  text = in_shard_map(step, check_vma=True).lower(BATCH).as_text()
  names = set(re.findall(r"stablehlo\.(all_\w+|collective_\w+|reduce_scatter)", text))
  assert names == {"all_reduce"}
  types = set(re.findall(r"}\) : \(tensor<([^>]*)>\)", text))
  assert types <= {"f32", "i32", "7xf32", "3xf32"}, types


def test_stored_gradients_that_are_summed_already_are_refused():
  def step(batch):
    one = lambda row: jax.value_and_grad(lambda p: problem.loss_fn(p, row))(PARAMS)
    losses, grads = jax.vmap(one)(batch)
    tx = jaxbo.reweight(jaxbo.dro.kl(0.5), axis_name="d")
    return tx.update(grads, tx.init(PARAMS), PARAMS, losses=losses)[0]

  with pytest.raises(ValueError, match=r"grads\['b'\] must vary over the axis 'd'"):
    in_shard_map(step, check_vma=True)(BATCH)


def methods(axis_name):
  """Whatever takes gradients and the name of an axis."""
  return (
    jaxbo.reweight(jaxbo.dro.kl(0.5), axis_name=axis_name),
    jaxbo.ir_dro(0.1, axis_name=axis_name),
    jaxbo.group_dro(0.1, 3, axis_name=axis_name),
    jaxbo.cvar_dro(0.1, 0.5, axis_name=axis_name),
    jaxbo.chi2_dro(0.1, 0.5, axis_name=axis_name),
    jaxbo.term(0.1, 0.5, axis_name=axis_name),
    jaxbo.done(0.1, axis_name=axis_name),
  )


def test_an_unknown_axis_is_refused():
  grads = jaxbo.per_example_grad(problem.loss_fn)(PARAMS, BATCH)
  for tx in methods("devices"):
    with pytest.raises(
      ValueError, match="axis_name must be an axis of the enclosing shard_map, got"
    ):
      tx.update(grads, tx.init(PARAMS), PARAMS, groups=GROUPS)


@pytest.mark.parametrize(("axis_name", "forgotten"), [(None, "d"), ("d", "e")])
def test_a_forgotten_axis_is_refused_where_it_is_known(axis_name, forgotten):
  """Weights of a part of the batch, and a gradient that is summed over all parts."""

  def refused(function):
    both = jax.make_mesh((4, 2), ("d", "e"), axis_types=(AxisType.Auto,) * 2)
    rows = PartitionSpec(("d", "e"))
    sharded = jax.shard_map(function, mesh=both, in_specs=rows, out_specs=rows)
    message = rf"losses must not vary over the axis '{forgotten}' .* \(got {axis_name!r}\); where"
    with pytest.raises(ValueError, match=message):
      jax.eval_shape(sharded, BATCH, GROUPS)

  for tx in methods(axis_name):
    refused(functools.partial(update_of, tx, PARAMS))
  refused(functools.partial(update_of, methods(axis_name)[0], None))
  for weighting in (jaxbo.dro.kl(0.5), WEIGHTINGS["cvar"]):
    stream = jaxbo.streaming_grad(
      problem.loss_fn, weighting, microbatch_size=1, axis_name=axis_name
    )
    refused(lambda batch, _, stream=stream: stream(PARAMS, batch)[0])


def update_of(tx, params, batch, groups):
  grads = jaxbo.per_example_grad(problem.loss_fn)(PARAMS, batch)
  return tx.update(grads, tx.init(PARAMS), params, groups=groups)[0]


def test_each_device_may_have_a_model_and_a_batch_of_its_own():
  def own(params, batch):
    params = jax.tree.map(lambda leaf: leaf[0], params)
    grads = jaxbo.per_example_grad(problem.loss_fn)(params, batch)
    tx = jaxbo.reweight(WEIGHTINGS["chi_square_ball"])
    stream = jaxbo.streaming_grad(problem.loss_fn, jaxbo.dro.kl(0.5), microbatch_size=1)
    found = tx.update(grads, tx.init(params), params)[0], stream(params, batch)[0]
    return jax.tree.map(lambda leaf: leaf[None], found)

  stacked = jax.tree.map(lambda leaf: leaf[None] * jnp.ones((8,) + (1,) * leaf.ndim), PARAMS)
  function = jax.shard_map(own, mesh=mesh(), in_specs=ROWS, out_specs=ROWS)
  rows = jax.tree.map(lambda leaf: leaf.reshape(8, 2, *leaf.shape[1:]), BATCH)
  one = lambda params, batch: own(jax.tree.map(lambda leaf: leaf[None], params), batch)
  expected = jax.jit(jax.vmap(one))(stacked, rows)
  close(jax.jit(function)(stacked, BATCH), jax.tree.map(lambda leaf: leaf[:, 0], expected))


def test_a_named_vmap_is_an_axis_too():
  def step(row, group, prior):
    add_axis = lambda leaf: leaf[None]
    row = jax.tree.map(add_axis, row)
    return gradients(row, group[None], prior[None], "d")["cvar"]

  result = jax.jit(jax.vmap(step, axis_name="d"))(BATCH, GROUPS, PRIOR)
  close(jax.tree.map(lambda leaf: leaf[0], result), alone()["cvar"])
