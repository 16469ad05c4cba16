"""Continual language-model training on two small domains, also by two processes that meet.

Nothing may be computed when this is imported: processes have not met yet.
"""

import time

import jax

from scripts.common import study
from scripts.continual_lm import __main__ as script
from scripts.continual_lm.__main__ import ContinualLM, Training
from scripts.continual_lm.config import Config
from scripts.continual_lm.documents import DATASETS, Corpus

WORDS, DIGITS = "the quick brown fox jumps over the lazy dog " * 20, "31415926535897932384 " * 10
SMALL = {
  "batch_size": 8, "length": 16, "width": 8, "num_heads": 2, "num_layers": 1, "pretrain_steps": 2,
  "steps": 4, "eval_every": 2, "seeds": 1, "validation_sequences": 2, "test_sequences": 2,
  "timing_rounds": 0,
}  # fmt: skip


def corpus(data_dir=None):
  """In the place of what ships with Python, which takes seconds to read."""
  return Corpus(("words", "digits"), *([[WORDS[i:]], [DIGITS[i:]]] for i in range(3)))


class Stuck(Training):
  """Waits in the last step of a method until it is killed."""

  def step(self, state, t):
    if t == 3 and self.method != script.START:
      time.sleep(600)
    return super().step(state, t)


class WithoutPictures(ContinualLM):
  """Pictures take seconds, and processes can meet only once."""

  def connect(self, config):
    if not jax.distributed.is_initialized():
      super().connect(config)

  def draw(self, run):
    print("The pictures.")


def runs(config):
  """A run that gets stuck; or two that are refused, a whole one, and the rest of the stuck one."""
  if not config.resume:
    script.Training = Stuck
    return study.run(WithoutPictures(), config)
  place = config.output_dir.with_name
  begin = lambda name: {"output_dir": place(name), "resume": False}
  options = {"output_dir": place("nothing")}, begin("in_use"), begin("whole"), {}
  statuses = [study.run(WithoutPictures(), config.but(**of_run)) for of_run in options]
  print(statuses)
  return statuses[-1]


if __name__ == "__main__":
  DATASETS["python"] = corpus
  study.main(Config, runs, None)
