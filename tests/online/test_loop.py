"""The online loop: scan, resumption, memory, replay, metrics, what must not enter, errors."""

import functools
import itertools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxbo
from tests.cases import cases
from tests.online.drifting import inner_loss, outer_loss, p2

pytestmark = pytest.mark.slow


def target_loss(x, y, batch):
  return 0.5 * jnp.sum((y - batch) ** 2)


def follow_loss(x, y, batch):
  del batch
  return 0.5 * jnp.sum((y - x) ** 2)


def noisy(target, key, t):
  noise = jax.random.normal(jax.random.fold_in(key, t), target.shape)
  return jaxbo.online.OnlineBatch(None, target + 0.1 * noise, extra=t)


STREAM = jax.tree_util.Partial(noisy, jnp.float32([2.0, -1.0]))
INNER = jaxbo.inner_solver(follow_loss, optax.sgd(0.5), 1)
ZERO = jnp.zeros(2)
KEY = jax.random.key(0)


@functools.cache
def sobow_loop():
  """A loop with everything in its state that can be: a window, a warm start, metrics."""
  outer = jaxbo.sobow(0.1, INNER, window=4, decay=0.9, inner_params=ZERO)
  metrics = {
    "loss": lambda round: target_loss(round.x, round.y, round.batch.val),
    "round": lambda round: (round.t, round.batch.extra),
    "regret": jaxbo.online.local_regret(lambda x, batch: x - batch.val, window=3, at="current"),
    "path": jaxbo.online.path_length(lambda batch, last: jnp.linalg.norm(batch.val - last.val)),
  }
  loop = jaxbo.online_loop(target_loss, INNER, outer, metrics=metrics, window=2)
  return loop, jax.jit(loop.run, static_argnums=2)


def test_two_runs_are_one_bit_for_bit():
  loop, run = sobow_loop()
  state = loop.init(ZERO, ZERO, STREAM, key=3)
  middle, first = run(state, STREAM, 40)
  # Whatever a checkpoint does: host memory and back.
  restored = jax.tree.map(jnp.asarray, jax.device_get(middle))
  end, second = run(restored, STREAM, 40)
  straight, _ = run(state, STREAM, 80)
  chex.assert_trees_all_equal(end, straight)
  rounds = np.concatenate([info.metrics["round"][0] for info in (first, second)])
  np.testing.assert_array_equal(rounds, np.arange(80))
  np.testing.assert_array_equal(*second.metrics["round"])  # The extra part of the batch.
  assert np.all(np.linalg.norm(end.x - jnp.float32([2.0, -1.0])) < 0.2)
  np.testing.assert_allclose(first.metrics["loss"][0], first.loop.outer_loss[0], atol=0.4)


def test_steps_one_by_one_are_a_run():
  loop, run = sobow_loop()
  start = loop.init(ZERO, ZERO, STREAM, key=3)
  expected, info = run(start, STREAM, 40)
  step = jax.jit(loop.step)
  state, losses = start, []
  for t in range(40):
    state, one = step(state, STREAM(jax.random.key(3), t))
    losses.append(one.metrics["loss"])
  expected = expected._replace(stream_state=start.stream_state)  # Nobody asked the stream.
  chex.assert_trees_all_close(state, expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(losses, info.metrics["loss"], rtol=1e-4, atol=1e-6)


def test_metrics_see_what_was_played_before_the_round():
  loop, run = sobow_loop()
  _, info = run(loop.init(ZERO, ZERO + 1, STREAM, key=3), STREAM, 40)
  values = np.array([STREAM(jax.random.key(3), t).val for t in range(40)])
  expected = 0.5 * np.sum((1 - values[0]) ** 2)
  np.testing.assert_allclose(info.metrics["loss"][0], expected, rtol=1e-5)
  steps = np.linalg.norm(np.diff(values, axis=0), axis=1)
  np.testing.assert_allclose(info.metrics["path"].term, [0, *steps], rtol=1e-4)
  np.testing.assert_allclose(info.metrics["path"].total[-1], steps.sum(), rtol=1e-5)


def test_seeds_side_by_side():
  loop, run = sobow_loop()
  starts = jax.vmap(lambda key: loop.init(ZERO, ZERO, STREAM, key=key))(jnp.arange(3, 5))
  one = loop.init(ZERO, ZERO, STREAM, key=3)
  chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf[0], starts), one)
  ends = [run(jax.tree.map(lambda leaf, i=i: leaf[i], starts), STREAM, 40)[0].x for i in range(2)]
  np.testing.assert_array_equal(ends[0], run(one, STREAM, 40)[0].x)
  assert np.all(ends[0] != ends[1])


