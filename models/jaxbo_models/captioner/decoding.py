"""Decodes captions: the step function of a search, greedy decoding and sampling."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.core
import jax.numpy as jnp

from jaxbo_models.mesh import divided_as

# step_fn(tokens [batch, beam], state) -> (log_probabilities [batch, beam, vocab_size], state)
StepFn = Callable[[jax.Array, Any], tuple[jax.Array, Any]]


def make_step(
  model: nn.Module, params: Any, features: jax.Array, cell_mask: jax.Array | None = None
) -> tuple[StepFn, Any]:
  """Makes the step function and the initial state of a search over captions.

  :func:`beam_search`, :func:`greedy` and :func:`sample` take both. Images are encoded once; the
  beams of an image share its cells, without copies.

  >>> from jaxbo_models import captioner
  >>> model = captioner.GuidedCaptioner(19, embed_dim=8, hidden_dim=16, attention_dim=8)
  >>> @jax.jit
  ... def describe(params, features):
  ...   step_fn, state = make_step(model, params, features)
  ...   return greedy(step_fn, state, batch_size=len(features), max_length=7, bos_id=1, eos_id=2)
  >>> features, tokens = jnp.ones((2, 4, 6)), jnp.ones((2, 5), int)
  >>> params = jax.eval_shape(model.init, jax.random.key(0), features, tokens)["params"]
  >>> found, _ = jax.eval_shape(describe, params, features)
  >>> found.shape
  (2, 7)

  Args:
    model: a :class:`GuidedCaptioner`.
    params: the model's parameters.
    features: ``[batch, num_cells, dim]`` floats, or images if the model has an encoder.
    cell_mask: ``[batch, num_cells]``, bool: True for cells that are present; None if all are.

  Returns:
    ``step_fn(tokens, state) -> (log_probabilities, state)`` and an initial state with leaves
    ``[batch, hidden_dim]``.
  """
  apply = lambda method, *args: model.apply({"params": params}, *args, method=method)
  encoded: Any = apply("encode", features, cell_mask)

  def step_fn(tokens: jax.Array, state: Any) -> tuple[jax.Array, Any]:
    result: Any = apply("step", tokens, state, encoded)
    return result

  return step_fn, apply("initial_state", encoded)


def greedy(
  step_fn: StepFn,
  init_state: Any,
  *,
  batch_size: int,
  max_length: int,
  bos_id: int,
  eos_id: int,
  forced: jax.Array | None = None,
  forbidden: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Decodes captions with the most probable token at each step.

  Args:
    step_fn: ``step_fn(tokens, state) -> (log_probabilities, state)`` reads ``tokens [batch, 1]``
      and returns the log-probabilities of the next tokens, ``[batch, 1, vocab_size]``.
    init_state: the state for the first call of ``step_fn``, a pytree with leaves ``[batch, ...]``;
      inside the search the leaves are ``[batch, 1, ...]``. :func:`make_step` returns it.
    batch_size: number of images.
    max_length: maximum number of tokens in a caption, including the end token; at least 1.
    bos_id: the token that the first step reads.
    eos_id: the token that ends a caption.
    forced: ``[batch, max_length]``, integers: the token required at each position, or -1 to leave
      the position free.
    forbidden: ``[vocab_size]``, bool: True for tokens that may appear only where they are forced.
      The remaining probabilities are not renormalized.

  Returns:
    Tokens ``[batch, max_length]``, padded with ``eos_id``, and their log-probabilities ``[batch]``
    under the model.

  Raises:
    ValueError: an argument is out of its range or has another shape.
  """
  pick = lambda log_probabilities, position: jnp.argmax(log_probabilities, axis=-1)
  tokens, sums = _roll(
    step_fn, init_state, pick, (batch_size, 1), max_length, bos_id, eos_id, forced, forbidden
  )
  return tokens[:, 0], sums[:, 0]


