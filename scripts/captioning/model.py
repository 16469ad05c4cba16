"""Captioners: how they are made, trained and asked."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

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
from scripts.common.study import Program, Row, Spent, Task


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
  model: GuidedCaptioner, tx: optax.GradientTransformation, settings: Settings, key: jax.Array
) -> State:
  """Where training starts."""
  images = jnp.zeros((1, *settings.image_size, 3))
  params = model.init(key, images, jnp.zeros((1, 2), jnp.int32))["params"]
  return State(params, tx.init(params))


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
  """A trained captioner's compiled functions; all take parameters first, and say only words.

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


def ask(model: GuidedCaptioner, settings: Settings, vocabulary: Vocabulary, beam: int) -> Asked:
  """Compiles what is asked of a captioner; its beam search keeps ``beam`` captions."""
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
    batch = as_batch(images, tokens)
    output: Any = model.apply({"params": params}, batch["features"], tokens[:, :-1])
    return output.attention

  def greedy(params, images):
    step_fn, state = captioner.make_step(model, params, as_floats(images))
    return captioner.greedy(step_fn, state, batch_size=len(images), **options)[0]

  def search(params, images):
    return captioner.caption_images(model, params, as_floats(images), beam_size=beam, **options)

  return Asked(*map(jax.jit, (losses, attention, greedy, search)))


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


class Source(Protocol):
  """Images with captions, in three sets: to train on, to choose by, and to report.

  Attributes:
    vocabulary: of the captions.
    beam_size: captions that beam search keeps.
  """

  vocabulary: Vocabulary
  beam_size: int

  def shown(self) -> np.ndarray:
    """Images of the test set for pictures."""
    ...

  def key(self, seed: int) -> jax.Array:
    """What random numbers of training come from."""
    ...

  def batches(self, seed: int) -> Callable[[int], tuple[Any, ...]]:
    """What each step takes; raises ``ValueError`` if there are too few captions."""
    ...

  def shapes(self) -> list[tuple[Any, ...]]:
    """For each shape that there is, what a step may take."""
    ...

  def draw(self, key: jax.Array, t: jax.Array, *batch: Any) -> tuple[Any, Any, jax.Array]:
    """``(images, tokens, key)`` of step ``t``; traced."""
    ...

  def validation(self, ask: Asked, params: Any) -> float:
    """The loss on the validation set."""
    ...

  def test(self, ask: Asked, params: Any) -> Row:
    """Scores on the test set."""
    ...


class Captioner:
  """A captioner of the images of a source, compiled once for all seeds.

  Attributes:
    source: of images and captions.
    settings: sizes and rates.
    init: ``init(key)``, where training starts.
    program: a step of training.
    ask: what it can be asked.
  """

  def __init__(self, name: str, source: Source, settings: Settings):
    self.source, self.settings = source, settings
    model, tx = make_model(name, settings, len(source.vocabulary)), make_optimizer(settings)
    train = make_step(model, tx)

    def step(state, t, key_data, *batch):
      key = jax.random.fold_in(jax.random.wrap_key_data(key_data), t)
      images, tokens, key = source.draw(key, t, *batch)
      return train(state, as_batch(images, tokens), key)

    self.init = jax.jit(lambda key: init_state(model, tx, settings, key))
    self.program = Program(step)
    self.ask = ask(model, settings, source.vocabulary, source.beam_size)

  def check(self) -> None:
    """Raises ``ValueError`` if it cannot be trained."""
    jax.eval_shape(self.init, jax.random.key(0))
    self.source.batches(0)

  def examples(self, params: Any) -> list[Captioned]:
    """Some images of the test set with what it says of them."""
    images = self.source.shown()
    return captioned(images, self.ask.beam(params, jnp.asarray(images)), self.source.vocabulary)


class Training(Task):
  """A captioner on one seed."""

  def __init__(self, captioner: Captioner, seed: int):
    self._captioner = captioner
    self._key = jax.random.key_data(captioner.source.key(seed))
    self._batch = captioner.source.batches(seed)
    self.state = captioner.init(jax.random.key(seed))
    for batch in captioner.source.shapes():
      captioner.program.compile(self.state, self._key, *batch)

  def step(self, state: State, t: int) -> tuple[State, jax.Array]:
    """Trains on the captions whose turn it is; tells their mean loss."""
    arguments = self._key, *self._batch(t)
    return self._captioner.program.compile(state, *arguments)(state, jnp.int32(t), *arguments)

  def evaluate(self, state: State, told: list[Any]) -> Row:
    """Losses so far."""
    source, ask = self._captioner.source, self._captioner.ask
    return {
      "train_loss": float(told[-1]),
      "validation_nll": source.validation(ask, state.params),
    }

  def result(self, state: State, spent: Spent) -> Row:
    """The scores on the test set."""
    scores = self._captioner.source.test(self._captioner.ask, state.params)
    return scores | {"ms_per_step": 1e3 * spent.seconds / self._captioner.settings.steps}