def test_the_memory_has_the_last_batches_and_nothing_for_metrics():
  loop, run = sobow_loop()
  state, _ = run(loop.init(ZERO, ZERO, STREAM, key=3), STREAM, 40)
  for age in (0, 1):
    batch, present = state.window.get(age)
    np.testing.assert_allclose(batch.val, STREAM(jax.random.key(3), 39 - age).val, rtol=1e-6)
    assert present
    assert batch.extra is None


def test_a_memory_of_data_that_are_divided_is_divided_from_the_start():
  """A stream's types do not know the devices of their mesh; its arrays do, and the parameters."""
  mesh = jax.make_mesh((8,), ("d",))
  data = jax.device_put(jnp.ones((16, 2)), NamedSharding(mesh, PartitionSpec("d")))
  x = jax.device_put(jnp.float32(0.0), NamedSharding(mesh, PartitionSpec()))
  loss = lambda x, y, batch: jnp.mean((batch * y - x) ** 2)
  inner = jaxbo.inner_solver(loss, optax.sgd(0.1), 1)
  loop = jaxbo.online_loop(loss, inner, jaxbo.oagd(0.1, inner, loss), window=2)
  stream = jaxbo.tasks.minibatch_stream(data, data, 8)
  for given in (stream, lambda key, t: (data, data)):  # Only x knows the second one's.
    state = loop.init(x, x, given)
    assert jax.tree.leaves(state.window.values)[0].sharding.spec == PartitionSpec(None, "d", None)
  jax.jit(loop.run, static_argnums=2).trace(loop.init(x, x, stream), stream, 2)
  whole = jax.device_put(np.ones((16, 2), np.float32), NamedSharding(mesh, PartitionSpec()))
  jax.eval_shape(loop.step, state, (whole, whole))  # Rows that are not divided are divided there.


def official_oagd_in_numpy(problem, num_rounds, window, gamma, wait):
  """The loss-tuning loop of the published code, as section 1.3 of our notes describes it."""
  rate, momentum, decay = 0.1, 0.9, 1e-2
  x, y, x_trace, y_trace, path = *np.zeros((4, 2)), []
  B = problem.B
  for t in range(num_rounds):
    ages = [i for i in range(window - 1, -1, -1) if i <= t]
    for i in ages:
      gradient = problem.A[t - i] @ y - B @ x - problem.b[t - i] + decay * y
      y_trace = momentum * y_trace + gradient
      y = y - rate * y_trace
    hypergradient, total = np.zeros(2), sum(gamma**i for i in ages)
    for i in ages:
      term = total_v = y - problem.c[t - i]
      for _ in range(5):
        term = term - 0.25 * (problem.A[t - i] @ term)
        total_v = total_v + term
      direct = problem.rho * (x - problem.e[t - i])
      hypergradient += gamma**i / total * (direct + B.T @ (0.25 * total_v))
    if t >= wait:
      x_trace = momentum * x_trace + hypergradient + decay * x
      x = x - 0.05 * x_trace
    path.append(x)
  return np.array(path)


