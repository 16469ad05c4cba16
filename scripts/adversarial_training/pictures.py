"""What the pictures of adversarial training show, found from runs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxbo
from scripts.adversarial_training import plots as adv_plots
from scripts.adversarial_training import run as adv_run
from scripts.adversarial_training.config import Config
from scripts.adversarial_training.data import SETS, AdversarialData
from scripts.adversarial_training.methods import BASELINE, DONE, METHODS, Setting, sign_attack
from scripts.adversarial_training.run import Runner
from scripts.adversarial_training.train import as_floats

PER_CLASS, WEIGHTS, EXAMPLES = "per_class.png", "weights.png", "examples.png"
NUM_WEIGHTS, NUM_EXAMPLES = 512, 8
REWEIGHTED = (BASELINE, "gairat", "mail", "at_kl", DONE, "done_adam")


def draw(config: Config, data: AdversarialData, runner: Runner) -> None:
  """Writes the pictures of what there is into the folder of the run."""
  compared = [name for name in (BASELINE, DONE) if name in config.methods]
  compared = compared or [*config.methods[:2]]
  labels = {name: METHODS[name].label for name in compared}
  sets = {kind: SETS[kind] for kind in config.sets}
  counts = adv_run.counts_of_sets(config, data)
  rows = runner.outcome.rows
  if rows:
    path = config.output_dir / PER_CLASS
    adv_plots.draw_per_class(rows, labels, sets, counts, data.names, path)
  kind = config.sets[-1]
  params = {name: p for (of, name), p in runner.outcome.params.items() if of == kind}
  if BASELINE in params:
    curves = weights_against_margins(config, data, runner, params[BASELINE])
    adv_plots.draw_weights(curves, config.output_dir / WEIGHTS)
  shown = {name: params[name] for name in compared if name in params}
  if shown:
    images, classes, attacked = examples(config, data, runner, shown)
    adv_plots.draw_examples(images, classes, attacked, data.names, config.output_dir / EXAMPLES)


def setting_of(config: Config, runner: Runner) -> Setting:
  """What methods are made from."""
  return Setting(runner.model, config.largest_change(), config.attack_steps, config.rates)


def weights_against_margins(
  config: Config, data: AdversarialData, runner: Runner, params: Any
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """How methods weigh the same training images at the same parameters.

  Margins are those of probabilities under PGD: positive if the image is still named correctly.
  """
  rows = adv_run.first_rows(config, data, NUM_WEIGHTS)
  batch = as_floats(jnp.asarray(data.pool.images[rows])), jnp.asarray(data.pool.labels[rows])
  setting = setting_of(config, runner)
  make_key = lambda: jax.random.key(config.first_seed)

  @jax.jit
  def margins_of(params, batch):
    attacked = sign_attack(setting)(params, batch, make_key())
    return -jaxbo.probabilistic_margin(runner.model(params, attacked), batch[1])

  margins, curves = np.asarray(margins_of(params, batch)), {}
  for name in REWEIGHTED:
    if name not in config.methods:
      continue
    parts = METHODS[name].make(setting)

    @jax.jit
    def weights_of(params, batch, parts=parts):
      grads, extra = parts.gradients(params, batch, make_key(), jnp.float32(1.0))
      scores = extra.get("scores", grads.losses)
      return len(scores) * parts.weighting.weigh(scores, parts.weighting.init())[0]

    curves[METHODS[name].label] = margins, np.asarray(weights_of(params, batch))
  return curves


def examples(
  config: Config, data: AdversarialData, runner: Runner, params: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray, list[adv_plots.Attacked]]:
  """One test image of each class that all models name correctly, and their attacks on it."""
  setting = setting_of(config, runner)
  images, labels = as_floats(jnp.asarray(data.test.images)), jnp.asarray(data.test.labels)
  attack, predict = sign_attack(setting), jax.jit(lambda p, x: runner.model(p, x).argmax(-1))
  right = np.all([np.asarray(predict(p, images) == labels) for p in params.values()], axis=0)
  rows = []
  for label in range(len(data.names)):
    of_class = np.flatnonzero(data.test.labels == label)
    rows += [*of_class[right[of_class]][:1]]
  chosen = jnp.asarray(rows[:NUM_EXAMPLES], jnp.int32)
  batch = images[chosen], labels[chosen]
  attacked = []
  for name, of_method in params.items():
    changed = attack(of_method, batch, jax.random.key(0))
    predicted = np.asarray(predict(of_method, changed))
    attacked.append(adv_plots.Attacked(METHODS[name].label, np.asarray(changed), predicted))
  return np.asarray(batch[0]), np.asarray(batch[1]), attacked
