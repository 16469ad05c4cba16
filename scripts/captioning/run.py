"""Runs captioners: programs, checkpoints, evaluations, and what is left of each run."""

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from rich.progress import Progress

from scripts.captioning import files as caption_files
from scripts.captioning.config import MODELS, Config
from scripts.captioning.files import FilesProgram
from scripts.captioning.plots import Captioned
from scripts.captioning.scenes import ShapesCaptions
from scripts.captioning.shapes import ShapesProgram
from scripts.common.checkpoints import latest_step
from scripts.common.resumable import Resumable

Line = dict[str, Any]


class Program(Protocol):
  """A captioner of some data, compiled once."""

  def check(self) -> None:
    """Raises ``ValueError`` if it cannot be trained."""
    ...

  def trainer(self, seed: int, checkpoints: Path) -> Resumable:
    """A run of it; the parameters are ``state.params``."""
    ...

  def validation(self, params: Any) -> float:
    """The loss on the validation set."""
    ...

  def test(self, params: Any) -> dict[str, Any]:
    """Scores on the test set."""
    ...

  def examples(self, params: Any) -> list[Captioned]:
    """Some images of the test set with what it says of them."""
    ...


class Outcome(NamedTuple):
  """What runs gave, as far as they came.

  Attributes:
    lines: one for each evaluation.
    rows: one for each finished run.
    examples: captioned images of the first seed, by order and captioner.
    bounds: for each order the least losses that there can be, by name.
  """

  lines: list[Line]
  rows: list[Line]
  examples: dict[tuple[str, str], list[Captioned]]
  bounds: dict[str, dict[str, float]]


def run_name(order: str, model: str, seed: int) -> str:
  """The folder of a run's checkpoints."""
  return "_".join(part for part in (order, model, f"seed{seed}") if part)


def make_program(config: Config, order: str, model: str, files: Any) -> Program:
  """The captioner of that name for captions of that order, or for ``files``."""
  settings = config.settings(order)
  if config.dataset == "shapes":
    return ShapesProgram(ShapesCaptions(order=order), model, settings, config.test_examples)
  data, vocabulary = files
  return FilesProgram(data, vocabulary, model, settings, config.beam_size)


def read_files(config: Config) -> Any:
  """The images and the vocabulary, where there are files."""
  if config.dataset == "shapes":
    return None
  data = caption_files.read(config)
  return data, caption_files.make_vocabulary(data, config.settings())


def check_shapes(config: Config, files: Any) -> None:
  """Makes every program once, so that what cannot run is refused before anything is trained.

  Raises:
    ValueError: if a captioner cannot be made of these settings and these data.
  """
  for order in config.all_orders():
    for model in config.all_models():
      make_program(config, order, model, files).check()


def run_all(
  config: Config,
  files: Any,
  outcome: Outcome,
  write: Callable[..., None],
  progress: Progress,
) -> None:
  """Trains and judges every captioner; fills ``outcome`` as it goes."""
  for order in config.all_orders():
    settings = config.settings(order)
    if order:
      entropies = ShapesCaptions(order=order).entropies("validation")
      outcome.bounds[order] = {
        "entropy given the image": entropies.given_image,
        "entropy without it": entropies.caption,
      }
    for model in config.all_models():
      label = ", ".join(part for part in (order, MODELS[model].label) if part)
      bar = progress.add_task(label, total=settings.steps * len(config.all_seeds()), loss="")
      show = functools.partial(progress.update, bar)
      show(loss="compiling")
      program = make_program(config, order, model, files)
      for i, seed in enumerate(config.all_seeds()):
        folder = config.output_dir / "checkpoints" / run_name(order, model, seed)
        trainer = program.trainer(seed, folder)
        before = i * settings.steps
        run = {"order": order, "model": model, "seed": seed}
        with contextlib.closing(trainer):  # Waits for checkpoints, also after Ctrl-C.
          done = trainer.restore() if config.resume else 0
          show(completed=before + done)
          on_step = lambda done, before=before, show=show: show(completed=before + done)
          every = settings.eval_every, config.checkpoint_every
          for step, loss in trainer.fit(done, settings.steps, *every, on_step):
            validation = program.validation(trainer.state.params)
            line = run | {
              "step": step,
              "seconds": trainer.seconds,
              "train_loss": loss,
              "validation_nll": validation,
            }
            outcome.lines.append(line)
            write(**line)
            show(completed=before + step, loss=f"validation loss {validation:.3f}")
        row = run | program.test(trainer.state.params)
        row["ms_per_step"] = 1e3 * trainer.seconds / settings.steps
        outcome.rows.append(row)
        if (order, model) not in outcome.examples:
          outcome.examples[order, model] = program.examples(trainer.state.params)


def lines_to_keep(config: Config, lines: list[Line]) -> list[Line]:
  """The lines of an earlier run up to the checkpoints that it goes on from."""
  kept = []
  for line in lines:
    name = run_name(line["order"], line["model"], line["seed"])
    folder = config.output_dir / "checkpoints" / name
    if line["step"] <= latest_step(folder):
      kept.append(line)
  return kept
