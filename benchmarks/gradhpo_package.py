"""A learning rate for every parameter, beside the package gradhpo: its tutorial's problem.

A network of 517 parameters learns five classes from 500 examples, a fifth of whose labels are
random. Each parameter has a learning rate of its own, which the loss of 200 clean examples teaches:
1,200 inner steps on batches of 128. Loss and accuracy are those of 2,000 other clean examples,
means and standard deviations over seeds. All methods see the same batches; the rate of the outer
steps falls to zero in a line, from the tutorial's 3e-3 or from the one of ``RATES`` that is best on
seeds that are not reported. The loop of gradhpo makes this rate, and the number of the step,
constants of its programs, so that each step is compiled anew: "its loop" is how long an episode of
20 inner steps takes so. The other times are of programs that are compiled once. Greedy sees another
number of batches: it takes five steps on each.

  uv run --isolated --group bench --with gradhpo python -m benchmarks.gradhpo_package
"""

import importlib
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbo
from benchmarks.report import arguments, number, show
from jaxbo._types import PyTree

PUBLISHED = 3e-3
RATES = (PUBLISHED, 3e-2, 0.3, 3.0, 30.0)
TUNING_SEEDS = (100, 101, 102)
BATCH, HORIZON, EPISODES = 128, 20, 60
START = 0.05  # The learning rate that all parameters begin with.


class Problem(NamedTuple):
  """What a seed draws."""

  x: PyTree  # learning rates, before softplus
  y: PyTree  # parameters of the network
  train: PyTree  # batches of all steps
  val: PyTree
  test: PyTree


def problem(seed: int, num_steps: int) -> Problem:
  """The tutorial's network and data, and more clean examples to report on."""
  rng = np.random.default_rng(seed)
  centres = 2 * rng.normal(size=(5, 10))

  def examples(number, noise):
    labels = rng.integers(0, 5, number)
    features = centres[labels] + 0.5 * rng.normal(size=(number, 10))
    drawn = np.where(rng.random(number) < noise, rng.integers(0, 5, number), labels)
    return features.astype(np.float32), drawn.astype(np.int32)

  def batches(examples):
    chosen = rng.integers(0, len(examples[0]), (num_steps, BATCH))
    return jax.tree.map(lambda leaf: jnp.asarray(leaf[chosen]), examples)

  normal = lambda rows, columns: jnp.asarray(
    rng.normal(size=(rows, columns)) * np.sqrt(2 / rows), jnp.float32
  )
  y = {"w1": normal(10, 32), "b1": jnp.zeros((1, 32)), "w2": normal(32, 5), "b2": jnp.zeros((1, 5))}
  x = jax.tree.map(lambda leaf: jnp.full_like(leaf, np.log(np.expm1(START))), y)
  train, val, test = examples(500, 0.2), examples(200, 0.0), examples(2000, 0.0)
  return Problem(x, y, batches(train), batches(val), jax.tree.map(jnp.asarray, test))


def taken(batches: PyTree, at: int | slice) -> PyTree:
  """One batch of all, or some."""
  return jax.tree.map(lambda leaf: leaf[at], batches)


def logits(y: PyTree, features: jax.Array) -> jax.Array:
  """The network."""
  return jax.nn.relu(features @ y["w1"] + y["b1"]) @ y["w2"] + y["b2"]


def loss(y: PyTree, batch: PyTree) -> jax.Array:
  """The mean cross-entropy."""
  features, labels = batch
  return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits(y, features), labels))


def descend(y: PyTree, x: PyTree, grads: PyTree) -> PyTree:
  """One step, each parameter at its own rate."""
  return jax.tree.map(lambda y, x, g: y - jax.nn.softplus(x) * g, y, x, grads)


def falling(num_updates: int) -> optax.GradientTransformation:
  """Descent at a rate that falls to zero in a line, from the one that its state holds."""

  def update(updates, state, params=None):
    rate, count = state
    now = -rate * (1 - count / num_updates)
    return optax.tree.scale(now, updates), (rate, count + 1)

  return optax.GradientTransformation(lambda params: (jnp.float32(0), jnp.float32(0)), update)


class Method(NamedTuple):
  """A method: how many inner steps a call of ``step`` takes, and what is in its state."""

  name: str
  num_steps: int
  init: Callable[[Problem, float], Any]
  step: Callable[[Any, PyTree, PyTree], Any]
  params: Callable[[Any], PyTree]


