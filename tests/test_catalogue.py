"""Every public transformation keeps the laws of the library."""

import functools
import inspect

import chex
import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxbo
from tests import catalogue

# Left out by the fast tests: whole methods, made of parts that are entries of their own.
ALIASES = {
  "itd",
  "aid",
  "stocbio",
  "esj",
  "oagd",
  "sogd",
  "leeds",
  "pdbo",
  "proximal_pdbo",
  "bome",
  "v_pbgd",
  "f2sa",
  "ir_dro",
  "group_dro",
  "cvar_dro",
  "chi2_dro",
  "done",
  "term",
}
# Other options of what is an entry already.
VARIANTS = {
  "implicit_fixed_point",
  "implicit_full_solver",
  "es_orthogonal_central",
  "es_per_task_full_solver",
  "primal_dual_full",
  "dynamic_barrier_value",
}


def marks(entry):
  """One group for each entry: its tests run in one process and share the compiled step."""
  group = pytest.mark.xdist_group(entry.name)
  return [group, pytest.mark.slow] if entry.name in ALIASES | VARIANTS else [group]


ALL = pytest.mark.parametrize(
  "entry",
  [pytest.param(entry, id=entry.name, marks=marks(entry)) for entry in catalogue.REGISTRY],
)


def build(entry, dtype=jnp.float32, seed=0):
  inner = jax.tree.map(lambda leaf: leaf.astype(dtype), catalogue.INNER)
  return entry.make(seed, inner), catalogue.params(dtype)


@functools.cache
def compiled(entry):
  """The initial carry of ``entry`` and its step, jitted once for all tests that only call it."""
  harness, x = build(entry)
  return harness.init(x), jax.jit(harness.step)


def types(tree):
  return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, jax.typeof(leaf).weak_type), tree)


def test_every_public_transformation_is_in_the_registry():
  """A public function that returns a transformation must be used by an entry."""
  source = inspect.getsource(catalogue)
  for name in jaxbo.__all__:
    signature = inspect.signature(getattr(jaxbo, name))
    if signature.return_annotation is optax.GradientTransformationExtraArgs:
      assert f"jaxbo.{name}(" in source, f"{name} is missing in tests/catalogue.py"


def test_state_fields_have_names_of_their_own():
  """Law 8: optax.tree.get finds a field by its name, whatever is chained."""
  owners = {}
  for name in jaxbo.__all__:
    for field in getattr(getattr(jaxbo, name), "_fields", ()) if name.endswith("State") else ():
      if field != "info":
        assert field not in owners, f"{field} is in {name} and in {owners[field]}"
        owners[field] = name
  assert owners


@ALL
def test_unknown_extra_arguments_are_ignored(entry):
  harness, x = build(entry)
  carry = jax.eval_shape(harness.init, x)
  plain = jax.make_jaxpr(harness.step)(carry, 0)
  with_extra = functools.partial(harness.step, unknown=jnp.ones(()), detection=None)
  assert str(jax.make_jaxpr(with_extra)(carry, 0)) == str(plain)


@ALL
def test_second_call_neither_retraces_nor_recompiles(entry):
  harness, x = build(entry)
  chex.clear_trace_counter()
  step = jax.jit(chex.assert_max_traces(harness.step, n=1))
  compilations = []
  listen = lambda event, *_, **__: compilations.append(event) if "backend_compile" in event else 0
  carry = step(harness.init(x), jnp.int32(0))
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    for t in (1, 2):
      carry = step(carry, jnp.int32(t))
  finally:
    jax.monitoring.clear_event_listeners()
  # The int32 scalars are made without compilation, so anything compiled is the step again.
  assert not compilations


@ALL
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_types_are_the_same_after_an_update(entry, dtype):
  """Law 7, by shapes alone; and float32 parameters never become float64."""
  with jax.enable_x64(dtype == "float64"):
    harness, x = build(entry, jnp.dtype(dtype))
    carry = jax.eval_shape(harness.init, x)
    after = jax.eval_shape(harness.step, carry, jnp.int32(0))
    assert types(after) == types(carry) == types(harness.init(x))
    assert jax.tree.structure(after) == jax.tree.structure(carry)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(after[0]))


@ALL
def test_float32_stays_float32_with_double_precision_enabled(entry, x64):
  harness, x = build(entry, jnp.float32)
  carry = jax.eval_shape(harness.init, x)
  after = jax.eval_shape(harness.step, carry, jnp.int32(0))
  assert types(after) == types(carry)
  wide = [leaf for leaf in jax.tree.leaves(after) if leaf.dtype == jnp.float64]
  assert not wide


