"""A meta-batch of tasks: the same as each task alone, and what separate directions change."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbo
from tests.bilevel.es_estimates import assert_within_standard_errors, estimates
from tests.problems import flat

pytestmark = pytest.mark.slow  # All together, not each.

NUM_TASKS, P, D = 3, 5, 4
RNG = np.random.default_rng(0)
FEATURES = jnp.asarray(RNG.normal(size=(D, P)), jnp.float32)


def task_loss(x, y, batch):
  """One gradient step of 1 ends at ``batch * FEATURES @ x``."""
  return 0.5 * jnp.sum((y - batch * (FEATURES.astype(x.dtype) @ x)) ** 2)


def single(per_step=False, **kwargs):
  num_steps, rate = (2, 0.5) if per_step else (1, 1.0)
  return jaxbo.inner_solver(
    task_loss, optax.sgd(rate), num_steps, per_step_batches=per_step, **kwargs
  )


def meta_batch(scales, solver=None, dtype=jnp.float64):
  """Solved tasks whose responses are ``scales[t] * FEATURES' b_t`` with equal ``b_t``."""
  solver = jaxbo.over_tasks(solver or single(), len(scales))
  x, batch = jnp.linspace(-1.0, 1.0, P, dtype=dtype), jnp.asarray(scales, dtype)
  solution = jax.jit(solver.solve)(x, solver.init(jnp.zeros(D, dtype)), batch)
  grads = jnp.zeros(P, dtype), jnp.tile(jnp.arange(1.0, D + 1, dtype=dtype), (len(scales), 1))
  return solver, x, solution, grads, batch


@pytest.mark.slow
@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("through", [False, True])
def test_a_meta_batch_is_each_task_alone(per_step, through, x64):
  """Solutions, and the responses of every kind: the sum over tasks."""
  if through:
    one = jaxbo.inner_solver(
      lambda z, y, batch: 0.5 * jnp.sum((y - batch * z) ** 2),
      optax.sgd(0.5, momentum=0.5),
      2,
      per_step_batches=per_step,
      through=lambda x, batch: jnp.tanh(FEATURES.astype(x.dtype) @ x),
    )
  else:
    one = single(per_step)
  solver = jaxbo.over_tasks(one, NUM_TASKS)
  x = jnp.linspace(-1.0, 1.0, P)
  batch = jnp.asarray(RNG.normal(size=(2, NUM_TASKS) if per_step else NUM_TASKS))
  b = jnp.asarray(RNG.normal(size=(NUM_TASKS, D)))
  solution = jax.jit(solver.solve)(x, solver.init(jnp.zeros(D)), batch)
  of_task = lambda t: batch[:, t] if per_step else batch[t]
  solve_one = jax.jit(one.solve)
  alone = [solve_one(x, one.init(jnp.zeros(D)), of_task(t)) for t in range(NUM_TASKS)]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
  chex.assert_trees_all_close(solution, stacked, rtol=1e-9)

  num_features = D * (2 if per_step else 1)  # Those of each step.
  for make in (
    jaxbo.add_unrolled_response,
    lambda s: jaxbo.add_implicit_response(s, jaxbo.conjugate_gradient(20)),
    lambda s: jaxbo.add_es_response(
      s,
      num_features if through else P,
      difference="exact",
      directions="orthogonal",
      per_task=s is solver,
    ),
  ):

    def updater(head):
      return jax.jit(
        lambda b, y, batch: head.update(
          (jnp.zeros(P), b), head.init(x), x, solution=y, batch=batch
        )[0]
      )

    result = updater(make(solver))(b, solution, batch)
    update = updater(make(one))
    expected = sum(update(b[t], alone[t], of_task(t)) for t in range(NUM_TASKS))
    np.testing.assert_allclose(result, expected, rtol=1e-8)


@pytest.mark.parametrize(
  ("scales", "better"), [([1.0, 1.0, 1.0], True), ([1.0, -0.5, -0.5], False)]
)
@pytest.mark.parametrize("per_task", [False, True])
def test_error_of_shared_and_separate_directions(scales, better, per_task, x64):
  """(p + 1) / Q times |sum v_t|^2 if shared, and times sum |v_t|^2 if separate."""
  solver, x, solution, grads, batch = meta_batch(scales)
  samples = estimates(
    solver, x, solution, grads, 3000, num_samples=2, per_task=per_task, batch=batch
  )
  v = np.asarray(FEATURES, np.float64).T @ np.arange(1.0, D + 1)
  exact, squares = np.sum(scales) * v, np.sum(np.square(scales)) * (v @ v)
  law = (P + 1) / 2 * (squares if per_task else exact @ exact)
  errors = np.sum((samples - exact) ** 2, axis=1)
  assert (squares < exact @ exact) == better
  if law:
    assert_within_standard_errors(errors, law)
  else:  # The responses cancel in each sample.
    np.testing.assert_allclose(errors, 0, atol=1e-12)
  assert_within_standard_errors(samples, exact, 4.5)


