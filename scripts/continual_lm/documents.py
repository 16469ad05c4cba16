"""Documents of several domains, for language models: what ships with Python, and TFDS data sets."""

import ast
import importlib
import sysconfig
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from scripts.common import data


class Document(NamedTuple):
  """A text, and the number of its domain."""

  text: str
  domain: int


class Corpus(NamedTuple):
  """Documents in three parts, none of which is in two.

  Attributes:
    domains: the names of the domains.
    train: documents to train on.
    validation: documents for choices and curves.
    test: documents for reports.
  """

  domains: tuple[str, ...]
  train: list[Document]
  validation: list[Document]
  test: list[Document]


# -- What ships with Python: the same for one version of Python, no matter where it runs.

# Modules of the other domains are files beside these folders, so that none is in two domains.
_PACKAGES = (
  "asyncio", "collections", "concurrent", "email", "html", "http", "importlib", "json", "logging",
  "multiprocessing", "unittest", "urllib", "xml",
)  # fmt: skip


def python_corpus(data_dir: Path | None = None) -> Corpus:
  """Four domains that every Python brings along.

  ``manual``: topics of the language reference (``pydoc_data``). ``docstrings``: the documentation
  strings of a module of the standard library, for modules that are no packages. ``code``: modules
  of its packages. ``characters``: the names of 256 characters of Unicode, without those that are
  made from numbers. Of the documents of a domain in the order of their names, every tenth is for
  testing and another tenth for validation.
  """
  del data_dir
  library = Path(sysconfig.get_path("stdlib"))
  topics = importlib.import_module("pydoc_data.topics").topics
  modules = [path for path in library.glob("*.py") if not path.name.startswith("_")]
  sources = [path for name in _PACKAGES for path in (library / name).rglob("*.py")]
  sources = [path for path in sources if "test" not in path.relative_to(library).parts]
  pages = {f"{page:02x}": _names_of_characters(page) for page in range(256)}
  return _every_tenth(
    {
      "manual": topics,
      "docstrings": {path.name: _docstrings(path) for path in modules},
      "code": {
        str(path.relative_to(library)): path.read_text(encoding="utf-8") for path in sources
      },
      "characters": pages,
    }
  )


def _docstrings(path: Path) -> str:
  """The documentation strings of a module, one after another."""
  documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
  nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
  strings = [ast.get_docstring(node) for node in nodes if isinstance(node, documented)]
  return "\n\n".join(string for string in strings if string)


def _names_of_characters(page: int) -> str:
  """The names of the characters ``256 * page`` and following, a line each."""
  names = []
  for code in range(256 * page, 256 * (page + 1)):
    name = unicodedata.name(chr(code), "")
    if name and not name.endswith(f"{code:X}") and not name.startswith("HANGUL SYLLABLE"):
      names.append(name)
  return "\n".join(names)


def _every_tenth(texts: Mapping[str, Mapping[str, str]]) -> Corpus:
  """Divides named documents of each domain."""
  corpus = Corpus(tuple(texts), [], [], [])
  parts = {0: corpus.test, 5: corpus.validation}
  for domain, named in enumerate(texts.values()):
    found = dict.fromkeys(named[name] for name in sorted(named) if named[name])  # each text once
    for i, text in enumerate(found):
      parts.get(i % 10, corpus.train).append(Document(text, domain))
  return corpus


# -- Data sets of tensorflow-datasets.


def text_domains(data_dir: Path | None = None) -> Corpus:
  """``text_domains``: an encyclopedia, novels, politics, economics, captions of images."""
  preparation = (
    "It is not in the catalogue of tensorflow-datasets: passages with the features text, domain "
    "(a class label),\nsource and position (their order), in splits train, validation and test. "
    "tfds.dataset_builders.store_as_tfds_dataset writes such a folder."
  )

  def documents(split: str) -> list[Document]:
    source = data.tfds_source("text_domains", split, data_dir, preparation)
    examples = source.__getitems__(range(len(source)))
    examples = sorted(examples, key=lambda example: (example["source"], example["position"]))
    return [Document(example["text"].decode(), int(example["domain"])) for example in examples]

  parts = [documents(split) for split in ("train", "validation", "test")]
  info = data.tfds_source("text_domains", "train", data_dir, preparation).dataset_info
  return Corpus(tuple(info.features["domain"].names), *parts)


def tiny_shakespeare(data_dir: Path | None = None) -> Corpus:
  """``tiny_shakespeare``: one domain, one document in each part."""
  parts: Sequence[list[Document]] = [
    [Document(data.tfds_source("tiny_shakespeare", split, data_dir)[0]["text"].decode(), 0)]
    for split in ("train", "validation", "test")
  ]
  return Corpus(("plays",), *parts)


DATASETS: dict[str, Callable[..., Corpus]] = {
  "python": python_corpus,
  "text_domains": text_domains,
  "tiny_shakespeare": tiny_shakespeare,
}
