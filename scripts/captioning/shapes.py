"""Captioning of shapes: training on fresh scenes, and scores that have an optimum."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxbo_models.vocabulary import Vocabulary

from scripts.captioning import language
from scripts.captioning import model as caption_model
from scripts.captioning.config import Settings
from scripts.captioning.model import captioned, in_batches
from scripts.captioning.plots import Captioned
from scripts.captioning.scenes import CaptionedShapes, ShapesCaptions
from scripts.common.resumable import Resumable

NUM_EXAMPLES = 6
IMAGE_SHAPE = (32, 32, 3)
_TRAINING, _VALIDATION, _TEST = range(3)  # Streams of keys, beside the seed.


class ShapesProgram:
  """A captioner of shapes, compiled once for all seeds.

  Attributes:
    data: what it is trained on.
    model: the captioner.
    settings: sizes and rates.
    ask: what it can be asked; beam search keeps as many captions as are right.
  """

  def __init__(self, data: ShapesCaptions, name: str, settings: Settings, test_examples: int):
    self.data, self.settings = data, settings
    self._test_examples = test_examples
    self.model = caption_model.make_model(name, settings, len(data.vocabulary))
    tx = caption_model.make_optimizer(settings)
    train = caption_model.make_step(self.model, tx)

    def step(state, key_data, t):
      key = jax.random.fold_in(jax.random.wrap_key_data(key_data), t)
      scene_key, dropout_key = jax.random.split(key)
      batch = data.sample(scene_key, settings.batch_size, "train")
      tokens = captions_of_step(batch, t, settings.canonical_steps)
      return train(state, caption_model.as_batch(batch.images, tokens), dropout_key)

    def init(key):
      return caption_model.init_state(self.model, tx, like(data), key)

    self.init = jax.jit(init)
    self._step = jax.jit(step, donate_argnums=0)
    self._compiled: Any = None
    orders = 1 if data.order == "canonical" else 2  # Right captions of an image.
    self.ask = caption_model.ask(self.model, max_length=data.length - 1, beam_size=orders)

  def check(self) -> None:
    """Raises ``ValueError`` if it cannot be trained."""
    jax.eval_shape(self.init, jax.random.key(0))

  def trainer(self, seed: int, checkpoints: Path) -> "ShapesTrainer":
    """A run of it."""
    return ShapesTrainer(self, seed, checkpoints)

  def validation(self, params: Any) -> float:
    """The mean loss of a caption of scenes for validation."""
    scenes = held_out(self.data, "validation", max(1, self._test_examples // 2))
    return float(in_batches(self.ask.losses, params, scenes.images, scenes.tokens).mean())

  def test(self, params: Any) -> dict[str, Any]:
    """The scores on scenes for the test."""
    return score(self, params, "test", self._test_examples)._asdict()

  def examples(self, params: Any) -> list[Captioned]:
    """The first scenes of the test, with the best caption of each."""
    scenes = held_out(self.data, "test", self._test_examples)
    captions = self.ask.beam(params, jnp.asarray(scenes.images[:NUM_EXAMPLES]))
    return captioned(scenes.images, captions, Vocabulary(self.data.vocabulary))

  def compile(self, *arguments: Any) -> Any:
    """Returns ``step(state, key_data, t) -> (state, loss)``, which takes the state's memory."""
    if self._compiled is None:
      self._compiled = self._step.lower(*arguments).compile()
    return self._compiled


def like(data: ShapesCaptions) -> dict[str, jax.Array]:
  """A batch of the shapes of those of ``data``."""
  images = jnp.zeros((1, *IMAGE_SHAPE))
  return caption_model.as_batch(images, jnp.zeros((1, data.length), jnp.int32))


def captions_of_step(batch: CaptionedShapes, t: jax.Array, canonical_steps: int) -> jax.Array:
  """The captions to train on in step ``t``: at first those in reading order.

  To learn what a relation is, while it is open with which object the caption begins, takes many
  times as long.
  """
  turned = (batch.cells[:, 0] > batch.cells[:, -1]) & (t < canonical_steps)
  return jnp.where(turned[:, None], batch.valid[:, -1], batch.tokens)


class ShapesTrainer(Resumable):
  """A run of a captioner of shapes."""

  def __init__(self, program: ShapesProgram, seed: int, checkpoints: Path):
    super().__init__(program.init(jax.random.key(seed)), checkpoints)
    self._key_data = jax.random.key_data(_key(seed, _TRAINING))
    self._step = program.compile(self.state, self._key_data, jnp.int32(0))

  def advance(self, t: int) -> jax.Array:
    """Trains on fresh scenes; returns the mean loss of their captions."""
    self.state, loss = self._step(self.state, self._key_data, jnp.int32(t))
    return loss


