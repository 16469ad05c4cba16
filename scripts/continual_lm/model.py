"""The language model: a small one of bytes, or one whose weights are read from a folder."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxbo_models import tokenizers, transformer

from scripts.continual_lm.config import Config
from scripts.continual_lm.data import Tokenizer
from scripts.continual_lm.train import LossFn


class Language(NamedTuple):
  """A model, what makes its tokens, and the loss of each sequence."""

  tokenizer: Tokenizer
  loss_fn: LossFn
  init: Callable[[jax.Array], Any]  # init(key) -> params, new or as they were read.


def make(config: Config) -> Language:
  """The model of a run; raises ``ValueError`` if it has too few tokens or places."""
  length = config.sequence_length()
  if config.model_dir is not None:
    model, params = transformer.from_safetensors(config.model_dir)
    family = json.loads((config.model_dir / "config.json").read_text())["model_type"]
    end_of_text = "</s>" if family == "opt" else "<|endoftext|>"
    tokenizer = tokenizers.BPETokenizer(config.model_dir, end_of_text)
    if tokenizer.vocab_size > model.config.vocab_size:  # What is beyond has the loss NaN.
      raise ValueError(
        f"the tokenizer in model_dir must have at most the model's {model.config.vocab_size} "
        f"tokens, got {tokenizer.vocab_size} in {config.model_dir}"
      )
    init = lambda key: params
  else:
    tokenizer = tokenizers.ByteTokenizer()
    settings = transformer.gpt2(
      vocab_size=tokenizer.vocab_size,
      max_length=length,
      num_layers=config.num_layers,
      width=config.width,
      num_heads=config.num_heads,
    )
    model = transformer.Transformer(settings)
    init = jax.jit(lambda key: model.init(key, jnp.zeros((1, 2), jnp.int32))["params"])
  if length > model.config.max_length:
    raise ValueError(
      f"length must be at most {model.config.max_length}, that of the model; got {length}"
    )
  return Language(tokenizer, transformer.sequence_losses(model), init)
