"""Samples divided among eight virtual devices, which exchange the scalar products alone."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxbo

pytestmark = pytest.mark.slow  # All together, not each.

NUM_SAMPLES = 16


def setting():
  weights = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)
  solver = jaxbo.inner_solver(
    lambda x, y, batch: 0.5 * jnp.sum((y - batch * jnp.tanh(weights @ x)) ** 2),
    optax.sgd(0.5, momentum=0.5),
    5,
  )
  x, batch = jnp.linspace(-1.0, 1.0, 6), jnp.float32(1.5)
  solution = solver.solve(x, solver.init(jnp.zeros(4)), batch)
  return solver, (x, solution, (jnp.ones(6), jnp.arange(1.0, 5.0)), batch)


def updater(head):
  return lambda x, solution, grads, batch: head.update(
    grads, head.init(x), x, solution=solution, batch=batch
  )


def collectives(compiled):
  """What devices exchange: the operation and the shapes of its results, one for each in the HLO."""
  operation = re.compile(
    r"= (?P<results>.*?) (?P<name>(?:all-|reduce-scatter|collective-|ragged-|send|recv)[a-z-]*)\("
  )
  found = [match for line in compiled.as_text().splitlines() if (match := operation.search(line))]
  return [(match["name"], re.findall(r"\w+\[[\d,]*\]", match["results"])) for match in found]


def test_all_collectives_of_a_program_are_found_with_all_that_they_exchange():
  """So that the tests below cannot miss one: XLA puts reductions together into tuples."""

  def exchange(a):
    a = a * jax.lax.axis_index("d")
    return (
      jax.lax.psum((a, a[:3, None]), "d"),
      jax.lax.all_gather(a, "d"),
      jax.lax.psum_scatter(a, "d", tiled=True),
      jax.lax.ppermute(a, "d", [(0, 1)]),
      jax.lax.all_to_all(a, "d", 0, 0, tiled=True),
    )

  mesh = jax.make_mesh((2,), ("d",), devices=jax.devices()[:2])
  specs = {"in_specs": PartitionSpec(), "out_specs": PartitionSpec("d")}
  program = jax.jit(jax.shard_map(exchange, mesh=mesh, **specs))
  found = dict(collectives(program.lower(jnp.ones(4)).compile()))
  assert sorted(found.pop("all-reduce")) == ["f32[3,1]", "f32[4]"]
  assert found == {
    "all-gather": ["f32[2,4]"],
    "reduce-scatter": ["f32[2]"],
    "collective-permute": ["f32[4]"],
    "all-to-all": ["f32[2]", "f32[2]"],
  }


@pytest.mark.parametrize("difference", ["forward", "exact"])
@pytest.mark.parametrize("directions", ["gaussian", "orthogonal"])
def test_devices_exchange_one_vector_of_scalars_and_give_the_result_of_one(directions, difference):
  solver, arguments = setting()
  num_samples = NUM_SAMPLES if directions == "gaussian" else 0
  kwargs = {"directions": directions, "difference": difference, "sample_batch_size": 2}
  mesh = jax.make_mesh((8,), ("samples",))
  if directions == "orthogonal":  # As many as parameters at most: six, on two devices.
    num_samples, mesh = 6, jax.make_mesh((2,), ("samples",), devices=jax.devices()[:2])
  compiled, state = assert_divided_equals_alone(solver, arguments, mesh, num_samples, **kwargs)
  assert state.info.num_finite == num_samples
  assert collectives(compiled) == [("all-reduce", [f"f32[{num_samples}]"])]


@pytest.mark.parametrize("through", [False, True])
def test_devices_exchange_the_scalars_of_every_task_with_directions_of_its_own(through):
  """Task by task in a loop, or all at once where each has features of its own."""
  weights = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)
  target = lambda x, batch: batch * jnp.tanh(weights @ x)
  one = jaxbo.inner_solver(
    lambda x, y, batch: 0.5 * jnp.sum((y - (x if through else target(x, batch))) ** 2),
    optax.sgd(0.5),
    3,
    through=target if through else None,
  )
  solver = jaxbo.over_tasks(one, 3)
  x, batch = jnp.linspace(-1.0, 1.0, 6), jnp.array([1.0, -0.5, 2.0])
  solution = solver.solve(x, solver.init(jnp.zeros(4)), batch)
  arguments = x, solution, (jnp.ones(6), jnp.arange(12.0).reshape(3, 4)), batch
  mesh = jax.make_mesh((2,), ("samples",), devices=jax.devices()[:2])
  compiled, state = assert_divided_equals_alone(solver, arguments, mesh, 4, per_task=True)
  assert state.info.num_finite == 3 * 4
  assert collectives(compiled) == [("all-reduce", ["f32[3,4]" if through else "f32[4]"])]


def assert_divided_equals_alone(solver, arguments, mesh, num_samples, **kwargs):
  """Returns the compiled update on the devices of ``mesh``, and the state after it."""
  alone = jaxbo.add_es_response(solver, num_samples, 1e-2, **kwargs)
  divided = jaxbo.add_es_response(
    solver, num_samples, 1e-2, mesh=mesh, axis_name="samples", **kwargs
  )
  expected, _ = jax.jit(updater(alone))(*arguments)
  arguments = jax.device_put(arguments, NamedSharding(mesh, PartitionSpec()))
  compiled = jax.jit(updater(divided)).lower(*arguments).compile()
  result, state = compiled(*arguments)
  np.testing.assert_allclose(result, expected, rtol=2e-4, atol=1e-5)
  return compiled, state


def test_inside_a_shard_map_of_the_user_the_axis_is_enough():
  solver, arguments = setting()
  expected, _ = updater(jaxbo.add_es_response(solver, NUM_SAMPLES))(*arguments)
  divided = jaxbo.add_es_response(solver, NUM_SAMPLES, axis_name="samples")
  mesh, spec = jax.make_mesh((8,), ("samples",)), PartitionSpec()
  result, _ = jax.jit(jax.shard_map(updater(divided), mesh=mesh, in_specs=spec, out_specs=spec))(
    *arguments
  )
  np.testing.assert_allclose(result, expected, rtol=2e-4, atol=1e-5)


def test_data_divided_over_the_axis_of_the_samples_are_refused():
  """Each sample would be that of another problem; over another axis, all have the same."""
  solver = jaxbo.inner_solver(
    lambda x, y, batch: jax.lax.pmean(jnp.sum((y - batch[0] * x) ** 2), "data"), optax.sgd(0.1), 2
  )
  mesh = jax.make_mesh((4, 2), ("data", "samples"))
  x, specs = jnp.ones(3), {"in_specs": PartitionSpec("data"), "out_specs": PartitionSpec()}

  def step(axis_name, batch):
    solution = solver.solve(x, solver.init(jnp.zeros(3)), batch)
    head = jaxbo.add_es_response(solver, 4, axis_name=axis_name)
    return updater(head)(x, solution, (x, x), batch)[0]

  def trace(axis_name):
    batch = jax.device_put(jnp.ones(4), NamedSharding(mesh, PartitionSpec("data")))
    sharded = jax.shard_map(functools.partial(step, axis_name), mesh=mesh, **specs)
    jax.eval_shape(sharded, batch)

  with pytest.raises(ValueError, match="batch must not vary over axis_name='data'"):
    trace("data")
  trace("samples")


def test_an_axis_that_does_not_divide_the_samples_is_refused():
  solver, arguments = setting()
  mesh = jax.make_mesh((8,), ("samples",))
  head = jaxbo.add_es_response(solver, 12, mesh=mesh, axis_name="samples")
  with pytest.raises(ValueError, match="num_samples must be a multiple of the size 8 of the axis"):
    updater(head)(*arguments)


def test_an_axis_that_the_mesh_has_not_is_refused():
  solver, _ = setting()
  mesh = jax.make_mesh((8,), ("samples",))
  for axis_name in (None, "devices"):
    with pytest.raises(ValueError, match="axis_name must be one of 'samples', got"):
      jaxbo.add_es_response(solver, 16, mesh=mesh, axis_name=axis_name)


def test_what_is_no_mesh_is_refused(as_users_run):
  solver, _ = setting()
  mesh: Any = "samples"
  with pytest.raises(TypeError, match=r"mesh must be a jax\.sharding\.Mesh, got 'samples'"):
    jaxbo.add_es_response(solver, 16, mesh=mesh, axis_name="samples")


def test_an_axis_without_a_mesh_is_refused_outside_of_a_shard_map_that_has_it():
  solver, arguments = setting()
  update = updater(jaxbo.add_es_response(solver, NUM_SAMPLES, axis_name="samples"))
  message = r"axis_name must be an axis of the jax.shard_map .*\(%s\), or of a mesh .*'samples'"
  for outside in (update, jax.jit(update)):
    with pytest.raises(ValueError, match=message % "there is none around"):
      outside(*arguments)
  mesh = jax.make_mesh((2,), ("others",), devices=jax.devices()[:2])
  spec = PartitionSpec()
  with pytest.raises(ValueError, match=message % "those around have 'others'"):
    jax.shard_map(update, mesh=mesh, in_specs=spec, out_specs=spec)(*arguments)