def sample(
  step_fn: StepFn,
  init_state: Any,
  key: jax.Array,
  *,
  batch_size: int,
  num_samples: int = 1,
  max_length: int,
  bos_id: int,
  eos_id: int,
  temperature: float | jax.Array = 1.0,
  forced: jax.Array | None = None,
  forbidden: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Draws captions from the model.

  Args:
    step_fn: ``step_fn(tokens, state) -> (log_probabilities, state)`` reads
      ``tokens [batch, num_samples]`` and returns the log-probabilities of the next tokens,
      ``[batch, num_samples, vocab_size]``.
    init_state: the state for the first call of ``step_fn``, a pytree with leaves ``[batch, ...]``;
      inside the search the leaves are ``[batch, num_samples, ...]``. :func:`make_step` returns it.
    key: the random key.
    batch_size: number of images.
    num_samples: number of captions for each image, at least 1.
    max_length: maximum number of tokens in a caption, including the end token; at least 1.
    bos_id: the token that the first step reads.
    eos_id: the token that ends a caption.
    temperature: divides the log-probabilities before each draw; positive.
    forced: ``[batch, max_length]``, integers: the token required at each position, or -1 to leave
      the position free.
    forbidden: ``[vocab_size]``, bool: True for tokens that may appear only where they are forced.
      The draw renormalizes the remaining probabilities.

  Returns:
    Tokens ``[batch, num_samples, max_length]``, padded with ``eos_id``, and their log-probabilities
    ``[batch, num_samples]`` under the model at temperature 1, not renormalized for forbidden
    tokens.

  Raises:
    ValueError: an argument is out of its range or has another shape.
  """
  if num_samples < 1:
    raise ValueError(f"num_samples must be at least 1, got {num_samples}")
  if not isinstance(temperature, jax.core.Tracer) and not temperature > 0:
    raise ValueError(f"temperature must be positive, got {temperature}")

  def pick(log_probabilities, position):
    return jax.random.categorical(
      jax.random.fold_in(key, position), log_probabilities / temperature
    )

  shape = (batch_size, num_samples)
  return _roll(step_fn, init_state, pick, shape, max_length, bos_id, eos_id, forced, forbidden)


def _roll(
  step_fn: StepFn,
  init_state: Any,
  pick: Callable[[jax.Array, jax.Array], jax.Array],
  shape: tuple[int, int],
  max_length: int,
  bos_id: int,
  eos_id: int,
  forced: jax.Array | None,
  forbidden: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """Picks tokens until every caption has ended or is ``max_length`` long."""
  state = over_beams(init_state, shape)
  dtype = check_search(step_fn, state, shape, max_length, bos_id, eos_id, forced, forbidden)[1]

  def is_open(carry):
    position, ended, *_ = carry
    return (position < max_length) & ~jnp.all(ended)

  def step(carry):
    position, ended, last, tokens, sums, state = carry
    log_probabilities, state = step_fn(last, state)
    allowed = allow(log_probabilities.astype(dtype), position, forced, forbidden)
    token = pick(allowed, position).astype(jnp.int32)
    gained = jnp.take_along_axis(allowed, token[..., None], axis=-1)[..., 0]
    token, sums = jnp.where(ended, eos_id, token), sums + jnp.where(ended, 0, gained)
    tokens = put(tokens, position, token)
    return position + 1, ended | (token == eos_id), token, tokens, sums, state

  full = functools.partial(fill, state)
  first = (
    jnp.int32(0),
    full(shape, False, bool),
    full(shape, bos_id, jnp.int32),
    full((*shape, max_length), eos_id, jnp.int32),
    full(shape, 0, dtype),
    state,
  )
  _, _, _, tokens, sums, _ = jax.lax.while_loop(is_open, step, first)
  return tokens, sums


def over_beams(init_state: Any, shape: tuple[int, int]) -> Any:
  """Repeats leaves ``[batch, ...]`` for each beam: ``[batch, beam, ...]``."""
  for leaf in jax.tree.leaves(init_state):
    if not leaf.ndim or len(leaf) != shape[0]:
      raise ValueError(
        f"init_state must have leaves [batch_size = {shape[0]}, ...], got one of shape {leaf.shape}"
      )
  repeat = lambda x: jnp.broadcast_to(x[:, None], (*shape, *x.shape[1:]))
  return jax.tree.map(repeat, init_state)


def fill(state: Any, shape: tuple[int, ...], value: Any, dtype: Any) -> jax.Array:
  """Returns ``[batch, ...]`` of one value, divided among devices as ``state`` is."""
  return divided_as(state, jnp.full(shape, value, dtype))


def put(tokens: jax.Array, position: jax.Array, token: jax.Array) -> jax.Array:
  """Writes ``token [batch, beam]`` into the place ``position`` of ``[batch, beam, max_length]``."""
  places = jnp.arange(tokens.shape[2])[None, None]
  return jnp.where(places == position, token[..., None], tokens)  # No scatter: for any mesh.


def allow(
  log_probabilities: jax.Array,
  position: jax.Array,
  forced: jax.Array | None,
  forbidden: jax.Array | None,
) -> jax.Array:
  """Sets the log-probabilities ``[batch, beam, vocab_size]`` of tokens not allowed to -inf."""
  good = jnp.ones((1, 1, log_probabilities.shape[-1]), bool)
  if forbidden is not None:
    good = ~forbidden[None, None]
  if forced is not None:
    wanted = forced[:, position][:, None, None]
    ids = jnp.arange(log_probabilities.shape[-1])[None, None]
    good = jnp.where(wanted >= 0, ids == wanted, good)
  return jnp.where(good, log_probabilities, -jnp.inf)


def check_search(
  step_fn: StepFn,
  state: Any,
  shape: tuple[int, int],
  max_length: int,
  bos_id: int,
  eos_id: int,
  forced: jax.Array | None,
  forbidden: jax.Array | None,
) -> tuple[int, Any]:
  """Returns ``vocab_size`` and the dtype of sums; raises ``ValueError`` for bad arguments."""
  if max_length < 1:
    raise ValueError(f"max_length must be at least 1, got {max_length}")
  first = lambda state: step_fn(fill(state, shape, 0, jnp.int32), state)
  log_probabilities, _ = jax.eval_shape(first, state)
  if log_probabilities.ndim != 3 or log_probabilities.shape[:2] != shape:
    raise ValueError(
      f"step_fn must return log-probabilities [batch, beam, vocab_size] = {shape} and more, got "
      f"{log_probabilities.shape}"
    )
  vocab_size = log_probabilities.shape[2]
  for name, token in (("bos_id", bos_id), ("eos_id", eos_id)):
    if not 0 <= token < vocab_size:
      raise ValueError(f"{name} must be in [0, vocab_size = {vocab_size}), got {token}")
  expected = (shape[0], max_length)
  if forced is not None and (
    forced.shape != expected or not jnp.issubdtype(forced.dtype, jnp.integer)
  ):
    raise ValueError(
      f"forced must be integers [batch, max_length] = {expected}, got {forced.dtype} of shape "
      f"{forced.shape}"
    )
  if forbidden is not None and (forbidden.shape != (vocab_size,) or forbidden.dtype != jnp.bool_):
    raise ValueError(
      f"forbidden must be bool [vocab_size = {vocab_size}], got {forbidden.dtype} of shape "
      f"{forbidden.shape}"
    )
  return vocab_size, jnp.promote_types(log_probabilities.dtype, jnp.float32)
