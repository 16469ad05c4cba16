"""Every public transformation keeps the laws of the library.

The transformations are in the tables ``tests/<family>/catalogue.py``. A transformation is compiled
once for all tests, and what shapes alone can show is only traced.
"""

import contextlib
import functools
import inspect
import re

import chex
import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxbo
from tests import catalogue
from tests.bilevel import catalogue as bilevel
from tests.dro import catalogue as dro
from tests.online import catalogue as online

FAMILIES = (bilevel, online, dro)


def marks(entry):
  """One group for each entry: its tests run in one process and share the compiled step."""
  group = pytest.mark.xdist_group(entry.name)
  return [group, pytest.mark.slow] if entry.slow else [group]


CASES = [
  pytest.param(entry, id=entry.name, marks=marks(entry))
  for family in FAMILIES
  for entry in family.ENTRIES
]
ALL = pytest.mark.parametrize("entry", CASES)


def build(entry, dtype=jnp.float32, seed=0):
  inner = jax.tree.map(lambda leaf: leaf.astype(dtype), catalogue.INNER)
  return entry.make(seed, inner), catalogue.params(dtype)


@functools.cache
def compiled(entry):
  """The initial carry of ``entry``, its step and ``run(carry, first, end)``.

  The step is traced once for all tests, and compiled once, in the run, which takes over the
  buffers of the carry that it is given, even of what it does not use.
  """
  harness, x = build(entry)
  chex.clear_trace_counter()
  step = jax.jit(chex.assert_max_traces(harness.step, n=1))
  run = functools.partial(scan_of_cond, step)
  return harness.init(x), step, jax.jit(run, donate_argnums=0, keep_unused=True)


def scan_of_cond(step, carry, first, end):
  """The carry after the rounds from ``first`` to before ``end``, five at most."""
  body = lambda carry, t: (jax.lax.cond(t < end, step, lambda c, _: c, carry, t), None)
  return jax.lax.scan(body, carry, first + jnp.arange(5))[0]


@pytest.fixture(autouse=True, scope="module")
def forget_steps():
  """JAX forgets compiled programs when tests of another file follow; a step is new after that."""
  yield
  compiled.cache_clear()


def play(entry, rounds, carry=None):
  """The carry after ``rounds``, from a copy of ``carry`` or from the beginning."""
  start, _, run = compiled(entry)
  carry = jax.tree.map(jnp.copy, start if carry is None else carry)
  return run(carry, jnp.int32(rounds.start), jnp.int32(rounds.stop))


def types(tree):
  return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, jax.typeof(leaf).weak_type), tree)


def test_every_public_transformation_is_in_the_registry():
  """A public function that returns a transformation must be used by an entry or an alias."""
  source = "".join(map(inspect.getsource, FAMILIES))
  returns = lambda member: inspect.signature(member).return_annotation
  wanted = optax.GradientTransformationExtraArgs
  public = [name for name, member in catalogue.PUBLIC.items() if returns(member) is wanted]
  assert len(public) > 30
  missing = [name for name in public if not re.search(rf"{re.escape(name)}\b", source)]
  assert not missing, f"{missing} are missing in tests/<family>/catalogue.py"


def test_state_fields_have_names_of_their_own():
  """Law 8: optax.tree.get finds a field by its name, whatever is chained."""
  owners = {}
  for name, member in catalogue.PUBLIC.items():
    # Streams and learners are not chained.
    chained = name.endswith("State") and not re.search(r"\.tasks\.|OnlineMetaState", name)
    for field in member._fields if chained else ():
      if field != "info":
        assert field not in owners, f"{field} is in {name} and in {owners[field]}"
        owners[field] = name
  assert owners


@pytest.mark.parametrize(
  ("method", "chain"),
  [
    pytest.param(method, chain, id=name)
    for family in FAMILIES
    for name, method, chain in family.ALIASES
  ],
)
def test_an_alias_is_its_chain(method, chain):
  """The same program from the same state: every update is the same, to the last bit."""
  (by_method, x), (by_chain, _) = build(method), build(chain)
  start = by_method.init(x)
  chex.assert_trees_all_equal(start, by_chain.init(x))
  chex.assert_trees_all_equal_dtypes(start, by_chain.init(x))
  programs = [jax.jit(h.step).lower(start, jnp.int32(0)).as_text() for h in (by_method, by_chain)]
  assert programs[0] == programs[1]


