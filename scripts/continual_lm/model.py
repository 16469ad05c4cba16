"""The language model: a small one of bytes, or one whose weights are read from a folder."""

import hashlib
import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxbo_models import tokenizers, transformer

from scripts.continual_lm import documents
from scripts.continual_lm.config import Config
from scripts.continual_lm.data import Tokenizer
from scripts.continual_lm.train import LossFn

TOKENS = "tokens.sha256"  # Beside a model: which tokens it is of.


class Language(NamedTuple):
  """A model, what makes its tokens, and the loss of each sequence."""

  model: transformer.Transformer
  tokenizer: Tokenizer
  loss_fn: LossFn
  init: Callable[[jax.Array], Any]  # init(key) -> params, new or as they were read.


def make(config: Config) -> Language:
  """The model of a run; raises ``ValueError`` if it has too few tokens or places."""
  length, dtype = config.sequence_length(), jnp.dtype(config.dtype)
  if config.model_dir is not None:
    model, params = transformer.from_safetensors(config.model_dir, dtype=dtype)
    tokenizer = tokenizers.BPETokenizer(config.model_dir, end_of_text(config.model_dir))
    if tokenizer.vocab_size > model.config.vocab_size:  # What is beyond has the loss NaN.
      raise ValueError(
        f"the tokenizer in model_dir must have at most the model's {model.config.vocab_size} "
        f"tokens, got {tokenizer.vocab_size} in {config.model_dir}"
      )
    init = lambda key: params
  else:
    tokenizer = tokenizer_of(config)
    model = transformer.Transformer(settings(config, tokenizer.vocab_size))
    init = jax.jit(lambda key: model.init(key, jnp.zeros((1, 2), jnp.int32))["params"])
    if config.pretrained is not None:
      like = jax.tree.map(jnp.shape, jax.eval_shape(init, jax.random.key(0)))
      options: dict[str, Any] = {"dtype": dtype, "max_length": length}
      model, params = transformer.from_safetensors(config.pretrained, **options)
      tokens = (config.pretrained / TOKENS).read_text()
      if like != jax.tree.map(jnp.shape, params) or tokens != fingerprint(tokenizer):
        raise ValueError(
          "architecture, num_layers, width, num_heads and tokenizer must be those of the model in "
          f"pretrained, {config.pretrained}"
        )
      init = lambda key: params
  if length > model.config.max_length:
    raise ValueError(
      f"length must be at most {model.config.max_length}, that of the model; got {length}"
    )
  return Language(model, tokenizer, transformer.sequence_losses(model), init)


def tokenizer_of(config: Config) -> Tokenizer:
  """What makes the tokens of a small model."""
  if config.tokenizer is None:
    return tokenizers.ByteTokenizer()
  if isinstance(config.tokenizer, Path):
    return tokenizers.BPETokenizer(config.tokenizer)
  if config.pretrained is not None:
    tokens = _learned(config.pretrained)
    if tokens is None or tokens.vocab_size != config.tokenizer:
      raise ValueError(
        f"tokenizer must be that of the model in pretrained, {config.pretrained}; got "
        f"{config.tokenizer}"
      )
    return tokens
  from tokenizers import ByteLevelBPETokenizer

  texts = documents.read(config.dataset, config.data_dir).train
  learner, end = ByteLevelBPETokenizer(), "<|endoftext|>"
  options: dict[str, Any] = {"vocab_size": config.tokenizer, "special_tokens": [end]}
  learner.train_from_iterator(itertools.chain(*texts), **options, show_progress=False)
  with tempfile.TemporaryDirectory() as folder:
    learner.save_model(folder)
    tokens = tokenizers.BPETokenizer(folder)
  if tokens.vocab_size < config.tokenizer:
    raise ValueError(
      f"tokenizer must be at most {tokens.vocab_size}, what the text of {config.dataset} gives; "
      f"got {config.tokenizer}"
    )
  return tokens


def _learned(folder: Path) -> tokenizers.BPETokenizer | None:
  return tokenizers.BPETokenizer(folder) if (folder / "tokenizer.json").exists() else None


def fingerprint(tokenizer: Tokenizer) -> str:
  """A checksum of the texts of all tokens."""
  texts = [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)]
  return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def settings(config: Config, vocab_size: int) -> transformer.TransformerConfig:
  """Those of a new model."""
  sizes: dict[str, Any] = {
    "vocab_size": vocab_size,
    "max_length": config.sequence_length(),
    "num_layers": config.num_layers,
    "width": config.width,
    "num_heads": config.num_heads,
    "dtype": jnp.dtype(config.dtype),
  }
  if config.architecture == "gpt2":
    return transformer.gpt2(**sizes)
  return transformer.llama("2-7b", ffn_width=8 * -(-config.width // 3), tied_head=True, **sizes)


def end_of_text(folder: Path) -> str:
  """The token that ends a text: what the tokenizer's settings say, or that of the family.

  Models of one family may have different ones: those of Llama do.
  """
  for name in ("tokenizer_config.json", "special_tokens_map.json"):
    settings = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    token = settings.get("eos_token")
    if token:
      return token["content"] if isinstance(token, dict) else token
  family = json.loads((folder / "config.json").read_text())["model_type"]
  return "</s>" if family in ("opt", "llama", "mistral") else "<|endoftext|>"