def test_oagd_with_the_settings_of_its_published_code(x64):
  """Replay from the oldest batch, Neumann terms, present weights, momentum and decay, a late start.

  The inner curvature changes from round to round, so that the old inner losses matter.
  """
  problem = p2(8)
  problem = problem._replace(A=problem.A * (1 + 0.2 * np.cos(np.arange(8)))[:, None, None])
  steps = lambda rate: optax.chain(optax.add_decayed_weights(1e-2), optax.sgd(rate, momentum=0.9))
  inner = jaxbo.inner_solver(inner_loss, steps(0.1), 1)
  # The published code leaves the decay out of its linear system.
  response = jaxbo.add_implicit_response(inner, jaxbo.neumann(5, 0.25), condition="gradient")
  outer = optax.chain(
    jaxbo.average_over_batches(response, outer_loss, decay=0.9),
    optax.conditionally_mask(steps(0.05), lambda step, **_: step >= 1),
  )
  metrics = {"x": lambda round: round.after.x}
  loop = jaxbo.online_loop(outer_loss, inner, outer, window=3, replay=True, metrics=metrics)
  rows = lambda problem, key, t: (
    (problem.A[t], problem.B, problem.b[t]),
    (problem.c[t], problem.e[t], problem.rho),
  )
  stream = jax.tree_util.Partial(rows, jax.tree.map(jnp.asarray, problem))
  state = loop.init(jnp.zeros(2), jnp.zeros(2), stream)
  _, info = jax.jit(loop.run, static_argnums=2)(state, stream, 8)
  expected = official_oagd_in_numpy(problem, 8, 3, 0.9, wait=1)
  np.testing.assert_allclose(info.metrics["x"], expected, rtol=0, atol=1e-12)
  assert not np.any(expected[0])
  assert np.all(expected[1])  # With an empty slot still.


def direct_loss(x, y, batch):
  return target_loss(x, y, batch) + 0.5 * jnp.sum((x - batch) ** 2)


def states_of(outer, stream, inner=INNER, **options):
  """The states after each of eight rounds."""
  metrics = {"state": lambda round: round.after._replace(solution=round.after.solution.params)}
  loop = jaxbo.online_loop(direct_loss, inner, outer, metrics=metrics, **options)
  run = jax.jit(lambda state: loop.run(state, stream, 8))
  return run(loop.init(ZERO, ZERO, stream))[1].metrics["state"]


@pytest.mark.parametrize("method", ["sobow", "oagd"])
def test_an_outer_batch_that_is_not_finite_does_not_enter(method):
  """SOBOW: an empty slot; OAGD: the batch is left out as long as it is remembered."""
  stream = lambda key, t: (None, jnp.where(t == 3, jnp.nan, jnp.ones(2)))
  if method == "sobow":
    states = states_of(jaxbo.sobow(0.1, INNER, window=2, inner_params=ZERO), stream)
    info = optax.tree.get(states, "WindowAverageInfo")
    np.testing.assert_array_equal(info.finite, np.arange(8) != 3)
    counted = info.num_present
  else:
    states = states_of(jaxbo.oagd(0.1, INNER, direct_loss), stream, window=2)
    counted = optax.tree.get(states, "num_finite")
  np.testing.assert_array_equal(counted, [1, 2, 2, 1, 1, 2, 2, 2])
  chex.assert_tree_all_finite((states.x, states.solution, optax.tree.get(states, "values", 0)))
  assert np.all(np.diff(states.x[:, 0]) > 0)  # It goes on, by the good gradients.


@pytest.mark.parametrize(("normalization", "expected"), [("present", 6.0), ("full", 4.0)])
def test_a_batch_that_is_left_out_has_no_weight_among_those_present(normalization, expected):
  loss = lambda x, y, batch: x * batch
  head = jaxbo.drop_response()
  tx = jaxbo.average_over_batches(head, loss, 0.5, normalization=normalization)
  x = jnp.float32(0.0)
  values = jaxbo.online.OnlineBatch(jnp.zeros(2), jnp.array([6.0, jnp.nan]))
  memory = jaxbo.online.Window(values, jnp.ones(2, bool), jnp.int32(0))
  solution = INNER.init(x)
  grads = (jnp.float32(6.0), x)  # Of the newest; the old one is not finite.
  average, state = tx.update(grads, tx.init(x), x, solution=solution, batch=0.0, window=memory)
  np.testing.assert_allclose(average, expected, rtol=1e-6)
  assert state.info.num_finite == 1
  np.testing.assert_allclose(state.info.average_norm, expected, rtol=1e-6)


