"""Captioners for the script: how they are made, trained and asked."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxbo_models import captioner
from jaxbo_models.captioner import GuidedCaptioner, PatchEncoder
from jaxbo_models.vocabulary import Vocabulary

from scripts.captioning.config import MODELS, Settings
from scripts.captioning.plots import Captioned


class MeanEncoder(nn.Module):
  """One cell, the mean of all: a captioner that cannot look anywhere."""

  encoder: nn.Module

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    """Returns the features ``[n, 1, dim]`` of ``images``."""
    cells: jax.Array = self.encoder(images)  # pyright: ignore[reportCallIssue]
    return cells.mean(axis=1, keepdims=True)


def make_model(name: str, settings: Settings, vocab_size: int) -> GuidedCaptioner:
  """The captioner of that name."""
  spec = MODELS[name]
  encoder: nn.Module = PatchEncoder(
    image_shape=(*settings.image_size, 3),
    patch_size=settings.patch_size,
    features=settings.hidden_dim,
  )
  return GuidedCaptioner(
    vocab_size=vocab_size,
    embed_dim=settings.embed_dim,
    hidden_dim=settings.hidden_dim,
    attention_dim=settings.attention_dim,
    guide=spec.guide,
    attention_query=spec.query,
    dropout=settings.dropout,
    encoder=encoder if spec.attention else MeanEncoder(encoder),
  )


def as_floats(images: jax.Array) -> jax.Array:
  """Images in [0, 1]; those of uint8 are divided by 255."""
  return images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images


def as_batch(images: jax.Array, tokens: jax.Array, pad: int = 0) -> dict[str, jax.Array]:
  """What :func:`jaxbo_models.captioner.caption_losses` takes."""
  return {"features": as_floats(images), "tokens": tokens, "mask": tokens != pad}


def make_optimizer(settings: Settings) -> optax.GradientTransformation:
  """Adam on clipped gradients; its rate warms up and then falls to zero along a cosine."""
  warm_up = max(1, settings.steps // 15)
  steps = max(settings.steps, warm_up + 1)
  rate = optax.warmup_cosine_decay_schedule(0, settings.learning_rate, warm_up, steps)
  return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))


class State(NamedTuple):
  """What a step takes over from the last one."""

  params: Any
  opt_state: Any


def init_state(
  model: GuidedCaptioner, tx: optax.GradientTransformation, batch: dict[str, Any], key: jax.Array
) -> State:
  """Where training starts; of ``batch`` only shapes matter."""

  def init(key, images, tokens):
    params = model.init(key, images, tokens[:, :-1])["params"]
    return State(params, tx.init(params))

  return jax.jit(init)(key, batch["features"], batch["tokens"])


def make_step(
  model: GuidedCaptioner, tx: optax.GradientTransformation
) -> Callable[..., tuple[State, jax.Array]]:
  """``step(state, batch, key) -> (state, mean loss of a caption)``."""
  losses = captioner.caption_losses(model)

  def step(state, batch, key):
    if model.dropout:
      batch = batch | {"key": key}
    loss, grads = jax.value_and_grad(lambda params: jnp.mean(losses(params, batch)))(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    return State(optax.apply_updates(state.params, updates), opt_state), loss

  return step


class Asked(NamedTuple):
  """A trained captioner's compiled functions; all take parameters first.

  Attributes:
    losses: ``losses(params, images, tokens) -> [n]``, in nats a caption.
    attention: ``attention(params, images, tokens) -> [n, length - 1, cells]``, where it looks when
      it predicts the tokens that follow.
    greedy: ``greedy(params, images) -> [n, length]``, the tokens after the first.
    beam: ``beam(params, images)``, the :class:`jaxbo_models.captioner.Captions`.
  """

  losses: Callable[..., jax.Array]
  attention: Callable[..., jax.Array]
  greedy: Callable[..., jax.Array]
  beam: Callable[..., captioner.Captions]


def ask(
  model: GuidedCaptioner,
  *,
  max_length: int,
  beam_size: int,
  bos: int = 1,
  eos: int = 2,
  forbidden: tuple[int, ...] = (0, 1),
) -> Asked:
  """Compiles what is asked of a captioner.

  Args:
    model: the captioner.
    max_length: tokens of the longest caption, its end among them.
    beam_size: captions that beam search keeps.
    bos: the token that a caption begins with.
    eos: the token that it ends with.
    forbidden: tokens that are never said.
  """
  per_caption = captioner.caption_losses(model)
  never = jnp.zeros(model.vocab_size, bool).at[jnp.array(forbidden)].set(True)
  options: dict[str, Any] = {"max_length": max_length, "bos_id": bos, "eos_id": eos}
  options |= {"forbidden": never}

  def losses(params, images, tokens):
    return per_caption(params, as_batch(images, tokens))

  def attention(params, images, tokens):
    batch = as_batch(images, tokens)
    output: Any = model.apply({"params": params}, batch["features"], tokens[:, :-1])
    return output.attention

  def greedy(params, images):
    step_fn, state = captioner.make_step(model, params, as_floats(images))
    return captioner.greedy(step_fn, state, batch_size=len(images), **options)[0]

  def beam(params, images):
    return captioner.caption_images(
      model, params, as_floats(images), beam_size=beam_size, **options
    )

  return Asked(*map(jax.jit, (losses, attention, greedy, beam)))


def never_said(vocabulary: Vocabulary) -> tuple[int, ...]:
  """The tokens that no caption has: padding, the beginning, unknown words."""
  return tuple(i for i in (vocabulary.pad, vocabulary.bos, vocabulary.unk) if i is not None)


def in_batches(function: Callable[..., Any], params: Any, *arrays: Any, size: int = 250) -> Any:
  """``function(params, *arrays)`` on rows, some at a time, as NumPy arrays."""
  num = len(arrays[0])
  size = min(size, num)
  parts = []
  for begin in range(0, num, size):
    rows = np.arange(begin, begin + size) % num  # All parts have one shape.
    parts.append(jax.tree.map(np.asarray, function(params, *(array[rows] for array in arrays))))
  return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:num], *parts)


def captioned(images: Any, captions: captioner.Captions, vocabulary: Vocabulary) -> list[Captioned]:
  """The best caption of each image, to be drawn, with its end."""
  examples = []
  for image, tokens, of_beam, attention in zip(images, *captions, strict=False):
    words = [*vocabulary.decode(np.asarray(tokens[0])), "(end)"]
    probability = float(np.exp(of_beam[0]))
    title = f"probability {probability:.2g}"
    examples.append(Captioned(image, words, np.asarray(attention)[: len(words)], title))
  return examples
