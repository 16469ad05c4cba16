"""Compares random configurations of every family with transformers; not run in CI.

  uv run --no-project --isolated --with transformers --with torch --with numpy \
    python tests/models/sweep.py make FOLDER COUNT [FIRST_SEED]
  PYTHONPATH=.:models python tests/models/sweep.py compare FOLDER
  uv run ... python tests/models/sweep.py verify FOLDER

The first command makes tiny random models and their logits in float32. The second loads them with
jaxbo_models, prints the largest difference, relative to the largest logit, of each, and saves them.
The third compares the logits of transformers for what was saved.
"""

import pathlib
import sys

FAMILIES = ("gpt2", "opt", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "smollm3")
LENGTH, VOCAB_SIZE = 24, 61


def rope(rng, kinds):
  """Parameters of rotary positions, of a random kind."""
  kind = str(rng.choice(kinds))
  parameters = {"rope_type": kind, "rope_theta": float(rng.choice([100.0, 1e4, 5e5]))}
  if kind != "default":
    parameters["factor"] = float(rng.choice([1.5, 4.0, 8.0]))
  if kind == "llama3":
    parameters |= {"low_freq_factor": 1.0, "high_freq_factor": float(rng.choice([2.0, 4.0]))}
    parameters["original_max_position_embeddings"] = int(rng.choice([8, 16]))
  if kind == "yarn":
    parameters["original_max_position_embeddings"] = int(rng.choice([8, 16, 64]))
    if rng.random() < 0.3:
      parameters |= {"beta_fast": 4.0, "beta_slow": 0.5, "truncate": bool(rng.random() < 0.5)}
    if rng.random() < 0.3:
      parameters |= {"mscale": 1.2, "mscale_all_dim": 0.7}
    elif rng.random() < 0.5:
      parameters["attention_factor"] = 1.1
  return parameters


