"""Language models: tokens per second and model FLOPs utilization, plain and reweighted.

  PYTHONPATH=.:models python3 -m benchmarks.language_model          (a smoke test, seconds on a CPU)
  ... --preset gpt2 --save benchmarks/results/language_model_gpt2   (124M parameters, for a GPU)
  ... --preset gpt2 --batch 32 --sweep                              (what each option is worth)

One training step on random tokens: the gradient of the mean of the sequences' losses ("plain") or
of the losses reweighted by IR-DRO ("reweighted"), and AdamW; parameters are in float32. *ms* is the
median over rounds in which both programs have a turn, *x plain* the median over rounds of the ratio
to the plain step in the same round, and *spread* half the distance between the quartiles of that
ratio.

*MFU* is the model's own operations per second as a share of the device's peak (Chowdhery et al.,
PaLM, https://arxiv.org/abs/2204.02311, appendix B). A token counts ``6 N + 12 L D T`` operations,
where ``N`` is the number of parameters in matrix products (the head, but no embedding tables),
``L`` the number of layers, ``D`` the width and ``T`` the length. What ``--remat`` computes again
does not count, and attention counts as if it were not causal. Peaks are the vendors', in bfloat16
and without sparsity.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import tyro
from jaxbo_models import transformer

import jaxbo
from benchmarks import measure
from benchmarks.hypergradient import Step
from benchmarks.report import hardware, markdown, number, save

PLAIN, REWEIGHTED = "plain", "reweighted"
OPTIMIZER = optax.adamw(1e-4)
PRESETS = {
  "tiny": transformer.gpt2(vocab_size=257, max_length=64, num_layers=2, width=64, num_heads=4),
  "gpt2": transformer.gpt2(),
  "opt": transformer.opt(),
  "pythia": transformer.pythia(),
  "smollm": transformer.smollm(),
  "llama": transformer.llama(),
}
# By what is in the name of the device, the more special first.
PEAK_TERAFLOPS = {
  "H200": 989.0,
  "H100 PCIe": 756.0,
  "H100": 989.0,
  "A100": 312.0,
  "TPU v6 lite": 918.0,
  "TPU v5 lite": 197.0,
  "TPU v5": 459.0,
  "TPU v4": 275.0,
}


@dataclasses.dataclass(frozen=True)
class Config:
  """Tokens a second and model FLOPs utilization of training a language model."""

  preset: Literal["tiny", "gpt2", "opt", "pythia", "smollm", "llama"] = "tiny"
  """The model; gpt2 has 124M parameters, opt 125M, pythia 162M, smollm 135M, llama 1.2B."""
  batch: int = 8
  """Sequences in a batch."""
  length: int | None = None
  """Tokens in a sequence; by default as many as the model takes, 1,024 at most."""
  dtype: Literal["bfloat16", "float32"] = "bfloat16"
  """Of products and activations."""
  attention: Literal["xla", "cudnn"] | None = None
  """The implementation of attention; jax chooses by default."""
  remat: Literal["no", "all", "dots_saveable", "dots_with_no_batch_dims_saveable"] = "no"
  """What of a block the backward pass computes again: all, or all but (some) products."""
  unroll: int = 1
  """Blocks in one step of the scan over blocks."""
  chunk_length: int | None = None
  """At how many positions logits exist at a time; by default at all."""
  cast_once: bool = False
  """Cast kernels once a step, not in each block and pass."""
  sweep: bool = False
  """Measure these settings, then with one option after another, each with those before it."""
  rounds: int = 11
  """Turns of each program."""
  calls: int = 5
  """Calls in a turn."""
  peak: float | None = None
  """The device's peak in Tflop/s, where the table of this file has none or another."""
  save: Path | None = None
  """Path without suffix, for .md and .json."""

  def check(self) -> None:
    """Raises ``ValueError`` for what cannot run; the model checks the rest."""
    for name in ("batch", "rounds", "calls", "peak"):
      value = getattr(self, name)
      if value is not None and not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
    model = PRESETS[self.preset]
    if self.length is not None and not 2 <= self.length <= model.max_length:
      raise ValueError(f"length must be in [2, {model.max_length}], got {self.length}")

  def model(self) -> transformer.TransformerConfig:
    """The preset, computed as was asked for."""
    return dataclasses.replace(
      PRESETS[self.preset],
      dtype=getattr(jnp, self.dtype),
      attention=self.attention,
      remat={"no": False, "all": True}.get(self.remat, self.remat),
      unroll=self.unroll,
    )

  def variants(self) -> dict[str, "Config"]:
    """What is measured, by name."""
    if not self.sweep:
      return {"": self}
    options: dict[str, dict[str, Any]] = {
      "as given": {},
      "losses in chunks": {"chunk_length": 128},
      "blocks unrolled": {"unroll": PRESETS[self.preset].num_layers},
      "kernels cast once": {"cast_once": True},
      "products kept, the rest computed again": {"remat": "dots_with_no_batch_dims_saveable"},
    }
    variants, config = {}, self
    for name, changes in options.items():
      variants[name] = config = dataclasses.replace(config, **changes)
    return variants