@ALL
def test_unknown_extra_arguments_are_ignored(entry):
  harness, _ = build(entry)
  carry, step, _ = compiled(entry)
  with_extra = functools.partial(harness.step, unknown=jnp.ones(()), detection=None)
  plain = step.trace(carry, jnp.int32(0)).jaxpr
  assert str(jax.make_jaxpr(with_extra)(carry, jnp.int32(0))) == str(plain)


@ALL
def test_second_call_neither_retraces_nor_recompiles(entry):
  """And parameters move, by numbers that are finite."""
  start, _, run = compiled(entry)
  carry = play(entry, range(1))
  chex.assert_tree_all_finite(carry)
  moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), carry[0], start[0])
  assert all(jax.tree.leaves(moved))
  compilations = []
  # The event comes for programs from the persistent cache too.
  listen = lambda event, *_, **__: compilations.append(event) if "backend_compile" in event else 0
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    for t in (1, 2):
      carry = run(carry, jnp.int32(t), jnp.int32(t + 1))
  finally:
    jax.monitoring.clear_event_listeners()
  # The int32 scalars are made without compilation, so anything compiled is the run again.
  assert not compilations


@ALL
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_types_are_the_same_after_an_update(entry, dtype):
  """Law 7, by shapes alone; and float32 parameters never become float64."""
  with jax.enable_x64(dtype == "float64"):
    harness, x = build(entry, jnp.dtype(dtype))
    carry = jax.eval_shape(harness.init, x)
    step = compiled(entry)[1] if dtype == "float32" else harness.step
    after = jax.eval_shape(step, carry, jnp.int32(0))
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
@pytest.mark.parametrize("entry", [case for case in CASES if case.values[0].random])
def test_vmap_over_seeds_of_scan_and_cond_equals_loops(entry):
  """A seed enters through the state alone, so the loops of all seeds are runs of one program.

  Without a seed there is nothing to map, and every other test runs the scan and the cond.
  """
  x = catalogue.params()

  def run(seed):
    harness = entry.make(seed, catalogue.INNER)
    return scan_of_cond(harness.step, harness.init(x), 0, 3)

  looped = [play(entry, range(3), build(entry, seed=seed)[0].init(x)) for seed in range(3)]
  looped = jax.tree.map(lambda *leaves: jnp.stack(leaves), *looped)
  chex.assert_trees_all_close(jax.jit(jax.vmap(run))(jnp.arange(3)), looped, rtol=1e-4, atol=1e-4)


@ALL
def test_saved_and_restored_run_goes_on_bit_for_bit(entry, tmp_path):
  import orbax.checkpoint as ocp  # Here, since every worker imports every file.

  saved = play(entry, range(5))
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "state", saved)
  with ocp.StandardCheckpointer() as checkpointer:
    restored = checkpointer.restore(tmp_path / "state", jax.tree.map(np.zeros_like, saved))
  chex.assert_trees_all_equal(restored, saved)
  chex.assert_trees_all_equal_dtypes(restored, saved)
  later = range(5, 10)  # The restored arrays are NumPy's: a device's would be another program.
  chex.assert_trees_all_equal(play(entry, later, restored), play(entry, later, saved))


