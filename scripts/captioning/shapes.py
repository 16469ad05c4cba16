"""Captions of shapes: training on fresh scenes, and scores that have an optimum."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxbo_models.vocabulary import Vocabulary

from scripts.captioning import language
from scripts.captioning.config import Settings
from scripts.captioning.model import Asked, in_batches
from scripts.captioning.scenes import CaptionedShapes, ShapesCaptions
from scripts.common.folder import Row

NUM_EXAMPLES = 6
VOCABULARY = Vocabulary(language.VOCABULARY)
_TRAINING, _VALIDATION, _TEST = range(3)  # Streams of keys, beside the seed.


class Shapes:
  """Scenes that are drawn afresh at every step, and held-out ones to judge by.

  Beam search keeps as many captions as are right.
  """

  vocabulary = VOCABULARY

  def __init__(self, order: str, settings: Settings, num_test: int):
    self.data, self._settings, self._num_test = ShapesCaptions(order=order), settings, num_test
    self.beam_size = 1 if order == "canonical" else 2

  def shown(self) -> np.ndarray:
    """The first images of the test set."""
    return np.asarray(held_out(self.data, "test", self._num_test).images[:NUM_EXAMPLES])

  def key(self, seed: int) -> jax.Array:
    """What scenes come from."""
    return _key(seed, _TRAINING)

  def batches(self, seed: int) -> Callable[[int], tuple[()]]:
    """Nothing: a step draws its scenes."""
    del seed
    return lambda t: ()

  def shapes(self) -> list[tuple[()]]:
    """Nothing, once."""
    return [()]

  def draw(self, key: jax.Array, t: jax.Array, *batch: Any) -> tuple[Any, Any, jax.Array]:
    """Fresh scenes, with their captions, and a key for dropout."""
    del batch
    scene_key, dropout_key = jax.random.split(key)
    batch = self.data.sample(scene_key, self._settings.batch_size, "train")
    return batch.images, captions_of_step(batch, t, self._settings.canonical_steps), dropout_key

  def validation(self, ask: Asked, params: Any) -> float:
    """The mean loss of a caption of scenes for validation."""
    scenes = held_out(self.data, "validation", max(1, self._num_test // 2))
    return float(in_batches(ask.losses, params, scenes.images, scenes.tokens).mean())

  def test(self, ask: Asked, params: Any) -> Row:
    """The scores on scenes for the test."""
    return score(self.data, ask, params, self._num_test)


def captions_of_step(batch: CaptionedShapes, t: jax.Array, canonical_steps: int) -> jax.Array:
  """The captions to train on in step ``t``: at first those in reading order.

  To learn what a relation is, while it is open with which object the caption begins, takes many
  times as long.
  """
  turned = (batch.cells[:, 0] > batch.cells[:, -1]) & (t < canonical_steps)
  return jnp.where(turned[:, None], batch.valid[:, -1], batch.tokens)


def _key(seed: int, stream: int) -> jax.Array:
  return jax.random.fold_in(jax.random.key(seed), stream)


@functools.lru_cache(maxsize=8)
def held_out(data: ShapesCaptions, part: str, num: int) -> CaptionedShapes:
  """The scenes that all captioners are judged by, as NumPy arrays."""
  stream = _VALIDATION if part == "validation" else _TEST
  draw = jax.jit(lambda key: data.sample(key, num, part))
  return jax.tree.map(np.asarray, draw(_key(0, stream)))


def score(data: ShapesCaptions, ask: Asked, params: Any, num: int) -> Row:
  """Judges a captioner on scenes for the test; losses and entropies are in nats a caption.

  Returns:
    ``exact_match``: the share of greedy captions that are right.
    ``nll``, ``standard_error``: the mean loss of a caption, and its standard error.
    ``entropy``: the least ``nll`` that there can be; ``blind``: that without looking.
    ``mass_0``, ...: mean attention on the cell of the object that a word is about, when the word is
      predicted: its colour and shape, for the object mentioned first and that mentioned second.
    ``mentioned``: the mean of these, without the first colour in either order: which object comes
      first is open until then.
    ``both_orders``: the share of images for which the beam holds the two right captions and no
      others; ``beam_gap``: the mean difference of their log-probabilities; ``beam_sum``: the mean
      sum of their probabilities.
  """
  batch, entropies = held_out(data, "test", num), data.entropies("test")
  losses = in_batches(ask.losses, params, batch.images, batch.tokens)
  said = in_batches(ask.greedy, params, batch.images)
  mass = attention_mass(ask, params, batch)
  both, gap, total = (float("nan"),) * 3
  if data.order == "either":
    tokens, log_probabilities, _ = in_batches(ask.beam, params, batch.images)
    # Both orders of the beam against both right captions.
    same = lambda a, b: _equal(tokens[:, a], batch.valid[:, b])
    both = float(np.mean((same(0, 0) & same(1, 1)) | (same(0, 1) & same(1, 0))))
    gap = float(np.mean(log_probabilities[:, 0] - log_probabilities[:, 1]))
    total = float(np.mean(np.exp(log_probabilities).sum(axis=1)))
  return {
    "exact_match": exact_match(said, batch.valid),
    "nll": float(losses.mean()),
    "standard_error": float(losses.std(ddof=1) / np.sqrt(len(losses))),
    "entropy": entropies.given_image,
    "blind": entropies.caption,
    **{f"mass_{i}": part for i, part in enumerate(mass)},
    "mentioned": float(np.mean(mass[1:] if data.order == "either" else mass)),
    "both_orders": both,
    "beam_gap": gap,
    "beam_sum": total,
  }


def attention_mass(ask: Asked, params: Any, batch: CaptionedShapes) -> list[float]:
  """Attention on the right cell when the colour and the shape of each object are predicted.

  Without attention over the cells of the grid, NaN.
  """
  attention = in_batches(ask.attention, params, batch.images, batch.tokens)
  targets, rows = batch.tokens[:, 1:], np.arange(len(attention))
  first_color, first_shape = language.FIRST_COLOR, language.FIRST_SHAPE
  masses = []
  for k in range(batch.cells.shape[1]):
    for low, high in ((first_color, first_shape), (first_shape, len(language.VOCABULARY))):
      is_word = (targets >= low) & (targets < high)
      place = (np.cumsum(is_word, axis=1) == k + 1).argmax(axis=1)
      looked = attention.shape[-1] > 1
      of_cell = attention[rows, place, batch.cells[:, k]] if looked else np.nan
      masses.append(float(np.mean(of_cell)))
  return masses


def exact_match(said: Any, valid: Any) -> float:
  """The share of what was said, ``[n, length - 1]``, that is right, ``valid [n, v, length]``."""
  right = [_equal(said, valid[:, v]) for v in range(valid.shape[1])]
  return float(np.mean(np.any(right, axis=0)))


def _equal(said: Any, caption: Any) -> np.ndarray:
  """Whether what was said, ``[n, length - 1]``, is the caption ``[n, length]`` up to its end."""
  targets = caption[:, 1:]
  counts = (np.cumsum(targets == language.EOS, axis=1) - (targets == language.EOS)) == 0
  return np.all((said == targets) | ~counts, axis=1)