def test_a_batch_without_a_finite_response_is_left_out():
  """What is left of its hypergradient, df/dx, would count as the whole of it."""
  inner = jaxbo.inner_solver(saddle_loss, optax.sgd(0.5), 1)
  head = jaxbo.add_implicit_response(inner, jaxbo.conjugate_gradient(1))
  outer_loss = lambda x, y, batch: jnp.sum(x * batch) + jnp.sum(y)
  tx = jaxbo.average_over_batches(head, outer_loss)
  x = jnp.zeros(2)
  curvatures = jnp.array([[1.0, 1.0], [jnp.nan, 1.0]])
  memory = jaxbo.online.Window(
    jaxbo.online.OnlineBatch(curvatures, jnp.full((2, 2), 5.0)), jnp.ones(2, bool), jnp.int32(0)
  )
  grads = (jnp.full(2, 5.0), jnp.ones(2))
  average, state = tx.update(
    grads, tx.init(x), x, solution=inner.init(x), batch=jnp.ones(2), window=memory
  )
  np.testing.assert_allclose(average, 6.0, rtol=1e-6)  # 5 directly, 1 by the response
  assert state.info.num_finite == 1


def test_without_a_finite_response_the_direct_gradient_enters_the_window():
  """An inner batch that is not finite: the head leaves the response out, and says so."""
  inner = jaxbo.inner_solver(saddle_loss, optax.sgd(0.5), 1)
  stream = lambda key, t: (jnp.where(t == 3, jnp.inf, jnp.ones(2)), jnp.ones(2))
  states = states_of(jaxbo.sobow(0.1, inner, window=1, inner_params=ZERO), stream, inner)
  finite = optax.tree.get(states, "ImplicitInfo").finite
  np.testing.assert_array_equal(finite, np.arange(8) != 3)
  chex.assert_tree_all_finite(states)
  np.testing.assert_allclose(optax.tree.get(states, "values")[3, 0], states.x[2] - 1, rtol=1e-6)


def saddle_loss(x, y, batch):
  """Curvatures 1 and -0.1: no minimum, but a stationary point."""
  return 0.5 * jnp.sum(batch * (y - x) ** 2)


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_negative_curvature_is_reported_or_damped_and_never_enters_the_window(damping):
  curvature = jnp.float32([1.0, -0.1])
  stream = lambda key, t: (curvature, jnp.ones(2))
  inner = jaxbo.inner_solver(saddle_loss, optax.sgd(0.1), 1)
  cg = jaxbo.conjugate_gradient(5, damping=damping, warm_start=True)
  outer = jaxbo.sobow(0.1, inner, window=3, linear_solver=cg, inner_params=ZERO)
  metrics = {"info": lambda round: optax.tree.get(round.after.outer_state, "ImplicitInfo")}
  loop = jaxbo.online_loop(target_loss, inner, outer, metrics=metrics)
  run = jax.jit(lambda state: loop.run(state, stream, 30))
  state, info = run(loop.init(ZERO, ZERO, stream))
  chex.assert_tree_all_finite((state.x, state.loop.outer_state))
  info = info.metrics["info"]
  assert np.all(info.finite)
  if damping:
    assert not np.any(info.linear_breakdown)
    assert np.max(info.linear_residual) < 1e-4
  else:
    assert np.all(info.linear_breakdown)


def test_a_tolerance_that_falls_with_time():
  """The schedule of CG's tolerance that the docstring of sobow shows."""
  inner = jaxbo.inner_solver(inner_loss, optax.sgd(0.1), 1)
  matrix, zero = jnp.diag(jnp.linspace(0.1, 2, 10)), jnp.zeros(10)
  stream = lambda key, t: ((matrix, jnp.eye(10), jnp.cos(t + jnp.arange(10.0))), (zero, zero, 0.1))

  def response(tolerance):
    cg = jaxbo.conjugate_gradient(50, tolerance)
    return jaxbo.add_implicit_response(inner, cg)

  head = optax.inject_hyperparams(response)(lambda t: 0.5 * (t + 1.0) ** -3)
  outer = optax.chain(head, jaxbo.window_average(3), optax.scale(-0.1))
  steps = {"steps": lambda round: optax.tree.get(round.after.outer_state, "linear_steps")}
  loop = jaxbo.online_loop(outer_loss, inner, outer, metrics=steps)
  run = jax.jit(lambda state: loop.run(state, stream, 30))
  _, info = run(loop.init(zero, zero, stream))
  assert info.metrics["steps"][0] <= 4
  assert info.metrics["steps"][-1] >= 8


