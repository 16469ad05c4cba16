"""Captions of a user's own images from a checkpoint."""

import contextlib
import json
from typing import Any

import jax
import numpy as np
from jaxbo_models.vocabulary import Vocabulary

from scripts.captioning import data, model, plots
from scripts.captioning.config import Config, Settings
from scripts.captioning.model import Asked
from scripts.common import folder
from scripts.common.checkpoints import Checkpoints, latest_step

VOCABULARY, PICTURE = "vocabulary.json", "predictions.png"


def load(config: Config) -> tuple[Asked, Any, Vocabulary, Settings]:
  """A trained captioner, its parameters, its words and its sizes.

  It is that of the first order, captioner and seed that the configuration names.

  Raises:
    ValueError: if there is no run, or no checkpoint of it.
  """
  path = config.output_dir / folder.CONFIG
  if not path.exists():
    raise ValueError(f"predict needs a run in output_dir, none in {config.output_dir}")
  saved = json.loads(path.read_text())
  if saved.get("study") != "Captioning":
    raise ValueError(f"output_dir must have a run of captioning, got another one in {path}")
  trained = Config(**saved["identity"], orders=config.orders, methods=config.methods)
  order, name = trained.all_orders()[0], trained.all_models()[0]
  checkpoints = folder.checkpoints(config.output_dir, cell_key(order, name, config.first_seed))
  if not latest_step(checkpoints):
    there = sorted(run.name for run in checkpoints.parent.glob("*")) or ["none"]
    raise ValueError(
      f"no checkpoint of {checkpoints.name} in {checkpoints.parent}; there is {there}"
    )
  with contextlib.closing(Checkpoints(checkpoints)) as saved_states:
    params = saved_states.raw()["params"]
  vocabulary, settings = Vocabulary.load(config.output_dir / VOCABULARY), trained.settings(order)
  captioner = model.make_model(name, settings, len(vocabulary))
  return model.ask(captioner, settings, vocabulary, config.beam_size), params, vocabulary, settings


def cell_key(order: str, name: str, seed: int) -> dict[str, Any]:
  """The columns that name a run."""
  return {"order": order, "model": name, "seed": seed}


def predict(config: Config) -> None:
  """Captions image files: prints the captions, and draws where the captioner looked.

  Raises:
    FileNotFoundError: if an image is not there.
    ValueError: if there is no checkpoint, a file is no image, or beam_size exceeds the vocabulary.
  """
  ask, params, vocabulary, settings = load(config)
  images = np.stack([data.read_image(path, settings.image_size) for path in config.predict])
  captions = jax.tree.map(np.asarray, ask.beam(params, images))
  examples = model.captioned(images, captions, vocabulary)
  for path, example in zip(config.predict, examples, strict=True):
    print(f"{path}: {' '.join(example.words[:-1])}  ({example.title})")
  names = [path.name for path in config.predict]
  titled = [example._replace(title=name) for name, example in zip(names, examples, strict=True)]
  plots.draw_attention(titled, settings.patch_size, config.output_dir / PICTURE)
  print(f"{PICTURE} is in {config.output_dir}")
