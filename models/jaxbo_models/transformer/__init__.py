"""Decoder-only language models: one transformer, configured as GPT-2, OPT, Pythia, Llama, ..."""

from jaxbo_models.transformer.attention import Cache, empty_cache
from jaxbo_models.transformer.config import TransformerConfig
from jaxbo_models.transformer.generate import Generated, generate
from jaxbo_models.transformer.huggingface import from_safetensors
from jaxbo_models.transformer.losses import sequence_losses, token_losses
from jaxbo_models.transformer.model import Block, Transformer
from jaxbo_models.transformer.published import (
  gpt2,
  llama,
  mistral,
  opt,
  pythia,
  qwen2,
  qwen3,
  smollm,
)
from jaxbo_models.transformer.rotary import (
  DynamicScaling,
  LinearScaling,
  Llama3Scaling,
  YarnScaling,
)
from jaxbo_models.transformer.save import save_safetensors

__all__ = [
  "Block",
  "Cache",
  "DynamicScaling",
  "Generated",
  "LinearScaling",
  "Llama3Scaling",
  "Transformer",
  "TransformerConfig",
  "YarnScaling",
  "empty_cache",
  "from_safetensors",
  "generate",
  "gpt2",
  "llama",
  "mistral",
  "opt",
  "pythia",
  "qwen2",
  "qwen3",
  "save_safetensors",
  "sequence_losses",
  "smollm",
  "token_losses",
]
