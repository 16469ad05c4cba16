"""Changes each setting of the golden models, here and in transformers; not run in CI.

  uv run --no-project --isolated --with transformers --with torch --with numpy \
    python tests/models/perturb.py make FOLDER
  PYTHONPATH=.:models python tests/models/perturb.py compare FOLDER

The law: a changed ``config.json`` either gives the logits of transformers or is refused, with a
``ValueError``. The second command prints what breaks it, and how many cases of each kind there are.
"""

import json
import pathlib
import sys

GOLDEN = pathlib.Path(__file__).parent / "golden"
ACTIVATIONS = ["gelu", "relu", "silu", "gelu_new", "gelu_fast", "quick_gelu", "relu2", "tanh"]
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8}
SCALINGS = [
  None,
  {"type": "default"},
  {"rope_type": "default", "rope_theta": 7.0},
  {"type": "linear", "factor": 3.0},
  {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
  {"rope_type": "dynamic", "factor": 2.0},
  {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
  {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 3, "long_factor": [2.0] * 3},
  YARN,
  YARN | {"factor": None},
  YARN | {"mscale": 1.5, "mscale_all_dim": 0},
  YARN | {"mscale": 1.5, "mscale_all_dim": 0.5},
  YARN | {"beta_fast": 3.0, "beta_slow": 0.5, "truncate": False},
]
KINDS = ["full_attention", "sliding_attention"]
OTHERS = {
  "activation_function": ACTIVATIONS,
  "add_cross_attention": [True],
  "attention_bias": [True, False],
  "do_layer_norm_before": [False],
  "head_dim": [6],
  "hidden_act": ACTIVATIONS,
  "layer_types": [[KINDS[0]] * 2, [KINDS[1]] * 2, KINDS, KINDS[::-1]],
  "logit_scale": [2.0],
  "max_window_layers": [0, 1],
  "mlp_bias": [True, False],
  "no_rope_layer_interval": [1, 3],
  "no_rope_layers": [[0, 0], [1, 1], [0, 1]],
  "num_key_value_heads": [1, None],
  "original_max_position_embeddings": [8, 32],
  "partial_rotary_factor": [0.5, 1.0],
  "pruned_heads": [{"0": [1]}],
  "qk_norm": [True],
  "rms_norm_eps": [0.1],
  "rope_scaling": SCALINGS,
  "rope_theta": [10.0],
  "rotary_emb_base": [10],
  "rotary_pct": [0.25, 1.0],
  "scale_attn_by_inverse_layer_idx": [True],
  "scale_attn_weights": [False],
  "sliding_window": [2, 1],
  "tie_word_embeddings": [True, False],
  "use_parallel_residual": [False],
  "use_sliding_window": [True, False],
}


def changes(settings):
  """Pairs of a name and the changed settings."""
  for name, value in settings.items():
    if name in ("model_type", "vocab_size"):
      continue
    yield name, {other: x for other, x in settings.items() if other != name}
    match value:
      case bool():
        others = [not value]
      case int() | float():
        others = [value + 1, value * 3, None]
      case _:
        others = [None]
    for other in others:
      yield name, settings | {name: other}
  for name, values in OTHERS.items():
    for value in values:
      yield name, settings | {name: value}


def make(folder):
  """Writes folders of changed models, and their logits where transformers loads the whole model."""
  import numpy as np
  import torch
  from sweep import inputs_of
  from transformers import AutoModelForCausalLM

  golden = np.load(GOLDEN / "logits.npz")
  for family in sorted(path.parent.name for path in GOLDEN.glob("*/config.json")):
    settings = json.loads((GOLDEN / family / "config.json").read_text())
    inputs = inputs_of(family, golden["tokens"].astype(int), golden["mask"])
    for number, (name, changed) in enumerate(changes(settings)):
      path = folder / f"{family}_{number:03d}_{name}"
      path.mkdir(parents=True)
      for file in (GOLDEN / family).glob("model*"):
        (path / file.name).symlink_to(file)
      (path / "config.json").write_text(json.dumps(changed))
      try:
        model, report = AutoModelForCausalLM.from_pretrained(
          path, dtype="float32", attn_implementation="eager", output_loading_info=True
        )
        with torch.no_grad():
          logits = model.eval()(**inputs).logits.numpy()
      except Exception:  # Whatever it is, transformers does not run it.
        continue
      if not any(report.values()):
        np.save(path / "logits.npy", logits)


def compare(folder):
  """Prints the cases that break the law."""
  import collections

  import jax
  import jax.numpy as jnp
  import numpy as np
  from jaxbo_models import transformer

  golden = np.load(GOLDEN / "logits.npz")
  tokens, mask = jnp.asarray(golden["tokens"]), golden["mask"]
  run = jax.jit(
    lambda model, params: model.apply({"params": params}, tokens, jnp.asarray(mask)),
    static_argnums=0,
  )
  kinds = collections.Counter()
  for path in sorted(folder.iterdir()):
    theirs = np.load(path / "logits.npy") if (path / "logits.npy").exists() else None
    try:
      ours = np.asarray(run(*transformer.from_safetensors(path)))
    except ValueError:
      kinds["refused" if theirs is not None else "neither runs it"] += 1
      continue
    if theirs is None:  # Such as a dropout of null: of no effect here.
      kinds["only ours runs it"] += 1
      continue
    equal = np.allclose(ours[mask], theirs[mask], rtol=0, atol=1e-5 * np.abs(theirs[mask]).max())
    kinds["equal" if equal else "DIFFERENT"] += 1
    if not equal:
      print("different:", path.name)
  print(dict(kinds))


if __name__ == "__main__":
  {"make": make, "compare": compare}[sys.argv[1]](pathlib.Path(sys.argv[2]))
