"""Few-shot meta-learning: eight methods on one backbone, side by side.

A backbone is meta-learnt so that a linear head, trained on a few images of new classes, classifies
others of them. ESJ estimates how the head depends on the backbone from perturbed runs of the head,
on the features (`esj_through`, or `esj_shrunk` with the scale of the least error) or on all
parameters (`esj`); ITD differentiates through the run, AID-CG by the implicit function theorem,
first order not at all; MAML adapts every parameter, and ProtoNet has no inner problem. Training
episodes of characters have quarter turns as classes of their own, evaluation episodes have none.

  python -m scripts.few_shot                                  glyphs drawn on the spot, no download
  python -m scripts.few_shot --dataset omniglot               1,100 characters
  python -m scripts.few_shot --dataset caltech101_fewshot     84 x 84 x 3; ResNet-12, for GPUs
  ... --resume                                                goes on where a run was stopped

Accuracies are of 600 test episodes of classes that were never trained on, with a 95 % confidence
interval over episodes. Batch statistics are those of the support and of the query set
(transductive), in training and evaluation alike.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxbo_models import Conv4, ResNet12

from benchmarks import measure
from scripts.common import fewshot_data, report
from scripts.common.checkpoints import latest_step
from scripts.few_shot import plots as few_shot_plots
from scripts.few_shot import problem as few_shot
from scripts.few_shot.problem import LABELS, Backbone
from scripts.few_shot.setting import Draw, Settings, sampler
from scripts.few_shot.trainer import Trainer

DATASETS = {
  "glyphs": Settings(),
  "omniglot": Settings(),
  "caltech101_fewshot": Settings(
    num_rotations=1,
    ridge=0.5,
    inner_steps=30,
    num_tasks=2,
    outer_learning_rate=1e-3,
    smoothing_plain=1e-3,  # The kernels of ResNet-12 start at 0.02.
  ),
}


@dataclasses.dataclass(frozen=True)
class Config:
  """Few-shot meta-learning: eight methods on one backbone, side by side."""

  dataset: str = "glyphs"
  """glyphs (drawn on the spot), or omniglot or caltech101_fewshot (read by tensorflow-datasets)."""
  methods: tuple[str, ...] = tuple(LABELS)
  """Which methods to run."""
  steps: int = 300
  """Meta-steps of each method."""
  seed: int = 0
  """Of initial parameters and training episodes; evaluation episodes are always the same."""
  backbone: str = "auto"
  """conv4 or resnet12; auto takes resnet12 for images of three channels."""
  width: int = 64
  """Channels of conv4."""
  bfloat16: bool = False
  """Whether the backbone computes in bfloat16; its parameters are float32 all the same."""
  eval_every: int = 50
  """Meta-steps between evaluations on validation classes."""
  eval_episodes: int = 600
  """Test episodes; a third of them for validation."""
  checkpoint_every: int = 50
  """Meta-steps between checkpoints."""
  resume: bool = False
  """Goes on from the checkpoints in output_dir; the other arguments must be those of that run."""
  data_dir: Path | None = None
  """Where tensorflow-datasets has its files, instead of TFDS_DATA_DIR or ~/tensorflow_datasets."""
  output_dir: Path = Path("runs/few_shot")
  """Where results and checkpoints go."""
  num_ways: int | None = None
  """Classes of an episode, instead of the data set's default (as for all below)."""
  num_shots: int | None = None
  """Support images of a class."""
  num_queries: int | None = None
  """Query images of a class."""
  num_tasks: int | None = None
  """Tasks of a meta-step."""
  inner_steps: int | None = None
  """Steps on the head."""
  num_samples: int | None = None
  """Directions of ESJ on features, for each task."""
  response_scale: float | None = None
  """Factor of the response of the shrunk ESJ."""
  outer_learning_rate: float | None = None
  """Learning rate of Adam at the start."""

  def check(self) -> None:
    """Raises ``ValueError`` for what cannot run."""
    for name, allowed in (("dataset", DATASETS), ("backbone", ("auto", "conv4", "resnet12"))):
      if getattr(self, name) not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
    if not self.methods or not set(self.methods) <= set(LABELS):
      given = " ".join(self.methods) or "none"
      raise ValueError(f"methods must be among {', '.join(LABELS)}; got {given}")
    if len(set(self.methods)) < len(self.methods):
      raise ValueError(f"methods must name each method once, got {' '.join(self.methods)}")
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      number = isinstance(value, (int, float)) and not isinstance(value, bool)
      if number and field.name != "seed" and not value > 0:
        raise ValueError(f"{field.name} must be positive, got {value}")
    if self.seed < 0:
      raise ValueError(f"seed must not be negative, got {self.seed}")

  def settings(self) -> Settings:
    """The data set's settings, with what was given instead."""
    given = {field.name: getattr(self, field.name, None) for field in dataclasses.fields(Settings)}
    given = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(DATASETS[self.dataset], **given)

  def identity(self) -> dict[str, Any]:
    """What a resumed run must have in common with the run that it continues."""
    left_out = ("methods", "resume", "data_dir", "output_dir", "checkpoint_every")
    values = dataclasses.asdict(self)
    return {name: value for name, value in values.items() if name not in left_out}


