"""Implicit responses where the inner optimizer does more than descend, or the user has conditions.

The oracle is central differences, in float64, of the outer loss at the end of a long inner run.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbo

RNG = np.random.default_rng(0)
A, B = RNG.normal(size=(12, 5)), RNG.normal(size=12)
RATE = 0.25


def proximal_step(prox):
  """``prox(y + u) - y``, as a user would write it: no state of its own."""

  def update(updates, state, params=None):
    moved = jax.tree.map(jnp.add, params, updates)
    return jax.tree.map(jnp.subtract, prox(moved), params), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def shrink(y, threshold):
  return jnp.sign(y) * jnp.maximum(jnp.abs(y) - threshold, 0)


def shrink_groups(y, threshold):
  groups = jnp.reshape(y, (-1, 2))
  norms = jnp.linalg.norm(groups, axis=1, keepdims=True)
  return jnp.ravel(groups * jnp.maximum(1 - threshold / jnp.maximum(norms, 1e-30), 0))


def to_hyperplane(y):
  return y - (jnp.sum(y) - 1) / y.shape[0]


def to_simplex(y):
  sorted_y = jnp.sort(y)[::-1]
  thresholds = (jnp.cumsum(sorted_y) - 1) / jnp.arange(1, y.size + 1)
  return jnp.maximum(y - thresholds[jnp.sum(sorted_y > thresholds) - 1], 0)


def projected(projection, rate=RATE, **options):
  return optax.chain(optax.sgd(rate, **options), jaxbo.bilevel.project_params(projection))


class Problem(NamedTuple):
  """An inner problem with its optimizer, and where it is differentiated."""

  inner_loss: Any
  optimizer: Any
  x: Any
  y0: Any
  num_steps: int = 600


def fit(x, y, batch):
  """Least squares with a ridge for each coefficient, and moved targets."""
  return jnp.sum((A @ y - B - x[0]) ** 2) / 12 + 0.1 * jnp.sum(jnp.exp(x) * y**2)


BOUND = 2.0
KERNEL = (lambda points: np.exp(-((points[:, None] - points) ** 2)))(np.linspace(0, 1, 8))
SIGNS = np.array([1, 1, -1, 1, -1, -1, 1, -1.0])


def svm_dual(x, y, batch):
  """The dual of an SVM without a bias; ``x`` is the width of the kernel. Most bounds are active."""
  kernel = KERNEL ** jnp.exp(x[0]) * np.outer(SIGNS, SIGNS)
  return 0.5 * y @ kernel @ y + 0.02 * jnp.sum(y**2) - jnp.sum(y)


def two_parts(x, y, batch):
  return fit(x, y["head"] + 0.3 * y["base"], batch) + jnp.sum((y["head"] - y["base"]) ** 2)


X = np.array([0.3, -0.5, 0.1, 0.7, -0.2])
ZEROS = np.zeros(5)
freeze = optax.partition(
  {"free": optax.sgd(RATE), "frozen": optax.set_to_zero()}, {"head": "free", "base": "frozen"}
)
PARTS = {"head": ZEROS, "base": np.full(5, 0.4)}
box = functools.partial(optax.projections.projection_box, lower=-0.1, upper=0.3)
PROBLEMS = {
  "box": Problem(fit, projected(box), X, ZEROS),
  "box, momentum": Problem(fit, projected(box, rate=0.1, momentum=0.5), X, ZEROS),
  "non-negative": Problem(
    fit, optax.chain(optax.sgd(RATE), optax.keep_params_nonnegative()), X - 2, ZEROS
  ),
  "simplex": Problem(fit, projected(to_simplex), X, ZEROS + 0.2),
  "hyperplane": Problem(fit, projected(to_hyperplane), X, ZEROS + 0.2),
  "lasso": Problem(
    fit,
    optax.chain(optax.sgd(RATE), proximal_step(lambda y: shrink(y, 0.3 * RATE))),
    X,
    ZEROS,
  ),
  "group lasso": Problem(
    lambda x, y, batch: fit(x, y[:5] + 0.1 * y[5], batch) + 0.1 * jnp.sum(y**2),
    optax.chain(optax.sgd(RATE), proximal_step(lambda y: shrink_groups(y, 0.3 * RATE))),
    X,
    np.full(6, 0.1),
  ),
  "svm": Problem(
    svm_dual,
    projected(lambda y: jnp.clip(y, 0, BOUND), rate=0.1),
    X[:1],
    np.zeros(8),
    3000,
  ),
  "frozen leaf": Problem(two_parts, freeze, X, PARTS),
  "masked leaf": Problem(
    two_parts,
    optax.chain(
      optax.adam(optax.cosine_decay_schedule(0.05, 3000)),
      optax.masked(optax.set_to_zero(), {"head": False, "base": True}),
    ),
    X,
    PARTS,
    3000,
  ),
  "weight decay": Problem(
    fit, optax.chain(optax.add_decayed_weights(0.3), optax.sgd(RATE)), X, ZEROS
  ),
  "weight decay that is tuned": Problem(
    fit,
    lambda x: optax.chain(optax.add_decayed_weights(jnp.exp(x[1])), optax.sgd(RATE)),
    X,
    ZEROS,
  ),
}
PROBLEMS["weight decay that is x"] = Problem(
  fit, lambda x: optax.chain(optax.add_decayed_weights(x[3]), optax.sgd(RATE)), X, ZEROS
)
SHRINK = lambda rate: proximal_step(lambda y: shrink(y, 0.3 * rate))
CYCLE = optax.warmup_cosine_decay_schedule(0.0, RATE, 20, 300)
SLOW_ADAM = optax.adam(optax.cosine_decay_schedule(0.05, 3000))
PARTS_ONE = {"head": "one", "base": "other"}
SHRINK_LEAVES = lambda rate: proximal_step(
  lambda y: jax.tree.map(lambda leaf: shrink(leaf, 0.3 * rate), y)
)
PROBLEMS |= {
  # What a projection ends need not be plain descent.
  "box, Adam": Problem(
    fit, optax.chain(SLOW_ADAM, jaxbo.bilevel.project_params(box)), X, ZEROS, 3000
  ),
  "non-negative, Adam": Problem(
    fit, optax.chain(SLOW_ADAM, optax.keep_params_nonnegative()), X - 2, ZEROS, 3000
  ),
  # Leaf by leaf: Adam for one, a lasso or a box for the other.
  "Adam and a lasso": Problem(
    two_parts,
    optax.partition(
      {"one": SLOW_ADAM, "other": optax.chain(optax.sgd(0.1), SHRINK_LEAVES(0.1))}, PARTS_ONE
    ),
    X,
    PARTS,
    3000,
  ),
  "Adam and a box with Adam": Problem(
    two_parts,
    optax.chain(
      SLOW_ADAM,
      optax.masked(
        jaxbo.bilevel.project_params(lambda y: jax.tree.map(lambda v: jnp.clip(v, -0.1, 0.3), y)),
        {"head": False, "base": True},
      ),
    ),
    X,
    PARTS,
    3000,
  ),
  # Wrappers keep counters and switches of their own.
  "lasso, wrapped": Problem(
    fit,
    optax.apply_if_finite(
      optax.chain(optax.inject_hyperparams(optax.sgd)(RATE), SHRINK(RATE)), max_consecutive_errors=3
    ),
    X,
    ZEROS,
  ),
  # The first step has less momentum than those that follow.
  "lasso, momentum": Problem(
    fit, optax.chain(optax.sgd(0.1, momentum=0.6), SHRINK(0.25)), X, ZEROS, 1500
  ),
  "decoupled decay, momentum that is tuned": Problem(
    fit,
    lambda x: optax.chain(
      optax.trace(jax.nn.sigmoid(x[1])), optax.add_decayed_weights(0.3), optax.scale(-0.1)
    ),
    X,
    ZEROS,
    1500,
  ),
  # What is in front of Adam must not be lost; a second projection goes on from the first.
  "box, Adam and decay": Problem(
    fit,
    optax.chain(optax.add_decayed_weights(0.3), SLOW_ADAM, jaxbo.bilevel.project_params(box)),
    X,
    ZEROS,
    3000,
  ),
  "two halves of a box, Adam": Problem(
    fit,
    optax.chain(
      SLOW_ADAM,
      jaxbo.bilevel.project_params(lambda y: jnp.maximum(y, -0.1)),
      jaxbo.bilevel.project_params(lambda y: jnp.minimum(y, 0.3)),
    ),
    X,
    ZEROS,
    3000,
  ),
  # Projections without a name, and a clip that small gradients meet.
  "own hyperplane": Problem(
    fit, optax.chain(optax.sgd(RATE), proximal_step(to_hyperplane)), X, ZEROS + 0.2
  ),
  "own upper bound": Problem(
    fit, optax.chain(optax.sgd(RATE), proximal_step(lambda y: jnp.minimum(y, 0.1))), X, ZEROS
  ),
  "decay and a clip": Problem(
    fit,
    optax.chain(optax.add_decayed_weights(0.3), optax.clip_by_global_norm(1e-3), optax.sgd(RATE)),
    X,
    ZEROS,
    9000,
  ),
  # The first step is zero, and so is the last one.
  "box, warm-up": Problem(
    fit,
    projected(box, rate=optax.warmup_cosine_decay_schedule(0.0, RATE, 20, 600)),
    X,
    ZEROS,
  ),
  "box, two cycles": Problem(
    fit,
    projected(box, rate=optax.join_schedules([CYCLE] * 2, [300])),
    X,
    ZEROS,
  ),
}
CG = jaxbo.conjugate_gradient(12)


def outer_loss(x, y, batch):
  flat = jax.flatten_util.ravel_pytree(y)[0]
  return jnp.sum(jnp.cos(jnp.arange(flat.size)) * flat) + 0.5 * jnp.sum(flat**2) + 0.1 * jnp.sum(x)


def solved(problem, x, **options):
  inner = jaxbo.inner_solver(problem.inner_loss, problem.optimizer, problem.num_steps, **options)
  y0 = jax.tree.map(jnp.asarray, problem.y0)
  return inner, inner.solve(x, inner.init(y0, x, None), None)


def by_response(problem, make_response, x):
  inner, solution = solved(problem, x)
  response = make_response(inner)
  grads = jax.grad(outer_loss, (0, 1))(x, solution.params, None)
  h, state = response.update(grads, response.init(x), x, solution=solution, batch=None)
  return h, state.info


@functools.cache
def differences(name):
  problem = PROBLEMS[name]
  at = jax.jit(lambda x: outer_loss(x, solved(problem, x)[1].params, None))
  steps = 1e-5 * np.eye(len(problem.x))
  with jax.enable_x64(True):
    x = jnp.asarray(problem.x)
    return np.array([(at(x + step) - at(x - step)) / 2e-5 for step in steps])


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_default_condition_is_right(name, x64):
  """And so are the responses that differentiate the run, which need no condition."""
  problem = PROBLEMS[name]
  x = jnp.asarray(problem.x)
  h, info = jax.jit(
    lambda x: by_response(problem, lambda i: jaxbo.add_implicit_response(i, CG), x)
  )(x)
  expected = differences(name)
  assert np.max(np.abs(expected - 0.1)) > 0.01  # There is a response.
  np.testing.assert_allclose(h, expected, rtol=1e-5, atol=1e-7)
  assert info.linear_residual < 1e-6
  assert not info.linear_breakdown
  assert info.stationarity < 1e-5


@pytest.mark.parametrize("name", ["box", "simplex", "lasso", "svm", "frozen leaf"])
def test_responses_that_run_the_problem_again_agree(name, x64):
  problem = PROBLEMS[name]
  es = {"directions": "orthogonal", "difference": "central"}
  heads = [
    jaxbo.add_unrolled_response,
    lambda inner: jaxbo.add_es_response(inner, len(problem.x), 1e-5, **es),
  ]
  both = jax.jit(lambda x: [by_response(problem, head, x)[0] for head in heads])
  for h in both(jnp.asarray(problem.x)):
    np.testing.assert_allclose(h, differences(name), rtol=1e-4, atol=1e-6)


def test_a_wrong_condition_is_seen_in_the_stationarity(x64):
  """The gradient is not zero at the solution of a lasso, however long the run."""
  problem = PROBLEMS["lasso"]
  head = lambda inner: jaxbo.add_implicit_response(inner, CG, condition="gradient")
  h, info = jax.jit(lambda x: by_response(problem, head, x))(jnp.asarray(problem.x))
  assert np.max(np.abs(h - differences("lasso"))) > 0.1
  assert info.linear_residual < 1e-6
  assert info.stationarity > 0.1


def test_a_projection_behind_adam_need_not_reach_the_minimum(x64):
  """On a simplex it stops where steps of equal length leave it, and the stationarity says so."""
  adam = optax.chain(SLOW_ADAM, jaxbo.bilevel.project_params(to_simplex))
  problem = Problem(fit, adam, X, ZEROS + 0.2, 300)
  head = lambda inner: jaxbo.add_implicit_response(inner, CG)
  _, info = jax.jit(lambda x: by_response(problem, head, x))(jnp.asarray(X))
  assert info.stationarity > 0.5


def test_a_rate_and_a_bound_may_be_traced(x64):
  """The optimizer cannot be tried then; its state and its trace still tell."""

  def response(rate, bound):
    problem = Problem(fit, projected(lambda y: jnp.clip(y, -bound, bound), rate), X, ZEROS, 300)
    head = lambda inner: jaxbo.add_implicit_response(inner, CG)
    return by_response(problem, head, jnp.asarray(X))[0]

  found = jax.jit(jax.vmap(response))(jnp.array([RATE, 0.2]), jnp.array([0.1, 0.3]))
  expected = [response(RATE, 0.1), response(0.2, 0.3)]
  assert np.max(np.abs(expected[0] - expected[1])) > 0.01
  np.testing.assert_allclose(found, expected, rtol=1e-8)


def test_an_optimizer_that_does_not_move_is_not_taken_for_one_that_holds_all(x64):
  """A part of a step of MultiSteps changes nothing, which says nothing of the solution."""
  tx = optax.MultiSteps(projected(box), 2).gradient_transformation()
  problem = Problem(fit, tx, X, ZEROS, 300)
  _, info = by_response(
    problem, lambda inner: jaxbo.add_implicit_response(inner, CG), jnp.asarray(X)
  )
  assert info.linear_breakdown
  assert info.linear_residual > 0.9


def test_a_mask_within_a_leaf_holds_its_entries(x64):
  """By the fixed point; the gradient of the entry that is held is not zero."""
  held = optax.stateless(lambda updates, params: updates * (np.arange(5) != 1))
  problem = Problem(fit, optax.chain(optax.sgd(RATE), held), X, ZEROS + 0.5, 300)
  free = Problem(
    lambda x, y, batch: fit(x, y.at[1].set(0.5), batch), optax.sgd(RATE), X, ZEROS + 0.5, 300
  )
  by = lambda problem, make: jax.jit(lambda x: by_response(problem, make, x))(jnp.asarray(X))
  h, info = by(problem, lambda i: jaxbo.add_implicit_response(i, CG, condition="fixed_point"))
  expected, _ = by(free, jaxbo.add_unrolled_response)
  np.testing.assert_allclose(h, expected, rtol=1e-6)
  assert info.stationarity < 1e-6
  _, info = by(problem, lambda i: jaxbo.add_implicit_response(i, CG))
  assert info.stationarity > 0.1


def test_aid_takes_a_condition(x64):
  problem, x = PROBLEMS["lasso"], jnp.asarray(X)
  by = lambda condition: lambda inner: jaxbo.aid(optax.identity(), inner, CG, condition=condition)
  for condition, right in ((None, True), ("gradient", False)):
    inner, solution = solved(problem, x)
    tx = by(condition)(inner)
    grads = jax.grad(outer_loss, (0, 1))(x, solution.params, None)
    h, _ = tx.update(grads, tx.init(x), x, solution=solution, batch=None)
    assert np.allclose(h, differences("lasso"), rtol=1e-4, atol=1e-6) == right


def test_the_conditions_of_plain_descent_are_the_same(x64):
  """A step of the optimizer only scales the gradient, also with Adam and a projection inside it."""
  x = jnp.asarray(X)
  ridge = lambda optimizer: Problem(fit, optimizer, X, ZEROS, 3000)
  by = lambda condition: lambda inner: jaxbo.add_implicit_response(inner, CG, condition=condition)
  adam = optax.adam(optax.cosine_decay_schedule(0.05, 3000), eps_root=1e-20)
  far = jaxbo.bilevel.project_params(lambda y: jnp.clip(y, -100, 100))
  both = jax.jit(
    lambda x: [
      by_response(ridge(optimizer), by(condition), x)[0]
      for optimizer, condition in [
        (optax.sgd(RATE), "gradient"),
        (optax.sgd(RATE), "fixed_point"),
        (optax.sgd(RATE, momentum=0.5, nesterov=True), "fixed_point"),
        (optax.chain(adam, far), None),
      ]
    ]
  )
  expected, *others = both(x)
  for h in others:
    np.testing.assert_allclose(h, expected, rtol=1e-6)


def test_conditions_of_the_user_for_a_solution_from_elsewhere(x64):
  """The KKT system of a quadratic program with an equality, whose solution NumPy gives."""
  H, a, B = np.diag([2.0, 1.0, 3.0]), np.ones(3), RNG.normal(size=(3, 2))
  lagrangian = lambda x, y, batch: 0.5 * y[:3] @ H @ y[:3] - y[:3] @ B @ x + y[3] * (a @ y[:3] - 1)
  kkt = jax.grad(lagrangian, argnums=1)
  inner = jaxbo.inner_solver(lagrangian, optax.sgd(0.1), 1)
  system = np.block([[H, a[:, None]], [a[None], np.zeros((1, 1))]])
  jacobian = np.linalg.solve(system, np.concatenate([B, np.zeros((1, 2))]))
  x = np.array([0.3, -0.7])
  y = np.linalg.solve(system, np.append(B @ x, 1.0))
  t = RNG.normal(size=4)
  tx = jaxbo.add_implicit_response(inner, jaxbo.gmres(4), condition=kkt)
  solution = inner.init(jnp.asarray(y))
  grads = (jnp.zeros(2), jnp.asarray(t))
  h, state = tx.update(grads, tx.init(x), jnp.asarray(x), solution=solution, batch=None)
  np.testing.assert_allclose(h, jacobian.T @ t, rtol=1e-10)
  assert state.info.linear_residual < 1e-10


def test_several_tasks_and_batches_of_steps(x64):
  """Boxes of three tasks; a batch for each step, of which the last one counts."""
  loss = lambda x, y, batch: jnp.sum((y - batch * x) ** 2)
  optimizer = projected(lambda y: jnp.clip(y, 0.0, 1.0))
  targets = np.array([[0.5, 3.0], [-1.0, 0.2], [0.1, 0.3]])
  inner = jaxbo.over_tasks(jaxbo.inner_solver(loss, optimizer, 100, per_step_batches=True), 3)
  batch = jnp.broadcast_to(targets, (100, 3, 2))
  x = jnp.ones(2)
  solution = inner.solve(x, inner.init(jnp.zeros(2), x, batch), batch)
  tx = jaxbo.add_implicit_response(
    inner, jaxbo.gmres(6, warm_start=True), inner_params=jnp.zeros((3, 2))
  )
  h, state = tx.update(
    (jnp.zeros(2), jnp.ones((3, 2))), tx.init(x), x, solution=solution, batch=batch
  )
  inside = (targets > 0) & (targets < 1)
  np.testing.assert_allclose(h, np.sum(targets * inside, axis=0), rtol=1e-8)
  # The curvature is 2; an entry at a bound has an equation of its own, y = bound.
  np.testing.assert_allclose(state.linear_solution, np.where(inside, 0.5, 1.0), rtol=1e-8)


BAD = {
  "value": ("kkt", ValueError, "condition must be one of 'gradient', 'fixed_point', got 'kkt'"),
  "arguments": (
    lambda x, y: y,
    TypeError,
    r"condition must be a function condition\(x, y, batch\)",
  ),
  "shape": (lambda x, y, batch: x[0] * y[:2], ValueError, "what condition returns must have the"),
  "no x": (lambda x, y, batch: y, ValueError, "inner_loss must use its argument x"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_conditions(name):
  condition, error, message = BAD[name]
  problem = Problem(fit, optax.sgd(RATE), X, ZEROS, 2)
  head = lambda inner: jaxbo.add_implicit_response(inner, CG, condition=condition)
  with pytest.raises(error, match=message):
    by_response(problem, head, jnp.asarray(X))


TRACKS = lambda x, y, batch: 0.5 * jnp.sum((y - x) ** 2)


@pytest.mark.parametrize(
  "make",
  [
    lambda rate: optax.chain(
      optax.sgd(rate), jaxbo.bilevel.project_params(lambda y: jnp.clip(y, -9, 9))
    ),
    lambda rate: optax.chain(optax.add_decayed_weights(1e-9), optax.sgd(rate, momentum=0.5)),
  ],
  ids=["box", "decay"],
)
@pytest.mark.parametrize("rate", [0.01, 0.3])
def test_dampings_and_rates_of_linear_solvers_are_those_for_the_hessian(make, rate, x64):
  """Whatever the inner optimizer's rate is: 1 / (1 + damping), and the series of 1 - 0.5."""
  problem = Problem(TRACKS, make(rate), np.ones(1), np.zeros(1), 3000)
  for solver, expected in (
    (jaxbo.conjugate_gradient(3, damping=0.25), 0.8),
    (jaxbo.neumann(2, 0.5), 1 - 0.5**3),
    (jaxbo.fixed_point(2, 0.5), 1 - 0.5**2),
  ):
    inner, solution = solved(problem, jnp.ones(1))
    tx = jaxbo.add_implicit_response(inner, solver)
    grads = (jnp.zeros(1), jnp.ones(1))
    h, _ = tx.update(grads, tx.init(grads[0]), jnp.ones(1), solution=solution, batch=None)
    np.testing.assert_allclose(h, expected, rtol=1e-6)


