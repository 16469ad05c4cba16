"""Captioning: training steps and beam search, compared with plain Python loops.

  PYTHONPATH=.:models python3 -m benchmarks.captioning              (a smoke test, seconds on a CPU)
  ... --preset published --save benchmarks/results/captioning_gpu   (20.7M parameters, for a GPU)

Both programs of a task have the same weights and do the same work. *Training* is the gradient of
the captions' losses and Adam: "scan" is ``GuidedCaptioner`` as it is; "Python loop" calls its step
for each word, in one compiled function, and multiplies words and logits one by one. *Beam search*
is the compiled ``beam_search``, or a Python loop around the compiled step that keeps its hypotheses
on the host, as the reference code of captioning does. No caption may end early, so both take all
steps.

*ms* is the median over rounds in which both programs have a turn, *x loop* the median over rounds
of the ratio to the loop in the same round, and *spread* half the distance between the quartiles of
that ratio. *captions/s* counts those trained on, or one for each image. *Tflop/s* counts the matrix
products of the model (``product_flops``) and *MFU* is its share of the device's peak, as in
``benchmarks/language_model.py``. *compile s* is the time until a program can run.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jaxbo_models import captioner

from benchmarks import measure
from benchmarks.language_model import peak_flops
from benchmarks.report import hardware, markdown, number, save

LOOP, SCAN = "Python loop", "scan"
OPTIMIZER = optax.adam(5e-4)
BOS, EOS = 1, 2


class Preset(NamedTuple):
  """Sizes: of the model, and of what it reads."""

  model: captioner.GuidedCaptioner
  num_cells: int
  feature_dim: int
  batch: int
  length: int


PRESETS = {
  "tiny": Preset(captioner.GuidedCaptioner(19, 16, 32, 16), 16, 24, batch=4, length=8),
  "published": Preset(captioner.GuidedCaptioner(9488), 196, 2048, batch=50, length=17),
}


@dataclasses.dataclass(frozen=True)
class Config:
  """Steps of training and captions of a beam search, a second."""

  preset: Literal["tiny", "published"] = "tiny"
  """The sizes; published is 20.7M parameters, 196 cells of 2048 features, 50 captions of 17."""
  batch: int | None = None
  """Captions in a batch; by default the preset's."""
  beam: int = 5
  """The beam's width."""
  max_length: int | None = None
  """Tokens of a caption found; by default the preset's length."""
  dtype: Literal["bfloat16", "float32"] = "bfloat16"
  """Of products and hidden states."""
  remat: bool = False
  """Recompute steps of the scan in the backward pass."""
  unroll: int = 1
  """Words in one step of the scan."""
  rounds: int = 11
  """Turns of each program."""
  calls: int = 5
  """Calls in a turn."""
  peak: float | None = None
  """The device's peak in Tflop/s, where the table of benchmarks/language_model.py has none."""
  save: Path | None = None
  """Path without suffix, for .md and .json."""

  def check(self) -> None:
    """Raises ``ValueError`` for what cannot run; the model checks the rest."""
    for name in ("batch", "beam", "max_length", "rounds", "calls", "peak"):
      value = getattr(self, name)
      if value is not None and not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")

  def sizes(self) -> Preset:
    """The preset, as was asked for."""
    preset = PRESETS[self.preset]
    dtype = getattr(jnp, self.dtype)
    model = preset.model.clone(dtype=dtype, remat=self.remat, unroll=self.unroll)
    return preset._replace(model=model, batch=self.batch or preset.batch)


class Program(NamedTuple):
  """A function with all of its arguments, and what it took to compile."""

  run: functools.partial[Any]
  compile_seconds: float
  temporary_bytes: float


def product_flops(sizes: Preset, words: int, *, training: bool) -> int:
  """Operations in the matrix products for one image and so many words read, attention included.

  Training has two more products for each, but one where a factor has no gradient: the features.
  """
  model, cells = sizes.model, sizes.num_cells
  width, keys, vocab = model.hidden_dim, model.attention_dim, model.vocab_size
  features = sizes.feature_dim * width * (cells + 1)
  per_image = cells * width * keys + 4 * width * width
  guide = 4 * width * (model.embed_dim + 2 * width)
  attention = width * keys + cells * (keys + width)
  decoder = 4 * width * (model.embed_dim + 3 * width)
  rest = per_image + words * (guide + attention + decoder + width * vocab)
  return 2 * (2 * features + 3 * rest) if training else 2 * (features + rest)