def configuration(family, rng):
  """A random configuration of a family, as keyword arguments of AutoConfig.for_model."""
  choose = lambda *values: values[rng.integers(len(values))]
  heads = choose(2, 3, 4, 6)
  layers = choose(1, 2, 3, 4)
  width = heads * choose(4, 6, 8, 10)
  tied = choose(True, False)
  common = {"vocab_size": VOCAB_SIZE, "tie_word_embeddings": tied, "bos_token_id": 0}
  common |= {"eos_token_id": 0, "pad_token_id": 1}
  if family == "gpt2":
    acts = ("gelu_new", "gelu", "relu", "silu", "gelu_pytorch_tanh")
    return common | {
      **{"n_positions": choose(24, 40), "n_embd": width, "n_layer": layers, "n_head": heads},
      **{"n_inner": choose(None, 20, 33), "activation_function": choose(*acts)},
      "layer_norm_epsilon": choose(1e-5, 1e-3),
    }
  sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
  sizes["max_position_embeddings"] = choose(24, 32, 64)
  if family == "opt":
    others = {"ffn_dim": choose(20, 33), "word_embed_proj_dim": width}
    return common | sizes | others | {"activation_function": choose("relu", "gelu")}
  sizes["intermediate_size"] = choose(20, 33)
  if family == "gpt_neox":
    fraction = choose(0.25, 0.5, 1.0) if width // heads == 8 else 1.0
    return (
      common
      | sizes
      | {
        "rope_parameters": {"rope_type": "default", "rope_theta": choose(100.0, 1e4)}
        | {"partial_rotary_factor": fraction},
        "use_parallel_residual": choose(True, False),
        "hidden_act": choose("gelu", "gelu_new", "relu"),
        "layer_norm_eps": choose(1e-5, 1e-2),
      }
    )
  sizes["num_key_value_heads"] = choose(*[k for k in (1, 2, 3, 4, 6) if heads % k == 0])
  sizes["hidden_act"] = choose("silu", "silu", "gelu", "gelu_pytorch_tanh")
  sizes["rms_norm_eps"] = choose(1e-6, 1e-5, 1e-2)
  kinds = ["default", "linear", "dynamic", "llama3", "yarn"]
  sizes["rope_parameters"] = rope(rng, kinds)
  if family in ("llama", "mistral", "qwen3"):
    sizes["head_dim"] = choose(width // heads, 4, 6, 12, 14)
  if family == "mistral":
    return common | sizes | {"sliding_window": choose(None, 1, 3, 8, 100)}
  if family == "llama":
    return common | sizes | {"attention_bias": choose(True, False), "mlp_bias": choose(True, False)}
  window = {"use_sliding_window": choose(True, True, False), "sliding_window": choose(2, 5, 100)}
  if family != "smollm3":
    window["max_window_layers"] = choose(0, 1, 2, 28)
  if family == "qwen2":
    return common | sizes | window
  sizes["attention_bias"] = choose(True, False)
  if family == "qwen3":
    return common | sizes | window
  window["no_rope_layer_interval"] = choose(2, 3, 4)
  return common | sizes | window | {"mlp_bias": choose(True, False)}


def make(folder, count, first=0):
  """Writes models and logits."""
  import numpy as np
  import torch
  from transformers import AutoConfig, AutoModelForCausalLM

  for number in range(first, first + count):
    rng = np.random.default_rng(number)
    family, path = FAMILIES[number % len(FAMILIES)], folder / str(number)
    torch.manual_seed(number)
    config = AutoConfig.for_model(family, **configuration(family, rng))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
      for parameter in model.parameters():
        centre = 1.0 if parameter.ndim == 1 and torch.all(parameter == 1) else 0.0
        parameter.normal_(centre, 0.2)
    dtype = str(rng.choice(["float32", "float32", "bfloat16", "float16"]))
    shards = {"max_shard_size": "10KB"} if rng.random() < 0.3 else {}
    model.to(getattr(torch, dtype)).save_pretrained(path, **shards)
    model = AutoModelForCausalLM.from_pretrained(
      path, dtype="float32", attn_implementation="eager"
    ).eval()
    tokens = rng.integers(VOCAB_SIZE, size=(3, LENGTH))
    mask = np.ones(tokens.shape, bool)
    mask[1, : rng.integers(1, 9)] = False
    mask[2, LENGTH - rng.integers(1, 9) :] = False
    inputs = inputs_of(family, tokens, mask)
    with torch.no_grad():
      logits = model(**inputs).logits.numpy()
    np.savez(path / "logits.npz", logits=logits, tokens=tokens.astype(np.int32), mask=mask)


def compare(folder):
  """Prints the relative difference of each model, and the largest of each family."""
  import json

  import jax
  import jax.numpy as jnp
  import numpy as np
  from jaxbo_models import transformer

  worst = {}
  for path in sorted(folder.iterdir(), key=lambda path: int(path.name)):
    arrays = np.load(path / "logits.npz")
    settings = json.loads((path / "config.json").read_text())
    model, params = transformer.from_safetensors(path)
    logits = jax.jit(model.apply)(
      {"params": params}, *map(jnp.asarray, (arrays["tokens"], arrays["mask"]))
    )
    difference = np.abs(logits - arrays["logits"])[arrays["mask"]].max()
    relative = float(difference / np.abs(arrays["logits"][arrays["mask"]]).max())
    family = settings["model_type"]
    rotary = (settings.get("rope_parameters") or {}).get("rope_type")
    print(f"{path.name:>3} {family:9} {rotary!s:8} {relative:.1e}", flush=True)
    transformer.save_safetensors(path / "saved", model, params, model_type=family)
    worst[family] = max(worst.get(family, 0.0), relative)
  print({family: f"{value:.1e}" for family, value in worst.items()})


def inputs_of(family, tokens, mask):
  """What transformers' forward pass takes; GPT-2 does not count positions from the mask."""
  import torch

  inputs = {"input_ids": torch.as_tensor(tokens), "attention_mask": torch.as_tensor(mask).long()}
  if family != "opt":
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
  return inputs


def verify(folder):
  """Prints the largest difference between transformers' logits for what was made and saved."""
  import numpy as np
  import torch
  from transformers import AutoModelForCausalLM

  worst = {}
  for path in sorted(folder.iterdir(), key=lambda path: int(path.name)):
    if not (path / "saved").exists():
      continue
    arrays = np.load(path / "logits.npz")
    model, report = AutoModelForCausalLM.from_pretrained(
      path / "saved", dtype="float32", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    family, mask = model.config.model_type, arrays["mask"]
    with torch.no_grad():
      inputs = inputs_of(family, arrays["tokens"].astype(int), mask)
      logits = model.eval()(**inputs).logits.numpy()
    difference = np.abs(logits - arrays["logits"])[mask].max()
    relative = float(difference / np.abs(arrays["logits"][mask]).max())
    worst[family] = max(worst.get(family, 0.0), relative)
  print({family: f"{value:.1e}" for family, value in worst.items()})


if __name__ == "__main__":
  command, folder = sys.argv[1], pathlib.Path(sys.argv[2])
  if command == "make":
    make(folder, *map(int, sys.argv[3:]))
  else:
    {"compare": compare, "verify": verify}[command](folder)
