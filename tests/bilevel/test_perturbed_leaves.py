"""ES that perturbs some leaves of ``x``: the others bring no noise and have no response."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbo
from tests.bilevel.es_estimates import (
  assert_within_standard_errors,
  estimates,
  quadratic_setting,
)
from tests.problems import flat

PART = {"a": True, "b": [True, False]}
CHOSEN = np.repeat([True, True, False], [1, 12, 30])


def many(solver, x, solution, grads, num_keys, batch=None, **options):
  """Estimates with many keys, as ``estimates`` gives them; ``perturb`` may be a dict."""

  @jax.jit
  def update(key):
    head = jaxbo.add_es_response(solver, key=key, **options)
    return head.update(grads, head.init(x), x, solution=solution, batch=batch)[0]

  trees = jax.lax.map(update, jnp.arange(num_keys), batch_size=min(num_keys, 500))
  return np.concatenate([leaf.reshape(num_keys, -1) for leaf in jax.tree.leaves(trees)], axis=1)


@pytest.mark.slow
@pytest.mark.parametrize(("directions", "extra"), [("gaussian", 1), ("rademacher", -1)])
def test_error_is_that_of_the_perturbed_leaves_alone(directions, extra, x64):
  """(p' + 1) / Q of the response of those leaves, for p' = 13 of 43 parameters."""
  _, solver, x, _, solution, grads, exact = quadratic_setting()
  samples = many(
    solver, x, solution, grads, 2000, num_samples=4, perturb=PART, directions=directions
  )
  outer = flat(grads[0])
  np.testing.assert_array_equal(samples[:, ~CHOSEN], np.tile(outer[~CHOSEN], (2000, 1)))
  assert_within_standard_errors(samples[:, CHOSEN], exact[CHOSEN], 4.5)
  response = (exact - outer)[CHOSEN]
  errors = np.sum((samples - exact)[:, CHOSEN] ** 2, axis=1) / np.sum(response**2)
  assert_within_standard_errors(errors, (13 + extra) / 4)


@pytest.mark.parametrize(
  "options",
  [{}, {"redraw": False, "sample_batch_size": 5}, {"difference": "exact"}],
  ids=str,
)
def test_as_many_orthogonal_directions_as_perturbed_parameters_are_exact(options, x64):
  _, solver, x, _, solution, grads, exact = quadratic_setting()
  for perturb in (PART, lambda x: jax.tree.map(lambda leaf: leaf.size < 20, x)):
    (found,) = many(
      solver,
      x,
      solution,
      grads,
      1,
      num_samples=13,
      directions="orthogonal",
      perturb=perturb,
      **options,
    )
    expected = np.where(CHOSEN, exact, flat(grads[0]))
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-8)


def test_all_leaves_are_the_default(x64):
  _, solver, x, _, solution, grads, _ = quadratic_setting()
  default = estimates(solver, x, solution, grads, 1, num_samples=3)
  for perturb in (True, {"a": True, "b": True}):
    found = many(solver, x, solution, grads, 1, num_samples=3, perturb=perturb)
    np.testing.assert_allclose(found, default, rtol=1e-12)


def test_other_leaves_stay_where_they_are():
  """The run is not finite if the frozen leaf has another value."""
  loss = lambda x, y, batch: jnp.sum((y - x["a"]) ** 2) * jnp.where(x["frozen"] == 2, 1, jnp.nan)
  solver = jaxbo.inner_solver(loss, optax.sgd(0.5), 1)
  x = {"a": jnp.ones(3), "frozen": jnp.float32(2.0)}
  solution = solver.solve(x, solver.init(jnp.zeros(3)), None)
  grads = jax.tree.map(jnp.zeros_like, x), jnp.ones(3)
  for difference in ("forward", "central"):
    head = jaxbo.add_es_response(
      solver, 8, difference=difference, perturb={"a": True, "frozen": False}
    )
    h, state = head.update(grads, head.init(x), x, solution=solution, batch=None)
    assert state.info.num_finite == 8
    assert h["frozen"] == 0


def through_setting(num_tasks=None):
  """The features of ``w``, and a ridge that the loss sees as it is: a quadratic in each."""
  solver = jaxbo.inner_solver(
    lambda z, y, batch: 0.5 * jnp.sum((y - z["features"] * z["ridge"]) ** 2),
    optax.sgd(1.0),
    1,
    through=lambda x, batch: {"features": batch @ x["w"], "ridge": x["ridge"]},
  )
  x = {"ridge": jnp.array([2.0]), "w": jnp.array([1.0, -1.0])}
  batch = jnp.arange(6.0).reshape(3, 2)
  if num_tasks:
    solver, batch = jaxbo.over_tasks(solver, num_tasks), jnp.stack([batch, 1 - batch**2])
  solution = solver.solve(x, solver.init(jnp.zeros(3)), batch)
  grads = jax.tree.map(jnp.zeros_like, x), jnp.ones_like(solution.params)
  exact, _ = jaxbo.add_unrolled_response(solver).update(
    grads, None, x, solution=solution, batch=batch
  )
  return solver, x, solution, grads, batch, exact


@pytest.mark.parametrize("per_task", [None, False, True], ids=["one", "tasks", "per_task"])
@pytest.mark.parametrize("chosen", ["w", "ridge"])
def test_features_that_the_perturbed_leaves_do_not_reach_stay(chosen, per_task, x64):
  """Exact with one direction for each number of the features that the chosen leaf reaches."""
  num_tasks = None if per_task is None else 2
  solver, x, solution, grads, batch, exact = through_setting(num_tasks)
  num_samples = {"w": 3, "ridge": 1}[chosen]
  if num_tasks and not per_task:
    num_samples *= num_tasks
  head = jaxbo.add_es_response(
    solver,
    num_samples,
    directions="orthogonal",
    perturb={"ridge": chosen == "ridge", "w": chosen == "w"},
    per_task=bool(per_task),
  )
  h, _ = head.update(grads, head.init(x), x, solution=solution, batch=batch)
  for name, response in h.items():
    expected = exact[name] if name == chosen else jnp.zeros_like(response)
    np.testing.assert_allclose(response, expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("per_task", [False, True])
def test_tasks_and_parameters_in_spite_of_features(per_task, x64):
  solver, x, solution, grads, batch, exact = through_setting(2)
  head = jaxbo.add_es_response(
    solver,
    2,
    directions="orthogonal",
    perturb={"ridge": False, "w": True},
    perturb_features=False,
    per_task=per_task,
  )
  h, _ = head.update(grads, head.init(x), x, solution=solution, batch=batch)
  np.testing.assert_allclose(h["w"], exact["w"], rtol=1e-7)
  assert h["ridge"] == 0


def test_masks_that_do_not_fit_are_refused(x64):
  _, solver, x, _, solution, grads, _ = quadratic_setting()

  def update(solver, x, solution, grads, **options):
    head = jaxbo.add_es_response(solver, 2, **options)
    return head.update(grads, head.init(x), x, solution=solution, batch=None)

  wrong = ({"a": True}, [True, False], None, {"a": 1, "b": True}, {"a": True, "b": [True] * 3})
  for perturb in (*wrong, lambda x: jax.tree.map(jnp.any, x)):
    with pytest.raises(ValueError, match="perturb must be Python bools in the structure of x"):
      update(solver, x, solution, grads, perturb=perturb)
  with pytest.raises(ValueError, match="perturb must choose a leaf of x on which"):
    update(solver, x, solution, grads, perturb=False)
  solver = jaxbo.inner_solver(lambda x, y, b: (y - x["a"]) ** 2, optax.sgd(0.5), 1)
  x = {"a": jnp.ones(()), "b": jnp.ones(())}
  with pytest.raises(ValueError, match="perturb must choose a leaf of x on which"):
    update(solver, x, solver.init(x["a"]), (x, x["a"]), perturb={"a": False, "b": True})
  with pytest.raises(ValueError, match=r"num_samples must be at most .* parameters, 1, for orth"):
    update(
      solver,
      x,
      solver.init(x["a"]),
      (x, x["a"]),
      perturb={"a": True, "b": False},
      directions="orthogonal",
    )