def test_a_trust_ratio_reads_parameters_and_is_plain_descent(x64):
  optimizer = optax.chain(
    optax.scale_by_trust_ratio(), optax.sgd(optax.exponential_decay(0.2, 1, 0.99))
  )
  problem = Problem(fit, optimizer, X, np.ones(5), 2000)
  expected = Problem(fit, optax.sgd(RATE), X, ZEROS)
  head = lambda inner: jaxbo.add_implicit_response(inner, CG)
  found, exact = (by_response(p, head, jnp.asarray(X))[0] for p in (problem, expected))
  np.testing.assert_allclose(found, exact, rtol=1e-3)


def test_stationarity_does_not_depend_on_where_the_run_began(x64):
  """Solves one after the other are at the solution from the beginning; a short run is not."""
  inner, solution = solved(PROBLEMS["box"], jnp.asarray(X))
  tx = jaxbo.add_implicit_response(inner, CG)
  for _ in range(2):
    grads = (jnp.zeros(5), jnp.ones(5))
    _, state = tx.update(grads, tx.init(X), jnp.asarray(X), solution=solution, batch=None)
    assert state.info.stationarity < 1e-10
    solution = inner.solve(jnp.asarray(X), solution, None)
  short = by_response(PROBLEMS["box"]._replace(num_steps=2), lambda _: tx_of_two(), jnp.asarray(X))
  assert short[1].stationarity > 1e-3


