"""Continual language-model training on two small domains, also by two processes that meet.

Nothing may be computed when this is imported: processes have not met yet.
"""

from scripts.common import folder, study
from scripts.common.checkpoints import latest_step
from scripts.continual_lm.__main__ import ContinualLM
from scripts.continual_lm.config import Config
from scripts.continual_lm.documents import DATASETS, Corpus
from tests.scripts.common.stopped import programs_kept, stopped_after

WORDS, DIGITS = "the quick brown fox jumps over the lazy dog " * 20, "31415926535897932384 " * 10
SMALL = {
  "batch_size": 8, "length": 16, "width": 8, "num_heads": 2, "num_layers": 1, "pretrain_steps": 2,
  "steps": 4, "eval_every": 2, "seeds": 1, "validation_sequences": 2, "test_sequences": 2,
  "timing_rounds": 0,
}  # fmt: skip


def corpus(data_dir=None):
  """In the place of what ships with Python, which takes seconds to read."""
  return Corpus(("words", "digits"), *([[WORDS[i:]], [DIGITS[i:]]] for i in range(3)))


class Cheap(ContinualLM):
  """Pictures take seconds, and so do programs."""

  given = None

  def prepare(self, config):
    Cheap.given = self.given or super().prepare(config)
    return self.given

  def draw(self, run):
    pass


@programs_kept()
def runs(config):
  """A run that is stopped, two that are refused, a whole one, and the rest of the first one."""
  with stopped_after(3):  # The last line.
    study.run(Cheap(), config)
  key = {"corruption": 0.2, "method": "ir_dro_compositional", "seed": 0}
  assert latest_step(folder.checkpoints(config.output_dir, key)) == 2
  place = config.output_dir.with_name
  run = lambda name, resume: study.run(Cheap(), config.but(output_dir=place(name), resume=resume))
  statuses = [run("nothing", True), run("in_use", False), run("whole", False), run("stopped", True)]
  print(statuses)
  return statuses[-1]


if __name__ == "__main__":
  DATASETS["python"] = corpus
  study.main(Config, runs, None)
