"""Captions of a user's own images from a checkpoint."""

import numpy as np
from jaxbo_models.vocabulary import Vocabulary

from scripts.captioning import data, model, plots
from scripts.captioning.config import Config
from scripts.common import devices, folder
from scripts.common.checkpoints import Checkpoints, latest_step
from scripts.common.files import read_json

VOCABULARY, PICTURE = "vocabulary.json", "predictions.png"


def predict(config: Config) -> None:
  """Captions image files: prints the captions, and draws where the captioner looked.

  The captioner is that of the first order, name and seed that the configuration has.

  Raises:
    FileNotFoundError: if an image is not there.
    ValueError: if a checkpoint is missing, a file is not an image, or beam_size is too large.
  """
  path = config.output_dir / folder.CONFIG
  if not path.exists():
    raise ValueError(f"predict needs a run in output_dir, none in {config.output_dir}")
  saved = read_json(path, folder.CURE)
  if saved.get("study") != "Captioning":
    raise ValueError(f"output_dir must have a run of captioning, got another one in {path}")
  trained = Config.of(saved["identity"], orders=config.orders, methods=config.methods)
  order, name = trained.all_orders()[0], trained.all_models()[0]
  key = {"order": order, "model": name, "seed": config.first_seed}
  at = folder.checkpoints(config.output_dir, key)
  if not latest_step(at):
    there = sorted(path.name for path in at.parent.glob("*")) or ["none"]
    raise ValueError(f"there is no checkpoint {at}, but {' '.join(there)}")
  params = Checkpoints(at).raw()["params"]

  settings, vocabulary = trained.settings(order), Vocabulary.load(config.output_dir / VOCABULARY)
  ask = model.Asked(name, settings, vocabulary, config.beam_size, devices.all_devices())
  images = np.stack([data.read_image(path, settings.image_size) for path in config.predict])
  drawn = ask.captioned(params, images)
  for i, path in enumerate(config.predict):
    print(f"{path}: {' '.join(drawn[i].words[:-1])}  ({drawn[i].title})")
    drawn[i] = drawn[i]._replace(title=path.name)
  plots.draw_attention(drawn, settings.patch_size, config.output_dir / PICTURE)
  print(f"{PICTURE} is in {config.output_dir}")