def tx_of_two():
  inner = jaxbo.inner_solver(fit, PROBLEMS["box"].optimizer, 2)
  return jaxbo.add_implicit_response(inner, CG)


@pytest.mark.parametrize("read_by", ["outer", "inner"])
def test_what_is_kept_across_steps_responds_too(read_by, x64):
  """A running average of parameters, which the outer or the inner loss reads."""

  def inner_loss(x, y, batch):
    value = fit(x, y["p"], None)
    if read_by == "inner":
      value += 0.3 * jnp.sum((y["p"] - 0.5 * y["s"]) ** 2)
    return value, y["p"]

  optimizer = optax.partition({"p": optax.sgd(0.2), "s": optax.set_to_zero()}, {"p": "p", "s": "s"})
  keep = lambda y, old: {"p": y["p"], "s": 0.9 * y["s"] + 0.1 * old}
  inner = jaxbo.inner_solver(inner_loss, optimizer, 1500, has_aux=True, keep=keep)
  read = lambda y: y["s"] if read_by == "outer" else y["p"]
  F = lambda y: jnp.sum(jnp.cos(jnp.arange(5.0)) * read(y)) + 0.5 * jnp.sum(read(y) ** 2)
  y0 = {"p": jnp.zeros(5), "s": jnp.zeros(5)}
  solve = jax.jit(lambda x: inner.solve(x, inner.init(y0, x, None), None))
  x = jnp.asarray(X)
  tx = jaxbo.add_implicit_response(inner, jaxbo.conjugate_gradient(12))
  solution = solve(x)
  grads = (jnp.zeros(5), jax.grad(F)(solution.params))
  h, state = jax.jit(lambda s: tx.update(grads, tx.init(x), x, solution=s, batch=None))(solution)
  ends = [[F(solve(x + sign * step).params) for sign in (1, -1)] for step in 1e-5 * np.eye(5)]
  expected = np.array([a - b for a, b in ends]) / 2e-5
  assert np.max(np.abs(expected)) > 0.01
  np.testing.assert_allclose(h, expected, rtol=1e-4, atol=1e-7)
  assert state.info.stationarity < 1e-6


def test_an_outer_gradient_that_is_not_finite_is_told():
  inner, solution = solved(PROBLEMS["box"]._replace(num_steps=2), jnp.ones(5))
  tx = jaxbo.add_implicit_response(inner, CG)
  grads = (jnp.ones(5), jnp.full(5, jnp.nan))
  h, state = tx.update(grads, tx.init(h := jnp.ones(5)), h, solution=solution, batch=None)
  np.testing.assert_array_equal(h, 1)
  assert not state.info.finite
