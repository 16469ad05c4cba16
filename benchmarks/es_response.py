"""The ES response: how many samples to run at once, and what perturbing the features buys.

  PYTHONPATH=.:models python3 -m benchmarks.es_response             (about 4 minutes on 2 cores)
  ... --save benchmarks/results/es_response_cpu                     (writes .md and .json as well)

*Chunks*: the time of a step of ESJ with 64 samples on the hyper-cleaning problem of scikit-learn's
digits, in units of an inner solve in the same round. Rows differ in how many samples run at once,
and in whether directions are drawn again for the sum or kept.

*Features*: Conv4 with 64 channels under a linear head, 4 tasks of 5-way 5-shot on drawn glyphs, at
the initial parameters. The cosine and the relative error are those of the estimated response
against the exact one (ITD), averaged over keys. A response through the features has noise in 1,600
features per task instead of 111,936 parameters, and its samples do not run the backbone.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxbo_models import Conv4, linear_head

import jaxbo
from benchmarks import few_shot, measure, problems
from benchmarks.glyphs import draw_glyphs
from benchmarks.hypergradient import Step, jaxbo_step
from benchmarks.report import arguments, hardware, markdown, number, save

NUM_SAMPLES, CHUNKS = 64, (1, 4, 8, 16, 32, 64)
PLANS = [
  *(("parameters", q, "gaussian") for q in (1, 4, 16)),
  *(("features", q, "gaussian") for q in (1, 4, 16, 64, 256)),
  *(("features", q, "orthogonal") for q in (256, 1600)),
]


def chunk_rows(num_rounds: int) -> list[dict[str, Any]]:
  """Time and memory for each chunk size, drawn twice and once."""
  problem = problems.digits()
  inner = jaxbo.inner_solver(problem.inner_loss, problem.optimizer, problem.num_steps)
  steps: dict[Any, Step] = {}
  for redraw in (True, False):
    for chunk in CHUNKS:
      head = jaxbo.add_es_response(
        inner, NUM_SAMPLES, sample_batch_size=chunk, redraw=redraw, key=0
      )
      steps[chunk, redraw] = jaxbo_step(problem, inner, head)
  x, solution, _, train, _ = steps[1, True].args
  base: dict[Any, Step] = {"inner solve": Step(jax.jit(inner.solve), (x, solution, train))}
  timings = measure.time_together(base | steps, num_rounds, 3)
  return [
    {
      "chunk": chunk,
      "directions": "drawn twice" if redraw else "kept",
      "inner_solves": timings[chunk, redraw].ratio,
      "of_q_plus_1": timings[chunk, redraw].ratio / (NUM_SAMPLES + 1),
      "kib": measure.temporary_bytes(step.fn.lower(*step.args).compile()) / 2**10,
    }
    for (chunk, redraw), step in steps.items()
  ]


def feature_rows(num_keys: int, width: int = 64, num_tasks: int = 4) -> list[dict[str, Any]]:
  """Time and cosine of both kinds of perturbation."""
  setting = few_shot.Setting(num_tasks=num_tasks)
  glyphs = jnp.asarray(draw_glyphs(50, 20))
  native, patches = (Conv4(width, conv=conv) for conv in ("native", "patches"))
  x = native.init(jax.random.key(0), glyphs[:2, 0] / 255)
  sample = jax.jit(few_shot.sample_episodes, static_argnums=2)
  episodes = sample(jax.random.key(1), glyphs, setting)

  def solved(model):
    features = few_shot.features_of(model)
    inner = jaxbo.over_tasks(few_shot.head_solver(features, setting), num_tasks)
    num_features = features(x, glyphs[:2, 0]).shape[-1]
    start = linear_head.zero_head(num_features, setting.num_ways)
    solution = jax.jit(inner.solve)(x, inner.init(start), episodes)
    outer_loss = few_shot.query_loss(few_shot.logits_of(features))
    inner_grad = jax.jit(jax.grad(outer_loss, 1))(x, solution.params, episodes)
    return inner, solution, (optax.tree.zeros_like(x), inner_grad)

  def response(make, model):
    inner, solution, grads = solved(model)

    def update(key, x, solution, grads, episodes):  # A closure's arrays would be constants.
      head = make(inner, key)
      return head.update(grads, head.init(x), x, solution=solution, batch=episodes)[0]

    return Step(jax.jit(update), (0, x, solution, grads, episodes))

  flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
  exact = flat(response(lambda inner, key: jaxbo.add_unrolled_response(inner), native)())
  rows = []
  for perturbed, q, directions in PLANS:
    features = perturbed == "features"
    make = functools.partial(
      lambda inner, key, **options: jaxbo.add_es_response(inner, key=key, **options),
      num_samples=q,
      directions=directions,
      per_task=features,
      perturb_features=features,
      sample_batch_size=64 if features else 1,
    )
    step = response(make, native if features else patches)
    estimates = [flat(step.fn(key, *step.args[1:])) for key in range(2, 2 + num_keys)]
    cosines = [e @ exact / np.linalg.norm(e) / np.linalg.norm(exact) for e in estimates]
    errors = [np.sum((e - exact) ** 2) / np.sum(exact**2) for e in estimates]
    seconds = measure.time_together({"step": step}, 3, 1)["step"].seconds
    rows.append(
      {
        "perturbed": perturbed,
        "directions": directions,
        "samples": q,
        "ms": 1e3 * seconds,
        "cosine": float(np.mean(cosines)),
        "squared_error": float(np.mean(errors)),
      }
    )
    print(rows[-1], flush=True)
  return rows


def main() -> None:
  """Measures, prints, and saves if asked to."""
  args = arguments(
    __doc__, rounds=(15, "turns of each program"), keys=(5, "keys for cosines and errors")
  )
  data = {
    "hardware": hardware(),
    "chunks": chunk_rows(args.rounds),
    "features": feature_rows(args.keys),
  }
  sections = [f"# The ES response\n\nHardware: {hardware()}."]
  for name in ("chunks", "features"):
    rows = data[name]
    cells = [
      [value if isinstance(value, str) else number(value) for value in row.values()] for row in rows
    ]
    columns = [column.replace("_", " ") for column in rows[0]]
    sections.append(f"## {name.capitalize()}\n\n{markdown(columns, cells)}")
  text = "\n\n".join(sections) + "\n"
  print(text)
  save(args.save, text, data)


if __name__ == "__main__":
  main()
