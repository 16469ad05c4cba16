"""Captions of images from files: vocabulary, batches by length, and the usual scores."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxbo_models import caption_metrics
from jaxbo_models.vocabulary import Vocabulary

from scripts.captioning import plots
from scripts.captioning.batches import LengthBatches, encode
from scripts.captioning.config import Settings
from scripts.captioning.data import CaptionData, CaptionedImages
from scripts.captioning.model import Asked
from scripts.common.devices import Devices, in_batches
from scripts.common.task import Row

NUM_LENGTHS = 3  # Groups of captions by length; each is compiled for.


class Files:
  """Images from files; words that occur often enough in captions to train on are known."""

  def __init__(self, data: CaptionData, settings: Settings, beam_size: int, devices: Devices):
    self._data, self._settings, self.beam_size = data, settings, beam_size
    captions = [words for of_image in data.train.captions for words in of_image]
    self.vocabulary = Vocabulary.build(captions, min_count=settings.min_count)
    self._rows = encode(data.train.captions, self.vocabulary, settings.max_words)
    self._images = jax.device_put(data.train.images, devices.everywhere)
    self.batches(0)  # Refuses too large a batch_size.

  def shown(self) -> np.ndarray:
    """Images of the test set, spread over it."""
    images = self._data.test.images
    return images[np.linspace(0, len(images) - 1, plots.NUM_EXAMPLES).astype(int)]

  def key(self, seed: int) -> jax.Array:
    """What dropout comes from."""
    return jax.random.key(seed)

  def batches(self, seed: int) -> tuple[Callable[[int], tuple[Any, ...]], list[tuple[Any, ...]]]:
    """For each step all images, which of them captions are of, and the captions; all shapes."""
    size, images = self._settings.batch_size, self._images
    batches = LengthBatches(self._rows.num_tokens, size, NUM_LENGTHS, seed)

    def arguments(rows, length):
      return images, self._rows.image[rows], self._rows.tokens[rows, :length]

    first = np.arange(size)
    return lambda t: arguments(*batches(t)), [arguments(first, n) for n in batches.lengths]

  def draw(self, key: jax.Array, t: jax.Array, *batch: Any) -> tuple[Any, Any, jax.Array]:
    """The images of a batch, their captions, and a key for dropout."""
    del t
    images, rows, tokens = batch
    return images[rows], tokens, key

  def validation(self, ask: Asked, params: Any) -> float:
    """The mean loss of a token of the captions for validation."""
    return self.token_nll(ask, params, self._data.validation)

  def test(self, ask: Asked, params: Any) -> Row:
    """Captions images by beam search and compares with what people wrote.

    Returns:
      ``token_nll``; ``image_gain``, by how much it is greater with images of other captions;
      ``distinct``, how many different captions there are; ``words``, how many a caption has; the
      scores of :func:`jaxbo_models.caption_metrics.summary`; ``meteor`` and ``spice``, NaN where
      they were skipped, with the reason in ``skipped``.
    """
    images = self._data.test
    captions = in_batches(ask.devices, ask.beam, params, images.images, size=100)
    said = [self.vocabulary.decode(of_image[0]) for of_image in captions.tokens]
    meteor = caption_metrics.meteor(said, images.captions)
    spice = caption_metrics.spice(said, images.captions)
    token_nll = self.token_nll(ask, params, images)
    others = images._replace(images=np.roll(images.images, len(images.images) // 2, axis=0))
    return {
      "token_nll": token_nll,
      "image_gain": self.token_nll(ask, params, others) - token_nll,
      "distinct": len({*map(tuple, said)}),
      "words": sum(map(len, said)) / len(said),
      **caption_metrics.summary(said, images.captions),
      "meteor": meteor.value,
      "spice": spice.value,
      "skipped": "; ".join(score.reason for score in (meteor, spice) if score.reason),
    }

  def token_nll(self, ask: Asked, params: Any, images: CaptionedImages) -> float:
    """The mean loss of a token, the end of a caption among them."""
    rows = encode(images.captions, self.vocabulary, self._settings.max_words)
    losses = in_batches(ask.devices, ask.losses, params, images.images[rows.image], rows.tokens)
    return float(losses.sum() / (rows.num_tokens - 1).sum())
