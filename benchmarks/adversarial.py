"""Adversarial training: what one step of every method costs beside plain adversarial training.

  PYTHONPATH=.:models python3 -m benchmarks.adversarial                (a minute on 2 cores)
  ... --save benchmarks/results/adversarial_cpu                       (writes .md and .json as well)
  ... --preset resnet18 --save benchmarks/results/adversarial_gpu      (for a GPU)

A training step attacks a batch of random images in K steps, computes the weighted gradient of the
losses, and takes a step of SGD with momentum. *By hand* is the lower limit: K gradients in the
images and one in the parameters, K + 1 forward and backward passes, written without jaxbo. *ms* is
the median over rounds in which all programs have a turn, *x AT* the median over rounds of the ratio
to plain adversarial training in the same round, and *spread* half the distance between the
quartiles of that ratio. *GFLOP* are counted in the jaxpr, loops included, for batches without a bad
loss. *Images/s* counts a batch once per step, for any K. *Compile s* is XLA's time for the step,
tracing included.

The preset *small* has the convolutional network of ``scripts.adversarial_training`` on 28 x 28 x 1,
*resnet18* PreAct ResNet-18 on 32 x 32 x 3 in bfloat16, with the statistics of the batch.

The number of operations does not explain two rows of the table for 2 cores (profiled in turns, jax
0.10.2):

*AT takes 1.11 times as long as by hand* (spread 0.02), and 1.05 times without the check that an
image's gradient is finite. With convolutions by patches, that gradient is a sum of 16 padded
arrays, which XLA fuses with the operation that reads it. With the check two operations read the
gradient, so XLA writes the arrays out and adds them up twice (2.80e8 bytes in XLA's count; 2.33e8
without the check, 2.20e8 by hand). Stopping single examples is in the same select as that check and
reads no images. We attribute the rest to small operations: a step starts 982 kernels, by hand 728.
With XLA's own convolutions the check costs 0.5 % of the bytes, and on a GPU AT takes 0.99 times as
long as by hand.

*Fast-BAT takes as long as AT*, although it needs 0.64 of the operations and does not depend on K.
Its pass for the parameters, for losses and a second derivative, has 3.0 times the operations and
3.9 times the time of an ordinary one; without the second derivative the step takes 0.38 of the time
of AT (all with memory kept, see below). Also, its 37 MiB of temporary memory exceed the 32 MiB that
glibc keeps, so every step allocates this memory again: 9,600 page faults, against 9 for AT. In one
session a step took 1.22 times as long as AT (spread 0.10), 0.95 (0.16) with memory kept
(MALLOC_MMAP_MAX_=0 and gigabytes for MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_), and 0.86
(0.07) at half the batch, with 18 MiB. No forward pass is computed twice: XLA reuses two forward
passes of the attack.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
import tyro
from jaxbo_models import PreActResNet18, SmallCNN

import jaxbo
from benchmarks import measure
from benchmarks.adversarial_methods import LABELS, make_methods
from benchmarks.hypergradient import Step, Target
from benchmarks.report import hardware, markdown, number, save

BASELINE, DONE, BY_HAND = "at", "done", "by hand"
OPTIMIZER = optax.sgd(1e-2, momentum=0.9)
NUM_CLASSES = 10
LIMIT, SLACK = 1.35, 1.05


class Preset(NamedTuple):
  """What is trained.

  Attributes:
    model: ``model(**options)``.
    shape: of an image.
    epsilon: the largest change of a pixel.
    dtype: of products and activations.
    batches: batch sizes.
    methods: what is timed.
  """

  model: Callable[..., Any]
  shape: tuple[int, int, int]
  epsilon: float
  dtype: str
  batches: tuple[int, ...]
  methods: tuple[str, ...]


PRESETS = {
  "small": Preset(SmallCNN, (28, 28, 1), 0.1, "float32", (128,), tuple(LABELS)),
  "resnet18": Preset(
    PreActResNet18, (32, 32, 3), 8 / 255, "bfloat16", (128, 256), (BASELINE, DONE)
  ),
}


@dataclasses.dataclass(frozen=True)
class Config:
  """What one step of every adversarial method costs beside plain adversarial training."""

  preset: Literal["small", "resnet18"] = "small"
  """The model and its images."""
  batches: tuple[int, ...] | None = None
  """Images of a batch; by default 128 (small), or 128 and 256 (resnet18)."""
  methods: tuple[str, ...] | None = None
  """What to time beside adversarial training; by default all (small), or DONE (resnet18)."""
  attack_steps: int = 10
  """Steps of the attack, K."""
  dtype: Literal["bfloat16", "float32"] | None = None
  """Of products and activations; by default float32 (small) or bfloat16 (resnet18)."""
  rounds: int = 15
  """Turns of each program."""
  calls: int = 2
  """Calls in a turn."""
  save: Path | None = None
  """Path without suffix, for .md and .json."""

  def check(self) -> None:
    """Raises ``ValueError`` for what cannot run."""
    for name in ("attack_steps", "rounds", "calls"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
    if not self.all_batches() or min(self.all_batches()) < 2:
      raise ValueError(f"batches must be numbers of at least 2, got {self.batches}")
    if not set(self.all_methods()) <= set(LABELS):
      got = " ".join(self.all_methods())
      raise ValueError(f"methods must be among {', '.join(LABELS)}; got {got}")

  def all_batches(self) -> tuple[int, ...]:
    """The batch sizes."""
    return PRESETS[self.preset].batches if self.batches is None else self.batches

  def all_methods(self) -> tuple[str, ...]:
    """The methods, plain adversarial training first."""
    methods = PRESETS[self.preset].methods if self.methods is None else self.methods
    return (BASELINE, *(name for name in methods if name != BASELINE))

  def all_dtype(self) -> str:
    """The dtype."""
    return self.dtype or PRESETS[self.preset].dtype


def robust_step(
  gradients: Any, tx: Any, params: Any, state: Any, batch: Any, key_data: jax.Array
) -> tuple[Any, Any, jax.Array]:
  """A step of a method."""
  key = jax.random.wrap_key_data(key_data)
  grads, extra = gradients(params, batch, key)
  updates, state = tx.update(grads, state, params, **extra)
  return optax.apply_updates(params, updates), state, jnp.mean(grads.losses)


def step_by_hand(
  model: Any,
  epsilon: float,
  num_steps: int,
  params: Any,
  state: Any,
  batch: Any,
  key_data: jax.Array,
) -> tuple[Any, Any, jax.Array]:
  """A step of plain adversarial training without jaxbo."""
  images, labels = batch

  def loss(params, images):
    logits = model(params, images)
    return jnp.sum(optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels))

  def ascend(_, attacked):
    ascent = jnp.sign(jax.grad(loss, 1)(params, attacked))
    return jnp.clip(attacked + epsilon / 4 * ascent, low, high)

  low, high = jnp.maximum(images - epsilon, 0.0), jnp.minimum(images + epsilon, 1.0)
  key = jax.random.wrap_key_data(key_data)
  start = low + jax.random.uniform(key, images.shape) * (high - low)
  attacked = jax.lax.fori_loop(0, num_steps, ascend, start)
  mean = lambda params: loss(params, attacked) / len(images)
  value, grads = jax.value_and_grad(mean)(params)
  updates, state = OPTIMIZER.update(grads, state, params)
  return optax.apply_updates(params, updates), state, value


def make_steps(config: Config, size: int) -> dict[str, Step]:
  """A step of each method and one by hand; plain adversarial training is the first."""
  preset = PRESETS[config.preset]
  model = preset.model(num_classes=NUM_CLASSES, dtype=getattr(jnp, config.all_dtype()))
  image_key, label_key, params_key, key = jax.random.split(jax.random.key(0), 4)
  images = jax.random.uniform(image_key, (size, *preset.shape))
  labels = jax.random.randint(label_key, (size,), 0, NUM_CLASSES)
  params = jax.jit(model.init)(params_key, images[:2])
  rest = ((images, labels), jax.random.key_data(key))
  methods = make_methods(model.apply, preset.epsilon, config.attack_steps)
  steps = {}
  for name in config.all_methods():
    tx = optax.chain(jaxbo.reweight(methods[name].weighting), OPTIMIZER)
    fn = jax.jit(functools.partial(robust_step, methods[name].gradients, tx))
    steps[name] = Step(fn, (params, tx.init(params), *rest))
  by_hand = functools.partial(step_by_hand, model.apply, preset.epsilon, config.attack_steps)
  steps[BY_HAND] = Step(jax.jit(by_hand), (params, OPTIMIZER.init(params), *rest))
  return steps


def table(steps: dict[str, Step], config: Config, size: int) -> list[dict[str, Any]]:
  """A row for each program; the first is the baseline."""
  compiled, compile_seconds = {}, {}
  for name, step in steps.items():
    start = time.perf_counter()
    compiled[name] = step.fn.lower(*step.args).compile()
    compile_seconds[name] = time.perf_counter() - start
    print(f"{name}, batch {size}: compiled in {compile_seconds[name]:.1f} s", flush=True)
  programs = {name: functools.partial(compiled[name], *step.args) for name, step in steps.items()}
  timings = measure.time_together(programs, config.rounds, config.calls)
  rows = []
  for name, timing in timings.items():
    step = steps[name]
    flops = measure.count_flops(step.fn, *step.args, while_steps=0, dead_code=False)
    rows.append(
      {
        "step": LABELS.get(name, name),
        "ms": 1e3 * timing.seconds,
        "x AT": timing.ratio,
        "spread": timing.spread,
        "GFLOP": flops / 1e9,
        "images/s": size / timing.seconds,
        "Tflop/s": flops / timing.seconds / 1e12,
        "temp. MiB": measure.temporary_bytes(compiled[name]) / 2**20,
        "compile s": compile_seconds[name],
      }
    )
  return rows


def targets(tables: dict[int, list[dict[str, Any]]]) -> list[Target]:
  """What steps may cost."""
  found = []
  for size, rows in tables.items():
    of = {row["step"]: row for row in rows}
    at, by_hand = of[LABELS[BASELINE]], of[BY_HAND]
    batch = f"batch {size}: "
    found += [
      Target(f"{batch}AT: time at most {SLACK} of by hand", 1 / by_hand["x AT"], SLACK),
      Target(
        f"{batch}AT: operations at most {SLACK} of by hand", at["GFLOP"] / by_hand["GFLOP"], SLACK
      ),
    ]
    if (label := LABELS[DONE]) in of:
      found += [
        Target(f"{batch}{label}: time at most {LIMIT} of AT", of[label]["x AT"], LIMIT),
        Target(
          f"{batch}{label}: operations at most {LIMIT} of AT",
          of[label]["GFLOP"] / at["GFLOP"],
          LIMIT,
        ),
      ]
  return found


def main(config: Config) -> None:
  """Measures, prints, and saves if asked to."""
  config.check()
  tables = {n: table(make_steps(config, n), config, n) for n in config.all_batches()}
  wanted = targets(tables)
  sections = [
    f"# Adversarial training\n\n{config.preset}, {config.all_dtype()}, K = {config.attack_steps}. "
    f"Hardware: {hardware()}."
  ]
  for size, rows in tables.items():
    cells = [[row["step"], *(number(value) for value in list(row.values())[1:])] for row in rows]
    sections.append(f"## Batches of {size}\n\n{markdown(list(rows[0]), cells)}")
  text = [[t.claim, number(t.measured, 4), number(t.limit), t.verdict] for t in wanted]
  sections.append("## Targets\n\n" + markdown(["claim", "measured", "limit", "verdict"], text))
  report = "\n\n".join(sections) + "\n"
  print(report)
  settings = {**dataclasses.asdict(config), "save": None}
  data = {"hardware": hardware(), "settings": settings, "tables": tables}
  data["targets"] = [target._asdict() | {"verdict": target.verdict} for target in wanted]
  save(config.save, report, data)


if __name__ == "__main__":
  main(tyro.cli(Config))