def test_sobow_stores_gradients_as_it_is_told():
  tx = jaxbo.sobow(0.1, INNER, window=2, inner_params=ZERO, storage_dtype=jnp.bfloat16)
  window = optax.tree.get(jax.eval_shape(tx.init, ZERO), "gradient_window")
  assert window.values.dtype == jnp.bfloat16


def test_more_inner_steps_and_auxiliary_outputs():
  inner = jaxbo.inner_solver(
    lambda x, y, batch: (follow_loss(x, y, batch), y), optax.sgd(0.5), 3, has_aux=True
  )
  outer = jaxbo.sobow(0.1, inner, window=2, inner_params=ZERO)
  loss = lambda x, y, batch: (target_loss(x, y, batch), {"x": x})
  loop = jaxbo.online_loop(loss, inner, outer, has_aux=True)
  state, info = jax.jit(loop.step)(loop.init(ZERO + 1, ZERO, STREAM), STREAM(KEY, 0))
  np.testing.assert_allclose(state.y, 1 - 0.5**3)
  assert state.loop.solution.info.aux.shape == (3, 2)
  np.testing.assert_array_equal(info.loop.aux["x"], [1, 1])
  assert info.loop.inner_losses.shape == (3,)


def test_ogd_drops_the_response_and_stands_still_without_a_direct_term():
  run = lambda loss: jaxbo.online_loop(
    loss, INNER, jaxbo.ogd(0.1, project=lambda x: jnp.clip(x, 0, 1))
  )
  loop = run(target_loss)
  state, _ = loop.step(loop.init(ZERO + 0.5, ZERO, STREAM), STREAM(KEY, 0))
  np.testing.assert_array_equal(state.x, [0.5, 0.5])
  np.testing.assert_allclose(state.y, 0.25)
  loop = run(lambda x, y, batch: 9 * jnp.sum(x))
  state, _ = loop.step(loop.init(ZERO + 0.5, ZERO, STREAM), STREAM(KEY, 0))
  np.testing.assert_array_equal(state.x, [0, 0])


def test_the_constrained_regret_is_the_gradient_mapping(x64):
  """At a face of the box, the part of the gradient that leads out of it does not count."""
  box = lambda x: jnp.clip(x, 0.0, 1.0)
  kinds = list(itertools.product(("own", "current"), ("full", "present")))
  options = {"window": 2, "project": box, "learning_rate": 0.5}
  metrics = {
    f"{at}, {normalization}": jaxbo.online.local_regret(
      lambda x, batch: x - batch.val, at=at, normalization=normalization, **options
    )
    for at, normalization in kinds
  }
  outer = jaxbo.sobow(0.4, INNER, window=1, linear_solver=jaxbo.conjugate_gradient(1), project=box)
  loop = jaxbo.online_loop(
    target_loss, INNER, outer, metrics=metrics | {"x": lambda round: round.x}
  )
  target = jnp.array([3.0, 0.5])
  stream = lambda key, t: (None, target + 0.0 * t)
  zero = jnp.zeros(2)
  run = jax.jit(lambda state: loop.run(state, stream, 12))
  _, info = run(loop.init(zero, zero, stream))
  x = np.asarray(info.metrics["x"])
  for at, normalization in kinds:
    terms = []
    for t in range(12):
      now, last = x[t] - target, (x[t - 1] if at == "own" else x[t]) - target
      first = now if normalization == "present" else 0.5 * now
      average = 0.5 * (now + last) if t else first
      mapping = (x[t] - np.clip(x[t] - 0.5 * average, 0, 1)) / 0.5
      terms.append(mapping @ mapping)
    found = info.metrics[f"{at}, {normalization}"].term
    np.testing.assert_allclose(found, terms, rtol=1e-12, atol=1e-15)
  assert x[-1, 0] == 1


