"""Captioners: how they are made, trained and asked."""

import functools
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
from scripts.common.devices import Devices


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
  spec, shape = MODELS[name], (*settings.image_size, 3)
  encoder = PatchEncoder(shape, settings.patch_size, settings.hidden_dim)
  return GuidedCaptioner(
    vocab_size=vocab_size,
    embed_dim=settings.embed_dim,
    hidden_dim=settings.hidden_dim,
    attention_dim=settings.attention_dim,
    guide=spec.guide,
    attention_query=spec.query,
    dropout=settings.dropout,
    encoder=encoder if spec.attention else MeanEncoder(encoder),
    **spec.options,
  )


def as_floats(images: jax.Array) -> jax.Array:
  """Images in [0, 1]; those of uint8 are divided by 255."""
  return images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images


def as_batch(images: jax.Array, tokens: jax.Array) -> dict[str, jax.Array]:
  """What :func:`jaxbo_models.captioner.caption_losses` takes; padding is 0."""
  return {"features": as_floats(images), "tokens": tokens, "mask": tokens != 0}


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


class Told(NamedTuple):
  """What a step tells: the mean loss of a caption, and its gradient's norm before it is clipped."""

  loss: jax.Array
  grad_norm: jax.Array


def init_state(
  model: GuidedCaptioner, tx: optax.GradientTransformation, settings: Settings, key: jax.Array
) -> State:
  """Where training starts."""
  images = jnp.zeros((1, *settings.image_size, 3))
  params = model.init(key, images, jnp.zeros((1, 2), jnp.int32))["params"]
  return State(params, tx.init(params))


def make_step(
  model: GuidedCaptioner, tx: optax.GradientTransformation
) -> Callable[..., tuple[State, Told]]:
  """``step(state, batch, key) -> (state, told)``."""
  losses = captioner.caption_losses(model)

  def step(state, batch, key):
    batch = batch | ({"key": key} if model.dropout else {})
    loss, grads = jax.value_and_grad(lambda params: jnp.mean(losses(params, batch)))(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    told = Told(loss, optax.tree.norm(grads))
    return State(optax.apply_updates(state.params, updates), opt_state), told

  return step


class Asked:
  """A captioner's compiled functions; all take parameters first, and say only words.

  Results are the same on all devices, whichever have computed them.

  Attributes:
    model: the captioner.
    devices: where it is.
    losses: ``losses(params, images, tokens) -> [n]``, in nats a caption.
    attention: ``attention(params, images, tokens) -> [n, length - 1, cells]``, where it looks when
      it predicts the tokens that follow.
    greedy: ``greedy(params, images) -> [n, length]``, the tokens after the first.
    beam: ``beam(params, images)``, the best :class:`jaxbo_models.captioner.Captions`.
  """

  def __init__(
    self, name: str, settings: Settings, vocabulary: Vocabulary, beam_size: int, devices: Devices
  ):
    self._vocabulary, self.devices = vocabulary, devices
    self.model = model = make_model(name, settings, len(vocabulary))
    per_caption = captioner.caption_losses(model)
    never = [i for i in (vocabulary.pad, vocabulary.bos, vocabulary.unk) if i is not None]
    options: dict[str, Any] = {
      "max_length": settings.max_words + 1,
      "bos_id": vocabulary.bos,
      "eos_id": vocabulary.eos,
      "forbidden": jnp.zeros(model.vocab_size, bool).at[jnp.array(never)].set(True),
    }

    def losses(params, images, tokens):
      return per_caption(params, as_batch(images, tokens))

    def attention(params, images, tokens):
      output: Any = model.apply({"params": params}, as_floats(images), tokens[:, :-1])
      return output.attention

    def greedy(params, images):
      step_fn, state = captioner.make_step(model, params, as_floats(images))
      return captioner.greedy(step_fn, state, batch_size=len(images), **options)[0]

    def beam(params, images):
      images = as_floats(images)
      return captioner.caption_images(model, params, images, beam_size=beam_size, **options)

    compiled = functools.partial(jax.jit, out_shardings=devices.everywhere)
    self.losses, self.attention = compiled(losses), compiled(attention)
    self.greedy, self.beam = compiled(greedy), compiled(beam)

  def captioned(self, params: Any, images: np.ndarray) -> list[Captioned]:
    """Images with the best caption of each and its end, to be drawn."""
    examples, captions = [], jax.device_get(self.beam(params, jnp.asarray(images)))
    for image, tokens, of_beam, attention in zip(images, *captions, strict=True):
      words = [*self._vocabulary.decode(tokens[0]), "(end)"]
      title = f"probability {np.exp(of_beam[0]):.2g}"
      examples.append(Captioned(image, words, attention[: len(words)], title))
    return examples
