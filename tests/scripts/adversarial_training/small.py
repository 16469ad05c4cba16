"""Small images that train in seconds."""

import functools

import numpy as np

from scripts.adversarial_training import __main__ as script
from scripts.adversarial_training import data as adv_data
from scripts.adversarial_training import plots
from scripts.adversarial_training.__main__ import run
from scripts.adversarial_training.config import Config
from scripts.adversarial_training.evaluate import Evaluator
from scripts.common import devices as common_devices
from tests.scripts.common.processes import some_devices

__all__ = ["run"]
NUM_LINES = 2  # The checkpoint is of epoch 1.
RNG = np.random.default_rng(0)
NAMES = ("round", "square", "flat", "long")
LOSSES = {"tail_loss": 1.0, "tail_loss_calibrated": 1.0, "softmax_temperature": 1.0}
SETTINGS = {
  "sets": ("long_tailed",), "seeds": 1, "largest": 20, "ratio": 4.0, "epochs": 2, "batch_size": 8,
  "widths": (2, 3), "num_hidden": 4, "attack_steps": 2, "validation_per_class": 4,
  "test_per_class": 4, "test_steps": 2, "worst_steps": 2, "num_targets": 1, "num_queries": 2,
  "test_batch_size": 16,
}  # fmt: skip


def make_images(number):
  """Four classes, each bright in a place of its own."""
  labels = np.arange(number, dtype=np.int32) % 4
  images = RNG.integers(0, 100, (number, 8, 8, 1))
  for label in range(4):
    images[labels == label, 2 * label : 2 * label + 2] += 120
  return adv_data.Images(images.astype(np.uint8), labels)


@functools.cache
def make_data():
  """Images of four classes."""
  return adv_data.split_up(make_images(320), make_images(80), NAMES, 4, 4)


def config(folder):
  """Two seeds of two epochs of one method."""
  return Config(output_dir=folder, **SETTINGS | {"methods": ("at_kl",), "seeds": 2})


def make_small(setattr):
  """The small images, and no pictures, which take seconds."""
  setattr(adv_data, "read", lambda *arguments: make_data())
  for name in (
    "draw_gains",
    "draw_weights",
    "draw_examples",
    "weights_and_margins",
    "examples",
  ):
    setattr(plots, name, lambda *_: ())


def patch(setattr, cheap=True):
  """The small images, on one device; if cheap, clean images alone are judged and nothing is drawn.

  Returns the images that are judged.
  """
  seen = []

  def of_test(self, params, part, names):
    seen.append(part)
    names = ["clean", "pgd", "worst", "tail", "worst_class"]
    names += [f"robust/{name}" for name in NAMES]
    return dict.fromkeys(names, self.accuracy(params, part)) | {"doubts": ""}

  setattr(adv_data, "read", lambda *arguments: make_data())
  setattr(common_devices, "all_devices", lambda: some_devices(1))
  if cheap:
    setattr(Evaluator, "of_test", of_test)
    setattr(Evaluator, "of_losses", lambda *_: LOSSES)
    setattr(script.AdversarialTraining, "draw", lambda self, run: None)
  return seen