def test_extra_arguments_of_a_step_reach_the_transformation():
  scale = lambda updates, state, params=None, *, factor, **_: (factor * updates, state)
  tx = optax.GradientTransformationExtraArgs(lambda params: (), scale)
  loop = jaxbo.online_loop(direct_loss, INNER, optax.chain(jaxbo.ogd(0.1), tx))
  start = loop.init(ZERO + 1, ZERO, STREAM)
  state, _ = jax.jit(loop.step)(start, (None, ZERO + 3), factor=0.5)
  np.testing.assert_allclose(state.x, 1 - 0.5 * 0.1 * (1 - 3))


BAD = {
  "hyper_at": ({"hyper_at": "middle"}, ValueError, "hyper_at must be one of 'after', 'before'"),
  "window": ({"window": 0}, ValueError, "window must be at least 1, got 0"),
  "replay": ({"replay": True}, ValueError, "window must be set with replay=True"),
}


@cases("name", BAD)
def test_bad_options(name):
  options, error, message = BAD[name]
  with pytest.raises(error, match=message):
    jaxbo.online_loop(target_loss, INNER, jaxbo.ogd(0.1), **options)


def test_a_metric_must_be_a_function_of_the_round():
  with pytest.raises(TypeError, match=re.escape("metrics['m'] must be a function")):
    jaxbo.online_loop(target_loss, INNER, jaxbo.ogd(0.1), metrics={"m": lambda: 0})


def test_a_stream_must_give_a_pair():
  loop = jaxbo.online_loop(target_loss, INNER, jaxbo.ogd(0.1))
  with pytest.raises(ValueError, match=re.escape("a stream must return the pair (train, val)")):
    loop.init(ZERO, ZERO, lambda key, t: ZERO)
  with pytest.raises(TypeError, match=re.escape("stream must be a function stream(key, t), got")):
    loop.init(ZERO, ZERO, lambda t: (ZERO, ZERO))
  with pytest.raises(ValueError, match="init must be given either a stream or a batch"):
    loop.init(ZERO, ZERO)
  state = loop.init(ZERO, ZERO, batch=(None, jax.ShapeDtypeStruct((2,), jnp.float32)))
  chex.assert_trees_all_equal(
    loop.step(state, (None, ZERO + 3))[0].loop,
    loop.step(loop.init(ZERO, ZERO, STREAM), (None, ZERO + 3))[0].loop,
  )
  with pytest.raises(ValueError, match="run needs a state from init"):
    loop.run(state, STREAM, 1)
  state = loop.init(ZERO, ZERO, STREAM)
  with pytest.raises(ValueError, match="num_rounds must be at least 1, got 0"):
    loop.run(state, STREAM, 0)
  with pytest.raises(ValueError, match="key must have the default generator threefry2x32, got rbg"):
    loop.init(ZERO, ZERO, STREAM, key=jax.random.key(0, impl="rbg"))


def test_both_levels_step_at_once_with_the_hypergradient_before_the_inner_step():
  loop = jaxbo.online_loop(direct_loss, INNER, jaxbo.ogd(0.1), hyper_at="before")
  state, info = jax.jit(loop.step)(loop.init(ZERO + 1, ZERO, STREAM), (None, ZERO + 3))
  np.testing.assert_allclose(state.x, 1 - 0.1 * (1 - 3))
  np.testing.assert_allclose(state.y, 0.5)
  np.testing.assert_allclose(info.loop.outer_loss, 9 + 4)
  np.testing.assert_allclose(info.loop.inner_losses, [1.0])


@cases("head", [jaxbo.add_unrolled_response, jaxbo.add_es_response])
def test_responses_of_the_run_cannot_be_taken_before_it(head):
  loop = jaxbo.online_loop(target_loss, INNER, optax.chain(head(INNER)), hyper_at="before")
  state = loop.init(ZERO, ZERO, STREAM)
  with pytest.raises(ValueError, match="hyper_at must be 'after' for a response that"):
    loop.step(state, (None, ZERO))


def test_a_response_is_not_jitted_apart_from_the_loop(as_users_run):
  """The gradients of both levels do not enter another jit, as per-example gradients do not."""
  head = jaxbo.add_implicit_response(INNER, jaxbo.conjugate_gradient(1))
  jitted = optax.GradientTransformationExtraArgs(head.init, jax.jit(head.update))
  loop = jaxbo.online_loop(target_loss, INNER, optax.chain(jitted, optax.scale(-0.1)))
  with pytest.raises(ValueError, match="and call update in the function that makes them"):
    loop.step(loop.init(ZERO, ZERO, STREAM), STREAM(KEY, 0))


