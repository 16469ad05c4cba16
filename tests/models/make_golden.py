"""Makes the golden files: random models of transformers in PyTorch, and their logits.

  uv run --no-project --isolated --with transformers --with torch --with numpy \
    python tests/models/make_golden.py

Not run in CI. A model whose folder is there is kept. No parameter is special: biases are not 0 and
normalization's scales not 1. The models are small but of no symmetric shape, and each is stored as
the real ones are met: GPT-2 in float32, OPT in float16, Pythia in bfloat16 and in shards; Llama's
family in half precision, with another way to scale rotary positions in each, and with windows that
are shorter than the text. PyTorch computes the logits in float32.
"""

import pathlib

FOLDER = pathlib.Path(__file__).parent / "golden"
LENGTH, VOCAB_SIZE = 12, 50
SHAPE = {"vocab_size": VOCAB_SIZE, "bos_token_id": 0, "eos_token_id": 0}


def configurations():
  """A configuration and the dtype in which it is stored, for each family."""
  from transformers import (
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
  )

  gated = {
    **SHAPE,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 40,
  }

  def rope(kind, **others):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 100.0, **others}}

  return {
    "gpt2": (
      GPT2Config(**SHAPE, n_positions=16, n_embd=32, n_layer=2, n_head=4, n_inner=48),
      "float32",
    ),
    "opt": (
      OPTConfig(
        **SHAPE,
        max_position_embeddings=16,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=48,
        word_embed_proj_dim=32,
        pad_token_id=1,
      ),
      "float16",
    ),
    "gpt_neox": (
      GPTNeoXConfig(
        **SHAPE,
        max_position_embeddings=16,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        rotary_pct=0.5,  # 4 of 8, so that halves and neighbours differ
        tie_word_embeddings=False,
      ),
      "bfloat16",
    ),
    "llama": (
      LlamaConfig(
        **gated,
        **rope(
          "llama3",
          factor=8.0,
          low_freq_factor=1.0,
          high_freq_factor=4.0,
          original_max_position_embeddings=16,
        ),
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
      ),
      "bfloat16",
    ),
    "mistral": (
      MistralConfig(
        **gated, **rope("linear", factor=2.0), sliding_window=3, head_dim=8, hidden_act="gelu"
      ),
      "float16",
    ),
    "qwen2": (
      Qwen2Config(
        **gated,
        **rope("yarn", factor=4.0, original_max_position_embeddings=16),
        use_sliding_window=True,
        sliding_window=3,
        max_window_layers=1,
      ),
      "bfloat16",
    ),
    "qwen3": (
      Qwen3Config(
        **(gated | {"num_key_value_heads": 4}),
        **rope("default"),
        head_dim=10,
        tie_word_embeddings=True,
      ),
      "bfloat16",
    ),
    "smollm3": (
      SmolLM3Config(**gated, **rope("default"), no_rope_layer_interval=2, rms_norm_eps=1e-2),
      "bfloat16",
    ),
  }


def main():
  """Writes a folder for each family, and the inputs and logits beside."""
  import numpy as np
  import torch
  from transformers import AutoModelForCausalLM

  rng = np.random.default_rng(0)
  tokens = rng.integers(VOCAB_SIZE, size=(3, LENGTH))
  mask = np.ones(tokens.shape, bool)
  mask[1, :5] = False  # padding on the left
  mask[2, 8:] = False  # and on the right
  arrays = {"tokens": tokens.astype(np.int32), "mask": mask}
  if (FOLDER / "logits.npz").exists():
    arrays = dict(np.load(FOLDER / "logits.npz"))
  for name, (config, dtype) in configurations().items():
    if (FOLDER / name).exists():
      continue
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
      for parameter in model.parameters():
        centre = 1.0 if parameter.ndim == 1 and torch.all(parameter == 1) else 0.0
        parameter.normal_(centre, 0.3)
    model = model.to(getattr(torch, dtype))
    shards = {"max_shard_size": "20KB"} if name in ("gpt_neox", "qwen2") else {}
    model.save_pretrained(FOLDER / name, **shards)
    (FOLDER / name / "generation_config.json").unlink(missing_ok=True)
    inputs = {"input_ids": torch.as_tensor(tokens), "attention_mask": torch.as_tensor(mask).long()}
    if name == "gpt2":  # OPT finds positions from the mask, and the others rotate.
      inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    # Read again, since rounding the model rounded the frequencies of rotary positions too.
    model = AutoModelForCausalLM.from_pretrained(
      FOLDER / name, dtype="float32", attn_implementation="eager"
    )
    with torch.no_grad():
      arrays[name] = model.eval()(**inputs).logits.numpy()
  np.savez_compressed(FOLDER / "logits.npz", **arrays)


if __name__ == "__main__":
  main()