@pytest.mark.parametrize("per_task", [False, True])
def test_separate_directions_in_feature_space_lose_the_noise_of_other_tasks(per_task, x64):
  """For x = z: (T d + 1) / Q if all features are perturbed together, else (d + 1) / Q."""
  one = jaxbo.inner_solver(
    lambda z, y, batch: 0.5 * jnp.sum((y - z) ** 2),
    optax.sgd(1.0),
    1,
    through=lambda x, batch: x[batch],
  )
  solver = jaxbo.over_tasks(one, 2)
  x, batch = jnp.zeros((2, D)), jnp.arange(2)  # Task t sees row t alone.
  solution = jax.jit(solver.solve)(x, solver.init(jnp.zeros(D)), batch)
  b = jnp.asarray(RNG.normal(size=(2, D)))
  samples = estimates(
    solver, x, solution, (jnp.zeros((2, D)), b), 3000, num_samples=3, per_task=per_task, batch=batch
  )
  errors = np.sum((samples - flat(b)) ** 2, axis=1) / float(jnp.sum(b**2))
  assert_within_standard_errors(errors, ((D if per_task else 2 * D) + 1) / 3)
  assert_within_standard_errors(samples, flat(b), 4.5)


def test_separate_directions_differ_between_tasks():
  solver, x, solution, grads, batch = meta_batch([1.0, -1.0], dtype=jnp.float32)
  head = jaxbo.add_es_response(solver, 2, per_task=True)
  update = jax.jit(lambda state: head.update(grads, state, x, solution=solution, batch=batch))
  result, state = update(head.init(x))
  assert np.linalg.norm(result) > 0.1  # With the same directions the tasks would cancel.
  assert state.info.num_finite == 4


def momentum_run(y, targets, x, rate, momentum):
  """NumPy: the losses of SGD with momentum on ``|y - x * target|^2 / 2``, its end and velocity."""
  losses, velocity = [], np.zeros_like(y)
  for target in targets:
    losses.append(0.5 * np.sum((y - x * target) ** 2))
    velocity = momentum * velocity + y - x * target
    y = y - rate * velocity
  return losses, y, velocity


@pytest.mark.parametrize("warm_start", [False, "params", "all"])
def test_average_start_equals_a_loop_over_tasks(warm_start, x64):
  """Three solves with momentum, a batch for each step and auxiliary outputs."""

  def loss(x, y, batch):
    value = 0.5 * jnp.sum((y - x * batch) ** 2)
    return value, {"loss": value, "batch": batch}

  one = jaxbo.inner_solver(
    loss,
    optax.sgd(0.3, momentum=0.9),
    4,
    per_step_batches=True,
    has_aux=True,
    warm_start=warm_start,
  )
  solver = jaxbo.over_tasks(one, NUM_TASKS, average_start=True)
  solve = jax.jit(solver.solve)
  x, start = jnp.asarray(0.7), RNG.normal(size=D)
  batches = RNG.normal(size=(3, 4, NUM_TASKS, D))
  solution = initial = solver.init(jnp.asarray(start), x, batches[0])
  for batch in batches:
    solution = solve(x, solution, batch)
    chex.assert_trees_all_equal_shapes_and_dtypes(solution, initial)
    runs = [momentum_run(start, batch[:, t], 0.7, 0.3, 0.9) for t in range(NUM_TASKS)]
    losses, ends, velocities = (np.stack(part) for part in zip(*runs, strict=True))
    np.testing.assert_allclose(solution.start[0], np.tile(start, (NUM_TASKS, 1)), rtol=1e-12)
    np.testing.assert_array_equal(optax.tree.get(solution.start[1], "trace"), 0)
    np.testing.assert_allclose(solution.params, ends, rtol=1e-9)
    np.testing.assert_allclose(optax.tree.get(solution.opt_state, "trace"), velocities, rtol=1e-9)
    np.testing.assert_allclose(solution.info.losses, losses, rtol=1e-9)
    np.testing.assert_allclose(solution.info.aux["loss"], losses, rtol=1e-9)
    np.testing.assert_array_equal(solution.info.aux["batch"], batch.swapaxes(0, 1))
    start = ends.mean(axis=0)


def test_aux_outputs_have_a_task_axis():
  loss = lambda x, y, batch: (jnp.sum((y - batch["a"] * x) ** 2), batch["a"])
  one = jaxbo.inner_solver(loss, optax.sgd(0.5), 4, has_aux=True, per_step_batches=True)
  solver = jaxbo.over_tasks(one, 3)
  x, batch = jnp.float32(1.0), {"a": jnp.arange(12.0).reshape(4, 3)}
  before = solver.init(jnp.zeros(2), x, batch)
  after = solver.solve(x, before, batch)
  chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
  np.testing.assert_array_equal(after.info.aux, batch["a"].T)
  chex.assert_trees_all_equal(solver.init(jnp.zeros(2), x, jax.eval_shape(lambda: batch)), before)
  with pytest.raises(ValueError, match=r"must have the shape .*num_tasks=3, ...\], got \(4,\)"):
    solver.init(jnp.zeros(2), x, jnp.ones(4))


def test_bad_meta_batches_are_refused():
  with pytest.raises(ValueError, match="num_tasks must be at least 1, got 0"):
    jaxbo.over_tasks(single(), 0)
  solver = jaxbo.over_tasks(single(), 3)
  with pytest.raises(ValueError, match="inner must be a solver of one task, got one with 3 tasks"):
    jaxbo.over_tasks(solver, 2)
  x, y = jnp.ones(P), solver.init(jnp.zeros(D))
  with pytest.raises(
    ValueError, match=r"batch must have the shape \[num_tasks=3, ...\], got \(2,\)"
  ):
    solver.solve(x, y, jnp.ones(2))
  per_step = jaxbo.over_tasks(single(per_step=True), 3)
  with pytest.raises(ValueError, match=r"\[num_steps=2, num_tasks=3, ...\], got \(3, 2\)"):
    per_step.solve(x, per_step.init(jnp.zeros(D)), jnp.ones((3, 2)))
