"""Files that are whole or not there, and one sentence for those that cannot be read or written."""

import contextlib
import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any


class UnusableError(ValueError):
  """A file that a run cannot go on with; the message says which, why, and what to do."""

  status = 2  # Of a program that ends with it.


class DiskError(UnusableError):
  """A file that could not be written."""

  status = 1


@contextlib.contextmanager
def writing(path: Path) -> Generator[None, None, None]:
  """Says what a disk refused: it is full, read-only, or gone."""
  try:
    yield
  except OSError as error:
    raise DiskError(
      f"{path} cannot be written ({error.strerror or error}). What was finished is kept; "
      "--resume goes on with it once there is room and the folder can be written to"
    ) from error


@contextlib.contextmanager
def replacing(path: Path) -> Generator[Path, None, None]:
  """A file to write, which takes the place of ``path`` in one move once it is on disk."""
  new = path.with_name(path.name + ".new")
  with writing(path):
    try:
      yield new
      with new.open("rb+") as file:
        os.fsync(file.fileno())
      new.replace(path)
      folder = os.open(path.parent, os.O_RDONLY)
      with contextlib.suppress(OSError):  # The new name, too, where a folder can be synced.
        os.fsync(folder)
      os.close(folder)
    except OSError:
      with contextlib.suppress(OSError):  # Room for others.
        new.unlink()
      raise


def write(path: Path, *parts: str | bytes | memoryview) -> None:
  """Replaces a file in one move."""
  with replacing(path) as new, new.open("wb") as file:
    file.writelines(part.encode() if isinstance(part, str) else part for part in parts)


def read_json(path: Path, cure: str) -> dict[str, Any]:
  """The dictionary in a file."""
  try:
    content = json.loads(path.read_bytes())
  except (ValueError, RecursionError) as error:  # Not UTF-8, or not JSON.
    raise UnusableError(f"{path} is damaged ({error}): {cure}") from error
  if not isinstance(content, dict):
    raise UnusableError(f"{path} must have a dictionary, got {type(content).__name__}: {cure}")
  return content
