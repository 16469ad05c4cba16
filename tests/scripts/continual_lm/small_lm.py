"""Continual language-model training on two small domains, as a process of its own can run it.

Nothing may be computed when this is imported: processes have not met yet.
"""

import functools

from scripts.common import study
from scripts.continual_lm.__main__ import ContinualLM
from scripts.continual_lm.config import Config
from scripts.continual_lm.documents import DATASETS, Corpus, Document

WORDS, DIGITS = "the quick brown fox jumps over the lazy dog " * 20, "31415926535897932384 " * 10


def corpus(data_dir=None):
  """In the place of what ships with Python, which takes seconds to read."""
  parts = [[Document(WORDS[i:], 0), Document(DIGITS[i:], 1)] for i in range(3)]
  return Corpus(("words", "digits"), *parts)


class WithoutPictures(ContinualLM):
  """What is drawn takes seconds, too."""

  def draw(self, run):
    """Says where pictures would be drawn."""
    print("The pictures.")


if __name__ == "__main__":
  DATASETS["python"] = corpus
  study.main(Config, functools.partial(study.run, WithoutPictures()), None)