def flops_per_token(config: transformer.TransformerConfig, params: Any, length: int) -> int:
  """The operations of the model itself in one step of training."""
  looked_up = {"position_embedding"} | (set() if config.tied_head else {"token_embedding"})
  multiplied = {name: leaves for name, leaves in params.items() if name not in looked_up}
  num_multiplied = sum(leaf.size for leaf in jax.tree.leaves(multiplied))
  heads_width = config.num_heads * config.head_dim
  return 6 * num_multiplied + 12 * config.num_layers * heads_width * length


def robust_step(loss_fn: Any, tx: Any, params: Any, state: Any, batch: Any) -> Any:
  """A step of robust training: ``tx`` begins by reweighting."""
  grads: Any = jaxbo.per_example_grad(loss_fn)(params, batch)
  updates, state = tx.update(grads, state, params)
  return optax.apply_updates(params, updates), state, jnp.mean(grads.losses)


def plain_step(loss_fn: Any, params: Any, state: Any, batch: Any) -> Any:
  """A step of ordinary training."""
  mean_loss = lambda params: jnp.mean(loss_fn(params, batch))
  loss, grads = jax.value_and_grad(mean_loss)(params)
  updates, state = OPTIMIZER.update(grads, state, params)
  return optax.apply_updates(params, updates), state, loss


def cast_kernels(params: Any, dtype: Any) -> Any:
  """Parameters with the kernels in ``dtype``, as each layer would cast them."""
  is_kernel = lambda path: path[-1].key == "kernel"
  return jax.tree.map_with_path(
    lambda p, leaf: leaf.astype(dtype) if is_kernel(p) else leaf, params
  )


def make_steps(config: Config, length: int) -> dict[str, Step]:
  """Both programs with their arguments; the plain one is the first."""
  model = transformer.Transformer(config.model())
  size, vocab_size = (config.batch, length), model.config.vocab_size
  tokens = jax.random.randint(jax.random.key(1), size, 0, vocab_size)
  params = jax.jit(model.init)(jax.random.key(0), tokens[:1])["params"]
  loss_fn: Any = transformer.sequence_losses(model, chunk_length=config.chunk_length)
  if config.cast_once:
    uncast = loss_fn
    loss_fn = lambda params, batch: uncast(cast_kernels(params, model.config.dtype), batch)
  tx = optax.chain(jaxbo.reweight(jaxbo.dro.kl(0.5)), OPTIMIZER)
  plain = jax.jit(functools.partial(plain_step, loss_fn))
  reweighted = jax.jit(functools.partial(robust_step, loss_fn, tx))
  batch = {"tokens": tokens}
  return {
    PLAIN: Step(plain, (params, OPTIMIZER.init(params), batch)),
    REWEIGHTED: Step(reweighted, (params, tx.init(params), batch)),
  }


def peak_flops(given: float | None) -> float:
  """What the device can do in a second; NaN if nobody says."""
  kind = jax.devices()[0].device_kind
  known = (peak for name, peak in PEAK_TERAFLOPS.items() if name in kind)
  return 1e12 * (given or next(known, float("nan")))


def table(
  name: str, steps: dict[str, Step], per_token: int, num_tokens: int, config: Config
) -> list[dict[str, Any]]:
  """A row for each program of the variant ``name``; the first is the baseline."""
  compiled = {name: step.fn.lower(*step.args).compile() for name, step in steps.items()}
  programs = {name: functools.partial(compiled[name], *step.args) for name, step in steps.items()}
  timings = measure.time_together(programs, config.rounds, config.calls)
  rows = []
  for step, timing in timings.items():
    flops = num_tokens * per_token / timing.seconds
    rows.append(
      {
        **({"variant": name} if config.sweep else {}),
        "step": step,
        "ms": 1e3 * timing.seconds,
        "x plain": timing.ratio,
        "spread": timing.spread,
        "tokens/s": num_tokens / timing.seconds,
        "Tflop/s": flops / 1e12,
        "MFU": flops / peak_flops(config.peak),
        "temp. MiB": measure.temporary_bytes(compiled[step]) / 2**20,
      }
    )
  return rows


def main(config: Config) -> None:
  """Measures, prints, and saves if asked to."""
  config.check()
  model = config.model()
  length = config.length or min(model.max_length, 1024)
  rows, per_token, num_parameters = list[dict[str, Any]](), 0, 0
  for name, variant in config.variants().items():
    steps = make_steps(variant, length)
    params = steps[PLAIN].args[0]
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    per_token = flops_per_token(model, params, length)
    rows += table(name, steps, per_token, config.batch * length, variant)
  text_of = lambda value: value if isinstance(value, str) else number(value)
  cells = [[*map(text_of, row.values())] for row in rows]
  settings = {**dataclasses.asdict(config), "length": length, "save": None}
  text = (
    f"# Training a language model\n\n{config.preset}, {num_parameters:,} parameters, "
    f"{config.dtype}, batches of {config.batch} x {length} tokens, "
    f"attention {config.attention or 'by default'}, "
    f"remat {config.remat}, unroll {config.unroll}, chunks {config.chunk_length or 'no'}; "
    f"{number(per_token / 1e6)} Mflop a token, peak {number(peak_flops(config.peak) / 1e12)} "
    f"Tflop/s. Hardware: {hardware()}.\n\n{markdown(list(rows[0]), cells)}\n"
  )
  print(text)
  save(config.save, text, {"hardware": hardware(), "settings": settings, "rows": rows})


if __name__ == "__main__":
  main(tyro.cli(Config))
