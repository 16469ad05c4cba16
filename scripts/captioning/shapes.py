"""Captions of shapes: training on fresh scenes, and scores that have an optimum."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scripts.captioning import plots
from scripts.captioning.config import Settings
from scripts.captioning.language import EOS, PAD, VOCABULARY
from scripts.captioning.model import Asked
from scripts.captioning.scenes import CaptionedShapes, ShapesCaptions
from scripts.common.devices import in_batches
from scripts.common.task import Row

_TRAINING, _VALIDATION, _TEST = range(3)  # Streams of keys, beside the seed.


class Shapes:
  """Scenes that are drawn afresh at every step, and held-out ones to judge by.

  Beam search keeps as many captions as are right.
  """

  vocabulary = VOCABULARY

  def __init__(self, order: str, settings: Settings, num_test: int):
    self.data, self._settings, self._num_test = ShapesCaptions(order=order), settings, num_test
    self.beam_size = 1 if order == "canonical" else 2

  def shown(self) -> Any:
    """The first images of the test set."""
    return held_out(self.data, "test", self._num_test).images[: plots.NUM_EXAMPLES]

  def key(self, seed: int) -> jax.Array:
    """What scenes come from."""
    return stream(seed, _TRAINING)

  def batches(self, seed: int) -> tuple[Callable[[int], tuple[()]], list[tuple[()]]]:
    """Nothing: a step draws its scenes."""
    del seed
    return lambda t: (), [()]

  def draw(self, key: jax.Array, t: jax.Array, *batch: Any) -> tuple[Any, Any, jax.Array]:
    """Fresh scenes, with their captions, and a key for dropout."""
    del batch
    scene_key, dropout_key = jax.random.split(key)
    batch = self.data.sample(scene_key, self._settings.batch_size, "train")
    return batch.images, captions_of_step(batch, t, self._settings.canonical_steps), dropout_key

  def validation(self, ask: Asked, params: Any) -> float:
    """The mean loss of a caption of scenes for validation."""
    scenes = held_out(self.data, "validation", max(1, self._num_test // 2))
    return float(in_batches(ask.devices, ask.losses, params, scenes.images, scenes.tokens).mean())

  def test(self, ask: Asked, params: Any) -> Row:
    """Judges a captioner on scenes for the test; losses and entropies are in nats a caption.

    Returns:
      ``exact_match``: the share of greedy captions that are right.
      ``nll``, ``standard_error``: the mean loss of a caption, and its standard error.
      ``entropy``: the least ``nll`` that there can be; ``blind``: that without looking.
      ``mass_0``, ...: mean attention on the cell of the object that a word is about, when the word
        is predicted: its color and shape, for the object mentioned first and for the second.
      ``mentioned``: the mean of these, without the first color in either order: which object comes
        first is open until then.
      ``both_orders``: the share of images for which the beam holds the two right captions and no
        others; ``beam_gap``: the mean difference of their log-probabilities; ``beam_sum``: the mean
        sum of their probabilities.
    """
    batch = held_out(self.data, "test", self._num_test)
    entropy, blind = self.data.entropies("test")
    losses = in_batches(ask.devices, ask.losses, params, batch.images, batch.tokens)
    said = in_batches(ask.devices, ask.greedy, params, batch.images)
    mass = attention_mass(ask, params, batch)
    both, gap, total = (float("nan"),) * 3
    if self.data.order == "either":
      tokens, log_probabilities, _ = in_batches(ask.devices, ask.beam, params, batch.images)
      found = _right(tokens[:, :, None], batch.valid[:, None]).any(axis=1)
      both = float(np.mean(found.all(axis=1)))
      gap = float(np.mean(log_probabilities[:, 0] - log_probabilities[:, 1]))
      total = float(np.mean(np.exp(log_probabilities).sum(axis=1)))
    return {
      "exact_match": exact_match(said, batch.valid),
      "nll": float(losses.mean()),
      "standard_error": float(losses.std(ddof=1) / np.sqrt(len(losses))),
      "entropy": entropy,
      "blind": blind,
      **{f"mass_{i}": of_word for i, of_word in enumerate(mass)},
      "mentioned": float(np.mean(mass[1:] if self.data.order == "either" else mass)),
      "both_orders": both,
      "beam_gap": gap,
      "beam_sum": total,
    }


def captions_of_step(batch: CaptionedShapes, t: jax.Array, canonical_steps: int) -> jax.Array:
  """The captions to train on in step ``t``: at first those in reading order.

  To learn what a relation is, while it is open with which object the caption begins, takes many
  times as long.
  """
  turned = (batch.cells[:, 0] > batch.cells[:, -1]) & (t < canonical_steps)
  return jnp.where(turned[:, None], batch.valid[:, -1], batch.tokens)


def stream(seed: int, number: int) -> jax.Array:
  """The key of a purpose, beside those of others."""
  return jax.random.fold_in(jax.random.key(seed), number)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def draw(data: ShapesCaptions, key: jax.Array, num: int, part: str) -> CaptionedShapes:
  """What ``data.sample`` draws; compiled once for all keys."""
  return data.sample(key, num, part)


@functools.lru_cache(maxsize=8)
def held_out(data: ShapesCaptions, part: str, num: int) -> CaptionedShapes:
  """The scenes that all captioners are judged by, as NumPy arrays."""
  key = stream(0, _VALIDATION if part == "validation" else _TEST)
  return jax.tree.map(np.asarray, draw(data, key, num, part))


def attention_mass(ask: Asked, params: Any, batch: CaptionedShapes) -> list[float]:
  """Attention on the right cell when the color and the shape of each object are predicted.

  Without attention over the cells of the grid, NaN.
  """
  attention = in_batches(ask.devices, ask.attention, params, batch.images, batch.tokens)
  if attention.shape[-1] == 1:
    return [float("nan")] * 4
  rows, end = np.arange(len(attention)), (batch.tokens[:, 1:] == EOS).argmax(axis=1)
  places = (1, 2, end - 2, end - 1)  # "a COLOR SHAPE ... a COLOR SHAPE".
  cells = batch.cells[:, [0, 0, 1, 1]].T
  looked = (attention[rows, place, cell] for place, cell in zip(places, cells, strict=True))
  return [float(np.mean(of_object)) for of_object in looked]


def exact_match(said: Any, valid: Any) -> float:
  """The share of what was said, ``[n, 9]``, that is right, ``valid [n, v, 10]``."""
  return float(np.mean(_right(said[:, None], valid).any(axis=1)))


def _right(said: Any, caption: Any) -> Any:
  """Whether what was said, ``[..., 9]``, is the caption ``[..., 10]``; a search fills up by EOS."""
  targets = caption[..., 1:]
  return np.all(said == np.where(targets == PAD, EOS, targets), axis=-1)
