r"""The captioner as the loss of other methods, where captions are wrong.

**Reweighting.** Color words are flipped in training; batches are weighted by the losses of their
captions. What prefers great losses prefers wrong captions.

**Hyper-cleaning.** Some captions are those of other scenes. A captioner is trained on such
scenes; then a weight for each of some captions is learned so that a few more steps on weighted
captions, from there, do well on a few clean ones:

.. math::
  \min_x \frac{1}{|V|} \sum_{j \in V} \ell_j(y^N(x)), \qquad
  y^{n+1} = y^n - \beta\, \nabla_y
    \frac{\sum_{i \in B_n} \sigma(x_i)\, \ell_i(y^n)}{\sum_{i \in B_n} \sigma(x_i)}

with the losses :math:`\ell` of captions, through the scan of the decoder and its attention. All
inner runs begin at the same captioner: one that goes on where the last run ended learns the few
captions by heart, the swapped ones too.
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxbo_models import captioner
from sklearn.metrics import roc_auc_score

import jaxbo
from scripts.captioning.config import CLEANING, RESPONSES, WEIGHTINGS, Config
from scripts.captioning.language import VOCABULARY
from scripts.captioning.model import (
  Asked,
  State,
  as_batch,
  init_state,
  make_model,
  make_optimizer,
)
from scripts.captioning.scenes import ShapesCaptions
from scripts.captioning.shapes import draw, exact_match, held_out, stream
from scripts.common import cleaning, devices
from scripts.common.devices import Devices, in_batches
from scripts.common.study import Results, Run, Study
from scripts.common.table import Column, Table, spread
from scripts.common.task import Cell, Compiled, Program, Row, Spent

CLEAN, FLIPPED = ShapesCaptions(), ShapesCaptions(color_flips=0.2)
SWAPPED = ShapesCaptions(swaps=0.3)
MODEL, BEFORE = "sequential_word", "before_cleaning"
NUM_NOISY, NUM_TEST = 2048, 1000  # Captions whose weights are judged, in batches; clean ones.
_TRAINING, _WEIGHTED, _CLEAN, _TEST, _ORDER = range(5)  # Streams of keys, beside the seed.


class Training(Compiled):
  """A captioner that is trained on fresh scenes of ``data`` with a weighting."""

  def __init__(self, run: Run[Config], data: ShapesCaptions, weighting: str, of: str, seed: int):
    self.sizes = run.config.settings(of)
    model = make_model(MODEL, self.sizes, len(VOCABULARY))
    self.weighting = WEIGHTINGS[weighting][1]()
    gradients = jaxbo.per_example_grad(captioner.caption_losses(model))
    tx: Any = optax.chain(jaxbo.reweight(self.weighting), make_optimizer(self.sizes))

    def step(state, t, key_data):
      params, opt_state = state
      key = jax.random.fold_in(jax.random.wrap_key_data(key_data), t)
      scenes = data.sample(key, self.sizes.batch_size, "train")
      batch = as_batch(scenes.images, scenes.tokens)
      grads = gradients(params, jax.lax.with_sharding_constraint(batch, run.data.rows))
      updates, opt_state = tx.update(grads, opt_state, params)
      return State(optax.apply_updates(params, updates), opt_state), None

    everywhere = run.data.everywhere
    init = jax.jit(lambda key: init_state(model, tx, self.sizes, key), out_shardings=everywhere)
    program = run.shared((weighting, of), lambda: Program(step, out_shardings=everywhere))
    key_data = jax.random.key_data(stream(seed, _TRAINING))
    super().__init__(program, init(jax.random.key(seed)), key_data, where=everywhere)


class Judged(Compiled):
  """A task whose row is its last line."""

  def result(self, state: Any, spent: Spent) -> Row:
    """What was measured after the last step."""
    del state
    return {k: v for k, v in spent.lines[-1].items() if k not in ("step", "seconds")}


class Reweighting(Judged, Training):
  """A captioner that is trained where color words are flipped, with a weighting."""

  def __init__(self, run: Run[Config], weighting: str, seed: int):
    super().__init__(run, FLIPPED, weighting, "reweighting", seed)
    self._ask = run.shared("ask", lambda: Asked(MODEL, self.sizes, VOCABULARY, 1, run.data))

  def evaluate(self, state: Any, told: list[Any]) -> Row:
    """Judges the captioner and the weights.

    Returns:
      ``exact_match``: on held-out scenes; ``nll``: the mean loss of their clean captions.
      ``wrong_weight``: the mean weight of captions with a flipped color in batches of noisy
        captions that were not trained on; 1 for uniform weights.
      ``auc``: of "a color is flipped" by small weights; 0.5 where weights say nothing.
      ``loss_auc``: of the same by great losses.
    """
    params, weighting_state = state.params, state.opt_state[0].weighting_state
    test, other = held_out(CLEAN, "test", NUM_TEST), held_out(FLIPPED, "train", NUM_NOISY)
    said = in_batches(self._ask.devices, self._ask.greedy, params, test.images)
    losses = in_batches(self._ask.devices, self._ask.losses, params, test.images, test.tokens)
    noisy = in_batches(
      self._ask.devices, self._ask.losses, params, other.images, other.tokens, size=256
    )
    batches = jnp.asarray(noisy).reshape(-1, self.sizes.batch_size)
    weights = [self.weighting.weigh(batch, weighting_state)[0] for batch in batches]
    weights = self.sizes.batch_size * np.concatenate(weights)
    wrong = other.flipped.any(axis=1)
    return {
      "exact_match": exact_match(said, test.valid),
      "nll": float(losses.mean()),
      "wrong_weight": float(weights[wrong].mean()),
      "auc": float(roc_auc_score(wrong, -weights)),
      "loss_auc": float(roc_auc_score(wrong, noisy)),
    }


class Cleaning(Judged):
  """Learns which captions are swapped, by a response, from a captioner that was trained before."""

  def __init__(self, run: Run[Config], response: str, seed: int, trained: Any):
    settings = run.config.override(CLEANING)
    sizes = run.config.settings(BEFORE)
    model = make_model(MODEL, sizes, len(VOCABULARY))
    losses = captioner.caption_losses(model)
    y = jax.tree.map(jnp.copy, trained.params)  # It is given to all responses.

    def drawn(data, number, num, part):
      scenes = draw(data, stream(seed, number), num, part)
      return scenes, as_batch(scenes.images, scenes.tokens)

    scenes, train = drawn(SWAPPED, _WEIGHTED, settings.num_train, "train")
    _, val = drawn(CLEAN, _CLEAN, settings.num_val, "train")
    _, self._test = drawn(CLEAN, _TEST, NUM_TEST, "test")
    self._swapped = np.asarray(scenes.swapped)
    self._losses = run.shared("losses", lambda: jax.jit(losses))
    self._loss_auc = float(roc_auc_score(self._swapped, self._losses(y, train)))

    inner = jaxbo.inner_solver(
      lambda x, y, batch: weighted_mean(x[batch["rows"]], losses(y, batch)),
      optax.sgd(settings.inner_learning_rate),
      settings.inner_steps,
      per_step_batches=True,
      warm_start=False,
    )
    head = cleaning.METHODS[response].head(inner, settings, seed, None)
    outer = optax.chain(head, optax.adam(settings.outer_learning_rate))
    # The weights matter through y alone.
    init, bilevel_step = jaxbo.bilevel_loop(
      lambda x, y, batch: jnp.mean(losses(y, batch)), inner, outer
    )

    def step(state, t, key_data, train, val):
      key = jax.random.fold_in(jax.random.wrap_key_data(key_data), t)
      shape = (settings.inner_steps, sizes.batch_size)
      rows = jax.random.randint(key, shape, 0, settings.num_train)
      batch = jax.tree.map(lambda leaf: leaf[rows], train) | {"rows": rows}
      # The linear system sees all captions of the inner run at once.
      union = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), batch)
      state, info = bilevel_step(state, batch, val, linear_batch=union)
      return state, info.outer_loss

    everywhere = run.data.everywhere
    program = run.shared(response, lambda: Program(step, out_shardings=everywhere))
    state, key_data = init(jnp.zeros(settings.num_train), y), stream(seed, _ORDER)
    key_data = jax.random.key_data(key_data)
    super().__init__(program, state, key_data, train, val, where=everywhere)

  def evaluate(self, state: Any, told: list[Any]) -> Row:
    """Judges the weights.

    Returns:
      ``auc``: of "the caption is another scene's" by small weights; ``f1``: of the same, by weights
        below one half; ``loss_auc``: of the same by great losses before.
      ``outer_loss``: on the clean captions; ``test_nll``: the mean loss of clean captions of
        held-out scenes.
    """
    weights = np.asarray(jax.nn.sigmoid(jnp.asarray(state.x)), np.float64)
    auc, f1 = cleaning.detection_scores(weights, self._swapped)
    return {
      "auc": auc,
      "f1": f1,
      "loss_auc": self._loss_auc,
      "outer_loss": float(told[-1]),
      "test_nll": float(jnp.mean(self._losses(state.solution.params, self._test))),
    }

  def result(self, state: Any, spent: Spent) -> Row:
    """The last line, and what a step took."""
    steps = spent.lines[-1]["step"]
    return super().result(state, spent) | {"seconds_per_step": spent.seconds / steps}


def weighted_mean(logits: jax.Array, losses: jax.Array) -> jax.Array:
  """The mean of the losses with the weights ``sigmoid(logits)``."""
  weights = jax.nn.sigmoid(logits)
  return jnp.sum(weights * losses) / jnp.sum(weights)


LABELS = {
  "weighting": {name: label for name, (label, _) in WEIGHTINGS.items()},
  "response": {name: cleaning.METHODS[name].label for name in RESPONSES},
}
TITLES = {
  "weighting": "Flipped color words: clean test scenes; weight and detection of wrong captions",
  "response": "Swapped captions: hyper-cleaning",
}
COLUMNS = {
  "weighting": {
    "exact_match": Column("exact match"),
    "nll": Column("NLL"),
    "wrong_weight": Column("wrong weight", 2),
    "auc": Column("AUC"),
    "loss_auc": Column("AUC of losses"),
  },
  "response": {
    "auc": Column("AUC"),
    "f1": Column("F1"),
    "loss_auc": Column("AUC of losses"),
    "test_nll": Column("test NLL"),
    "seconds_per_step": Column("ms/step", 0, 1e3),
  },
}


class Noise(Study[Config]):
  """Reweighting and hyper-cleaning of captions."""

  config = Config

  def prepare(self, config: Config) -> Devices:
    """Refuses what cannot be judged; all devices, among which batches are divided."""
    if NUM_NOISY % (batch_size := config.settings("reweighting").batch_size):
      raise ValueError(f"batch_size must divide {NUM_NOISY} with noise, got {batch_size}")
    devices.check_divides("batch_size", batch_size)
    return devices.all_devices()

  def cells(self, run: Run[Config]) -> Iterable[Cell]:
    """Weightings, and then responses, on every seed."""
    config, partial = run.config, functools.partial
    cell = partial(Cell, checkpoint_every=config.checkpoint_every)
    for seed in config.all_seeds():
      for name in config.chosen(WEIGHTINGS):
        make, steps = partial(Reweighting, run, name, seed), config.settings("reweighting").steps
        label = f"seed {seed}, {LABELS['weighting'][name]}"
        yield cell({"weighting": name, "seed": seed}, make, steps, label)
    if not (responses := config.chosen(RESPONSES)):
      return
    for seed in config.all_seeds():
      key, steps = {"captioner": BEFORE, "seed": seed}, config.settings(BEFORE).steps
      make = partial(Training, run, SWAPPED, "uniform", BEFORE, seed)
      before = cell(key, make, steps, f"seed {seed}, before cleaning")
      yield before
      for name in responses:
        make, steps = partial(Cleaning, run, name, seed), config.override(CLEANING).outer_steps
        label = f"seed {seed}, {LABELS['response'][name]}"
        yield cell({"response": name, "seed": seed}, make, steps, label, needs=(before,))

  def tables(self, results: Results[Config]) -> Iterable[Table]:
    """What weightings and responses do, means over seeds."""
    for kind, title in TITLES.items():
      if kind in results.rows:
        rows = results.rows.dropna(subset=[kind])
        yield spread(title, rows, kind, LABELS[kind], COLUMNS[kind], kind)
