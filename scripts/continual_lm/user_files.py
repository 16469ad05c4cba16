"""Texts and instructions in the files of a user; what is wrong names the file and the line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TEXT_FILES = (".txt", ".jsonl")
INSTRUCTION_FILES = (".jsonl",)


def texts(path: Path) -> Iterator[tuple[str, str]]:
  """Domains and texts: the passages of a ``.txt``, or the records of a ``.jsonl``.

  Passages stand between blank lines and are of one domain, with the name of the file. A record has
  ``text``, and may have ``domain``.
  """
  if path.suffix == ".txt":
    lines = [line.rstrip() for line in path.read_text(encoding="utf-8").splitlines()]
    for passage in "\n".join(lines).split("\n\n"):
      if passage.strip():
        yield path.stem, passage.strip("\n")
    return
  for place, record in records(path):
    yield domain_of(record, place, path), text_in(record, "text", place)


def turns(path: Path) -> Iterator[tuple[str, tuple[tuple[str, str], ...], str]]:
  """Domains, turns ``((role, text), ...)`` and the response to them, from a ``.jsonl``.

  A record has ``prompt`` and ``response``; or ``messages`` with ``role`` and ``content``, of which
  the last one, the assistant's, is the response. It may have ``domain``.
  """
  for place, record in records(path):
    domain = domain_of(record, place, path)
    if "messages" not in record:
      yield (
        domain,
        (("user", text_in(record, "prompt", place)),),
        text_in(record, "response", place),
      )
      continue
    messages = record["messages"]
    if not isinstance(messages, list) or len(messages) < 2:
      raise ValueError(f"{place}: messages must be a list of at least 2, got {_short(messages)}")
    found = []
    for number, message in enumerate(messages):
      at = f"{place}, message {number + 1}"
      if not isinstance(message, dict):
        raise ValueError(f"{at} must be an object, got {_short(message)}")
      found.append((text_in(message, "role", at), text_in(message, "content", at)))
    *before, (role, response) = found
    if role != "assistant":
      raise ValueError(f"{place}: the role of the last message must be assistant, got {role!r}")
    yield domain, tuple(before), response


def records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
  """The objects of a ``.jsonl``, each with the place where it stands."""
  for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
    place = f"{path}, line {number}"
    if not line.strip():
      continue
    try:
      record = json.loads(line)
    except json.JSONDecodeError as error:
      raise ValueError(f"{place} is not JSON: {error}") from error
    if not isinstance(record, dict):
      raise ValueError(f"{place} must be an object, got {_short(record)}")
    yield place, record


def text_in(record: dict[str, Any], name: str, place: str) -> str:
  """The text under a name; raises ``ValueError`` if it is missing."""
  value = record.get(name)
  if not isinstance(value, str) or not value.strip():
    got = _short(value) if name in record else f"only the fields {list(record)}"
    raise ValueError(f"{place}: {name} must be a text that is not empty, got {got}")
  return value


def domain_of(record: dict[str, Any], place: str, path: Path) -> str:
  """The domain of a record; that of the file if it names none."""
  return text_in(record, "domain", place) if "domain" in record else path.stem


def _short(value: Any) -> str:
  text = json.dumps(value)
  return text if len(text) < 60 else text[:57] + "..."
