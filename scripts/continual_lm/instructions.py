"""Prompts with their responses: which sets there are, and how they are written for a model."""

import ast
import itertools
import re
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from scripts.common.data import tfds_source
from scripts.continual_lm import documents, user_files
from scripts.continual_lm.documents import Corpus

TEMPLATES = ("plain", "chat")


class Example(NamedTuple):
  """What was said, and the response that is to be learned."""

  turns: tuple[tuple[str, str], ...]  # The role and the text of each, "user" above all.
  response: str


Parts = tuple[list[Example], list[Example], list[Example]]


def read(names: Sequence[str], data_dir: Path | None = None) -> Corpus[Example]:
  """The sets of these names or files; of several ones each is a domain.

  Raises:
    ValueError: if a file has a bad line, two sets have the same name, or a part is empty.
    FileNotFoundError: if a set is not there.
  """
  found = [_read_one(name, data_dir) for name in names]
  if len(found) == 1:
    return found[0]
  domains = tuple(label(name) for name in names)
  if len(set(domains)) < len(domains):
    raise ValueError(f"instructions must have different names, got {' '.join(domains)}")
  merged = [[list(itertools.chain(*of_domains)) for of_domains in corpus[1:]] for corpus in found]
  return Corpus(domains, *map(list, zip(*merged, strict=True)))


def label(name: str) -> str:
  """What a set is called: its name, or that of its file."""
  return name if name in SETS else Path(name).stem


def _read_one(name: str, data_dir: Path | None) -> Corpus[Example]:
  if name in SETS:
    return SETS[name](data_dir)
  of_domain: dict[str, list[Example]] = {}
  for domain, turns, response in user_files.turns(Path(name)):
    of_domain.setdefault(domain, []).append(Example(turns, response))
  parts = {domain: _parts(examples, None) for domain, examples in of_domain.items()}
  for domain, of_parts in parts.items():
    documents.check_enough(name, domain, *of_parts)
  return _corpus(parts)


def _parts(examples: Iterable[Example], test: Iterable[Example] | None) -> Parts:
  """To train on, for validation and for testing, with every prompt once.

  Every tenth is for validation, and another tenth for testing unless ``test`` is given.
  """
  seen = set[object]()

  def new(ones: Iterable[Example]) -> list[Example]:
    found = []
    for one in ones:
      if one.turns not in seen:
        seen.add(one.turns)
        found.append(one)
    return found

  held, found = new(test or ()), new(examples)
  if test is not None:
    return [one for i, one in enumerate(found) if i % 10 != 5], found[5::10], held
  return [one for i, one in enumerate(found) if i % 5], found[5::10], found[0::10]


def _corpus(parts: dict[str, Parts]) -> Corpus[Example]:
  return Corpus(tuple(parts), *map(list, zip(*parts.values(), strict=True)))


# -- The sets.

# Domains of examples from packages; all others are of "modules".
KINDS = {
  "network": ("asyncio", "email", "html", "http", "urllib", "xml"),
  "tools": (
    "collections", "concurrent", "importlib", "json", "logging", "multiprocessing", "unittest",
  ),
}  # fmt: skip


def docstrings(data_dir: Path | None = None) -> Corpus[Example]:
  """Signatures of the standard library's functions, and the first sentences that document them.

  Domains are kinds of packages, and modules that are not packages. Files are divided as those of
  the text ``python``: what is held out stands in no text that is trained on. Signatures and
  sentences are there once; held-out ones are kept.
  """
  library, seen = Path(sysconfig.get_path("stdlib")), set[str]()
  domains = ("modules", *KINDS)
  parts: dict[str, Parts] = {domain: ([], [], []) for domain in domains}
  files = [documents.divided(named) for named in documents.library_texts().values()]
  for part in (2, 1, 0):
    for name in (name for of_domain in files for name in of_domain[part]):
      package = Path(name).parts[0]
      domain = next((kind for kind, names in KINDS.items() if package in names), "modules")
      for example in functions(library / name):
        texts = {example.turns[0][1], example.response}
        if not texts & seen:
          parts[domain][part].append(example)
          seen |= texts
  return _corpus(parts)


def functions(path: Path) -> list[Example]:
  """The documented functions of a Python file."""
  found = []
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      documentation = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
      sentence = re.match(r".*?\.(?= [A-Z]|$)|.*", documentation)
      if sentence and sentence[0]:
        signature = f"def {node.name}({ast.unparse(node.args)})"
        found.append(Example((("user", signature),), sentence[0]))
  return found


def gsm8k(data_dir: Path | None = None) -> Corpus[Example]:
  """``gsm8k``: problems of arithmetic in words, and solutions that end in ``#### 42``."""
  example = lambda one: (one["question"], re.sub(r"<<.*?>>", "", one["answer"]))
  return _from_tfds("gsm8k", example, data_dir)


def self_instruct_seed(data_dir: Path | None = None) -> Corpus[Example]:
  """``self_instruct_seed``: tasks that people wrote; other people's for testing."""
  preparation = (
    "It is not in the catalogue of tensorflow-datasets: the features instruction, input and output "
    "in the splits train (the seed tasks) and test\n(the user-oriented ones). "
    "tfds.dataset_builders.store_as_tfds_dataset writes such a folder."
  )

  def example(one: dict[str, str]) -> tuple[str, str]:
    parts = (one["instruction"], one["input"])
    return "\n".join(part for part in parts if part), one["output"]

  return _from_tfds("self_instruct_seed", example, data_dir, preparation)


def _from_tfds(
  name: str,
  example: Callable[[dict[str, str]], tuple[str, str]],
  data_dir: Path | None,
  preparation: str | None = None,
) -> Corpus[Example]:
  """One domain, with the test split of the data set for testing."""

  def read_split(split: str) -> list[Example]:
    source, found = tfds_source(name, split, data_dir, preparation), []
    for one in source.__getitems__(range(len(source))):
      texts = {k: value.decode() for k, value in one.items() if isinstance(value, bytes)}
      prompt, response = example(texts)
      found.append(Example((("user", prompt),), response))
    return found

  return _corpus({name: _parts(read_split("train"), read_split("test"))})


SETS: dict[str, Callable[[Path | None], Corpus[Example]]] = {
  "docstrings": docstrings,
  "gsm8k": gsm8k,
  "self_instruct_seed": self_instruct_seed,
}


# -- How they are written.


def prompt_of(example: Example, template: str) -> str:
  r"""The text before the response.

  >>> example = Example((("user", "2 + 2?"),), "4")
  >>> prompt_of(example, "plain")
  '2 + 2?\n'
  >>> prompt_of(example, "chat")
  '<|user|>\n2 + 2?\n<|assistant|>\n'
  """
  if template == "plain":
    return "".join(f"{text}\n" for _, text in example.turns)
  before = "".join(f"<|{role}|>\n{text}\n" for role, text in example.turns)
  return f"{before}<|assistant|>\n"