@pytest.mark.slow
@ALL
def test_scan_and_cond_equal_a_loop(entry):
  harness, x = build(entry)

  def body(carry, t):
    return jax.lax.cond(t < 3, harness.step, lambda carry, _: carry, carry, t), None

  scanned, _ = jax.jit(lambda c: jax.lax.scan(body, c, jnp.arange(4)))(harness.init(x))
  carry, step = compiled(entry)
  for t in range(3):
    carry = step(carry, jnp.int32(t))
  chex.assert_trees_all_close(scanned, carry, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@ALL
def test_vmap_over_seeds_equals_a_loop_over_seeds(entry):
  inner, x = catalogue.INNER, catalogue.params()

  def run(seed):
    harness = entry.make(seed, inner)
    carry = harness.init(x)
    for t in range(2):
      carry = harness.step(carry, t)
    return carry[0]

  run_jit = jax.jit(run)
  looped = [run_jit(seed) for seed in jnp.arange(3)]
  looped = jax.tree.map(lambda *leaves: jnp.stack(leaves), *looped)
  chex.assert_trees_all_close(jax.jit(jax.vmap(run))(jnp.arange(3)), looped, rtol=1e-4, atol=1e-4)


@ALL
def test_saved_and_restored_run_goes_on_bit_for_bit(entry, tmp_path):
  carry, step = compiled(entry)
  for t in range(5):
    carry = step(carry, jnp.int32(t))
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "state", carry)
  straight = carry
  with ocp.StandardCheckpointer() as checkpointer:
    restored = checkpointer.restore(tmp_path / "state", jax.tree.map(jnp.zeros_like, carry))
  chex.assert_trees_all_equal(restored, carry)
  for t in range(5, 10):
    straight, restored = step(straight, jnp.int32(t)), step(restored, jnp.int32(t))
  chex.assert_trees_all_equal(restored, straight)


@ALL
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_eight_devices_give_the_result_of_one_and_keep_shardings(entry, axis_type):
  x = catalogue.params()
  carry, step = compiled(entry)
  single = step(step(carry, jnp.int32(0)), jnp.int32(1))
  mesh = jax.make_mesh((8,), ("d",), axis_types=(axis_type,))
  replicated = NamedSharding(mesh, PartitionSpec())
  with jax.set_mesh(mesh):
    x = jax.device_put(x, replicated)
    x["wide"] = jax.device_put(x["wide"], NamedSharding(mesh, PartitionSpec("d")))
    inner = jax.device_put(catalogue.INNER, replicated)
    harness = entry.make(0, inner)
    before = jax.device_put(harness.init(x), jax.tree.map(_on(mesh), harness.init(x)))
    step = jax.jit(harness.step)
    carry = step(step(before, jnp.int32(0)), jnp.int32(1))
    assert carry[0]["wide"].sharding.spec[0] == "d"
    same = lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim)
    assert jax.tree.all(jax.tree.map(same, carry, before))
  chex.assert_trees_all_close(jax.device_get(carry), jax.device_get(single), rtol=1e-4, atol=1e-5)


def _on(mesh):
  def sharding(leaf):
    named = isinstance(leaf.sharding, NamedSharding)
    return leaf.sharding if named else NamedSharding(mesh, PartitionSpec())

  return sharding


@ALL
def test_everything_can_be_donated(entry):
  """No two leaves of parameters and state share a buffer."""
  harness, x = build(entry)
  carry = (jax.tree.map(jnp.copy, x), *harness.init(x)[1:])
  pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((x, carry))]
  assert len(set(pointers)) == len(pointers)
  expected = compiled(entry)[1](carry, jnp.int32(0))
  step = jax.jit(harness.step, donate_argnums=0, keep_unused=True)
  result = step(carry, jnp.int32(0))
  chex.assert_trees_all_close(result, expected, rtol=1e-6, atol=1e-7)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(carry))
  step(result, jnp.int32(1))


@ALL
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers_for_accelerators(entry, platform):
  harness, x = build(entry)
  carry = jax.eval_shape(harness.init, x)
  traced = jax.jit(harness.step).trace(carry, jax.ShapeDtypeStruct((), jnp.int32))
  assert "stablehlo" in traced.lower(lowering_platforms=(platform,)).as_text()


@ALL
def test_numbers_are_finite_and_parameters_move(entry):
  before, step = compiled(entry)
  carry = step(before, jnp.int32(0))
  chex.assert_tree_all_finite(carry)
  moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), carry[0], before[0])
  assert all(jax.tree.leaves(moved))
