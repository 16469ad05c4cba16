"""Documents of several domains: what ships with Python, TFDS data sets, and files of a user."""

import ast
import sysconfig
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from scripts.common.data import tfds_source
from scripts.continual_lm import user_files

SPLITS = ("train", "validation", "test")
Document = TypeVar("Document")
Documents = list[list[str]]  # The texts of each domain.


class Corpus(NamedTuple, Generic[Document]):
  """Names of domains, and documents: to train on, for curves, and for reports; none is in two."""

  domains: tuple[str, ...]
  train: list[list[Document]]  # Those of each domain.
  validation: list[list[Document]]
  test: list[list[Document]]


# Modules of the other domains are files beside these folders, so that none is in two domains.
_PACKAGES = (
  "asyncio", "collections", "concurrent", "email", "html", "http", "importlib", "json", "logging",
  "multiprocessing", "unittest", "urllib", "xml",
)  # fmt: skip


def python_corpus(data_dir: Path | None = None) -> Corpus[str]:
  """Four domains that every Python brings along: the same text for one version of Python.

  ``manual``: topics of the language reference (``pydoc_data``). ``docstrings``: the documentation
  strings of a module of the standard library, for modules that are no packages. ``code``: modules
  of its packages. ``characters``: the names of 256 characters of Unicode, without those that are
  made from numbers. Of the documents of a domain in the order of their names, every tenth is for
  testing and another tenth for validation.
  """
  from pydoc_data.topics import topics

  names_of = {f"{page:02x}": _names_of_characters(page) for page in range(256)}
  return _every_tenth({"manual": topics, **library_texts(), "characters": names_of})


def library_texts() -> dict[str, dict[str, str]]:
  """The domains ``docstrings`` and ``code``: texts by the files' places in the standard library."""
  library = Path(sysconfig.get_path("stdlib"))
  modules = [path for path in library.glob("*.py") if not path.name.startswith("_")]
  sources = {
    str(path.relative_to(library)): path.read_text(encoding="utf-8")
    for name in _PACKAGES
    for path in (library / name).rglob("*.py")
    if "test" not in path.relative_to(library).parts
  }
  return {"docstrings": {path.name: _docstrings(path) for path in modules}, "code": sources}


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


def _every_tenth(texts: Mapping[str, Mapping[str, str]]) -> Corpus[str]:
  """Divides named documents of each domain."""
  names = [divided(named) for named in texts.values()]
  of_part = lambda part: [
    [named[name] for name in of_domain[part]]
    for named, of_domain in zip(texts.values(), names, strict=True)
  ]
  return Corpus(tuple(texts), *map(of_part, range(len(SPLITS))))


def divided(named: Mapping[str, str]) -> tuple[list[str], list[str], list[str]]:
  """The names of texts to train on, for validation and for testing, in order.

  Every tenth is for testing and another tenth for validation. Empty texts are left out, and of
  equal ones all but the first.
  """
  first = {named[name]: name for name in sorted(named, reverse=True) if named[name]}
  found = sorted(first.values())
  return [name for i, name in enumerate(found) if i % 5], found[5::10], found[0::10]


def text_domains(data_dir: Path | None = None) -> Corpus[str]:
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


def tiny_shakespeare(data_dir: Path | None = None) -> Corpus[str]:
  """``tiny_shakespeare``: one domain, one document in each part."""
  sources = (tfds_source("tiny_shakespeare", split, data_dir) for split in SPLITS)
  return Corpus(("plays",), *([[source[0]["text"].decode()]] for source in sources))


def read(name: str, data_dir: Path | None = None) -> Corpus[str]:
  """A data set of :data:`DATASETS`, or a user's ``.txt`` or ``.jsonl``.

  Raises:
    ValueError: if a file has a bad line, or a domain too few documents for three parts.
  """
  if name in DATASETS:
    return DATASETS[name](data_dir)
  texts: dict[str, dict[str, str]] = {}
  for number, (domain, text) in enumerate(user_files.texts(Path(name))):
    texts.setdefault(domain, {})[f"{number:09}"] = text
  for domain, named in texts.items():
    check_enough(name, domain, *divided(named))
  return _every_tenth(texts)


def check_enough(name: str, domain: str, *parts: list[Document]) -> None:
  """Raises ``ValueError`` if a part of a domain is empty."""
  if not all(parts):
    raise ValueError(
      f"{name} must have at least 6 different documents of every domain, for three parts; got "
      f"{sum(map(len, parts))} of {domain}"
    )


DATASETS: dict[str, Callable[[Path | None], Corpus[str]]] = {
  "python": python_corpus,
  "text_domains": text_domains,
  "tiny_shakespeare": tiny_shakespeare,
}