@ALL
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_eight_devices_give_the_result_of_one_and_keep_shardings(entry, axis_type):
  """Inside ``set_mesh`` and without.

  What a mesh refuses it refuses when a program is traced, so each entry is traced both ways. It is
  compiled in one way on explicit axes and in the other on automatic ones.
  """
  mesh = jax.make_mesh((8,), ("d",), axis_types=(axis_type,))
  replicated = NamedSharding(mesh, PartitionSpec())
  inner, x = jax.device_put((catalogue.INNER, catalogue.params()), replicated)
  x["wide"] = jax.device_put(x["wide"], NamedSharding(mesh, PartitionSpec("d")))
  runs_inside = (sum(entry.name.encode()) + (axis_type == AxisType.Auto)) % 2
  for inside in (True, False):
    with jax.set_mesh(mesh) if inside else contextlib.nullcontext():
      harness = entry.make(0, inner)
      before = harness.init(x)
      before = jax.device_put(before, jax.tree.map(_on(mesh), before))
      step = jax.jit(harness.step)
      if inside != runs_inside:
        step.trace(before, jnp.int32(0))
        continue
      carry = step(step(before, jnp.int32(0)), jnp.int32(1))
    assert carry[0]["wide"].sharding.spec[0] == "d"
    same = lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim)
    assert jax.tree.all(jax.tree.map(same, carry, before))
    single = play(entry, range(2))
    chex.assert_trees_all_close(jax.device_get(carry), jax.device_get(single), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
  "program", [pytest.param(one, id=one.name) for family in FAMILIES for one in family.PROGRAMS]
)
def test_programs_on_eight_devices_give_the_result_of_one(program):
  catalogue.assert_same_on_meshes(*program.make())


def loop_of(outer_loss, inner_loss, x, batch):
  inner = jaxbo.inner_solver(inner_loss, optax.sgd(0.1), 1)
  init, step = jaxbo.bilevel_loop(outer_loss, inner, jaxbo.itd(0.1, inner))
  return step(init(x, catalogue.INNER), batch, batch)[0].x


def moves_both(make):
  def move(outer_loss, inner_loss, x, batch):
    tx, params = make(outer_loss, inner_loss), jaxbo.Bilevel(x, catalogue.INNER)
    given = {"batch": batch, "outer_batch": batch}
    return tx.update(params, tx.init(params), params, **given)[0]

  return move


def bgd_of(outer_loss, inner_loss, x, batch):
  tx = jaxbo.meta.bayesian_gradient_descent(1.0, 0.1, num_samples=1)
  loss = lambda x: outer_loss(x, catalogue.INNER, batch)
  return tx.update(x, tx.init(x), x, value_fn=loss)[0]


def sogd_of(outer_loss, inner_loss):
  rates = {"linear_learning_rate": 0.1, "correction": 0.5}
  return jaxbo.add_corrected_response(inner_loss, outer_loss, **rates)


def saba_of(outer_loss, inner_loss):
  del outer_loss
  return online.indexed(jaxbo.add_averaged_response(inner_loss, **online.AVERAGED))


LOSSES = {
  "bilevel_loop": loop_of,
  "pdbo": moves_both(lambda outer, inner: jaxbo.add_primal_dual_penalty(inner, **bilevel.DUAL)),
  "sogd": moves_both(sogd_of),
  "sogd_inner": moves_both(lambda outer, inner: sogd_of(inner, inner)),
  "saba": moves_both(saba_of),
  "bgd": bgd_of,
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_varies_over_devices_that_share_parameters_is_refused(name):
  """``shard_map`` would add up its derivatives, and each device would have its own value."""
  mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
  data, x, spec = jnp.arange(8.0), catalogue.params(), PartitionSpec

  def run(average, batch):
    mean = lambda loss: lambda x, y, batch: average(loss(x, y, batch[0]), "d")
    return LOSSES[name](mean(catalogue.outer_loss), mean(catalogue.inner_loss), x, batch)

  def trace(average):
    one = functools.partial(run, average)
    jax.eval_shape(jax.shard_map(one, mesh=mesh, in_specs=spec("d"), out_specs=spec()), data)

  message = "must not vary over the axis 'd' of shard_map, since params.* does not: return the mean"
  with pytest.raises(ValueError, match=message):
    trace(lambda value, axis: value)
  trace(jax.lax.pmean)


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
  run = compiled(entry)[2]
  result = run(carry, jnp.int32(0), jnp.int32(1))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(carry))
  run(result, jnp.int32(1), jnp.int32(2))


@ALL
def test_lowers_for_accelerators(entry):
  carry, step, _ = compiled(entry)
  lowered = step.trace(carry, jnp.int32(0)).lower(lowering_platforms=("tpu", "cuda"))
  assert "stablehlo" in lowered.as_text()
