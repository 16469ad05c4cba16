"""Continues texts: greedily, or by sampling with a temperature from the likeliest tokens."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbo_models.transformer.attention import Cache, empty_cache
from jaxbo_models.transformer.model import Transformer


class Generated(NamedTuple):
  """What :func:`generate` returns.

  Attributes:
    tokens: ``[batch, num_tokens]``, int32: the continuations, padded with ``pad_id``.
    mask: ``[batch, num_tokens]``, bool: True up to and including the token that ends a text.
  """

  tokens: jax.Array
  mask: jax.Array


def generate(
  model: Transformer,
  params: Any,
  prompts: jax.Array,
  mask: jax.Array | None = None,
  *,
  num_tokens: int,
  key: jax.Array | int | None = None,
  temperature: float | jax.Array = 1.0,
  top_p: float | jax.Array = 1.0,
  eos_id: int | jax.Array | None = None,
  pad_id: int | jax.Array = 0,
) -> Generated:
  """Continues each prompt by up to ``num_tokens`` tokens, and stops when all texts have ended.

  A cache keeps the keys and values of the tokens so far, so each new token costs one forward pass
  of one token. The program is compiled once for each model, shape of prompts and ``num_tokens``.

  >>> from jaxbo_models import transformer
  >>> config = transformer.llama(
  ...   vocab_size=257, max_length=16, num_layers=2, width=32, num_heads=4, ffn_width=48
  ... )
  >>> model = transformer.Transformer(config)
  >>> prompts = jnp.array([[0, 3, 4], [5, 6, 7]])
  >>> mask = jnp.array([[False, True, True], [True, True, True]])
  >>> params = model.init(jax.random.key(0), prompts)["params"]
  >>> generate(model, params, prompts, mask, num_tokens=5).tokens.shape
  (2, 5)

  Args:
    model: the model.
    params: its parameters.
    prompts: ``[batch, length]``, integers.
    mask: ``[batch, length]``, bool: True for the tokens of a prompt, and False for padding, on
      either side; None if all are real. A row without prompt tokens gets no tokens.
    num_tokens: the largest number of tokens to add, at least 1; ``length + num_tokens`` is at most
      the model's ``max_length``.
    key: None for the likeliest token at each step; an int or a key to sample.
    temperature: positive: tokens are drawn from ``softmax(logits / temperature)``. Needs ``key``.
    top_p: in (0, 1]: draws only from the smallest set of likeliest tokens whose probabilities sum
      to this (and from tokens as likely as the last of them). Needs ``key``.
    eos_id: the token that ends a text; None if no token does.
    pad_id: the token after the end of a text.

  Raises:
    ValueError: an argument is out of its range, or has another shape or dtype.
  """
  if prompts.ndim != 2 or (mask is not None and mask.shape != prompts.shape):
    raise ValueError(
      f"prompts must be [batch, length], and mask of the same shape, got {prompts.shape} and "
      f"{None if mask is None else mask.shape}"
    )
  length = prompts.shape[1]
  if num_tokens < 1 or length + num_tokens > model.config.max_length:
    raise ValueError(
      f"num_tokens must be in [1, max_length - length = {model.config.max_length - length}], got "
      f"{num_tokens}"
    )
  for name, value, most in (("temperature", temperature, float("inf")), ("top_p", top_p, 1)):
    if isinstance(value, jax.Array):
      continue
    if not 0 < value <= most:
      raise ValueError(f"{name} must be in (0, {most}], got {value}")
    if key is None and value != 1:
      raise ValueError(f"{name} needs a key: without one the likeliest tokens are taken")
  return _generate(
    model,
    num_tokens,
    params,
    prompts,
    jnp.ones(prompts.shape, bool) if mask is None else mask,
    jax.random.key(key) if isinstance(key, int) else key,
    temperature,
    top_p,
    -1 if eos_id is None else eos_id,
    pad_id,
  )


class _Texts(NamedTuple):
  """The texts so far, the logits of their next tokens, and which have ended."""

  num_added: jax.Array  # ()
  tokens: jax.Array  # [batch, num_tokens]
  mask: jax.Array  # [batch, num_tokens]
  ended: jax.Array  # [batch]
  logits: jax.Array  # [batch, vocab_size]
  cache: Cache


@functools.partial(jax.jit, static_argnums=(0, 1))
def _generate(
  model: Transformer,
  num_tokens: int,
  params: Any,
  prompts: jax.Array,
  mask: jax.Array,
  key: jax.Array | None,
  temperature: Any,
  top_p: Any,
  eos_id: Any,
  pad_id: Any,
) -> Generated:
  batch_size, length = prompts.shape
  # Padding goes to the left, so that new tokens stand right behind the prompts.
  order = jnp.argsort(mask, axis=1, stable=True)
  prompts, mask = (jnp.take_along_axis(x, order, axis=1) for x in (prompts, mask))
  num_real = jnp.sum(mask, axis=1, dtype=jnp.int32)
  shape = (batch_size, num_tokens)
  forward: Any = functools.partial(model.apply, {"params": params})

  def step(texts: _Texts) -> _Texts:
    token = _choose(texts.logits, key, texts.num_added, temperature, top_p)
    here = jnp.arange(num_tokens)[None] == texts.num_added
    shown = jnp.where(texts.ended, pad_id, token)
    logits, cache = forward(
      token[:, None], positions=(num_real + texts.num_added)[:, None], cache=texts.cache
    )
    return _Texts(
      num_added=texts.num_added + 1,
      tokens=jnp.where(here, shown[:, None], texts.tokens),
      mask=texts.mask | (here & ~texts.ended[:, None]),
      ended=texts.ended | (token == eos_id),
      logits=logits,
      cache=cache,
    )

  cache = empty_cache(model.config, batch_size, length + num_tokens)
  logits, cache = forward(prompts, mask, cache=cache)
  first = _Texts(
    num_added=jnp.int32(0),
    tokens=jnp.full(shape, pad_id, jnp.int32),
    mask=jnp.zeros(shape, bool),
    ended=num_real == 0,
    logits=logits,
    cache=cache,
  )
  is_open = lambda texts: (texts.num_added < num_tokens) & ~jnp.all(texts.ended)
  texts = jax.lax.while_loop(is_open, step, first)
  return Generated(texts.tokens, texts.mask)


def _choose(
  logits: jax.Array, key: jax.Array | None, count: jax.Array, temperature: Any, top_p: Any
) -> jax.Array:
  """Returns the next tokens, ``[batch]``, int32."""
  if key is None:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = logits / temperature
  ordered = -jnp.sort(-logits, axis=-1)
  probabilities = jax.nn.softmax(ordered, axis=-1)
  likelier = jnp.cumsum(probabilities, axis=-1) - probabilities
  kept = (likelier < top_p) | (top_p >= 1)  # Sums of probabilities round to 1 before their end.
  least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
  chosen = jnp.where(logits >= least, logits, -jnp.inf)
  return jax.random.categorical(jax.random.fold_in(key, count), chosen).astype(jnp.int32)
