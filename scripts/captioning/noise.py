r"""The captioner as the loss of other methods, where captions are wrong.

**Reweighting.** Colour words are flipped in training; batches are weighted by the losses of their
captions. What prefers great losses prefers wrong captions.

**Hyper-cleaning.** Some captions are those of other scenes. A captioner is trained on such
scenes; then a weight for each of some captions is learnt so that a few more steps on weighted
captions, from there, do well on a few clean ones:

.. math::
  \min_x \frac{1}{|V|} \sum_{j \in V} \ell_j(y^N(x)), \qquad
  y^{n+1} = y^n - \beta\, \nabla_y
    \frac{\sum_{i \in B_n} \sigma(x_i)\, \ell_i(y^n)}{\sum_{i \in B_n} \sigma(x_i)}

with the losses :math:`\ell` of captions, through the scan of the decoder and its attention. All
inner runs begin at the same captioner: one that goes on where the last run ended learns the few
captions by heart, the swapped ones too.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxbo_models import captioner
from sklearn.metrics import roc_auc_score

import jaxbo
from scripts.captioning import model as caption_model
from scripts.captioning.config import Settings
from scripts.captioning.scenes import ShapesCaptions
from scripts.captioning.shapes import exact_match, held_out, like
from scripts.common import cleaning

Advance = Callable[[int], None]


_REWEIGHTING = Settings(attention_dim=32, batch_size=64, steps=2000)
_CLEANING = dataclasses.replace(_REWEIGHTING, steps=300)
_RESPONSES = cleaning.Settings(num_samples=32, smoothing=1.0, linear_steps=5, damping=10.0)
_TRAINING, _WEIGHTED, _CLEAN, _TEST, _ORDER = range(5)  # Streams of keys, beside the seed.


@dataclasses.dataclass(frozen=True)
class NoiseSettings:
  """Sizes and rates of both experiments.

  Attributes:
    color_flips: the probability that a colour word is wrong, for reweighting.
    reweighting: the captioner and its training, for reweighting.
    swaps: the share of captions of other scenes, for hyper-cleaning.
    num_train: captions that get a weight.
    num_val: clean captions.
    batch_size: captions of an inner step.
    inner_steps: inner steps for one outer step.
    inner_learning_rate: of SGD, inside.
    outer_steps: outer steps.
    outer_learning_rate: of Adam, on the logits of the weights.
    captioner: its sizes and its training before, for hyper-cleaning.
    responses: what the responses take; see :class:`scripts.common.cleaning.Settings`.
  """

  color_flips: float = 0.2
  reweighting: Settings = _REWEIGHTING
  swaps: float = 0.3
  num_train: int = 256
  num_val: int = 1024
  batch_size: int = 64
  inner_steps: int = 4
  inner_learning_rate: float = 5e-3
  outer_steps: int = 100
  outer_learning_rate: float = 0.1
  captioner: Settings = _CLEANING
  responses: cleaning.Settings = _RESPONSES


WEIGHTINGS = {
  "uniform": ("uniform", jaxbo.uniform),
  "ir_dro": ("IR-DRO, temperature 4", lambda: jaxbo.kl(4.0)),
  "tilted": ("TERM, tilt -1/4 (prefers small losses)", lambda: jaxbo.tilted(-0.25)),
  "mid_rank": ("MidRanking, band 3", lambda: jaxbo.mid_rank(0.125, 3)),
  "quadratic": ("Quadratic", lambda: jaxbo.quadratic(0.4)),
}
RESPONSES = ("first_order", "itd", "esj", "aid")


class ReweightingRow(NamedTuple):
  """A weighting on one seed.

  Attributes:
    weighting: its name.
    seed: of parameters and scenes.
    exact_match: on held-out scenes.
    nll: mean loss of their clean captions.
    wrong_weight: mean weight of captions with a flipped colour in batches of noisy captions that
      were not trained on; 1 for uniform weights.
    auc: of "a colour is flipped" by small weights; 0.5 where weights say nothing.
    loss_auc: of the same by great losses.
  """

  weighting: str
  seed: int
  exact_match: float
  nll: float
  wrong_weight: float
  auc: float
  loss_auc: float


def reweight(name: str, settings: NoiseSettings, seed: int, advance: Advance) -> ReweightingRow:
  """Trains a captioner on flipped colour words with a weighting; judges both."""
  clean = ShapesCaptions()
  noisy = dataclasses.replace(clean, color_flips=settings.color_flips)
  sizes = settings.reweighting
  model = caption_model.make_model("sequential_word", sizes, len(clean.vocabulary))
  ask = caption_model.ask(model, max_length=clean.length - 1, beam_size=1)
  weighting = WEIGHTINGS[name][1]()
  params, opt_state = _train(model, weighting, noisy, sizes, seed, advance)

  test = held_out(clean, "test", 1000)
  said = caption_model.in_batches(ask.greedy, params, test.images)
  losses = caption_model.in_batches(ask.losses, params, test.images, test.tokens)
  other = held_out(noisy, "train", 2048)
  noisy_losses = caption_model.in_batches(ask.losses, params, other.images, other.tokens, size=256)
  of_batch = lambda losses: weighting.weigh(losses, opt_state[0].weighting_state)[0]
  batches = jnp.asarray(noisy_losses).reshape(-1, sizes.batch_size)
  weights = sizes.batch_size * np.concatenate([of_batch(losses) for losses in batches])
  wrong = other.flipped.any(axis=1)
  return ReweightingRow(
    name,
    seed,
    exact_match=exact_match(said, test.valid),
    nll=float(losses.mean()),
    wrong_weight=float(weights[wrong].mean()),
    auc=float(roc_auc_score(wrong, -weights)),
    loss_auc=float(roc_auc_score(wrong, noisy_losses)),
  )


class CleaningRow(NamedTuple):
  """A response on one seed.

  Attributes:
    response: its name.
    seed: of data, parameters and batches.
    auc: of "the caption is another scene's" by small weights.
    f1: of the same, by weights below one half.
    outer_loss: on the clean captions, at the end.
    loss_auc: of the same by great losses before.
    test_nll: mean loss of clean captions of held-out scenes.
    seconds_per_step: of an outer step, without compilation.
  """

  response: str
  seed: int
  auc: float
  f1: float
  loss_auc: float
  outer_loss: float
  test_nll: float
  seconds_per_step: float


def clean(name: str, settings: NoiseSettings, seed: int, advance: Advance) -> CleaningRow:
  """Learns which captions are swapped, by a response."""
  data = ShapesCaptions()
  swapped = dataclasses.replace(data, swaps=settings.swaps)
  model = caption_model.make_model("sequential_word", settings.captioner, len(data.vocabulary))
  losses = captioner.caption_losses(model)
  draw = lambda data, stream, num, part: jax.jit(lambda key: data.sample(key, num, part))(
    jax.random.fold_in(jax.random.key(seed), stream)
  )
  train = draw(swapped, _WEIGHTED, settings.num_train, "train")
  val = draw(data, _CLEAN, settings.num_val, "train")
  test = draw(data, _TEST, 1000, "test")
  as_batch = lambda scenes: caption_model.as_batch(scenes.images, scenes.tokens)

  def inner_loss(x, y, batch):
    return weighted_mean(x[batch["rows"]], losses(y, batch))

  def outer_loss(x, y, batch):
    del x  # The weights matter through y alone.
    return jnp.mean(losses(y, batch))

  inner = jaxbo.inner_solver(
    inner_loss,
    optax.sgd(settings.inner_learning_rate),
    settings.inner_steps,
    per_step_batches=True,
    warm_start=False,
  )
  head = cleaning.METHODS[name].head
  assert head is not None
  response = head(inner, settings.responses, seed)
  outer = optax.chain(response, optax.adam(settings.outer_learning_rate))
  init, step = jaxbo.bilevel(outer_loss, inner, outer)

  def outer_step(state, t, train, val):
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _ORDER), t)
    shape = (settings.inner_steps, settings.batch_size)
    rows = jax.random.randint(key, shape, 0, settings.num_train)
    batch = jax.tree.map(lambda leaf: leaf[rows], train) | {"rows": rows}
    # The linear system sees all captions of the inner run at once.
    union = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), batch)
    state, info = step(state, batch, val, linear_batch=union)
    return state, info.outer_loss

  y, _ = _train(model, jaxbo.uniform(), swapped, settings.captioner, seed, lambda steps: None)
  state = init(jnp.zeros(settings.num_train), y)
  arguments = as_batch(train), as_batch(val)
  loss_auc = roc_auc_score(train.swapped, jax.jit(losses)(y, arguments[0]))
  compiled = jax.jit(outer_step, donate_argnums=0).lower(state, jnp.int32(0), *arguments).compile()
  start, loss = time.perf_counter(), jnp.nan
  for t in range(settings.outer_steps):
    state, loss = jax.block_until_ready(compiled(state, jnp.int32(t), *arguments))
    advance(1)
  seconds = (time.perf_counter() - start) / settings.outer_steps
  weights = np.asarray(jax.nn.sigmoid(jnp.asarray(state.x)), np.float64)
  auc, f1 = cleaning.detection_scores(weights, np.asarray(train.swapped))
  test_nll = float(jnp.mean(jax.jit(losses)(state.solution.params, as_batch(test))))
  return CleaningRow(name, seed, auc, f1, float(loss_auc), float(loss), test_nll, seconds)


def weighted_mean(logits: jax.Array, losses: jax.Array) -> jax.Array:
  """The mean of the losses with the weights ``sigmoid(logits)``."""
  weights = jax.nn.sigmoid(logits)
  return jnp.sum(weights * losses) / jnp.sum(weights)


def _train(
  model: captioner.GuidedCaptioner,
  weighting: jaxbo.Weighting,
  data: ShapesCaptions,
  sizes: Settings,
  seed: int,
  advance: Advance,
) -> Any:
  """Trains on fresh scenes of ``data``; returns the parameters and the optimizer's state."""
  gradients = jaxbo.per_example_grad(captioner.caption_losses(model), repair=False)
  tx: Any = optax.chain(jaxbo.reweight(weighting), caption_model.make_optimizer(sizes))

  def step(state, t):
    params, opt_state = state
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _TRAINING), t)
    batch = data.sample(key, sizes.batch_size, "train")
    grads = gradients(params, caption_model.as_batch(batch.images, batch.tokens))
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  state = tuple(caption_model.init_state(model, tx, like(data), jax.random.key(seed)))
  compiled = jax.jit(step, donate_argnums=0)
  for t in range(sizes.steps):
    state = jax.block_until_ready(compiled(state, jnp.int32(t)))
    advance(1)
  return state
