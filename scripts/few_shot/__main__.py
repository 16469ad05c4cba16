"""Few-shot meta-learning: nine methods on one backbone, side by side.

A backbone is meta-learnt so that a linear head, trained on a few images of new classes, classifies
others of them. ESJ estimates how the head depends on the backbone from perturbed runs of the head,
on the features (`esj_through`, or `esj_shrunk` with the scale of the least error) or on all
parameters (`esj`); `official` does so with the scaling and the one direction of the published code.
ITD differentiates through the run, AID-CG by the implicit function theorem, first order not at all;
MAML adapts every parameter, and ProtoNet has no inner problem. Training episodes of characters have
quarter turns as classes of their own, evaluation episodes have none.

  python -m scripts.few_shot                                  glyphs drawn on the spot, no download
  python -m scripts.few_shot --dataset omniglot               1,100 characters
  python -m scripts.few_shot --dataset caltech101_fewshot     84 x 84 x 3; ResNet-12, for GPUs
  ... --resume                                                goes on where a run was stopped

ResNet-12 (12,424,320 parameters) on one core, at most half an hour for a method, of 1 shot less:
  ... --dataset omniglot --backbone resnet12 --steps 300 --eval-every 300 --num-shots 5
  ... --dataset caltech101_fewshot --image-size 42 --num-tasks 1 --steps 180 --eval-every 180

Accuracies are of 600 test episodes of classes that were never trained on, with a 95 % confidence
interval over episodes; of several seeds, with their standard deviation. Batch statistics are those
of the support and of the query set (transductive), in training and evaluation alike.

Tasks of a meta-step are divided among all devices, and where there are more devices than that, the
samples of ESJ of each task; episodes of an evaluation are, too.

Several processes, on one machine or many that share output_dir, need --distributed, or where they
cannot find each other:
  ... --coordinator-address HOST:PORT --num-processes 2 --process-id 0      and the same with 1
"""

import functools
import itertools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxbo_models import Conv4, ResNet12

from jaxbo.tasks import Episode
from scripts.common import devices, fewshot_data, study
from scripts.common.fewshot_data import FewShotData, ImageClasses
from scripts.common.study import Results, Run, Study
from scripts.common.table import Column, Table
from scripts.common.task import Cell, Compiled, Program, Row, Spent
from scripts.few_shot import plots
from scripts.few_shot.config import Config
from scripts.few_shot.problem import LABELS, Backbone, make_method
from scripts.few_shot.setting import Draw, draw_key, sampler

EVALUATION_BATCH = 20


def read(config: Config) -> FewShotData:
  """The classes for training, validation and test."""
  if config.dataset == "omniglot":
    return fewshot_data.omniglot(config.data_dir, size=config.pixels())
  if config.dataset == "caltech101_fewshot":
    return fewshot_data.caltech101_fewshot(config.data_dir, size=config.pixels())
  glyphs = fewshot_data.synthetic_glyphs(500, 20, config.pixels())
  parts = itertools.pairwise((0, 350, 400, 500))
  return FewShotData(*(ImageClasses(*(field[i:j] for field in glyphs)) for i, j in parts))


def scale_pixels(images: jax.Array) -> jax.Array:
  """uint8 pixels as float32 in [0, 1]; floats as they are."""
  return images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images


def make_backbone(config: Config) -> Backbone:
  """The backbone."""
  dtype = jnp.bfloat16 if config.bfloat16 else None
  make = ResNet12 if config.is_resnet() else functools.partial(Conv4, config.width)
  shared, of_task = (make(conv=conv, dtype=dtype) for conv in ("native", "auto"))
  apply = lambda model: lambda x, images: jnp.asarray(model.apply(x, scale_pixels(images)))
  init = lambda key, images: shared.init(key, scale_pixels(images))
  return Backbone(init, apply(shared), apply(of_task))


