"""One meta-step of ResNet-12 at 84 x 84 x 3: ESJ beside ITD, MAML and first order.

  PYTHONPATH=.:models python3 -m benchmarks.resnet12            (about 10 minutes on 2 cores)
  ... --save benchmarks/results/resnet12_cpu                    (writes .md and .json as well)

12,424,320 parameters, one task of 5-way 5-shot with 5 queries a class, 30 steps of the head; MAML
takes one step on all parameters. A row is a whole step, Adam included. *GFLOP* are counted in the
jaxpr, loops included. On an accelerator the backbone computes in bfloat16.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxbo_models import ResNet12, linear_head

import jaxbo
from benchmarks import few_shot, measure
from benchmarks.few_shot import Setting
from benchmarks.report import arguments, hardware, markdown, number, save

SETTING = Setting(num_tasks=1, inner_steps=30, ridge=0.5)
ROWS: dict[str, dict[str, Any] | str] = {
  "first order": "drop",
  "ITD (ANIL)": "itd",
  "ESJ on features, Q = 16": {"num_samples": 16, "per_task": True},
  "ESJ on features, Q = 256": {"num_samples": 256, "per_task": True, "sample_batch_size": 64},
  "ESJ on parameters, Q = 1, Rademacher": {
    "num_samples": 1,
    "perturb_features": False,
    "directions": "rademacher",
  },
  "ESJ on parameters, Q = 4, Rademacher": {
    "num_samples": 4,
    "perturb_features": False,
    "directions": "rademacher",
    "sample_batch_size": 1,
  },
  "MAML, 1 step": "maml",
}


def make_method(
  options: dict[str, Any] | str, model: Any, setting: Setting
) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """``(init(key, images), step(state, episodes))`` of what ``options`` stand for."""
  features = few_shot.features_of(model)
  of_head = few_shot.logits_of(features)

  def of_all(x, offset, images):
    return of_head(*optax.tree.add(x, offset), images)

  def support_loss(x, offset, episode):
    logits = of_all(x, offset, episode.support_images)
    return linear_head.cross_entropy(logits, episode.support_labels)

  is_maml = options == "maml"
  if is_maml:
    one = jaxbo.inner_solver(support_loss, optax.sgd(0.4), 1, warm_start=False)
  else:
    one = few_shot.head_solver(features, setting)
  inner = jaxbo.over_tasks(one, setting.num_tasks, average_start=not is_maml)
  if options == "drop":
    response = jaxbo.drop_response()
  elif isinstance(options, str):
    response = jaxbo.add_unrolled_response(inner)
  else:
    response = jaxbo.add_es_response(inner, smoothing=1e-3, key=0, **options)
  outer = optax.chain(response, optax.adam(1e-3))
  init_loop, step_loop = jaxbo.bilevel_loop(
    few_shot.query_loss(of_all if is_maml else of_head), inner, outer
  )

  def init(key, images):
    x = model.init(key, images)
    num_features = jax.eval_shape(model.apply, x, images).shape[-1]
    head = linear_head.zero_head(num_features, setting.num_ways)
    return init_loop((x, head), optax.tree.zeros_like((x, head))) if is_maml else init_loop(x, head)

  def step(state, episodes):
    state, info = step_loop(state, episodes, episodes)
    return state, info.outer_loss

  return init, step


def measure_row(name: str, calls: int, setting: Setting) -> dict[str, Any]:
  """Time, operations and memory of one step."""
  on_cpu = jax.default_backend() == "cpu"
  dtype = None if on_cpu else jnp.bfloat16
  # Outside of loops native convolutions are the faster ones; samples of ESJ run in a loop.
  loops = "parameters" in name or "MAML" in name
  model = ResNet12(conv="patches" if on_cpu and loops else "native", dtype=dtype)
  init, step = make_method(ROWS[name], model, setting)
  state = jax.jit(init)(jax.random.key(0), jnp.zeros((2, 84, 84, 3)))
  pixels = jax.random.bits(jax.random.key(1), (20, 10, 84, 84, 3), jnp.uint8)
  sample = jax.jit(few_shot.sample_episodes, static_argnums=2)
  episodes = sample(jax.random.key(2), pixels, setting)
  start = time.perf_counter()
  compiled = jax.jit(step).lower(state, episodes).compile()
  compile_seconds = time.perf_counter() - start
  timing = measure.time_together({"step": lambda: compiled(state, episodes)}, calls, 1)["step"]
  flops = measure.count_flops(step, state, episodes)
  row = {
    "method": name,
    "seconds": timing.seconds,
    "gflop": flops / 1e9,
    "gflop/s": flops / 1e9 / timing.seconds,
    "temp. MiB": measure.temporary_bytes(compiled) / 2**20,
    "compile s": compile_seconds,
  }
  print(row, flush=True)
  return row


def main() -> None:
  """Measures, prints, and saves if asked to."""
  args = arguments(__doc__, calls=(3, "calls of each program"), tasks=(1, "tasks of a meta-step"))
  setting = SETTING._replace(num_tasks=args.tasks)
  rows = [measure_row(name, args.calls, setting) for name in ROWS]
  cells = [
    [value if isinstance(value, str) else number(value) for value in row.values()] for row in rows
  ]
  text = (
    f"# One meta-step of ResNet-12\n\n{args.tasks} task, 84 x 84 x 3. {hardware()}.\n\n"
    f"{markdown(list(rows[0]), cells)}\n"
  )
  print(text)
  save(args.save, text, {"hardware": hardware(), "rows": rows})


if __name__ == "__main__":
  main()
