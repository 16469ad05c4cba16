"""Online meta-learning: how fast rounds go, compiled and in a Python loop, and what is kept.

  PYTHONPATH=.:models python3 -m benchmarks.online_meta              (about 5 minutes on 2 cores)
  ... --save benchmarks/results/online_meta_cpu                      (writes .md and .json as well)

Every method of scripts/online_meta.py plays the same stream of random images: 10-way 5-shot, 16 by
16 pixels, Conv4 of 16 channels, 3 inner steps, thresholds at which the detectors do not fire after
the first round; "told" methods know the switches (p = 0.9).

* *rounds/s*: the median over turns of runs, all methods in turns in one process. A run is one
  compiled scan over the rounds, the stream included.
* *Python loop*: the same rounds with two jitted functions, a round of the stream and a step of the
  learner, dispatched one after the other; it blocks at the end only. Both give the same models.
* *state*: bytes of all that is carried from round to round, from shapes: the meta-model, and beside
  it the task's model, moments, buffers and detectors.

A perceptron on the same images shows what dispatching costs where a round is short.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxbo.tasks
from benchmarks import measure
from benchmarks.report import arguments, hardware, markdown, number, save
from scripts.online_meta import model as meta_model
from scripts.online_meta.methods import METHODS, Rates, Switches, state_bytes
from scripts.online_meta.model import Model, Params

SIZE, WIDTH, WAYS, SHOTS = 16, 16, 10, 5
RATES = Rates(0.1, 1e-3, 0.1, 2.0, 1e6, 1e6)
SWITCHES = Switches(
  inner_steps=3,
  query="same",
  first_order=False,
  bgd_samples=2,
  num_examples=WAYS * SHOTS,
  buffer_size=101,
  switch_score="loss",
  shift_score="energy",
  shift_model="adapted",
  no_switch_scale=0.0,
)
SMALL = ("leeds", "leeds_told", "meta_ogd")


def perceptron(width: int) -> Model:
  """One hidden layer on the pixels."""

  def init(key):
    hidden = jax.random.normal(key, (SIZE**2, width)) / SIZE
    return Params(hidden, {"w": jnp.zeros((width, WAYS)), "b": jnp.zeros(WAYS)})

  def loss(x, y, batch):
    images, labels = batch
    weights, head = optax.tree.add(x, y)
    pixels = images.reshape(len(images), -1).astype(jnp.float32) / 255
    logits = jax.nn.relu(pixels @ weights) @ head["w"] + head["b"][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits

  return Model(init, loss, optax.tree.zeros_like)


def make_stream() -> jaxbo.tasks.TaskStream:
  """Random pixels of three domains."""
  keys = jax.random.split(jax.random.key(0), 3)
  draw = functools.partial(jax.random.randint, minval=0, maxval=256)
  domains = [draw(key, (20, 20, SIZE, SIZE, 1)).astype(jnp.uint8) for key in keys]
  return jaxbo.tasks.osaka_stream(
    domains,
    num_ways=WAYS,
    num_shots=SHOTS,
    stay_probability=0.9,
    domain_probabilities=(0.5, 0.25, 0.25),
  )


def make_learner(name: str, model: Model) -> tuple[jaxbo.OnlineMetaLearner, Any, Any]:
  """The learner of a method, its first state, and the meta-model."""
  learner, x = METHODS[name].make(model, RATES, SWITCHES), model.init(jax.random.key(1))
  return learner, learner.init(x, stream=make_stream(), key=2), x


def make_programs(name: str, model: Model, num_rounds: int) -> dict[str, Any]:
  """A run as one scan, and as a loop; both return the meta-model and the task's."""
  stream, (learner, start, _) = make_stream(), make_learner(name, model)

  @jax.jit
  def run(state, stream):
    state, _ = learner.run(state, stream, num_rounds)
    return state.meta_params, state.task

  step, draw = jax.jit(learner.step), jax.jit(lambda stream, state: stream.step(state))

  def python_loop():
    state, stream_state = start._replace(task_stream_state=()), start.task_stream_state
    for _ in range(num_rounds):
      stream_state, batch = draw(stream, stream_state)
      state, _ = step(state, batch)
    return state.meta_params, state.task

  return {"scan": lambda: run(start, stream), "Python loop": python_loop}


def rounds_per_second(names: Any, model: Model, rounds: int, turns: int) -> dict[str, Any]:
  """Rounds a second of both programs of each method, in turns."""
  programs = {
    (name, kind): program
    for name in names
    for kind, program in make_programs(name, model, rounds).items()
  }
  timings = measure.time_together(programs, turns, calls=1)
  return {
    name: {kind: rounds / timings[name, kind].seconds for kind in ("scan", "Python loop")}
    for name in names
  }


def kept(name: str, model: Model) -> dict[str, int]:
  """Bytes of the meta-model, and of what is kept beside it."""
  _, state, x = make_learner(name, model)
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(x))
  return {"meta-model": size, "beside it": state_bytes(state, x)}


def main() -> None:
  """Measures, prints, and saves if asked to."""
  args = arguments(__doc__, rounds=(60, "rounds of a run"), turns=(3, "turns of each program"))
  sections = [f"Hardware: {hardware()}."]
  data: dict[str, Any] = {"hardware": hardware()}
  print(sections[0])
  conv4 = meta_model.conv4(WIDTH, SIZE, WAYS)
  head = meta_model.conv4(WIDTH, SIZE, WAYS, "head")
  settings = {"Conv4": (tuple(METHODS), args.rounds), "perceptron": (SMALL, 10 * args.rounds)}
  for title, (names, rounds) in settings.items():
    speeds, rows = {}, []
    for name in names:  # One at a time: programs of all methods at once take much memory.
      model = perceptron(64) if title == "perceptron" else conv4
      model = head if METHODS[name].begins == "anil" else model
      speeds |= rounds_per_second([name], model, rounds, args.turns)
      speed, sizes = speeds[name], kept(name, model)
      speeds[name] = speed | sizes
      rows.append(
        [
          METHODS[name].label,
          *map(number, speed.values()),
          f"{speed['scan'] / speed['Python loop']:.2f}",
          *(number(size / 2**10) for size in sizes.values()),
        ]
      )
    data[title] = speeds
    columns = ["method", "rounds/s", "Python loop", "ratio", "meta-model, KiB", "beside it, KiB"]
    sections.append(f"## {title}, {rounds} rounds\n\n{markdown(columns, rows)}")
    print(f"\n{sections[-1]}", flush=True)
  command = "`PYTHONPATH=.:models python3 -m benchmarks.online_meta`"
  title = f"# Online meta-learning\n\nMade by {command}; the columns are explained there."
  save(args.save, "\n\n".join([title, *sections]) + "\n", data)


if __name__ == "__main__":
  main()
