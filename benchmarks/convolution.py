"""Convolutions: XLA's own beside a product of patches, in a compiled loop and outside.

  PYTHONPATH=.:models python3 -m benchmarks.convolution         (about 5 minutes on 2 cores)
  ... --save benchmarks/results/convolution_cpu                 (writes .md and .json as well)

A number is milliseconds of one training step (forward, backward, SGD) in float32: in a ``scan`` of
two steps, or alone. `jaxbo_models.layers.convolution` chooses between the two.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxbo_models import Conv4, LeNet5, ResNet12

from benchmarks import measure
from benchmarks.report import arguments, hardware, markdown, number, save

MODELS = {
  "LeNet5, 256 of 32x32x1": (LeNet5, (256, 32, 32, 1)),
  "Conv4, 25 of 28x28x1": (Conv4, (25, 28, 28, 1)),
  "ResNet12, 5 of 84x84x3": (ResNet12, (5, 84, 84, 3)),
}
STEPS = 2


def measure_row(name: str, make_model: Any, shape: tuple[int, ...], rounds: int) -> dict[str, Any]:
  """Milliseconds of a step in four ways, timed in turns."""
  images = jax.random.uniform(jax.random.key(0), shape)
  params = jax.jit(make_model().init)(jax.random.key(1), images)
  programs = {}
  for conv in ("native", "patches"):
    model = make_model(conv=conv)

    def step(params, images, model=model):
      gradient = jax.grad(lambda params: jnp.mean(model.apply(params, images) ** 2))(params)
      return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)

    def steps(params, images, step=step):
      return jax.lax.scan(lambda p, _: (step(p, images), None), params, length=STEPS)[0]

    for column, program in (("in scan", steps), ("no loop", step)):
      compiled = jax.jit(program).lower(params, images).compile()
      programs[f"{conv}, {column}"] = lambda run=compiled: run(params, images)
  timings = measure.time_together(programs, rounds, 1)
  milliseconds = {
    column: 1e3 * timing.seconds / (STEPS if "scan" in column else 1)
    for column, timing in timings.items()
  }
  return {"model, images": name, **milliseconds}


def main() -> None:
  """Measures, prints, and saves if asked to."""
  args = arguments(__doc__, rounds=(3, "turns of each program"))
  rows = []
  for name, (make_model, shape) in MODELS.items():
    rows.append(measure_row(name, make_model, shape, args.rounds))
    print(rows[-1], flush=True)
  cells = [
    [value if isinstance(value, str) else number(value) for value in row.values()] for row in rows
  ]
  text = f"# Convolutions\n\nMilliseconds of a step. {hardware()}.\n\n"
  text += f"{markdown(list(rows[0]), cells)}\n"
  print(text)
  save(args.save, text, {"hardware": hardware(), "rows": rows})


if __name__ == "__main__":
  main()