def loop_losses(model: captioner.GuidedCaptioner, params: Any, batch: Any) -> jax.Array:
  """The captions' losses, by a loop in Python over words."""
  apply = lambda method, *args: model.apply({"params": params}, *args, method=method)
  encoded: Any = apply("encode", batch["features"])
  state, tokens = apply("initial_state", encoded), batch["tokens"]
  total = jnp.zeros(len(tokens))
  for t in range(tokens.shape[1] - 1):
    result: Any = apply("step", tokens[:, t], state, encoded)
    log_probabilities, state = result
    total -= jnp.take_along_axis(log_probabilities, tokens[:, t + 1, None], axis=1)[:, 0]
  return total


def train_step(loss_fn: Any, params: Any, state: Any, batch: Any) -> Any:
  """A step of Adam on the mean of the captions' losses."""
  loss, grads = jax.value_and_grad(lambda params: jnp.mean(loss_fn(params, batch)))(params)
  updates, state = OPTIMIZER.update(grads, state, params)
  return optax.apply_updates(params, updates), state, loss


def scan_search(sizes: Preset, beam: int, max_length: int, params: Any, features: Any) -> Any:
  """Tokens and log-probabilities of the beam, in one compiled function."""
  step_fn, state = captioner.make_step(sizes.model, params, features)
  return captioner.beam_search(
    step_fn,
    state,
    batch_size=len(features),
    beam_size=beam,
    max_length=max_length,
    bos_id=BOS,
    eos_id=EOS,
    forbidden=jnp.arange(sizes.model.vocab_size) == EOS,
  )


def make_loop_search(sizes: Preset, beam: int, max_length: int) -> tuple[Any, Any, Any]:
  """The same by a loop in Python; ``begin`` and ``step`` are to be compiled, then given to it."""
  model = sizes.model

  def begin(params, features):
    apply = lambda method, *args: model.apply({"params": params}, *args, method=method)
    encoded: Any = apply("encode", features)
    state = apply("initial_state", encoded)
    repeat = lambda x: jnp.broadcast_to(x[:, None], (len(x), beam, *x.shape[1:]))
    return encoded, jax.tree.map(repeat, state)

  def step(params, encoded, state, parent, tokens):
    state = jax.tree.map(lambda x: jax.vmap(lambda row, i: row[i])(x, parent), state)
    return model.apply({"params": params}, tokens, state, encoded, method="step")

  def search(begin, step, params):
    encoded, state = begin()
    batch = sizes.batch
    captions = [[[] for _ in range(beam)] for _ in range(batch)]
    sums = np.full((batch, beam), -np.inf, np.float32)
    sums[:, 0] = 0
    parent, tokens = np.zeros((batch, beam), np.int32), np.full((batch, beam), BOS, np.int32)
    for _ in range(max_length):
      log_probabilities, state = step(params, encoded, state, parent, tokens)
      options = np.array(log_probabilities) + sums[:, :, None]
      options[:, :, EOS] = -np.inf
      for row in range(batch):
        flat = options[row].ravel()
        best = np.argpartition(-flat, beam)[:beam]
        best = best[np.argsort(-flat[best], kind="stable")]
        sums[row], parent[row] = flat[best], best // model.vocab_size
        tokens[row] = best % model.vocab_size
        chosen = zip(parent[row], tokens[row], strict=True)
        captions[row] = [[*captions[row][origin], int(token)] for origin, token in chosen]
    return np.array(captions), sums

  return begin, step, search