def test_oagd_needs_a_memory():
  loop = jaxbo.online_loop(target_loss, INNER, jaxbo.oagd(0.1, INNER, target_loss))
  with pytest.raises(TypeError, match="update must be given window=, the Window of the last"):
    loop.step(loop.init(ZERO, ZERO, STREAM), STREAM(KEY, 0))


def test_rounds_that_are_not_finite_are_left_out_of_totals_and_counted():
  bad = jnp.float32([1, 2, jnp.nan, 3, jnp.inf, 5, 1, 2])  # Of 8 rounds.
  metrics = {
    "regret": jaxbo.online.local_regret(lambda x, batch: 0 * x + batch.extra),
    "window": jaxbo.online.local_regret(lambda x, batch: 0 * x + batch.extra, window=2),
    "path": jaxbo.online.path_length(lambda batch, last: batch.val[0] - last.val[0]),
  }
  loop = jaxbo.online_loop(
    lambda x, y, batch: 0.0 * jnp.sum(y), INNER, jaxbo.ogd(0.1), metrics=metrics
  )
  stream = lambda key, t: jaxbo.online.OnlineBatch(None, bad[t][None], bad[t])
  _, info = jax.jit(lambda state: loop.run(state, stream, 8))(loop.init(ZERO, ZERO, stream))
  regret, window, path = (info.metrics[name] for name in ("regret", "window", "path"))
  np.testing.assert_array_equal(jnp.isfinite(regret.term), jnp.isfinite(bad))
  squares = np.where(np.isfinite(bad), 2 * np.square(bad), 0)
  np.testing.assert_allclose(regret.total, squares.cumsum(), rtol=1e-6)
  np.testing.assert_array_equal(regret.left_out, [0, 0, 1, 1, 2, 2, 2, 2])
  np.testing.assert_array_equal(window.left_out, [0, 0, 1, 2, 3, 4, 4, 4])
  np.testing.assert_allclose(window.total[-1], 2 * (0.5**2 + 1.5**2 + 3**2 + 1.5**2), rtol=1e-6)
  np.testing.assert_array_equal(path.left_out, [0, 0, 1, 2, 3, 4, 4, 4])
  np.testing.assert_array_equal(path.total, [0, 1, 1, 1, 1, 1, -3, -2])


def test_bad_arguments_of_the_aliases_and_metrics():
  with pytest.raises(ValueError, match="inner_params must be given when linear_solver has warm_st"):
    jaxbo.sobow(0.1, INNER, window=2)
  with pytest.raises(ValueError, match="window must be at least 1, got 0"):
    jaxbo.sobow(0.1, INNER, window=0, inner_params=ZERO)
  with pytest.raises(ValueError, match=re.escape("decay must be in (0, 1], got 0.0")):
    jaxbo.oagd(0.1, INNER, target_loss, decay=0.0)
  gradient = lambda x, batch: x
  with pytest.raises(ValueError, match="window must be at least 1, got 0"):
    jaxbo.online.local_regret(gradient, window=0)
  with pytest.raises(ValueError, match="at must be one of 'own', 'current', got 'here'"):
    jaxbo.online.local_regret(gradient, at="here")
  with pytest.raises(ValueError, match="project and learning_rate must be given together"):
    jaxbo.online.local_regret(gradient, learning_rate=0.1)
  with pytest.raises(ValueError, match="learning_rate must be positive and finite, got 0"):
    jaxbo.online.local_regret(gradient, project=lambda x: x, learning_rate=0.0)
  with pytest.raises(ValueError, match="power must be positive and finite, got 0"):
    jaxbo.online.path_length(lambda batch, last: batch, power=0)
  loop = jaxbo.online_loop(
    target_loss,
    INNER,
    jaxbo.ogd(0.1),
    metrics={"r": jaxbo.online.local_regret(lambda x, batch: jnp.zeros(3))},
  )
  with pytest.raises(ValueError, match="what hypergradient returns must have the structure and"):
    loop.init(ZERO, ZERO, STREAM)
