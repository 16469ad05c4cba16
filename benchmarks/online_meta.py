"""Online meta-learning: the speed of rounds, compiled and in a Python loop, and the state's size.

  PYTHONPATH=.:models python3 -m benchmarks.online_meta              (about 5 minutes on 2 cores)
  ... --save benchmarks/results/online_meta_cpu                      (writes .md and .json as well)

Every method of ``scripts.online_meta`` plays the same stream of random images: 10-way 5-shot, 16 by
16 pixels, Conv4 of 16 channels, 3 inner steps, thresholds at which the detectors do not fire after
the first round; "told" methods know the switches (p = 0.9).

* *rounds/s*: the median over runs, with all methods in turns in one process. A run is one compiled
  scan over the rounds, the stream included.
* *Python loop*: the same rounds with two jitted functions, a round of the stream and a step of the
  learner, called one after the other; the loop blocks only at the end. Both give the same models.
* *state*: the bytes that a round passes to the next, from shapes: the meta-model, and beside it the
  task's model, moments, buffers and detectors.

A perceptron on the same images shows what dispatching costs where a round is short.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxbo_models import Conv4, linear_head

import jaxbo.tasks
from benchmarks import measure
from benchmarks.report import arguments, hardware, markdown, number, save

SIZE, WIDTH, WAYS, SHOTS = 16, 16, 10, 5
LABELS = {
  "online_sgd": "online SGD",
  "fine_tuning": "fine-tuning",
  "bgd": "BGD",
  "scratch": "from scratch, told",
  "maml": "MAML",
  "anil": "ANIL",
  "meta_ogd": "MetaOGD",
  "c_maml": "C-MAML",
  "c_maml_um": "C-MAML, modulated",
  "c_maml_pap": "C-MAML, mod., prolonged",
  "leeds": "LEEDS",
  "leeds_told": "LEEDS, told",
}
SMALL = ("leeds", "leeds_told", "meta_ogd")


class Params(NamedTuple):
  """The parameters of a classifier."""

  backbone: Any
  head: Any


class Model(NamedTuple):
  """A classifier; its inner parameters are an offset of all its parameters, or of the head.

  Attributes:
    init: ``init(key) -> Params``.
    loss: ``loss(x, y, (images, labels)) -> (cross entropy, logits)``.
    start: ``start(x) -> y``, zeros.
  """

  init: Callable[[jax.Array], Params]
  loss: Callable[[Params, Any, Any], tuple[jax.Array, jax.Array]]
  start: Callable[[Params], Any]


def _with_head(init_features: Any, features: Any, adapt_head: bool = False) -> Model:
  """A linear head on ``features(backbone, images)``."""

  def init(key):
    images = jnp.zeros((2, SIZE, SIZE, 1))
    backbone = init_features(key, images)
    width = jax.eval_shape(features, backbone, images).shape[-1]
    return Params(backbone, linear_head.zero_head(width, WAYS))

  def loss(x, y, batch):
    images, labels = batch
    add = optax.tree.add
    backbone, head = Params(x.backbone, add(x.head, y)) if adapt_head else add(x, y)
    logits = linear_head.logits(head, features(backbone, images.astype(jnp.float32) / 255))
    return linear_head.cross_entropy(logits, labels), logits

  return Model(init, loss, lambda x: optax.tree.zeros_like(x.head if adapt_head else x))


def conv4(width: int, *, adapt_head: bool = False) -> Model:
  """Conv4."""
  model = Conv4(width)
  return _with_head(model.init, model.apply, adapt_head)


def perceptron(width: int) -> Model:
  """One hidden layer on the pixels."""
  return _with_head(
    lambda key, images: jax.random.normal(key, (SIZE**2, width)) / SIZE,
    lambda weights, images: jax.nn.relu(images.reshape(len(images), -1) @ weights),
  )


def make_stream() -> jaxbo.tasks.Stream:
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


def make_learners(model: Model) -> dict[str, jaxbo.meta.OnlineMetaLearner]:
  """All methods; what they begin with, before the stream, makes no difference here."""
  accuracy = lambda logits, batch: jnp.mean(jnp.argmax(logits, -1) == batch[1], dtype=jnp.float32)
  options: dict[str, Any] = {"start": model.start, "metric": accuracy}
  loss, plain = model.loss, lambda x, y, batch: model.loss(x, y, batch)[0]
  inner = jaxbo.inner_solver(plain, optax.sgd(0.1), 3)
  bgd = jaxbo.meta.bayesian_gradient_descent(10.0, 0.1, num_samples=2, num_examples=WAYS * SHOTS)
  response, adam = jaxbo.add_unrolled_response(inner), optax.adam(1e-3)
  gated = optax.chain(response, jaxbo.gate_by_detection(adam, 0.1, 1.0))
  of_drops = {"drop_threshold": 1e6, "response": response, **options}
  told, same = jaxbo.meta.oracle_detector(), {"query": "same", **options}
  tuned = jaxbo.meta.fine_tuning(loss, inner, **options)
  adapted = jaxbo.meta.frozen_maml(loss, inner, **options)
  return {
    "online_sgd": tuned,
    "fine_tuning": tuned,
    "bgd": jaxbo.meta.fine_tuning(loss, jaxbo.inner_solver(plain, bgd, 3), **options),
    "scratch": jaxbo.meta.train_from_scratch(loss, inner, told, **same),
    "maml": adapted,
    "anil": adapted,
    "meta_ogd": jaxbo.meta.meta_ogd(loss, inner, optax.chain(response, adam), **same),
    "c_maml": jaxbo.meta.c_maml(loss, inner, adam, **of_drops),
    "c_maml_um": jaxbo.meta.c_maml(loss, inner, adam, modulation=2.0, **of_drops),
    "c_maml_pap": jaxbo.meta.c_maml_pap(loss, inner, adam, modulation=2.0, **of_drops),
    "leeds": jaxbo.meta.online_meta_learner(
      loss, inner, gated, jaxbo.meta.threshold_detector(1e6, 1e6), **same
    ),
    "leeds_told": jaxbo.meta.online_meta_learner(loss, inner, gated, told, **same),
  }


def make_learner(name: str, model: Model) -> tuple[jaxbo.meta.OnlineMetaLearner, Any, Any]:
  """The learner of a method, its first state, and the meta-model."""
  learner, x = make_learners(model)[name], model.init(jax.random.key(1))
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
    state, stream_state = start._replace(stream_state=()), start.stream_state
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
  size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
  carried = size(state._replace(stream_state=()))
  return {"meta-model": size(x), "beside it": carried - size(x)}


def main() -> None:
  """Measures, prints, and saves if asked to."""
  args = arguments(__doc__, rounds=(60, "rounds of a run"), turns=(3, "turns of each program"))
  sections = [f"Hardware: {hardware()}."]
  data: dict[str, Any] = {"hardware": hardware()}
  print(sections[0])
  settings = {"Conv4": (tuple(LABELS), args.rounds), "perceptron": (SMALL, 10 * args.rounds)}
  for title, (names, rounds) in settings.items():
    speeds, rows = {}, []
    for name in names:  # One at a time: programs of all methods at once take much memory.
      is_small = title == "perceptron"
      model = perceptron(64) if is_small else conv4(WIDTH, adapt_head=name == "anil")
      speeds |= rounds_per_second([name], model, rounds, args.turns)
      speed, sizes = speeds[name], kept(name, model)
      speeds[name] = speed | sizes
      rows.append(
        [
          LABELS[name],
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