def make_programs(sizes: Preset, beam: int, max_length: int) -> dict[str, dict[str, Program]]:
  """For each task both programs, compiled; the loop is the first."""
  model, shape = sizes.model, (sizes.batch, sizes.num_cells, sizes.feature_dim)
  features = jax.nn.relu(jax.random.normal(jax.random.key(1), shape))
  tokens = jax.random.randint(
    jax.random.key(2), (sizes.batch, sizes.length + 1), 3, model.vocab_size
  )
  batch = {"features": features, "tokens": tokens.at[:, 0].set(BOS)}
  params = jax.jit(model.init)(jax.random.key(0), features[:1], tokens[:1])["params"]

  losses = {LOOP: functools.partial(loop_losses, model), SCAN: captioner.caption_losses(model)}
  training = {}
  for name, loss_fn in losses.items():
    args = params, OPTIMIZER.init(params), batch
    training[name] = compile_program(functools.partial(train_step, loss_fn), *args)

  begin, step, search = make_loop_search(sizes, beam, max_length)
  first = compile_program(begin, params, features)
  encoded, state = first.run()
  indices = np.zeros((sizes.batch, beam), np.int32)
  second = compile_program(step, params, encoded, state, indices, indices)
  loop = functools.partial(search, first.run, second.run.func, params)
  scan = functools.partial(scan_search, sizes, beam, max_length)
  seconds = first.compile_seconds + second.compile_seconds
  searching = {
    LOOP: Program(loop, seconds, second.temporary_bytes),
    SCAN: compile_program(scan, params, features),
  }
  return {"training": training, f"beam {beam}": searching}


def compile_program(fn: Callable[..., Any], *args: Any) -> Program:
  """``fn`` on its arguments, compiled."""
  start = time.perf_counter()
  compiled = jax.jit(fn).lower(*args).compile()
  seconds = time.perf_counter() - start
  run = functools.partial(compiled, *args)
  return Program(run, seconds, measure.temporary_bytes(compiled))


def table(programs: Any, config: Config, sizes: Preset, max_length: int) -> list[dict[str, Any]]:
  """A row for each task and program."""
  rows = []
  for task, pair in programs.items():
    if task == "training":
      flops = sizes.batch * product_flops(sizes, sizes.length, training=True)
    else:
      # The features are embedded once for all beams, and words are read by each.
      words = config.beam * max_length
      flops = sizes.batch * product_flops(sizes, words, training=False)
    runs = {name: program.run for name, program in pair.items()}
    for name, timing in measure.time_together(runs, config.rounds, config.calls).items():
      rate = flops / timing.seconds
      rows.append(
        {
          "task": task,
          "program": name,
          "ms": 1e3 * timing.seconds,
          "x loop": timing.ratio,
          "spread": timing.spread,
          "steps/s": 1 / timing.seconds,
          "captions/s": sizes.batch / timing.seconds,
          "Tflop/s": rate / 1e12,
          "MFU": rate / peak_flops(config.peak),
          "compile s": pair[name].compile_seconds,
          "temp. MiB": pair[name].temporary_bytes / 2**20,
        }
      )
  return rows


def main(config: Config) -> None:
  """Measures, prints, and saves if asked to."""
  config.check()
  sizes = config.sizes()
  max_length = config.max_length or sizes.length
  rows = table(make_programs(sizes, config.beam, max_length), config, sizes, max_length)
  cells = [
    [row["task"], row["program"], *(number(value) for value in list(row.values())[2:])]
    for row in rows
  ]
  settings = {**dataclasses.asdict(config), "save": None}
  flops = product_flops(sizes, sizes.length, training=True)
  text = (
    f"# Captioning\n\n{config.preset}, {config.dtype}, {sizes.batch} captions of {sizes.length} "
    f"tokens, {sizes.num_cells} cells of {sizes.feature_dim} features, beam {config.beam} with "
    f"{max_length} tokens, {'with' if config.remat else 'without'} remat, unroll {config.unroll}; "
    f"{number(flops / 1e9)} Gflop a caption in training, peak "
    f"{number(peak_flops(config.peak) / 1e12)} Tflop/s. Hardware: {hardware()}.\n\n"
    f"{markdown(list(rows[0]), cells)}\n"
  )
  print(text)
  save(config.save, text, {"hardware": hardware(), "settings": settings, "rows": rows})


if __name__ == "__main__":
  main(tyro.cli(Config))
