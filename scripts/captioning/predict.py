"""Captions of a user's own images from a checkpoint."""

import contextlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxbo_models.captioner import GuidedCaptioner
from jaxbo_models.vocabulary import Vocabulary
from rich.console import Console

from scripts.captioning import data as caption_data
from scripts.captioning import model as caption_model
from scripts.captioning import plots as caption_plots
from scripts.captioning.config import Config, Settings
from scripts.captioning.run import run_name
from scripts.captioning.scenes import ShapesCaptions
from scripts.common.checkpoints import Checkpoints

VOCABULARY, PICTURE = "vocabulary.json", "predictions.png"


def load(config: Config) -> tuple[GuidedCaptioner, Any, Vocabulary, Settings]:
  """A trained captioner, its parameters, its words and its sizes.

  It is that of the first order, model and seed which the configuration names.

  Raises:
    ValueError: if there is no run, or no checkpoint of it.
  """
  path = config.output_dir / "config.json"
  if not path.exists():
    raise ValueError(f"predict needs a run in output_dir, none in {config.output_dir}")
  found = json.loads(path.read_text())
  if not Settings.__dataclass_fields__.keys() <= found.keys():
    raise ValueError(f"output_dir must have a run of captioning, got another one in {path}")
  sizes: dict[str, Any] = {name: found[name] for name in Settings.__dataclass_fields__}
  sizes["image_size"] = tuple(sizes["image_size"])
  settings = Settings(**sizes)
  vocabulary = Vocabulary.load(config.output_dir / VOCABULARY)
  order = config.orders[0] if found["dataset"] == "shapes" else ""
  name = config.all_models()[0]
  folder = config.output_dir / "checkpoints" / run_name(order, name, config.first_seed)
  if not any(step.name.isdigit() for step in folder.glob("*")):
    there = sorted(run.name for run in folder.parent.glob("*")) or ["none"]
    raise ValueError(f"no checkpoint of {folder.name} in {folder.parent}; there is {there}")
  model = caption_model.make_model(name, settings, len(vocabulary))
  tx = caption_model.make_optimizer(settings)
  given = {
    "features": np.zeros((1, *settings.image_size, 3), np.float32),
    "tokens": np.zeros((1, 3), np.int32),
  }
  with contextlib.closing(Checkpoints(folder)) as checkpoints:
    state, _, _ = checkpoints.restore(caption_model.init_state(model, tx, given, jax.random.key(0)))
  return model, state.params, vocabulary, settings


def predict(config: Config, console: Console) -> None:
  """Captions image files: prints the captions, and draws where the captioner looked.

  Raises:
    FileNotFoundError: if an image is not there.
    ValueError: if there is no checkpoint, a file is no image, or beam_size exceeds the vocabulary.
  """
  model, params, vocabulary, settings = load(config)
  images = np.stack([caption_data.read_image(path, settings.image_size) for path in config.predict])
  ask = caption_model.ask(
    model,
    max_length=settings.max_words + 1,
    beam_size=config.beam_size,
    forbidden=caption_model.never_said(vocabulary),
  )
  captions = jax.tree.map(np.asarray, ask.beam(params, images))
  examples = caption_model.captioned(images, captions, vocabulary)
  for path, example in zip(config.predict, examples, strict=True):
    console.print(f"{path}: {' '.join(example.words[:-1])}  ({example.title})", highlight=False)
  titled = [
    example._replace(title=path.name)
    for path, example in zip(config.predict, examples, strict=True)
  ]
  caption_plots.draw_attention(titled, settings.patch_size, config.output_dir / PICTURE)
  console.print(f"{PICTURE} is in {config.output_dir}")


def save_vocabulary(folder: Path, vocabulary: Vocabulary | None) -> None:
  """Writes what :func:`load` reads; that of shapes if there is no other."""
  vocabulary = vocabulary or Vocabulary(ShapesCaptions().vocabulary)
  vocabulary.save(folder / VOCABULARY)


def check_vocabulary(folder: Path, vocabulary: Vocabulary | None) -> None:
  """Raises ``ValueError`` if a run that goes on had other words: ids would mean something else."""
  if vocabulary and vocabulary.words != Vocabulary.load(folder / VOCABULARY).words:
    raise ValueError(
      f"captions must be those of the run to resume, got other words than {folder / VOCABULARY}"
    )
