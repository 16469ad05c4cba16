"""Few-shot learning of noise, by a backbone of three features."""

import jax
import jax.numpy as jnp
import numpy as np

from scripts.common import fewshot_data, study
from scripts.few_shot import __main__ as script
from scripts.few_shot import plots
from scripts.few_shot.__main__ import Config, FewShotStudy
from scripts.few_shot.problem import Backbone

__all__ = ["Config"]
SMALL = {
  "width": 2, "num_ways": 2, "num_shots": 1, "num_queries": 1, "num_tasks": 2, "inner_steps": 2,
  "num_samples": 2, "eval_episodes": 20, "eval_every": 2, "checkpoint_every": 2, "steps": 4,
}  # fmt: skip
NUM_LINES = 2  # The checkpoint is of step 2, the line of step 4.


def features(x, images):
  """Three features of an image, so that everything can be exact."""
  return jnp.tanh(images.reshape(len(images), -1) @ x["w"])


BACKBONE = Backbone(
  lambda key, images: {"w": jax.random.normal(key, (images[0].size, 3))}, features, features
)


def make_small(setattr):
  """Noise in the place of data, and no pictures, which take seconds."""
  images = np.random.default_rng(0).integers(256, size=(12, 4, 16, 16, 1), dtype=np.uint8)
  part = fewshot_data.ImageClasses(images, np.full(12, 4, np.int32), np.arange(12))
  setattr(script, "read", lambda config: fewshot_data.FewShotData(*[part] * 3))
  setattr(script, "make_backbone", lambda config: BACKBONE)
  for name in ("draw_curves", "draw_episode"):
    setattr(plots, name, lambda *_: None)


def run(config):
  """The experiment."""
  return study.run(FewShotStudy(), config)
