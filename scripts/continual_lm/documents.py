"""Documents of several domains, for language models: what ships with Python, and TFDS data sets."""

import ast
import sysconfig
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from scripts.common.data import tfds_source

SPLITS = ("train", "validation", "test")
Documents = list[list[str]]  # The texts of each domain.


class Corpus(NamedTuple):
  """Names of domains, and documents: to train on, for curves, and for reports; none is in two."""

  domains: tuple[str, ...]
  train: Documents
  validation: Documents
  test: Documents


# Modules of the other domains are files beside these folders, so that none is in two domains.
_PACKAGES = (
  "asyncio", "collections", "concurrent", "email", "html", "http", "importlib", "json", "logging",
  "multiprocessing", "unittest", "urllib", "xml",
)  # fmt: skip


def python_corpus(data_dir: Path | None = None) -> Corpus:
  """Four domains that every Python brings along: the same text for one version of Python.

  ``manual``: topics of the language reference (``pydoc_data``). ``docstrings``: the documentation
  strings of a module of the standard library, for modules that are no packages. ``code``: modules
  of its packages. ``characters``: the names of 256 characters of Unicode, without those that are
  made from numbers. Of the documents of a domain in the order of their names, every tenth is for
  testing and another tenth for validation.
  """
  from pydoc_data.topics import topics

  library = Path(sysconfig.get_path("stdlib"))
  modules = [path for path in library.glob("*.py") if not path.name.startswith("_")]
  sources = {
    str(path.relative_to(library)): path.read_text(encoding="utf-8")
    for name in _PACKAGES
    for path in (library / name).rglob("*.py")
    if "test" not in path.relative_to(library).parts
  }
  return _every_tenth(
    {
      "manual": topics,
      "docstrings": {path.name: _docstrings(path) for path in modules},
      "code": sources,
      "characters": {f"{page:02x}": _names_of_characters(page) for page in range(256)},
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
  found = [  # Each text once.
    list(dict.fromkeys(named[name] for name in sorted(named) if named[name]))
    for named in texts.values()
  ]
  train = [[text for i, text in enumerate(domain) if i % 5] for domain in found]
  validation, test = ([domain[first::10] for domain in found] for first in (5, 0))
  return Corpus(tuple(texts), train, validation, test)


def text_domains(data_dir: Path | None = None) -> Corpus:
  """``text_domains``: an encyclopedia, novels, politics, economics, captions of images."""
  preparation = (
    "It is not in the catalogue of tensorflow-datasets: passages with the features text, domain "
    "(a class label),\nsource and position (their order), in splits train, validation and test. "
    "tfds.dataset_builders.store_as_tfds_dataset writes such a folder."
  )
  train, *others = (tfds_source("text_domains", s, data_dir, preparation) for s in SPLITS)
  names = tuple(train.dataset_info.features["domain"].names)

  def texts(source) -> Documents:
    examples = source.__getitems__(range(len(source)))
    examples = sorted(examples, key=lambda example: (example["source"], example["position"]))
    of_domain = lambda i: [e["text"].decode() for e in examples if e["domain"] == i]
    return [of_domain(i) for i in range(len(names))]

  return Corpus(names, *map(texts, (train, *others)))


def tiny_shakespeare(data_dir: Path | None = None) -> Corpus:
  """``tiny_shakespeare``: one domain, one document in each part."""
  sources = (tfds_source("tiny_shakespeare", split, data_dir) for split in SPLITS)
  return Corpus(("plays",), *([[source[0]["text"].decode()]] for source in sources))


DATASETS: dict[str, Callable[[Path | None], Corpus]] = {
  "python": python_corpus,
  "text_domains": text_domains,
  "tiny_shakespeare": tiny_shakespeare,
}
