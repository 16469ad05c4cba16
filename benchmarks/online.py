"""Online bilevel optimization: the cost and speed of rounds, and the size of the state.

  PYTHONPATH=.:models python3 -m benchmarks.online                   (about 4 minutes on 2 cores)
  ... --save benchmarks/results/online_cpu                           (writes .md and .json as well)

The problem is a drifting quadratic with distinct matrices: the inner loss has a Hessian A and a
coupling B, the outer loss a matrix C. A gradient of the inner loss takes two products with A and
one with B; a product with the Hessian takes two with A; a gradient of the outer loss takes two with
C; a cross product takes one with B. So the products in the jaxpr of a round (with loops, without
dead code), minus those of a round without a response, show what the response computes. (If the
inner loss is not quadratic, its linearization at the new point costs another gradient.)

* *rounds/s*: the median over runs of many rounds, with all methods in turns in one process. A run
  is one compiled scan; "Python loop" calls the jitted step of SOBOW in a loop, on batches that are
  already on the device, and blocks only at the end.
* *state*: the bytes of all arrays in the state that a round passes to the next, from their shapes.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.interpreters import partial_eval

import jaxbo
from benchmarks import measure
from benchmarks.report import arguments, hardware, markdown, number, save

WINDOW, CG_STEPS = 10, 5
SOBOW, OAGD, OAGD_REPLAY = "SOBOW", "OAGD", "OAGD, replay"


class Sizes(NamedTuple):
  """Numbers of outer and inner parameters, and of rows of C."""

  outer: int
  inner: int
  rows: int


SMALL, LARGE = Sizes(3, 5, 4), Sizes(100, 200, 150)


class Matrices(NamedTuple):
  """The Hessian and the coupling of the inner loss, and the matrix of the outer loss."""

  A: jax.Array
  B: jax.Array
  C: jax.Array


def make_matrices(sizes: Sizes) -> Matrices:
  """Matrices of condition 2."""
  B, C = (
    jax.random.normal(jax.random.key(i), shape) / shape[1] ** 0.5
    for i, shape in enumerate([(sizes.inner, sizes.outer), (sizes.rows, sizes.inner)])
  )
  return Matrices(jnp.diag(jnp.linspace(0.5, 1.0, sizes.inner)), B, C)


def stream(key: Any, t: Any) -> tuple[jax.Array, jax.Array]:
  """The scalars that drive the linear terms of both losses."""
  del key
  return jnp.sin(0.01 * t), jnp.cos(0.01 * t)


def make_loop(
  method: str,
  matrices: Matrices,
  *,
  window: int = WINDOW,
  cg_steps: int = CG_STEPS,
  response: bool = True,
) -> tuple[jaxbo.online.Online, jaxbo.online.OnlineState]:
  """The loop of a method, and its first state.

  The matrices must be arguments of what is jitted, else XLA folds what it can. They are no part of
  the batches, so that the memory of OAGD holds nothing but what changes.
  """
  A, B, C = matrices

  def inner_loss(x, y, batch):
    return 0.5 * y @ A @ y - y @ (B @ x + batch)

  def outer_loss(x, y, batch):
    return 0.5 * jnp.mean((C @ y - batch) ** 2) + 0.005 * jnp.sum(x**2)

  x, y = (jnp.zeros(size) for size in B.shape[::-1])
  inner = jaxbo.inner_solver(inner_loss, optax.sgd(0.5), 1)
  cg = jaxbo.conjugate_gradient(cg_steps, warm_start=True)
  options = {"decay": 0.9, "linear_solver": cg, "inner_params": y}
  memory = {} if method == SOBOW else {"window": window, "replay": method == OAGD_REPLAY}
  if not response:
    outer = jaxbo.ogd(0.1)
  elif method == SOBOW:
    outer = jaxbo.sobow(0.1, inner, window=window, **options)
  else:
    outer = jaxbo.oagd(0.1, inner, outer_loss, **options)
  loop = jaxbo.online_loop(outer_loss, inner, outer, **memory)
  return loop, loop.init(x, y, stream)


class Cost(NamedTuple):
  """What a round is made of."""

  inner_gradients: float
  outer_gradients: float
  hessian_products: float
  cross_products: float


def count_cost(method: str, **options: int) -> Cost:
  """Counts in the jaxpr of a round, with a full memory and all steps of conjugate gradient."""
  matrices = make_matrices(SMALL)
  cg_steps = options.get("cg_steps", CG_STEPS)

  def count(response: bool) -> dict[str, int]:
    _, state = make_loop(method, matrices, response=response, **options)
    step = lambda matrices, state, batch: make_loop(method, matrices, response=response, **options)[
      0
    ].step(state, batch)[0]
    jaxpr = jax.make_jaxpr(step)(matrices, state, stream(None, 0)).jaxpr
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return {
      name: _count_products(jaxpr, matrix.shape, while_steps=cg_steps)
      for name, matrix in matrices._asdict().items()
    }

  whole, without = count(True), count(False)
  return Cost(
    inner_gradients=without["A"] / 2,
    outer_gradients=whole["C"] / 2,
    hessian_products=(whole["A"] - without["A"]) / 2,
    cross_products=whole["B"] - without["B"],
  )


def _count_products(jaxpr, shape: tuple[int, ...], while_steps: int) -> int:
  total = 0
  for eqn in jaxpr.eqns:
    name, inner = eqn.primitive.name, measure.sub_jaxprs(eqn.params)
    counts = [_count_products(sub, shape, while_steps) for sub in inner]
    if name == "scan":
      total += eqn.params["length"] * sum(counts)
    elif name == "while":
      total += while_steps * sum(counts)
    elif name == "cond":
      total += max(counts)  # The other branch is that of an empty slot.
    elif name == "dot_general":
      total += any(var.aval.shape == shape for var in eqn.invars)
    else:
      total += sum(counts)
  return total


def rounds_per_second(sizes: Sizes, num_rounds: int, turns: int) -> dict[str, float]:
  """Rounds a second of the compiled runs, and of a Python loop over the jitted step."""
  matrices, programs = make_matrices(sizes), {}
  for method in (SOBOW, OAGD, OAGD_REPLAY):

    @jax.jit
    def run(matrices, state, method=method):
      return make_loop(method, matrices)[0].run(state, stream, num_rounds)[0].x

    programs[method] = functools.partial(run, matrices, make_loop(method, matrices)[1])

  step = jax.jit(lambda matrices, state, batch: make_loop(SOBOW, matrices)[0].step(state, batch)[0])
  _, start = make_loop(SOBOW, matrices)
  batches = [stream(None, jnp.int32(t)) for t in range(100)]

  def python_loop():
    state = start
    for t in range(num_rounds):
      state = step(matrices, state, batches[t % len(batches)])
    return state.x

  programs["SOBOW, Python loop"] = python_loop
  timings = measure.time_together(programs, turns, calls=1)
  return {name: num_rounds / timing.seconds for name, timing in timings.items()}


class Weight(NamedTuple):
  """What a problem has to keep."""

  name: str
  x: Any
  batch: Any


def problems_to_weigh() -> list[Weight]:
  """Few outer parameters and many pixels, and the other way round; as shapes."""
  array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  labels = jax.ShapeDtypeStruct((64,), jnp.int32)
  images = (array(64, 28, 28, 1), labels)
  backbone = {"w": [array(784, 256), array(256, 64)], "b": [array(256), array(64)]}
  num_parameters = sum(leaf.size for leaf in jax.tree.leaves(backbone))
  return [
    Weight("20 hyperparameters, two batches of 64 MNIST images", array(20), (images, images)),
    Weight(f"{num_parameters:,} backbone parameters, the same batches", backbone, (images, images)),
  ]


def state_bytes(weight: Weight, window: int) -> dict[str, int]:
  """Bytes that a window of gradients (in two dtypes) and one of batches add to the state."""
  size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
  average = functools.partial(jaxbo.window_average, window)
  gradients = lambda **options: size(
    jax.eval_shape(average(**options).init, weight.x).gradient_window
  )
  inner = jaxbo.inner_solver(lambda x, y, batch: y**2, optax.sgd(0.1), 1)
  loop = jaxbo.online_loop(lambda x, y, batch: y**2, inner, jaxbo.ogd(0.1), window=window)
  zero = jnp.zeros(())
  zeros = lambda batch: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), batch)
  init = lambda: loop.init(zero, zero, lambda key, t: zeros(weight.batch)).window
  return {
    SOBOW: gradients(),
    "SOBOW, bfloat16": gradients(storage_dtype=jnp.bfloat16),
    OAGD: size(jax.eval_shape(init)),
  }


def main() -> None:
  """Measures, prints, and saves if asked to."""
  args = arguments(__doc__, rounds=(10_000, "rounds of a run"), turns=(5, "turns of each program"))
  sections = [f"Hardware: {hardware()}."]
  data: dict[str, Any] = {"hardware": hardware()}
  print(sections[0])

  def say(title: str, text: str) -> None:
    sections.append(f"## {title}\n\n{text}")
    print(f"\n{sections[-1]}", flush=True)

  costs = {method: count_cost(method) for method in (SOBOW, OAGD, OAGD_REPLAY)}
  data["cost"] = {name: cost._asdict() for name, cost in costs.items()}
  columns = ["method", *(field.replace("_", " ") for field in Cost._fields)]
  rows = [[name, *(number(value) for value in cost)] for name, cost in costs.items()]
  title = f"A round, window {WINDOW}, {CG_STEPS} steps of conjugate gradient from a warm start"
  say(title, markdown(columns, rows))

  data["rounds_per_second"], rows = {}, []
  for sizes in (SMALL, LARGE):
    name = f"p = {sizes.outer}, d = {sizes.inner}"
    speeds = rounds_per_second(sizes, args.rounds, args.turns)
    data["rounds_per_second"][name] = speeds
    rows += [
      [f"{name}: {method}", number(speed), number(speeds[SOBOW] / speed)]
      for method, speed in speeds.items()
    ]
  title = f"Speed, {args.rounds:,} rounds, window {WINDOW}, float32"
  say(title, markdown(["method", "rounds/s", "SOBOW is faster by"], rows))

  data["bytes"] = {}
  for weight in problems_to_weigh():
    windows = {window: state_bytes(weight, window) for window in (1, 5, 10, 20, 50, 100)}
    data["bytes"][weight.name] = windows
    columns = ["window", *windows[1]]
    rows = [
      [str(window), *(number(count / 2**20) for count in counts.values())]
      for window, counts in windows.items()
    ]
    say(f"MiB of the window: {weight.name}", markdown(columns, rows))

  command = "`PYTHONPATH=.:models python3 -m benchmarks.online`"
  title = f"# Online bilevel optimization\n\nMade by {command}; the columns are explained there."
  save(args.save, "\n\n".join([title, *sections]) + "\n", data)


if __name__ == "__main__":
  main()
