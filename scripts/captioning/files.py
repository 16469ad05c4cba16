"""Captioning of images from files: vocabulary, batches by length, and the usual scores."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxbo_models import caption_metrics
from jaxbo_models.vocabulary import Vocabulary

from scripts.captioning import batches as caption_batches
from scripts.captioning import data as caption_data
from scripts.captioning import model as caption_model
from scripts.captioning.config import Config, Settings
from scripts.captioning.data import CaptionData, CaptionedImages
from scripts.captioning.plots import Captioned
from scripts.common.resumable import Resumable

NUM_EXAMPLES = 6
NUM_LENGTHS = 3  # Groups of captions by length; each is compiled for.


def read(config: Config) -> CaptionData:
  """The images of a data set and their captions.

  Raises:
    FileNotFoundError: if they are not there.
    ValueError: if a set is empty, or the data are not as they have to be.
  """
  size = config.settings().image_size
  if config.dataset == "json":
    assert config.json_file is not None
    return caption_data.read_json(config.json_file, size, config.image_dir, config.max_images)
  readers = {
    "nlvr_captions": caption_data.nlvr_captions,
    "coco_captions_open": caption_data.coco_captions_open,
    "coco_captions": caption_data.coco_captions,
  }
  data = readers[config.dataset](size, config.data_dir, config.max_images)
  for part, images in data._asdict().items():
    if not images.names:
      raise ValueError(f"max_images must leave images for {part}, got {config.max_images}")
  return data


def make_vocabulary(data: CaptionData, settings: Settings) -> Vocabulary:
  """The words that occur often enough in the captions to train on."""
  captions = [words for of_image in data.train.captions for words in of_image]
  return Vocabulary.build(captions, min_count=settings.min_count)


class FilesProgram:
  """A captioner of images from files, compiled once for all seeds and for a few lengths.

  Attributes:
    data: the images.
    vocabulary: of the captions to train on.
    model: the captioner.
    settings: sizes and rates.
    ask: what it can be asked; it never says ``<unk>``.
  """

  def __init__(
    self,
    data: CaptionData,
    vocabulary: Vocabulary,
    name: str,
    settings: Settings,
    beam_size: int,
  ):
    self.data, self.vocabulary, self.settings = data, vocabulary, settings
    self.model = caption_model.make_model(name, settings, len(vocabulary))
    tx = caption_model.make_optimizer(settings)
    self.rows = caption_batches.encode(data.train.captions, vocabulary, settings.max_words)
    self.images = jax.device_put(data.train.images)
    train = caption_model.make_step(self.model, tx)

    def step(state, images, image, tokens, key_data, t):
      key = jax.random.fold_in(jax.random.wrap_key_data(key_data), t)
      return train(state, caption_model.as_batch(images[image], tokens), key)

    def init(key):
      images = jnp.zeros((1, *self.images.shape[1:]))  # Not a constant of all images.
      batch = caption_model.as_batch(images, jnp.zeros((1, settings.max_words + 2), jnp.int32))
      return caption_model.init_state(self.model, tx, batch, key)

    self.init = jax.jit(init)
    self.step = jax.jit(step, donate_argnums=0)
    self.ask = caption_model.ask(
      self.model,
      max_length=settings.max_words + 1,
      beam_size=beam_size,
      forbidden=caption_model.never_said(vocabulary),
    )

  def check(self) -> None:
    """Raises ``ValueError`` if it cannot be trained."""
    jax.eval_shape(self.init, jax.random.key(0))
    self._batches(0)

  def trainer(self, seed: int, checkpoints: Path) -> "FilesTrainer":
    """A run of it."""
    return FilesTrainer(self, seed, checkpoints, self._batches(seed))

  def _batches(self, seed: int) -> caption_batches.LengthBatches:
    return caption_batches.LengthBatches(
      self.rows.num_tokens, self.settings.batch_size, NUM_LENGTHS, seed
    )

  def validation(self, params: Any) -> float:
    """The mean loss of a token of the captions for validation."""
    return token_nll(self, params, self.data.validation)

  def test(self, params: Any) -> dict[str, Any]:
    """The scores on the images for the test."""
    return score(self, params, self.data.test)

  def examples(self, params: Any) -> list[Captioned]:
    """Some images for the test, spread over the set, with the best caption of each."""
    images = self.data.test.images
    images = images[np.linspace(0, len(images) - 1, NUM_EXAMPLES).astype(int)]
    return caption_model.captioned(
      images, self.ask.beam(params, jnp.asarray(images)), self.vocabulary
    )


class FilesTrainer(Resumable):
  """A run of a captioner of images from files."""

  def __init__(
    self,
    program: FilesProgram,
    seed: int,
    checkpoints: Path,
    batches: caption_batches.LengthBatches,
  ):
    super().__init__(program.init(jax.random.key(seed)), checkpoints)
    self._program, self._batches = program, batches
    self._key_data = jax.random.key_data(jax.random.key(seed))

  def advance(self, t: int) -> jax.Array:
    """Trains on the captions whose turn it is; returns their mean loss."""
    batch, rows = self._batches(t), self._program.rows
    self.state, loss = self._program.step(
      self.state,
      self._program.images,
      rows.image[batch.rows],
      rows.tokens[batch.rows, : batch.length],
      self._key_data,
      np.int32(t),
    )
    return loss


def token_nll(program: FilesProgram, params: Any, images: CaptionedImages) -> float:
  """The mean loss of a token, the end of a caption among them."""
  rows = caption_batches.encode(images.captions, program.vocabulary, program.settings.max_words)
  losses = caption_model.in_batches(
    program.ask.losses, params, images.images[rows.image], rows.tokens
  )
  return float(losses.sum() / (rows.num_tokens - 1).sum())


def score(program: FilesProgram, params: Any, images: CaptionedImages) -> dict[str, Any]:
  """Captions images by beam search and compares with what people wrote.

  Returns:
    ``token_nll``, the scores of :func:`jaxbo_models.caption_metrics.summary`, and ``meteor`` and
    ``spice``: NaN where they were skipped, with the reason in ``skipped``.
  """
  captions = caption_model.in_batches(program.ask.beam, params, images.images, size=100)
  said = [program.vocabulary.decode(of_image[0]) for of_image in captions.tokens]
  java = [
    of_java(said, images.captions) for of_java in (caption_metrics.meteor, caption_metrics.spice)
  ]
  return {
    "token_nll": token_nll(program, params, images),
    **caption_metrics.summary(said, images.captions),
    "meteor": java[0].value,
    "spice": java[1].value,
    "skipped": "; ".join(score.reason for score in java if score.reason),
  }
