"""Continual language-model training on two small domains, as a process of its own can run it.

Nothing may be computed when this is imported: processes have not met yet.
"""

import sys

import tyro

from scripts import continual_lm
from scripts.common import lm_documents
from scripts.common.lm_config import Config
from scripts.common.lm_documents import Corpus, Document

WORDS, DIGITS = "the quick brown fox jumps over the lazy dog " * 20, "31415926535897932384 " * 10


def corpus(data_dir=None):
  """In the place of what ships with Python, which takes seconds to read."""
  parts = [[Document(WORDS[i:], 0), Document(DIGITS[i:], 1)] for i in range(3)]
  return Corpus(("words", "digits"), *parts)


if __name__ == "__main__":
  lm_documents.DATASETS["python"] = corpus
  continual_lm.print_and_draw = lambda *_: print("The report.")
  sys.exit(continual_lm.main(tyro.cli(Config)))