class FewShot(Compiled):
  """A method on one seed; a step is a meta-step."""

  def __init__(self, run: Run[Config], method: str, seed: int):
    self.config, settings = run.config, run.config.settings()
    self.where = where = devices.all_devices(settings.num_tasks)
    everywhere = where.everywhere
    classes: FewShotData = run.shared("classes", lambda: jax.device_put(run.data, everywhere))
    backbone = make_backbone(run.config)
    made = make_method(method, backbone, settings, run.config.steps, seed, where.for_samples)
    sample = sampler(settings, settings.num_rotations, settings.num_tasks)
    sample_evaluation = sampler(settings, 1, EVALUATION_BATCH)

    def step(state, t, key, train):
      key = jax.random.fold_in(jax.random.wrap_key_data(key), t)
      episodes = jax.lax.with_sharding_constraint(sample(key, train), where.rows)
      return made.step(state, episodes)

    def evaluate(key, state, classes):
      def of_one(episode):
        predicted = jnp.argmax(made.predict(state, episode), axis=-1)
        return jnp.mean(predicted == episode.query_labels), predicted

      episodes = sample_evaluation(key, classes)
      # One at a time: the activations of 20 episodes of ResNet-12 do not fit into 24 GiB.
      accuracies, predicted = jax.lax.map(of_one, episodes)
      return accuracies, jax.tree.map(lambda leaf: leaf[0], (episodes, predicted))

    init = run.shared(("init", method, seed), lambda: jax.jit(made.init, out_shardings=everywhere))
    state = init(draw_key(Draw.PARAMETERS, seed), classes.train.images[0, :2])
    key = jax.random.key_data(draw_key(Draw.TRAINING, seed))
    program = run.shared(("step", method), lambda: Program(step, out_shardings=everywhere))
    super().__init__(program, state, key, classes.train, where=everywhere)
    self.classes = {Draw.VALIDATION: classes.validation, Draw.TEST: classes.test}
    self._evaluate = run.shared(("evaluate", method), lambda: where.each(evaluate))

  def accuracies(self, state: Any, draw: Draw, num_episodes: int) -> np.ndarray:
    """The accuracy in each of the episodes of ``draw``, which are the same in every run."""
    begins = range(0, num_episodes, EVALUATION_BATCH * self.where.number)
    keys = (self._keys(draw, begin // EVALUATION_BATCH) for begin in begins)
    parts = [self._evaluate(of_each, state, self.classes[draw])[0] for of_each in keys]
    return np.concatenate([np.ravel(part) for part in parts])[:num_episodes]

  def _keys(self, draw: Draw, first: int) -> jax.Array:
    """The keys of the batches of episodes from ``first`` on, one for each device."""
    batches = first + jnp.arange(self.where.number)
    return jax.vmap(jax.random.fold_in, (None, 0))(draw_key(draw), batches)

  def first_test_episode(self, state: Any) -> tuple[Episode, np.ndarray]:
    """The first of the test episodes, and the classes that are predicted for its queries."""
    found = self._evaluate(self._keys(Draw.TEST, 0), state, self.classes[Draw.TEST])[1]
    return jax.tree.map(lambda leaf: np.asarray(leaf)[0], found)

  def evaluate(self, state: Any, told: list[Any]) -> Row:
    """The loss of the last step, and the accuracy on validation classes."""
    accuracies = self.accuracies(state, Draw.VALIDATION, -(-self.config.eval_episodes // 3))
    return {"outer_loss": float(told[-1]), "validation_accuracy": float(accuracies.mean())}

  def result(self, state: Any, spent: Spent) -> Row:
    """The accuracy on test classes, and what the steps cost."""
    accuracy, half = interval(self.accuracies(state, Draw.TEST, self.config.eval_episodes))
    return {
      "steps": self.config.steps,
      "test_accuracy": accuracy,
      "confidence": half,
      "seconds_per_step": spent.seconds / self.config.steps,
      "temporary_bytes": self.program.temporary_bytes,
    }


def interval(accuracies: np.ndarray) -> tuple[float, float]:
  """The mean, and half the width of its 95 % confidence interval."""
  half = 1.96 * accuracies.std(ddof=1) / math.sqrt(len(accuracies)) if len(accuracies) > 1 else 0.0
  return float(accuracies.mean()), float(half)


def accuracy_of(rows: pd.DataFrame) -> str:
  """The accuracy of a method: of one seed with the interval, of several with their spread."""
  if len(rows) > 1:
    return f"{Column('', 2, 100).cell(rows['test_accuracy'])} %"
  return f"{100 * rows['test_accuracy'].item():.2f} ± {100 * rows['confidence'].item():.2f} %"


class FewShotStudy(Study[Config]):
  """The experiment."""

  config = Config

  # Compilation is nearly all of it.
  def prepare(self, config: Config) -> FewShotData:
    """Reads the data, and traces every method: what cannot run is refused before any training."""
    data, settings = read(config), config.settings()
    over = devices.all_devices(settings.num_tasks).for_samples
    backbone = make_backbone(config)

    def shapes(classes, num_rotations):
      sample = sampler(settings, num_rotations, settings.num_tasks)
      return jax.eval_shape(lambda key: sample(key, classes), jax.random.key(0))

    episodes = shapes(data.train, settings.num_rotations)
    for classes in (data.validation, data.test):
      shapes(classes, 1)
    for name in config.methods:
      method = make_method(name, backbone, settings, config.steps, config.first_seed, over)
      try:
        state = jax.eval_shape(method.init, jax.random.key(0), data.train.images[0, :2])
        jax.eval_shape(method.step, state, episodes)
      except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return data

  def cells(self, run: Run[Config]) -> Iterable[Cell]:
    """Every method on every seed."""
    config = run.config
    for seed, method in itertools.product(config.all_seeds(), config.methods):
      key, make = {"method": method, "seed": seed}, functools.partial(FewShot, run, method, seed)
      label = f"seed {seed}, {LABELS[method]}" if config.seeds > 1 else LABELS[method]
      yield Cell(key, make, config.steps, label, config.eval_every, config.checkpoint_every)

  def tables(self, results: Results[Config]) -> Iterable[Table]:
    """Accuracies, and what they cost."""
    config, settings, rows = results.config, results.config.settings(), results.rows
    seeds = sorted(set(rows["seed"]))
    title = (
      f"{config.dataset}: {settings.num_ways}-way {settings.num_shots}-shot, {config.steps} "
      f"meta-steps of {settings.num_tasks} tasks, seed{'s' * (len(seeds) > 1)} "
      f"{', '.join(map(str, seeds))};\naccuracy of {config.eval_episodes} test episodes ± "
      + ("standard deviation over seeds" if len(seeds) > 1 else "95 % confidence interval")
    )
    time, memory = Column("", 0, 1e3), Column("", 0, 2**-20, mean_only=True)
    known = rows["temporary_bytes"].where(rows["temporary_bytes"] >= 0)
    body = list[list[str]]()
    for method, mine in rows.groupby("method", sort=False):
      costs = time.cell(mine["seconds_per_step"]), memory.cell(known[mine.index])
      body.append([LABELS[str(method)], accuracy_of(mine), *costs])
    yield Table(title, ["method", "accuracy", "ms/step", "temp. MiB"], body)

  def draw(self, run: Run[Config]) -> None:
    """Curves, and for each method the first test episode as it sees it on the first seed."""
    results = run.results()
    plots.draw_curves(results.lines, results.rows, run.path / "few_shot.png")
    for cell in run.finished():
      method, seed = cell.key["method"], cell.key["seed"]
      if seed == run.config.first_seed:
        episode = FewShot(run, method, seed).first_test_episode(run.state(cell))
        path = run.path / f"episode_{method}.png"
        plots.draw_episode(LABELS[method], *episode, run.config.settings(), path)


if __name__ == "__main__":
  study.main(Config, functools.partial(study.run, FewShotStudy()), __doc__)
