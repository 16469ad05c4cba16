"""Continual language-model training on two small domains, as a process of its own can run it.

Nothing may be computed when this is imported: processes have not met yet.
"""

import sys

import tyro

from scripts.continual_lm import __main__ as continual_lm
from scripts.continual_lm import documents as lm_documents
from scripts.continual_lm.config import Config
from scripts.continual_lm.documents import Corpus, Document

WORDS, DIGITS = "the quick brown fox jumps over the lazy dog " * 20, "31415926535897932384 " * 10


def corpus(data_dir=None):
  """In the place of what ships with Python, which takes seconds to read."""
  parts = [[Document(WORDS[i:], 0), Document(DIGITS[i:], 1)] for i in range(3)]
  return Corpus(("words", "digits"), *parts)


if __name__ == "__main__":
  lm_documents.DATASETS["python"] = corpus
  continual_lm.print_and_draw = lambda *_: print("The report.")
  sys.exit(continual_lm.main(tyro.cli(Config)))