def own(name: str, num_steps: int, respond: Callable[..., Any], num_updates: int) -> Method:
  """A chain of ours."""
  by_leaf = lambda x: optax.stateless(
    lambda updates, _: jax.tree.map(lambda x, g: -jax.nn.softplus(x) * g, x, updates)
  )
  inner = jaxbo.inner_solver(
    lambda x, y, batch: loss(y, batch), by_leaf, num_steps, per_step_batches=num_steps > 1
  )
  outer = optax.chain(respond(inner), falling(num_updates))
  start, step = jaxbo.bilevel_loop(lambda x, y, batch: loss(y, batch), inner, outer)

  def init(given, rate):
    state = start(given.x, given.y)
    of_response, (_, count) = cast(Any, state.outer_state)
    return state._replace(outer_state=(of_response, (jnp.float32(rate), count)))

  jitted = jax.jit(lambda *arguments: step(*arguments)[0])
  return Method(name, num_steps, init, jitted, lambda state: state.solution.params)


def our_methods(num_steps: int) -> list[Method]:
  """The responses of one step, as gradhpo has them, and that of a whole episode."""
  one, episode = jaxbo.add_unrolled_response, jaxbo.add_unrolled_response
  return [
    own("jaxbo: first order (no response)", 1, lambda inner: jaxbo.drop_response(), num_steps),
    own("jaxbo: ITD, 1 step", 1, one, num_steps),
    own("jaxbo: DARTS", 1, jaxbo.add_finite_difference_response, num_steps),
    own(f"jaxbo: ITD, {HORIZON} steps", HORIZON, episode, num_steps // HORIZON),
  ]


def linearized(y: PyTree, x: PyTree, batch: PyTree) -> Any:
  """A training loss whose gradient in ``y`` is the step, for gradhpo's method without update_fn."""
  grads = jax.lax.stop_gradient(jax.grad(loss)(y, batch))
  return optax.tree.vdot(jax.tree.map(lambda x, g: jax.nn.softplus(x) * g, x, grads), y)


def of_val(y: PyTree, x: PyTree, batch: PyTree) -> jax.Array:
  """The outer loss as gradhpo calls it."""
  del x
  return loss(y, batch)


def their_methods(num_steps: int) -> list[Method]:
  """The five methods of gradhpo, at the tutorial's settings."""
  package: Any = importlib.import_module("gradhpo")
  update = lambda y, x, batch: descend(y, x, jax.grad(loss)(y, batch))
  common = {"update_fn": update, "outer_optimizer": falling(num_steps)}
  of_episodes = {"T": HORIZON, **common}

  def method(name, optimizer, train_loss=of_val, num_steps=1, estimates=False):
    def init(given, rate):
      state = optimizer.init(given.y, given.x)
      if estimates:  # Once: the published loop does so again after some episodes.
        batches = [taken(given.train, i) for i in range(HORIZON)]
        val = taken(given.val, 0)
        theta = optimizer.estimate_theta(state, batches, val, of_val, of_val)
        state = state.update(metadata={"theta": jnp.float32(theta)})
      _, count = state.outer_opt_state
      return state.update(outer_opt_state=(jnp.float32(rate), count))

    def step(state, train, val):
      if num_steps == 1 and state.step == HORIZON:  # An episode begins.
        state = state.update(step=0, metadata={"w_star": state.params})
      return optimizer.step(state, train, val, train_loss, of_val)

    return Method(f"gradhpo: {name}", num_steps, init, step, lambda state: state.params)

  greedy = package.GreedyOptimizer(
    optax.sgd(1.0), falling(num_steps // 5), unroll_steps=5, gamma=0.9
  )
  distill = package.OnlineHypergradientOptimizer(gamma=0.99, estimation_period=10, **of_episodes)
  return [
    method("One-Step", package.OneStepOptimizer(**common)),
    method("T1-T2 (DARTS)", package.T1T2Optimizer(gamma=0.9, **of_episodes)),
    method("HyperDistill", distill, estimates=True),
    method("Greedy, 5 steps", greedy, linearized, num_steps=5),
  ]


def play(method: Method, given: Problem, rate: float) -> tuple[Any, float]:
  """The state after all steps, and the milliseconds of an inner step once all is compiled."""
  state = method.init(given, rate)
  total, every = len(given.train[1]), method.num_steps
  begin = 0.0
  for first in range(0, total, every):
    if first == total // 2:
      jax.block_until_ready(method.params(state))
      begin = time.perf_counter()
    # gradhpo's method takes one batch for all steps of a call.
    several = every > 1 and method.name.startswith("jaxbo")
    at = slice(first, first + every) if several else first
    state = method.step(state, taken(given.train, at), taken(given.val, first))
  jax.block_until_ready(method.params(state))
  return state, 1e3 * (time.perf_counter() - begin) / (total - total // 2)


def judge(method: Method, seeds: Iterable[int], rate: float, num_steps: int) -> np.ndarray:
  """Loss, accuracy and milliseconds, ``[seeds, 3]``."""
  rows = []
  for seed in seeds:
    given = problem(seed, num_steps)
    state, milliseconds = play(method, given, rate)
    y, (features, labels) = method.params(state), given.test
    accuracy = jnp.mean(jnp.argmax(logits(y, features), 1) == labels)
    rows.append([float(loss(y, given.test)), float(accuracy), milliseconds])
  return np.array(rows)


def seconds_of_loop(method: Method) -> float:
  """How long an episode takes in the loop that gradhpo has."""
  package: Any = importlib.import_module("gradhpo")
  classes = {"One-Step": package.OneStepOptimizer, "T1-T2 (DARTS)": package.T1T2Optimizer,
             "HyperDistill": package.OnlineHypergradientOptimizer}  # fmt: skip
  name = method.name.removeprefix("gradhpo: ")
  if name not in classes:
    return float("nan")
  given = problem(0, 1)
  train, val = taken(given.train, 0), taken(given.val, 0)
  optimizer = classes[name](update_fn=lambda y, x, batch: descend(y, x, jax.grad(loss)(y, batch)))
  start = time.perf_counter()
  horizon = {"T": HORIZON} if name == "One-Step" else {}
  state = optimizer.run(
    optimizer.init(given.y, given.x), 2, lr_hyper=PUBLISHED,
    get_train_batch=lambda: train, get_val_batch=lambda: val,
    train_loss_fn=of_val, val_loss_fn=of_val, **horizon,
  )  # fmt: skip
  jax.block_until_ready(state.params)
  return (time.perf_counter() - start) / 2


def measure(method: Method, num_seeds: int, num_steps: int) -> dict[str, Any]:
  """A row."""
  print(method.name, flush=True)
  tried = {rate: judge(method, TUNING_SEEDS, rate, num_steps)[:, 0].mean() for rate in RATES}
  chosen = min(RATES, key=lambda rate: np.nan_to_num(tried[rate], nan=np.inf))
  row: dict[str, Any] = {"method": method.name, "chosen rate": chosen, "tried": tried}
  for name, rate in (("published", PUBLISHED), ("chosen", chosen)):
    losses, accuracies, milliseconds = judge(method, range(num_seeds), rate, num_steps).T
    row |= {f"{name} losses": losses.tolist(), f"{name} accuracies": accuracies.tolist()}
    row["ms"] = float(np.median(milliseconds))
  row["its loop, s"] = seconds_of_loop(method)
  return row


def mean_and_deviation(values: list[float], digits: int) -> str:
  """As text."""
  return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def main() -> None:
  """Measures, prints, and saves if asked to."""
  args = arguments(__doc__, seeds=(5, "seeds"), steps=(HORIZON * EPISODES, "inner steps"))
  methods = our_methods(args.steps) + their_methods(args.steps)
  rows = [measure(method, args.seeds, args.steps) for method in methods]
  columns = [
    "method", "loss at 3e-3", "chosen rate", "loss", "accuracy", "ms per inner step",
    "its loop, s per episode",
  ]  # fmt: skip
  lines = [
    [
      row["method"],
      mean_and_deviation(row["published losses"], 4),
      f"{row['chosen rate']:g}",
      mean_and_deviation(row["chosen losses"], 4),
      mean_and_deviation(row["chosen accuracies"], 3),
      number(row["ms"]),
      number(row["its loop, s"]),
    ]
    for row in rows
  ]
  show(args.save, columns, lines, rows)


if __name__ == "__main__":
  main()
