"""Robust training: what a reweighted step costs beside a plain one.

  PYTHONPATH=.:models python3 -m benchmarks.dro                      (about 2 minutes on 2 cores)
  ... --save benchmarks/results/dro_cpu                              (writes .md and .json as well)

A multilayer perceptron of 512, 512 and 10 units on 64 random inputs, softmax cross-entropy, Adam.

*Steps* use one batch of 1,024. The plain step takes the gradient of the mean loss; the others
weight the examples. *ms* is the median over rounds in which all programs have a turn, *x plain* the
median over rounds of the ratio to the plain step in the same round, and *spread* half the distance
between the quartiles of that ratio; stored per-example gradients are timed separately. Most of what
reweighting adds is constant, some tens of microseconds, which is 1 % of a step of 4 ms. *Mflop* is
counted in the jaxpr, for batches without a bad loss, in which the loop that repairs a gradient does
not run. Weightings that search have loops of a fixed number of short steps; these are not counted,
so such weightings have no number. *temp. KiB* is XLA's temporary memory.

*Streams* are of several microbatches of 64: plain accumulation of the gradient of the mean loss in
float32, one-pass and two-pass streaming, and the whole batch at once.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxbo_models import MLP

import jaxbo
from benchmarks import measure
from benchmarks.hypergradient import Step, Target
from benchmarks.report import arguments, hardware, markdown, number, save

NUM_INPUTS, NUM_CLASSES, BATCH, MICROBATCH, NUM_MICROBATCHES = 64, 10, 1024, 64, (4, 16, 64)
MODEL = MLP((512, 512, NUM_CLASSES))
OPTIMIZER = optax.adam(1e-3)
PLAIN, KL, STORED = "plain", "kl", "kl, stored per-example gradients"
WEIGHTINGS = {
  KL: jaxbo.dro.kl(0.5),
  "kl_ball": jaxbo.dro.kl_ball(0.1),
  "cvar": jaxbo.dro.cvar(0.3),
  "chi_square_ball": jaxbo.dro.chi_square_ball(0.5),
  "lin_upper": jaxbo.dro.lin_upper(0.4),
}
WITHOUT_LOOPS = (PLAIN, KL, "kl, repaired", STORED, "lin_upper")


def loss_fn(params: Any, batch: Any) -> jax.Array:
  """The cross-entropy of each example."""
  logits: Any = MODEL.apply(params, batch["x"])
  return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


def mean_loss(params: Any, batch: Any) -> jax.Array:
  """What ordinary training lowers."""
  return jnp.mean(loss_fn(params, batch))


def data(size: int) -> tuple[Any, Any]:
  """Parameters and a batch."""
  key, x_key, y_key = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(x_key, (size, NUM_INPUTS))
  y = jax.random.randint(y_key, (size,), 0, NUM_CLASSES)
  return MODEL.init(key, x[:1]), {"x": x, "y": y}


def plain_step(params: Any, state: Any, batch: Any) -> Any:
  """A step of ordinary training."""
  loss, grads = jax.value_and_grad(mean_loss)(params, batch)
  updates, state = OPTIMIZER.update(grads, state, params)
  return optax.apply_updates(params, updates), state, loss


def robust_step(
  tx: optax.GradientTransformationExtraArgs, params: Any, state: Any, batch: Any, **options: Any
) -> Any:
  """A step of robust training."""
  grads: Any = jaxbo.per_example_grad(loss_fn, **options)(params, batch)
  updates, state = tx.update(grads, state, params)
  return optax.apply_updates(params, updates), state, jnp.mean(grads.losses)


def stored_step(
  tx: optax.GradientTransformationExtraArgs, params: Any, state: Any, batch: Any
) -> Any:
  """The same with the gradient of each example in memory."""
  one = lambda params, row: loss_fn(params, jax.tree.map(lambda leaf: leaf[None], row))[0]
  losses, grads = jax.vmap(jax.value_and_grad(one), in_axes=(None, 0))(params, batch)
  updates, state = tx.update(grads, state, params, losses=losses)
  return optax.apply_updates(params, updates), state, jnp.mean(losses)


def make_steps(size: int = BATCH) -> dict[str, Step]:
  """The steps of one batch; the plain one is the first."""
  params, batch = data(size)

  def step(function: Callable[..., Any], tx: Any, *bound: Any, **options: Any) -> Step:
    compiled = jax.jit(functools.partial(function, *bound, **options))
    return Step(compiled, (params, tx.init(params), batch))

  steps = {PLAIN: step(plain_step, OPTIMIZER)}
  for name, weighting in WEIGHTINGS.items():
    tx = optax.chain(jaxbo.reweight(weighting), OPTIMIZER)
    steps[name] = step(robust_step, tx, tx)
    if name == KL:
      steps["kl, repaired"] = step(robust_step, tx, tx, repair=True)
      steps[STORED] = step(stored_step, tx, tx)
  return steps


def accumulate(params: Any, batch: Any) -> Any:
  """The gradient of the mean loss, summed over microbatches in float32."""
  cut = jax.tree.map(lambda leaf: leaf.reshape(-1, MICROBATCH, *leaf.shape[1:]), batch)

  def add(total, microbatch):
    loss, grads = jax.value_and_grad(mean_loss)(params, microbatch)
    return optax.tree.add(total, grads), loss

  total, losses = jax.lax.scan(add, optax.tree.zeros_like(params), cut)
  return optax.tree.scale(1 / losses.size, total), jnp.mean(losses)


def whole_batch(params: Any, batch: Any) -> Any:
  """The reweighted gradient of the whole batch."""
  tx: Any = jaxbo.reweight(WEIGHTINGS[KL])
  return tx.update(jaxbo.per_example_grad(loss_fn)(params, batch), tx.init(params), params)


def make_streams(num_microbatches: int) -> dict[str, Step]:
  """The programs of one row of the table of streams."""
  arguments = data(num_microbatches * MICROBATCH)
  stream = functools.partial(jaxbo.streaming_grad, loss_fn, microbatch_size=MICROBATCH)
  two_pass = WEIGHTINGS[KL]._replace(log_ratio=None)
  functions = {
    "plain accumulation": accumulate,
    "one pass": stream(WEIGHTINGS[KL]),
    "two passes": stream(two_pass),
    "whole batch": whole_batch,
  }
  return {name: Step(jax.jit(function), arguments) for name, function in functions.items()}


def table(
  steps: dict[str, Step], num_rounds: int, calls: int, counted: tuple[str, ...]
) -> list[dict[str, Any]]:
  """A row for each program; the first is the baseline. ``counted`` have no loop that matters."""
  quick = {name: step for name, step in steps.items() if name != STORED}
  timings = measure.time_together(quick, num_rounds, calls)
  if STORED in steps:  # Apart: it leaves no cache warm for those that have their turn behind it.
    slow = measure.time_together({STORED: steps[STORED]}, 5, 1)[STORED]
    baseline = timings[next(iter(steps))]
    timings[STORED] = slow._replace(ratio=slow.seconds / baseline.seconds, spread=float("nan"))
  rows = []
  for name, step in steps.items():
    timing, flops = timings[name], float("nan")
    if name in counted:
      flops = measure.count_flops(step.fn, *step.args, while_steps=0)
    rows.append(
      {
        "step": name,
        "ms": 1e3 * timing.seconds,
        "x plain": timing.ratio,
        "spread": timing.spread,
        "Mflop": flops / 1e6,
        "temp. KiB": measure.temporary_bytes(step.fn.lower(*step.args).compile()) / 2**10,
      }
    )
  return rows


def targets(rows: list[dict[str, Any]], streams: dict[int, list[dict[str, Any]]]) -> list[Target]:
  """What a reweighted step may cost."""
  of = {row["step"]: row for row in rows}
  ratio = lambda column: of[KL][column] / of[PLAIN][column]
  few, many = ({row["step"]: row for row in streams[n]} for n in (min(streams), max(streams)))
  memory = "temp. KiB"
  return [
    Target("kl: time at most 1.03 of plain", of[KL]["x plain"], 1.03),
    Target("kl: operations at most 1.01 of plain", ratio("Mflop"), 1.01),
    Target("kl: temporary bytes at most 1.01 of plain", ratio(memory), 1.01),
    *(
      Target(f"one pass, {n} microbatches: time at most 1.0 of accumulation", time, 1.0)
      for n, table in streams.items()
      for time in [row["x plain"] for row in table if row["step"] == "one pass"]
    ),
    Target(
      f"one pass: bytes of {max(streams)} microbatches at most 1.05 of {min(streams)}",
      many["one pass"][memory] / few["one pass"][memory],
      1.05,
    ),
  ]


def main() -> None:
  """Measures, prints, and saves if asked to."""
  args = arguments(__doc__, rounds=(101, "turns of each program"), calls=(5, "calls in a turn"))
  rows = table(make_steps(), args.rounds, args.calls, WITHOUT_LOOPS)
  streams = {}
  for n in NUM_MICROBATCHES:
    programs = make_streams(n)
    streams[n] = table(programs, -(-args.rounds // 5), 1, tuple(programs))
  wanted = targets(rows, streams)

  sections = [f"# Robust training\n\nHardware: {hardware()}."]
  tables = {f"One batch of {BATCH}": rows}
  tables |= {f"{n} microbatches of {MICROBATCH}": table for n, table in streams.items()}
  for title, of_title in tables.items():
    cells = [[row["step"], *(number(x) for x in list(row.values())[1:])] for row in of_title]
    sections.append(f"## {title}\n\n{markdown(list(of_title[0]), cells)}")
  text = [[t.claim, number(t.measured, 4), number(t.limit), t.verdict] for t in wanted]
  sections.append("## Targets\n\n" + markdown(["claim", "measured", "limit", "verdict"], text))
  report = "\n\n".join(sections) + "\n"
  print(report)
  data = {"hardware": hardware(), "tables": tables}
  data["targets"] = [target._asdict() | {"verdict": target.verdict} for target in wanted]
  save(args.save, report, data)


if __name__ == "__main__":
  main()