class Result(NamedTuple):
  """A method after training; a row of ``results.csv``."""

  method: str
  steps: int
  test_accuracy: float
  confidence: float
  seconds_per_step: float
  temporary_bytes: int


def read(config: Config) -> fewshot_data.FewShotData:
  """The classes for training, validation and test."""
  if config.dataset == "omniglot":
    return fewshot_data.omniglot(config.data_dir)
  if config.dataset == "caltech101_fewshot":
    return fewshot_data.caltech101_fewshot(config.data_dir)
  glyphs = fewshot_data.synthetic_glyphs(500, 20)
  parts = itertools.pairwise((0, 350, 400, 500))
  return fewshot_data.FewShotData(
    *(fewshot_data.ImageClasses(*(field[begin:end] for field in glyphs)) for begin, end in parts)
  )


def make_backbone(config: Config, images: np.ndarray) -> Backbone:
  """The backbone for images of that kind."""
  resnet = config.backbone == "resnet12" or (config.backbone == "auto" and images.shape[-1] == 3)
  dtype = jnp.bfloat16 if config.bfloat16 else None
  make = ResNet12 if resnet else functools.partial(Conv4, config.width)
  shared, of_task = (make(conv=conv, dtype=dtype) for conv in ("native", "auto"))
  apply = lambda model: lambda x, images: jnp.asarray(model.apply(x, images))
  return Backbone(shared.init, apply(shared), apply(of_task))


def make_trainer(name: str, config: Config, data: fewshot_data.FewShotData) -> Trainer:
  """The method of that name, ready to train."""
  settings, backbone = config.settings(), make_backbone(config, data.train.images)
  method = few_shot.make_method(name, backbone, settings, config.steps, config.seed)
  checkpoints = config.output_dir / "checkpoints" / name
  return Trainer(method, settings, data.train, config.seed, checkpoints)


def prepare_output(config: Config) -> list[dict[str, Any]]:
  """Checks and writes the identity of the run; returns the metrics of the run that goes on."""
  wanted = json.loads(json.dumps(config.identity()))
  if config.resume:
    return report.read_run(config.output_dir, wanted, "metrics.jsonl")
  report.start_run(config.output_dir, wanted)
  return []


