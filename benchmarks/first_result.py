"""What a user waits for first: seconds from the start of Python to the first result.

Each program runs in a process of its own, as a user would start it: without a persistent
compilation cache, with an empty one, and with the one that the run before has filled
(``JAX_COMPILATION_CACHE_DIR``). ``import optax`` stands beside ``import jaxbo``, which needs it.

  uv run python -m benchmarks.first_result
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.report import arguments, number, show

RIDGE = """
import jax, jax.numpy as jnp, jaxbo, optax
a = jax.random.normal(jax.random.key(0), (2, 20, 8))
b = a @ jnp.ones(8)
outer_loss = lambda x, y, batch: jnp.mean((batch[0] @ y - batch[1]) ** 2)
inner_loss = lambda x, y, batch: outer_loss(x, y, batch) + jnp.exp(x) * jnp.sum(y**2)
inner = jaxbo.inner_solver(inner_loss, optax.sgd(0.1), num_steps=20)
response = {response}
init, step = jaxbo.bilevel_loop(outer_loss, inner, optax.chain(response, optax.adam(0.05)))
state, step = init(jnp.float32(1.0), jnp.zeros(8)), jax.jit(step)
state, info = step(state, (a[0], b[0]), (a[1], b[1]))
print(float(info.outer_loss))
"""
ATTACK = """
import jax, jax.numpy as jnp, jaxbo
from jaxbo_models import SmallCNN
images, labels = jax.random.uniform(jax.random.key(0), (8, 28, 28, 1)), jnp.arange(8)
network = SmallCNN(10)
params = network.init(jax.random.key(1), images)
box = jaxbo.adversarial.Box(0.1)
attack = jaxbo.adversarial.pgd(network.apply, box, step_size=0.02, num_steps=10)
print(float(attack(params, (images, labels), 0).sum()))
"""
PROGRAMS = {
  "import optax": "import optax",
  "import jaxbo": "import jaxbo",
  "README's bilevel step (AID-CG)": RIDGE.format(
    response="jaxbo.add_implicit_response(inner, jaxbo.conjugate_gradient(8))"
  ),
  "the same with ESJ, 16 samples": RIDGE.format(
    response="jaxbo.add_es_response(inner, num_samples=16)"
  ),
  "PGD on a small CNN, 10 steps": ATTACK,
}
CLEANING = "hyper-cleaning, the smallest run"


def seconds(command: list[str], cache: str | None) -> float:
  """The time of a process; raises ``CalledProcessError`` if it fails."""
  environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
  if cache is not None:
    environment |= {
      "JAX_COMPILATION_CACHE_DIR": cache,
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
  start = time.perf_counter()
  subprocess.run(command, check=True, capture_output=True, env=environment)
  return time.perf_counter() - start


def measure(name: str, rounds: int) -> dict[str, Any]:
  """Medians for a program."""
  found: dict[str, list[float]] = {"no cache": [], "empty cache": [], "full cache": []}
  for _ in range(rounds):
    with tempfile.TemporaryDirectory() as folder:
      command = [sys.executable, "-c", PROGRAMS.get(name, "")]
      if name == CLEANING:
        options = ["--smoke", "--overwrite", "--output-dir", f"{folder}/run"]
        command = [sys.executable, "-m", "scripts.hyper_cleaning", *options]
      found["no cache"].append(seconds(command, None))
      found["empty cache"].append(seconds(command, f"{folder}/cache"))
      found["full cache"].append(seconds(command, f"{folder}/cache"))
  return {"program": name} | {case: statistics.median(times) for case, times in found.items()}


def main() -> None:
  """Measures, prints, and saves if asked to."""
  args = arguments(__doc__, rounds=(3, "runs of each, of which the median counts"))
  rows = [measure(name, args.rounds) for name in (*PROGRAMS, CLEANING)]
  columns = ["seconds to the first result", *list(rows[0])[1:]]
  lines = [[row["program"], *(number(row[name]) for name in columns[1:])] for row in rows]
  show(args.save, columns, lines, rows)


if __name__ == "__main__":
  main()
