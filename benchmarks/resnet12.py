"""One meta-step of ResNet-12 at 84 x 84 x 3: ESJ beside ITD, MAML and first order.

  PYTHONPATH=.:models python3 -m benchmarks.resnet12            (about 10 minutes on 2 cores)
  ... --save benchmarks/results/resnet12_cpu                    (writes .md and .json as well)

12,424,320 parameters, one task of 5-way 5-shot with 5 queries a class, 30 steps of the head; MAML
takes one step on all parameters. A row is a whole step, Adam included. *GFLOP* are
counted in the jaxpr, loops included. On an accelerator the backbone computes in bfloat16.
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
from jaxbo_models import ResNet12

import jaxbo
from benchmarks import measure
from benchmarks.report import arguments, hardware, markdown, number, save
from scripts.common.fewshot_data import ImageClasses
from scripts.few_shot import problem as few_shot
from scripts.few_shot import setting as few_shot_setting
from scripts.few_shot.__main__ import DATASETS

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
  options: dict[str, Any] | str, model: Any, settings: few_shot_setting.Settings
) -> few_shot.Method:
  """The few-shot method that ``options`` stand for, on that model."""
  apply = lambda x, images: jnp.asarray(model.apply(x, images))
  backbone = few_shot.Backbone(model.init, apply, apply)
  if options == "maml":
    return few_shot.maml(backbone, settings, 1)
  responses = {"drop": lambda inner: jaxbo.drop_response(), "itd": jaxbo.add_unrolled_response}

  def make_response(inner, settings, key):
    del settings
    if isinstance(options, str):
      return responses[options](inner)
    return jaxbo.add_es_response(inner, smoothing=1e-3, key=key, **options)

  return few_shot.head_method(make_response, backbone, settings, 1, seed=0)


def measure_row(name: str, calls: int, settings: few_shot_setting.Settings) -> dict[str, Any]:
  """Time, operations and memory of one step."""
  on_cpu = jax.default_backend() == "cpu"
  dtype = None if on_cpu else jnp.bfloat16
  # Outside of loops native convolutions are the faster ones; samples of ESJ run in a loop.
  loops = "parameters" in name or "MAML" in name
  model = ResNet12(conv="patches" if on_cpu and loops else "native", dtype=dtype)
  method = make_method(ROWS[name], model, settings)
  images = jnp.zeros((2, 84, 84, 3), jnp.uint8)
  state = jax.jit(method.init)(jax.random.key(0), images)
  pixels = jax.random.bits(jax.random.key(1), (20, 10, 84, 84, 3), jnp.uint8)
  sample = few_shot_setting.sampler(settings, 1, settings.num_tasks)
  classes = ImageClasses(pixels, jnp.full(20, 10, jnp.int32), jnp.arange(20))
  episodes = jax.jit(sample)(jax.random.key(2), classes)
  start = time.perf_counter()
  compiled = jax.jit(method.step).lower(state, episodes).compile()
  compile_seconds = time.perf_counter() - start
  timing = measure.time_together({"step": lambda: compiled(state, episodes)}, calls, 1)["step"]
  flops = measure.count_flops(method.step, state, episodes)
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
  settings = dataclasses.replace(DATASETS["caltech101_fewshot"], num_tasks=args.tasks)
  rows = [measure_row(name, args.calls, settings) for name in ROWS]
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