def run_all(
  config: Config, data: Any, earlier: list[dict[str, Any]], console: Any
) -> tuple[list[Result], list[dict[str, Any]], int]:
  """Runs all methods; returns results, metrics and the exit status."""
  results: list[Result] = []
  validation, test = jax.device_put((data.validation, data.test))
  folders = {name: config.output_dir / "checkpoints" / name for name in LABELS}
  done_before = {name: latest_step(folder) for name, folder in folders.items()}
  metrics = [line for line in earlier if line["step"] <= done_before[line["method"]]]
  with (
    report.MetricsLog(config.output_dir / "metrics.jsonl", metrics) as log,
    report.progress_bar(console) as progress,
  ):
    try:
      for name in config.methods:
        bar = progress.add_task(LABELS[name], total=config.steps, loss="compiling")
        trainer = make_trainer(name, config, data)
        with contextlib.closing(trainer):  # Waits for checkpoints, also after Ctrl-C.
          done = trainer.restore() if config.resume else 0
          progress.update(bar, completed=done)
          every = (config.eval_every, config.checkpoint_every)
          show = functools.partial(progress.update, bar)
          on_step = lambda done, show=show: show(completed=done)
          for step, loss in trainer.fit(done, config.steps, *every, on_step):
            accuracy, _ = trainer.accuracy(
              validation, -(-config.eval_episodes // 3), Draw.VALIDATION
            )
            line = {
              "method": name,
              "step": step,
              "seconds": trainer.seconds,
              "outer_loss": loss,
              "validation_accuracy": accuracy,
            }
            metrics.append(line)
            log.write(**line)
            show(completed=step, loss=f"loss {loss:.3f}, accuracy {accuracy:.3f}")
        accuracy, half = trainer.accuracy(test, config.eval_episodes, Draw.TEST)
        memory = measure.temporary_bytes(trainer.compiled)
        results.append(
          Result(name, config.steps, accuracy, half, trainer.seconds / config.steps, memory)
        )
        rows = [result._asdict() for result in results]
        kept_by = ("method",) if config.resume else ()
        report.write_csv(config.output_dir / "results.csv", rows, kept_by)
        few_shot_plots.draw_episode(
          LABELS[name],
          trainer,
          config.settings(),
          test,
          config.output_dir / f"episode_{name}.png",
        )
    except KeyboardInterrupt:
      return results, metrics, 130
  return results, metrics, 0


def check_shapes(config: Config, data: fewshot_data.FewShotData) -> None:
  """Traces every method once, so that what cannot run is refused before anything is trained.

  Raises:
    ValueError: if a set has too few classes or images, or a method cannot run.
  """
  settings, backbone = config.settings(), make_backbone(config, data.train.images)
  turns = (settings.num_rotations, 1, 1)
  for classes, num_rotations in zip(data, turns, strict=True):
    sample = sampler(settings, num_rotations, settings.num_tasks)
    jax.eval_shape(lambda key, s=sample, c=classes: s(key, c), jax.random.key(0))
  sample = sampler(settings, settings.num_rotations, settings.num_tasks)
  episodes = jax.eval_shape(lambda key: sample(key, data.train), jax.random.key(0))
  for name in config.methods:
    method = few_shot.make_method(name, backbone, settings, config.steps, config.seed)
    try:
      state = jax.eval_shape(method.init, jax.random.key(0), data.train.images[0, :2])
      jax.eval_shape(method.step, state, episodes)
    except ValueError as error:
      raise ValueError(f"{name}: {error}") from error


def run_and_report(config: Config) -> int:
  """Runs, prints and saves; returns the exit status."""
  with report.bad_input():
    config.check()
    data = read(config)
    check_shapes(config, data)
    earlier = prepare_output(config)
  console, settings = report.console(), config.settings()
  results, metrics, status = run_all(config, data, earlier, console)
  if status:
    console.print("Interrupted; --resume goes on from the last checkpoint.")
  if results:
    title = (
      f"{config.dataset}: {settings.num_ways}-way {settings.num_shots}-shot, {config.steps} "
      f"meta-steps of {settings.num_tasks} tasks, seed {config.seed}; accuracy of "
      f"{config.eval_episodes} test episodes ± 95 % confidence interval"
    )
    rows = [
      [
        LABELS[result.method],
        f"{100 * result.test_accuracy:.2f} ± {100 * result.confidence:.2f} %",
        f"{1e3 * result.seconds_per_step:.0f}",
        f"{result.temporary_bytes / 2**20:.0f}" if result.temporary_bytes >= 0 else "-",
      ]
      for result in results
    ]
    report.print_table(console, title, ["method", "accuracy", "ms/step", "temp. MiB"], rows)
  if metrics:
    few_shot_plots.draw_curves(metrics, config.output_dir / "few_shot.png")
    console.print(f"metrics.jsonl, results.csv and the pictures are in {config.output_dir}")
  return status


def main(config: Config) -> int:
  """Runs, prints and saves. Returns the exit status: 130 if interrupted."""
  return report.exit_status(run_and_report, config)


if __name__ == "__main__":
  sys.exit(main(tyro.cli(Config)))
