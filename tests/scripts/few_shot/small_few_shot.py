"""Few-shot learning on a few random images, as a process of its own that never ends."""

import functools
import time

import numpy as np

from scripts.common import study
from scripts.common.fewshot_data import FewShotData, ImageClasses
from scripts.few_shot import __main__ as script
from scripts.few_shot.__main__ import Config, FewShot, FewShotStudy

SMALL = {
  "width": 2, "num_ways": 2, "num_shots": 1, "num_queries": 1, "num_tasks": 2, "inner_steps": 2,
  "num_samples": 2, "eval_episodes": 20, "eval_every": 2, "checkpoint_every": 2, "steps": 4,
}  # fmt: skip


def read(config=None):
  """In the place of glyphs, which take seconds to draw."""
  images = np.random.default_rng(0).integers(256, size=(12, 4, 16, 16, 1), dtype=np.uint8)
  return FewShotData(*[ImageClasses(images, np.full(12, 4, np.int32), np.arange(12))] * 3)


class Stuck(FewShot):
  """Waits in its last step until it is killed."""

  def step(self, state, t):
    if t == 3:
      time.sleep(600)
    return super().step(state, t)


if __name__ == "__main__":
  script.read, script.FewShot = read, Stuck
  study.main(Config, functools.partial(study.run, FewShotStudy()), None)