def _key(seed: int, stream: int) -> jax.Array:
  return jax.random.fold_in(jax.random.key(seed), stream)


@functools.lru_cache(maxsize=8)
def held_out(data: ShapesCaptions, part: str, num: int) -> CaptionedShapes:
  """The scenes that all captioners are judged by, as NumPy arrays."""
  stream = _VALIDATION if part == "validation" else _TEST
  draw = jax.jit(lambda key: data.sample(key, num, part))
  return jax.tree.map(np.asarray, draw(_key(0, stream)))


class ShapesScores(NamedTuple):
  """How good a captioner of shapes is; losses and entropies are in nats a caption.

  Attributes:
    exact_match: the share of greedy captions that are right.
    nll: the mean loss of a caption.
    standard_error: of ``nll``.
    entropy: the least ``nll`` that there can be.
    blind: the least that there can be without looking.
    mass: mean attention on the cell of the object that a word is about, when the word is predicted:
      its colour and shape, for the object mentioned first and that mentioned second.
    mentioned: the mean of these, without the first colour in either order: which object comes first
      is open until then.
    both_orders: the share of images for which the beam holds the two right captions and no others.
    beam_gap: the mean difference of their log-probabilities.
    beam_sum: the mean sum of their probabilities.
  """

  exact_match: float
  nll: float
  standard_error: float
  entropy: float
  blind: float
  mass: tuple[float, ...]
  mentioned: float
  both_orders: float
  beam_gap: float
  beam_sum: float


def score(program: ShapesProgram, params: Any, part: str, num: int) -> ShapesScores:
  """Judges a captioner on scenes of a part."""
  data, ask = program.data, program.ask
  batch, entropies = held_out(data, part, num), data.entropies(part)
  losses = in_batches(ask.losses, params, batch.images, batch.tokens)
  said = in_batches(ask.greedy, params, batch.images)
  mass = attention_mass(program, params, batch)
  both, gap, total = (float("nan"),) * 3
  if data.order == "either":
    tokens, log_probabilities, _ = in_batches(ask.beam, params, batch.images)
    # Both orders of the beam against both right captions.
    same = lambda a, b: _equal(tokens[:, a], batch.valid[:, b])
    both = float(np.mean((same(0, 0) & same(1, 1)) | (same(0, 1) & same(1, 0))))
    gap = float(np.mean(log_probabilities[:, 0] - log_probabilities[:, 1]))
    total = float(np.mean(np.exp(log_probabilities).sum(axis=1)))
  return ShapesScores(
    exact_match=exact_match(said, batch.valid),
    nll=float(losses.mean()),
    standard_error=float(losses.std(ddof=1) / np.sqrt(len(losses))),
    entropy=entropies.given_image,
    blind=entropies.caption,
    mass=mass,
    mentioned=float(np.mean(mass[1:] if data.order == "either" else mass)),
    both_orders=both,
    beam_gap=gap,
    beam_sum=total,
  )


def attention_mass(
  program: ShapesProgram, params: Any, batch: CaptionedShapes
) -> tuple[float, ...]:
  """Attention on the right cell when the colour and the shape of each object are predicted.

  Without attention over the cells of the grid, NaN.
  """
  attention = in_batches(program.ask.attention, params, batch.images, batch.tokens)
  if attention.shape[-1] == 1:
    return (float("nan"),) * (2 * program.data.num_objects)
  targets, rows = batch.tokens[:, 1:], np.arange(len(attention))
  first_color, first_shape = language.FIRST_COLOR, language.FIRST_SHAPE
  masses = []
  for k in range(program.data.num_objects):
    for low, high in ((first_color, first_shape), (first_shape, len(language.VOCABULARY))):
      is_word = (targets >= low) & (targets < high)
      place = (np.cumsum(is_word, axis=1) == k + 1).argmax(axis=1)
      masses.append(float(np.mean(attention[rows, place, batch.cells[:, k]])))
  return tuple(masses)


def exact_match(said: Any, valid: Any) -> float:
  """The share of what was said, ``[n, length - 1]``, that is right, ``valid [n, v, length]``."""
  right = [_equal(said, valid[:, v]) for v in range(valid.shape[1])]
  return float(np.mean(np.any(right, axis=0)))


def _equal(said: Any, caption: Any) -> np.ndarray:
  """Whether what was said, ``[n, length - 1]``, is the caption ``[n, length]`` up to its end."""
  targets = caption[:, 1:]
  counts = (np.cumsum(targets == language.EOS, axis=1) - (targets == language.EOS)) == 0
  return np.all((said == targets) | ~counts, axis=1)
