"""Decoder-only language models: one transformer, configured as GPT-2, OPT or Pythia (GPT-NeoX)."""

from jaxbo_models.transformer.config import TransformerConfig, gpt2, opt, pythia
from jaxbo_models.transformer.huggingface import from_safetensors
from jaxbo_models.transformer.losses import sequence_losses, token_losses
from jaxbo_models.transformer.model import Block, Transformer

__all__ = [
  "Block",
  "Transformer",
  "TransformerConfig",
  "from_safetensors",
  "gpt2",
  "opt",
  "pythia",
  "sequence_losses",
  "token_losses",
]
